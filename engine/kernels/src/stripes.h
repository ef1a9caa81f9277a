/* The products with many rows, stripe by stripe. Included by each isa_*.c after its products.h. */

#include "panels.h"
#include "int_stripe.h"
#include "float_stripe.h"

/* Rows that are faster as they are than in panels. */
static int few(const matrix *m) { return m->format == INT8 ? 2 : MOST_ROWS; }

static void write_stripe(const matrix *m, int tile, int tiles, const fv *f, int count,
                         float *const *out, const float *bias)
{
    fv scales[STRIPE];
    for (int t = 0; t < tiles; t++)
        scales[t] = m->format == INT8 ? load_scales(m->tiles + (tile + t) * m->tile_bytes +
                                                        m->padded * TILE, m->scale_type)
                                      : fv_set(1);
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tiles; t++)
            write_tile(m, tile + t, fv_mul(f[t * BLOCK_ROWS + r], scales[t]), out[r], bias);
}

/* Where results will go: rows are far apart, and each line would be waited for when written. */
INLINE void fetch_outputs(int tile, int tiles, int count, float *const *out)
{
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tiles; t++)
            fetch((const uint8_t *)(out[r] + (tile + t) * TILE));
}

/* One tile at a time: memory comes as one stream, which the processor goes on reading at a tile's
   end. Two streams stop together after some KiB, and few rows do not cover the wait. */
INLINE int is_narrow(const matrix *m, int count, const int_kernels *with)
{
    return m->format == INT8 && count <= PANEL && with->lines == int_lines;
}

static void multiply_stripes(const matrix *m, int tile, int end, const uint8_t *panels, int count,
                             float *const *out, const float *bias, const int_kernels *with)
{
    step s = {.panel_bytes = panel_bytes(m), .group = m->row_group};
    const uint8_t *w[STRIPE];
    fv f[STRIPE * BLOCK_ROWS];
    for (int since = 0; since < count; since += BLOCK_ROWS) {
        s.panels = panels + since / PANEL * s.panel_bytes;
        s.count = lesser(BLOCK_ROWS, count - since);
        for (int t = tile; t < end; t += s.tiles) {
            s.tiles = end - t < STRIPE || is_narrow(m, s.count, with) ? 1 : STRIPE;
            for (int u = 0; u < s.tiles; u++)
                w[u] = m->tiles + (t + u) * m->tile_bytes;
            fetch_outputs(t, s.tiles, s.count, out + since);
            if (m->row_group)
                int_stripe(&s, m, w, f, with);
            else
                float_stripe(&s, m, w, f);
            write_stripe(m, t, s.tiles, f, s.count, out + since, bias);
        }
    }
}

static void multiply_panels(const matrix *m, int tile, int end, const uint8_t *panels, int count,
                            float *const *out, const float *bias)
{
#ifdef GROUPED
    const int_kernels with = {int_lines, multiply_groups, INT_BLOCK};
#else
    const int_kernels with = {int_lines, NULL, 0};
#endif
    multiply_stripes(m, tile, end, panels, count, out, bias, &with);
}
