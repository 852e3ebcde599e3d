// Exact conversions between fp32 and the two 16-bit floats, in integer arithmetic that compilers vectorise.
//
// They give the same bits whatever the instruction set, rounding mode or flush-to-zero state.
#pragma once

#include <cstdint>
#include <cstring>

#define CRATON_INLINE static inline __attribute__((always_inline))

namespace craton {

CRATON_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

CRATON_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

CRATON_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = uint32_t(half & 0x7fff) << 13;
    const float smallest_normal = float_of(113u << 23);  // 2^-14
    const uint32_t subnormal = bits_of(float_of((113u << 23) + magnitude) - smallest_normal);
    const uint32_t exponent_shift = magnitude >= (31u << 23) ? 224u << 23 : 112u << 23;  // Inf and NaN: to 255
    return float_of(sign | (magnitude < (1u << 23) ? subnormal : magnitude + exponent_shift));
}

// Round to nearest even; every NaN becomes the same one.
CRATON_INLINE uint16_t float_to_bfloat(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Round to nearest even; what is too large becomes infinite, and every NaN the same one.
CRATON_INLINE uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);  // 2^16 and more
    if (magnitude < 0x38800000) {                                 // below 2^-14: steps of 2^-24, rounded by an addition
        return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

struct BFloat {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

// One of the int8 numbers of a cache's row; the row's scale stands behind the last (CRATON_I8).
struct Code {
    int8_t quant;
};

CRATON_INLINE float load_float(const float* p) { return *p; }
CRATON_INLINE float load_float(const BFloat* p) { return float_of(uint32_t(p->bits) << 16); }
CRATON_INLINE float load_float(const Half* p) { return half_to_float(p->bits); }
CRATON_INLINE float load_float(const Code* p) { return float(p->quant); }
CRATON_INLINE void store_float(float* p, float value) { *p = value; }
CRATON_INLINE void store_float(BFloat* p, float value) { p->bits = float_to_bfloat(value); }
CRATON_INLINE void store_float(Half* p, float value) { p->bits = float_to_half(value); }

// A row whose largest magnitude is below this counts as zero: its reciprocal would overflow. Its share of any sum is
// beyond fp32's reach next to numbers of ordinary size.
constexpr float kSmallestMagnitude = 0x1p-100f;

// Round numbers to integers of at most `most`, ties to even, and give their scale: number = quant * scale. A NaN or an
// infinity among them gives scale NaN, lest rounding hide it.
template <typename Quant>
CRATON_INLINE float quantize_to(float most, const float* x, int64_t count, Quant* quants) {
    uint32_t largest = 0;  // as bits: for magnitudes the order of the bits is that of the numbers, NaN on top
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const bool finite = largest < 0x7f800000;
    const bool counts = finite && float_of(largest) >= kSmallestMagnitude;
    const float inverse = counts ? most / float_of(largest) : 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
        quants[i] = Quant(bits_of(x[i] * inverse + 0x1.8p23f) - 0x4b400000u);
    }
    return counts ? float_of(largest) / most : finite ? 0.0f : float_of(0x7fc00000);
}

}  // namespace craton
