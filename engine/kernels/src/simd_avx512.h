/* Sixteen lanes in one register: AVX-512 with VNNI. */
#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define ISA isa_avx512
#define ISA_NAME "avx512-vnni"
#define INT8_OFFSET 128 /* what `dot8` takes a stored byte for, beside its weight */
#define MOST_ROWS 8 /* at once, of those that lie as they are */
#define MOST_FLOAT_ROWS 8
#define PANEL 16 /* rows that lie together, */
#define CHUNK 8  /* at once of floats, */
#define INT_CHUNK 8
#define GROUPED 4 /* at once of those whose groups are scaled in registers */
#define STRIPE 2 /* with so many tiles: 16 sums and three registers */
#define DOTS 16   /* rows at once that one row is multiplied with, */
#define COLUMNS 4 /* registers of each row that are added up */
#define ATTEND_ROWS 6  /* of queries at once, */
#define ATTEND_TILES 4 /* with so many registers of keys */
#define CHAINS 4 /* accumulators of a lone row: a dot product waits for the one before */

typedef __m512 fv;
typedef __m512i iv;
typedef __m512i bv; /* 64 bytes: four for each of 16 rows */

INLINE fv fv_set(float x) { return _mm512_set1_ps(x); }
INLINE fv fv_load(const void *p) { return _mm512_loadu_ps(p); }
INLINE void fv_store(float *p, fv x) { _mm512_storeu_ps(p, x); }
INLINE fv fv_add(fv a, fv b) { return _mm512_add_ps(a, b); }
INLINE fv fv_sub(fv a, fv b) { return _mm512_sub_ps(a, b); }
INLINE fv fv_mul(fv a, fv b) { return _mm512_mul_ps(a, b); }
INLINE fv fv_div(fv a, fv b) { return _mm512_div_ps(a, b); }
INLINE fv fv_fma(fv a, fv b, fv c) { return _mm512_fmadd_ps(a, b, c); }
INLINE fv fv_min(fv a, fv b) { return _mm512_min_ps(a, b); }
INLINE fv fv_max(fv a, fv b) { return _mm512_max_ps(a, b); }
INLINE fv fv_abs(fv a) { return _mm512_abs_ps(a); }
INLINE float fv_largest(fv a) { return _mm512_reduce_max_ps(a); }
INLINE float fv_sum(fv a) { return _mm512_reduce_add_ps(a); }
INLINE fv fv_folded(fv x, fv y)
{
    return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
}
/* out[i] = the sum of x[i]'s lanes: pairs of registers are folded into one, four times. */
INLINE void fv_sums(const fv *x, float *out)
{
    fv each[DOTS / 4];
    for (int i = 0; i < DOTS / 4; i++, x += 4)
        each[i] = fv_folded(fv_folded(x[0], x[2]), fv_folded(x[1], x[3]));
    for (int i = 0; i < DOTS / 4; i += 2)
        each[i / 2] = _mm512_add_ps(_mm512_shuffle_f32x4(each[i], each[i + 1], 0x44),
                                    _mm512_shuffle_f32x4(each[i], each[i + 1], 0xee));
    fv_store(out, _mm512_add_ps(_mm512_shuffle_f32x4(each[0], each[1], 0x88),
                                _mm512_shuffle_f32x4(each[0], each[1], 0xdd)));
}
INLINE fv fv_load_bf16(const void *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
INLINE fv fv_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }

INLINE iv iv_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE iv iv_add(iv a, iv b) { return _mm512_add_epi32(a, b); }
INLINE iv iv_mul(iv a, iv b) { return _mm512_mullo_epi32(a, b); }
INLINE iv iv_load_u8(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
INLINE iv iv_round(fv a) { return _mm512_cvtps_epi32(a); }
INLINE fv fv_of(iv a) { return _mm512_cvtepi32_ps(a); }
INLINE fv fv_bits(iv a) { return _mm512_castsi512_ps(a); }
INLINE int32_t iv_sum(iv a) { return _mm512_reduce_add_epi32(a); }
INLINE void iv_store_i8(int8_t *p, iv a) { _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8(a)); }
INLINE iv iv_left(iv a, int bits) { return _mm512_slli_epi32(a, bits); }

INLINE bv bv_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE iv iv_load(const void *p) { return bv_load(p); }
INLINE bv bv_low(bv a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE bv bv_high(bv a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
INLINE bv bv_look_up(bv nibbles, const uint8_t table[16])
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)), nibbles);
}
/* Two bf16 or fp16 of each row: the even inputs, and the odd ones. */
INLINE fv bv_even_bf16(bv a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
INLINE fv bv_odd_bf16(bv a)
{
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000u)));
}
INLINE fv bv_even_f16(bv a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
INLINE fv bv_odd_f16(bv a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))); }
/* Byte j of each row as fp8 e4m3, without its sign-and-exponent's bias: times 2^-120. */
INLINE fv bv_fp8(bv a, int j)
{
    const iv b = _mm512_srli_epi32(a, 8 * j);
    const iv sign = _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x80)), 24);
    const iv rest = _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x7f)), 20);
    return _mm512_castsi512_ps(_mm512_or_si512(sign, rest));
}

INLINE iv broadcast4(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}
/* a[r] += sum over j < 4 of w[r][j] * x[j]: bytes of int8 with their offset, or of 0..127. */
INLINE iv dot8(iv a, bv w, const int8_t *x) { return _mm512_dpbusd_epi32(a, w, broadcast4(x)); }
INLINE iv dot7(iv a, bv w, const int8_t *x) { return _mm512_dpbusd_epi32(a, w, broadcast4(x)); }
INLINE bv bv_word(const uint8_t *x) { return broadcast4((const int8_t *)x); }
INLINE iv iv_word(const uint8_t *x) { return bv_word(x); }
INLINE fv fv_word(const uint8_t *x) { return fv_bits(bv_word(x)); }
INLINE iv dot_words(iv a, bv w, bv x) { return _mm512_dpbusd_epi32(a, w, x); }
INLINE void bv_store(uint8_t *to, bv x) { _mm512_storeu_si512(to, x); }
INLINE void fetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
