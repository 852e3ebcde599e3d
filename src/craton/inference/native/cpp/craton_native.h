// The plain C interface of Craton's native kernels: what Python reaches through ctypes.
//
// Everything is data pointers and sizes; strides count elements, not bytes. Functions that can refuse return a
// craton_status. Any thread may call any function at any time; no memory of the caller is kept after the return.
#pragma once

#include <stdint.h>

#define CRATON_API extern "C" __attribute__((visibility("default")))

// Raised whenever a signature or the packed layout below changes; Python refuses a library of another version.
enum { CRATON_ABI_VERSION = 2 };

enum craton_status {
    CRATON_OK = 0,
    CRATON_BAD_ARGUMENT = 1,  // an unknown format, ISA or type, a size that does not fit, a row out of range
    CRATON_NO_MEMORY = 2,
};

// Numbers of GGML's tensor types, so that a GGUF file's own number can be passed through.
enum craton_format { CRATON_Q4_0 = 2, CRATON_Q4_1 = 3, CRATON_Q8_0 = 8 };

enum craton_type { CRATON_F32 = 0, CRATON_BF16 = 1 };

// A packed weight matrix of `rows` outputs and `columns` inputs; layout.h describes the bytes.
struct craton_weight {
    const uint8_t* data;
    int64_t rows, columns;
    int32_t format;
};

CRATON_API int32_t craton_abi_version(void);

// The instruction set in use ("avx512vnni", "avx2" or "portable"), and a way for tests to choose a lesser one.
CRATON_API const char* craton_isa(void);
CRATON_API int32_t craton_select_isa(const char* name);

// Bytes of a packed matrix, or -1 if its shape or format cannot be packed.
CRATON_API int64_t craton_packed_bytes(int32_t format, int64_t rows, int64_t columns);

// Pack GGUF blocks, `rows` rows that each lie `row_bytes` after the one before, into `packed`.
CRATON_API int32_t craton_pack(int32_t format, int64_t rows, int64_t columns, const uint8_t* blocks, int64_t row_bytes,
                               uint8_t* packed, int32_t threads);

// y[m, rows] = x[m, columns] @ weight.T + bias; bias is fp32 or null. y must not overlap x. x is quantised to int8
// numbers, `parts` (1 or 2) for each of its values: 8 or about 15 bits.
CRATON_API int32_t craton_linear(const craton_weight* weight, const void* x, int64_t m, int64_t x_stride,
                                 int32_t x_type, int32_t parts, const float* bias, void* y, int64_t y_stride,
                                 int32_t y_type, int32_t threads);

// Write weight row ids[i] to out[i, columns]; without ids, rows 0 .. count - 1.
CRATON_API int32_t craton_rows(const craton_weight* weight, const int64_t* ids, int64_t count, void* out,
                               int32_t out_type, int32_t threads);
