/* Floats: a stripe of tiles times the rows of panels. After panels.h. */

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
                f[r] = fp8 ? fv_fma(sum, scales, start ? f[r] : fv_set(0)) : sum;
            }
        }
    }
}
