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
    ROW_BYTES = PANEL_INPUTS, /* of a row's values that lie together */
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
        uint8_t *to = panel + u * ROW_BYTES;
        int k = 0;
        for (; k + PANEL_INPUTS <= m->padded; k += PANEL_INPUTS, to += PANEL * ROW_BYTES)
            memcpy(to, from.values + k, PANEL_INPUTS);
        if (k < m->padded) {
            memset(to, 0, PANEL_INPUTS);
            memcpy(to, from.values + k, (size_t)(m->padded - k));
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

/* Four rows at a time: a panel is wider than the cache is deep. */
static void pack_floats(const matrix *m, const rows *x, const int32_t *which, int count,
                        float *panel)
{
    int u = 0;
    for (; u + 4 <= count; u += 4) {
        const float *from[4];
        for (int i = 0; i < 4; i++)
            from[i] = x->floats + which[u + i] * x->stride;
        int k = 0;
        for (; k + 4 <= m->padded; k += 4) {
            __m128 four[4];
            UNROLL for (int i = 0; i < 4; i++) four[i] = _mm_loadu_ps(from[i] + k);
            _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
            UNROLL for (int i = 0; i < 4; i++)
                _mm_storeu_ps(panel + (int64_t)(k + i) * PANEL + u, four[i]);
        }
        for (; k < m->padded; k++)
            for (int i = 0; i < 4; i++)
                panel[(int64_t)k * PANEL + u + i] = from[i][k];
    }
    for (; u < count; u++) {
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
    int fresh, direct; /* nothing has been summed yet; the lines are the stored ones */
    const uint8_t *lines[STRIPE];
    const uint8_t *ahead[STRIPE]; /* what is widened next, */
    int ahead_bytes;              /* of each tile */
} step;

/* A kernel's part of what comes ahead, while it has rows from r on: memory never waits for it. */
INLINE void fetch_part(const step *s, int r, int some)
{
    const int start = s->ahead_bytes / s->count * r / 64 * 64, end = s->ahead_bytes / s->count * (r + some);
    for (int t = 0; t < s->tiles; t++)
        for (int at = start; at < end; at += 64)
            fetch(s->ahead[t] + at);
}

/* sums[tile][BLOCK_ROWS] += lines times rows */
typedef void int_kernel(const step *s, iv *sums);

#ifdef DEEP
/* 7-bit weights, DEEP lines at a time. Returns where the next lines are. */
INLINE const uint8_t *deep_words(const uint8_t *w, const uint8_t *x, const uint8_t *end, iv *a,
                                 const int R)
{
    for (; x < end; x += 4 * DEEP) {
        iv halves[INT_CHUNK];
        UNROLL for (int j = 0; j < DEEP; j++)
        {
            const bv line = bv_load(w + j * 4 * TILE);
            UNROLL for (int u = 0; u < R; u++)
            {
                const iv pairs = pairs7(line, bv_word(x + u * ROW_BYTES + 4 * j));
                halves[u] = j ? add_halves(halves[u], pairs) : pairs;
            }
        }
        UNROLL for (int u = 0; u < R; u++) a[u] = add_pairs(a[u], halves[u]);
        w += DEEP * 4 * TILE;
    }
    return w;
}
#endif

INLINE void int_chunk(const step *s, const uint8_t *x, iv *sums, const int T, const int R,
                      const int direct)
{
    iv a[STRIPE * INT_CHUNK];
    const uint8_t *w = s->lines[0], *v = s->lines[T - 1];
    UNROLL for (int u = 0; u < T * R; u++) a[u] =
        s->fresh ? iv_set(0) : sums[u / R * BLOCK_ROWS + u % R];
    for (int k = s->k, next; k < s->k + s->inputs; k = next) {
        const int within = k % PANEL_INPUTS;
        const uint8_t *from = x + (int64_t)(k / PANEL_INPUTS) * PANEL * ROW_BYTES + within;
        next = lesser(k - within + PANEL_INPUTS, s->k + s->inputs);
        const uint8_t *end = from + (next - k);
#ifdef DEEP
        if (!direct) {
            w = deep_words(w, from, end, a, R);
            continue;
        }
#endif
        for (; from < end; from += 4) {
            if (direct)
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

INLINE void int_chunks(const step *s, iv *sums, const int T, const int direct)
{
    for (int r = 0; r < s->count; r += INT_CHUNK) {
        const uint8_t *x = s->panels + r / PANEL * s->panel_bytes + r % PANEL * ROW_BYTES;
        if (!direct)
            fetch_part(s, r, INT_CHUNK);
        if (s->count - r <= INT_CHUNK / 2)
            int_chunk(s, x, sums + r, T, INT_CHUNK / 2, direct);
        else
            int_chunk(s, x, sums + r, T, INT_CHUNK, direct);
    }
}

static void int_lines(const step *s, iv *sums)
{
    if (s->tiles == STRIPE)
        s->direct ? int_chunks(s, sums, STRIPE, 1) : int_chunks(s, sums, STRIPE, 0);
    else
        s->direct ? int_chunks(s, sums, 1, 1) : int_chunks(s, sums, 1, 0);
}

/* The halves of bytes at w as lines of bytes. */
static void widen_ints(const matrix *m, const uint8_t *w, int inputs, uint8_t *to)
{
    for (int k = 0; k < inputs; k += 8, w += 4 * TILE, to += 8 * TILE) {
        const bv both = bv_load(w);
        bv low = bv_low(both), high = bv_high(both);
        if (m->format == MXFP4)
            low = bv_look_up(low, MXFP4_HALVES), high = bv_look_up(high, MXFP4_HALVES);
        bv_store(to, low);
        bv_store(to + 4 * TILE, high);
    }
}

/* f += sums of group g, each in its row's and its outputs' scale. */
INLINE void add_group(const step *s, const matrix *m, int g, const iv *sums, fv *f, const fv scales,
                      const fv zeros, const iv integers, const int format, const int zero_kind)
{
    const int64_t at = values_bytes(m) + (int64_t)g * PANEL * 4, panel = s->panel_bytes;
    const int64_t apart = (int64_t)m->padded / m->row_group * PANEL * 4;
    const uint8_t *from = s->panels + at;
    for (int left = s->count; left > 0; left -= PANEL, from += panel, sums += PANEL, f += PANEL) {
        const int count = lesser(left, PANEL);
        for (int u = 0; u < count; u++) {
            const fv scale = fv_word(from + 4 * u);
            const uint8_t *correct = from + apart + 4 * u;
            if (format == INT4 && zero_kind == ZERO_FLOAT) {
                const fv sum = fv_fma(fv_of(sums[u]), fv_mul(scales, scale), f[u]);
                f[u] = fv_fma(zeros, fv_word(correct), sum);
                continue;
            }
            iv correction = iv_word(correct);
            if (format == INT4 && zero_kind == ZERO_INTEGER)
                correction = iv_mul(integers, correction);
            const fv sum = fv_of(iv_add(sums[u], correction));
            f[u] = fv_fma(sum, format == INT8 ? scale : fv_mul(scales, scale), f[u]);
        }
    }
}

/* The same with what stands after a group's lines at w. */
static void finish_group(const step *s, const matrix *m, const uint8_t *w, int g, const iv *sums,
                         fv *f)
{
    const fv none = fv_set(0);
    if (m->format == INT8) {
        add_group(s, m, g, sums, f, none, none, iv_set(0), INT8, ZERO_NONE);
        return;
    }
    if (m->format == MXFP4) {
        const fv scales = fv_mul(fv_bits(iv_left(iv_load_u8(w), 23)), fv_set(0.5f));
        add_group(s, m, g, sums, f, scales, none, iv_set(0), MXFP4, ZERO_NONE);
        return;
    }
    const fv scales = load_scales(w, m->scale_type);
    const uint8_t *zeros = w + scale_bytes(m->scale_type);
    if (m->zero_kind == ZERO_FLOAT)
        add_group(s, m, g, sums, f, scales, load_scales(zeros, m->scale_type), iv_set(0), INT4,
                  ZERO_FLOAT);
    else if (m->zero_kind == ZERO_INTEGER)
        add_group(s, m, g, sums, f, scales, none, iv_load_u8(zeros), INT4, ZERO_INTEGER);
    else
        add_group(s, m, g, sums, f, scales, none, iv_set(0), INT4, ZERO_NONE);
}

static void write_stripe(const matrix *m, int tile, int tiles, const fv *f, int count,
                         float *const *out, const float *bias)
{
    for (int t = 0; t < tiles; t++)
        for (int r = 0; r < count; r++)
            write_tile(m, tile + t, f[t * BLOCK_ROWS + r], out[r], bias);
}

/* int8: groups as long as they like, multiplied as they are stored. */
static void int8_stripe(step *s, const matrix *m, const uint8_t *const *w, fv *f, int_kernel *kernel)
{
    iv sums[STRIPE * BLOCK_ROWS];
    const int group = m->row_group;
    s->direct = 1;
    for (int g = 0; g < m->padded / group; g++) {
        for (s->k = g * group; s->k < (g + 1) * group; s->k += s->inputs) {
            s->inputs = lesser(DIRECT_BLOCK, (g + 1) * group - s->k);
            s->fresh = s->k == g * group;
            for (int t = 0; t < s->tiles; t++)
                s->lines[t] = w[t] + s->k * TILE;
            kernel(s, sums);
        }
        for (int t = 0; t < s->tiles; t++)
            finish_group(s, m, NULL, g, sums + t * BLOCK_ROWS, f + t * BLOCK_ROWS);
    }
    for (int t = 0; t < s->tiles; t++) {
        const fv scales = load_scales(w[t] + m->padded * TILE, m->scale_type);
        for (int r = t * BLOCK_ROWS; r < t * BLOCK_ROWS + s->count; r++)
            f[r] = fv_mul(f[r], scales);
    }
}

/* Half bytes, INT_BLOCK inputs at a time: whole groups, or a part of one. What has been stored is
   read later than at once: it is in the cache by then. */
static void nibble_stripe(step *s, const matrix *m, const uint8_t *const *w, fv *f,
                          int_kernel *kernel)
{
    _Alignas(64) uint8_t buffer[STRIPE][INT_BLOCK * TILE];
    iv sums[2][STRIPE * BLOCK_ROWS];
    const int group = m->row_group, groups = m->padded / group, lines = group * TILE / 2;
    const int64_t stride = m->tile_bytes / groups; /* from group to group */
    s->direct = 0;
    for (int start = 0, end; start < m->padded; start = end) {
        const int left = group - start % group;
        end = start + (group <= INT_BLOCK ? lesser(INT_BLOCK / group * group, m->padded - start)
                                          : lesser(INT_BLOCK, left));
        for (int k = start; k < end; k += group)
            for (int t = 0; t < s->tiles; t++)
                widen_ints(m, w[t] + k / group * stride + k % group * (TILE / 2),
                           lesser(group, end - k), buffer[t] + (k - start) * TILE);
        for (int k = start; k < end; k += s->inputs) {
            const int g = k / group;
            s->k = k;
            s->inputs = lesser(group, end - k);
            s->fresh = k % group == 0;
            s->ahead_bytes = (int)stride;
            for (int t = 0; t < s->tiles; t++) {
                s->lines[t] = buffer[t] + (k - start) * TILE;
                s->ahead[t] = w[t] + g * stride + (end - start) / s->inputs * stride;
            }
            kernel(s, sums[g % 2]);
            for (int t = 0; t < s->tiles && (k + s->inputs) % group == 0; t++)
                finish_group(s, m, w[t] + g * stride + lines, g, sums[g % 2] + t * BLOCK_ROWS,
                             f + t * BLOCK_ROWS);
        }
    }
}

static void int_stripe(step *s, const matrix *m, const uint8_t *const *w, fv *f, int_kernel *kernel)
{
    if (m->format == INT8)
        int8_stripe(s, m, w, f, kernel);
    else
        nibble_stripe(s, m, w, f, kernel);
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

INLINE void float_chunks(const step *s, fv *even, fv *odd, const int T)
{
    for (int r = 0; r < s->count; r += CHUNK) {
        const float *x = (const float *)(s->panels + r / PANEL * s->panel_bytes) + r % PANEL;
        x += (int64_t)s->k * PANEL;
        fetch_part(s, r, CHUNK);
        if (s->count - r <= CHUNK / 2) {
            float_chunk(s, 0, x, even + r, T, CHUNK / 2);
            float_chunk(s, 1, x + PANEL, odd + r, T, CHUNK / 2);
        } else {
            float_chunk(s, 0, x, even + r, T, CHUNK);
            float_chunk(s, 1, x + PANEL, odd + r, T, CHUNK);
        }
    }
}

static void float_lines(const step *s, fv *even, fv *odd)
{
    if (s->tiles == STRIPE)
        float_chunks(s, even, odd, STRIPE);
    else
        float_chunks(s, even, odd, 1);
}

INLINE int line_inputs(const matrix *m) { return m->format == F32 ? 1 : m->format == FP8 ? 4 : 2; }

static const uint8_t *widened_floats(const matrix *m, const uint8_t *w, int inputs, float *to)
{
    const int each = line_inputs(m);
    for (int k = 0; k < inputs; k += each, w += 4 * TILE, to += each * TILE) {
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

static void float_stripe(step *s, const matrix *m, const uint8_t **w, fv *f)
{
    _Alignas(64) float buffer[STRIPE][FLOAT_BLOCK * TILE];
    fv sums[2][STRIPE * BLOCK_ROWS];
    const int group = m->format == FP8 ? m->group : m->padded, fp8 = m->format == FP8;
    for (int start = 0; start < m->padded; start += group) {
        for (s->k = start; s->k < start + group; s->k += s->inputs) {
            s->inputs = lesser(FLOAT_BLOCK, start + group - s->k);
            s->fresh = s->k == start;
            for (int t = 0; t < s->tiles; t++) {
                s->lines[t] = widened_floats(m, w[t], s->inputs, buffer[t]);
                w[t] += s->inputs / line_inputs(m) * 4 * TILE;
                s->ahead[t] = w[t];
            }
            s->ahead_bytes = FLOAT_BLOCK / line_inputs(m) * 4 * TILE;
            float_lines(s, sums[0], sums[1]);
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
}

static void multiply_stripes(const matrix *m, int tile, int end, const uint8_t *panels, int count,
                             float *const *out, const float *bias, int_kernel *kernel)
{
    step s = {.panel_bytes = panel_bytes(m), .group = m->row_group};
    const uint8_t *w[STRIPE];
    fv f[STRIPE * BLOCK_ROWS];
    for (int since = 0; since < count; since += BLOCK_ROWS) {
        s.panels = panels + since / PANEL * s.panel_bytes;
        s.count = lesser(BLOCK_ROWS, count - since);
        for (int t = tile; t < end; t += s.tiles) {
            s.tiles = end - t < STRIPE ? 1 : STRIPE;
            for (int u = 0; u < s.tiles; u++)
                w[u] = m->tiles + (t + u) * m->tile_bytes;
            for (int r = 0; r < STRIPE * BLOCK_ROWS; r++)
                f[r] = fv_set(0);
            if (m->row_group)
                int_stripe(&s, m, w, f, kernel);
            else
                float_stripe(&s, m, w, f);
            write_stripe(m, t, s.tiles, f, s.count, out + since, bias);
        }
    }
}

static void multiply_panels(const matrix *m, int tile, int end, const uint8_t *panels, int count,
                            float *const *out, const float *bias)
{
    multiply_stripes(m, tile, end, panels, count, out, bias, int_lines);
}
