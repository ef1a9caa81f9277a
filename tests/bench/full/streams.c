// Reads memory and does next to nothing with it: the ceiling of whatever reads weights.
// `bytes` is cut into `streams` parts that are read side by side, a cache line of each in turn.
// A multiple of 64 * 8 bytes per part; `ahead` bytes are prefetched (0: the processor alone does).
#include <stddef.h>
#include <stdint.h>

typedef uint64_t line __attribute__((vector_size(64), aligned(64)));

#define LINES 8 // of one stream, before the next stream's

static uint64_t total(line sum)
{
    uint64_t all = 0;
    for (int i = 0; i < 8; i++)
        all += sum[i];
    return all;
}

#define READ(name, STREAMS)                                                       \
    static uint64_t name(const line *from, size_t lines, size_t ahead)            \
    {                                                                             \
        line sums[STREAMS][2] = {{{0}}};                                          \
        const size_t part = lines / STREAMS;                                      \
        for (size_t at = 0; at + LINES <= part; at += LINES)                      \
            for (int s = 0; s < STREAMS; s++) {                                   \
                const line *here = from + s * part + at;                          \
                for (int i = 0; i < LINES; i++) {                                 \
                    if (ahead)                                                    \
                        __builtin_prefetch((const char *)(here + i) + ahead);     \
                    sums[s][i & 1] ^= here[i];                                    \
                }                                                                 \
            }                                                                     \
        line all = {0};                                                           \
        for (int s = 0; s < STREAMS; s++)                                         \
            all ^= sums[s][0] ^ sums[s][1];                                       \
        return total(all);                                                        \
    }

READ(read_one, 1)
READ(read_two, 2)
READ(read_four, 4)

uint64_t read_streams(const void *from, size_t bytes, int streams, size_t ahead)
{
    const size_t lines = bytes / sizeof(line);
    if (streams == 4)
        return read_four(from, lines, ahead);
    if (streams == 2)
        return read_two(from, lines, ahead);
    return read_one(from, lines, ahead);
}
