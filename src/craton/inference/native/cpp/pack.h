// GGUF blocks to the packed layout, and packed rows to floats.
#pragma once

#include "layout.h"

namespace craton {

void pack(const Weight& weight, const uint8_t* gguf, int64_t row_bytes, uint8_t* packed, int32_t threads);

// Rows ids[0 .. count) (0 .. count without ids), each below weight.rows, one after another.
void unpack_rows(const Weight& weight, const int64_t* ids, int64_t count, void* out, craton_type type, int32_t threads);

}  // namespace craton
