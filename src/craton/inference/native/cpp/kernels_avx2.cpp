// AVX2: `vpmaddubsw` adds two products of unsigned by signed bytes into 16 bits, where it saturates.
//
// Nibbles cannot reach that limit: a group's eight such sums stay under 8 * 2 * 15 * 127 = 30480. Bytes can, so Q8_0
// goes as |w| * (sign(w) x), at most 2 * 128 * 127 = 32512, and without the offset that the stored quants carry.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define CRATON_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace craton {
namespace {

constexpr int64_t kHalfRows = kBlockRows / 2;  // weight rows, that is 32-bit lanes, of a 256-bit register
constexpr int64_t kHalfBytes = kVectorBytes / 2;

CRATON_AVX2 CRATON_INLINE __m256i broadcast(const uint8_t* p) {
    int32_t value;
    memcpy(&value, p, 4);
    return _mm256_set1_epi32(value);
}

CRATON_AVX2 CRATON_INLINE __m256 broadcast_float(const uint8_t* p) { return _mm256_castsi256_ps(broadcast(p)); }

CRATON_AVX2 CRATON_INLINE __m256 load_halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Have the sum so far in a register here. Left alone, GCC computes all products of a group before it adds any, and the
// registers do not hold them: a quarter more time.
CRATON_AVX2 CRATON_INLINE void keep_order(__m256i& sum) { asm("" : "+x"(sum)); }

// `halves` half blocks, from half `half` on, times `rows` rows, from row `first` on, of a tile of `width` rows.
template <Format format, int width, int rows, int halves>
CRATON_AVX2 CRATON_INLINE void multiply_half(const uint8_t* block, int64_t half, int64_t groups, const uint8_t* tile,
                                             int64_t first, const uint8_t* next, float* sums) {
    const __m256i low = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8(char(0x80));
    __m256 sum[halves][rows];
    for (int h = 0; h < halves; ++h) {
        for (int m = 0; m < rows; ++m) sum[h][m] = _mm256_setzero_ps();
    }
    for (int64_t g = 0; g < groups; ++g, tile += width * kTileGroupBytes) {
        const TileGroup<const uint8_t> x{tile, width};
        if (next) {
            for (int64_t i = 0; i < group_bytes(format); i += kVectorBytes) _mm_prefetch(next + i, _MM_HINT_T1);
            next += group_bytes(format);
        }
        __m256i dot[halves][rows];  // 16-bit sums of nibbles, 32-bit sums of bytes
        for (int h = 0; h < halves; ++h) {
            for (int m = 0; m < rows; ++m) dot[h][m] = _mm256_setzero_si256();
        }
        for (int64_t v = 0; v < vectors_per_group(format); ++v) {
            const uint8_t* vector = block + g * quant_bytes(format) + v * kVectorBytes;
            for (int h = 0; h < halves; ++h) {
                const __m256i quants =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(vector + (half + h) * kHalfBytes));
                if (has_nibbles(format)) {
                    const __m256i lower = _mm256_and_si256(quants, low);
                    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(quants, 4), low);
                    for (int m = 0; m < rows; ++m) {
                        const uint8_t* q = x.quants(first + m) + 4 * v;
                        dot[h][m] = _mm256_add_epi16(dot[h][m], _mm256_maddubs_epi16(lower, broadcast(q)));
                        dot[h][m] = _mm256_add_epi16(dot[h][m], _mm256_maddubs_epi16(upper, broadcast(q + kGroup / 2)));
                        keep_order(dot[h][m]);
                    }
                } else {
                    const __m256i weights = _mm256_xor_si256(quants, flip);
                    const __m256i magnitudes = _mm256_abs_epi8(weights);
                    for (int m = 0; m < rows; ++m) {
                        const __m256i signed_x = _mm256_sign_epi8(broadcast(x.quants(first + m) + 4 * v), weights);
                        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, signed_x);
                        dot[h][m] = _mm256_add_epi32(dot[h][m], _mm256_madd_epi16(pairs, ones));
                        keep_order(dot[h][m]);
                    }
                }
            }
        }
        for (int h = 0; h < halves; ++h) {
            const uint8_t* scales =
                block + scales_offset(format, groups) + g * scale_bytes + (half + h) * kHalfRows * 2;
            const __m256 weight_scales = load_halves(scales);
            for (int m = 0; m < rows; ++m) {
                __m256i exact = has_nibbles(format) ? _mm256_madd_epi16(dot[h][m], ones) : dot[h][m];
                if (format == Q4_0) exact = _mm256_add_epi32(exact, broadcast(x.term(first + m)));
                const __m256 scale = _mm256_mul_ps(weight_scales, broadcast_float(x.scale(first + m)));
                sum[h][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), scale, sum[h][m]);
            }
            if (has_minimum(format)) {
                const __m256 minima = load_halves(scales + groups * scale_bytes);
                for (int m = 0; m < rows; ++m) {
                    sum[h][m] = _mm256_fmadd_ps(minima, broadcast_float(x.term(first + m)), sum[h][m]);
                }
            }
        }
    }
    for (int m = 0; m < rows; ++m) {
        for (int h = 0; h < halves; ++h) {
            _mm256_storeu_ps(sums + (first + m) * kStripRows + (half + h) * kHalfRows, sum[h][m]);
        }
    }
}

template <Format format, int width>
CRATON_AVX2 void multiply_strip(const Strip& strip, const uint8_t* tile, float* sums) {
    const int64_t stride = block_bytes(format, strip.groups);
    for (int64_t b = 0; b < strip.count; ++b) {
        const uint8_t* block = strip.blocks + b * stride;
        const uint8_t* next = strip.next ? strip.next + b * stride : nullptr;
        float* out = sums + b * kBlockRows;
        // Sixteen registers hold the sums of two rows and both halves, or of four rows and one half.
        if constexpr (width <= 2) {
            multiply_half<format, width, width, 2>(block, 0, strip.groups, tile, 0, next, out);
        } else {
            for (int64_t half = 0; half < 2; ++half) {
                for (int64_t first = 0; first < width; first += 4) {
                    multiply_half<format, width, 4, 1>(block, half, strip.groups, tile, first, next, out);
                    next = nullptr;
                }
            }
        }
    }
}

template <Format format>
CRATON_AVX2 void multiply(const Strip& strip, const uint8_t* tile, int64_t width, float* sums) {
    switch (width) {
        case 8: return multiply_strip<format, 8>(strip, tile, sums);
        case 4: return multiply_strip<format, 4>(strip, tile, sums);
        case 2: return multiply_strip<format, 2>(strip, tile, sums);
        default: return multiply_strip<format, 1>(strip, tile, sums);
    }
}

CRATON_ROW_FUNCTIONS(CRATON_AVX2)

bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2",
    supported,
    {multiply<Q4_0>, multiply<Q4_1>, multiply<Q8_0>},
    CRATON_EACH_FORMAT_AND_TYPE(quantize),
    CRATON_EACH_FORMAT_AND_TYPE(dequantize),
    avx2_rows,
};

}  // namespace craton
#endif
