// Activations quantised to int8, 32 at a time, as the kernels read them.
//
// A row of activations becomes one quantised row, or two: the second holds what the first one's rounding left over, on
// a scale 254 times finer, and the two products are added. That keeps about 15 bits of each activation instead of 8.
//
// Quantised rows are taken in tiles of 8 and, for what is left, of 4, 2 and 1. A tile of `width` rows is, for each
// group in turn,
//     quants  [width][32] int8
//     scales  [width] fp32             value = quant * scale
//     terms   [width] 32 bits          what the group's sum of quants adds, once for all weights (see group_term)
// so that a kernel walks one pointer. A row takes the same bytes in any tile and its numbers do not depend on the
// others.
#pragma once

#include "layout.h"
#include "numbers.h"

namespace craton {

constexpr int64_t kTileRows = 8;
constexpr int64_t kTileGroupBytes = kGroup + 4 + 4;  // one row, one group

struct Tile {
    int64_t first, width;
};

// The tile that starts at row `first` of `rows`.
CRATON_INLINE Tile tile_at(int64_t first, int64_t rows) {
    const int64_t left = rows - first;
    return {first, left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1};
}

// One tile's group, seen as its three arrays.
template <typename Byte>
struct TileGroup {
    Byte* base;
    int64_t width;

    Byte* quants(int64_t row) const { return base + row * kGroup; }
    Byte* scale(int64_t row) const { return base + width * kGroup + row * 4; }
    Byte* term(int64_t row) const { return base + width * (kGroup + 4) + row * 4; }
};

// The stored quants are quant + offset, so a dot product exceeds the wanted one by offset * sum of the activations:
// that many, negated, is where the integer sum starts. Q4_1 starts from zero and adds minimum * (scale * sum) in fp32.
template <Format format>
CRATON_INLINE uint32_t group_term(float scale, int32_t sum) {
    return has_minimum(format) ? bits_of(scale * float(sum)) : uint32_t(-quant_offset(format) * sum);
}

// Round `values` times `inverse` to the nearest integers, ties to even, and give their sum. |value * inverse| < 128.
CRATON_INLINE int32_t round_group(const float* values, float inverse, int8_t* quants) {
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
        const int32_t quant = int32_t(bits_of(values[i] * inverse + 0x1.8p23f)) - 0x4b400000;
        quants[i] = int8_t(quant);
        sum += quant;
    }
    return sum;
}

// Quantise one row of activations into its `parts` rows of a tile, from `row` on. A group that holds a NaN or an
// infinity gets scale NaN, and so makes every output of its row NaN: rounding would otherwise hide it.
template <Format format, typename T>
CRATON_INLINE void quantize_row(const T* x, int64_t groups, uint8_t* tile, int64_t width, int64_t row, int64_t parts) {
    for (int64_t g = 0; g < groups; ++g, x += kGroup, tile += width * kTileGroupBytes) {
        float values[kGroup];
        uint32_t largest = 0;  // as bits: for magnitudes the order of the bits is that of the numbers, NaN on top
        for (int i = 0; i < kGroup; ++i) {
            values[i] = load_float(x + i);
            const uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        const bool finite = largest < 0x7f800000;
        const bool counts = finite && float_of(largest) >= kSmallestMagnitude;
        const float inverse = counts ? 127.0f / float_of(largest) : 0.0f;
        const float scale = counts ? float_of(largest) / 127.0f : finite ? 0.0f : float_of(0x7fc00000);

        if (!finite) {
            for (float& value : values) value = 0.0f;
        }
        const TileGroup<uint8_t> group{tile, width};
        const float step = finite ? scale : 0.0f;
        float part_scale = scale, part_inverse = inverse;
        for (int64_t part = row; part < row + parts; ++part) {
            int8_t quants[kGroup];
            const uint32_t term = group_term<format>(part_scale, round_group(values, part_inverse, quants));
            memcpy(group.quants(part), quants, kGroup);
            memcpy(group.scale(part), &part_scale, 4);
            memcpy(group.term(part), &term, 4);
            // What is left is at most half a step, so 127 finer steps cover it.
            for (int i = 0; i < kGroup; ++i) values[i] -= float(quants[i]) * step;
            part_scale = step / 254.0f;
            part_inverse = inverse * 254.0f;
        }
    }
}

}  // namespace craton
