#include "linear.h"

#include <algorithm>
#include <vector>

#include "pool.h"
#include "strips.h"

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

// Strips begin .. end of the weight times the slab, plus the bias, to their places in y.
template <typename T>
void multiply_to(const Weight& weight, const Slab& slab, const float* bias, T* y, int64_t stride, int64_t begin,
                 int64_t end) {
    const auto put = [&](int64_t row, int64_t first, int64_t outputs, const float* sums) {
        T* out = y + row * stride + first;
        for (int64_t n = 0; n < outputs; ++n) {
            const float sum = whole_sum(sums, slab.parts, n);
            store_float(out + n, bias ? sum + bias[first + n] : sum);
        }
    };
    multiply_strips(weight, slab, begin, end, put);
}

}  // namespace

void linear(const Weight& weight, const Rows<const void>& x, int64_t parts, const float* bias, const Rows<void>& y,
            int32_t threads) {
    thread_local std::vector<uint8_t> scratch;
    const int64_t row_bytes = weight.groups * kTileGroupBytes, columns = weight.groups * kGroup;
    const int64_t most_rows = std::min(slab_rows(row_bytes), x.count * parts);  // quantised ones; even with two parts
    if (int64_t(scratch.size()) < most_rows * row_bytes) scratch.resize(size_t(most_rows * row_bytes));

    for (int64_t first = 0; first < x.count; first += most_rows / parts) {
        const Slab slab{scratch.data(), std::min(most_rows / parts, x.count - first), parts, weight.groups};
        parallel_for(threads, slab.count, kValuesPerThread / columns + 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                quantize_row(weight.format, x.type, element(x, first + i), slab, i);
            }
        });
        const int64_t grain = kMacsPerThread / (slab.rows() * columns * kStripRows) + 1;
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
