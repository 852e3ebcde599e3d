// The packed weight layout, shared by every instruction set.
//
// Sixteen rows make a block, one row for each 32-bit lane of a 512-bit register. A block of `groups` x 32 inputs is
//     quants  [groups][vectors][16 rows][4 bytes]
//     scales  [groups][16 rows] fp16
//     minima  [groups][16 rows] fp16               (Q4_1 only)
// padded to 64 bytes, so that every 64-byte vector of quants lies in one cache line. In the 4-bit formats byte j of a
// row's group (j = 4 * vector + byte) holds input j in its low and input j + 16 in its high nibble, as in GGUF; in Q8_0
// it holds input j as an unsigned byte, quant + 128. The lines are the GGUF bytes reordered: no more memory, and one
// pass over them in address order reads the matrix once. Rows that pad the last block have scale (and minimum) 0.
#pragma once

#include <cstdint>

#include "craton_native.h"

namespace craton {

constexpr int64_t kGroup = 32;      // inputs that share a scale, in weights and in activations
constexpr int64_t kBlockRows = 16;  // output rows interleaved in a block
constexpr int64_t kVectorBytes = 64;

enum Format { Q4_0, Q4_1, Q8_0, kFormats };

constexpr bool has_nibbles(Format format) { return format != Q8_0; }
constexpr bool has_minimum(Format format) { return format == Q4_1; }

// What is added to a quant to make it the unsigned number that is stored.
constexpr int32_t quant_offset(Format format) { return format == Q8_0 ? 128 : format == Q4_0 ? 8 : 0; }

constexpr int64_t vectors_per_group(Format format) { return has_nibbles(format) ? 4 : 8; }
constexpr int64_t quant_bytes(Format format) { return vectors_per_group(format) * kVectorBytes; }
constexpr int64_t scale_bytes = kBlockRows * 2;

// Bytes of one row's group in a GGUF file: the fp16 scale(s), then the quants.
constexpr int64_t gguf_header_bytes(Format format) { return has_minimum(format) ? 4 : 2; }
constexpr int64_t gguf_group_bytes(Format format) { return gguf_header_bytes(format) + vectors_per_group(format) * 4; }

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

constexpr int64_t group_bytes(Format format) {
    return quant_bytes(format) + (has_minimum(format) ? 2 : 1) * scale_bytes;
}
constexpr int64_t block_bytes(Format format, int64_t groups) {
    return round_up(groups * group_bytes(format), kVectorBytes);
}
constexpr int64_t scales_offset(Format format, int64_t groups) { return groups * quant_bytes(format); }
constexpr int64_t minima_offset(Format format, int64_t groups) {
    return scales_offset(format, groups) + groups * scale_bytes;
}

// A craton_weight whose fields have been checked.
struct Weight {
    const uint8_t* data;
    int64_t rows, groups;
    Format format;

    int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
    const uint8_t* block(int64_t index) const { return data + index * block_bytes(format, groups); }
};

constexpr int64_t kLargestSide = INT32_MAX;  // so that no product of two sides and a few bytes overflows

// Whether the weight can be one; its data is not looked at.
inline bool check(const craton_weight& weight, Weight& checked) {
    if (weight.rows < 0 || weight.rows > kLargestSide) return false;
    if (weight.columns <= 0 || weight.columns > kLargestSide || weight.columns % kGroup != 0) return false;
    checked = {weight.data, weight.rows, weight.columns / kGroup, Q4_0};
    switch (weight.format) {
        case CRATON_Q4_0: checked.format = Q4_0; return true;
        case CRATON_Q4_1: checked.format = Q4_1; return true;
        case CRATON_Q8_0: checked.format = Q8_0; return true;
        default: return false;
    }
}

}  // namespace craton
