/* int8 products of many rows by a GEMM that is not this library's, where that is faster.

   It wants rows and weights as matrices lie elsewhere, one row after the other, and gives the sums:
   weights are taken out of their tiles, rows are put together, and what comes is scaled by the same
   operations as the library's own sums, which are the same integers. So who multiplied makes no
   difference to any bit. */
#include "gemm.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    BLOCK_INPUTS = 4 * TILE, /* a square of 16 words is turned at a time */
    BLOCK_TILES = 64         /* of weights that lie in rows together: a step's memory is planned */
};

static moestro_gemm chosen_gemm;
static int32_t least_rows;

EXPORT void moestro_use_gemm(moestro_gemm gemm, int32_t least)
{
    chosen_gemm = gemm;
    least_rows = least;
}

int takes_gemm(const matrix *m, int count)
{
    return chosen_gemm && count >= least_rows && m->format == INT8 && m->row_group == m->padded;
}

typedef struct {
    const product *p;
    int8_t *rows, *weights;
    int32_t *sums;
    int tile, tiles; /* multiplied now */
} gemm_job;

static gemm_job lay_out(const matrix *m, int count, scratch *from)
{
    const int all = (m->outputs + TILE - 1) / TILE;
    gemm_job job = {.tiles = all < BLOCK_TILES ? all : BLOCK_TILES};
    const int64_t outputs = job.tiles * TILE;
    job.rows = take(from, (int64_t)count * m->padded);
    job.weights = take(from, outputs * m->padded);
    job.sums = take(from, count * outputs * (int64_t)sizeof(int32_t));
    return job;
}

int64_t gemm_bytes(const matrix *m, int count)
{
    scratch needed = {NULL, 0};
    lay_out(m, count, &needed);
    return needed.used;
}

static void gather_item(void *context, int row)
{
    const gemm_job *job = context;
    const rows *x = &job->p->x;
    memcpy(job->rows + (int64_t)row * x->padded,
           x->values + (int64_t)job->p->which[row] * x->padded, (size_t)x->padded);
}

/* A tile's lines of four inputs of each output -> its outputs, signed. */
static void untile_item(void *context, int item)
{
    const gemm_job *job = context;
    const matrix *m = job->p->m;
    const uint8_t *w = m->tiles + (job->tile + item) * m->tile_bytes;
    int8_t *to = job->weights + (int64_t)item * TILE * m->padded;
    for (int k = 0; k < m->padded; k += BLOCK_INPUTS) {
        const int words = (m->padded - k < BLOCK_INPUTS ? m->padded - k : BLOCK_INPUTS) / 4;
        for (int n = 0; n < TILE; n++) {
            uint32_t turned[TILE];
            for (int i = 0; i < words; i++)
                memcpy(turned + i, w + ((int64_t)(k / 4 + i) * TILE + n) * 4, 4);
            for (int i = 0; i < words; i++)
                turned[i] ^= 0x80808080u; /* from above 0 to about 0 */
            memcpy(to + (int64_t)n * m->padded + k, turned, (size_t)words * 4);
        }
    }
}

static void finish_item(void *context, int row)
{
    const gemm_job *job = context;
    const product *p = job->p;
    current_isa()->finish(p->m, job->tile, job->tile + job->tiles,
                          job->sums + (int64_t)row * job->tiles * TILE,
                          p->x.scales[p->which[row]], p->out[row], p->bias);
}

/* The library's own, of rows as they lie: there is no room for panels. */
static void own_item(void *context, int item)
{
    const gemm_job *job = context;
    const product *p = job->p;
    const int tile = job->tile + item;
    current_isa()->multiply(p->m, tile, tile + 1, &p->x, p->which, p->count, p->out, p->bias);
}

void multiply_by_gemm(const product *p)
{
    const matrix *m = p->m;
    scratch own = {p->panels, 0};
    gemm_job job = lay_out(m, p->count, &own);
    const int all = (m->outputs + TILE - 1) / TILE, most = job.tiles;
    job.p = p;
    moestro_pool_run(p->count, gather_item, &job);
    for (; job.tile < all; job.tile += job.tiles) {
        job.tiles = all - job.tile < most ? all - job.tile : most;
        moestro_pool_run(job.tiles, untile_item, &job);
        if (chosen_gemm(job.rows, job.weights, job.sums, p->count, job.tiles * TILE, m->padded))
            moestro_pool_run(p->count, finish_item, &job);
        else
            moestro_pool_run(job.tiles, own_item, &job);
    }
}
