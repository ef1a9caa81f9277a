/* The products with few rows over one instruction set's lanes: as fast as the weights come.
   Included by each isa_*.c after its simd_*.h.

   A row's result is one sequence of operations, whatever rows share the load with it: integers are
   exact, and what is summed in floats is summed input by input, group by group. */

#define UNROLL _Pragma("GCC unroll 16")

enum { AHEAD_BYTES = 2048 };

static const uint8_t MXFP4_HALVES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
enum { MXFP4_OFFSET = 12 }; /* of the table's entries, which are half steps */

INLINE fv load_scales(const uint8_t *p, int type)
{
    return type == SCALE_F16 ? fv_load_f16(p) : type == SCALE_BF16 ? fv_load_bf16(p) : fv_load(p);
}

INLINE int scale_bytes(int type) { return TILE * (type == SCALE_F32 ? 4 : 2); }

INLINE int lesser(int a, int b) { return a < b ? a : b; }

typedef struct {
    const int8_t *values;
    const float *scales;
    const int32_t *sums;
} row;

INLINE row row_of(const rows *x, int place)
{
    const int64_t groups = x->padded / x->group;
    return (row){x->values + (int64_t)place * x->padded, x->scales + place * groups,
                 x->sums + place * groups};
}

/* f[u] = tile times row x[u], for R rows; `chains` accumulators of each. */
INLINE void int8_tile(const uint8_t *w, const matrix *m, const rows *all, const row *x, fv *f,
                      const int R, const int chains, const int ahead)
{
    const int group = all->group, groups = m->padded / group;
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_set(0);
    for (int g = 0; g < groups; g++) {
        iv a[2 * CHAINS];
        UNROLL for (int u = 0; u < R; u++)
        {
            a[u * chains] = iv_set(-INT8_OFFSET * x[u].sums[g]);
            UNROLL for (int c = 1; c < chains; c++) a[u * chains + c] = iv_set(0);
        }
        for (int k = g * group; k < (g + 1) * group; k += 4 * chains) {
            UNROLL for (int c = 0; c < chains; c++)
            {
                if (ahead)
                    fetch(w + AHEAD_BYTES);
                const bv weights = bv_load(w);
                UNROLL for (int u = 0; u < R; u++) a[u * chains + c] =
                    dot8(a[u * chains + c], weights, x[u].values + k + 4 * c);
                w += 4 * TILE;
            }
        }
        UNROLL for (int u = 0; u < R; u++)
        {
            UNROLL for (int c = 1; c < chains; c++) a[u * chains] =
                iv_add(a[u * chains], a[u * chains + c]);
            f[u] = fv_fma(fv_of(a[u * chains]), fv_set(x[u].scales[g]), f[u]);
        }
    }
    const fv scales = load_scales(w, m->scale_type);
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_mul(f[u], scales);
}

/* Nibbles with a scale for each group: int4, or the codes of mxfp4. */
INLINE void nibble_tile(const uint8_t *w, const matrix *m, const row *x, fv *f, const int R,
                        const int scale_type, const int zero_kind, const int mx,
                        const int ahead)
{
    const int group = m->group, groups = m->padded / group;
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_set(0);
    for (int g = 0; g < groups; g++) {
        iv a[2 * MOST_ROWS];
        UNROLL for (int u = 0; u < R; u++)
        {
            const int32_t sum = x[u].sums[g];
            a[2 * u] = iv_set(mx ? -MXFP4_OFFSET * sum : zero_kind == ZERO_NONE ? -8 * sum : 0);
            a[2 * u + 1] = iv_set(0);
        }
        for (int k = g * group; k < (g + 1) * group; k += 8) {
            if (ahead)
                fetch(w + AHEAD_BYTES);
            const bv both = bv_load(w);
            bv low = bv_low(both), high = bv_high(both);
            if (mx)
                low = bv_look_up(low, MXFP4_HALVES), high = bv_look_up(high, MXFP4_HALVES);
            UNROLL for (int u = 0; u < R; u++)
            {
                a[2 * u] = dot7(a[2 * u], low, x[u].values + k);
                a[2 * u + 1] = dot7(a[2 * u + 1], high, x[u].values + k + 4);
            }
            w += 4 * TILE;
        }
        /* read in the order in which they lie: the processor asks for what follows by itself */
        fv scales, zeros = fv_set(0);
        if (mx) {
            /* 2^(e - 127) by its bits, half of it for the half steps */
            scales = fv_mul(fv_bits(iv_left(iv_load_u8(w), 23)), fv_set(0.5f));
            w += TILE;
        } else {
            scales = load_scales(w, scale_type);
            w += scale_bytes(scale_type);
        }
        if (!mx && zero_kind == ZERO_FLOAT) {
            zeros = load_scales(w, scale_type);
            w += scale_bytes(scale_type);
        }
        if (!mx && zero_kind == ZERO_INTEGER) {
            const iv integer = iv_load_u8(w);
            w += TILE;
            UNROLL for (int u = 0; u < R; u++) a[2 * u] =
                iv_add(a[2 * u], iv_mul(integer, iv_set(-x[u].sums[g])));
        }
        UNROLL for (int u = 0; u < R; u++)
        {
            const fv sum = fv_of(iv_add(a[2 * u], a[2 * u + 1]));
            f[u] = fv_fma(sum, fv_mul(scales, fv_set(x[u].scales[g])), f[u]);
            if (zero_kind == ZERO_FLOAT)
                f[u] = fv_fma(zeros, fv_set(x[u].scales[g] * (float)x[u].sums[g]), f[u]);
        }
    }
}

