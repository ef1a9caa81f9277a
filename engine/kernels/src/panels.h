/* The products with many rows. Included by each isa_*.c after its products.h.

   The rows lie in panels of PANEL, so that a kernel reads one stream of them with fixed distances:

       floats    [k][PANEL]
       integers  [k / 64][PANEL][64] values | [group][PANEL] scales | [group][PANEL] corrections

   A stripe of tiles is multiplied with BLOCK_ROWS rows at once, some inputs at a time: its weights
   are widened once into a buffer that the first cache holds, and read from there for CHUNK rows in
   turn. Which float operations make up a row's result, and in which order, is what products.h says;
   integers are exact in any. */

enum {
    PANEL_INPUTS = 64,
    ROW_BYTES = PANEL_INPUTS * VALUE_BYTES, /* of a row's values that lie together */
    BLOCK_ROWS = PANEL * (64 / PANEL),
    DIRECT_BLOCK = 1024, /* inputs: integers as they are stored, */
    INT_BLOCK = 256,     /* widened ones, */
    FLOAT_BLOCK = 128    /* floats */
};

INLINE int64_t values_bytes(const matrix *m)
{
    if (!m->row_group)
        return (int64_t)m->padded * PANEL * (int)sizeof(float);
    return (int64_t)(m->padded + PANEL_INPUTS - 1) / PANEL_INPUTS * PANEL * ROW_BYTES;
}

static int64_t panel_bytes(const matrix *m)
{
    const int64_t groups = m->row_group ? m->padded / m->row_group : 0;
    const int64_t bytes = values_bytes(m) + groups * PANEL * (int)(sizeof(float) + sizeof(int32_t));
    return (bytes + 63) / 64 * 64;
}

/* What a stored weight is above its meaning, where that is the same for all. */
INLINE int offset_of(const matrix *m)
{
    if (m->format == INT8)
        return INT8_OFFSET;
    return m->format == MXFP4 ? MXFP4_OFFSET : m->zero_kind == ZERO_NONE ? 8 : 1;
}

static void pack_ints(const matrix *m, const rows *x, const int32_t *which, int count,
                      uint8_t *panel)
{
    const int groups = m->padded / m->row_group, offset = offset_of(m);
    float *scales = (float *)(panel + values_bytes(m));
    int32_t *corrections = (int32_t *)(scales + groups * PANEL);
    for (int u = 0; u < count; u++) {
        const row from = row_of(x, which[u]);
        for (int k = 0; k < m->padded; k += PANEL_INPUTS) {
            const int some = lesser(PANEL_INPUTS, m->padded - k);
            uint8_t *to = panel + (int64_t)(k / PANEL_INPUTS * PANEL + u) * ROW_BYTES;
            put_values(to, from.values + k, some);
            memset(to + some * VALUE_BYTES, 0, (size_t)((PANEL_INPUTS - some) * VALUE_BYTES));
        }
        for (int g = 0; g < groups; g++) {
            const float product = from.scales[g] * (float)from.sums[g];
            scales[g * PANEL + u] = from.scales[g];
            corrections[g * PANEL + u] = -offset * from.sums[g];
            if (m->zero_kind == ZERO_FLOAT)
                memcpy(corrections + g * PANEL + u, &product, sizeof product);
        }
    }
}

static void pack_floats(const matrix *m, const rows *x, const int32_t *which, int count,
                        float *panel)
{
    for (int u = 0; u < count; u++) {
        const float *from = x->floats + which[u] * x->stride;
        for (int k = 0; k < m->padded; k++)
            panel[(int64_t)k * PANEL + u] = from[k];
    }
}

static void pack(const matrix *m, const rows *x, const int32_t *which, int count, uint8_t *panel)
{
    if (count < PANEL)
        memset(panel, 0, (size_t)panel_bytes(m));
    if (m->row_group)
        pack_ints(m, x, which, count, panel);
    else
        pack_floats(m, x, which, count, (float *)panel);
}

/* Rows in panels, and what they are multiplied with next: inputs k to k + inputs of some tiles. */
typedef struct {
    const uint8_t *panels;
    int64_t panel_bytes;
    int count, tiles, group, k, inputs;
    int fresh, fetch; /* nothing has been summed yet; the lines come from memory */
    const uint8_t *lines[STRIPE];
} step;

/* sums[tile][BLOCK_ROWS] += lines times rows */
typedef void int_kernel(const step *s, iv *sums);

