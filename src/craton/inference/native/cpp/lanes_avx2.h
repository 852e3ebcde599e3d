// Sixteen floats in two AVX2 registers. See lanes_portable.h for what each function means.
//
// Included, like its siblings, inside the namespace of the one file that uses it.

struct Lanes {
    __m256 low, high;
};

CRATON_TARGET CRATON_INLINE Lanes all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
CRATON_TARGET CRATON_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
CRATON_TARGET CRATON_INLINE __m256 load_eight(const BFloat* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
CRATON_TARGET CRATON_INLINE __m256 load_eight(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
CRATON_TARGET CRATON_INLINE Lanes load(const BFloat* p) { return {load_eight(p), load_eight(p + 8)}; }
CRATON_TARGET CRATON_INLINE __m256 load_eight(const Code* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
CRATON_TARGET CRATON_INLINE Lanes load(const Half* p) { return {load_eight(p), load_eight(p + 8)}; }
CRATON_TARGET CRATON_INLINE Lanes load(const Code* p) { return {load_eight(p), load_eight(p + 8)}; }
CRATON_TARGET CRATON_INLINE void store(float* p, Lanes a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}

CRATON_TARGET CRATON_INLINE void store(Half* p, Lanes a) {
    __m128i* to = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(to, _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(to + 1, _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT));
}

CRATON_TARGET CRATON_INLINE Lanes add(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
CRATON_TARGET CRATON_INLINE Lanes subtract(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
CRATON_TARGET CRATON_INLINE Lanes multiply(Lanes a, Lanes b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
CRATON_TARGET CRATON_INLINE Lanes divide(Lanes a, Lanes b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
CRATON_TARGET CRATON_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
CRATON_TARGET CRATON_INLINE Lanes larger(Lanes a, Lanes b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
CRATON_TARGET CRATON_INLINE Lanes smaller(Lanes a, Lanes b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
CRATON_TARGET CRATON_INLINE __m256 zero_eight_below(__m256 a, __m256 limit, __m256 value) {
    return _mm256_and_ps(_mm256_cmp_ps(a, limit, _CMP_NLT_UQ), value);
}
CRATON_TARGET CRATON_INLINE Lanes zero_below(Lanes a, float limit, Lanes value) {
    const __m256 limits = _mm256_set1_ps(limit);
    return {zero_eight_below(a.low, limits, value.low), zero_eight_below(a.high, limits, value.high)};
}
CRATON_TARGET CRATON_INLINE __m256 two_to_the_eight(__m256 rounded) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
}
CRATON_TARGET CRATON_INLINE Lanes two_to_the(Lanes rounded) {
    return {two_to_the_eight(rounded.low), two_to_the_eight(rounded.high)};
}

CRATON_TARGET CRATON_INLINE float sum(Lanes a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
CRATON_TARGET CRATON_INLINE float largest(Lanes a) {
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// The sums of eight pairs of registers.
CRATON_TARGET CRATON_INLINE __m256 eight_sums(const Lanes a[8]) {
    __m256 halves[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 one = _mm256_add_ps(a[i].low, a[i].high), other = _mm256_add_ps(a[i + 4].low, a[i + 4].high);
        halves[i] = _mm256_add_ps(_mm256_permute2f128_ps(one, other, 0x20), _mm256_permute2f128_ps(one, other, 0x31));
    }
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(halves[0], halves[1]), _mm256_unpackhi_ps(halves[0], halves[1]));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(halves[2], halves[3]), _mm256_unpackhi_ps(halves[2], halves[3]));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}
CRATON_TARGET CRATON_INLINE Lanes sums(const Lanes a[16]) { return {eight_sums(a), eight_sums(a + 8)}; }
