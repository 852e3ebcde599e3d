// The row arithmetic of a decode step as a table, one for each instruction set (rows_math.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "craton_native.h"
#include "numbers.h"

namespace craton {

using Activation = craton_activation;

constexpr int64_t kKeyBlock = 16;       // keys that are multiplied at once
constexpr int64_t kChunkKeys = 128;     // keys of a chunk at most: a piece of attention's work
constexpr int64_t kLargestHead = 256;   // numbers of a head

// What a head of `size` numbers has at one position of the cache, in numbers and in bytes: codes have their scale behind
// them.
template <typename T>
constexpr int64_t row_length(int64_t size) {
    return std::is_same_v<T, Code> ? size + 4 : size;
}
inline int64_t row_bytes(int32_t type, int64_t size) {
    return type == CRATON_I8 ? row_length<Code>(size) : size * (type == CRATON_F32 ? 4 : 2);
}
CRATON_INLINE float scale_of(const Code* row, int64_t size) {
    float scale;
    memcpy(&scale, row + size, 4);
    return scale;
}

constexpr int kCacheTypes = 4;  // a cache's craton_type is below this

// The query heads of one row that share a key head, over the keys begin .. end - 1, which lie in one chunk (a chunk
// begins at a multiple of kChunkKeys). Whole blocks of keys are read, so there must be room for them.
//     maxima[head] = m, the largest score        totals[head] = sum of e^(score - m)
//     out[head] = sum of e^(score - m) * value
struct AttentionChunk {
    const float* queries;      // [heads][size]
    const void *keys, *values; // of this key head, from position 0 on: [position][row]
    int64_t heads, size, begin, end;
    float scale, softcap;      // softcap 0: none
    float *maxima, *totals, *out;
};

// What the chunks of one head left, in order.
struct ChunkResults {
    const float *maxima, *totals, *out;
    int64_t chunks, number_stride, out_stride;
};

// One query's products with keys 0 .. count - 1, of which it sees begin .. end - 1; count is a multiple of 16. They become
// e^(scale * product - the largest of those), and 0 for what it does not see; their sum is given.
struct Scores {
    float* values;
    int64_t count, begin, end;
    float scale, softcap;  // softcap 0: none
};

struct RowMath {
    void (*activate)(Activation kind, const float* gate, const float* up, int64_t count, float* out);  // up may be null
    void (*soft_cap)(float cap, float* x, int64_t count);
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t count, float* out);
    void (*attend[kCacheTypes])(const AttentionChunk& chunk);  // indexed by the cache's craton_type
    void (*join_chunks)(const ChunkResults& from, int64_t size, float* out);
    void (*keep[kCacheTypes])(const float* from, int64_t count, void* to);  // a row; indexed by the cache's craton_type
    float (*weigh)(const Scores& scores);
};

extern const RowMath portable_rows;
#if defined(__x86_64__)
extern const RowMath avx2_rows, avx512_rows;
#endif

}  // namespace craton