INLINE void int_chunk(const step *s, const uint8_t *x, iv *sums, const int T, const int R,
                      const int fetches)
{
    iv a[STRIPE * CHUNK];
    const uint8_t *w = s->lines[0], *v = s->lines[T - 1];
    UNROLL for (int u = 0; u < T * R; u++) a[u] =
        s->fresh ? iv_set(0) : sums[u / R * BLOCK_ROWS + u % R];
    for (int k = s->k, next; k < s->k + s->inputs; k = next) {
        const int within = k % PANEL_INPUTS;
        const uint8_t *from = x + (int64_t)(k / PANEL_INPUTS) * PANEL * ROW_BYTES;
        next = lesser(k - within + PANEL_INPUTS, s->k + s->inputs);
        const uint8_t *end = from + (next - k + within) * VALUE_BYTES;
        for (from += within * VALUE_BYTES; from < end; from += 4) {
            if (fetches)
                fetch(w + AHEAD_BYTES), fetch(v + AHEAD_BYTES);
            const bv first = bv_load(w), second = T > 1 ? bv_load(v) : first;
            UNROLL for (int u = 0; u < R; u++)
            {
                const bv word = bv_word(from + u * ROW_BYTES);
                a[u] = dot_words(a[u], first, word);
                if (T > 1)
                    a[R + u] = dot_words(a[R + u], second, word);
            }
            w += 4 * TILE, v += 4 * TILE;
        }
    }
    UNROLL for (int u = 0; u < T * R; u++) sums[u / R * BLOCK_ROWS + u % R] = a[u];
}

INLINE void int_chunks(const step *s, iv *sums, const int T)
{
    for (int r = 0; r < s->count; r += CHUNK) {
        const uint8_t *x = s->panels + r / PANEL * s->panel_bytes + r % PANEL * ROW_BYTES;
        if (s->count - r <= CHUNK / 2)
            int_chunk(s, x, sums + r, T, CHUNK / 2, 1);
        else if (s->fetch && !r)
            int_chunk(s, x, sums + r, T, CHUNK, 1);
        else
            int_chunk(s, x, sums + r, T, CHUNK, 0);
    }
}

static void int_lines(const step *s, iv *sums)
{
    if (s->tiles == STRIPE)
        int_chunks(s, sums, STRIPE);
    else
        int_chunks(s, sums, 1);
}

/* The lines of `inputs` weights at w as the kernels take them: there, or widened into `to`. */
static const uint8_t *widened_ints(const matrix *m, const uint8_t *w, int inputs, uint8_t *to)
{
    if (m->format == INT8) {
        if (VALUE_BYTES == 1)
            return w;
        for (int k = 0; k < inputs; k += 4, w += 4 * TILE)
            fetch(w + AHEAD_BYTES), put_signed(to + k * VALUE_BYTES * TILE, bv_load(w));
        return to;
    }
    for (int k = 0; k < inputs; k += 8, w += 4 * TILE) {
        fetch(w + AHEAD_BYTES);
        const bv both = bv_load(w);
        bv low = bv_low(both), high = bv_high(both);
        if (m->format == MXFP4)
            low = bv_look_up(low, MXFP4_HALVES), high = bv_look_up(high, MXFP4_HALVES);
        put_bytes(to + k * VALUE_BYTES * TILE, low);
        put_bytes(to + (k + 4) * VALUE_BYTES * TILE, high);
    }
    return to;
}

/* f += sums of group g, each in its row's and its outputs' scale. */
INLINE void add_group(const step *s, const matrix *m, int g, const iv *sums, fv *f, fv scales,
                      fv zeros, iv integers, const int format, const int zero_kind)
{
    const int64_t at = values_bytes(m) + (int64_t)g * PANEL * 4;
    const int64_t apart = (int64_t)m->padded / m->row_group * PANEL * 4;
    for (int r = 0; r < s->count; r++) {
        const uint8_t *mine = s->panels + r / PANEL * s->panel_bytes + at + r % PANEL * 4;
        const fv scale = fv_word(mine);
        if (format == INT4 && zero_kind == ZERO_FLOAT) {
            f[r] = fv_fma(fv_of(sums[r]), fv_mul(scales, scale), f[r]);
            f[r] = fv_fma(zeros, fv_word(mine + apart), f[r]);
            continue;
        }
        iv correction = iv_word(mine + apart);
        if (format == INT4 && zero_kind == ZERO_INTEGER)
            correction = iv_mul(integers, correction);
        const fv sum = fv_of(iv_add(sums[r], correction));
        f[r] = fv_fma(sum, format == INT8 ? scale : fv_mul(scales, scale), f[r]);
    }
}

