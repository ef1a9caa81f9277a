/* Integers: a stripe of tiles times the rows of panels. After panels.h. */

/* sums[tile][BLOCK_ROWS] += lines times rows */
typedef void int_kernel(const step *s, iv *sums);

/* What scales the sums of a group, of each of a tile's outputs. */
typedef struct {
    fv scales, zeros;
    iv integers;
} group_end;

/* f[tile][BLOCK_ROWS] += lines times rows, whole groups, which end with ends[group][tile]; at the
   first inputs what f was before is gone. */
typedef void group_kernel(const step *s, const matrix *m, const group_end (*ends)[STRIPE], fv *f);

/* `groups` is NULL, or takes groups of up to `most` inputs, so many inputs at once. */
typedef struct {
    int_kernel *lines;
    group_kernel *groups;
    int most;
} int_kernels;

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

/* a[tile][row] += a line of each of T tiles times the next four inputs of R rows. */
INLINE void dot_lines(iv *a, const uint8_t *w, const uint8_t *v, const uint8_t *x, const int T,
                      const int R)
{
    const bv first = bv_load(w), second = T > 1 ? bv_load(v) : first;
    UNROLL for (int u = 0; u < R; u++)
    {
        const bv word = bv_word(x + u * ROW_BYTES);
        a[u] = dot_words(a[u], first, word);
        if (T > 1)
            a[R + u] = dot_words(a[R + u], second, word);
    }
}

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
                fetch(w + AHEAD_BYTES);
            if (direct && T > 1)
                fetch(v + AHEAD_BYTES);
            dot_lines(a, w, v, from, T, R);
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

/* What stands at w, after the group's lines; not of int8, which has none. */
INLINE group_end end_of(const matrix *m, const uint8_t *w)
{
    group_end end = {fv_set(0), fv_set(0), iv_set(0)};
    if (m->format == MXFP4) {
        end.scales = fv_mul(fv_bits(iv_left(iv_load_u8(w), 23)), fv_set(0.5f));
        return end;
    }
    const uint8_t *zeros = w + scale_bytes(m->scale_type);
    end.scales = load_scales(w, m->scale_type);
    if (m->zero_kind == ZERO_FLOAT)
        end.zeros = load_scales(zeros, m->scale_type);
    if (m->zero_kind == ZERO_INTEGER)
        end.integers = iv_load_u8(zeros);
    return end;
}

/* before + the sum of a row's group in its row's and its outputs' scale; those of the row, and what
   corrects its sum, stand at `scale` and `correct`. */
INLINE fv scaled(iv sum, const uint8_t *scale, const uint8_t *correct, const group_end *end,
                 fv before, const int format, const int zero_kind)
{
    const fv of_row = fv_word(scale);
    if (zero_kind == ZERO_FLOAT) {
        before = fv_fma(fv_of(sum), fv_mul(end->scales, of_row), before);
        return fv_fma(end->zeros, fv_word(correct), before);
    }
    iv correction = iv_word(correct);
    if (zero_kind == ZERO_INTEGER)
        correction = iv_mul(end->integers, correction);
    return fv_fma(fv_of(iv_add(sum, correction)),
                  format == INT8 ? of_row : fv_mul(end->scales, of_row), before);
}

/* f += sums of group g; what it was before is gone if that is the first one. */
INLINE void add_group(const step *s, const matrix *m, int g, const iv *sums, fv *f,
                      const group_end *end, const int format, const int zero_kind,
                      const int first)
{
    const int64_t at = values_bytes(m) + (int64_t)g * PANEL * 4, panel = s->panel_bytes;
    const int64_t apart = (int64_t)m->padded / m->row_group * PANEL * 4;
    const uint8_t *from = s->panels + at;
    for (int left = s->count; left > 0; left -= PANEL, from += panel, sums += PANEL, f += PANEL) {
        const int count = lesser(left, PANEL);
        for (int u = 0; u < count; u++)
            f[u] = scaled(sums[u], from + 4 * u, from + apart + 4 * u, end,
                          first ? fv_set(0) : f[u], format, zero_kind);
    }
}

INLINE void finish(const step *s, const matrix *m, int g, const iv *sums, fv *f,
                   const group_end *end, const int format, const int zero_kind)
{
    if (g)
        add_group(s, m, g, sums, f, end, format, zero_kind, 0);
    else
        add_group(s, m, g, sums, f, end, format, zero_kind, 1);
}

