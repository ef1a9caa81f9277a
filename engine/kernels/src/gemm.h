/* int8 products of many rows by a GEMM that is not this library's: see gemm.c. */
#ifndef MOESTRO_GEMM_H
#define MOESTRO_GEMM_H

#include "batch.h"

/* int8 [count, inputs] times int8 [outputs, inputs] -> sums int32 [count, outputs], exactly. 1 when
   that is done, 0 where it is not. */
typedef int32_t (*moestro_gemm)(const int8_t *rows, const int8_t *weights, int32_t *sums,
                                int32_t count, int32_t outputs, int32_t inputs);

/* From `least` rows on by `gemm`; NULL: never. Not while another thread multiplies. */
void moestro_use_gemm(moestro_gemm gemm, int32_t least);

int takes_gemm(const matrix *m, int count);
/* Of scratch, at a product's `panels`. */
int64_t gemm_bytes(const matrix *m, int count);
void multiply_by_gemm(const product *p);

#endif
