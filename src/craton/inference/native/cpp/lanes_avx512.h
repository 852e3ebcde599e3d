// Sixteen floats in one AVX-512 register. See lanes_portable.h for what each function means.
//
// Included, like its siblings, inside the namespace of the one file that uses it.

struct Lanes {
    __m512 v;
};

CRATON_TARGET CRATON_INLINE Lanes all(float value) { return {_mm512_set1_ps(value)}; }
CRATON_TARGET CRATON_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
CRATON_TARGET CRATON_INLINE Lanes load(const BFloat* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
CRATON_TARGET CRATON_INLINE Lanes load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
CRATON_TARGET CRATON_INLINE Lanes load(const Code* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
CRATON_TARGET CRATON_INLINE void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
CRATON_TARGET CRATON_INLINE void store(Half* p, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

CRATON_TARGET CRATON_INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
CRATON_TARGET CRATON_INLINE Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
CRATON_TARGET CRATON_INLINE Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
CRATON_TARGET CRATON_INLINE Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
CRATON_TARGET CRATON_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
CRATON_TARGET CRATON_INLINE Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
CRATON_TARGET CRATON_INLINE Lanes smaller(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
CRATON_TARGET CRATON_INLINE Lanes zero_below(Lanes a, float limit, Lanes value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), value.v)};
}
CRATON_TARGET CRATON_INLINE Lanes two_to_the(Lanes rounded) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(rounded.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)))};
}

// Lane i with lane i + 8, then i + 4, and so on, added or compared.
CRATON_TARGET CRATON_INLINE float sum(Lanes a) {
    __m512 v = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
    return _mm512_cvtss_f32(_mm512_add_ps(v, _mm512_permute_ps(v, 0xb1)));
}
CRATON_TARGET CRATON_INLINE float largest(Lanes a) {
    __m512 v = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_max_ps(v, _mm512_permute_ps(v, 0x4e));
    return _mm512_cvtss_f32(_mm512_max_ps(v, _mm512_permute_ps(v, 0xb1)));
}

// Four quarters of `a` and of `b`, the quarters i and i + 2 added: [a0+a2, a1+a3, b0+b2, b1+b3].
CRATON_TARGET CRATON_INLINE __m512 add_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
// Of four registers that hold, in each quarter, four partial sums of one number: the sixteen numbers.
CRATON_TARGET CRATON_INLINE __m512 add_neighbours(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
CRATON_TARGET CRATON_INLINE Lanes sums(const Lanes a[16]) {
    // Number i of the result is lane i: quarter i / 4, place i % 4 in it.
    __m512 quarters[4];
    for (int place = 0; place < 4; ++place) {
        const __m512 low = add_halves(a[place].v, a[place + 4].v), high = add_halves(a[place + 8].v, a[place + 12].v);
        quarters[place] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    }
    return {add_neighbours(quarters[0], quarters[1], quarters[2], quarters[3])};
}