/* The same with what stands after a group's lines at w. Returns where the next group begins. */
static const uint8_t *finish_group(const step *s, const matrix *m, const uint8_t *w, int g,
                                   const iv *sums, fv *f)
{
    const fv none = fv_set(0);
    if (m->format == INT8) {
        add_group(s, m, g, sums, f, none, none, iv_set(0), INT8, ZERO_NONE);
        return w;
    }
    if (m->format == MXFP4) {
        const fv scales = fv_mul(fv_bits(iv_left(iv_load_u8(w), 23)), fv_set(0.5f));
        add_group(s, m, g, sums, f, scales, none, iv_set(0), MXFP4, ZERO_NONE);
        return w + TILE;
    }
    const fv scales = load_scales(w, m->scale_type);
    w += scale_bytes(m->scale_type);
    if (m->zero_kind == ZERO_FLOAT) {
        const fv zeros = load_scales(w, m->scale_type);
        add_group(s, m, g, sums, f, scales, zeros, iv_set(0), INT4, ZERO_FLOAT);
        return w + scale_bytes(m->scale_type);
    }
    if (m->zero_kind == ZERO_INTEGER) {
        add_group(s, m, g, sums, f, scales, none, iv_load_u8(w), INT4, ZERO_INTEGER);
        return w + TILE;
    }
    add_group(s, m, g, sums, f, scales, none, iv_set(0), INT4, ZERO_NONE);
    return w;
}

static void write_stripe(const matrix *m, int tile, int tiles, const fv *f, int count,
                         float *const *out, const float *bias)
{
    for (int t = 0; t < tiles; t++)
        for (int r = 0; r < count; r++)
            write_tile(m, tile + t, f[t * BLOCK_ROWS + r], out[r], bias);
}

static void int_stripe(step *s, const matrix *m, int tile, float *const *out, const float *bias,
                       int_kernel *kernel)
{
    _Alignas(64) uint8_t buffer[STRIPE][INT_BLOCK * TILE * VALUE_BYTES];
    const uint8_t *w[STRIPE];
    iv sums[STRIPE * BLOCK_ROWS];
    fv f[STRIPE * BLOCK_ROWS];
    const int whole = m->format == INT8, group = m->row_group;
    const int most = whole && VALUE_BYTES == 1 ? DIRECT_BLOCK : INT_BLOCK;
    for (int t = 0; t < s->tiles; t++)
        w[t] = m->tiles + (tile + t) * m->tile_bytes;
    for (int r = 0; r < STRIPE * BLOCK_ROWS; r++)
        f[r] = fv_set(0);
    s->fetch = most == DIRECT_BLOCK;
    for (int g = 0; g < m->padded / group; g++) {
        for (s->k = g * group; s->k < (g + 1) * group; s->k += s->inputs) {
            s->inputs = lesser(most, (g + 1) * group - s->k);
            s->fresh = s->k == g * group;
            for (int t = 0; t < s->tiles; t++) {
                s->lines[t] = widened_ints(m, w[t], s->inputs, buffer[t]);
                w[t] += s->inputs * (whole ? TILE : TILE / 2);
            }
            kernel(s, sums);
        }
        for (int t = 0; t < s->tiles; t++)
            w[t] = finish_group(s, m, w[t], g, sums + t * BLOCK_ROWS, f + t * BLOCK_ROWS);
    }
    for (int t = 0; whole && t < s->tiles; t++) {
        const fv scales = load_scales(w[t], m->scale_type);
        for (int r = 0; r < s->count; r++)
            f[t * BLOCK_ROWS + r] = fv_mul(f[t * BLOCK_ROWS + r], scales);
    }
    write_stripe(m, tile, s->tiles, f, s->count, out, bias);
}

/* Every second input: sums of even and of odd ones are apart. */
INLINE void float_chunk(const step *s, int odd, const float *x, fv *sums, const int T, const int R)
{
    fv a[STRIPE * CHUNK];
    const uint8_t *w = s->lines[0] + odd * 4 * TILE, *v = s->lines[T - 1] + odd * 4 * TILE;
    UNROLL for (int u = 0; u < T * R; u++) a[u] =
        s->fresh ? fv_set(0) : sums[u / R * BLOCK_ROWS + u % R];
    for (int k = odd; k < s->inputs; k += 2) {
        const fv first = fv_load(w), second = T > 1 ? fv_load(v) : first;
        UNROLL for (int u = 0; u < R; u++)
        {
            const fv each = fv_set(x[u]);
            a[u] = fv_fma(first, each, a[u]);
            if (T > 1)
                a[R + u] = fv_fma(second, each, a[R + u]);
        }
        w += 8 * TILE, v += 8 * TILE, x += 2 * PANEL;
    }
    UNROLL for (int u = 0; u < T * R; u++) sums[u / R * BLOCK_ROWS + u % R] = a[u];
}

