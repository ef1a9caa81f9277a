/* What a decoder layer with experts does before its experts and after them, for single tokens. */
#ifndef MOESTRO_LAYER_H
#define MOESTRO_LAYER_H

#include "calls.h"
#include "step.h"

/* hidden -> norm, attention, residual sum, norm, router. What does not change. */
typedef struct {
    attention attention;
    const float *first_norm, *second_norm; /* [width] */
    const float *router, *router_bias;     /* [experts, width], [experts] or NULL */
    float first_eps, second_eps, residual; /* what is added to the stream is multiplied by it */
    int32_t width, experts, k, normalized;
} layer_head;

/* `attention.x` and `attention.out` are set by the call. */
typedef struct {
    attention_call attention;
    const float *hidden;          /* [count, width] */
    float *stream, *normed;       /* [count, width]: after attention, and what the experts read */
    float *logits, *shares, *room; /* [count, experts], [count, k], [count, 2, experts] */
    int64_t *chosen;              /* [count, k] */
} layer_call;

/* stream += residual * (experts + the shared one's results, if there is one) */
typedef struct {
    const expert_call *shared; /* NULL: none, or it has run already: then */
    const float *given;        /* [count, width] its results, or NULL */
    const float *experts;      /* [count, width] */
    float *stream;             /* [count, width] */
    float residual;
    int32_t count, width;
} tail_call;

/* 0, or, having done nothing, how many bytes of scratch are needed. */
int64_t moestro_layer_head(const layer_head *layer, const layer_call *call);
int64_t moestro_layer_tail(const tail_call *call);
/* sizeof of what the calls are given, in the order of library.py; -1 past the last */
int64_t moestro_struct_bytes(int32_t number);

#endif
