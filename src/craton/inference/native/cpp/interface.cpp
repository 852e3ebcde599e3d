// The C functions of craton_native.h: check what came in, call the kernels, let no exception out.
#include <algorithm>
#include <new>

#include "craton_native.h"
#include "kernels.h"
#include "linear.h"
#include "pack.h"
#include "pool.h"
#include "step.h"
#include "strips.h"

namespace craton {
namespace {

bool is_type(int32_t type) { return type == CRATON_F32 || type == CRATON_BF16; }

bool have_parts(int32_t parts) { return parts == 1 || parts == 2 || (parts == 0 && tile_math()); }

int32_t clamp_threads(int32_t threads) { return std::clamp(threads, 1, kMostThreads); }

template <typename Work>
int32_t guarded(const Work& work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        return CRATON_NO_MEMORY;
    }
    return CRATON_OK;
}

}  // namespace
}  // namespace craton

using namespace craton;

int32_t craton_abi_version(void) { return CRATON_ABI_VERSION; }

const char* craton_isa(void) { return kernels().name; }

int32_t craton_select_isa(const char* name) { return select_kernels(name) ? CRATON_OK : CRATON_BAD_ARGUMENT; }

int32_t craton_has_tiles(void) { return tile_math() != nullptr; }

int64_t craton_packed_bytes(int32_t format, int64_t rows, int64_t columns) {
    Weight weight;
    if (!check({nullptr, rows, columns, format}, weight)) return -1;
    return weight.blocks() * block_bytes(weight.format, weight.groups);
}

int32_t craton_pack(int32_t format, int64_t rows, int64_t columns, const uint8_t* blocks, int64_t row_bytes,
                    uint8_t* packed, int32_t threads) {
    Weight weight;
    if (!check({packed, rows, columns, format}, weight)) return CRATON_BAD_ARGUMENT;
    if (row_bytes < weight.groups * gguf_group_bytes(weight.format)) return CRATON_BAD_ARGUMENT;
    return guarded([&] { pack(weight, blocks, row_bytes, packed, clamp_threads(threads)); });
}

int32_t craton_linear(const craton_weight* weight, const void* x, int64_t m, int64_t x_stride, int32_t x_type,
                      int32_t parts, const float* bias, void* y, int64_t y_stride, int32_t y_type, int32_t threads) {
    Weight checked;
    if (!check(*weight, checked) || m < 0 || !is_type(x_type) || !is_type(y_type)) return CRATON_BAD_ARGUMENT;
    if (!have_parts(parts)) return CRATON_BAD_ARGUMENT;
    return guarded([&] {
        linear(checked, {x, m, x_stride, craton_type(x_type)}, parts, bias, {y, m, y_stride, craton_type(y_type)},
               clamp_threads(threads));
    });
}

int32_t craton_rows(const craton_weight* weight, const int64_t* ids, int64_t count, void* out, int32_t out_type,
                    int32_t threads) {
    Weight checked;
    if (!check(*weight, checked) || count < 0 || !is_type(out_type)) return CRATON_BAD_ARGUMENT;
    if (!ids && count > checked.rows) return CRATON_BAD_ARGUMENT;
    const auto in_range = [&](int64_t id) { return id >= 0 && id < checked.rows; };
    if (ids && !std::all_of(ids, ids + count, in_range)) return CRATON_BAD_ARGUMENT;
    return guarded([&] { unpack_rows(checked, ids, count, out, craton_type(out_type), clamp_threads(threads)); });
}

int32_t craton_step(const craton_model* model, const craton_cache* cache, const craton_step_rows* rows, float* logits,
                    int32_t threads) {
    if (!model || !cache || !rows || rows->count < 0 || rows->count > kMostRows) return CRATON_BAD_ARGUMENT;
    if (rows->logits < 0 || rows->logits > rows->count || !have_parts(rows->parts)) return CRATON_BAD_ARGUMENT;
    if (rows->count > 0 && (!rows->ids || !rows->positions || !rows->slots)) return CRATON_BAD_ARGUMENT;
    if (rows->logits > 0 && !logits) return CRATON_BAD_ARGUMENT;
    int32_t status = CRATON_OK;
    const int32_t failed = guarded([&] {
        CheckedModel checked;
        if (!check(*model, checked) || !check(checked, *cache, *rows)) {
            status = CRATON_BAD_ARGUMENT;
        } else {
            step(checked, *cache, *rows, logits, clamp_threads(threads));
        }
    });
    return failed == CRATON_OK ? status : failed;
}
