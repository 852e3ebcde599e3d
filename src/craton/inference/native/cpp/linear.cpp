#include "linear.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace craton {
namespace {

// Activations are quantised a slab of rows at a time: enough rows to use each weight often, few enough for the L2
// cache.
constexpr int64_t kSlabBytes = 512 << 10;
constexpr int64_t kFewestSlabRows = 32;

// Work below which another thread is not worth its wake-up: about two microseconds.
constexpr int64_t kMacsPerThread = 128 << 10;
constexpr int64_t kValuesPerThread = 16 << 10;

int64_t slab_rows(int64_t row_bytes) {
    return std::max(kSlabBytes / row_bytes / kTileRows * kTileRows, kFewestSlabRows);
}

const uint8_t* element(const Rows<const void>& rows, int64_t row) {
    return static_cast<const uint8_t*>(rows.data) + row * rows.stride * (rows.type == CRATON_F32 ? 4 : 2);
}

// A tile's sums, those of one row's parts added up, plus the bias, to their places in y.
template <typename T>
void store(const float* sums, const Tile& tile, int64_t parts, int64_t first_output, int64_t outputs, const float* bias,
           T* y, int64_t stride) {
    for (int64_t m = 0; m < tile.width; m += parts, sums += parts * kStripRows) {
        T* out = y + (tile.first + m) / parts * stride + first_output;
        const float* finer = parts == 2 ? sums + kStripRows : nullptr;
        for (int64_t n = 0; n < outputs; ++n) {
            const float sum = finer ? sums[n] + finer[n] : sums[n];
            store_float(out + n, bias ? sum + bias[first_output + n] : sum);
        }
    }
}

// Strips begin .. end of the weight times all quantised rows of the slab.
template <typename T>
void multiply_strips(const Weight& weight, const uint8_t* slab, int64_t rows, int64_t parts, const float* bias, T* y,
                     int64_t stride, int64_t begin, int64_t end) {
    const auto multiply = kernels().multiply[weight.format];
    const int64_t row_bytes = weight.groups * kTileGroupBytes;
    float sums[kTileRows * kStripRows];
    for (int64_t s = begin; s < end; ++s) {
        const int64_t block = s * kStripBlocks, next = block + kStripBlocks;
        Strip strip{weight.block(block), std::min(kStripBlocks, weight.blocks() - block), weight.groups,
                    next < weight.blocks() ? weight.block(next) : nullptr};
        const int64_t first_output = s * kStripRows, outputs = std::min(kStripRows, weight.rows - first_output);
        for (Tile tile = tile_at(0, rows); tile.first < rows; tile = tile_at(tile.first + tile.width, rows)) {
            multiply(strip, slab + tile.first * row_bytes, tile.width, sums);
            store(sums, tile, parts, first_output, outputs, bias, y, stride);
            strip.next = nullptr;  // fetched once
        }
    }
}

}  // namespace

void linear(const Weight& weight, const Rows<const void>& x, int64_t parts, const float* bias, const Rows<void>& y,
            int32_t threads) {
    thread_local std::vector<uint8_t> scratch;
    const int64_t row_bytes = weight.groups * kTileGroupBytes, columns = weight.groups * kGroup;
    const int64_t most_rows = std::min(slab_rows(row_bytes), x.count * parts);  // quantised ones; even with two parts
    if (int64_t(scratch.size()) < most_rows * row_bytes) scratch.resize(size_t(most_rows * row_bytes));
    uint8_t* const slab = scratch.data();
    const auto quantize = kernels().quantize[weight.format][x.type];

    for (int64_t first = 0; first < x.count; first += most_rows / parts) {
        const int64_t count = std::min(most_rows / parts, x.count - first), rows = count * parts;
        parallel_for(threads, count, kValuesPerThread / columns + 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                // The tile that holds the row: rows come in whole tiles of the greatest width, then in smaller ones.
                // Widths are even as long as there are two rows left, so a tile holds all parts or none.
                const int64_t row = i * parts;
                Tile tile = tile_at(row / kTileRows * kTileRows, rows);
                while (row >= tile.first + tile.width) tile = tile_at(tile.first + tile.width, rows);
                quantize(element(x, first + i), weight.groups, slab + tile.first * row_bytes, tile.width,
                         row - tile.first, parts);
            }
        });
        const int64_t strips = (weight.blocks() + kStripBlocks - 1) / kStripBlocks;
        const int64_t grain = kMacsPerThread / (rows * columns * kStripRows) + 1;
        parallel_for(threads, strips, grain, [&](int64_t begin, int64_t end) {
            if (y.type == CRATON_F32) {
                float* out = static_cast<float*>(y.data) + first * y.stride;
                multiply_strips(weight, slab, rows, parts, bias, out, y.stride, begin, end);
            } else {
                BFloat* out = static_cast<BFloat*>(y.data) + first * y.stride;
                multiply_strips(weight, slab, rows, parts, bias, out, y.stride, begin, end);
            }
        });
    }
}

}  // namespace craton
