#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "kernels.h"
#include "numbers.h"
#include "pool.h"
#include "prompt.h"
#include "strips.h"

namespace craton {
namespace {

// Values that a thread norms, rotates or quantises in about a microsecond: below it, the caller does it alone.
constexpr int64_t kValuesPerThread = 8 << 10;

// A piece of a product: small enough that two threads end at about the same time and that one which is interrupted
// holds up little, large enough that claiming it costs nothing.
constexpr int64_t kPieceMacs = 256 << 10;
constexpr int64_t kPiecesPerThread = 4;

enum Place { kInput, kOutput, kResidual };  // of a norm

// Memory for one step, cut into pieces on whole cache lines. It stays with the thread.
class Scratch {
public:
    template <typename T>
    T* take(int64_t count) {
        uint8_t* piece = memory() + used_;
        used_ += round_up(count * int64_t(sizeof(T)), kVectorBytes);
        return reinterpret_cast<T*>(piece);
    }
    void reserve(int64_t bytes) {
        if (int64_t(bytes_.size()) < bytes + kVectorBytes) bytes_.resize(size_t(bytes + kVectorBytes));
        used_ = 0;
    }

private:
    uint8_t* memory() {
        const uintptr_t start = reinterpret_cast<uintptr_t>(bytes_.data());
        return bytes_.data() + (kVectorBytes - start % kVectorBytes) % kVectorBytes;
    }
    std::vector<uint8_t> bytes_;
    int64_t used_ = 0;
};

class Step {
public:
    Step(const CheckedModel& model, const craton_cache& cache, const StepRows& rows, int32_t threads)
        : model_(model), cache_(cache), rows_(rows), threads_(threads), width_(model.width),
          parts_(rows.parts), prompt_(is_prompt(rows)), math_(kernels().rows) {
        thread_local Scratch scratch;
        int64_t widest = width_, joined = 0, attended = 0, hidden = 0, partial = 0;
        for (const Layer& layer : model.layers) {
            widest = std::max(widest, layer.q_size());
            joined = std::max(joined, layer.qkv_size());
            attended = std::max(attended, layer.q_size());
            hidden = std::max(hidden, layer.hidden());
            if (!prompt_) partial = std::max(partial, attention_scratch(layer, rows));
        }
        const int64_t n = rows.count, rotaries = model.settings->rotary_count;
        const int64_t floats = n * (3 * width_ + joined + attended + rotaries * kLargestHead) + partial;
        const int64_t input = Slab::bytes(n, parts_, widest / kGroup), units = Slab::bytes(n, parts_, hidden / kGroup);
        const int64_t last = Slab::bytes(rows.logits, model.settings->parts, width_ / kGroup);
        scratch.reserve(floats * 4 + 2 * input + units + last + 16 * kVectorBytes);
        x_ = scratch.take<float>(n * width_);
        normed_ = scratch.take<float>(n * width_);
        branch_ = scratch.take<float>(n * width_);
        qkv_ = scratch.take<float>(n * joined);
        attended_ = scratch.take<float>(n * attended);
        turns_ = scratch.take<float>(n * rotaries * kLargestHead);
        partial_ = scratch.take<float>(partial);
        input_ = scratch.take<uint8_t>(input);
        other_input_ = scratch.take<uint8_t>(input);
        hidden_ = scratch.take<uint8_t>(units);
        last_ = scratch.take<uint8_t>(last);
    }

    void run(float* logits) {
        embed();
        turn();
        for (size_t i = 0; i < model_.layers.size(); ++i) {
            const Layer& layer = model_.layers[i];
            attend(layer, int32_t(i));
            feed_forward(layer);
        }
        if (rows_.logits > 0) give_logits(logits);
    }

private:
    void embed() {
        const craton_model& settings = *model_.settings;
        const Weight& table = model_.embedding;
        for (int64_t i = 0; i < rows_.count; ++i) {
            float* x = x_ + i * width_;
            const int64_t id = rows_.ids[i];
            if (table.data) {
                kernels().dequantize[table.format][CRATON_F32](table.block(id / kBlockRows), table.groups,
                                                               id % kBlockRows, x);
            } else {
                memcpy(x, settings.embedding_table + id * width_, size_t(width_) * 4);
            }
            for (int64_t j = 0; j < width_; ++j) x[j] *= settings.embedding_scale;
        }
    }

    // cos and sin of every row's position, once for all layers: turns_[rotary][row][cos | sin].
    void turn() {
        for (int32_t r = 0; r < model_.settings->rotary_count; ++r) {
            const craton_rotary& rotary = model_.settings->rotaries[r];
            for (int64_t i = 0; i < rows_.count; ++i) {
                float *cos = turns(r, i), *sin = cos + rotary.dims / 2;
                for (int32_t j = 0; j < rotary.dims / 2; ++j) {
                    const float angle = float(rows_.positions[i]) * rotary.frequencies[j];
                    cos[j] = std::cos(angle) * rotary.factor;
                    sin[j] = std::sin(angle) * rotary.factor;
                }
            }
        }
    }

