/* One call for all experts of a layer that are here, and one for a lone matrix. */
#include "calls.h"
#include "pool.h"
#include "scratch.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    PIECE_BYTES = 96 << 10, /* of weights that one thread takes at a time, for few rows */
    ROWS_FOR_FREE = 8,      /* that cost no more than reading the weights does */
    PIECE_TILES = 2,        /* at least, for rows in panels */
    SMALL_NUMBERS = 16 << 10 /* fewer are done before another thread has woken */
};

/* The rows that go through one matrix, and where its results go. */
typedef struct {
    const matrix *m;
    rows x;
    const int32_t *which; /* [count]: of x */
    float *const *out;    /* [count] */
    const float *bias;
    uint8_t *panels; /* of the rows, where there are many */
    int32_t count, first_panel, first_piece, tiles_of_piece;
} product;

/* Rows of floats to be brought into the form that a product wants. */
typedef struct {
    rows into;
    const float *from;
    const int32_t *which, *order; /* NULL: row i of `from`; the inputs in their own order */
    int64_t stride;
    int32_t count, inputs, first_row;
} preparation;

static int64_t groups_of(const matrix *m) { return m->row_group ? m->padded / m->row_group : 0; }

/* Room for `count` rows as `m` wants them. Rows to be reordered are floats in between. */
static rows room_for(const matrix *m, int64_t count, scratch *from)
{
    rows x = {.padded = m->padded, .group = m->row_group, .stride = m->padded};
    if (m->row_group) {
        x.values = take(from, count * m->padded);
        x.scales = take(from, count * groups_of(m) * (int64_t)sizeof(float));
        x.sums = take(from, count * groups_of(m) * (int64_t)sizeof(int32_t));
    }
    if (!m->row_group || m->order)
        x.floats = take(from, count * m->padded * (int64_t)sizeof(float));
    return x;
}

static void prepare_row(const preparation *p, int row)
{
    const float *x = p->from + (p->which ? p->which[row] : row) * p->stride;
    if (!p->into.group || p->order) {
        float *out = (float *)p->into.floats + row * p->into.stride;
        for (int k = 0; k < p->inputs; k++)
            out[k] = x[p->order ? p->order[k] : k];
        memset(out + p->inputs, 0, sizeof(float) * (size_t)(p->into.padded - p->inputs));
        x = out;
    }
    if (p->into.group)
        current_isa()->quantize(x, p->inputs, &p->into, row);
}

typedef struct {
    const preparation *each;
    int count;
} preparations;

static void prepare_item(void *context, int item)
{
    const preparations *all = context;
    int i = all->count - 1;
    while (all->each[i].first_row > item)
        i--;
    prepare_row(&all->each[i], item - all->each[i].first_row);
}

static void run(int64_t numbers, int items, moestro_work work, void *context)
{
    if (numbers >= SMALL_NUMBERS) {
        moestro_pool_run(items, work, context);
        return;
    }
    for (int item = 0; item < items; item++)
        work(context, item);
}

static void prepare(preparation *each, int count)
{
    int items = 0;
    int64_t numbers = 0;
    for (int i = 0; i < count; i++) {
        each[i].first_row = items;
        items += each[i].count;
        numbers += (int64_t)each[i].count * each[i].into.padded;
    }
    preparations all = {each, count};
    run(numbers, items, prepare_item, &all);
}

typedef struct {
    const product *each;
    int count;
} products;

static int tiles_of(const matrix *m) { return (m->outputs + TILE - 1) / TILE; }

static int panels_of(const product *p)
{
    const isa *with = current_isa();
    return with->panel && p->count > with->few(p->m) ? (p->count - 1) / with->panel + 1 : 0;
}

/* Where `p` has its rows in panels. */
static void take_panels(product *p, scratch *from)
{
    const int panels = panels_of(p);
    p->panels = panels ? take(from, panels * current_isa()->panel_bytes(p->m)) : NULL;
}

static void pack_item(void *context, int item)
{
    const products *all = context;
    int i = all->count - 1;
    while (all->each[i].first_panel > item)
        i--;
    const product *p = &all->each[i];
    const isa *with = current_isa();
    const int panel = item - p->first_panel, start = panel * with->panel;
    const int count = p->count - start < with->panel ? p->count - start : with->panel;
    with->pack(p->m, &p->x, p->which + start, count, p->panels + panel * with->panel_bytes(p->m));
}

static void pack_all(product *each, int count)
{
    int items = 0;
    int64_t numbers = 0;
    for (int i = 0; i < count; i++) {
        each[i].first_panel = items;
        items += panels_of(&each[i]);
        numbers += (int64_t)each[i].count * each[i].m->padded;
    }
    products all = {each, count};
    run(numbers, items, pack_item, &all);
}

