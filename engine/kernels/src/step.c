/* A step of single tokens: one call for an attention module, one for a norm. */
#include "step.h"
#include "calls.h"
#include "pool.h"
#include "scratch.h"

#include <math.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* Less than this is done before another thread has woken. */
enum {
    SMALL_SCORES = 1024,      /* numbers of keys */
    SMALL_ROUTING = 1 << 18, /* multiplications */
    PROMPT_PART = 256,       /* tokens of a head that a thread takes at a time */
};

typedef struct {
    const attention *a;
    const attention_call *call;
    float *q, *k, *v, *mixed;
} step;

/* q, k and v of the same rows: 0, or how many bytes of scratch are needed. */
static int64_t project(const step *s, uint8_t *given, int64_t given_bytes)
{
    const attention *a = s->a;
    const linear_part parts[] = {
        {&a->query, a->query_bias, s->q},
        {&a->key, a->key_bias, s->k},
        {&a->value, a->value_bias, s->v},
    };
    return moestro_linears(parts, 3, s->call->x, a->query.inputs, s->call->count, given,
                           given_bytes);
}

static int64_t linear_bytes(const step *s)
{
    const int64_t out_bytes =
        moestro_linear(&s->a->output, NULL, 0, s->call->count, NULL, NULL, NULL, 0);
    return larger(project(s, NULL, 0), out_bytes);
}

static void norm_heads(const float *weight, float eps, int each, float *x, int width)
{
    for (int start = 0; weight && start < width; start += each)
        current_step()->normalize(x + start, weight, eps, each, x + start);
}

/* x cos + (its halves exchanged, the first one negative) sin, of each head's first inputs. */
static void turn_heads(const attention *a, const float *cos, const float *sin, float *x, int heads)
{
    const int half = a->rotary / 2;
    for (int h = 0; h < heads; h++) {
        float *head = x + h * a->dim;
        for (int i = 0; i < half; i++) {
            const float low = head[i], high = head[i + half];
            head[i] = low * cos[i] - high * sin[i];
            head[i + half] = high * cos[i + half] + low * sin[i + half];
        }
    }
}

static void place_token(const step *s, int t)
{
    const attention *a = s->a;
    const attention_call *call = s->call;
    const int query_width = a->heads * a->dim, key_width = a->key_heads * a->dim;
    float *q = s->q + (int64_t)t * query_width, *k = s->k + (int64_t)t * key_width;
    const float *v = s->v + (int64_t)t * key_width;
    const float *cos = call->cos + (int64_t)t * a->rotary;
    const float *sin = call->sin + (int64_t)t * a->rotary;
    norm_heads(a->query_norm, a->eps, a->query_norm_width, q, query_width);
    norm_heads(a->key_norm, a->eps, a->key_norm_width, k, key_width);
    turn_heads(a, cos, sin, q, a->heads);
    turn_heads(a, cos, sin, k, a->key_heads);
    for (int i = 0; i < query_width; i++)
        q[i] *= a->scaling;
    const int64_t row = call->rows[call->starts[t + 1] - 1];
    for (int h = 0; h < a->key_heads; h++) {
        const int64_t to = (h * call->pool_rows + row) * a->dim;
        memcpy(call->keys + to, k + h * a->dim, sizeof(float) * (size_t)a->dim);
        memcpy(call->values + to, v + h * a->dim, sizeof(float) * (size_t)a->dim);
    }
}

static void attend_item(void *context, int item)
{
    const attend_call *c = context;
    const int t = item / c->key_heads, h = item % c->key_heads, group = c->heads / c->key_heads;
    const int64_t at = ((int64_t)t * c->heads + h * group) * c->dim;
    const int64_t head = h * c->pool_rows * c->dim;
    const int length = (int)(c->starts[t + 1] - c->starts[t]);
    current_step()->attend(c->q + at, group, c->dim, c->keys + head, c->values + head,
                           c->rows + c->starts[t], length, c->out + at);
}

EXPORT void moestro_attend(const attend_call *call)
{
    const int items = call->count * call->key_heads;
    if (call->starts[call->count] * call->key_heads >= SMALL_SCORES) {
        moestro_pool_run(items, attend_item, (void *)call);
        return;
    }
    for (int item = 0; item < items; item++)
        attend_item((void *)call, item);
}

