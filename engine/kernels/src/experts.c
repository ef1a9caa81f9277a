/* One call for all experts of a layer that are here. */
#include "batch.h"
#include "calls.h"

#define EXPORT __attribute__((visibility("default")))

#ifndef ROUND_BYTES /* between the products, of each thread: its cache keeps them */
#define ROUND_BYTES (768 << 10)
#endif

static const expert *expert_of(const expert_call *call, int e)
{
    return call->experts[call->which ? call->which[e] : e];
}

static int rows_of(const expert_call *call, int begin, int end)
{
    return call->starts[end] - call->starts[begin];
}

/* `hidden` is what the matrix wants already. */
static int is_direct(const expert_call *call, const matrix *m)
{
    return !m->row_group && !m->order && m->padded == call->inputs;
}

/* Rows are made for this matrix alone: in its order of inputs, or because few are asked for. */
static int is_apart(const expert_call *call, const matrix *m)
{
    return !is_direct(call, m) && (m->order || rows_of(call, 0, call->count) < call->hidden_rows);
}

/* all[e] = `hidden` as expert e wants it, where several may: each form of it is made once. */
static void read_together(const expert_call *call, rows *all, scratch *from)
{
    preparation *forms = take(from, call->count * (int64_t)sizeof(preparation));
    preparation counted[64]; /* without memory: what has been asked for is asked for again */
    int known = 0;
    for (int e = 0; e < call->count; e++) {
        const matrix *m = &expert_of(call, e)->first;
        if (is_direct(call, m) || is_apart(call, m))
            continue;
        const preparation *found = same_form(forms ? forms : counted, known, m);
        const rows x = found ? found->into : room_for(m, call->hidden_rows, from);
        const preparation made = {x, call->hidden, NULL, NULL, call->inputs, call->hidden_rows,
                                  call->inputs, 0};
        if (!found && forms)
            forms[known++] = made;
        else if (!found && known < 64)
            counted[known++] = made;
        if (all)
            all[e] = x;
    }
    if (forms)
        prepare(forms, known);
}

/* hidden -> inner of the experts from `begin` to before `end`, or just its scratch. */
static void first_products(const expert_call *call, int begin, int end, const rows *together,
                           float *inner, int64_t stride, scratch *from)
{
    const int base = call->starts[begin], total = rows_of(call, begin, end);
    product *each = take(from, (end - begin) * (int64_t)sizeof(product));
    preparation *forms = take(from, (end - begin) * (int64_t)sizeof(preparation));
    float **out = take(from, total * (int64_t)sizeof(float *));
    const int32_t *own = count_up(total, from);
    int known = 0;
    for (int e = begin; e < end; e++) {
        const matrix *m = &expert_of(call, e)->first;
        const int start = call->starts[e], count = rows_of(call, e, e + 1);
        const int apart = is_apart(call, m);
        product made = {.m = m, .count = count, .which = apart ? own : call->tokens + start};
        if (apart)
            made.x = room_for(m, count, from);
        else if (is_direct(call, m))
            made.x = (rows){.floats = call->hidden, .stride = call->inputs, .padded = m->padded};
        else if (together)
            made.x = together[e];
        take_panels(&made, from);
        if (!each)
            continue;
        if (apart)
            forms[known++] = (preparation){made.x,   call->hidden, call->tokens + start,
                                           m->order, call->inputs, count,
                                           call->inputs, 0};
        made.out = out + (start - base);
        made.bias = expert_of(call, e)->first_bias;
        each[e - begin] = made;
    }
    if (!each)
        return;
    for (int row = 0; row < total; row++)
        out[row] = inner + row * stride;
    prepare(forms, known);
    multiply_all(each, end - begin);
}

/* inner [their rows, down's inputs] -> results, or just its scratch. */
static void down_products(const expert_call *call, int begin, int end, const float *inner,
                          int64_t stride, scratch *from)
{
    const int base = call->starts[begin], total = rows_of(call, begin, end);
    product *each = take(from, (end - begin) * (int64_t)sizeof(product));
    preparation *forms = take(from, (end - begin) * (int64_t)sizeof(preparation));
    float **out = take(from, total * (int64_t)sizeof(float *));
    const int32_t *own = count_up(total, from);
    for (int e = begin; e < end; e++) {
        const matrix *m = &expert_of(call, e)->down;
        const int start = call->starts[e] - base, count = rows_of(call, e, e + 1);
        product made = {.m = m, .x = room_for(m, count, from), .count = count};
        take_panels(&made, from);
        if (!each)
            continue;
        forms[e - begin] = (preparation){made.x, inner + start * stride, NULL, m->order, stride,
                                         count, m->inputs, 0};
        made.which = own;
        made.out = out + start;
        made.bias = expert_of(call, e)->down_bias;
        each[e - begin] = made;
    }
    if (!each)
        return;
    for (int row = 0; row < total; row++)
        out[row] = call->results + (int64_t)call->places[base + row] * call->outputs;
    prepare(forms, end - begin);
    multiply_all(each, end - begin);
}

