// Every kernel on odd shapes, in buffers of exactly the right size, for the sanitisers to watch. Prints "done", or
// aborts.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "craton_native.h"

namespace {

void expect(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "failed: %s\n", what);
    abort();
}

struct Case {
    std::vector<uint8_t> packed;
    craton_weight weight;
};

int64_t gguf_group_bytes(int32_t format) { return format == CRATON_Q4_0 ? 18 : format == CRATON_Q4_1 ? 20 : 34; }

Case make(int32_t format, int64_t rows, int64_t columns, std::mt19937& random) {
    const int64_t row_bytes = columns / 32 * gguf_group_bytes(format);
    std::vector<uint8_t> blocks(size_t(rows * row_bytes));
    for (uint8_t& byte : blocks) byte = uint8_t(random());  // any bytes are blocks: scales may be NaN and infinite
    Case made;
    made.packed.resize(size_t(craton_packed_bytes(format, rows, columns)));
    expect(craton_pack(format, rows, columns, blocks.data(), row_bytes, made.packed.data(), 3) == CRATON_OK, "pack");
    made.weight = {made.packed.data(), rows, columns, format};
    return made;
}

void multiply_and_unpack(const craton_weight& weight, int64_t m, int32_t type, int32_t parts, std::mt19937& random) {
    const int64_t n = weight.rows, k = weight.columns, size = type == CRATON_F32 ? 4 : 2;
    std::vector<uint8_t> x(size_t(m * k * size));
    for (uint8_t& byte : x) byte = uint8_t(random());  // any bytes are floats: NaN, infinite and subnormal among them
    std::vector<float> bias(static_cast<size_t>(n), 1.0f);
    std::vector<uint8_t> expected, y(size_t(m * n * size)), rows(size_t(n * k * size)), expected_rows;
    for (const char* isa : {"portable", "avx2", "avx512vnni"}) {
        if (craton_select_isa(isa) != CRATON_OK) continue;
        for (int32_t threads : {1, 3}) {
            expect(craton_linear(&weight, x.data(), m, k, type, parts, bias.data(), y.data(), n, type, threads) ==
                       CRATON_OK,
                   "linear");
            expect(craton_rows(&weight, nullptr, n, rows.data(), type, threads) == CRATON_OK, "rows");
            if (type == CRATON_BF16) {  // a NaN has one form there, so all bits agree
                if (expected.empty()) expected = y, expected_rows = rows;
                expect(y == expected && rows == expected_rows, isa);
            }
        }
    }
    expect(craton_linear(&weight, x.data(), m, k, type, 0, bias.data(), y.data(), n, type, 3) ==
               (craton_has_tiles() ? CRATON_OK : CRATON_BAD_ARGUMENT),
           "linear in bfloat16");
    const int64_t ids[] = {n - 1, 0};
    expect(craton_rows(&weight, ids, 2, std::vector<uint8_t>(size_t(2 * k * size)).data(), type, 2) == CRATON_OK,
           "ids");
    const int64_t outside[] = {n};
    expect(craton_rows(&weight, outside, 1, rows.data(), type, 2) == CRATON_BAD_ARGUMENT, "an id out of range");
}

int64_t pick(std::mt19937& random, int64_t low, int64_t high) { return low + int64_t(random() % uint64_t(high - low + 1)); }

// A random model, its weights and its cache in buffers of exactly the right size.
struct StepCase {
    std::vector<Case> made;
    std::vector<std::vector<float>> floats;
    std::vector<std::vector<uint8_t>> memory;
    std::vector<craton_layer> layers;
    std::vector<craton_rotary> rotaries;
    std::vector<void*> keys, values;
    craton_model model{};
    craton_cache cache{};
    std::mt19937& random;

