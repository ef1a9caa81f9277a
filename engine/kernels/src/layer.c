/* A decoder layer of single tokens in two calls; its experts are computed between them. */
#include "layer.h"

#define EXPORT __attribute__((visibility("default")))

static void add(float *stream, const float *x, const float *more, float factor, int64_t numbers)
{
    for (int64_t i = 0; i < numbers; i++)
        stream[i] += factor * (more ? x[i] + more[i] : x[i]);
}

EXPORT int64_t moestro_layer_head(const layer_head *layer, const layer_call *call)
{
    attention_call inner = call->attention;
    const int64_t numbers = (int64_t)inner.count * layer->width;
    inner.x = call->normed;
    inner.out = call->stream;
    /* attention says first whether it has room, and reads nothing then */
    moestro_normalize(call->hidden, layer->first_norm, layer->first_eps, inner.count, layer->width,
                      call->normed);
    const int64_t needed = moestro_attention(&layer->attention, &inner);
    if (needed)
        return needed;
    for (int64_t i = 0; i < numbers; i++)
        call->stream[i] = call->hidden[i] + layer->residual * call->stream[i];
    moestro_normalize(call->stream, layer->second_norm, layer->second_eps, inner.count,
                      layer->width, call->normed);
    const route_call route = {
        call->normed, layer->router, layer->router_bias, call->logits,   call->shares,
        call->room,   call->chosen,  inner.count,        layer->width,   layer->experts,
        layer->k,     layer->normalized,
    };
    moestro_route(&route);
    return 0;
}

EXPORT int64_t moestro_layer_tail(const tail_call *call)
{
    const int64_t needed = call->shared ? moestro_experts(call->shared) : 0;
    if (!needed)
        add(call->stream, call->experts, call->shared ? call->shared->results : call->given, call->residual,
            (int64_t)call->count * call->width);
    return needed;
}

EXPORT int64_t moestro_struct_bytes(int32_t number)
{
    static const int64_t sizes[] = {
        sizeof(matrix),     sizeof(expert),     sizeof(expert_call), sizeof(attention),
        sizeof(attention_call), sizeof(attend_call), sizeof(route_call), sizeof(layer_head),
        sizeof(layer_call), sizeof(tail_call), sizeof(group_call), sizeof(prompt_call),
    };
    const int32_t count = sizeof(sizes) / sizeof(sizes[0]);
    return number < 0 || number >= count ? -1 : sizes[number];
}