typedef struct {
    const expert_call *call;
    int begin, end; /* experts */
    float *inner, *active;
    int64_t inner_stride, active_stride;
} round_of_experts;

static float energy(const float *x, int width)
{
    double sum = 0;
    for (int i = 0; i < width; i++)
        sum += (double)x[i] * x[i];
    return (float)sum;
}

static void activate_item(void *context, int row)
{
    const round_of_experts *a = context;
    const expert_call *call = a->call;
    const int place = call->starts[a->begin] + row;
    int e = a->end - 1;
    while (call->starts[e] > place)
        e--;
    float *active = a->active + row * a->active_stride;
    const int width = expert_of(call, e)->down.inputs;
    current_isa()->activate(call->activation, a->inner + row * a->inner_stride, active, width,
                            call->alpha, call->limit);
    if (call->energies)
        call->energies[call->places[place]] = energy(active, width);
}

static void one_round(round_of_experts *a, const rows *together, scratch *from)
{
    const expert_call *call = a->call;
    const int64_t total = rows_of(call, a->begin, a->end);
    a->inner = take(from, total * a->inner_stride * (int64_t)sizeof(float));
    a->active = take(from, total * a->active_stride * (int64_t)sizeof(float));
    first_products(call, a->begin, a->end, together, a->inner, a->inner_stride, from);
    if (from->start)
        run(total * a->inner_stride, (int)total, activate_item, a);
    down_products(call, a->begin, a->end, a->active, a->active_stride, from);
}

/* All experts, some at a time: what lies between their products is still in the cache. */
static void whole_call(const expert_call *call, scratch *from)
{
    rows *together = take(from, call->count * (int64_t)sizeof(rows));
    read_together(call, together, from);
    round_of_experts a = {.call = call, .inner_stride = 1, .active_stride = 1};
    for (int e = 0; e < call->count; e++) {
        const expert *each = expert_of(call, e);
        a.inner_stride = larger(a.inner_stride, each->first.outputs);
        a.active_stride = larger(a.active_stride, each->down.inputs);
    }
    /* Rows a power of two apart would share a few lines of the cache. */
    a.inner_stride += TILE, a.active_stride += TILE;
    const int64_t row_bytes = (a.inner_stride + a.active_stride) * (int64_t)sizeof(float);
    const int64_t fit = moestro_pool_threads() * (int64_t)ROUND_BYTES / row_bytes;
    const int64_t before = from->used;
    int64_t most = before;
    for (; a.begin < call->count; a.begin = a.end) {
        a.end = a.begin + 1;
        while (a.end < call->count && rows_of(call, a.begin, a.end + 1) <= fit)
            a.end++;
        from->used = before;
        one_round(&a, together, from);
        most = larger(most, from->used);
    }
    from->used = most;
}

static int is_place(const group_call *call, int place)
{
    const int64_t id = call->ids[place];
    return call->weights[place] != 0 && id >= 0 && id < call->experts;
}

/* Counted, then laid out: an expert's places stay in their order. */
EXPORT int32_t moestro_group(const group_call *call)
{
    const int total = call->tokens * call->k;
    int32_t *at = call->room;
    int found = 0, start = 0;
    for (int e = 0; e < call->experts; e++)
        at[e] = 0;
    for (int place = 0; place < total; place++)
        if (is_place(call, place) && !at[call->ids[place]]++)
            call->which[found++] = (int32_t)call->ids[place];
    for (int i = 0; i < found; i++) {
        const int count = at[call->which[i]];
        call->starts[i] = at[call->which[i]] = start;
        start += count;
    }
    call->starts[found] = start;
    for (int place = 0; place < total; place++) {
        if (!is_place(call, place))
            continue;
        const int row = at[call->ids[place]]++;
        call->rows[row] = place / call->k;
        call->places[row] = place;
    }
    return found;
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
static void first_stage(const expert_call *call, scratch *from)
{
    rows *together = take(from, call->count * (int64_t)sizeof(rows));
    read_together(call, together, from);
    first_products(call, 0, call->count, together, call->inner, call->inner_stride, from);
}

EXPORT int64_t moestro_experts_first(const expert_call *call)
{
    scratch needed = {NULL, 0}, given = {call->scratch, 0};
    first_stage(call, &needed);
    if (needed.used > call->scratch_bytes)
        return needed.used;
    first_stage(call, &given);
    return 0;
}

static void down_stage(const expert_call *call, scratch *from)
{
    down_products(call, 0, call->count, call->inner, call->inner_stride, from);
}

EXPORT int64_t moestro_experts_down(const expert_call *call)
{
    scratch needed = {NULL, 0}, given = {call->scratch, 0};
    down_stage(call, &needed);
    if (needed.used > call->scratch_bytes)
        return needed.used;
    down_stage(call, &given);
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
