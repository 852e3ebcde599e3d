// What a decode step computes on rows of floats: norm, activation, soft cap, attention over a few keys.
//
// Included once for each instruction set, inside a namespace that has `Lanes` (lanes_*.h) and with CRATON_TARGET
// defined. All is written in operations on sixteen lanes whose order is fixed, so every instruction set gives the same
// bits; only those of a NaN may differ. A NaN or infinity that goes in comes out, as a NaN at the latest of the product
// that follows.

// e^x, to about 1e-7 of it. 0 below -87 (where fp32 has hardly any normal numbers left), and no more than e^88.
CRATON_TARGET CRATON_INLINE Lanes exponential(Lanes x) {
    const Lanes kept = larger(all(-87.0f), smaller(all(88.0f), x)), magic = all(0x1.8p23f);
    const Lanes rounded = add(multiply(kept, all(1.44269504f)), magic), n = subtract(rounded, magic);
    // ln 2 in two parts, the first of which n multiplies exactly.
    const Lanes r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), kept));
    Lanes p = all(1.9875691e-4f);
    p = multiply_add(p, r, all(1.3981999e-3f));
    p = multiply_add(p, r, all(8.3334519e-3f));
    p = multiply_add(p, r, all(4.1665796e-2f));
    p = multiply_add(p, r, all(1.6666666e-1f));
    p = multiply_add(p, r, all(0.5f));
    p = add(multiply_add(p, multiply(r, r), r), all(1.0f));
    return zero_below(x, -87.0f, multiply(p, two_to_the(rounded)));
}

// 1 / (1 + e^-x)
CRATON_TARGET CRATON_INLINE Lanes sigmoid(Lanes x) {
    return divide(all(1.0f), add(all(1.0f), exponential(subtract(all(0.0f), x))));
}

CRATON_TARGET CRATON_INLINE Lanes hyperbolic_tangent(Lanes x) {
    return subtract(multiply(all(2.0f), sigmoid(multiply(all(2.0f), x))), all(1.0f));
}

// The exact GELU needs the error function, which comes from the C library.
CRATON_TARGET CRATON_INLINE Lanes gelu(Lanes x) {
    float values[16];
    store(values, x);
    for (float& value : values) value = value * 0.5f * (1.0f + std::erf(value * 0.70710678f));
    return load(values);
}

CRATON_TARGET CRATON_INLINE Lanes activation(Activation kind, Lanes x) {
    switch (kind) {
        case CRATON_SILU: return multiply(x, sigmoid(x));
        case CRATON_GELU_TANH: {
            const Lanes cube = multiply(multiply(x, x), x);
            const Lanes inner = multiply(all(0.79788456f), multiply_add(cube, all(0.044715f), x));
            // x * sigmoid(2 y) = x * (1 + tanh(y)) / 2
            return multiply(x, sigmoid(multiply(all(2.0f), inner)));
        }
        case CRATON_GELU: return gelu(x);
        default: return larger(all(0.0f), x);  // ReLU; NaN stays
    }
}

CRATON_TARGET void activate(Activation kind, const float* gate, const float* up, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += 16) {
        const Lanes active = activation(kind, load(gate + i));
        store(out + i, up ? multiply(active, load(up + i)) : active);
    }
}

// cap * tanh(x / cap) in place; any count.
CRATON_TARGET void soft_cap(float cap, float* x, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        store(x + i, multiply(all(cap), hyperbolic_tangent(divide(load(x + i), all(cap)))));
    }
    if (i == count) return;
    float rest[16] = {};
    memcpy(rest, x + i, size_t(count - i) * 4);
    store(rest, multiply(all(cap), hyperbolic_tangent(divide(load(rest), all(cap)))));
    memcpy(x + i, rest, size_t(count - i) * 4);
}

// x / sqrt(mean(x^2) + eps) * weight; count is a multiple of 16; out may be x.
CRATON_TARGET void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* out) {
    Lanes squares = all(0.0f);
    for (int64_t i = 0; i < count; i += 16) squares = multiply_add(load(x + i), load(x + i), squares);
    const Lanes factor = all(1.0f / std::sqrt(sum(squares) / float(count) + eps));
    for (int64_t i = 0; i < count; i += 16) store(out + i, multiply(multiply(load(x + i), factor), load(weight + i)));
}

// Sixteen keys as fp32: themselves, or unpacked to the buffer.
CRATON_TARGET CRATON_INLINE const float* sixteen_keys(const float* keys, int64_t, float*) { return keys; }
template <typename T>
CRATON_TARGET CRATON_INLINE const float* sixteen_keys(const T* keys, int64_t size, float* buffer) {
    for (int64_t i = 0; i < kKeyBlock * size; i += 16) store(buffer + i, load(keys + i));
    return buffer;
}
// Codes without their scales, which the scores are multiplied with.
CRATON_TARGET CRATON_INLINE const float* sixteen_keys(const Code* keys, int64_t size, float* buffer) {
    for (int64_t key = 0; key < kKeyBlock; ++key, keys += row_length<Code>(size)) {
        for (int64_t i = 0; i < size; i += 16) store(buffer + key * size + i, load(keys + i));
    }
    return buffer;
}

