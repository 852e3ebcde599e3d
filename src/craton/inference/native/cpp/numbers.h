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

CRATON_INLINE float load_float(const float* p) { return *p; }
CRATON_INLINE float load_float(const BFloat* p) { return float_of(uint32_t(p->bits) << 16); }
CRATON_INLINE float load_float(const Half* p) { return half_to_float(p->bits); }
CRATON_INLINE void store_float(float* p, float value) { *p = value; }
CRATON_INLINE void store_float(BFloat* p, float value) { p->bits = float_to_bfloat(value); }
CRATON_INLINE void store_float(Half* p, float value) { p->bits = float_to_half(value); }

}  // namespace craton
