// The quantised linear layer: y = x @ weight.T + bias.
#pragma once

#include "layout.h"

namespace craton {

template <typename T>
struct Rows {
    T* data;
    int64_t count, stride;
    craton_type type;
};

// parts: 1 or 2 quantised rows for each row of x (activations.h), or 0: in bfloat16 (tiles.h), where there is a unit.
void linear(const Weight& weight, const Rows<const void>& x, int64_t parts, const float* bias, const Rows<void>& y,
            int32_t threads);

}  // namespace craton
