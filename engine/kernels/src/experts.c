/* One call for all experts of a layer that are here. */
#include "batch.h"
#include "calls.h"

#define EXPORT __attribute__((visibility("default")))

/* hidden -> inner, or just its scratch where that has no memory. */
static void first_products(const expert_call *call, float *inner, int64_t stride, scratch *from)
{
    const int total = call->starts[call->count];
    product *each = take(from, call->count * (int64_t)sizeof(product));
    preparation *forms = take(from, call->count * (int64_t)sizeof(preparation));
    float **out = take(from, total * (int64_t)sizeof(float *));
    const int32_t *own = count_up(total, from);
    preparation counted[64]; /* without memory: what has been asked for is asked for again */
    const int own_rows = total < call->hidden_rows; /* else all that may be asked for, once */
    int known = 0, direct = 0;
    for (int e = 0; e < call->count; e++) {
        const matrix *m = &call->experts[e]->first;
        const int start = call->starts[e], count = call->starts[e + 1] - start;
        const int apart = m->order || own_rows; /* rows of this expert alone */
        const preparation *found = same_form(forms ? forms : counted, known, m);
        rows x = {.floats = call->hidden, .stride = call->inputs, .padded = m->padded};
        direct = !m->row_group && !m->order && m->padded == call->inputs;
        if (found) {
            x = found->into;
        } else if (!direct) {
            x = room_for(m, apart ? count : call->hidden_rows, from);
            const preparation made = {x, call->hidden, apart ? call->tokens + start : NULL,
                                      m->order, call->inputs,
                                      apart ? count : call->hidden_rows, call->inputs, 0};
            if (forms)
                forms[known++] = made;
            else if (known < 64)
                counted[known++] = made;
        }
        product made = {.m = m, .x = x, .count = count};
        take_panels(&made, from);
        if (!each)
            continue;
        made.which = !direct && apart ? own : call->tokens + start;
        made.out = out + start;
        made.bias = call->experts[e]->first_bias;
        each[e] = made;
    }
    if (!each)
        return;
    for (int row = 0; row < total; row++)
        out[row] = inner + row * stride;
    prepare(forms, known);
    multiply_all(each, call->count);
}

/* inner [rows, down's inputs] -> results, or just its scratch. */
static void down_products(const expert_call *call, const float *inner, int64_t stride,
                          scratch *from)
{
    const int total = call->starts[call->count];
    product *each = take(from, call->count * (int64_t)sizeof(product));
    preparation *forms = take(from, call->count * (int64_t)sizeof(preparation));
    float **out = take(from, total * (int64_t)sizeof(float *));
    const int32_t *own = count_up(total, from);
    for (int e = 0; e < call->count; e++) {
        const matrix *m = &call->experts[e]->down;
        const int start = call->starts[e], count = call->starts[e + 1] - start;
        product made = {.m = m, .x = room_for(m, count, from), .count = count};
        take_panels(&made, from);
        if (!each)
            continue;
        forms[e] = (preparation){made.x, inner + start * stride, NULL, m->order, stride, count,
                                 m->inputs, 0};
        made.which = own;
        made.out = out + start;
        made.bias = call->experts[e]->down_bias;
        each[e] = made;
    }
    if (!each)
        return;
    for (int row = 0; row < total; row++)
        out[row] = call->results + (int64_t)call->places[row] * call->outputs;
    prepare(forms, call->count);
    multiply_all(each, call->count);
}

static int widest(const expert_call *call)
{
    int most = 1;
    for (int e = 0; e < call->count; e++)
        if (call->experts[e]->first.outputs > most)
            most = call->experts[e]->first.outputs;
    return most;
}

typedef struct {
    const expert_call *call;
    float *inner, *active;
    int64_t stride;
} activations;

static float energy(const float *x, int width)
{
    double sum = 0;
    for (int i = 0; i < width; i++)
        sum += (double)x[i] * x[i];
    return (float)sum;
}

static void activate_item(void *context, int row)
{
    const activations *a = context;
    const expert_call *call = a->call;
    int e = call->count - 1;
    while (call->starts[e] > row)
        e--;
    float *active = a->active + row * a->stride;
    const int width = call->experts[e]->down.inputs;
    current_isa()->activate(call->activation, a->inner + row * a->stride, active, width, call->alpha,
                            call->limit);
    if (call->energies)
        call->energies[call->places[row]] = energy(active, width);
}

static void whole_call(const expert_call *call, scratch *from)
{
    const int64_t total = call->starts[call->count], stride = widest(call);
    float *inner = take(from, total * stride * (int64_t)sizeof(float));
    float *active = take(from, total * stride * (int64_t)sizeof(float));
    first_products(call, inner, stride, from);
    if (from->start) {
        activations all = {call, inner, active, stride};
        run(total * stride, (int)total, activate_item, &all);
    }
    down_products(call, active, stride, from);
}

EXPORT int64_t moestro_experts(const expert_call *call)
{
    scratch needed = {NULL, 0}, given = {call->scratch, 0};
    whole_call(call, &needed);
    if (needed.used > call->scratch_bytes)
        return needed.used;
    whole_call(call, &given);
    return 0;
}

/* For activations that only their own module knows: what comes before it, and what after. */
EXPORT int64_t moestro_experts_first(const expert_call *call)
{
    scratch needed = {NULL, 0}, given = {call->scratch, 0};
    first_products(call, call->inner, call->inner_stride, &needed);
    if (needed.used > call->scratch_bytes)
        return needed.used;
    first_products(call, call->inner, call->inner_stride, &given);
    return 0;
}

EXPORT int64_t moestro_experts_down(const expert_call *call)
{
    scratch needed = {NULL, 0}, given = {call->scratch, 0};
    down_products(call, call->inner, call->inner_stride, &needed);
    if (needed.used > call->scratch_bytes)
        return needed.used;
    down_products(call, call->inner, call->inner_stride, &given);
    return 0;
}

/* inner [count, 2 * width], or of an activation without gate [count, width] -> out [count, width] */
EXPORT void moestro_activate(int32_t activation, const float *inner, float *out, int32_t count,
                             int32_t width, float alpha, float limit)
{
    const int64_t stride = activation <= CLAMPED_SIGMOID_MUL ? 2 * (int64_t)width : width;
    for (int row = 0; row < count; row++)
        current_isa()->activate(activation, inner + row * stride, out + (int64_t)row * width, width,
                                alpha, limit);
}

/* results [tokens, k, width] -> out [tokens, width], each row's k in their order. */
EXPORT void moestro_combine(const float *weights, const float *results, int32_t tokens, int32_t k,
                            int32_t width, float *out)
{
    for (int t = 0; t < tokens; t++)
        current_isa()->combine(weights + (int64_t)t * k, results + (int64_t)t * k * width, k, width,
                               out + (int64_t)t * width);
}