    float* turns(int64_t rotary, int64_t row) const { return turns_ + (rotary * rows_.count + row) * kLargestHead; }

    // The last rows' logits, always in the head's own arithmetic.
    void give_logits(float* logits) const {
        const Projection& head = model_.head;
        const int64_t first = rows_.count - rows_.logits;
        const float *last = norm(model_.settings->final_norm, x_, normed_) + first * width_;
        const Slab in{last_, rows_.logits, model_.settings->parts, head.weight.groups};
        each(rows_.logits, width_, [&](int64_t row) {
            store_row(head.weight.format, CRATON_F32, last + row * width_, in, row, 0, in.groups);
        });
        const float cap = model_.settings->logit_softcap;
        multiply(head, in, [&](int64_t row, int64_t first_output, int64_t outputs, float* values) {
            if (cap > 0) math_.soft_cap(cap, values, outputs);
            memcpy(logits + row * head.weight.rows + first_output, values, size_t(outputs) * 4);
        });
    }

    void attend(const Layer& layer, int32_t number) {
        const craton_layer& settings = *layer.settings;
        const float* in = norm(settings.attention_norms[kInput], x_, normed_);
        const int64_t size = layer.qkv_size();
        const int64_t places[] = {0, layer.q_size(), layer.q_size() + layer.kv_size()};
        for (int part = 0; part < 3 && layer.qkv[part]; ++part) {
            multiply(layer.qkv[part], quantize(in, layer.qkv[part].weight, input_),
                     [&](int64_t row, int64_t first, int64_t outputs, const float* values) {
                         memcpy(qkv_ + row * size + places[part] + first, values, size_t(outputs) * 4);
                     });
        }
        each_row(size, [&](int64_t row) {
            float *q = qkv_ + row * size, *k = q + layer.q_size();
            norm_heads(settings, settings.q_norm, q, settings.heads);
            norm_heads(settings, settings.k_norm, k, settings.kv_heads);
            if (settings.rotary >= 0) rotate(settings, row, q, settings.heads + settings.kv_heads);
        });
        if (prompt_) {
            prompt_attention(layer, number, cache_, rows_, qkv_, attended_, threads_);
        } else {
            attention(layer, number, cache_, rows_, qkv_, partial_, attended_, threads_);
        }
        finish(layer.o, quantize(attended_, layer.o.weight, input_), settings.attention_norms);
    }

    void norm_heads(const craton_layer& settings, const craton_norm& norm, float* heads, int64_t count) const {
        if (!norm.scale) return;
        const int64_t size = settings.head_size;
        if (settings.norm_over_width) return math_.rms_norm(heads, norm.scale, norm.eps, count * size, heads);
        for (int64_t h = 0; h < count; ++h) {
            math_.rms_norm(heads + h * size, norm.scale, norm.eps, size, heads + h * size);
        }
    }

    // Queries and keys lie side by side, so one pass turns both.
    void rotate(const craton_layer& settings, int64_t row, float* heads, int64_t count) const {
        const craton_rotary& rotary = model_.settings->rotaries[settings.rotary];
        const int64_t pairs = rotary.dims / 2;
        const float *cos = turns(settings.rotary, row), *sin = cos + pairs;
        const int64_t step = rotary.interleaved ? 2 : 1, apart = rotary.interleaved ? 1 : pairs;
        for (int64_t h = 0; h < count; ++h, heads += settings.head_size) {
            for (int64_t j = 0; j < pairs; ++j) {
                float &a = heads[j * step], &b = heads[j * step + apart];
                const float turned = a * cos[j] - b * sin[j];
                b = b * cos[j] + a * sin[j];
                a = turned;
            }
        }
    }

    // Hidden units are computed, activated and quantised 32 at a time: a strip of weights is a group of activations.
    void feed_forward(const Layer& layer) {
        static_assert(kStripRows == kGroup, "a strip gives a whole group");
        const craton_layer& settings = *layer.settings;
        const float* in = norm(settings.feedforward_norms[kInput], x_, normed_);
        const Projection &gate = layer.gate, &up = layer.up;
        const Slab up_in = quantize(in, up.weight, input_);
        const bool shared = !gate || gate.weight.format == up.weight.format;
        const Slab gate_in = shared ? up_in : quantize(in, gate.weight, other_input_);
        const Slab hidden{hidden_, rows_.count, parts_, layer.down.weight.groups};
        const Format format = layer.down.weight.format;
        const int64_t strips = strip_count(up.weight), macs = work_rows() * width_ * kStripRows * (gate ? 2 : 1);
        share(strips, macs, [&](int64_t begin, int64_t end) {
            alignas(kVectorBytes) float ups[kMostRows * kStripRows], gates[kMostRows * kStripRows], units[kStripRows];
            for (int64_t s = begin; s < end; ++s) {
                multiply_with_bias(up, s, up_in, ups);
                if (gate) multiply_with_bias(gate, s, gate_in, gates);
                for (int64_t row = 0; row < rows_.count; ++row) {
                    const float* up_row = ups + row * kStripRows;
                    math_.activate(craton_activation(settings.activation), gate ? gates + row * kStripRows : up_row,
                                   gate ? up_row : nullptr, kStripRows, units);
                    store_row(format, CRATON_F32, units, hidden, row, s, 1);
                }
            }
        });
        finish(layer.down, hidden, settings.feedforward_norms);
    }