// The scales of sixteen rows of codes.
CRATON_TARGET CRATON_INLINE Lanes sixteen_scales(const Code* rows, int64_t size) {
    float scales[kKeyBlock];
    for (int64_t i = 0; i < kKeyBlock; ++i) scales[i] = scale_of(rows + i * row_length<Code>(size), size);
    return load(scales);
}

// Have a block of keys or values under way: the processor alone does not look far enough ahead. Nothing is read, so the
// block may lie outside the cache.
CRATON_TARGET CRATON_INLINE void fetch(const void* block, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(block) + i);
}

// out[head] (`lanes` x 16 numbers each) = sum over keys of weight[head][key] * values[key].
template <typename T, int heads, int lanes>
CRATON_TARGET CRATON_INLINE void weigh_values(const float* weights, const T* values, int64_t size, int64_t keys,
                                              float* out) {
    Lanes total[heads][lanes];
    for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < lanes; ++i) total[h][i] = all(0.0f);
    }
    for (int64_t key = 0; key < keys; ++key, values += row_length<T>(size)) {
        Lanes value[lanes];
        for (int i = 0; i < lanes; ++i) value[i] = load(values + i * 16);
        for (int h = 0; h < heads; ++h) {
            const Lanes weight = all(weights[h * kChunkKeys + key]);
            for (int i = 0; i < lanes; ++i) total[h][i] = multiply_add(weight, value[i], total[h][i]);
        }
    }
    for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < lanes; ++i) store(out + h * size + i * 16, total[h][i]);
    }
}

// Softmax attention of `heads` query heads over the chunk's keys. The sum is left undivided (see AttentionChunk).
// Of codes, the keys' scales go to the scores and the values' to the weights.
template <typename T, int heads>
CRATON_TARGET CRATON_INLINE void attend_heads(const AttentionChunk& chunk, int64_t head) {
    constexpr bool coded = std::is_same_v<T, Code>;
    const int64_t size = chunk.size, row = row_length<T>(size), first = chunk.begin / kKeyBlock * kKeyBlock;
    const T *keys = static_cast<const T*>(chunk.keys), *values = static_cast<const T*>(chunk.values);
    alignas(64) float buffer[kKeyBlock * kLargestHead];
    alignas(64) float scores[heads * kChunkKeys];
    const int64_t blocks = (chunk.end - first + kKeyBlock - 1) / kKeyBlock;
    constexpr int64_t kAhead = 2;  // blocks
    for (int64_t block = 0; block < blocks; ++block) {
        const T* block_keys = keys + (first + block * kKeyBlock) * row;
        fetch(block_keys + kAhead * kKeyBlock * row, kKeyBlock * row * int64_t(sizeof(T)));
        fetch(values + (first + block * kKeyBlock) * row, kKeyBlock * row * int64_t(sizeof(T)));
        const float* k = sixteen_keys(block_keys, size, buffer);
        Lanes key_scales;
        if constexpr (coded) key_scales = sixteen_scales(block_keys, size);
        for (int h = 0; h < heads; ++h) {
            const float* query = chunk.queries + (head + h) * size;
            Lanes dot[kKeyBlock];
            for (int64_t j = 0; j < kKeyBlock; ++j) dot[j] = all(0.0f);
            for (int64_t i = 0; i < size; i += 16) {
                const Lanes q = load(query + i);
                for (int64_t j = 0; j < kKeyBlock; ++j) dot[j] = multiply_add(q, load(k + j * size + i), dot[j]);
            }
            Lanes score = multiply(sums(dot), all(chunk.scale));
            if constexpr (coded) score = multiply(score, key_scales);
            if (chunk.softcap > 0) {
                score = multiply(all(chunk.softcap), hyperbolic_tangent(divide(score, all(chunk.softcap))));
            }
            store(scores + h * kChunkKeys + block * kKeyBlock, score);
        }
    }
    for (int h = 0; h < heads; ++h) {
        float* score = scores + h * kChunkKeys;
        // Keys of the first and last block that the query does not see.
        for (int64_t key = first; key < chunk.begin; ++key) score[key - first] = -INFINITY;
        for (int64_t key = chunk.end; key < first + blocks * kKeyBlock; ++key) score[key - first] = -INFINITY;
        Lanes most = load(score);
        for (int64_t block = 1; block < blocks; ++block) most = larger(most, load(score + block * kKeyBlock));
        const float maximum = largest(most);
        Lanes total = all(0.0f);
        for (int64_t block = 0; block < blocks; ++block) {
            const Lanes weight = exponential(subtract(load(score + block * kKeyBlock), all(maximum)));
            store(score + block * kKeyBlock, weight);
            total = add(total, weight);
        }
        chunk.maxima[head + h] = maximum;
        chunk.totals[head + h] = sum(total);
    }
    if constexpr (coded) {
        for (int64_t block = 0; block < blocks; ++block) {
            const Lanes value_scales = sixteen_scales(values + (first + block * kKeyBlock) * row, size);
            for (int h = 0; h < heads; ++h) {
                float* weights = scores + h * kChunkKeys + block * kKeyBlock;
                store(weights, multiply(load(weights), value_scales));
            }
        }
    }
    const float* weights = scores + (chunk.begin - first);
    const T* seen = values + chunk.begin * row;
    const int64_t count = chunk.end - chunk.begin;
    float* out = chunk.out + head * size;
    int64_t i = 0;
    for (; i + 64 <= size; i += 64) weigh_values<T, heads, 4>(weights, seen + i, size, count, out + i);
    for (; i < size; i += 16) weigh_values<T, heads, 1>(weights, seen + i, size, count, out + i);
}

