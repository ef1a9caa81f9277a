/* Attention of one new token and its norms, over one instruction set's lanes; after products.h. */

enum { BLOCK_TOKENS = 64 }; /* whose scores are held at a time: where pages lie changes no bit */

static void normalize(const float *x, const float *weight, float eps, int width, float *out)
{
    fv squares = fv_set(0);
    int k = 0;
    for (; k + TILE <= width; k += TILE) {
        const fv some = fv_load(x + k);
        squares = fv_fma(some, some, squares);
    }
    float sum = fv_sum(squares);
    for (int i = k; i < width; i++)
        sum += x[i] * x[i];
    const float factor = 1.0f / sqrtf(sum / (float)width + eps);
    for (k = 0; k + TILE <= width; k += TILE)
        fv_store(out + k, fv_mul(fv_mul(fv_load(x + k), fv_set(factor)), fv_load(weight + k)));
    for (; k < width; k++)
        out[k] = x[k] * factor * weight[k];
}

/* weights[j] = q times row at[j] of `keys`, for `count` rows: a multiple of DOTS. */
INLINE void score_rows(const float *q, const float *keys, const int64_t *at, int count, int dim,
                       float *weights)
{
    for (int j = 0; j < count; j += DOTS) {
        fv sums[DOTS];
        UNROLL for (int i = 0; i < DOTS; i++) sums[i] = fv_set(0);
        for (int k = 0; k < dim; k += TILE) {
            const fv some = fv_load(q + k);
            UNROLL for (int i = 0; i < DOTS; i++) sums[i] =
                fv_fma(some, fv_load(keys + at[j + i] + k), sums[i]);
        }
        fv_sums(sums, weights + j);
    }
}

/* Scores of a query, of which it sees `seen`, times `scaling` -> `count` weights and their `sum`; the
   largest so far, and the factor for what has been summed with the one before. */
INLINE float weigh_scores(float *scores, int seen, int count, float scaling, float *largest,
                          float *sum)
{
    const int whole = seen / TILE * TILE, end = (seen + TILE - 1) / TILE * TILE;
    fv most = fv_set(-1e30f), total = fv_set(0);
    for (int j = 0; j < whole; j += TILE)
        most = fv_max(fv_load(scores + j), most);
    float top = fv_largest(most);
    for (int j = whole; j < seen; j++)
        top = scores[j] > top ? scores[j] : top;
    top = top * scaling > *largest ? top * scaling : *largest;
    const float factor = expf(*largest - top);
    for (int j = 0; j < end; j += TILE) {
        const fv score = fv_sub(fv_mul(fv_load(scores + j), fv_set(scaling)), fv_set(top));
        /* what is no number stays so */
        fv_store(scores + j, fv_add(fv_exp(score), fv_mul(score, fv_set(0))));
    }
    for (int j = seen; j < count || j < end; j++)
        scores[j] = 0;
    for (int j = 0; j < end; j += TILE)
        total = fv_add(total, fv_load(scores + j));
    *sum = *sum * factor + fv_sum(total);
    *largest = top;
    return factor;
}

/* Scores of one query head against `count` rows -> their weights, as above. `at` goes on to a
   multiple of TILE. */
INLINE float weigh(const float *q, const float *keys, const int64_t *at, int count, int dim,
                   float *largest, float *sum, float *weights)
{
    const int whole = (count + TILE - 1) / TILE * TILE;
    score_rows(q, keys, at, whole, dim, weights);
    return weigh_scores(weights, count, whole, 1, largest, sum);
}

/* out[some tiles] = itself times `factor`, plus the weighted rows: the even and the odd ones apart,
   so that a sum does not wait for the one before. */
INLINE void add_columns(const float *weights, const float *values, const int64_t *at, int count,
                        float factor, float *out, const int tiles)
{
    fv even[COLUMNS], odd[COLUMNS];
    UNROLL for (int i = 0; i < tiles; i++)
    {
        even[i] = fv_mul(fv_load(out + i * TILE), fv_set(factor));
        odd[i] = fv_set(0);
    }
    int j = 0;
    for (; j + 2 <= count; j += 2) {
        const fv one = fv_set(weights[j]), other = fv_set(weights[j + 1]);
        UNROLL for (int i = 0; i < tiles; i++)
        {
            even[i] = fv_fma(one, fv_load(values + at[j] + i * TILE), even[i]);
            odd[i] = fv_fma(other, fv_load(values + at[j + 1] + i * TILE), odd[i]);
        }
    }
    if (j < count)
        UNROLL for (int i = 0; i < tiles; i++) even[i] =
            fv_fma(fv_set(weights[j]), fv_load(values + at[j] + i * TILE), even[i]);
    UNROLL for (int i = 0; i < tiles; i++) fv_store(out + i * TILE, fv_add(even[i], odd[i]));
}

