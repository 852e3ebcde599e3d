// Attention of a prompt: many rows of one sequence over its cache, on the matrix unit.
#pragma once

#include "step.h"

namespace craton {

// Whether these rows are one sequence's, one position after another, and there is a unit for them.
bool is_prompt(const StepRows& rows);

// What `attention` does (attention.h), in bfloat16, for rows that are a prompt.
void prompt_attention(const Layer& layer, int32_t number, const craton_cache& cache, const StepRows& rows,
                      const float* qkv, float* out, int32_t threads);

}  // namespace craton
