/* Lone matrices, and several that read the same rows. */
#include "batch.h"
#include "calls.h"

#define EXPORT __attribute__((visibility("default")))

static void linears(const linear_part *parts, int32_t parts_count, const float *x, int64_t stride,
                    int32_t count, scratch *from)
{
    product *each = take(from, parts_count * (int64_t)sizeof(product));
    preparation *forms = take(from, parts_count * (int64_t)sizeof(preparation));
    float **out = take(from, (int64_t)parts_count * count * (int64_t)sizeof(float *));
    const int32_t *own = count_up(count, from);
    int known = 0;
    for (int i = 0; i < parts_count; i++) {
        const matrix *m = parts[i].m;
        rows prepared = {.floats = x, .stride = stride, .padded = m->padded};
        const int direct = !m->row_group && !m->order && m->padded == m->inputs;
        /* without memory each is counted: more than is needed, never less */
        const preparation *found = forms ? same_form(forms, known, m) : NULL;
        if (found)
            prepared = found->into;
        else if (!direct)
            prepared = room_for(m, count, from);
        if (forms && !found && !direct)
            forms[known++] =
                (preparation){prepared, x, NULL, m->order, stride, count, m->inputs, 0};
        product one = {.m = m, .x = prepared, .which = own, .bias = parts[i].bias, .count = count};
        take_panels(&one, from);
        if (!each)
            continue;
        float **mine = out + (int64_t)i * count;
        for (int row = 0; row < count; row++)
            mine[row] = parts[i].out + (int64_t)row * m->outputs;
        one.out = mine;
        each[i] = one;
    }
    if (!each)
        return;
    prepare(forms, known);
    multiply_all(each, parts_count);
}

int64_t moestro_linears(const linear_part *parts, int32_t parts_count, const float *x,
                        int64_t stride, int32_t count, uint8_t *given, int64_t given_bytes)
{
    scratch needed = {NULL, 0}, from = {given, 0};
    linears(parts, parts_count, x, stride, count, &needed);
    if (needed.used > given_bytes)
        return needed.used;
    linears(parts, parts_count, x, stride, count, &from);
    return 0;
}

/* x fp32 [count, stride] times m -> out [count, outputs], plus bias where there is one. */
EXPORT int64_t moestro_linear(const matrix *m, const float *x, int64_t stride, int32_t count,
                              float *out, const float *bias, uint8_t *given, int64_t given_bytes)
{
    const linear_part one = {m, bias, out};
    return moestro_linears(&one, 1, x, stride, count, given, given_bytes);
}