static void product_item(void *context, int item)
{
    const products *all = context;
    int i = all->count - 1;
    while (all->each[i].first_piece > item)
        i--;
    const product *p = &all->each[i];
    const int tile = (item - p->first_piece) * p->tiles_of_piece, end = tile + p->tiles_of_piece;
    const int tiles = tiles_of(p->m), last = end < tiles ? end : tiles;
    const isa *with = current_isa();
    if (p->panels)
        with->multiply_panels(p->m, tile, last, p->panels, p->count, p->out, p->bias);
    else
        with->multiply(p->m, tile, last, &p->x, p->which, p->count, p->out, p->bias);
}

static void multiply_all(product *each, int count)
{
    int items = 0;
    int64_t numbers = 0;
    pack_all(each, count);
    for (int i = 0; i < count; i++) {
        const matrix *m = each[i].m;
        const int64_t weight = 1 + each[i].count / ROWS_FOR_FREE;
        const int64_t fit = PIECE_BYTES / (m->tile_bytes * weight);
        const int least = each[i].panels ? PIECE_TILES : 1;
        each[i].tiles_of_piece = (int32_t)(fit < least ? least : fit / least * least);
        each[i].first_piece = items;
        items += each[i].count ? (tiles_of(m) - 1) / each[i].tiles_of_piece + 1 : 0;
        numbers += (int64_t)each[i].count * m->outputs * m->padded;
    }
    products all = {each, count};
    run(numbers, items, product_item, &all);
}

/* A form of the hidden rows that an earlier expert has asked for already. */
static const preparation *same_form(const preparation *each, int count, const matrix *m)
{
    for (int i = 0; i < count; i++)
        if (!each[i].which && !m->order && each[i].into.group == m->row_group &&
            each[i].into.padded == m->padded)
            return &each[i];
    return NULL;
}

static const int32_t *count_up(int count, scratch *from)
{
    int32_t *numbers = take(from, count * (int64_t)sizeof(int32_t));
    for (int i = 0; numbers && i < count; i++)
        numbers[i] = i;
    return numbers;
}

/* hidden -> inner, or just its scratch where that has no memory. */
static void first_products(const expert_call *call, float *inner, int64_t stride, scratch *from)
{
    const int total = call->starts[call->count];
    product *each = take(from, call->count * (int64_t)sizeof(product));
    preparation *forms = take(from, call->count * (int64_t)sizeof(preparation));
    float **out = take(from, total * (int64_t)sizeof(float *));
    const int32_t *own = count_up(total, from);
    preparation counted[64]; /* without memory: what has been asked for is asked for again */
    int known = 0, direct = 0;
    for (int e = 0; e < call->count; e++) {
        const matrix *m = &call->experts[e]->first;
        const int start = call->starts[e], count = call->starts[e + 1] - start;
        const preparation *found = same_form(forms ? forms : counted, known, m);
        rows x = {.floats = call->hidden, .stride = call->inputs, .padded = m->padded};
        direct = !m->row_group && !m->order && m->padded == call->inputs;
        if (found) {
            x = found->into;
        } else if (!direct) {
            x = room_for(m, m->order ? count : call->hidden_rows, from);
            const preparation made = {x, call->hidden, m->order ? call->tokens + start : NULL,
                                      m->order, call->inputs,
                                      m->order ? count : call->hidden_rows, call->inputs, 0};
            if (forms)
                forms[known++] = made;
            else if (known < 64)
                counted[known++] = made;
        }
        product made = {.m = m, .x = x, .count = count};
        take_panels(&made, from);
        if (!each)
            continue;
        made.which = m->order ? own : call->tokens + start;
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

static void linear(const matrix *m, const float *x, int64_t stride, int32_t count, float *out,
                   const float *bias, scratch *from)
{
    float **each = take(from, count * (int64_t)sizeof(float *));
    const int32_t *own = count_up(count, from);
    rows prepared = {.floats = x, .stride = stride, .padded = m->padded};
    const int direct = !m->row_group && !m->order && m->padded == m->inputs;
    if (!direct)
        prepared = room_for(m, count, from);
    product one = {.m = m, .x = prepared, .which = own, .out = each, .bias = bias, .count = count};
    take_panels(&one, from);
    if (!from->start)
        return;
    for (int row = 0; row < count; row++)
        each[row] = out + (int64_t)row * m->outputs;
    if (!direct) {
        preparation form = {prepared, x, NULL, m->order, stride, count, m->inputs, 0};
        prepare(&form, 1);
    }
    multiply_all(&one, 1);
}

/* x fp32 [count, stride] times m -> out [count, outputs], plus bias where there is one. */
EXPORT int64_t moestro_linear(const matrix *m, const float *x, int64_t stride, int32_t count,
                              float *out, const float *bias, uint8_t *given, int64_t given_bytes)
{
    scratch needed = {NULL, 0}, from = {given, 0};
    linear(m, x, stride, count, out, bias, &needed);
    if (needed.used > given_bytes)
        return needed.used;
    linear(m, x, stride, count, out, bias, &from);
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
