/* Products of rows with matrices: several of them in one run of the pool. */
#ifndef MOESTRO_BATCH_H
#define MOESTRO_BATCH_H

#include "moestro.h"
#include "pool.h"
#include "scratch.h"

/* The rows that go through one matrix, and where its results go. */
typedef struct {
    const matrix *m;
    rows x;
    const int32_t *which; /* [count]: of x */
    float *const *out;    /* [count] */
    const float *bias;
    uint8_t *panels; /* of the rows, where there are many; or what a GEMM needs */
    int32_t by_gemm;
    int32_t count, first_panel, first_piece, tiles_of_piece, rows_of_piece;
} product;

/* Rows of floats to be brought into the form that a product wants. */
typedef struct {
    rows into;
    const float *from;
    const int32_t *which, *order; /* NULL: row i of `from`; the inputs in their own order */
    int64_t stride;
    int32_t count, inputs, first_row;
} preparation;

/* Room for `count` rows as `m` wants them. Rows to be reordered are floats in between. */
rows room_for(const matrix *m, int64_t count, scratch *from);
/* A form of the same rows, all of them, that another matrix has asked for already; or NULL. */
const preparation *same_form(const preparation *each, int count, const matrix *m);
/* 0, 1, ... count - 1; NULL where there is no memory. */
const int32_t *count_up(int count, scratch *from);
/* Who multiplies `p`, and where it has its rows in panels. */
void take_panels(product *p, scratch *from);
void prepare(preparation *each, int count);
void multiply_all(product *each, int count);
/* On the pool, where `numbers` are enough to wake it for. */
void run(int64_t numbers, int items, moestro_work work, void *context);

#endif
