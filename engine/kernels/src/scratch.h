/* A bounded piece of the caller's memory, dealt out in cache lines. */
#ifndef MOESTRO_SCRATCH_H
#define MOESTRO_SCRATCH_H

#include <stdint.h>

enum { LINE_BYTES = 64 };

typedef struct {
    uint8_t *start;
    int64_t used; /* also beyond the end, so that it says what would be needed */
} scratch;

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* NULL where nothing is dealt out but counted. */
static inline void *take(scratch *from, int64_t bytes)
{
    const int64_t at = from->used;
    from->used += (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
    return from->start ? from->start + at : 0;
}

#endif
