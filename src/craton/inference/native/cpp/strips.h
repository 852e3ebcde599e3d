// The two halves of every product: rows of activations as the kernels read them, and strips of weights times all rows.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "tiles.h"

namespace craton {

constexpr int64_t kMostRows = 256;  // of a Slab

// `count` rows of activations: with one or two `parts` quantised ones (activations.h), with none bfloat16 (tiles.h).
struct Slab {
    uint8_t* data;
    int64_t count, parts, groups;

    static int64_t bytes(int64_t count, int64_t parts, int64_t groups) {
        if (parts == 0) return round_up(count, kTileLines) * groups * kGroup * 2;
        return count * parts * groups * kTileGroupBytes;
    }

    int64_t rows() const { return count * parts; }
    int64_t row_bytes() const { return groups * kTileGroupBytes; }
    uint8_t* tile(const Tile& tile) const { return data + tile.first * row_bytes(); }
    BFloat* bfloats() const { return reinterpret_cast<BFloat*>(data); }

    // The tile that holds row `i` with all its parts: rows come in whole tiles of the greatest width, then in smaller
    // ones. Widths are even as long as there are two rows left, so a tile holds all parts or none.
    Tile tile_of(int64_t i) const {
        const int64_t row = i * parts;
        Tile found = tile_at(row / kTileRows * kTileRows, rows());
        while (row >= found.first + found.width) found = tile_at(found.first + found.width, rows());
        return found;
    }
};

// Row `i` of the slab, from its group `group` on: `groups` groups of x, for a weight of this format.
inline void store_row(Format format, craton_type type, const void* x, const Slab& slab, int64_t i, int64_t group,
                      int64_t groups) {
    if (slab.parts == 0) {
        BFloat* line = slab.bfloats() + (i / kTileLines * slab.groups + group) * kTileNumbers + i % kTileLines * kGroup;
        return tile_math()->round_row[type](x, groups, line);
    }
    const Tile tile = slab.tile_of(i);
    uint8_t* place = slab.tile(tile) + group * tile.width * kTileGroupBytes;
    kernels().quantize[format][type](x, groups, place, tile.width, i * slab.parts - tile.first, slab.parts);
}

inline int64_t strip_count(const Weight& weight) { return (weight.blocks() + kStripBlocks - 1) / kStripBlocks; }

// Strip `index` of the weight; `next` is the strip that will be read after it, -1 if none.
inline Strip strip_at(const Weight& weight, int64_t index, int64_t next) {
    const int64_t block = index * kStripBlocks;
    const bool fetch = next >= 0 && next < strip_count(weight);
    return {weight.block(block), std::min(kStripBlocks, weight.blocks() - block), weight.groups,
            fetch ? weight.block(next * kStripBlocks) : nullptr};
}

// A strip of the weight times every row of the slab. sums: [rows, to a whole number of 16][kStripRows].
inline void multiply_strip(const Weight& weight, int64_t index, const Slab& slab, float* sums) {
    Strip strip = strip_at(weight, index, index + 1);
    if (slab.parts == 0) {
        const int64_t tiles = (slab.count + kTileLines - 1) / kTileLines;
        return tile_math()->multiply_strip[weight.format](strip, slab.bfloats(), tiles, sums);
    }
    const auto multiply = kernels().multiply[weight.format];
    const int64_t rows = slab.rows();
    for (Tile tile = tile_at(0, rows); tile.first < rows; tile = tile_at(tile.first + tile.width, rows)) {
        float parts[kTileRows * kStripRows];
        float* out = sums + tile.first / slab.parts * kStripRows;
        if (slab.parts == 1) {
            multiply(strip, slab.tile(tile), tile.width, out);
        } else {
            multiply(strip, slab.tile(tile), tile.width, parts);
            for (int64_t m = 0; m < tile.width; m += 2, out += kStripRows) {
                const float* both = parts + m * kStripRows;
                for (int64_t n = 0; n < strip.count * kBlockRows; ++n) out[n] = both[n] + both[kStripRows + n];
            }
        }
        strip.next = nullptr;  // fetched once
    }
}

}  // namespace craton
