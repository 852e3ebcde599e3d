// AVX-512 with VNNI: `vpdpbusd` adds, in each of 16 lanes, four products of unsigned by signed bytes.
//
// A lane is a weight row, so 64 bytes of quants meet four activations broadcast to all lanes.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define CRATON_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))

namespace craton {
namespace {

CRATON_AVX512 CRATON_INLINE __m512i broadcast(const uint8_t* p) {
    int32_t value;
    memcpy(&value, p, 4);
    return _mm512_set1_epi32(value);
}

CRATON_AVX512 CRATON_INLINE __m512 broadcast_float(const uint8_t* p) { return _mm512_castsi512_ps(broadcast(p)); }

CRATON_AVX512 CRATON_INLINE __m512 load_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// `blocks` weight blocks times a tile of `width` rows, held in registers over the whole of the inputs.
template <Format format, int width, int blocks>
CRATON_AVX512 CRATON_INLINE void multiply_tile(const uint8_t* weights, int64_t groups, const uint8_t* tile,
                                               const uint8_t* next, float* sums) {
    const int64_t stride = block_bytes(format, groups);
    // With registers to spare, the high nibbles stay where they are: their sum, 16 times too large, is shifted once.
    constexpr bool shift_sum = has_nibbles(format) && width <= 2;
    const __m512i low = _mm512_set1_epi8(0x0f), top = _mm512_set1_epi8(char(0xf0));
    __m512 sum[blocks][width];
    for (int b = 0; b < blocks; ++b) {
        for (int m = 0; m < width; ++m) sum[b][m] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < groups; ++g, tile += width * kTileGroupBytes) {
        const TileGroup<const uint8_t> x{tile, width};
        if (next) {
            // The strip after this one, in address order: hardware prefetchers lose the thread between its streams.
            for (int64_t i = 0; i < blocks * group_bytes(format); i += kVectorBytes)
                _mm_prefetch(next + i, _MM_HINT_T1);
            next += blocks * group_bytes(format);
        }
        __m512i dot[blocks][width], high_dot[blocks][width];
        for (int m = 0; m < width; ++m) {
            for (int b = 0; b < blocks; ++b) {
                dot[b][m] = has_minimum(format) ? _mm512_setzero_si512() : broadcast(x.term(m));
                high_dot[b][m] = _mm512_setzero_si512();
            }
        }
        for (int64_t v = 0; v < vectors_per_group(format); ++v) {
            __m512i quants[blocks], high[blocks];
            for (int b = 0; b < blocks; ++b) {
                quants[b] = _mm512_loadu_si512(weights + b * stride + g * quant_bytes(format) + v * kVectorBytes);
                if (has_nibbles(format)) {
                    high[b] = shift_sum ? _mm512_and_si512(quants[b], top)
                                        : _mm512_and_si512(_mm512_srli_epi16(quants[b], 4), low);
                    quants[b] = _mm512_and_si512(quants[b], low);
                }
            }
            for (int m = 0; m < width; ++m) {
                const __m512i value = broadcast(x.quants(m) + 4 * v);
                for (int b = 0; b < blocks; ++b) dot[b][m] = _mm512_dpbusd_epi32(dot[b][m], quants[b], value);
            }
            if (has_nibbles(format)) {
                for (int m = 0; m < width; ++m) {
                    const __m512i value = broadcast(x.quants(m) + kGroup / 2 + 4 * v);
                    for (int b = 0; b < blocks; ++b) {
                        __m512i& target = shift_sum ? high_dot[b][m] : dot[b][m];
                        target = _mm512_dpbusd_epi32(target, high[b], value);
                    }
                }
            }
        }
        if (shift_sum) {
            for (int m = 0; m < width; ++m) {
                for (int b = 0; b < blocks; ++b) {
                    dot[b][m] = _mm512_add_epi32(dot[b][m], _mm512_srai_epi32(high_dot[b][m], 4));
                }
            }
        }
        for (int b = 0; b < blocks; ++b) {
            const uint8_t* block = weights + b * stride;
            const __m512 scales = load_halves(block + scales_offset(format, groups) + g * scale_bytes);
            for (int m = 0; m < width; ++m) {
                const __m512 scale = _mm512_mul_ps(scales, broadcast_float(x.scale(m)));
                sum[b][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[b][m]), scale, sum[b][m]);
            }
            if (has_minimum(format)) {
                const __m512 minima = load_halves(block + minima_offset(format, groups) + g * scale_bytes);
                for (int m = 0; m < width; ++m) {
                    sum[b][m] = _mm512_fmadd_ps(minima, broadcast_float(x.term(m)), sum[b][m]);
                }
            }
        }
    }
    for (int m = 0; m < width; ++m) {
        for (int b = 0; b < blocks; ++b) _mm512_storeu_ps(sums + m * kStripRows + b * kBlockRows, sum[b][m]);
    }
}

template <Format format, int width>
CRATON_AVX512 void multiply_strip(const Strip& strip, const uint8_t* tile, float* sums) {
    // Eight rows and two blocks would need more registers than there are.
    constexpr int64_t at_once = width == kTileRows ? 1 : kStripBlocks;
    const int64_t stride = block_bytes(format, strip.groups);
    int64_t b = 0;
    for (; b + at_once <= strip.count; b += at_once) {
        const uint8_t* next = strip.next ? strip.next + b * stride : nullptr;
        multiply_tile<format, width, at_once>(strip.blocks + b * stride, strip.groups, tile, next,
                                              sums + b * kBlockRows);
    }
    if (b < strip.count) {
        multiply_tile<format, width, 1>(strip.blocks + b * stride, strip.groups, tile, strip.next,
                                        sums + b * kBlockRows);
    }
}

template <Format format>
CRATON_AVX512 void multiply(const Strip& strip, const uint8_t* tile, int64_t width, float* sums) {
    switch (width) {
        case 8: return multiply_strip<format, 8>(strip, tile, sums);
        case 4: return multiply_strip<format, 4>(strip, tile, sums);
        case 2: return multiply_strip<format, 2>(strip, tile, sums);
        default: return multiply_strip<format, 1>(strip, tile, sums);
    }
}

CRATON_ROW_FUNCTIONS(CRATON_AVX512)

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels avx512vnni_kernels = {
    "avx512vnni",
    supported,
    {multiply<Q4_0>, multiply<Q4_1>, multiply<Q8_0>},
    CRATON_EACH_FORMAT_AND_TYPE(quantize),
    CRATON_EACH_FORMAT_AND_TYPE(dequantize),
    avx512_rows,
};

}  // namespace craton
#endif