INLINE void f32_tile(const uint8_t *w, const matrix *m, const float *const *x, fv *f, const int R,
                     const int ahead)
{
    fv a[2 * MOST_ROWS];
    UNROLL for (int u = 0; u < 2 * R; u++) a[u] = fv_set(0);
    for (int k = 0; k + 2 <= m->padded; k += 2) {
        if (ahead)
            fetch(w + AHEAD_BYTES), fetch(w + AHEAD_BYTES + 64);
        const fv even = fv_load(w), odd = fv_load(w + 4 * TILE);
        UNROLL for (int u = 0; u < R; u++)
        {
            a[2 * u] = fv_fma(even, fv_set(x[u][k]), a[2 * u]);
            a[2 * u + 1] = fv_fma(odd, fv_set(x[u][k + 1]), a[2 * u + 1]);
        }
        w += 8 * TILE;
    }
    if (m->padded % 2)
        UNROLL for (int u = 0; u < R; u++) a[2 * u] =
            fv_fma(fv_load(w), fv_set(x[u][m->padded - 1]), a[2 * u]);
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_add(a[2 * u], a[2 * u + 1]);
}

INLINE void half_tile(const uint8_t *w, const matrix *m, const float *const *x, fv *f, const int R,
                      const int bf16, const int ahead)
{
    fv a[2 * MOST_ROWS];
    UNROLL for (int u = 0; u < 2 * R; u++) a[u] = fv_set(0);
    for (int k = 0; k < m->padded; k += 2) {
        if (ahead)
            fetch(w + AHEAD_BYTES);
        const bv pairs = bv_load(w);
        const fv even = bf16 ? bv_even_bf16(pairs) : bv_even_f16(pairs);
        const fv odd = bf16 ? bv_odd_bf16(pairs) : bv_odd_f16(pairs);
        UNROLL for (int u = 0; u < R; u++)
        {
            a[2 * u] = fv_fma(even, fv_set(x[u][k]), a[2 * u]);
            a[2 * u + 1] = fv_fma(odd, fv_set(x[u][k + 1]), a[2 * u + 1]);
        }
        w += 4 * TILE;
    }
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_add(a[2 * u], a[2 * u + 1]);
}

INLINE void fp8_tile(const uint8_t *w, const matrix *m, const float *const *x, fv *f, const int R,
                     const int ahead)
{
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_set(0);
    for (int g = 0; g < m->padded; g += m->group) {
        fv a[2 * MOST_ROWS];
        UNROLL for (int u = 0; u < 2 * R; u++) a[u] = fv_set(0);
        for (int k = g; k < g + m->group; k += 4) {
            if (ahead)
                fetch(w + AHEAD_BYTES);
            const bv four = bv_load(w);
            UNROLL for (int j = 0; j < 4; j++)
            {
                const fv weights = bv_fp8(four, j);
                UNROLL for (int u = 0; u < R; u++) a[2 * u + j % 2] =
                    fv_fma(weights, fv_set(x[u][k + j]), a[2 * u + j % 2]);
            }
            w += 4 * TILE;
        }
        const fv scales = fv_mul(load_scales(w, m->scale_type), fv_set(0x1p120f));
        w += scale_bytes(m->scale_type);
        UNROLL for (int u = 0; u < R; u++) f[u] =
            fv_fma(fv_add(a[2 * u], a[2 * u + 1]), scales, f[u]);
    }
}

