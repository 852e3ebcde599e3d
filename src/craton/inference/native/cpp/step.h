// A whole decode step: embedding, layers, head.
#pragma once

#include <vector>

#include "layout.h"

namespace craton {

using StepRows = craton_step_rows;

struct Projection {
    Weight weight;  // without rows: none
    const float* bias;

    explicit operator bool() const { return weight.rows > 0; }
};

// A craton_layer whose products have been checked.
struct Layer {
    const craton_layer* settings;
    Projection qkv[3], o, gate, up, down;

    int64_t q_size() const { return int64_t(settings->heads) * settings->head_size; }
    int64_t kv_size() const { return int64_t(settings->kv_heads) * settings->head_size; }
    int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
    int64_t hidden() const { return down.weight.groups * kGroup; }
};

struct CheckedModel {
    const craton_model* settings;
    std::vector<Layer> layers;
    Weight embedding;
    Projection head;
    int64_t width;
};

// Whether a step can run: every shape fits its neighbours and no pointer is null. What pointers lead to is not looked
// at.
bool check(const craton_model& model, CheckedModel& checked);
// Whether ids, positions and slots lie in the vocabulary and in the cache.
bool check(const CheckedModel& model, const craton_cache& cache, const StepRows& rows);

void step(const CheckedModel& model, const craton_cache& cache, const StepRows& rows, float* logits, int32_t threads);

}  // namespace craton
