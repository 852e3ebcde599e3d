// Plain C++: the definition of the result, and what runs where no other kernel does.
#include <cmath>

#include "kernels.h"

namespace craton {
namespace {

template <Format format>
int32_t dot(const uint8_t* group, int64_t row, const int8_t* x) {
    int32_t sum = 0;
    for (int64_t j = 0; j < vectors_per_group(format) * 4; ++j) {
        const int32_t packed = group[j / 4 * kVectorBytes + row * 4 + j % 4];
        sum += has_nibbles(format) ? (packed & 15) * x[j] + (packed >> 4) * x[j + kGroup / 2] : packed * x[j];
    }
    return sum;
}

template <Format format>
void multiply(const Strip& strip, const uint8_t* tile, int64_t width, float* sums) {
    for (int64_t n = 0; n < strip.count * kBlockRows; ++n) {
        const uint8_t* block = strip.blocks + n / kBlockRows * block_bytes(format, strip.groups);
        const int64_t row = n % kBlockRows;
        for (int64_t m = 0; m < width; ++m) {
            float sum = 0;
            for (int64_t g = 0; g < strip.groups; ++g) {
                const TileGroup<const uint8_t> group{tile + g * width * kTileGroupBytes, width};
                uint16_t half;
                memcpy(&half, block + scales_offset(format, strip.groups) + g * scale_bytes + row * 2, 2);
                float scale, term_float;
                int32_t term;
                memcpy(&scale, group.scale(m), 4);
                memcpy(&term, group.term(m), 4);
                memcpy(&term_float, group.term(m), 4);
                const int32_t exact =
                    (has_minimum(format) ? 0 : term) +
                    dot<format>(block + g * quant_bytes(format), row, reinterpret_cast<const int8_t*>(group.quants(m)));
                sum = std::fma(float(exact), half_to_float(half) * scale, sum);
                if (has_minimum(format)) {
                    memcpy(&half, block + minima_offset(format, strip.groups) + g * scale_bytes + row * 2, 2);
                    sum = std::fma(half_to_float(half), term_float, sum);
                }
            }
            sums[m * kStripRows + n] = sum;
        }
    }
}

CRATON_ROW_FUNCTIONS()

bool supported() { return true; }

}  // namespace

const Kernels portable_kernels = {
    "portable",
    supported,
    {multiply<Q4_0>, multiply<Q4_1>, multiply<Q8_0>},
    CRATON_EACH_FORMAT_AND_TYPE(quantize),
    CRATON_EACH_FORMAT_AND_TYPE(dequantize),
    portable_rows,
};

}  // namespace craton
