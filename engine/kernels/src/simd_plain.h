/* Sixteen lanes for any processor, in the vectors of gcc and clang: what there is of registers. */
#include <math.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* everything that takes such vectors is inlined */
#endif

#define INLINE static inline __attribute__((always_inline))
#define INT8_OFFSET 0
#define MOST_ROWS 2 /* at once, */
#define MOST_FLOAT_ROWS 2
#define CHAINS 1
#define DOTS 2
#define COLUMNS 1
#define ATTEND_ROWS 2  /* of queries at once, */
#define ATTEND_TILES 1 /* with so many registers of keys */

typedef float fv __attribute__((vector_size(64)));
typedef int32_t iv __attribute__((vector_size(64)));
typedef uint32_t bv __attribute__((vector_size(64))); /* four bytes of each row */
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef int8_t small __attribute__((vector_size(16)));

/* Little-endian, as the stored bytes are. */
#define LOAD(type, name)                                                                           \
    INLINE type name(const void *p)                                                                \
    {                                                                                              \
        type x;                                                                                    \
        memcpy(&x, p, sizeof x);                                                                   \
        return x;                                                                                  \
    }
LOAD(fv, fv_load)
LOAD(iv, iv_load)
LOAD(bv, bv_load)
LOAD(halves, load_halves)
LOAD(bytes, load_bytes)

INLINE fv fv_set(float x) { return x - (fv){0}; }
INLINE iv iv_set(int32_t x) { return x - (iv){0}; }
INLINE fv fv_bits(iv x) { return (fv)x; }
INLINE fv fv_of(iv x) { return __builtin_convertvector(x, fv); }
INLINE void fv_store(float *p, fv x) { memcpy(p, &x, sizeof x); }
INLINE fv fv_add(fv x, fv y) { return x + y; }
INLINE fv fv_sub(fv x, fv y) { return x - y; }
INLINE fv fv_mul(fv x, fv y) { return x * y; }
INLINE fv fv_div(fv x, fv y) { return x / y; }
INLINE fv fv_fma(fv x, fv y, fv z) { return x * y + z; }
INLINE fv fv_pick(iv mask, fv x, fv y) { return (fv)((mask & (iv)x) | (~mask & (iv)y)); }
INLINE fv fv_min(fv x, fv y) { return fv_pick(x < y, x, y); }
INLINE fv fv_max(fv x, fv y) { return fv_pick(x > y, x, y); }
INLINE fv fv_abs(fv x) { return (fv)((iv)x & 0x7fffffff); }
INLINE float fv_largest(fv x)
{
    float found = x[0];
    for (int i = 1; i < TILE; i++)
        found = x[i] > found ? x[i] : found;
    return found;
}
INLINE float fv_sum(fv x)
{
    float found = 0;
    for (int i = 0; i < TILE; i++)
        found += x[i];
    return found;
}
INLINE void fv_sums(const fv *x, float *out)
{
    for (int i = 0; i < DOTS; i++)
        out[i] = fv_sum(x[i]);
}
/* fp16 in the low halves of lanes, widened: exponents are shifted, those of all ones stay so. */
INLINE fv fv_widened(bv h)
{
    const bv sign = (h & 0x8000) << 16, rest = (h & 0x7fff) << 13;
    const bv finite = (bv)((fv)rest * 0x1p112f), strange = rest | 0x7f800000;
    const bv is_strange = (bv)(rest >= (0x7c00u << 13));
    return (fv)(sign | (is_strange & strange) | (~is_strange & finite));
}
INLINE fv fv_load_bf16(const void *p)
{
    return (fv)(__builtin_convertvector(load_halves(p), bv) << 16);
}
INLINE fv fv_load_f16(const void *p)
{
    return fv_widened(__builtin_convertvector(load_halves(p), bv));
}

INLINE iv iv_add(iv x, iv y) { return x + y; }
INLINE iv iv_mul(iv x, iv y) { return x * y; }
INLINE iv iv_load_u8(const void *p) { return __builtin_convertvector(load_bytes(p), iv); }
/* To even, by the bits: 1.5 * 2^23 beside a number of less than 2^22 leaves no place for others. */
INLINE iv iv_round(fv x)
{
    const fv magic = fv_set(0x1.8p23f);
    return (iv)(x + magic) - (iv)magic;
}
INLINE int32_t iv_sum(iv x)
{
    int32_t found = 0;
    for (int i = 0; i < TILE; i++)
        found += x[i];
    return found;
}
INLINE void iv_store_i8(int8_t *p, iv x)
{
    const small narrow = __builtin_convertvector(x, small);
    memcpy(p, &narrow, sizeof narrow);
}
INLINE iv iv_left(iv x, int bits) { return (iv)((bv)x << bits); }

INLINE bv bv_low(bv x) { return x & 0x0f0f0f0f; }
INLINE bv bv_high(bv x) { return x >> 4 & 0x0f0f0f0f; }
INLINE bv bv_look_up(bv x, const uint8_t table[16])
{
    uint8_t each[4 * TILE];
    memcpy(each, &x, sizeof each);
    for (int i = 0; i < 4 * TILE; i++)
        each[i] = table[each[i]];
    return bv_load(each);
}
INLINE fv bv_even_bf16(bv x) { return (fv)(x << 16); }
INLINE fv bv_odd_bf16(bv x) { return (fv)(x & 0xffff0000); }
INLINE fv bv_even_f16(bv x) { return fv_widened(x & 0xffff); }
INLINE fv bv_odd_f16(bv x) { return fv_widened(x >> 16); }
INLINE fv bv_fp8(bv x, int j)
{
    const bv b = x >> (8 * j);
    return (fv)((b & 0x80) << 24 | (b & 0x7f) << 20);
}
INLINE iv dot7(iv a, bv w, const int8_t *x)
{
    for (int j = 0; j < 4; j++)
        a += (iv)(w >> (8 * j) & 0xff) * (int32_t)x[j];
    return a;
}
INLINE iv dot8(iv a, bv w, const int8_t *x)
{
    for (int j = 0; j < 4; j++)
        a += ((iv)(w >> (8 * j) & 0xff) - 128) * (int32_t)x[j];
    return a;
}
INLINE void fetch(const uint8_t *p) { (void)p; }