INLINE void float_chunks(const step *s, int odd, fv *sums, const int T)
{
    for (int r = 0; r < s->count; r += CHUNK) {
        const float *x = (const float *)(s->panels + r / PANEL * s->panel_bytes) + r % PANEL;
        x += (int64_t)(s->k + odd) * PANEL;
        if (s->count - r <= CHUNK / 2)
            float_chunk(s, odd, x, sums + r, T, CHUNK / 2);
        else
            float_chunk(s, odd, x, sums + r, T, CHUNK);
    }
}

static void float_lines(const step *s, int odd, fv *sums)
{
    if (s->tiles == STRIPE)
        float_chunks(s, odd, sums, STRIPE);
    else
        float_chunks(s, odd, sums, 1);
}

INLINE int line_inputs(const matrix *m) { return m->format == F32 ? 1 : m->format == FP8 ? 4 : 2; }

static const uint8_t *widened_floats(const matrix *m, const uint8_t *w, int inputs, float *to)
{
    const int each = line_inputs(m);
    for (int k = 0; k < inputs; k += each, w += 4 * TILE, to += each * TILE) {
        fetch(w + AHEAD_BYTES);
        if (m->format == F32) {
            fv_store(to, fv_load(w));
            continue;
        }
        const bv line = bv_load(w);
        if (m->format == FP8) {
            UNROLL for (int j = 0; j < 4; j++) fv_store(to + j * TILE, bv_fp8(line, j));
        } else {
            fv_store(to, m->format == BF16 ? bv_even_bf16(line) : bv_even_f16(line));
            fv_store(to + TILE, m->format == BF16 ? bv_odd_bf16(line) : bv_odd_f16(line));
        }
    }
    return (const uint8_t *)(to - inputs * TILE);
}

static void float_stripe(step *s, const matrix *m, int tile, float *const *out, const float *bias)
{
    _Alignas(64) float buffer[STRIPE][FLOAT_BLOCK * TILE];
    const uint8_t *w[STRIPE];
    fv sums[2][STRIPE * BLOCK_ROWS], f[STRIPE * BLOCK_ROWS];
    const int group = m->format == FP8 ? m->group : m->padded, fp8 = m->format == FP8;
    for (int t = 0; t < s->tiles; t++)
        w[t] = m->tiles + (tile + t) * m->tile_bytes;
    for (int r = 0; r < STRIPE * BLOCK_ROWS; r++)
        f[r] = fv_set(0);
    for (int start = 0; start < m->padded; start += group) {
        for (s->k = start; s->k < start + group; s->k += s->inputs) {
            s->inputs = lesser(FLOAT_BLOCK, start + group - s->k);
            s->fresh = s->k == start;
            for (int t = 0; t < s->tiles; t++) {
                s->lines[t] = widened_floats(m, w[t], s->inputs, buffer[t]);
                w[t] += s->inputs / line_inputs(m) * 4 * TILE;
            }
            float_lines(s, 0, sums[0]);
            float_lines(s, 1, sums[1]);
        }
        for (int t = 0; t < s->tiles; t++) {
            fv scales = fv_set(0);
            if (fp8) {
                scales = fv_mul(load_scales(w[t], m->scale_type), fv_set(0x1p120f));
                w[t] += scale_bytes(m->scale_type);
            }
            for (int r = t * BLOCK_ROWS; r < t * BLOCK_ROWS + s->count; r++) {
                const fv sum = fv_add(sums[0][r], sums[1][r]);
                f[r] = fp8 ? fv_fma(sum, scales, f[r]) : sum;
            }
        }
    }
    write_stripe(m, tile, s->tiles, f, s->count, out, bias);
}

static void multiply_stripes(const matrix *m, int tile, int end, const uint8_t *panels, int count,
                             float *const *out, const float *bias, int_kernel *kernel)
{
    step s = {.panel_bytes = panel_bytes(m), .group = m->row_group};
    for (int since = 0; since < count; since += BLOCK_ROWS) {
        s.panels = panels + since / PANEL * s.panel_bytes;
        s.count = lesser(BLOCK_ROWS, count - since);
        for (int t = tile; t < end; t += s.tiles) {
            s.tiles = end - t < STRIPE ? 1 : STRIPE;
            if (m->row_group)
                int_stripe(&s, m, t, out + since, bias, kernel);
            else
                float_stripe(&s, m, t, out + since, bias);
        }
    }
}

static void multiply_panels(const matrix *m, int tile, int end, const uint8_t *panels, int count,
                            float *const *out, const float *bias)
{
    multiply_stripes(m, tile, end, panels, count, out, bias, int_lines);
}
