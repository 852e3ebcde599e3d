// The two halves of every product: rows of activations to a slab of quantised ones, and strips of weights times a slab.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace craton {

// `count` rows of activations, quantised: see activations.h for the tiles.
struct Slab {
    uint8_t* data;
    int64_t count, parts, groups;

    int64_t rows() const { return count * parts; }
    int64_t row_bytes() const { return groups * kTileGroupBytes; }
    uint8_t* tile(const Tile& tile) const { return data + tile.first * row_bytes(); }

    // The tile that holds row `i` with all its parts: rows come in whole tiles of the greatest width, then in smaller
    // ones. Widths are even as long as there are two rows left, so a tile holds all parts or none.
    Tile tile_of(int64_t i) const {
        const int64_t row = i * parts;
        Tile found = tile_at(row / kTileRows * kTileRows, rows());
        while (row >= found.first + found.width) found = tile_at(found.first + found.width, rows());
        return found;
    }
};

inline void quantize_row(Format format, craton_type type, const void* x, const Slab& slab, int64_t i) {
    const Tile tile = slab.tile_of(i);
    kernels().quantize[format][type](x, slab.groups, slab.tile(tile), tile.width, i * slab.parts - tile.first,
                                     slab.parts);
}

inline int64_t strip_count(const Weight& weight) { return (weight.blocks() + kStripBlocks - 1) / kStripBlocks; }

// Strip `index` of the weight; `next` is the strip that will be read after it, -1 if none.
inline Strip strip_at(const Weight& weight, int64_t index, int64_t next) {
    const int64_t block = index * kStripBlocks;
    const bool fetch = next >= 0 && next < strip_count(weight);
    return {weight.block(block), std::min(kStripBlocks, weight.blocks() - block), weight.groups,
            fetch ? weight.block(next * kStripBlocks) : nullptr};
}

// The sum of row m's parts for output n of a strip.
CRATON_INLINE float whole_sum(const float* sums, int64_t parts, int64_t n) {
    return parts == 2 ? sums[n] + sums[kStripRows + n] : sums[n];
}

// Strips begin .. end of the weight times all rows of the slab: put(row, first output, outputs, sums of its parts).
template <typename Put>
void multiply_strips(const Weight& weight, const Slab& slab, int64_t begin, int64_t end, const Put& put) {
    const auto multiply = kernels().multiply[weight.format];
    const int64_t rows = slab.rows();
    float sums[kTileRows * kStripRows];
    for (int64_t s = begin; s < end; ++s) {
        Strip strip = strip_at(weight, s, s + 1);
        const int64_t first_output = s * kStripRows, outputs = std::min(kStripRows, weight.rows - first_output);
        for (Tile tile = tile_at(0, rows); tile.first < rows; tile = tile_at(tile.first + tile.width, rows)) {
            multiply(strip, slab.tile(tile), tile.width, sums);
            for (int64_t m = 0; m < tile.width; m += slab.parts) {
                put((tile.first + m) / slab.parts, first_output, outputs, sums + m * kStripRows);
            }
            strip.next = nullptr;  // fetched once
        }
    }
}

}  // namespace craton
