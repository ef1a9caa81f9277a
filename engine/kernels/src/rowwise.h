/* What is done to rows one by one: rounded, activated, combined. Included by each isa_*.c. */

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

/* A row's sums of int8 products with tiles [tile, end), as those of panels are scaled. */
static void finish_row(const matrix *m, int tile, int end, const int32_t *sums, float scale,
                       float *out, const float *bias)
{
    for (int t = tile; t < end; t++, sums += TILE) {
        const uint8_t *scales = m->tiles + t * m->tile_bytes + (int64_t)m->padded * TILE;
        const fv sum = fv_fma(fv_of(iv_load(sums)), fv_set(scale), fv_set(0));
        write_tile(m, t, fv_mul(sum, load_scales(scales, m->scale_type)), out, bias);
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
        const fv positive = fv_max(fv_set(0), gate); /* of NaN the second is taken */
        return fv_mul(positive, positive);
    }
    default: {
        const fv g = fv_min(fv_set(limit), gate);
        const fv u = fv_min(fv_set(limit), fv_max(fv_set(-limit), up));
        return fv_mul(fv_add(u, fv_set(1)), fv_mul(g, sigmoid(fv_mul(g, fv_set(alpha)))));
    }
    }
}

static void activate(int kind, const float *inner, float *out, int width, float alpha, float limit)
{
    const int gated = kind <= CLAMPED_SIGMOID_MUL, interleaved = kind == CLAMPED_SIGMOID_MUL;
    for (int k = 0; k < width; k += TILE) {
        const int some = lesser(TILE, width - k);
        if (some == TILE && !interleaved) {
            const fv up = gated ? fv_load(inner + width + k) : fv_set(0);
            fv_store(out + k, activated(kind, fv_load(inner + k), up, alpha, limit));
            continue;
        }
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
