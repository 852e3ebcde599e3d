// The plain C interface of Craton's native kernels: what Python reaches through ctypes.
//
// Everything is data pointers and sizes; strides count elements, not bytes. Functions that can refuse return a
// craton_status. Any thread may call any function at any time; no memory of the caller is kept after the return.
#pragma once

#include <stdint.h>

#define CRATON_API extern "C" __attribute__((visibility("default")))

// Raised whenever a signature or the packed layout below changes; Python refuses a library of another version.
enum { CRATON_ABI_VERSION = 5 };

enum craton_status {
    CRATON_OK = 0,
    CRATON_BAD_ARGUMENT = 1,  // an unknown format, ISA or type, a size that does not fit, a row out of range
    CRATON_NO_MEMORY = 2,
};

// Numbers of GGML's tensor types, so that a GGUF file's own number can be passed through.
enum craton_format { CRATON_Q4_0 = 2, CRATON_Q4_1 = 3, CRATON_Q8_0 = 8 };

enum craton_type { CRATON_F32 = 0, CRATON_BF16 = 1, CRATON_F16 = 2, CRATON_I8 = 3 };  // the last two: of a cache only

enum craton_activation { CRATON_SILU = 0, CRATON_GELU_TANH = 1, CRATON_GELU = 2, CRATON_RELU = 3 };

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

// Whether there is a matrix unit (tiles.h) besides, whatever the instruction set in use.
CRATON_API int32_t craton_has_tiles(void);

// Bytes of a packed matrix, or -1 if its shape or format cannot be packed.
CRATON_API int64_t craton_packed_bytes(int32_t format, int64_t rows, int64_t columns);

// Pack GGUF blocks, `rows` rows that each lie `row_bytes` after the one before, into `packed`.
CRATON_API int32_t craton_pack(int32_t format, int64_t rows, int64_t columns, const uint8_t* blocks, int64_t row_bytes,
                               uint8_t* packed, int32_t threads);

// y[m, rows] = x[m, columns] @ weight.T + bias; bias is fp32 or null. y must not overlap x. x is quantised to int8
// numbers, `parts` (1 or 2) for each of its values: 8 or about 15 bits. With 0 parts, which need craton_has_tiles, both
// are rounded to bfloat16: for many rows.
CRATON_API int32_t craton_linear(const craton_weight* weight, const void* x, int64_t m, int64_t x_stride,
                                 int32_t x_type, int32_t parts, const float* bias, void* y, int64_t y_stride,
                                 int32_t y_type, int32_t threads);

// Write weight row ids[i] to out[i, columns]; without ids, rows 0 .. count - 1.
CRATON_API int32_t craton_rows(const craton_weight* weight, const int64_t* ids, int64_t count, void* out,
                               int32_t out_type, int32_t threads);

// y = x @ weight.T + bias; bias is fp32 or null. Without rows: there is no such product here.
struct craton_projection {
    struct craton_weight weight;
    const float* bias;
};

// An RMSNorm, x / sqrt(mean(x^2) + eps) * scale; scale null: no norm here.
struct craton_norm {
    const float* scale;
    float eps;
};

// Rotary embedding of a head's first `dims` numbers; frequencies [dims / 2] are radians per position, cos and sin are
// multiplied by `factor`. interleaved: pairs are (0, 1), (2, 3) .. and not (0, dims / 2), (1, dims / 2 + 1) ..
struct craton_rotary {
    const float* frequencies;
    int32_t dims, interleaved;
    float factor;
};

// One block. A norm may stand at a branch's input, at its output, or on the residual stream after it was added.
struct craton_layer {
    struct craton_projection qkv[3];  // queries, keys and values as one product, or as three
    struct craton_projection o, gate, up, down;  // without a gate: down(activation(up))
    struct craton_norm attention_norms[3], feedforward_norms[3];
    struct craton_norm q_norm, k_norm;
    int32_t heads, kv_heads, head_size;
    int32_t norm_over_width;  // q_norm and k_norm are over all heads at once and not over each
    int32_t window;           // keys that a query sees, its own among them; 0: all
    int32_t rotary;           // a number of the model's rotaries, or -1
    int32_t activation;       // craton_activation
    float scale, softcap;     // of q.k; softcap 0: none
};

// A causal language model. The embedding is packed, or fp32 [vocabulary, width] (then embedding.data is null).
struct craton_model {
    const struct craton_layer* layers;
    const struct craton_rotary* rotaries;
    int32_t layer_count, rotary_count;
    struct craton_weight embedding;
    const float* embedding_table;
    float embedding_scale;
    struct craton_norm final_norm;
    struct craton_projection head;
    float logit_softcap;  // 0: none
    int32_t parts;        // 1 or 2: the arithmetic of the head's product, see craton_linear
};

// Keys and values [slots, kv_heads, capacity, head_size] of each layer; capacity is a multiple of 16. CRATON_I8: a row is
// head_size int8 codes and behind them the fp32 scale that they are multiplied with, head_size + 4 bytes.
struct craton_cache {
    void* const* keys;
    void* const* values;
    int64_t slots, capacity;
    int32_t layers, type;
};

// Token ids[i] at positions[i] of slot slots[i], for each of `count` rows, at most 256. A row sees its slot's positions up
// to its own, those of the same call among them, so rows of one slot may follow one another. The last `logits` rows get
// logits. parts: the arithmetic of the layers' products (see craton_linear); the head's is the model's.
struct craton_step_rows {
    const int64_t *ids, *positions, *slots;
    int64_t count, logits;
    int32_t parts;
};

// Run the rows through the model: their keys and values go to the cache, logits to logits[rows->logits, vocabulary].
CRATON_API int32_t craton_step(const struct craton_model* model, const struct craton_cache* cache,
                               const struct craton_step_rows* rows, float* logits, int32_t threads);
