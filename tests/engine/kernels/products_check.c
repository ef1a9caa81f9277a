/* Products over odd shapes, every buffer as large as it must be and no larger: for sanitizers.

   products_check NAME...: instruction sets. Each row's result must be the same bits alone and in
   company, and near what the portable set says. Prints what differs and returns 1. */
#include "calls.h"
#include "gemm.h"
#include "step.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int moestro_choose(const char *name);

enum { MOST_COUNT = 37, EXPERTS = 3, MOST_NUMBERS = 2 * MOST_COUNT * 64 };

typedef struct {
    int format, group, scale_type, zero_kind;
} form;

static const form FORMS[] = {
    {F32, 0, SCALE_F32, ZERO_NONE},     {BF16, 0, SCALE_F32, ZERO_NONE},
    {F16, 0, SCALE_F32, ZERO_NONE},     {FP8, 32, SCALE_F32, ZERO_NONE},
    {INT8, 0, SCALE_F32, ZERO_NONE},    {INT8, 32, SCALE_BF16, ZERO_NONE},
    {INT4, 32, SCALE_F16, ZERO_NONE},   {INT4, 64, SCALE_F16, ZERO_FLOAT},
    {INT4, 0, SCALE_F32, ZERO_INTEGER}, {MXFP4, 32, SCALE_F32, ZERO_NONE},
};
static const int SHAPES[][2] = {{5, 40}, {33, 96}, {48, 321}};
static const int COUNTS[] = {1, 2, 5, 17, MOST_COUNT};
static int failures;

#define LENGTH(array) (int)(sizeof(array) / sizeof *(array))

static void *get(size_t bytes)
{
    void *found = malloc(bytes ? bytes : 1);
    if (!found)
        exit(2);
    return found;
}

static int round_up(int count, int unit) { return (count + unit - 1) / unit * unit; }

/* Bytes that are small finite numbers in every format, at an odd address, up to the block's end. */
static uint8_t *weights(size_t bytes, void **block)
{
    static uint32_t seed = 1;
    uint8_t *at = (uint8_t *)(*block = get(bytes + 1)) + 1;
    for (size_t i = 0; i < bytes; i++) {
        seed = seed * 1664525u + 1013904223u;
        at[i] = (uint8_t)(0x30 + (seed >> 28));
    }
    return at;
}

/* A matrix in tiles as layout.py draws them. Its block is to be freed. */
static matrix make(const form *f, int outputs, int inputs, void **block)
{
    static const int LINE[] = {1, 2, 2, 4, 4, 8, 8};
    const int unit = f->format == INT8 || f->format == INT4 ? 32 : LINE[f->format];
    const int padded = round_up(inputs, f->format != INT8 && f->group ? f->group : unit);
    const int group = f->format != INT8 && f->group ? f->group : padded;
    const int scales = TILE * (f->scale_type == SCALE_F32 ? 4 : 2);
    int after = f->format < FP8 ? 0 : f->format == MXFP4 ? TILE : scales;
    if (f->format == INT4)
        after += f->zero_kind == ZERO_FLOAT ? scales : f->zero_kind == ZERO_INTEGER ? TILE : 0;
    const int groups = f->format == INT8 ? 1 : padded / group;
    matrix m = {.outputs = outputs, .inputs = inputs, .padded = padded, .format = f->format};
    m.tile_bytes = padded / LINE[f->format] * 4 * TILE + groups * after;
    m.group = group, m.scale_type = f->scale_type, m.zero_kind = f->zero_kind;
    m.row_group = f->format < INT8 ? 0 : f->format == INT8 && f->group ? f->group : group;
    m.tiles = weights((size_t)m.tile_bytes * (size_t)(round_up(outputs, TILE) / TILE), block);
    return m;
}

static float *numbers(int count)
{
    float *found = get((size_t)count * sizeof(float));
    for (int i = 0; i < count; i++)
        found[i] = sinf((float)i * 0.7f) * (float)(1 + i % 3);
    return found;
}

static uint8_t *scratch_of(int64_t bytes)
{
    uint8_t *found = aligned_alloc(64, (size_t)bytes);
    if (!found)
        exit(2);
    return found;
}

static void multiply(const matrix *m, const float *x, int count, float *out, const float *bias)
{
    const int64_t bytes = moestro_linear(m, x, m->inputs, count, out, bias, NULL, 0);
    uint8_t *scratch = scratch_of(bytes);
    moestro_linear(m, x, m->inputs, count, out, bias, scratch, bytes);
    free(scratch);
}

