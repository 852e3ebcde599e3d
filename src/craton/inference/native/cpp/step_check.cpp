// What a step refuses to begin with.
#include <algorithm>

#include "rows.h"
#include "step.h"

namespace craton {
namespace {

constexpr int32_t kMostHeads = 1 << 16;

// rows < 0: any number of them.
bool check_projection(const craton_projection& projection, int64_t rows, int64_t columns, Projection& checked) {
    checked.bias = projection.bias;
    return check(projection.weight, checked.weight) && projection.weight.data && checked.weight.rows > 0 &&
           (rows < 0 || checked.weight.rows == rows) && checked.weight.groups * kGroup == columns;
}

bool absent(const craton_projection& projection, Projection& checked) {
    checked = {};
    return projection.weight.rows == 0;
}

bool check_attention(const craton_layer& from, int64_t width, Layer& layer) {
    if (from.heads < 1 || from.heads > kMostHeads || from.kv_heads < 1 || from.heads % from.kv_heads != 0) return false;
    if (from.head_size < 16 || from.head_size > kLargestHead || from.head_size % 16 != 0 || from.window < 0) return false;
    if ((from.q_norm.scale == nullptr) != (from.k_norm.scale == nullptr)) return false;
    if (layer.q_size() % kGroup != 0) return false;
    const bool joined = from.qkv[1].weight.rows == 0;
    if (joined) {
        if (!check_projection(from.qkv[0], layer.qkv_size(), width, layer.qkv[0])) return false;
        if (!absent(from.qkv[1], layer.qkv[1]) || !absent(from.qkv[2], layer.qkv[2])) return false;
    } else {
        for (int i = 0; i < 3; ++i) {
            if (!check_projection(from.qkv[i], i == 0 ? layer.q_size() : layer.kv_size(), width, layer.qkv[i])) {
                return false;
            }
        }
    }
    return check_projection(from.o, width, layer.q_size(), layer.o);
}

bool check_feedforward(const craton_layer& from, int64_t width, Layer& layer) {
    if (from.activation < CRATON_SILU || from.activation > CRATON_RELU) return false;
    if (!check_projection(from.up, -1, width, layer.up)) return false;
    const int64_t hidden = layer.up.weight.rows;
    if (!check_projection(from.down, width, hidden, layer.down)) return false;
    return absent(from.gate, layer.gate) || check_projection(from.gate, hidden, width, layer.gate);
}

}  // namespace

bool check(const craton_model& model, CheckedModel& checked) {
    checked.settings = &model;
    if (model.layer_count < 0 || (model.layer_count > 0 && !model.layers)) return false;
    if (model.parts != 1 && model.parts != 2) return false;
    if (model.rotary_count < 0 || (model.rotary_count > 0 && !model.rotaries)) return false;
    if (!check(model.embedding, checked.embedding) || checked.embedding.rows == 0) return false;
    if (!model.embedding.data && !model.embedding_table) return false;
    checked.width = checked.embedding.groups * kGroup;
    if (!check_projection(model.head, checked.embedding.rows, checked.width, checked.head)) return false;
    for (int32_t r = 0; r < model.rotary_count; ++r) {
        const craton_rotary& rotary = model.rotaries[r];
        if (!rotary.frequencies || rotary.dims < 2 || rotary.dims > kLargestHead || rotary.dims % 2) return false;
    }
    for (int32_t i = 0; i < model.layer_count; ++i) {
        const craton_layer& from = model.layers[i];
        Layer layer{&from, {}, {}, {}, {}, {}};
        if (!check_attention(from, checked.width, layer) || !check_feedforward(from, checked.width, layer)) return false;
        if (from.rotary < -1 || from.rotary >= model.rotary_count) return false;
        if (from.rotary >= 0 && model.rotaries[from.rotary].dims > from.head_size) return false;
        checked.layers.push_back(layer);
    }
    return true;
}

bool check(const CheckedModel& model, const craton_cache& cache, const StepRows& rows) {
    if (cache.type < CRATON_F32 || cache.type >= kCacheTypes || cache.layers != int64_t(model.layers.size())) return false;
    if (cache.slots < 0 || cache.capacity < 0 || cache.capacity % kKeyBlock != 0) return false;
    for (int32_t i = 0; i < cache.layers; ++i) {
        if (rows.count > 0 && (!cache.keys[i] || !cache.values[i])) return false;
    }
    const auto within = [&](const int64_t* numbers, int64_t end) {
        return std::all_of(numbers, numbers + rows.count, [&](int64_t n) { return n >= 0 && n < end; });
    };
    return within(rows.ids, model.embedding.rows) && within(rows.positions, cache.capacity) &&
           within(rows.slots, cache.slots);
}

}  // namespace craton