/* The same with what stands after a group's lines at w. */
static void finish_group(const step *s, const matrix *m, const uint8_t *w, int g, const iv *sums,
                         fv *f)
{
    if (m->format == INT8) {
        finish(s, m, g, sums, f, NULL, INT8, ZERO_NONE);
        return;
    }
    const group_end end = end_of(m, w);
    if (m->format == MXFP4 || m->zero_kind == ZERO_NONE)
        finish(s, m, g, sums, f, &end, INT4, ZERO_NONE);
    else if (m->zero_kind == ZERO_FLOAT)
        finish(s, m, g, sums, f, &end, INT4, ZERO_FLOAT);
    else
        finish(s, m, g, sums, f, &end, INT4, ZERO_INTEGER);
}

#ifdef GROUPED
/* f += inputs k to k + inputs, whole groups: R rows from r on times T tiles. A group's sums are
   scaled while they are in registers; the operations are those of `add_group`. */
INLINE void group_chunk(const step *s, const matrix *m, const group_end (*ends)[STRIPE], int r,
                        fv *f, const int T, const int R, const int format, const int zero_kind,
                        const int ahead)
{
    const uint8_t *panel = s->panels + r / PANEL * s->panel_bytes;
    const uint8_t *x = panel + r % PANEL * ROW_BYTES;
    const uint8_t *scales = panel + values_bytes(m) + r % PANEL * 4;
    const int64_t apart = (int64_t)m->padded / s->group * PANEL * 4;
    const uint8_t *w = s->lines[0], *v = s->lines[T - 1];
    fv totals[STRIPE * GROUPED];
    UNROLL for (int u = 0; u < T * R; u++) totals[u] =
        s->k ? f[u / R * BLOCK_ROWS + u % R] : fv_set(0);
    for (int k = s->k; k < s->k + s->inputs; ends++) {
        const uint8_t *scale = scales + (int64_t)(k / s->group) * PANEL * 4;
        iv a[STRIPE * GROUPED];
        UNROLL for (int u = 0; u < T * R; u++)
        {
            a[u] = zero_kind == ZERO_FLOAT ? iv_set(0) : iv_word(scale + apart + 4 * (u % R));
            if (zero_kind == ZERO_INTEGER)
                a[u] = iv_mul((*ends)[u / R].integers, a[u]);
        }
        for (const int until = k + s->group; k < until;) {
            const int within = k % PANEL_INPUTS, some = lesser(PANEL_INPUTS - within, until - k);
            const uint8_t *from = x + (int64_t)(k / PANEL_INPUTS) * PANEL * ROW_BYTES + within;
            k += some;
            for (const uint8_t *end = from + some; from < end; from += 4) {
                if (ahead)
                    fetch(w + AHEAD_BYTES);
                dot_lines(a, w, v, from, T, R);
                w += 4 * TILE, v += 4 * TILE;
            }
        }
        UNROLL for (int u = 0; u < T * R; u++)
        {
            const group_end *end = &(*ends)[u / R];
            const fv sum = fv_of(a[u]), of_row = fv_word(scale + 4 * (u % R));
            totals[u] = fv_fma(sum, format == INT8 ? of_row : fv_mul(end->scales, of_row), totals[u]);
            if (zero_kind == ZERO_FLOAT)
                totals[u] =
                    fv_fma(end->zeros, fv_word(scale + apart + 4 * (u % R)), totals[u]);
        }
    }
    UNROLL for (int u = 0; u < T * R; u++) f[u / R * BLOCK_ROWS + u % R] = totals[u];
}

INLINE void group_chunks(const step *s, const matrix *m, const group_end (*ends)[STRIPE], fv *f,
                         const int T, const int format, const int zero_kind)
{
    if (format == INT8 && T == 1) { /* all of the next block would be fetched at once */
        if (s->count <= GROUPED && !fetches_ahead)
            group_chunk(s, m, ends, 0, f, T, GROUPED, format, zero_kind, 0);
        else if (s->count <= GROUPED)
            group_chunk(s, m, ends, 0, f, T, GROUPED, format, zero_kind, 1);
        else
            for (int r = 0; r < s->count; r += 2 * GROUPED)
                group_chunk(s, m, ends, r, f + r, T, 2 * GROUPED, format, zero_kind, 1);
        return;
    }
    for (int r = 0; r < s->count; r += GROUPED) {
        fetch_part(s, r, GROUPED);
        group_chunk(s, m, ends, r, f + r, T, GROUPED, format, zero_kind, 0);
    }
}

