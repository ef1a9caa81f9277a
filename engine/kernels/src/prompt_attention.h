/* Attention of a prompt's tokens, block by block of keys (Milakov and Gimelshein, "Online
   normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022), over one
   instruction set's lanes. After attention.h.

   Blocks begin at multiples of KEYS, whatever part of a prompt comes in one call, and what a token
   may not see weighs nothing: its result is the same to the bit however the prompt is cut. */

enum {
    KEYS = 128, /* of a block */
    WIDEST_HEAD = 256
};

/* Keys [count, dim] -> [KEYS / TILE][dim][TILE]: a lane for each of them, the last one's repeated. */
static void turn_keys(const float *keys, int64_t stride, int count, int dim, float *turned)
{
    for (int start = 0; start < KEYS; start += TILE) {
        const float *from[TILE];
        float *to = turned + (int64_t)start * dim;
        for (int i = 0; i < TILE; i++)
            from[i] = keys + lesser(start + i, count - 1) * stride;
        for (int k = 0; k < dim; k++, to += TILE)
            for (int i = 0; i < TILE; i++)
                to[i] = from[i][k];
    }
}

/* into[r][tiles] = `factors[r]` times itself (NULL: 0), plus the sum over i < count of x[r][i] times
   the lanes at `lanes` + i * stride (tile t: `apart` floats further on), for ATTEND_ROWS rows. */
INLINE void add_products(const float *const *x, const float *lanes, int64_t stride, int64_t apart,
                         int64_t count, const float *factors, float *const *into,
                         const int tiles)
{
    fv sums[ATTEND_ROWS * ATTEND_TILES];
    const float *row[ATTEND_ROWS];
    UNROLL for (int r = 0; r < ATTEND_ROWS; r++)
    {
        row[r] = x[r];
        UNROLL for (int t = 0; t < tiles; t++) sums[r * tiles + t] =
            factors ? fv_mul(fv_load(into[r] + t * TILE), fv_set(factors[r])) : fv_set(0);
    }
    for (int64_t i = 0; i < count; i++, lanes += stride) {
        fv some[ATTEND_TILES];
        UNROLL for (int t = 0; t < tiles; t++) some[t] = fv_load(lanes + t * apart);
        UNROLL for (int r = 0; r < ATTEND_ROWS; r++)
        {
            const fv each = fv_set(row[r][i]);
            UNROLL for (int t = 0; t < tiles; t++) sums[r * tiles + t] =
                fv_fma(each, some[t], sums[r * tiles + t]);
        }
    }
    UNROLL for (int r = 0; r < ATTEND_ROWS; r++)
    {
        UNROLL for (int t = 0; t < tiles; t++) fv_store(into[r] + t * TILE, sums[r * tiles + t]);
    }
}

/* All of `width` lanes, a multiple of TILE; `into` goes on to their end. */
static void add_all(const float *const *x, const float *lanes, int64_t stride, int64_t apart,
                    int count, const float *factors, float **into, int width)
{
    for (int at = 0, tiles; at < width; at += tiles * TILE, lanes += tiles * apart) {
        tiles = width - at < ATTEND_TILES * TILE ? 1 : ATTEND_TILES;
        if (tiles == 1)
            add_products(x, lanes, stride, apart, count, factors, into, 1);
        else
            add_products(x, lanes, stride, apart, count, factors, into, ATTEND_TILES);
        for (int r = 0; r < ATTEND_ROWS; r++)
            into[r] += tiles * TILE;
    }
}

/* At most ATTEND_ROWS tokens from `first` on of query head `head`, against the keys of one block. */
static void attend_rows(const prompt_call *c, int head, int first, int count, int start,
                        const float *turned, const float *values)
{
    float scores[ATTEND_ROWS * KEYS], spare[WIDEST_HEAD] = {0}, factors[ATTEND_ROWS];
    const float *q[ATTEND_ROWS], *weights[ATTEND_ROWS];
    float *into[ATTEND_ROWS], *out[ATTEND_ROWS];
    const int before = c->length - c->tokens - start; /* keys of the block before token 0 */
    const int most = lesser(KEYS, before + first + count);
    for (int r = 0; r < ATTEND_ROWS; r++) {
        const int64_t token = first + lesser(r, count - 1);
        q[r] = c->q + head * c->q_head + token * c->q_token;
        weights[r] = into[r] = scores + r * KEYS;
        out[r] = r < count ? c->out + (token * c->heads + head) * c->value_dim : spare;
    }
    add_all(q, turned, TILE, (int64_t)c->dim * TILE, c->dim, NULL, into,
            (most + TILE - 1) / TILE * TILE);
    for (int r = 0; r < ATTEND_ROWS; r++) {
        const int token = first + r, seen = lesser(KEYS, before + token + 1);
        float *state = c->states + 2 * ((int64_t)head * c->tokens + token);
        factors[r] = 1;
        if (r >= count || seen <= 0)
            memset(scores + r * KEYS, 0, sizeof(float) * (size_t)most);
        else
            factors[r] = weigh_scores(scores + r * KEYS, seen, most, c->scaling, state, state + 1);
    }
    add_all(weights, values, c->value_token, TILE, most, start ? factors : NULL, out,
            c->value_dim);
}

/* Tokens [begin, end) of the query heads that share key head h. */
static void attend_prompt(const prompt_call *c, int h, int begin, int end)
{
    float turned[KEYS * WIDEST_HEAD];
    const int group = c->heads / c->key_heads, past = c->length - c->tokens;
    for (int head = h * group; head < (h + 1) * group; head++)
        for (int64_t t = begin; t < end; t++) {
            float *state = c->states + 2 * (head * (int64_t)c->tokens + t);
            state[0] = -1e30f, state[1] = 0;
        }
    for (int start = 0; start < past + end; start += KEYS) {
        const int count = lesser(KEYS, past + end - start);
        turn_keys(c->keys + h * c->key_head + start * c->key_token, c->key_token, count, c->dim,
                  turned);
        const float *values = c->values + h * c->value_head + start * c->value_token;
        const int sees = start - past > begin ? (start - past) : begin;
        for (int head = h * group; head < (h + 1) * group; head++)
            for (int t = sees; t < end; t += ATTEND_ROWS)
                attend_rows(c, head, t, lesser(ATTEND_ROWS, end - t), start, turned, values);
    }
    for (int head = h * group; head < (h + 1) * group; head++)
        for (int64_t t = begin; t < end; t++) {
            float *out = c->out + (t * c->heads + head) * c->value_dim;
            const fv share = fv_set(1 / c->states[2 * (head * (int64_t)c->tokens + t) + 1]);
            for (int k = 0; k < c->value_dim; k += TILE)
                fv_store(out + k, fv_mul(fv_load(out + k), share));
        }
}

const step_isa STEP_ISA = {normalize, attend, score, attend_prompt};