    explicit StepCase(std::mt19937& generator) : random(generator) {
        made.reserve(100), floats.reserve(100), memory.reserve(20), layers.reserve(3);
        const int64_t width = 32 * pick(random, 1, 4), vocabulary = pick(random, 1, 70);
        cache = {nullptr, nullptr, pick(random, 1, 3), 16 * pick(random, 1, 12), int32_t(pick(random, 0, 2)),
                 int32_t(pick(random, 0, 3))};
        for (int i = 0; i < cache.layers; ++i) add_layer(width);
        cache.keys = keys.data(), cache.values = values.data();
        const craton_projection table = project(vocabulary, width);
        model.layers = layers.data(), model.layer_count = cache.layers;
        model.rotaries = rotaries.data(), model.rotary_count = int32_t(rotaries.size());
        model.embedding = table.weight, model.embedding_scale = 1, model.parts = int32_t(pick(random, 1, 2));
        model.final_norm = norm(width), model.head = table;
        model.logit_softcap = random() % 2 ? 5.0f : 0.0f;
    }

    const float* numbers(int64_t count) {
        floats.emplace_back(size_t(count));
        for (float& number : floats.back()) number = float(random() % 200) / 100 - 1;
        return floats.back().data();
    }
    craton_norm norm(int64_t size) { return {random() % 2 ? numbers(size) : nullptr, 1e-6f}; }
    craton_projection project(int64_t rows, int64_t columns) {
        const int32_t formats[] = {CRATON_Q4_0, CRATON_Q4_1, CRATON_Q8_0};
        made.push_back(make(formats[random() % 3], rows, columns, random));
        return {made.back().weight, random() % 2 ? numbers(rows) : nullptr};
    }
    void add_layer(int64_t width) {
        craton_layer layer{};
        const int64_t size = 16 * pick(random, 1, 5), groups = 2 * pick(random, 1, 2), heads = groups * pick(random, 1, 5);
        layer.heads = int32_t(heads), layer.kv_heads = int32_t(groups), layer.head_size = int32_t(size);
        if (random() % 2) {
            layer.qkv[0] = project((heads + 2 * groups) * size, width);
        } else {
            layer.qkv[0] = project(heads * size, width);
            layer.qkv[1] = project(groups * size, width), layer.qkv[2] = project(groups * size, width);
        }
        const int64_t hidden = 32 * pick(random, 1, 5);
        layer.o = project(width, heads * size), layer.up = project(hidden, width);
        if (random() % 2) layer.gate = project(hidden, width);
        layer.down = project(width, hidden);
        for (int i = 0; i < 3; ++i) layer.attention_norms[i] = norm(width), layer.feedforward_norms[i] = norm(width);
        layer.norm_over_width = random() % 2;
        if (random() % 2) {
            layer.q_norm = {numbers(layer.norm_over_width ? heads * size : size), 1e-6f};
            layer.k_norm = {numbers(layer.norm_over_width ? groups * size : size), 1e-6f};
        }
        layer.window = random() % 2 ? int32_t(pick(random, 1, 200)) : 0;
        layer.activation = int32_t(random() % 4);
        layer.scale = 0.3f, layer.softcap = random() % 2 ? 4.0f : 0.0f;
        layer.rotary = -1;
        if (random() % 2) {
            layer.rotary = int32_t(rotaries.size());
            const int32_t dims = 2 * int32_t(pick(random, 1, size / 2));
            rotaries.push_back({numbers(dims / 2), dims, int32_t(random() % 2), 1.0f});
        }
        layers.push_back(layer);
        const int64_t row = cache.type == CRATON_I8 ? size + 4 : size * (cache.type == CRATON_F32 ? 4 : 2);
        const size_t bytes = size_t(cache.slots * groups * cache.capacity * row);
        for (std::vector<void*>* pointers : {&keys, &values}) {
            memory.emplace_back(bytes);
            pointers->push_back(memory.back().data());
        }
    }
};