INLINE void group_tiles(const step *s, const matrix *m, const group_end (*ends)[STRIPE], fv *f,
                        const int format, const int zero_kind)
{
    if (s->tiles == STRIPE)
        group_chunks(s, m, ends, f, STRIPE, format, zero_kind);
    else
        group_chunks(s, m, ends, f, 1, format, zero_kind);
}

static void multiply_groups(const step *s, const matrix *m, const group_end (*ends)[STRIPE], fv *f)
{
    if (m->format == INT8)
        group_tiles(s, m, ends, f, INT8, ZERO_NONE);
    else if (m->format == MXFP4 || m->zero_kind == ZERO_NONE)
        group_tiles(s, m, ends, f, INT4, ZERO_NONE);
    else if (m->zero_kind == ZERO_FLOAT)
        group_tiles(s, m, ends, f, INT4, ZERO_FLOAT);
    else
        group_tiles(s, m, ends, f, INT4, ZERO_INTEGER);
}

#endif

/* Groups of which a block has several: half bytes are widened. */
static void group_stripe(step *s, const matrix *m, const uint8_t *const *w, fv *f,
                         const int_kernels *with)
{
    _Alignas(64) uint8_t buffer[STRIPE][INT_BLOCK * TILE];
    group_end ends[INT_BLOCK / LEAST_GROUP][STRIPE];
    const int group = m->row_group, most = with->most / group * group;
    const int direct = m->format == INT8, lines = direct ? group * TILE : group * TILE / 2;
    const int64_t stride = direct ? lines : m->tile_bytes / (m->padded / group);
    for (s->k = 0; s->k < m->padded; s->k += s->inputs) {
        s->inputs = lesser(most, m->padded - s->k);
        const int first = s->k / group, groups = s->inputs / group;
        s->ahead_bytes = (int)(groups * stride);
        for (int t = 0; t < s->tiles; t++) {
            const uint8_t *from = w[t] + first * stride;
            s->lines[t] = direct ? from : buffer[t];
            s->ahead[t] = from + groups * stride;
            for (int g = 0; g < groups; g++, from += stride) {
                if (!direct)
                    widen_ints(m, from, group, buffer[t] + g * group * TILE);
                if (!direct)
                    ends[g][t] = end_of(m, from + lines);
            }
        }
        with->groups(s, m, (const group_end(*)[STRIPE])ends, f);
    }
}

/* int8: groups as long as they like, multiplied as they are stored. */
static void int8_stripe(step *s, const matrix *m, const uint8_t *const *w, fv *f,
                        int_kernel *kernel)
{
    iv sums[STRIPE * BLOCK_ROWS];
    const int group = m->row_group;
    s->direct = 1;
    for (int g = 0; g < m->padded / group; g++) {
        for (s->k = g * group; s->k < (g + 1) * group; s->k += s->inputs) {
            s->inputs = lesser(DIRECT_BLOCK, (g + 1) * group - s->k);
            s->fresh = s->k == g * group;
            s->ahead_bytes = s->inputs * TILE;
            for (int t = 0; t < s->tiles; t++) {
                s->lines[t] = w[t] + s->k * TILE;
                s->ahead[t] = s->k + s->inputs < m->padded ? s->lines[t] + s->ahead_bytes
                                                           : w[t] + s->tiles * m->tile_bytes;
            }
            kernel(s, sums);
        }
        for (int t = 0; t < s->tiles; t++)
            finish_group(s, m, NULL, g, sums + t * BLOCK_ROWS, f + t * BLOCK_ROWS);
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

/* f = what the rows give, but for the scales of int8's outputs. */
static void int_stripe(step *s, const matrix *m, const uint8_t *const *w, fv *f,
                       const int_kernels *with)
{
    if (with->groups && m->row_group >= LEAST_GROUP && m->row_group <= with->most)
        group_stripe(s, m, w, f, with);
    else if (m->format == INT8)
        int8_stripe(s, m, w, f, with->lines);
    else
        nibble_stripe(s, m, w, f, with->lines);
}
