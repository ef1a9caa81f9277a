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

/* P panels from x on, T tiles of weights. */
INLINE void amx_block(const step *s, int inputs, const uint8_t *x, iv *sums, const int T,
                      const int P, const int fetches)
{
    const uint8_t *w = s->lines[0], *v = s->lines[T - 1], *y = x + s->panel_bytes;
    iv *right = sums + BLOCK_ROWS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
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
        for (int line = 0; fetches && line < inputs / 4; line++) {
            fetch(w + AHEAD_BYTES + line * 4 * TILE);
            fetch(v + AHEAD_BYTES + line * 4 * TILE);
        }
        _tile_loadd(6, w, 4 * TILE);
        _tile_loadd(4, x + at, ROW_BYTES);
        _tile_dpbsud(0, 4, 6);
        if (P > 1) {
            _tile_loadd(5, y + at, ROW_BYTES);
            _tile_dpbsud(1, 5, 6);
        }
        if (T > 1) {
            _tile_loadd(7, v, 4 * TILE);
            _tile_dpbsud(2, 4, 7);
        }
        if (P > 1 && T > 1)
            _tile_dpbsud(3, 5, 7);
        w += inputs * TILE, v += inputs * TILE;
    }
    _tile_stored(0, sums, sizeof(iv));
    if (P > 1)
        _tile_stored(1, sums + PANEL, sizeof(iv));
    if (T > 1)
        _tile_stored(2, right, sizeof(iv));
    if (P > 1 && T > 1)
        _tile_stored(3, right + PANEL, sizeof(iv));
}

INLINE void amx_blocks(const step *s, iv *sums, const int T)
{
    const int inputs = s->group % PANEL_INPUTS ? HALF_INPUTS : PANEL_INPUTS;
    for (int r = 0; r < s->count; r += 2 * PANEL) {
        const uint8_t *x = s->panels + r / PANEL * s->panel_bytes;
        if (!s->direct)
            fetch_part(s, r, 2 * PANEL);
        if (s->count - r <= PANEL)
            amx_block(s, inputs, x, sums + r, T, 1, s->direct);
        else if (s->direct && !r)
            amx_block(s, inputs, x, sums + r, T, 2, 1);
        else
            amx_block(s, inputs, x, sums + r, T, 2, 0);
    }
}

static void amx_lines(const step *s, iv *sums)
{
    if (s->tiles == STRIPE)
        amx_blocks(s, sums, STRIPE);
    else
        amx_blocks(s, sums, 1);
}

static void amx_multiply_panels(const matrix *m, int tile, int end, const uint8_t *panels,
                                int count, float *const *out, const float *bias)
{
    if (!m->row_group || m->row_group % HALF_INPUTS) {
        multiply_panels(m, tile, end, panels, count, out, bias);
        return;
    }
    amx_configure(m->row_group % PANEL_INPUTS ? HALF_INPUTS : PANEL_INPUTS);
    multiply_stripes(m, tile, end, panels, count, out, bias, amx_lines);
    _tile_release();
}
