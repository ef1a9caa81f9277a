/* Which instruction set computes: the best that this processor has, or the one that was forced. */
#include "moestro.h"
#include "step.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static const isa *chosen;
static const step_isa *chosen_step;

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
#endif

/* The best first. */
static const isa *available(int place)
{
    const isa *found[4];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
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
    if (one == &isa_avx512)
        return &step_avx512;
    if (one == &isa_avxvnni)
        return &step_avxvnni;
    if (one == &isa_avx2)
        return &step_avx2;
#endif
    (void)one;
    return &step_plain;
}

static void choose(const isa *one)
{
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
