/* Many rows, as the products want them. After products.h.

   They lie in panels of PANEL, so that a kernel reads one stream of them with fixed distances:

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
    DIRECT_BLOCK = 256,  /* inputs: integers as they are stored, */
    INT_BLOCK = 256,     /* widened ones, */
    LEAST_GROUP = 32,    /* of those that are scaled in registers, */
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

/* Rows that a kernel takes with the last of `count`: zeros. */
static void fill_panel(const matrix *m, int count, uint8_t *panel)
{
    const int64_t values = values_bytes(m);
    const int rows = lesser(PANEL, (count + INT_CHUNK / 2 - 1) / (INT_CHUNK / 2) * (INT_CHUNK / 2));
    if (!m->row_group) {
        memset(panel, 0, (size_t)values);
        return;
    }
    for (int64_t at = count * ROW_BYTES; at < values; at += PANEL * ROW_BYTES)
        memset(panel + at, 0, (size_t)(rows - count) * ROW_BYTES);
    memset(panel + values, 0, (size_t)(panel_bytes(m) - values));
}

static void pack(const matrix *m, const rows *x, const int32_t *which, int count, uint8_t *panel)
{
    if (count < PANEL)
        fill_panel(m, count, panel);
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
    const int each = s->ahead_bytes / s->count, start = each * r / 64 * 64, end = each * (r + some);
    for (int t = 0; t < s->tiles; t++)
        for (int at = start; at < end; at += 64)
            fetch(s->ahead[t] + at);
}
