// One row of a packed matrix as floats: value = (quant - offset) * scale, or quant * scale + minimum.
#pragma once

#include "layout.h"
#include "numbers.h"

namespace craton {

template <Format format, typename T>
CRATON_INLINE void dequantize_row(const uint8_t* block, int64_t groups, int64_t row, T* out) {
    const uint8_t* scales = block + scales_offset(format, groups) + row * 2;
    const uint8_t* minima = block + minima_offset(format, groups) + row * 2;
    for (int64_t g = 0; g < groups; ++g, out += kGroup) {
        constexpr int kVectors = vectors_per_group(format);
        uint8_t packed[kVectors * 4];
        for (int v = 0; v < kVectors; ++v) {
            memcpy(packed + v * 4, block + g * quant_bytes(format) + v * kVectorBytes + row * 4, 4);
        }
        uint16_t half;
        memcpy(&half, scales + g * scale_bytes, 2);
        const float scale = half_to_float(half);
        float minimum = 0;
        if (has_minimum(format)) {
            memcpy(&half, minima + g * scale_bytes, 2);
            minimum = half_to_float(half);
        }
        uint8_t quants[kGroup];
        for (int i = 0; i < int(sizeof(packed)); ++i) {
            quants[i] = has_nibbles(format) ? packed[i] & 15 : packed[i];
            if (has_nibbles(format)) quants[i + kGroup / 2] = packed[i] >> 4;
        }
        for (int i = 0; i < kGroup; ++i) {
            const float value = float(int32_t(quants[i]) - quant_offset(format)) * scale;
            store_float(out + i, has_minimum(format) ? value + minimum : value);
        }
    }
}

}  // namespace craton
