/* What the library offers: products with matrices in tiles of 16 rows. layout.py draws the tiles. */
#ifndef MOESTRO_H
#define MOESTRO_H

#include <stddef.h>
#include <stdint.h>

#define TILE 16 /* output rows that lie together */
#define WIDEST_GROUP 0x8000 /* inputs that are summed in 32-bit integers */

/* How the weights of a matrix are stored. `layout.py` has the same numbers. */
enum format { F32, BF16, F16, FP8, INT8, INT4, MXFP4 };
enum scale_type { SCALE_F32, SCALE_BF16, SCALE_F16 };
enum zero_kind { ZERO_NONE, ZERO_INTEGER, ZERO_FLOAT };
enum activation { SILU_MUL, GELU_MUL, GELU_TANH_MUL, CLAMPED_SIGMOID_MUL, SILU, GELU, RELU_SQUARED };

typedef struct {
    const uint8_t *tiles;
    int64_t tile_bytes;
    int32_t outputs, inputs; /* of the matrix itself; tiles are padded */
    int32_t padded;          /* inputs of a tile */
    int32_t format, group, scale_type, zero_kind;
    int32_t row_group;    /* inputs of a row of activations that share its scale; 0: floats */
    const int32_t *order; /* [inputs]: the tile's input i is the row's order[i]; NULL: i itself */
} matrix;

typedef struct {
    matrix first, down;
    const float *first_bias, *down_bias; /* NULL: none */
} expert;

/* Rows of activations in the form that a matrix wants. */
typedef struct {
    const float *floats; /* fp32 [n, stride]; used where group is 0 */
    int64_t stride;
    int8_t *values; /* [n, padded] */
    float *scales;  /* [n, padded / group] */
    int32_t *sums;  /* [n, padded / group] */
    int32_t padded, group;
} rows;

/* One instruction set. Every function's result is the same for any `count` and any split of tiles,
   and a row's the same of `multiply` and of `multiply_panels`. */
typedef struct {
    const char *name;
    int panel; /* rows of a panel; 0: there are none */
    int (*few)(const matrix *m); /* more rows than this go in panels */
    /* Tiles [tile, end) of m times rows which[0..count) of x -> out[i][outputs]; += bias. */
    void (*multiply)(const matrix *m, int tile, int end, const rows *x, const int32_t *which,
                     int count, float *const *out, const float *bias);
    int64_t (*panel_bytes)(const matrix *m);
    /* Rows which[0..count) of x, at most `panel` of them, as one panel. */
    void (*pack)(const matrix *m, const rows *x, const int32_t *which, int count, uint8_t *panel);
    /* As `multiply`, of `count` rows in panels one after the other. */
    void (*multiply_panels)(const matrix *m, int tile, int end, const uint8_t *panels, int count,
                            float *const *out, const float *bias);
    /* A row's sums of int8 products with tiles [tile, end) -> out, as `multiply` scales them. */
    void (*finish)(const matrix *m, int tile, int end, const int32_t *sums, float scale, float *out,
                   const float *bias);
    /* One row of x[length] as row `place` of `into`; zeros up to `padded`. */
    void (*quantize)(const float *x, int length, const rows *into, int place);
    /* inner[2 * width] or [width] -> out[width] */
    void (*activate)(int kind, const float *inner, float *out, int width, float alpha, float limit);
    /* out[width] = sum over k of weights[k] * results[k][width], in this order */
    void (*combine)(const float *weights, const float *results, int k, int width, float *out);
} isa;

extern const isa isa_plain;
#if defined(__x86_64__)
extern const isa isa_avx2, isa_avxvnni, isa_avx512, isa_amx;
#endif

const isa *current_isa(void);

/* Whether lines are asked for before they are needed: AMD's processors do better without. */
extern int fetches_ahead;

#endif