template <typename T>
CRATON_TARGET void attend(const AttentionChunk& chunk) {
    int64_t head = 0;
    for (; head + 4 <= chunk.heads; head += 4) attend_heads<T, 4>(chunk, head);
    switch (chunk.heads - head) {
        case 3: return attend_heads<T, 3>(chunk, head);
        case 2: return attend_heads<T, 2>(chunk, head);
        case 1: return attend_heads<T, 1>(chunk, head);
    }
}

// One head's output from those of its `chunks` chunks, each `stride` floats after the one before.
CRATON_TARGET void join_chunks(const ChunkResults& from, int64_t size, float* out) {
    if (from.chunks == 1) {
        const Lanes total = all(from.totals[0]);
        for (int64_t i = 0; i < size; i += 16) store(out + i, divide(load(from.out + i), total));
        return;
    }
    float maximum = from.maxima[0];
    for (int64_t c = 1; c < from.chunks; ++c) maximum = std::max(maximum, from.maxima[c * from.number_stride]);
    float weights[16], total = 0;
    for (int64_t i = 0; i < size; i += 16) store(out + i, all(0.0f));
    for (int64_t first = 0; first < from.chunks; first += 16) {
        const int64_t count = std::min<int64_t>(16, from.chunks - first);
        for (int64_t c = 0; c < 16; ++c) {
            weights[c] = c < count ? from.maxima[(first + c) * from.number_stride] - maximum : -INFINITY;
        }
        store(weights, exponential(load(weights)));
        for (int64_t c = 0; c < count; ++c) {
            total += weights[c] * from.totals[(first + c) * from.number_stride];
            const float* part = from.out + (first + c) * from.out_stride;
            for (int64_t i = 0; i < size; i += 16) {
                store(out + i, multiply_add(all(weights[c]), load(part + i), load(out + i)));
            }
        }
    }
    for (int64_t i = 0; i < size; i += 16) store(out + i, divide(load(out + i), all(total)));
}

// A row of `count` numbers, a multiple of 16, as the cache keeps it.
template <typename T>
CRATON_TARGET void keep(const float* from, int64_t count, void* to) {
    for (int64_t i = 0; i < count; ++i) store_float(static_cast<T*>(to) + i, from[i]);
}
template <>
CRATON_TARGET void keep<Half>(const float* from, int64_t count, void* to) {
    for (int64_t i = 0; i < count; i += 16) store(static_cast<Half*>(to) + i, load(from + i));
}
template <>
CRATON_TARGET void keep<Code>(const float* from, int64_t count, void* to) {
    int8_t* row = static_cast<int8_t*>(to);
    const float scale = quantize_to(127.0f, from, count, row);
    memcpy(row + count, &scale, 4);
}

CRATON_TARGET float weigh(const Scores& scores) {
    const int64_t first = scores.begin / 16 * 16, last = (scores.end + 15) / 16 * 16;
    float* values = scores.values;
    Lanes most = all(-INFINITY);
    for (int64_t i = first; i < last; i += 16) {
        Lanes score = multiply(load(values + i), all(scores.scale));
        if (scores.softcap > 0) {
            score = multiply(all(scores.softcap), hyperbolic_tangent(divide(score, all(scores.softcap))));
        }
        store(values + i, score);
        if (i < scores.begin || i + 16 > scores.end) {
            for (int64_t key = i; key < i + 16; ++key) {
                if (key < scores.begin || key >= scores.end) values[key] = -INFINITY;
            }
        }
        most = larger(most, load(values + i));
    }
    const Lanes maximum = all(largest(most));
    Lanes total = all(0.0f);
    for (int64_t i = first; i < last; i += 16) {
        const Lanes weight = exponential(subtract(load(values + i), maximum));
        store(values + i, weight);
        total = add(total, weight);
    }
    for (int64_t i = 0; i < first; i += 16) store(values + i, all(0.0f));
    for (int64_t i = last; i < scores.count; i += 16) store(values + i, all(0.0f));
    return sum(total);
}

constexpr RowMath row_math = {
    activate,
    soft_cap,
    rms_norm,
    {attend<float>, attend<BFloat>, attend<Half>, attend<Code>},
    join_chunks,
    {keep<float>, keep<BFloat>, keep<Half>, keep<Code>},
    weigh,
};
