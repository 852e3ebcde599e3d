#include "prompt.h"

#include <algorithm>

#include "attention.h"
#include "kernels.h"
#include "pool.h"
#include "tiles.h"

namespace craton {
namespace {

// Rows that go through attention together: few, so that they see about the same keys.
constexpr int64_t kRowsTogether = 2 * kTileLines;

// One key head's keys and values as weights of two products: queries . keys and scores . values.
struct PackedHead {
    BFloat *keys, *values;
};

class PromptAttention {
public:
    PromptAttention(const Layer& layer, int32_t number, const craton_cache& cache, const StepRows& rows,
                    const float* qkv, float* out, int32_t threads)
        : layer_(layer), settings_(*layer.settings), cache_(cache), rows_(rows), qkv_(qkv), out_(out),
          threads_(threads), number_(number), size_(settings_.head_size), end_(rows.positions[rows.count - 1] + 1),
          first_(settings_.window ? std::max<int64_t>(0, rows.positions[0] - settings_.window + 1) / kGroup * kGroup : 0),
          groups_((end_ - first_ + kGroup - 1) / kGroup), size_groups_((size_ + kGroup - 1) / kGroup) {}

    void run() {
        thread_local Buffer<BFloat> memory;
        const int64_t head = groups_ * kTileNumbers * (size_groups_ * 2 + size_ / kBlockRows);
        BFloat* const packed = memory.get(head * settings_.kv_heads);
        const auto of = [&](int64_t group) {
            BFloat* keys = packed + group * head;
            return PackedHead{keys, keys + groups_ * size_groups_ * 2 * kTileNumbers};
        };
        parallel_for(threads_, settings_.kv_heads * groups_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) pack(i / groups_, i % groups_, of(i / groups_));
        });
        const int64_t blocks = (rows_.count + kRowsTogether - 1) / kRowsTogether;
        parallel_for(threads_, settings_.kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) attend(i / blocks, i % blocks * kRowsTogether, of(i / blocks));
        });
    }