INLINE void int_rows(const uint8_t *w, const matrix *m, const rows *all, const row *x, fv *f,
                     const int R, const int ahead)
{
    if (m->format == INT8 && R <= 2)
        int8_tile(w, m, all, x, f, R, R == 1 ? CHAINS : (CHAINS + 1) / 2, ahead);
    else if (m->format == MXFP4)
        nibble_tile(w, m, x, f, R, SCALE_F32, ZERO_NONE, 1, ahead);
    else if (m->scale_type == SCALE_F16 && m->zero_kind == ZERO_FLOAT)
        nibble_tile(w, m, x, f, R, SCALE_F16, ZERO_FLOAT, 0, ahead);
    else if (m->scale_type == SCALE_F16 && m->zero_kind == ZERO_NONE)
        nibble_tile(w, m, x, f, R, SCALE_F16, ZERO_NONE, 0, ahead);
    else
        nibble_tile(w, m, x, f, R, m->scale_type, m->zero_kind, 0, ahead);
}

INLINE void float_rows(const uint8_t *w, const matrix *m, const float *const *x, fv *f, const int R,
                       const int ahead)
{
    if (m->format == F32)
        f32_tile(w, m, x, f, R, ahead);
    else if (m->format == BF16)
        half_tile(w, m, x, f, R, 1, ahead);
    else if (m->format == F16)
        half_tile(w, m, x, f, R, 0, ahead);
    else
        fp8_tile(w, m, x, f, R, ahead);
}

INLINE void write_tile(const matrix *m, int tile, fv f, float *out, const float *bias)
{
    const int first = tile * TILE, left = m->outputs - first;
    if (left >= TILE) {
        fv_store(out + first, bias ? fv_add(f, fv_load(bias + first)) : f);
        return;
    }
    float last[TILE];
    fv_store(last, f);
    for (int i = 0; i < left; i++)
        out[first + i] = bias ? last[i] + bias[first + i] : last[i];
}

/* How many rows the kernel for `left` rows takes: those beyond `left` repeat the last. */
INLINE int kernel_rows(int left, int most)
{
    int count = 1;
    while (count < left && count < most)
        count *= 2;
    return count;
}

static void int_block(const uint8_t *w, const matrix *m, const rows *x, const int32_t *which,
                      int left, int taken, fv *f)
{
    row some[MOST_ROWS];
    for (int u = 0; u < taken; u++)
        some[u] = row_of(x, which[lesser(u, left - 1)]);
    switch (taken) {
    case 1:
        if (fetches_ahead)
            int_rows(w, m, x, some, f, 1, 1);
        else
            int_rows(w, m, x, some, f, 1, 0);
        break;
    case 2: int_rows(w, m, x, some, f, 2, 0); break;
#if MOST_ROWS > 2
    case 4: int_rows(w, m, x, some, f, 4, 0); break;
#endif
#if MOST_ROWS > 4
    case 8: int_rows(w, m, x, some, f, 8, 0); break;
#endif
    }
}

static void float_block(const uint8_t *w, const matrix *m, const rows *x, const int32_t *which,
                        int left, int taken, fv *f)
{
    const float *some[MOST_ROWS];
    for (int u = 0; u < taken; u++)
        some[u] = x->floats + which[lesser(u, left - 1)] * x->stride;
    switch (taken) {
    case 1:
        if (fetches_ahead)
            float_rows(w, m, some, f, 1, 1);
        else
            float_rows(w, m, some, f, 1, 0);
        break;
    case 2: float_rows(w, m, some, f, 2, 0); break;
#if MOST_FLOAT_ROWS > 2
    case 4: float_rows(w, m, some, f, 4, 0); break;
    case 8: float_rows(w, m, some, f, 8, 0); break;
#endif
    }
}

static void multiply(const matrix *m, int tile, int end, const rows *x, const int32_t *which,
                     int count, float *const *out, const float *bias)
{
    const int ints = m->format == INT8 ? 2 : MOST_ROWS;
    const int most = m->row_group ? ints : MOST_FLOAT_ROWS;
    for (int t = tile; t < end; t++) {
        const uint8_t *w = m->tiles + t * m->tile_bytes;
        for (int i = 0, taken; i < count; i += taken) {
            fv f[MOST_ROWS];
            taken = kernel_rows(count - i, most);
            if (m->row_group)
                int_block(w, m, x, which + i, count - i, taken, f);
            else
                float_block(w, m, x, which + i, count - i, taken, f);
            for (int u = 0; u < lesser(taken, count - i); u++)
                write_tile(m, t, f[u], out[i + u], bias);
        }
    }
}