static void compare(const char *what, int number, const float *found, const float *wanted,
                    int count, float tolerance)
{
    float largest = 0;
    for (int i = 0; i < count; i++)
        largest = fmaxf(largest, fabsf(wanted[i]));
    for (int i = 0; i < count; i++)
        if (!(fabsf(found[i] - wanted[i]) <= tolerance * largest)) {
            printf("%s, form %d: %g at %d, not %g\n", what, number, (double)found[i], i,
                   (double)wanted[i]);
            failures++;
            return;
        }
}

static int32_t sum_up(const int8_t *rows, const int8_t *weights, int32_t *sums, int32_t count,
                      int32_t outputs, int32_t inputs)
{
    for (int r = 0; r < count; r++)
        for (int n = 0; n < outputs; n++) {
            sums[r * outputs + n] = 0;
            for (int k = 0; k < inputs; k++)
                sums[r * outputs + n] += rows[r * inputs + k] * weights[n * inputs + k];
        }
    return 1;
}

static int32_t refuse(const int8_t *rows, const int8_t *weights, int32_t *sums, int32_t count,
                      int32_t outputs, int32_t inputs)
{
    (void)rows, (void)weights, (void)sums, (void)count, (void)outputs, (void)inputs;
    return 0;
}

static void check_linear(const char *name, int number, int outputs, int inputs)
{
    void *block;
    int32_t *order = get((size_t)inputs * sizeof *order);
    for (int i = 0; i < inputs; i++)
        order[i] = inputs - 1 - i;
    matrix m = make(&FORMS[number], outputs, inputs, &block);
    m.order = number % 3 == 1 ? order : NULL;
    float *bias = numbers(outputs), *plain = get((size_t)(MOST_COUNT * outputs) * sizeof(float));
    float *alone = get((size_t)(MOST_COUNT * outputs) * sizeof(float));
    float *all = numbers(MOST_COUNT * inputs);
    moestro_choose("plain");
    multiply(&m, all, MOST_COUNT, plain, bias);
    moestro_choose(name);
    for (int row = 0; row < MOST_COUNT; row++)
        multiply(&m, all + row * inputs, 1, alone + row * outputs, bias);
    compare("beside the portable set", number, alone, plain, MOST_COUNT * outputs, 1e-5f);
    for (int i = 0; i < LENGTH(COUNTS); i++) {
        float *x = get((size_t)(COUNTS[i] * inputs) * sizeof(float));
        float *out = get((size_t)(COUNTS[i] * outputs) * sizeof(float));
        memcpy(x, all, (size_t)(COUNTS[i] * inputs) * sizeof(float));
        multiply(&m, x, COUNTS[i], out, bias);
        compare("in company", number, out, alone, COUNTS[i] * outputs, 0);
        for (int refused = 0; refused < 2 && m.format == INT8; refused++) {
            memset(out, 0, (size_t)(COUNTS[i] * outputs) * sizeof(float));
            moestro_use_gemm(refused ? refuse : sum_up, 2);
            multiply(&m, x, COUNTS[i], out, bias);
            moestro_use_gemm(NULL, 0);
            compare("by a gemm", number, out, alone, COUNTS[i] * outputs, 0);
        }
        free(x), free(out);
    }
    free(block), free(order), free(bias), free(plain), free(alone), free(all);
}

static void run_experts(expert_call *call)
{
    call->scratch_bytes = 0;
    const int64_t bytes = moestro_experts(call);
    call->scratch = scratch_of(bytes);
    call->scratch_bytes = bytes;
    moestro_experts(call);
    free(call->scratch);
}

