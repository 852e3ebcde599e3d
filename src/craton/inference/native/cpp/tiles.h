// Products of many rows on a matrix unit, in bfloat16: for prompts, whose arithmetic decides and not the weights' bytes.
//
// A strip of weights is unpacked once and meets all rows. Both lie as the unit reads them, in tiles of 1 KiB that follow
// one another in memory:
//     rows     [tile of 16 rows][group][row][32 inputs]
//     weights  [block of 16 outputs][group][pair of inputs][output][2 inputs]
// Products are exact and their sums in fp32, so a row's numbers do not depend on the rows beside it.
#pragma once

#include <vector>

#include "kernels.h"

namespace craton {

constexpr int64_t kTileLines = 16;                    // rows of a tile
constexpr int64_t kTileNumbers = kTileLines * kGroup;  // bfloats of a tile

// Memory that a thread keeps, on whole cache lines.
template <typename T>
class Buffer {
public:
    T* get(int64_t count) {
        const size_t wanted = size_t(count) + kVectorBytes / sizeof(T);
        if (memory_.size() < wanted) memory_.resize(wanted);
        return reinterpret_cast<T*>(round_up(int64_t(memory_.data()), kVectorBytes));
    }

private:
    std::vector<T> memory_;
};

// sums[row * stride + output] for `tiles` whole tiles of rows and one or two blocks of outputs, the tiles of which lie
// `apart` bfloats from each other.
struct TileProduct {
    const BFloat* rows;
    int64_t tiles, groups;
    const BFloat* weights;
    int64_t blocks, apart;
    float* sums;
    int64_t stride;
};

struct TileMath {
    // sums[row][kStripRows] of a packed strip times `tiles` whole tiles of rows.
    void (*multiply_strip[kFormats])(const Strip& strip, const BFloat* rows, int64_t tiles, float* sums);
    // `groups` x 32 numbers to the lines of a row, the first of which is `line`; by the craton_type of x.
    void (*round_row[2])(const void* x, int64_t groups, BFloat* line);
    void (*multiply)(const TileProduct& product);
    // 16 keys, `count` rows of the cache, as a block of weights, and 32 values as one group of every block, `apart` bfloats from each
    // other; by the cache's craton_type. Keys and values from `count` on are taken to be 0.
    void (*pack_keys[kCacheTypes])(const void* keys, int64_t count, int64_t size, BFloat* weights);
    void (*pack_values[kCacheTypes])(const void* values, int64_t count, int64_t size, BFloat* weights, int64_t apart);
};

const TileMath* tile_math();  // null: this CPU has no matrix unit, or the system does not lend it

}  // namespace craton
