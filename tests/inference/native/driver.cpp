// Every kernel on odd shapes, in buffers of exactly the right size, for the sanitisers to watch. Prints "done", or
// aborts.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
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
    const int64_t ids[] = {n - 1, 0};
    expect(craton_rows(&weight, ids, 2, std::vector<uint8_t>(size_t(2 * k * size)).data(), type, 2) == CRATON_OK,
           "ids");
    const int64_t outside[] = {n};
    expect(craton_rows(&weight, outside, 1, rows.data(), type, 2) == CRATON_BAD_ARGUMENT, "an id out of range");
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
