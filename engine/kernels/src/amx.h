/* Sums of integers in AMX's tiles of 16 lines by 64 bytes: a panel's block is one (16 rows times 64
   inputs), 16 lines of weights are one (64 inputs times 16 outputs). After stripes.h.

   Two panels times two tiles of weights fill the eight registers: sums in 0 to 3, rows in 4 and 5,
   weights in 6 and 7. Groups that are no multiple of 64 take half as many inputs at once. */

enum { HALF_INPUTS = PANEL_INPUTS / 2 };

typedef struct {
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t lines[16];
} amx_configuration;

INLINE void amx_configure(int inputs)
{
    amx_configuration wanted = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        wanted.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? inputs : 4 * TILE);
        wanted.lines[i] = (uint8_t)(i < 6 ? PANEL : inputs / 4);
    }
    _tile_loadconfig(&wanted);
}

INLINE void amx_zero(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* The sums of P panels with a tile of weights, and with another one. */
INLINE void amx_store(iv *left, iv *right, const int T, const int P)
{
    _tile_stored(0, left, sizeof(iv));
    if (P > 1)
        _tile_stored(1, left + PANEL, sizeof(iv));
    if (T > 1)
        _tile_stored(2, right, sizeof(iv));
    if (P > 1 && T > 1)
        _tile_stored(3, right + PANEL, sizeof(iv));
}

/* sums += a panel's block at x, and one at y, times 16 lines at w, and at v. */
INLINE void amx_multiply(const uint8_t *w, const uint8_t *v, const uint8_t *x, const uint8_t *y,
                         const int T, const int P)
{
    _tile_loadd(6, w, 4 * TILE);
    _tile_loadd(4, x, ROW_BYTES);
    _tile_dpbsud(0, 4, 6);
    if (P > 1) {
        _tile_loadd(5, y, ROW_BYTES);
        _tile_dpbsud(1, 5, 6);
    }
    if (T > 1) {
        _tile_loadd(7, v, 4 * TILE);
        _tile_dpbsud(2, 4, 7);
    }
    if (P > 1 && T > 1)
        _tile_dpbsud(3, 5, 7);
}

/* P panels from row r on, T tiles of weights; each `inputs` fetch `lines` of what comes ahead. */
INLINE void amx_block(const step *s, int inputs, int r, int lines, iv *sums, const int T,
                      const int P)
{
    const uint8_t *w = s->lines[0], *v = s->lines[T - 1];
    const uint8_t *x = s->panels + r / PANEL * s->panel_bytes, *y = x + s->panel_bytes;
    const int before = r / (2 * PANEL) * (s->inputs / inputs) * lines * 64;
    const uint8_t *next = s->ahead[0] + before, *beside = s->ahead[T - 1] + before;
    iv *right = sums + BLOCK_ROWS;
    amx_zero();
    if (!s->fresh) {
        _tile_loadd(0, sums, sizeof(iv));
        if (P > 1)
            _tile_loadd(1, sums + PANEL, sizeof(iv));
        if (T > 1)
            _tile_loadd(2, right, sizeof(iv));
        if (P > 1 && T > 1)
            _tile_loadd(3, right + PANEL, sizeof(iv));
    }
    for (int k = s->k; k < s->k + s->inputs; k += inputs) {
        const int64_t at = k / PANEL_INPUTS * PANEL * ROW_BYTES + k % PANEL_INPUTS;
        for (int line = 0; line < lines; line++) {
            fetch(next), next += 64;
            if (T > 1)
                fetch(beside), beside += 64;
        }
        amx_multiply(w, v, x + at, y + at, T, P);
        w += inputs * TILE, v += inputs * TILE;
    }
    amx_store(sums, right, T, P);
}

INLINE void amx_blocks(const step *s, iv *sums, const int T)
{
    const int inputs = s->group % PANEL_INPUTS ? HALF_INPUTS : PANEL_INPUTS;
    const int passes = (s->count - 1) / (2 * PANEL) + 1, blocks = s->inputs / inputs;
    const int lines = (s->ahead_bytes / 64 - 1) / (passes * blocks) + 1;
    for (int r = 0; r < s->count; r += 2 * PANEL) {
        if (s->count - r <= PANEL)
            amx_block(s, inputs, r, lines, sums + r, T, 1);
        else
            amx_block(s, inputs, r, lines, sums + r, T, 2);
    }
}

static void amx_lines(const step *s, iv *sums)
{
    if (s->tiles == STRIPE)
        amx_blocks(s, sums, STRIPE);
    else
        amx_blocks(s, sums, 1);
}

enum { AMX_GROUPS = 4 }; /* at once: sums in the first cache, scales in registers */

typedef iv amx_sums[STRIPE][2 * PANEL];

/* sums = group by group what `groups` of them from s->k on give with P panels from row r on. */
INLINE void amx_group_sums(const step *s, int groups, int r, amx_sums *sums, const int T,
                           const int P)
{
    const int inputs = s->group % PANEL_INPUTS ? HALF_INPUTS : PANEL_INPUTS;
    const int some = (P * PANEL + groups - 1) / groups;
    const uint8_t *w = s->lines[0], *v = s->lines[T - 1];
    const uint8_t *x = s->panels + r / PANEL * s->panel_bytes, *y = x + s->panel_bytes;
    for (int g = 0, k = s->k; g < groups; g++) {
        fetch_part(s, r + g * some, some);
        amx_zero();
        for (const int end = k + s->group; k < end; k += inputs) {
            const int64_t at = k / PANEL_INPUTS * PANEL * ROW_BYTES + k % PANEL_INPUTS;
            amx_multiply(w, v, x + at, y + at, T, P);
            w += inputs * TILE, v += inputs * TILE;
        }
        amx_store(sums[g][0], sums[g][T - 1], T, P);
    }
}

/* Rows of one panel whose groups have been summed. */
typedef struct {
    const amx_sums *sums;  /* group by group, from row `since` on */
    const uint8_t *scales; /* of the first group; what corrects its sums is `apart` bytes on */
    const uint8_t *next;   /* `some` bytes for each row that are multiplied with next */
    int64_t apart;
    int since, count, some;
} amx_rows;

INLINE amx_rows amx_rows_of(const step *s, const matrix *m, int r, int since, const amx_sums *sums)
{
    const int64_t k = s->k / PANEL_INPUTS * PANEL * ROW_BYTES, panel = s->panel_bytes;
    const uint8_t *x = s->panels + (r + since) / PANEL * panel;
    const uint8_t *first = s->panels + since / PANEL * panel;
    const int last = s->count - r <= 2 * PANEL;
    return (amx_rows){
        .sums = sums,
        .scales = x + values_bytes(m) + (int64_t)(s->k / s->group) * PANEL * 4,
        .next = last ? first + k + s->inputs * PANEL : x + 2 * panel + k,
        .apart = (int64_t)m->padded / s->group * PANEL * 4,
        .since = since,
        .count = lesser(PANEL, s->count - r - since),
        .some = s->inputs,
    };
}

/* f[tile][BLOCK_ROWS] += the sums, scaled; at the `first` ones what it was before is gone. */
INLINE void amx_scale(const amx_rows *x, const group_end (*ends)[STRIPE], fv *f, const int T,
                      const int groups, const int format, const int zero_kind, const int first)
{
    group_end end[AMX_GROUPS][STRIPE];
    for (int g = 0; g < groups; g++)
        for (int t = 0; t < T; t++)
            end[g][t] = ends[g][t];
    for (int u = 0; u < x->count; u++) {
        fv total[STRIPE];
        for (int at = 0; at < x->some; at += 64)
            fetch(x->next + u * x->some + at);
        UNROLL for (int t = 0; t < T; t++) total[t] = first ? fv_set(0) : f[t * BLOCK_ROWS + u];
        UNROLL for (int g = 0; g < groups; g++)
        {
            const uint8_t *scale = x->scales + (g * PANEL + u) * 4;
            UNROLL for (int t = 0; t < T; t++) total[t] =
                scaled(x->sums[g][t][x->since + u], scale, scale + x->apart, &end[g][t], total[t],
                       format, zero_kind);
        }
        UNROLL for (int t = 0; t < T; t++) f[t * BLOCK_ROWS + u] = total[t];
    }
}

INLINE void amx_group_chunk(const step *s, const matrix *m, const group_end (*ends)[STRIPE], int r,
                            fv *f, const int T, const int P, const int format,
                            const int zero_kind)
{
    amx_sums sums[AMX_GROUPS];
    const int groups = s->inputs / s->group;
    amx_group_sums(s, groups, r, sums, T, P);
    for (int since = 0; since < P * PANEL; since += PANEL, f += PANEL) {
        const amx_rows x = amx_rows_of(s, m, r, since, sums);
        if (groups == AMX_GROUPS && s->k)
            amx_scale(&x, ends, f, T, AMX_GROUPS, format, zero_kind, 0);
        else
            amx_scale(&x, ends, f, T, groups, format, zero_kind, !s->k);
    }
}

INLINE void amx_group_chunks(const step *s, const matrix *m, const group_end (*ends)[STRIPE],
                             fv *f, const int T, const int format, const int zero_kind)
{
    for (int r = 0; r < s->count; r += 2 * PANEL) {
        if (s->count - r <= PANEL)
            amx_group_chunk(s, m, ends, r, f + r, T, 1, format, zero_kind);
        else
            amx_group_chunk(s, m, ends, r, f + r, T, 2, format, zero_kind);
    }
}

INLINE void amx_group_tiles(const step *s, const matrix *m, const group_end (*ends)[STRIPE], fv *f,
                            const int format, const int zero_kind)
{
    if (s->tiles == STRIPE)
        amx_group_chunks(s, m, ends, f, STRIPE, format, zero_kind);
    else
        amx_group_chunks(s, m, ends, f, 1, format, zero_kind);
}

static void amx_groups(const step *s, const matrix *m, const group_end (*ends)[STRIPE], fv *f)
{
    if (m->format == INT8)
        amx_group_tiles(s, m, ends, f, INT8, ZERO_NONE);
    else if (m->format == MXFP4 || m->zero_kind == ZERO_NONE)
        amx_group_tiles(s, m, ends, f, INT4, ZERO_NONE);
    else if (m->zero_kind == ZERO_FLOAT)
        amx_group_tiles(s, m, ends, f, INT4, ZERO_FLOAT);
    else
        amx_group_tiles(s, m, ends, f, INT4, ZERO_INTEGER);
}

static void amx_multiply_panels(const matrix *m, int tile, int end, const uint8_t *panels,
                                int count, float *const *out, const float *bias)
{
    if (!m->row_group || m->row_group % HALF_INPUTS) {
        multiply_panels(m, tile, end, panels, count, out, bias);
        return;
    }
    const int_kernels with = {amx_lines, amx_groups, lesser(INT_BLOCK, AMX_GROUPS * m->row_group)};
    amx_configure(m->row_group % PANEL_INPUTS ? HALF_INPUTS : PANEL_INPUTS);
    multiply_stripes(m, tile, end, panels, count, out, bias, &with);
    _tile_release();
}