/* Expert e takes `count` rows, the middle one none: together, then every row alone. */
static void check_experts(int number, int count)
{
    enum { INPUTS = 70, WIDTH = 33, OUTPUTS = 20 };
    void *blocks[2 * EXPERTS];
    expert each[EXPERTS] = {{.first_bias = NULL}};
    const expert *pointers[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) {
        const form *first = &FORMS[(number + e) % LENGTH(FORMS)];
        each[e].first = make(first, 2 * WIDTH, INPUTS, &blocks[2 * e]);
        each[e].down = make(&FORMS[number], OUTPUTS, WIDTH, &blocks[2 * e + 1]);
        pointers[e] = &each[e];
    }
    int32_t starts[EXPERTS + 1] = {0, count, count, 2 * count};
    int32_t *tokens = get((size_t)(2 * count) * sizeof *tokens);
    int32_t *places = get((size_t)(2 * count) * sizeof *places);
    for (int row = 0; row < 2 * count; row++)
        tokens[row] = row % count, places[row] = 2 * count - 1 - row;
    float *hidden = numbers(count * INPUTS);
    float *results = get((size_t)(2 * count * OUTPUTS) * sizeof(float)), alone[OUTPUTS];
    expert_call call = {.experts = pointers, .starts = starts, .tokens = tokens, .places = places};
    call.hidden = hidden, call.results = results, call.count = EXPERTS;
    call.hidden_rows = count, call.inputs = INPUTS, call.outputs = OUTPUTS;
    run_experts(&call);
    for (int row = 0; row < 2 * count; row++) {
        const int32_t one[2] = {0, 1}, zero = 0;
        const expert *own = &each[row < count ? 0 : 2];
        expert_call single = {.experts = &own, .starts = one, .tokens = &zero, .places = &zero};
        single.hidden = hidden + row % count * INPUTS, single.results = alone, single.count = 1;
        single.hidden_rows = 1, single.inputs = INPUTS, single.outputs = OUTPUTS;
        run_experts(&single);
        compare("experts", number, results + places[row] * OUTPUTS, alone, OUTPUTS, 0);
        const int32_t token = row % count;
        single.hidden = hidden, single.hidden_rows = count, single.tokens = &token;
        run_experts(&single);
        compare("one of many", number, results + places[row] * OUTPUTS, alone, OUTPUTS, 0);
    }
    free(tokens), free(places), free(hidden), free(results);
    for (int i = 0; i < 2 * EXPERTS; i++)
        free(blocks[i]);
}

/* Tokens of a prompt in one call, and cut in two. */
static void check_prompt(int tokens, int length)
{
    enum { HEADS = 4, KEY_HEADS = 2, DIM = 32, VALUE_DIM = 48, WIDTH = HEADS * VALUE_DIM };
    float *q = numbers(tokens * HEADS * DIM), *keys = numbers(KEY_HEADS * length * DIM);
    float *values = numbers(KEY_HEADS * length * VALUE_DIM);
    float *whole = get((size_t)(tokens * WIDTH) * sizeof(float));
    float *parts = get((size_t)(tokens * WIDTH) * sizeof(float));
    float *states = get((size_t)(tokens * HEADS * 2) * sizeof(float));
    prompt_call call = {.q = q, .keys = keys, .values = values, .out = whole, .states = states};
    call.q_head = DIM, call.q_token = HEADS * DIM, call.key_head = length * DIM;
    call.key_token = DIM, call.value_head = length * VALUE_DIM, call.value_token = VALUE_DIM;
    call.tokens = tokens, call.length = length, call.heads = HEADS, call.key_heads = KEY_HEADS;
    call.dim = DIM, call.value_dim = VALUE_DIM, call.scaling = 0.2f;
    moestro_attend_prompt(&call);
    const int first = tokens / 3;
    call.out = parts, call.tokens = first, call.length = length - tokens + first;
    if (first)
        moestro_attend_prompt(&call);
    call.out = parts + first * WIDTH, call.q = q + first * HEADS * DIM;
    call.tokens = tokens - first, call.length = length;
    moestro_attend_prompt(&call);
    compare("prompt", tokens, whole, parts, tokens * WIDTH, 0);
    free(q), free(keys), free(values), free(whole), free(parts), free(states);
}

int main(int count, char **names)
{
    for (int i = 1; i < count; i++) {
        if (moestro_choose(names[i])) {
            printf("%s: not here\n", names[i]);
            return 3;
        }
        for (int number = 0; number < LENGTH(FORMS); number++) {
            for (int shape = 0; shape < LENGTH(SHAPES); shape++)
                check_linear(names[i], number, SHAPES[shape][0], SHAPES[shape][1]);
            for (int k = 0; k < LENGTH(COUNTS); k++)
                check_experts(number, COUNTS[k]);
        }
        for (int k = 0; k < LENGTH(COUNTS); k++)
            check_prompt(COUNTS[k], COUNTS[k] + 125 * k);
    }
    return failures ? 1 : 0;
}
