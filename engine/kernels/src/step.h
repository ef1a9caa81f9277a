/* What a step of single tokens does beside its products: norms, positions, attention. */
#ifndef MOESTRO_STEP_H
#define MOESTRO_STEP_H

#include "moestro.h"

enum { MOST_GROUP = 64 }; /* query heads that share a key head */

/* Tokens of a prompt, the last ones of `length`. Strides are in floats; a head's own numbers lie
   together. Heads' widths are multiples of TILE. */
typedef struct {
    const float *q;     /* [heads, tokens, dim] */
    const float *keys;  /* [key_heads, length, dim] */
    const float *values; /* [key_heads, length, value_dim] */
    float *out;         /* [tokens, heads, value_dim] */
    float *states;      /* [heads, tokens, 2] for the call's own use */
    int64_t q_head, q_token, key_head, key_token, value_head, value_token;
    int32_t tokens, length, heads, key_heads, dim, value_dim;
    float scaling;
} prompt_call;

typedef struct {
    void (*normalize)(const float *x, const float *weight, float eps, int width, float *out);
    void (*attend)(const float *q, int group, int dim, const float *keys, const float *values,
                   const int32_t *rows, int length, float *out);
    float (*score)(const float *x, const float *matrix, const float *bias, int inputs, int experts,
                   float *logits, float *weights);
    /* Tokens [begin, end) of the query heads that share key head h. */
    void (*attend_prompt)(const prompt_call *c, int h, int begin, int end);
} step_isa;

extern const step_isa step_plain;
#if defined(__x86_64__)
extern const step_isa step_avx2, step_avxvnni, step_avx512;
#endif

const step_isa *current_step(void);

/* One attention module: what does not change. */
typedef struct {
    matrix query, key, value, output;
    const float *query_bias, *key_bias, *value_bias, *output_bias; /* NULL: none */
    const float *query_norm, *key_norm;                            /* NULL: none */
    int32_t query_norm_width, key_norm_width; /* of a head, or of all of them together */
    int32_t heads, key_heads, dim;
    int32_t rotary; /* first inputs of a head that turn with the position */
    float eps, scaling;
} attention;

/* One token of each of `count` sequences. */
typedef struct {
    const float *x;         /* [count, inputs] */
    const float *cos, *sin; /* [count, rotary] */
    float *keys, *values;   /* [key_heads, pool_rows, dim] */
    const int32_t *rows;    /* those of each sequence's tokens, one behind the other */
    const int64_t *starts;  /* [count + 1]: of each sequence in `rows`; the last is the new token */
    float *out;             /* [count, outputs] */
    int64_t pool_rows;
    uint8_t *scratch;
    int64_t scratch_bytes;
    int32_t count;
} attention_call;

/* 0, or, having done nothing, how many bytes of scratch it needs. */
int64_t moestro_attention(const attention *a, const attention_call *call);
/* Tokens of prompts, too: keys and values to their rows, and -> out [count, heads, dim] the queries,
   which have turned and are scaled. Nobody attends. */
int64_t moestro_place(const attention *a, const attention_call *call);

/* Attention alone: queries that have turned and are scaled, over keys and values in their places. */
typedef struct {
    const float *q;             /* [count, heads, dim] */
    const float *keys, *values; /* [key_heads, pool_rows, dim] */
    const int32_t *rows;        /* as in attention_call */
    const int64_t *starts;
    float *out; /* [count, heads, dim] */
    int64_t pool_rows;
    int32_t count, heads, key_heads, dim;
} attend_call;

void moestro_attend(const attend_call *call);
void moestro_attend_prompt(const prompt_call *call);

/* A router: logits = x matrix^T + bias; of their softmax the k largest, scaled to add up to one if
   `normalized`. */
typedef struct {
    const float *x, *matrix, *bias; /* [count, inputs], [experts, inputs], [experts] or NULL */
    float *logits, *shares, *room;  /* [count, experts], [count, k], [count, 2, experts] */
    int64_t *chosen;                /* [count, k] */
    int32_t count, inputs, experts, k, normalized;
} route_call;

void moestro_route(const route_call *call);
void moestro_normalize(const float *x, const float *weight, float eps, int32_t count, int32_t width,
                       float *out);

#endif
