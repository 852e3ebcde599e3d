#include "pack.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "pool.h"

namespace craton {
namespace {

constexpr int64_t kValuesPerThread = 32 << 10;

// One row of GGUF blocks to its lane of a packed block.
void pack_row(Format format, int64_t groups, const uint8_t* gguf, int64_t row, uint8_t* block) {
    const uint8_t flip = format == Q8_0 ? 0x80 : 0;  // signed to unsigned: quant + 128
    for (int64_t g = 0; g < groups; ++g, gguf += gguf_group_bytes(format)) {
        memcpy(block + scales_offset(format, groups) + g * scale_bytes + row * 2, gguf, 2);
        if (has_minimum(format)) memcpy(block + minima_offset(format, groups) + g * scale_bytes + row * 2, gguf + 2, 2);
        const uint8_t* quants = gguf + gguf_header_bytes(format);
        for (int64_t v = 0; v < vectors_per_group(format); ++v) {
            uint8_t* lane = block + g * quant_bytes(format) + v * kVectorBytes + row * 4;
            for (int64_t j = 0; j < 4; ++j) lane[j] = quants[v * 4 + j] ^ flip;
        }
    }
}

}  // namespace

void pack(const Weight& weight, const uint8_t* gguf, int64_t row_bytes, uint8_t* packed, int32_t threads) {
    const int64_t bytes = block_bytes(weight.format, weight.groups);
    const int64_t grain = kValuesPerThread / (weight.groups * kGroup * kBlockRows) + 1;
    parallel_for(threads, weight.blocks(), grain, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            uint8_t* block = packed + b * bytes;
            const int64_t rows = std::min(kBlockRows, weight.rows - b * kBlockRows);
            memset(block, 0, size_t(bytes));
            for (int64_t row = 0; row < rows; ++row) {
                pack_row(weight.format, weight.groups, gguf + (b * kBlockRows + row) * row_bytes, row, block);
            }
        }
    });
}

void unpack_rows(const Weight& weight, const int64_t* ids, int64_t count, void* out, craton_type type,
                 int32_t threads) {
    const auto dequantize = kernels().dequantize[weight.format][type];
    const int64_t columns = weight.groups * kGroup, row_bytes = columns * (type == CRATON_F32 ? 4 : 2);
    parallel_for(threads, count, kValuesPerThread / columns + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = ids ? ids[i] : i;
            dequantize(weight.block(row / kBlockRows), weight.groups, row % kBlockRows,
                       static_cast<uint8_t*>(out) + i * row_bytes);
        }
    });
}

}  // namespace craton
