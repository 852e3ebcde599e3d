#include "linear.h"

#include <algorithm>

#include "pool.h"
#include "strips.h"

namespace craton {
namespace {

// Activations are taken a slab of rows at a time: enough rows to use each weight often, few enough for the L2 cache.
constexpr int64_t kSlabBytes = 512 << 10;
constexpr int64_t kFewestSlabRows = 32;

// Work below which another thread is not worth its wake-up: about two microseconds.
constexpr int64_t kMacsPerThread = 128 << 10;
constexpr int64_t kValuesPerThread = 16 << 10;

int64_t slab_rows(int64_t parts, int64_t groups) {
    const int64_t fitting = kSlabBytes / Slab::bytes(kTileLines, parts, groups) * kTileLines;
    return std::clamp(fitting, kFewestSlabRows, kMostRows);
}

const uint8_t* element(const Rows<const void>& rows, int64_t row) {
    return static_cast<const uint8_t*>(rows.data) + row * rows.stride * (rows.type == CRATON_F32 ? 4 : 2);
}

// Strips begin .. end of the weight times the slab, plus the bias, to their places in y.
template <typename T>
void multiply_to(const Weight& weight, const Slab& slab, const float* bias, T* y, int64_t stride, int64_t begin,
                 int64_t end) {
    alignas(kVectorBytes) float sums[kMostRows * kStripRows];
    for (int64_t s = begin; s < end; ++s) {
        multiply_strip(weight, s, slab, sums);
        const int64_t first = s * kStripRows, outputs = std::min(kStripRows, weight.rows - first);
        for (int64_t row = 0; row < slab.count; ++row) {
            T* out = y + row * stride + first;
            const float* sum = sums + row * kStripRows;
            for (int64_t n = 0; n < outputs; ++n) store_float(out + n, bias ? sum[n] + bias[first + n] : sum[n]);
        }
    }
}

}  // namespace

void linear(const Weight& weight, const Rows<const void>& x, int64_t parts, const float* bias, const Rows<void>& y,
            int32_t threads) {
    thread_local Buffer<uint8_t> scratch;
    const int64_t columns = weight.groups * kGroup, most_rows = std::min(slab_rows(parts, weight.groups), x.count);
    uint8_t* const data = scratch.get(Slab::bytes(most_rows, parts, weight.groups));

    for (int64_t first = 0; first < x.count; first += most_rows) {
        const Slab slab{data, std::min(most_rows, x.count - first), parts, weight.groups};
        parallel_for(threads, slab.count, kValuesPerThread / columns + 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                store_row(weight.format, x.type, element(x, first + i), slab, i, 0, weight.groups);
            }
        });
        const int64_t grain = kMacsPerThread / (slab.count * columns * kStripRows) + 1;
        parallel_for(threads, strip_count(weight), grain, [&](int64_t begin, int64_t end) {
            if (y.type == CRATON_F32) {
                float* out = static_cast<float*>(y.data) + first * y.stride;
                multiply_to(weight, slab, bias, out, y.stride, begin, end);
            } else {
                BFloat* out = static_cast<BFloat*>(y.data) + first * y.stride;
                multiply_to(weight, slab, bias, out, y.stride, begin, end);
            }
        });
    }
}

}  // namespace craton
