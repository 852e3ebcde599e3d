// Grouped-query attention of a step's rows over the cache.
#pragma once

#include "pool.h"
#include "step.h"

namespace craton {

// The rows' keys and values to layer `number` of the cache.
void write_to_cache(const Layer& layer, int32_t number, const craton_cache& cache, const StepRows& rows,
                    const float* qkv);

// Floats of scratch that `attention` needs for these rows.
int64_t attention_scratch(const Layer& layer, const StepRows& rows);

// qkv [rows][q_size + 2 kv_size]: queries, keys and values, normed and rotated. Writes keys and values to layer
// `number` of the cache, then each row's softmax(q.k) v to out [rows][q_size].
void attention(const Layer& layer, int32_t number, const craton_cache& cache, const StepRows& rows, const float* qkv,
               float* scratch, float* out, int32_t threads);

}  // namespace craton