static void attend_prompt_item(void *context, int item)
{
    const prompt_call *c = context;
    const int part = item / c->key_heads, end = (part + 1) * PROMPT_PART;
    current_step()->attend_prompt(c, item % c->key_heads, part * PROMPT_PART,
                                  end < c->tokens ? end : c->tokens);
}

EXPORT void moestro_attend_prompt(const prompt_call *call)
{
    const int parts = (call->tokens - 1) / PROMPT_PART + 1;
    moestro_pool_run(parts * call->key_heads, attend_prompt_item, (void *)call);
}

static void attend_all(const step *s)
{
    const attention *a = s->a;
    const attention_call *call = s->call;
    const attend_call inner = {
        s->q,     call->keys,      call->values, call->rows, call->starts,
        s->mixed, call->pool_rows, call->count,  a->heads,   a->key_heads,
        a->dim,
    };
    for (int t = 0; t < call->count; t++)
        place_token(s, t);
    moestro_attend(&inner);
}

EXPORT int64_t moestro_attention(const attention *a, const attention_call *call)
{
    const int64_t query_bytes = (int64_t)call->count * a->heads * a->dim * (int64_t)sizeof(float);
    const int64_t key_bytes = (int64_t)call->count * a->key_heads * a->dim * (int64_t)sizeof(float);
    scratch from = {call->scratch, 0};
    step s = {.a = a, .call = call};
    s.q = take(&from, query_bytes);
    s.k = take(&from, key_bytes);
    s.v = take(&from, key_bytes);
    s.mixed = take(&from, query_bytes);
    const int64_t more = linear_bytes(&s);
    uint8_t *rest = take(&from, more);
    if (from.used > call->scratch_bytes)
        return from.used;
    project(&s, rest, more);
    attend_all(&s);
    moestro_linear(&a->output, s.mixed, a->heads * a->dim, call->count, call->out, a->output_bias,
                   rest, more);
    return 0;
}

static void place_item(void *context, int t) { place_token(context, t); }

EXPORT int64_t moestro_place(const attention *a, const attention_call *call)
{
    const int64_t key_bytes = (int64_t)call->count * a->key_heads * a->dim * (int64_t)sizeof(float);
    scratch from = {call->scratch, 0};
    step s = {.a = a, .call = call, .q = call->out};
    s.k = take(&from, key_bytes);
    s.v = take(&from, key_bytes);
    const int64_t more = project(&s, NULL, 0);
    uint8_t *rest = take(&from, more);
    if (from.used > call->scratch_bytes)
        return from.used;
    project(&s, rest, more);
    moestro_pool_run(call->count, place_item, &s);
    return 0;
}

/* Of equals the first. What is no number is never larger. */
static int largest(const float *numbers, int count)
{
    int best = 0;
    for (int i = 1; i < count; i++)
        if (numbers[i] > numbers[best])
            best = i;
    return best;
}

static void route_row(void *context, int row)
{
    const route_call *call = context;
    float *weights = call->room + (int64_t)row * 2 * call->experts, *left = weights + call->experts;
    float *shares = call->shares + (int64_t)row * call->k;
    float *logits = call->logits + (int64_t)row * call->experts;
    const float total =
        current_step()->score(call->x + (int64_t)row * call->inputs, call->matrix, call->bias,
                              call->inputs, call->experts, logits, weights);
    float taken = 0;
    /* by the logits: shares of different ones can be equal */
    memcpy(left, logits, sizeof(float) * (size_t)call->experts);
    for (int j = 0; j < call->k; j++) {
        const int best = largest(left, call->experts);
        call->chosen[(int64_t)row * call->k + j] = best;
        shares[j] = weights[best] / total;
        taken += shares[j];
        left[best] = -INFINITY;
    }
    for (int j = 0; j < call->k && call->normalized; j++)
        shares[j] /= taken;
}

EXPORT void moestro_route(const route_call *call)
{
    if ((int64_t)call->count * call->experts * call->inputs >= SMALL_ROUTING && call->count > 1) {
        moestro_pool_run(call->count, route_row, (void *)call);
        return;
    }
    for (int row = 0; row < call->count; row++)
        route_row((void *)call, row);
}

EXPORT void moestro_normalize(const float *x, const float *weight, float eps, int32_t count,
                              int32_t width, float *out)
{
    for (int64_t row = 0; row < count; row++)
        current_step()->normalize(x + row * width, weight, eps, width, out + row * width);
}
