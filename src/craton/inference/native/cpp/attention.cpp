#include "attention.h"

#include <algorithm>

#include "kernels.h"
#include "numbers.h"
#include "strips.h"

namespace craton {
namespace {

// Multiplications below which a second thread is not worth its part.
constexpr int64_t kMacsPerThread = 64 << 10;

// The keys that the row at `position` sees: begin .. position, in chunks that begin at fixed positions. So a row's
// numbers depend neither on the threads nor on the other rows.
struct Span {
    int64_t begin, end;

    Span(const craton_layer& settings, int64_t position)
        : begin(settings.window ? std::max<int64_t>(0, position - settings.window + 1) : 0), end(position + 1) {}

    int64_t first_chunk() const { return begin / kChunkKeys; }
    int64_t chunks() const { return (end + kChunkKeys - 1) / kChunkKeys - first_chunk(); }
};

void write_heads(const craton_cache& cache, const float* from, int64_t heads, int64_t size, int64_t slot,
                 int64_t position, void* to) {
    for (int64_t h = 0; h < heads; ++h, from += size) {
        const int64_t row = (slot * heads + h) * cache.capacity + position;
        kernels().rows.keep[cache.type](from, size, static_cast<uint8_t*>(to) + row * row_bytes(cache.type, size));
    }
}

}  // namespace

void write_to_cache(const Layer& layer, int32_t number, const craton_cache& cache, const StepRows& rows,
                    const float* qkv) {
    const int64_t heads = layer.settings->kv_heads, size = layer.settings->head_size;
    for (int64_t i = 0; i < rows.count; ++i) {
        const float* k = qkv + i * layer.qkv_size() + layer.q_size();
        write_heads(cache, k, heads, size, rows.slots[i], rows.positions[i], cache.keys[number]);
        write_heads(cache, k + layer.kv_size(), heads, size, rows.slots[i], rows.positions[i], cache.values[number]);
    }
}

int64_t attention_scratch(const Layer& layer, const StepRows& rows) {
    int64_t chunks = 0;
    for (int64_t i = 0; i < rows.count; ++i) chunks += Span(*layer.settings, rows.positions[i]).chunks();
    return chunks * layer.settings->heads * (layer.settings->head_size + 2);
}

void attention(const Layer& layer, int32_t number, const craton_cache& cache, const StepRows& rows, const float* qkv,
               float* scratch, float* out, int32_t threads) {
    const craton_layer& settings = *layer.settings;
    const RowMath& math = kernels().rows;
    const int64_t groups = settings.kv_heads, size = settings.head_size, together = settings.heads / groups;
    const int64_t q_size = layer.q_size(), qkv_size = layer.qkv_size();

    int64_t tasks[kMostRows + 1], keys = 0;  // tasks before each row: one for each key head and chunk
    tasks[0] = 0;
    write_to_cache(layer, number, cache, rows, qkv);
    for (int64_t i = 0; i < rows.count; ++i) {
        const Span span(settings, rows.positions[i]);
        tasks[i + 1] = tasks[i] + groups * span.chunks();
        keys += span.end - span.begin;
    }

    // A task leaves [together] maxima, [together] totals and [together][size] outputs.
    const int64_t task_floats = together * (size + 2);
    const auto attend = math.attend[cache.type];
    const int64_t grain = kMacsPerThread * tasks[rows.count] / (2 * keys * q_size) + 1;
    parallel_for(threads, tasks[rows.count], grain, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t row = std::upper_bound(tasks, tasks + rows.count + 1, task) - tasks - 1;
            const Span span(settings, rows.positions[row]);
            const int64_t group = (task - tasks[row]) / span.chunks();
            const int64_t first = (span.first_chunk() + (task - tasks[row]) % span.chunks()) * kChunkKeys;
            const int64_t head = (rows.slots[row] * groups + group) * cache.capacity * row_bytes(cache.type, size);
            float* results = scratch + task * task_floats;
            attend({qkv + row * qkv_size + group * together * size,
                    static_cast<const uint8_t*>(cache.keys[number]) + head,
                    static_cast<const uint8_t*>(cache.values[number]) + head, together, size,
                    std::max(first, span.begin), std::min(first + kChunkKeys, span.end), settings.scale,
                    settings.softcap, results, results + together, results + 2 * together});
        }
    });
    for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t chunks = (tasks[i + 1] - tasks[i]) / groups;
        for (int64_t h = 0; h < settings.heads; ++h) {
            const float* results = scratch + (tasks[i] + h / together * chunks) * task_floats;
            const int64_t place = h % together;
            math.join_chunks({results + place, results + together + place, results + 2 * together + place * size,
                              chunks, task_floats, task_floats},
                             size, out + i * q_size + h * size);
        }
    }
}

}  // namespace craton
