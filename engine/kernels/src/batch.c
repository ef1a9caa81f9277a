/* Products of rows with matrices: see batch.h. */
#include "batch.h"
#include "gemm.h"

#include <string.h>

#ifndef PANELS_BYTES /* of rows, which the second cache keeps from tile to tile */
#define PANELS_BYTES (1088 << 10)
#endif

enum {
    PIECE_BYTES = 192 << 10, /* of weights that one thread takes at a time, for few rows */
    ROWS_FOR_FREE = 8,      /* that cost no more than reading the weights does */
    PIECE_TILES = 2,        /* at least, for rows in panels, */
    ROWS_AT_ONCE = 64,      /* that a kernel takes at most */
    SMALL_NUMBERS = 16 << 10 /* fewer are done before another thread has woken */
};

static int64_t groups_of(const matrix *m) { return m->row_group ? m->padded / m->row_group : 0; }

rows room_for(const matrix *m, int64_t count, scratch *from)
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

void run(int64_t numbers, int items, moestro_work work, void *context)
{
    if (numbers >= SMALL_NUMBERS) {
        moestro_pool_run(items, work, context);
        return;
    }
    for (int item = 0; item < items; item++)
        work(context, item);
}

void prepare(preparation *each, int count)
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
    if (!with->panel || p->by_gemm || p->count <= with->few(p->m))
        return 0;
    return (p->count - 1) / with->panel + 1;
}

void take_panels(product *p, scratch *from)
{
    p->by_gemm = takes_gemm(p->m, p->count);
    if (p->by_gemm) {
        p->panels = take(from, gemm_bytes(p->m, p->count));
        return;
    }
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
    const int tiles = tiles_of(p->m), of_rows = (tiles - 1) / p->tiles_of_piece + 1;
    const int piece = item - p->first_piece, since = piece / of_rows * p->rows_of_piece;
    const int tile = piece % of_rows * p->tiles_of_piece, end = tile + p->tiles_of_piece;
    const int last = end < tiles ? end : tiles, left = p->count - since;
    const int count = left < p->rows_of_piece ? left : p->rows_of_piece;
    const isa *with = current_isa();
    if (p->panels)
        with->multiply_panels(p->m, tile, last,
                              p->panels + since / with->panel * with->panel_bytes(p->m), count,
                              p->out + since, p->bias);
    else
        with->multiply(p->m, tile, last, &p->x, p->which, count, p->out, p->bias);
}

/* All rows, or as many whole blocks of a kernel as the cache keeps. */
static int rows_of_piece(const product *p)
{
    const isa *with = current_isa();
    if (!p->panels)
        return p->count;
    const int block = ROWS_AT_ONCE / with->panel * with->panel;
    const int64_t fit = PANELS_BYTES / with->panel_bytes(p->m) * with->panel;
    const int64_t rows = (fit / block ? fit / block : 1) * block;
    return rows < p->count ? (int)rows : p->count;
}

void multiply_all(product *each, int count)
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
        const int own = each[i].count && !each[i].by_gemm;
        each[i].rows_of_piece = own ? rows_of_piece(&each[i]) : 0;
        const int blocks = own ? (each[i].count - 1) / each[i].rows_of_piece + 1 : 0;
        items += blocks * ((tiles_of(m) - 1) / each[i].tiles_of_piece + 1);
        numbers += own ? (int64_t)each[i].count * m->outputs * m->padded : 0;
    }
    products all = {each, count};
    run(numbers, items, product_item, &all);
    for (int i = 0; i < count; i++)
        if (each[i].by_gemm)
            multiply_by_gemm(&each[i]);
}

const preparation *same_form(const preparation *each, int count, const matrix *m)
{
    for (int i = 0; i < count; i++)
        if (!each[i].which && !each[i].order && !m->order && each[i].into.group == m->row_group &&
            each[i].into.padded == m->padded)
            return &each[i];
    return NULL;
}

const int32_t *count_up(int count, scratch *from)
{
    int32_t *numbers = take(from, count * (int64_t)sizeof(int32_t));
    for (int i = 0; numbers && i < count; i++)
        numbers[i] = i;
    return numbers;
}