private:
    // 32 keys and values of one head.
    void pack(int64_t head, int64_t group, const PackedHead& to) const {
        const int64_t key = first_ + group * kGroup, count = std::min(kGroup, end_ - key);
        const int64_t place = (rows_.slots[0] * settings_.kv_heads + head) * cache_.capacity + key;
        const int64_t bytes = row_bytes(cache_.type, size_);
        const uint8_t* keys = static_cast<const uint8_t*>(cache_.keys[number_]) + place * bytes;
        const uint8_t* values = static_cast<const uint8_t*>(cache_.values[number_]) + place * bytes;
        for (int64_t half = 0; half < 2; ++half) {
            tile_math()->pack_keys[cache_.type](keys + half * kBlockRows * bytes, count - half * kBlockRows,
                                                size_, to.keys + (group * 2 + half) * size_groups_ * kTileNumbers);
        }
        tile_math()->pack_values[cache_.type](values, count, size_, to.values + group * kTileNumbers,
                                              groups_ * kTileNumbers);
    }

    // The query heads of one key head, from row `row` on.
    void attend(int64_t head, int64_t row, const PackedHead& packed) const {
        thread_local Buffer<BFloat> query_memory, weight_memory;
        thread_local Buffer<float> score_memory, result_memory, total_memory;
        const int64_t together = settings_.heads / settings_.kv_heads, q_row = layer_.qkv_size();
        const int64_t count = std::min(kRowsTogether, rows_.count - row);
        const int64_t lines = round_up(count, kTileLines), tiles = together * lines / kTileLines;
        // Keys that one of these rows sees, in whole groups of 32.
        const int64_t skipped = (seen_from(row) - first_) / kGroup;
        const int64_t groups = (rows_.positions[row + count - 1] - first_) / kGroup + 1 - skipped;
        const int64_t keys = groups * kGroup;

        BFloat* const queries = query_memory.get(tiles * size_groups_ * kTileNumbers);
        float* const scores = score_memory.get(tiles * kTileLines * keys);
        each_query(together, count, lines, [&](int64_t h, int64_t i, int64_t line) {
            alignas(kVectorBytes) float padded[kLargestHead + kGroup] = {};
            std::copy_n(qkv_ + (row + i) * q_row + (head * together + h) * size_, size_, padded);
            tile_math()->round_row[CRATON_F32](padded, size_groups_, line_of(queries, line, size_groups_));
        });
        for (int64_t g = 0; g < groups; ++g) {
            const BFloat* strip = packed.keys + (skipped + g) * 2 * size_groups_ * kTileNumbers;
            tile_math()->multiply({queries, tiles, size_groups_, strip, 2, size_groups_ * kTileNumbers,
                                   scores + g * kGroup, keys});
        }
        BFloat* const weights = weight_memory.get(tiles * groups * kTileNumbers);
        float* const totals = total_memory.get(tiles * kTileLines);
        const int64_t from = first_ + skipped * kGroup;
        each_query(together, count, lines, [&](int64_t, int64_t i, int64_t line) {
            float* score = scores + line * keys;
            totals[line] = kernels().rows.weigh(
                {score, keys, std::max<int64_t>(0, seen_from(row + i) - from), rows_.positions[row + i] + 1 - from,
                 settings_.scale, settings_.softcap});
            tile_math()->round_row[CRATON_F32](score, groups, line_of(weights, line, groups));
        });
        const int64_t stride = round_up(size_, kStripRows);
        float* const results = result_memory.get(tiles * kTileLines * stride);
        for (int64_t first = 0; first < size_; first += kStripRows) {
            const BFloat* strip = packed.values + (first / kBlockRows * groups_ + skipped) * kTileNumbers;
            tile_math()->multiply({weights, tiles, groups, strip, std::min(kStripBlocks, (size_ - first) / kBlockRows),
                                   groups_ * kTileNumbers, results + first, stride});
        }
        each_query(together, count, lines, [&](int64_t h, int64_t i, int64_t line) {
            float* to = out_ + (row + i) * layer_.q_size() + (head * together + h) * size_;
            const float share = 1.0f / totals[line];
            for (int64_t n = 0; n < size_; ++n) to[n] = results[line * stride + n] * share;
        });
    }

    int64_t seen_from(int64_t row) const {
        return settings_.window ? std::max<int64_t>(0, rows_.positions[row] - settings_.window + 1) : 0;
    }

    static BFloat* line_of(BFloat* rows, int64_t line, int64_t groups) {
        return rows + line / kTileLines * groups * kTileNumbers + line % kTileLines * kGroup;
    }

    // body(query head, row, line among the tiles)
    template <typename Body>
    static void each_query(int64_t together, int64_t count, int64_t lines, const Body& body) {
        for (int64_t h = 0; h < together; ++h) {
            for (int64_t i = 0; i < count; ++i) body(h, i, h * lines + i);
        }
    }

    const Layer& layer_;
    const craton_layer& settings_;
    const craton_cache& cache_;
    const StepRows& rows_;
    const float* const qkv_;
    float* const out_;
    const int32_t threads_, number_;
    const int64_t size_, end_, first_, groups_, size_groups_;  // groups of 32 keys from first_ to end_, of 32 numbers
};

}  // namespace

bool is_prompt(const StepRows& rows) {
    if (rows.parts != 0) return false;
    for (int64_t i = 1; i < rows.count; ++i) {
        if (rows.slots[i] != rows.slots[0] || rows.positions[i] != rows.positions[0] + i) return false;
    }
    return true;
}

void prompt_attention(const Layer& layer, int32_t number, const craton_cache& cache, const StepRows& rows,
                      const float* qkv, float* out, int32_t threads) {
    write_to_cache(layer, number, cache, rows, qkv);
    PromptAttention(layer, number, cache, rows, qkv, out, threads).run();
}

}  // namespace craton
