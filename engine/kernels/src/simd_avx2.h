/* Sixteen lanes in two registers: AVX2, with the dot products of AVX-VNNI where VNNI is defined. */
#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef VNNI
#define ISA isa_avxvnni
#define ISA_NAME "avx-vnni"
#define INT8_OFFSET 128
#define INT_CHUNK 6
#else
#define ISA isa_avx2
#define ISA_NAME "avx2"
#define INT8_OFFSET 0
#define INT_CHUNK 4
#define DEEP 4 /* lines whose products are summed in 16 bits: at most 4 * 2 * 24 * 127 */
#endif
#define MOST_ROWS 4
#define MOST_FLOAT_ROWS 2
#define PANEL 12
#define CHUNK 6 /* 12 sums, and two registers of weights */
#define STRIPE 1
#define CHAINS 4
#define DOTS 4
#define COLUMNS 2
#define ATTEND_ROWS 6  /* of queries at once, */
#define ATTEND_TILES 1 /* with so many registers of keys */

typedef struct {
    __m256 a, b;
} fv;
typedef struct {
    __m256i a, b;
} iv;
typedef iv bv;

#define EACH(type, expression_a, expression_b) return (type){expression_a, expression_b}

INLINE fv fv_set(float x) { EACH(fv, _mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE fv fv_load(const void *p)
{
    EACH(fv, _mm256_loadu_ps(p), _mm256_loadu_ps((const float *)p + 8));
}
INLINE void fv_store(float *p, fv x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE fv fv_add(fv x, fv y) { EACH(fv, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
INLINE fv fv_sub(fv x, fv y) { EACH(fv, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
INLINE fv fv_mul(fv x, fv y) { EACH(fv, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE fv fv_div(fv x, fv y) { EACH(fv, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
INLINE fv fv_fma(fv x, fv y, fv z)
{
    EACH(fv, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
INLINE fv fv_min(fv x, fv y) { EACH(fv, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
INLINE fv fv_max(fv x, fv y) { EACH(fv, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
INLINE fv fv_abs(fv x)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    EACH(fv, _mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b));
}
INLINE float fv_largest(fv x)
{
    const __m256 m = _mm256_max_ps(x.a, x.b);
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
INLINE float fv_sum(fv x)
{
    const __m256 m = _mm256_add_ps(x.a, x.b);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
INLINE void fv_sums(const fv *x, float *out)
{
    for (int i = 0; i < DOTS; i++)
        out[i] = fv_sum(x[i]);
}
INLINE __m256 half_bf16(const void *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
INLINE fv fv_load_bf16(const void *p) { EACH(fv, half_bf16(p), half_bf16((const char *)p + 16)); }
INLINE fv fv_load_f16(const void *p)
{
    EACH(fv, _mm256_cvtph_ps(_mm_loadu_si128(p)),
         _mm256_cvtph_ps(_mm_loadu_si128((const void *)((const char *)p + 16))));
}

INLINE iv iv_set(int32_t x) { EACH(iv, _mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE iv iv_add(iv x, iv y) { EACH(iv, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
INLINE iv iv_mul(iv x, iv y)
{
    EACH(iv, _mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b));
}
INLINE iv iv_load_u8(const void *p)
{
    EACH(iv, _mm256_cvtepu8_epi32(_mm_loadl_epi64(p)),
         _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)((const char *)p + 8))));
}
INLINE iv iv_round(fv x) { EACH(iv, _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
INLINE fv fv_of(iv x) { EACH(fv, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
INLINE fv fv_bits(iv x) { EACH(fv, _mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)); }
INLINE int32_t iv_sum(iv x)
{
    const __m256i m = _mm256_add_epi32(x.a, x.b);
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
}
INLINE void iv_store_i8(int8_t *p, iv x)
{
    const __m256i mixed = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    const __m128i low = _mm256_castsi256_si128(mixed), high = _mm256_extracti128_si256(mixed, 1);
    _mm_storeu_si128((void *)p, _mm_packs_epi16(low, high));
}
INLINE iv iv_left(iv x, int bits)
{
    EACH(iv, _mm256_slli_epi32(x.a, bits), _mm256_slli_epi32(x.b, bits));
}

INLINE bv bv_load(const void *p)
{
    EACH(bv, _mm256_loadu_si256(p), _mm256_loadu_si256((const void *)((const char *)p + 32)));
}
INLINE iv iv_load(const void *p) { return bv_load(p); }
INLINE bv bv_low(bv x)
{
    const __m256i mask = _mm256_set1_epi8(15);
    EACH(bv, _mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
}
INLINE bv bv_high(bv x)
{
    const __m256i mask = _mm256_set1_epi8(15);
    EACH(bv, _mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask),
         _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask));
}
INLINE bv bv_look_up(bv x, const uint8_t table[16])
{
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
    EACH(bv, _mm256_shuffle_epi8(both, x.a), _mm256_shuffle_epi8(both, x.b));
}
INLINE fv bv_even_bf16(bv x) { return fv_bits(iv_left(x, 16)); }
INLINE fv bv_odd_bf16(bv x)
{
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
    EACH(fv, _mm256_castsi256_ps(_mm256_and_si256(x.a, mask)),
         _mm256_castsi256_ps(_mm256_and_si256(x.b, mask)));
}
/* The low halves of eight lanes, widened. */
INLINE __m256 even_f16(__m256i x)
{
    const __m256i keep = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(keep, keep), 0xd8);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
INLINE fv bv_even_f16(bv x) { EACH(fv, even_f16(x.a), even_f16(x.b)); }
INLINE fv bv_odd_f16(bv x)
{
    EACH(fv, even_f16(_mm256_srli_epi32(x.a, 16)), even_f16(_mm256_srli_epi32(x.b, 16)));
}
INLINE __m256 half_fp8(__m256i x, int j)
{
    const __m256i b = _mm256_srli_epi32(x, 8 * j);
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(b, _mm256_set1_epi32(0x80)), 24);
    const __m256i rest = _mm256_slli_epi32(_mm256_and_si256(b, _mm256_set1_epi32(0x7f)), 20);
    return _mm256_castsi256_ps(_mm256_or_si256(sign, rest));
}
INLINE fv bv_fp8(bv x, int j) { EACH(fv, half_fp8(x.a, j), half_fp8(x.b, j)); }

INLINE __m256i broadcast4(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
#ifdef VNNI
INLINE iv dot7(iv a, bv w, const int8_t *x)
{
    const __m256i four = broadcast4(x);
    EACH(iv, _mm256_dpbusd_avx_epi32(a.a, w.a, four), _mm256_dpbusd_avx_epi32(a.b, w.b, four));
}
INLINE iv dot8(iv a, bv w, const int8_t *x) { return dot7(a, w, x); }
#else
/* Two products of at most 127 * 127 fit into the 16 bits that saturate. */
INLINE __m256i half_dot7(__m256i a, __m256i w, __m256i four)
{
    const __m256i pairs = _mm256_maddubs_epi16(w, four);
    return _mm256_add_epi32(a, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE iv dot7(iv a, bv w, const int8_t *x)
{
    const __m256i four = broadcast4(x);
    EACH(iv, half_dot7(a.a, w.a, four), half_dot7(a.b, w.b, four));
}
/* Bytes of 0..255 would pass them: the offset is taken off, and the sign goes over to x. */
INLINE __m256i half_dot8(__m256i a, __m256i w, __m256i four)
{
    const __m256i weight = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
    return half_dot7(a, _mm256_abs_epi8(weight), _mm256_sign_epi8(four, weight));
}
INLINE iv dot8(iv a, bv w, const int8_t *x)
{
    const __m256i four = broadcast4(x);
    EACH(iv, half_dot8(a.a, w.a, four), half_dot8(a.b, w.b, four));
}
#endif
INLINE bv bv_word(const uint8_t *x)
{
    const __m256i word = broadcast4((const int8_t *)x);
    EACH(bv, word, word);
}
INLINE iv iv_word(const uint8_t *x) { return bv_word(x); }
INLINE fv fv_word(const uint8_t *x) { return fv_bits(bv_word(x)); }
INLINE void bv_store(uint8_t *to, bv x)
{
    _mm256_storeu_si256((void *)to, x.a);
    _mm256_storeu_si256((void *)(to + 32), x.b);
}
#ifdef VNNI
INLINE iv dot_words(iv a, bv w, bv x)
{
    EACH(iv, _mm256_dpbusd_avx_epi32(a.a, w.a, x.a), _mm256_dpbusd_avx_epi32(a.b, w.b, x.b));
}
#else
INLINE iv dot_words(iv a, bv w, bv x)
{
    EACH(iv, half_dot8(a.a, w.a, x.a), half_dot8(a.b, w.b, x.b));
}
INLINE iv pairs7(bv w, bv x)
{
    EACH(iv, _mm256_maddubs_epi16(w.a, x.a), _mm256_maddubs_epi16(w.b, x.b));
}
INLINE iv add_halves(iv x, iv y)
{
    EACH(iv, _mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b));
}
INLINE iv add_pairs(iv a, iv halves)
{
    const __m256i one = _mm256_set1_epi16(1);
    EACH(iv, _mm256_add_epi32(a.a, _mm256_madd_epi16(halves.a, one)),
         _mm256_add_epi32(a.b, _mm256_madd_epi16(halves.b, one)));
}
#endif
INLINE void fetch(const uint8_t *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
