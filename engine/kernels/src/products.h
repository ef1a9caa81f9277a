/* The products over one instruction set's lanes; included by each isa_*.c after its simd_*.h.

   A row's result is one sequence of operations, whatever rows share the load with it: integers are
   exact, and what is summed in floats is summed input by input, group by group. */

#define UNROLL _Pragma("GCC unroll 16")

enum { BLOCK_ROWS = 64, AHEAD_BYTES = 2048 };

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
                      const int R, const int chains)
{
    const int group = all->group, groups = m->padded / group;
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_set(0);
    for (int g = 0; g < groups; g++) {
        iv a[MOST_ROWS * CHAINS];
        UNROLL for (int u = 0; u < R; u++)
        {
            a[u * chains] = iv_set(-INT8_OFFSET * x[u].sums[g]);
            UNROLL for (int c = 1; c < chains; c++) a[u * chains + c] = iv_set(0);
        }
        for (int k = g * group; k < (g + 1) * group; k += 4 * chains) {
            UNROLL for (int c = 0; c < chains; c++)
            {
                if (R == 1)
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
                        const int scale_type, const int zero_kind, const int mx)
{
    const int group = m->group, groups = m->padded / group;
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_set(0);
    for (int g = 0; g < groups; g++) {
        const uint8_t *after = w + group * (TILE / 2);
        iv a[2 * MOST_ROWS];
        fv scales, zeros = fv_set(0);
        if (mx) {
            /* 2^(e - 127) by its bits, half of it for the half steps */
            scales = fv_mul(fv_bits(iv_left(iv_load_u8(after), 23)), fv_set(0.5f));
            UNROLL for (int u = 0; u < R; u++) a[2 * u] = iv_set(-MXFP4_OFFSET * x[u].sums[g]);
            after += TILE;
        } else {
            scales = load_scales(after, scale_type);
            after += scale_bytes(scale_type);
            if (zero_kind == ZERO_FLOAT) {
                zeros = load_scales(after, scale_type);
                after += scale_bytes(scale_type);
                UNROLL for (int u = 0; u < R; u++) a[2 * u] = iv_set(0);
            } else if (zero_kind == ZERO_INTEGER) {
                const iv integer = iv_load_u8(after);
                after += TILE;
                UNROLL for (int u = 0; u < R; u++) a[2 * u] =
                    iv_mul(integer, iv_set(-x[u].sums[g]));
            } else {
                UNROLL for (int u = 0; u < R; u++) a[2 * u] = iv_set(-8 * x[u].sums[g]);
            }
        }
        UNROLL for (int u = 0; u < R; u++) a[2 * u + 1] = iv_set(0);
        for (int k = g * group; k < (g + 1) * group; k += 8) {
            if (R == 1)
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
        UNROLL for (int u = 0; u < R; u++)
        {
            const fv sum = fv_of(iv_add(a[2 * u], a[2 * u + 1]));
            f[u] = fv_fma(sum, fv_mul(scales, fv_set(x[u].scales[g])), f[u]);
            if (zero_kind == ZERO_FLOAT)
                f[u] = fv_fma(zeros, fv_set(x[u].scales[g] * (float)x[u].sums[g]), f[u]);
        }
        w = after;
    }
}

INLINE void f32_tile(const uint8_t *w, const matrix *m, const float *const *x, fv *f, const int R)
{
    fv a[2 * MOST_FLOAT_ROWS];
    UNROLL for (int u = 0; u < 2 * R; u++) a[u] = fv_set(0);
    for (int k = 0; k + 2 <= m->padded; k += 2) {
        if (R == 1)
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
                      const int bf16)
{
    fv a[2 * MOST_FLOAT_ROWS];
    UNROLL for (int u = 0; u < 2 * R; u++) a[u] = fv_set(0);
    for (int k = 0; k < m->padded; k += 2) {
        if (R == 1)
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

INLINE void fp8_tile(const uint8_t *w, const matrix *m, const float *const *x, fv *f, const int R)
{
    UNROLL for (int u = 0; u < R; u++) f[u] = fv_set(0);
    for (int g = 0; g < m->padded; g += m->group) {
        fv a[2 * MOST_FLOAT_ROWS];
        UNROLL for (int u = 0; u < 2 * R; u++) a[u] = fv_set(0);
        for (int k = g; k < g + m->group; k += 4) {
            if (R == 1)
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
                     const int R)
{
    if (m->format == INT8)
        int8_tile(w, m, all, x, f, R, R == 1 ? CHAINS : R == 2 ? (CHAINS + 1) / 2 : 1);
    else if (m->format == MXFP4)
        nibble_tile(w, m, x, f, R, SCALE_F32, ZERO_NONE, 1);
    else if (m->scale_type == SCALE_F16 && m->zero_kind == ZERO_FLOAT)
        nibble_tile(w, m, x, f, R, SCALE_F16, ZERO_FLOAT, 0);
    else if (m->scale_type == SCALE_F16 && m->zero_kind == ZERO_NONE)
        nibble_tile(w, m, x, f, R, SCALE_F16, ZERO_NONE, 0);
    else
        nibble_tile(w, m, x, f, R, m->scale_type, m->zero_kind, 0);
}

INLINE void float_rows(const uint8_t *w, const matrix *m, const float *const *x, fv *f, const int R)
{
    if (m->format == F32)
        f32_tile(w, m, x, f, R);
    else if (m->format == BF16)
        half_tile(w, m, x, f, R, 1);
    else if (m->format == F16)
        half_tile(w, m, x, f, R, 0);
    else
        fp8_tile(w, m, x, f, R);
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

static void int_block(const uint8_t *w, const matrix *m, int tile, const rows *x, const int32_t *which,
                      int count, float *const *out, const float *bias)
{
    for (int i = 0; i < count;) {
        const int left = count - i, taken = kernel_rows(left, MOST_ROWS);
        row some[MOST_ROWS];
        fv f[MOST_ROWS];
        for (int u = 0; u < taken; u++)
            some[u] = row_of(x, which[i + lesser(u, left - 1)]);
        switch (taken) {
        case 1: int_rows(w, m, x, some, f, 1); break;
        case 2: int_rows(w, m, x, some, f, 2); break;
        case 4: int_rows(w, m, x, some, f, 4); break;
#if MOST_ROWS > 4
        case 8: int_rows(w, m, x, some, f, 8); break;
        default: int_rows(w, m, x, some, f, MOST_ROWS);
#endif
        }
        for (int u = 0; u < lesser(taken, left); u++)
            write_tile(m, tile, f[u], out[i + u], bias);
        i += taken;
    }
}

static void float_block(const uint8_t *w, const matrix *m, int tile, const rows *x,
                        const int32_t *which, int count, float *const *out, const float *bias)
{
    for (int i = 0; i < count;) {
        const int left = count - i, taken = kernel_rows(left, MOST_FLOAT_ROWS);
        const float *some[MOST_FLOAT_ROWS];
        fv f[MOST_FLOAT_ROWS];
        for (int u = 0; u < taken; u++)
            some[u] = x->floats + which[i + lesser(u, left - 1)] * x->stride;
        switch (taken) {
        case 1: float_rows(w, m, some, f, 1); break;
        case 2: float_rows(w, m, some, f, 2); break;
#if MOST_FLOAT_ROWS > 2
        case 4: float_rows(w, m, some, f, 4); break;
        default: float_rows(w, m, some, f, MOST_FLOAT_ROWS);
#endif
        }
        for (int u = 0; u < lesser(taken, left); u++)
            write_tile(m, tile, f[u], out[i + u], bias);
        i += taken;
    }
}

static void multiply(const matrix *m, int tile, int end, const rows *x, const int32_t *which,
                     int count, float *const *out, const float *bias)
{
    for (int since = 0; since < count; since += BLOCK_ROWS) {
        const int some = lesser(BLOCK_ROWS, count - since);
        for (int t = tile; t < end; t++) {
            const uint8_t *w = m->tiles + t * m->tile_bytes;
            if (m->row_group)
                int_block(w, m, t, x, which + since, some, out + since, bias);
            else
                float_block(w, m, t, x, which + since, some, out + since, bias);
        }
    }
}

/* A row by its own maxima, group by group. What is not finite makes the group's scale NaN. */
static void quantize(const float *x, int length, const rows *into, int place)
{
    const int64_t groups = into->padded / into->group;
    for (int64_t g = 0; g < groups; g++) {
        const int start = (int)g * into->group;
        int8_t *values = into->values + (int64_t)place * into->padded + start;
        float last[TILE];
        fv largest = fv_set(0), strange = fv_set(0);
        const int whole = lesser(into->group, length > start ? length - start : 0);
        for (int k = 0; k < whole; k += TILE) {
            const float *from = x + start + k;
            if (whole - k < TILE) {
                memset(last, 0, sizeof last);
                memcpy(last, from, sizeof(float) * (size_t)(whole - k));
                from = last;
            }
            const fv some = fv_load(from);
            largest = fv_max(fv_abs(some), largest);
            strange = fv_fma(some, fv_set(0), strange);
        }
        const float most = fv_largest(largest);
        const fv factor = fv_set(most > 1e-30f ? 127.0f / most : 0.0f);
        iv sum = iv_set(0);
        for (int k = 0; k < into->group; k += TILE) {
            const float *from = x + start + k;
            if (whole - k < TILE) {
                memset(last, 0, sizeof last);
                if (whole > k)
                    memcpy(last, from, sizeof(float) * (size_t)(whole - k));
                from = last;
            }
            const iv some = iv_round(fv_mul(fv_load(from), factor));
            sum = iv_add(sum, some);
            iv_store_i8(values + k, some);
        }
        into->scales[place * groups + g] = most * (1 / 127.0f) + fv_sum(strange);
        into->sums[place * groups + g] = iv_sum(sum);
    }
}

/* e^x to about two units in the last place: 2^n times a polynomial of what is left. */
INLINE fv fv_exp(fv x)
{
    const fv held = fv_min(fv_max(x, fv_set(-87.0f)), fv_set(88.0f));
    const iv n = iv_round(fv_mul(held, fv_set(1.44269504f)));
    fv r = fv_fma(fv_of(n), fv_set(-0.693359375f), held);
    r = fv_fma(fv_of(n), fv_set(2.12194440e-4f), r);
    fv p = fv_set(1.0f / 5040);
    p = fv_fma(p, r, fv_set(1.0f / 720));
    p = fv_fma(p, r, fv_set(1.0f / 120));
    p = fv_fma(p, r, fv_set(1.0f / 24));
    p = fv_fma(p, r, fv_set(1.0f / 6));
    p = fv_fma(p, r, fv_set(0.5f));
    p = fv_fma(p, r, fv_set(1));
    p = fv_fma(p, r, fv_set(1));
    return fv_mul(p, fv_bits(iv_left(iv_add(n, iv_set(127)), 23)));
}

INLINE fv sigmoid(fv x) /* NaN stays NaN: the exponent alone would lose it */
{
    const fv e = fv_exp(fv_sub(fv_set(0), x));
    return fv_add(fv_div(fv_set(1), fv_add(fv_set(1), e)), fv_mul(x, fv_set(0)));
}

INLINE float gelu_one(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }

INLINE fv gelu(fv x)
{
    float each[TILE];
    fv_store(each, x);
    for (int i = 0; i < TILE; i++)
        each[i] = gelu_one(each[i]);
    return fv_load(each);
}

INLINE fv gelu_tanh(fv x) /* x sigmoid(2 y) is x (1 + tanh y) / 2 */
{
    const fv cube = fv_mul(fv_mul(x, x), x);
    const fv y = fv_mul(fv_fma(cube, fv_set(0.044715f), x), fv_set(2 * 0.79788456f));
    return fv_mul(x, sigmoid(y));
}

INLINE fv activated(int kind, fv gate, fv up, float alpha, float limit)
{
    switch (kind) {
    case SILU_MUL: return fv_mul(fv_mul(gate, sigmoid(gate)), up);
    case SILU: return fv_mul(gate, sigmoid(gate));
    case GELU_MUL: return fv_mul(gelu(gate), up);
    case GELU: return gelu(gate);
    case GELU_TANH_MUL: return fv_mul(gelu_tanh(gate), up);
    case RELU_SQUARED: {
        const fv positive = fv_max(gate, fv_set(0));
        return fv_mul(positive, positive);
    }
    default: {
        const fv g = fv_min(gate, fv_set(limit));
        const fv u = fv_min(fv_max(up, fv_set(-limit)), fv_set(limit));
        return fv_mul(fv_add(u, fv_set(1)), fv_mul(g, sigmoid(fv_mul(g, fv_set(alpha)))));
    }
    }
}

static void activate(int kind, const float *inner, float *out, int width, float alpha, float limit)
{
    const int gated = kind <= CLAMPED_SIGMOID_MUL, interleaved = kind == CLAMPED_SIGMOID_MUL;
    for (int k = 0; k < width; k += TILE) {
        const int some = lesser(TILE, width - k);
        float gates[TILE] = {0}, ups[TILE] = {0}, last[TILE];
        for (int i = 0; i < some; i++) {
            gates[i] = interleaved ? inner[2 * (k + i)] : inner[k + i];
            ups[i] = interleaved ? inner[2 * (k + i) + 1] : gated ? inner[width + k + i] : 0;
        }
        fv_store(last, activated(kind, fv_load(gates), fv_load(ups), alpha, limit));
        memcpy(out + k, last, sizeof(float) * (size_t)some);
    }
}

static void combine(const float *weights, const float *results, int k, int width, float *out)
{
    int start = 0;
    for (; start + TILE <= width; start += TILE) {
        fv sum = fv_set(0);
        for (int j = 0; j < k; j++)
            sum = fv_fma(fv_set(weights[j]), fv_load(results + (int64_t)j * width + start), sum);
        fv_store(out + start, sum);
    }
    for (; start < width; start++) {
        float sum = 0;
        for (int j = 0; j < k; j++)
            sum += weights[j] * results[(int64_t)j * width + start];
        out[start] = sum;
    }
}

const isa ISA = {ISA_NAME, multiply, quantize, activate, combine};
