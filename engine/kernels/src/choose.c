/* Which instruction set computes: the best that this processor has, or the one that was forced. */
#define _DEFAULT_SOURCE /* syscall */
#include "moestro.h"
#include "step.h"

#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT __attribute__((visibility("default")))

static const isa *chosen;
static const step_isa *chosen_step;
int fetches_ahead = 1;

#if defined(__x86_64__)
static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

static int has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

/* The processor's, and the system's leave for this process to use its large registers. */
static int has_amx(void)
{
#if defined(__linux__)
    enum { TILE_BIT = 1 << 24, INT8_BIT = 1 << 25, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE_BIT) &&
           (d & INT8_BIT) && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
    return 0;
#endif
}
#endif

/* The best first. */
static const isa *available(int place)
{
    const isa *found[5];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (has_amx())
        found[count++] = &isa_amx;
    if (has_avx512())
        found[count++] = &isa_avx512;
    if (has_avx2() && __builtin_cpu_supports("avxvnni"))
        found[count++] = &isa_avxvnni;
    if (has_avx2())
        found[count++] = &isa_avx2;
#endif
    found[count++] = &isa_plain;
    return place < count ? found[place] : NULL;
}

static const step_isa *step_of(const isa *one)
{
#if defined(__x86_64__)
    if (one == &isa_avx512 || one == &isa_amx)
        return &step_avx512;
    if (one == &isa_avxvnni)
        return &step_avxvnni;
    if (one == &isa_avx2)
        return &step_avx2;
#endif
    (void)one;
    return &step_plain;
}

static int likes_fetching(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return !__builtin_cpu_is("amd");
#else
    return 1;
#endif
}

static void choose(const isa *one)
{
    fetches_ahead = likes_fetching();
    chosen_step = step_of(one);
    chosen = one;
}

const isa *current_isa(void)
{
    if (!chosen)
        choose(available(0));
    return chosen;
}

const step_isa *current_step(void)
{
    if (!chosen_step)
        choose(available(0));
    return chosen_step;
}

/* The name of the instruction set number `place` that this processor has, the best first. */
EXPORT const char *moestro_available(int place)
{
    const isa *found = available(place);
    return found ? found->name : NULL;
}

EXPORT const char *moestro_chosen(void) { return current_isa()->name; }

/* Compute with the one of this name from now on. 0, or -1 where this processor has none. */
EXPORT int moestro_choose(const char *name)
{
    const isa *found;
    for (int place = 0; (found = available(place)); place++)
        if (!strcmp(found->name, name)) {
            choose(found);
            return 0;
        }
    return -1;
}

/* Ask for lines ahead (1) or not (0) from now on; below 0 as this processor likes it. */
EXPORT void moestro_fetch_ahead(int whether)
{
    current_isa(); /* which decides, the first time */
    fetches_ahead = whether < 0 ? likes_fetching() : whether;
}