// Rows up to the last place of the cache, with weights of any bytes: NaN and infinities among their scales.
void step_at_random(std::mt19937& random) {
    StepCase one(random);
    const int64_t rows = pick(random, 0, 20), vocabulary = one.model.embedding.rows;
    std::vector<int64_t> ids, positions, slots;
    for (int64_t i = 0; i < rows; ++i) {
        ids.push_back(pick(random, 0, vocabulary - 1));
        positions.push_back(random() % 4 ? pick(random, 0, one.cache.capacity - 1) : one.cache.capacity - 1);
        slots.push_back(pick(random, 0, one.cache.slots - 1));
    }
    craton_step_rows asked{ids.data(), positions.data(), slots.data(), rows, pick(random, 0, rows), int32_t(pick(random, 1, 2))};
    std::vector<float> logits(size_t(asked.logits * vocabulary));
    for (const char* isa : {"portable", "avx2", "avx512vnni"}) {
        if (craton_select_isa(isa) != CRATON_OK) continue;
        for (int32_t threads : {1, 3}) {
            expect(craton_step(&one.model, &one.cache, &asked, logits.data(), threads) == CRATON_OK, "step");
        }
    }
    if (craton_has_tiles()) {
        asked.parts = 0;
        expect(craton_step(&one.model, &one.cache, &asked, logits.data(), 3) == CRATON_OK, "step of several texts");
        // One text, up to the cache's end.
        const int64_t count = pick(random, 0, std::min<int64_t>(one.cache.capacity, 256));
        std::vector<int64_t> texts(size_t(count), pick(random, 0, vocabulary - 1)), places;
        for (int64_t i = 0; i < count; ++i) places.push_back(one.cache.capacity - count + i);
        const std::vector<int64_t> same(size_t(count), pick(random, 0, one.cache.slots - 1));
        const craton_step_rows text{texts.data(), places.data(), same.data(), count, std::min<int64_t>(count, 1), 0};
        std::vector<float> last(size_t(text.logits * vocabulary));
        expect(craton_step(&one.model, &one.cache, &text, last.data(), 2) == CRATON_OK, "step of a prompt");
    }
    if (rows == 0) return;
    const std::pair<std::vector<int64_t>*, int64_t> ends[] = {
        {&ids, vocabulary}, {&positions, one.cache.capacity}, {&slots, one.cache.slots}};
    for (const auto& [numbers, end] : ends) {
        for (int64_t outside : {int64_t(-1), end}) {
            const int64_t before = numbers->back();
            numbers->back() = outside;
            expect(craton_step(&one.model, &one.cache, &asked, logits.data(), 2) == CRATON_BAD_ARGUMENT,
                   "a row out of range");
            numbers->back() = before;
        }
    }
}

}  // namespace

int main() {
    std::mt19937 random(1);
    for (int32_t format : {CRATON_Q4_0, CRATON_Q4_1, CRATON_Q8_0}) {
        for (int64_t rows : {1, 16, 17, 33, 80}) {
            for (int64_t columns : {32, 96}) {
                const Case made = make(format, rows, columns, random);
                for (int64_t m : {0, 1, 2, 3, 7, 8, 21}) {
                    for (int32_t parts : {1, 2}) {
                        multiply_and_unpack(made.weight, m, CRATON_F32, parts, random);
                        multiply_and_unpack(made.weight, m, CRATON_BF16, parts, random);
                    }
                }
            }
        }
        expect(craton_packed_bytes(format, 4, 33) == -1 && craton_packed_bytes(format, -1, 32) == -1, "bad shapes");
    }

    for (int turn = 0; turn < 60; ++turn) step_at_random(random);

    // Several callers at once, each with more threads than there are processors.
    const Case shared = make(CRATON_Q8_0, 3000, 96, random);
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&shared] {
            std::vector<float> x(5 * 96, 1.0f), y(5 * 3000);
            for (int turn = 0; turn < 50; ++turn) {
                expect(craton_linear(&shared.weight, x.data(), 5, 96, CRATON_F32, 2, nullptr, y.data(), 3000,
                                     CRATON_F32, 4) == CRATON_OK,
                       "linear beside others");
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    puts("done");
}