    // The end of a branch: its last product, its output norm, the addition to the stream, the stream's norm.
    void finish(const Projection& projection, const Slab& in, const craton_norm* norms) {
        const bool normed = norms[kOutput].scale;
        multiply(projection, in, [&](int64_t row, int64_t first, int64_t outputs, const float* values) {
            float* out = (normed ? branch_ : x_) + row * width_ + first;
            for (int64_t n = 0; n < outputs; ++n) out[n] = normed ? values[n] : out[n] + values[n];
        });
        if (normed) {
            norm(norms[kOutput], branch_, branch_);
            each_row(width_, [&](int64_t row) {
                for (int64_t i = row * width_; i < (row + 1) * width_; ++i) x_[i] += branch_[i];
            });
        }
        norm(norms[kResidual], x_, x_);
    }

    // The rows of x, normed into `out`; x itself where there is no norm.
    const float* norm(const craton_norm& norm, const float* x, float* out) const {
        if (!norm.scale) return x;
        each_row(width_, [&](int64_t row) {
            math_.rms_norm(x + row * width_, norm.scale, norm.eps, width_, out + row * width_);
        });
        return out;
    }

    Slab quantize(const float* x, const Weight& weight, uint8_t* data) const {
        const Slab slab{data, rows_.count, parts_, weight.groups};
        const int64_t size = weight.groups * kGroup;
        each_row(size, [&](int64_t row) {
            store_row(weight.format, CRATON_F32, x + row * size, slab, row, 0, weight.groups);
        });
        return slab;
    }

    // sums[row][output]
    static void multiply_with_bias(const Projection& projection, int64_t strip, const Slab& in, float* sums) {
        multiply_strip(projection.weight, strip, in, sums);
        if (!projection.bias) return;
        const float* bias = projection.bias + strip * kStripRows;
        const int64_t outputs = std::min(kStripRows, projection.weight.rows - strip * kStripRows);
        for (int64_t row = 0; row < in.count; ++row, sums += kStripRows) {
            for (int64_t n = 0; n < outputs; ++n) sums[n] += bias[n];
        }
    }

    // put(row, first output, outputs, values) for every row and strip.
    template <typename Put>
    void multiply(const Projection& projection, const Slab& in, const Put& put) const {
        const Weight& weight = projection.weight;
        const int64_t macs = in.count * std::max<int64_t>(1, in.parts) * weight.groups * kGroup * kStripRows;
        share(strip_count(weight), macs, [&](int64_t begin, int64_t end) {
            alignas(kVectorBytes) float sums[kMostRows * kStripRows];
            for (int64_t s = begin; s < end; ++s) {
                multiply_with_bias(projection, s, in, sums);
                const int64_t first = s * kStripRows, outputs = std::min(kStripRows, weight.rows - first);
                for (int64_t row = 0; row < in.count; ++row) put(row, first, outputs, sums + row * kStripRows);
            }
        });
    }

    int64_t work_rows() const { return rows_.count * std::max<int64_t>(1, parts_); }

    // body(row) for every row, in each of which so many values are touched.
    template <typename Body>
    void each_row(int64_t values, const Body& body) const {
        each(rows_.count, values, body);
    }

    template <typename Body>
    void each(int64_t rows, int64_t values, const Body& body) const {
        parallel_for(threads_, rows, kValuesPerThread / values + 1, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) body(row);
        });
    }

    // body(begin, end) on pieces of the strips, each strip of so many multiplications.
    template <typename Body>
    void share(int64_t strips, int64_t macs, const Body& body) const {
        const int64_t fair = strips / (threads_ * kPiecesPerThread), most = std::max<int64_t>(1, kPieceMacs / macs);
        share_out(threads_, strips, std::clamp<int64_t>(fair, 1, most), body);
    }

    const CheckedModel& model_;
    const craton_cache& cache_;
    const StepRows& rows_;
    const int32_t threads_;
    const int64_t width_, parts_;
    const bool prompt_;
    const RowMath& math_;
    float *x_, *normed_, *branch_, *qkv_, *attended_, *turns_, *partial_;
    uint8_t *input_, *other_input_, *hidden_, *last_;
};

}  // namespace

void step(const CheckedModel& model, const craton_cache& cache, const StepRows& rows, float* logits, int32_t threads) {
    if (rows.count > 0) Step(model, cache, rows, threads).run(logits);
}

}  // namespace craton
