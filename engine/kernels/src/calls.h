/* What Python calls. Pointers stay the caller's; nothing is kept. */
#ifndef MOESTRO_CALLS_H
#define MOESTRO_CALLS_H

#include "moestro.h"

/* The experts of one layer: the rows of each through its first matrix, activation, down matrix. */
typedef struct {
    const expert *const *experts; /* [count], or all of the layer, */
    const int32_t *which;         /* [count]: its numbers of those in the call; or NULL */
    const int32_t *starts;        /* [count + 1]: rows starts[e] to starts[e + 1] are of expert e */
    const int32_t *tokens;        /* [rows]: which row of `hidden` */
    const int32_t *places;        /* [rows]: which row of `results` */
    const float *hidden;          /* [hidden_rows, inputs] */
    float *results;               /* [any, outputs] */
    float *inner;                 /* [rows, inner_stride]; used by the stages apart */
    int64_t inner_stride;
    int32_t count, hidden_rows, inputs, outputs;
    int32_t activation; /* of `enum activation` */
    float alpha, limit;
    uint8_t *scratch;
    int64_t scratch_bytes;
    float *energies; /* [any], by places: |activation|^2 of each row of `moestro_experts`; or NULL */
} expert_call;

/* Who was chosen [tokens, k] as the places of each expert. Ids that are none, and places of
   weight 0, are left out. Experts come in the order of their first place. */
typedef struct {
    const int64_t *ids;
    const float *weights;
    int32_t *which;  /* [most]: the experts */
    int32_t *starts; /* [most + 1]; most is the lesser of experts and tokens * k */
    int32_t *rows, *places; /* [tokens * k] */
    int32_t *room;          /* [experts] */
    int32_t tokens, k, experts;
} group_call;

int32_t moestro_group(const group_call *call); /* -> how many experts */

/* Each returns 0, or, having done nothing, how many bytes of scratch it needs. */
int64_t moestro_experts(const expert_call *call);
int64_t moestro_experts_first(const expert_call *call); /* -> inner [rows, first's outputs] */
int64_t moestro_experts_down(const expert_call *call);  /* inner [rows, down's inputs] -> results */
int64_t moestro_linear(const matrix *m, const float *x, int64_t stride, int32_t count, float *out,
                       const float *bias, uint8_t *scratch, int64_t scratch_bytes);

/* One of several matrices that read the same rows; out [count, outputs]. */
typedef struct {
    const matrix *m;
    const float *bias; /* NULL: none */
    float *out;
} linear_part;

/* All of them in one run, as moestro_linear one by one. */
int64_t moestro_linears(const linear_part *parts, int32_t parts_count, const float *x,
                        int64_t stride, int32_t count, uint8_t *scratch, int64_t scratch_bytes);
void moestro_activate(int32_t activation, const float *inner, float *out, int32_t count,
                      int32_t width, float alpha, float limit);
void moestro_combine(const float *weights, const float *results, int32_t tokens, int32_t k,
                     int32_t width, float *out);

#endif