INLINE void add_values(const float *weights, const float *values, const int64_t *at, int count,
                       int dim, float factor, float *out)
{
    int k = 0;
    for (; k + COLUMNS * TILE <= dim; k += COLUMNS * TILE)
        add_columns(weights, values + k, at, count, factor, out + k, COLUMNS);
    for (; k < dim; k += TILE)
        add_columns(weights, values + k, at, count, factor, out + k, 1);
}

/* q [group, dim], scaled, over one key head's rows: place i of `rows` is where token i lies.
   dim is a multiple of 16, group at most MOST_GROUP. -> out [group, dim] */
static void attend(const float *q, int group, int dim, const float *keys, const float *values,
                   const int32_t *rows, int length, float *out)
{
    float largest[MOST_GROUP], sum[MOST_GROUP], weights[BLOCK_TOKENS];
    int64_t at[BLOCK_TOKENS];
    for (int g = 0; g < group; g++) {
        largest[g] = -1e30f;
        sum[g] = 0;
    }
    memset(out, 0, sizeof(float) * (size_t)(group * dim));
    for (int start = 0; start < length; start += BLOCK_TOKENS) {
        const int count = lesser(BLOCK_TOKENS, length - start);
        for (int j = 0; j < count; j++)
            at[j] = (int64_t)rows[start + j] * dim;
        for (int j = count; j % TILE; j++)
            at[j] = at[count - 1];
        for (int g = 0; g < group; g++) {
            const float factor =
                weigh(q + g * dim, keys, at, count, dim, &largest[g], &sum[g], weights);
            add_values(weights, values, at, count, dim, factor, out + g * dim);
        }
    }
    for (int g = 0; g < group; g++)
        for (int k = 0; k < dim; k += TILE)
            fv_store(out + g * dim + k, fv_mul(fv_load(out + g * dim + k), fv_set(1 / sum[g])));
}

enum { ABREAST = 4 }; /* sums that do not wait for each other */

/* x with each of `count` rows, one behind the other: a row's sum does not depend on `count`. */
INLINE void dots(const float *x, const float *rows, int width, int count, float *out)
{
    const int whole = width / TILE * TILE;
    fv sums[ABREAST];
    for (int i = 0; i < count; i++)
        sums[i] = fv_set(0);
    for (int k = 0; k < whole; k += TILE) {
        const fv some = fv_load(x + k);
        for (int i = 0; i < count; i++)
            sums[i] = fv_fma(some, fv_load(rows + (int64_t)i * width + k), sums[i]);
    }
    for (int i = 0; i < count; i++) {
        out[i] = fv_sum(sums[i]);
        for (int k = whole; k < width; k++)
            out[i] += x[k] * rows[(int64_t)i * width + k];
    }
}

/* logits [experts] of one row; their exponentials beside the largest -> weights, and their sum. */
static float score(const float *x, const float *matrix, const float *bias, int inputs, int experts,
                   float *logits, float *weights)
{
    float most = -INFINITY;
    int e = 0;
    for (; e + ABREAST <= experts; e += ABREAST)
        dots(x, matrix + (int64_t)e * inputs, inputs, ABREAST, logits + e);
    for (; e < experts; e++)
        dots(x, matrix + (int64_t)e * inputs, inputs, 1, logits + e);
    for (e = 0; e < experts; e++) {
        logits[e] += bias ? bias[e] : 0;
        most = logits[e] > most ? logits[e] : most;
    }
    float total = 0;
    for (e = 0; e < experts; e += TILE) {
        const int some = lesser(TILE, experts - e);
        float each[TILE] = {0};
        memcpy(each, logits + e, sizeof(float) * (size_t)some);
        const fv apart = fv_sub(fv_load(each), fv_set(most));
        fv_store(each, fv_add(fv_exp(apart), fv_mul(apart, fv_set(0))));
        memcpy(weights + e, each, sizeof(float) * (size_t)some);
        for (int i = 0; i < some; i++)
            total += each[i];
    }
    return total;
}
