// Sixteen floats, one operation at a time: what the functions of lanes_avx2.h and lanes_avx512.h mean, to the bit.
//
// Included, like its siblings, inside the namespace of the one file that uses it.

struct Lanes {
    float v[16];
};

// What `Lanes` a function of one, two or three numbers makes of each lane.
#define CRATON_EACH_LANE(expression)                      \
    Lanes result;                                         \
    for (int i = 0; i < 16; ++i) result.v[i] = expression; \
    return result

CRATON_INLINE Lanes all(float value) { CRATON_EACH_LANE(value); }
template <typename T>
CRATON_INLINE Lanes load(const T* p) {
    CRATON_EACH_LANE(load_float(p + i));
}
CRATON_INLINE void store(float* p, const Lanes& a) { memcpy(p, a.v, sizeof(a.v)); }
CRATON_INLINE void store(Half* p, const Lanes& a) {
    for (int i = 0; i < 16; ++i) store_float(p + i, a.v[i]);
}

CRATON_INLINE Lanes add(const Lanes& a, const Lanes& b) { CRATON_EACH_LANE(a.v[i] + b.v[i]); }
CRATON_INLINE Lanes subtract(const Lanes& a, const Lanes& b) { CRATON_EACH_LANE(a.v[i] - b.v[i]); }
CRATON_INLINE Lanes multiply(const Lanes& a, const Lanes& b) { CRATON_EACH_LANE(a.v[i] * b.v[i]); }
CRATON_INLINE Lanes divide(const Lanes& a, const Lanes& b) { CRATON_EACH_LANE(a.v[i] / b.v[i]); }
// a * b + c, rounded once.
CRATON_INLINE Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
    CRATON_EACH_LANE(std::fma(a.v[i], b.v[i], c.v[i]));
}
// Where a lane of either is NaN, that of b.
CRATON_INLINE Lanes larger(const Lanes& a, const Lanes& b) { CRATON_EACH_LANE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
CRATON_INLINE Lanes smaller(const Lanes& a, const Lanes& b) { CRATON_EACH_LANE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
// 0 where a is below the limit, else (NaN included) the value.
CRATON_INLINE Lanes zero_below(const Lanes& a, float limit, const Lanes& value) {
    CRATON_EACH_LANE(a.v[i] < limit ? 0.0f : value.v[i]);
}
// 2^n of n + 1.5 * 2^23, for n from -126 to 127: the low bits of such a float are the integer n.
CRATON_INLINE Lanes two_to_the(const Lanes& rounded) {
    CRATON_EACH_LANE(float_of((bits_of(rounded.v[i]) << 23) + 0x3f800000u));
}

// All lanes, lane i with i + 8, then i + 4, and so on.
CRATON_INLINE float sum(Lanes a) {
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    }
    return a.v[0];
}
CRATON_INLINE float largest(Lanes a) {
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
    }
    return a.v[0];
}
// Lane i: the sum of a[i].
CRATON_INLINE Lanes sums(const Lanes a[16]) { CRATON_EACH_LANE(sum(a[i])); }

#undef CRATON_EACH_LANE
