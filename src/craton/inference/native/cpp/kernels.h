// What differs from one instruction set to the next: a table of inner loops, chosen once by what the CPU can do.
//
// Every table gives the same bits. The integer dot product of a group is exact; in fp32 a sum is
//     sum = fma(float(dot), weight_scale * activation_scale, sum), then for Q4_1 sum = fma(minimum, term, sum)
// group after group, from zero, in every kernel and whatever else is computed beside it.
#pragma once

#include "activations.h"
#include "dequantize.h"
#include "layout.h"
#include "rows.h"

namespace craton {

constexpr int64_t kStripBlocks = 2;  // blocks that a kernel takes at once, so that they share the activations' loads
constexpr int64_t kStripRows = kStripBlocks * kBlockRows;

struct Strip {
    const uint8_t* blocks;  // `count` blocks, one after another
    int64_t count;          // 1 or 2
    int64_t groups;
    const uint8_t* next;  // the weights to be read next: fetched meanwhile. Null: nothing to fetch
};

struct Kernels {
    const char* name;
    bool (*supported)();

    // sums[row * kStripRows + weight row], for every row of the tile.
    void (*multiply[kFormats])(const Strip& strip, const uint8_t* tile, int64_t width, float* sums);

    // Indexed by format, then by craton_type.
    void (*quantize[kFormats][2])(const void* x, int64_t groups, uint8_t* tile, int64_t width, int64_t row,
                                  int64_t parts);
    void (*dequantize[kFormats][2])(const uint8_t* block, int64_t groups, int64_t row, void* out);

    const RowMath& rows;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512vnni_kernels;
#endif

const Kernels& kernels();               // the best that this CPU supports, unless one was selected
bool select_kernels(const char* name);  // false: no such kernels, or not on this CPU

// The entries that are the same C++ for every instruction set, compiled for each by `TARGET` (a function attribute).
#define CRATON_ROW_FUNCTIONS(TARGET)                                                                                \
    template <Format format, typename T>                                                                            \
    TARGET void quantize(const void* x, int64_t groups, uint8_t* tile, int64_t width, int64_t row, int64_t parts) { \
        quantize_row<format>(static_cast<const T*>(x), groups, tile, width, row, parts);                            \
    }                                                                                                               \
    template <Format format, typename T>                                                                            \
    TARGET void dequantize(const uint8_t* block, int64_t groups, int64_t row, void* out) {                          \
        dequantize_row<format>(block, groups, row, static_cast<T*>(out));                                           \
    }

#define CRATON_EACH_FORMAT_AND_TYPE(function)                                                                          \
    {{function<Q4_0, float>, function<Q4_0, BFloat>},                                                                  \
     {function<Q4_1, float>, function<Q4_1, BFloat>},                                                                  \
     {function<Q8_0, float>, function<Q8_0, BFloat>}}

}  // namespace craton
