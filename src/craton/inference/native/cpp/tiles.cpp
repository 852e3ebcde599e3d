// The matrix unit of Intel's AMX: a tile is 16 lines of 64 bytes, and one instruction multiplies two of them.
#include "tiles.h"

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CRATON_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

namespace craton {
namespace {

CRATON_AMX CRATON_INLINE __m512 load_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

CRATON_AMX CRATON_INLINE __m512i side_by_side() {
    alignas(64) uint16_t places[32];
    for (int i = 0; i < 16; ++i) places[2 * i] = uint16_t(i), places[2 * i + 1] = uint16_t(i + 16);
    return _mm512_load_si512(places);
}

// The line of two inputs: outputs' numbers of the one and of the other, side by side.
CRATON_AMX CRATON_INLINE void store_line(__m512 even, __m512 odd, __m512i places, uint8_t* line) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    _mm512_store_si512(line, _mm512_permutexvar_epi16(places, both));
}

// Four bytes of each of sixteen outputs: two lines. A number is quant * scale + shift, which is exact before it is
// rounded to bfloat16 where the shift is that of a symmetric format.
CRATON_AMX CRATON_INLINE void store_lines(__m512i bytes, __m512 scale, __m512 shift, __m512i places, uint8_t* line) {
    const __m512i low = _mm512_set1_epi32(0xff);
    const auto number = [&](__m512i quant) CRATON_AMX {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(quant), scale, shift);
    };
    const __m512 first = number(_mm512_and_si512(bytes, low));
    const __m512 second = number(_mm512_and_si512(_mm512_srli_epi32(bytes, 8), low));
    const __m512 third = number(_mm512_and_si512(_mm512_srli_epi32(bytes, 16), low));
    const __m512 fourth = number(_mm512_srli_epi32(bytes, 24));
    store_line(first, second, places, line);
    store_line(third, fourth, places, line + kVectorBytes);
}

// Group `g` of a block as a tile.
template <Format format>
CRATON_AMX CRATON_INLINE void unpack_group(const uint8_t* block, int64_t groups, int64_t g, __m512i places,
                                           BFloat* tile) {
    const __m512 scale = load_halves(block + scales_offset(format, groups) + g * scale_bytes);
    const __m512 shift = has_minimum(format) ? load_halves(block + minima_offset(format, groups) + g * scale_bytes)
                                             : _mm512_mul_ps(scale, _mm512_set1_ps(-float(quant_offset(format))));
    const __m512i low = _mm512_set1_epi8(0x0f);
    const uint8_t* quants = block + g * quant_bytes(format);
    uint8_t* line = reinterpret_cast<uint8_t*>(tile);
    for (int64_t v = 0; v < vectors_per_group(format); ++v, line += 2 * kVectorBytes) {
        const __m512i bytes = _mm512_loadu_si512(quants + v * kVectorBytes);
        if (has_nibbles(format)) {
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
            store_lines(_mm512_and_si512(bytes, low), scale, shift, places, line);
            store_lines(high, scale, shift, places, line + kTileLines / 2 * kVectorBytes);
        } else {
            store_lines(bytes, scale, shift, places, line);
        }
    }
}

template <typename T>
CRATON_AMX void round_row(const void* x, int64_t groups, BFloat* line) {
    const T* from = static_cast<const T*>(x);
    for (int64_t g = 0; g < groups; ++g, from += kGroup, line += kTileNumbers) {
        for (int64_t i = 0; i < kGroup; ++i) store_float(line + i, load_float(from + i));
    }
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {};
    uint8_t lines[16] = {};

    TileShapes() {
        for (int i = 0; i < 8; ++i) lines[i] = kTileLines, line_bytes[i] = 64;
    }
};

// The intrinsics want their registers as literal numbers: sums in 0 to 3, rows in 4 and 5, weights in 6 and 7.
#define CRATON_STORE(REGISTER, TILE, BLOCK) \
    _tile_stored(REGISTER, sums + (TILE) * kTileLines * p.stride + (BLOCK) * kBlockRows, size_t(p.stride) * 4)

CRATON_AMX CRATON_INLINE void multiply_two_by_two(const TileProduct& p, const BFloat* rows, float* sums) {
    const BFloat* weights = p.weights;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t g = 0; g < p.groups; ++g, rows += kTileNumbers, weights += kTileNumbers) {
        _tile_loadd(6, weights, 64);
        _tile_loadd(4, rows, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + p.apart, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, rows + p.groups * kTileNumbers, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    CRATON_STORE(0, 0, 0);
    CRATON_STORE(1, 0, 1);
    CRATON_STORE(2, 1, 0);
    CRATON_STORE(3, 1, 1);
}

// The same with the weights unpacked on the way, a group ahead of its use: the vector units work beside the matrix unit.
template <Format format>
CRATON_AMX CRATON_INLINE void multiply_first(const Strip& strip, const TileProduct& p, BFloat* unpacked) {
    const __m512i places = side_by_side();
    const uint8_t* second = strip.blocks + block_bytes(format, strip.groups);
    const BFloat* rows = p.rows;
    float* sums = p.sums;
    const auto unpack = [&](int64_t g) CRATON_AMX {
        if (strip.next) {
            for (int64_t i = 0; i < kStripBlocks * group_bytes(format); i += kVectorBytes) {
                _mm_prefetch(strip.next + kStripBlocks * g * group_bytes(format) + i, _MM_HINT_T1);
            }
        }
        unpack_group<format>(strip.blocks, strip.groups, g, places, unpacked + g * kTileNumbers);
        unpack_group<format>(second, strip.groups, g, places, unpacked + p.apart + g * kTileNumbers);
    };
    unpack(0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t g = 0; g < p.groups; ++g, rows += kTileNumbers) {
        if (g + 1 < p.groups) unpack(g + 1);
        _tile_loadd(6, unpacked + g * kTileNumbers, 64);
        _tile_loadd(4, rows, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, unpacked + p.apart + g * kTileNumbers, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (p.tiles == 1) continue;
        _tile_loadd(5, rows + p.groups * kTileNumbers, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    CRATON_STORE(0, 0, 0);
    CRATON_STORE(1, 0, 1);
    if (p.tiles == 1) return;
    CRATON_STORE(2, 1, 0);
    CRATON_STORE(3, 1, 1);
}

CRATON_AMX CRATON_INLINE void multiply_one_by_two(const TileProduct& p, const BFloat* rows, float* sums) {
    const BFloat* weights = p.weights;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t g = 0; g < p.groups; ++g, rows += kTileNumbers, weights += kTileNumbers) {
        _tile_loadd(4, rows, 64);
        _tile_loadd(6, weights, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + p.apart, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    CRATON_STORE(0, 0, 0);
    CRATON_STORE(1, 0, 1);
}

CRATON_AMX CRATON_INLINE void multiply_one_by_one(const TileProduct& p, const BFloat* rows, float* sums) {
    const BFloat* weights = p.weights;
    _tile_zero(0);
    for (int64_t g = 0; g < p.groups; ++g, rows += kTileNumbers, weights += kTileNumbers) {
        _tile_loadd(4, rows, 64);
        _tile_loadd(6, weights, 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    CRATON_STORE(0, 0, 0);
}

// From tile `t` on.
CRATON_AMX CRATON_INLINE void multiply_tiles(const TileProduct& p, int64_t t) {
    while (t < p.tiles) {
        const BFloat* rows = p.rows + t * p.groups * kTileNumbers;
        float* sums = p.sums + t * kTileLines * p.stride;
        if (p.blocks == 1) {
            multiply_one_by_one(p, rows, sums), t += 1;
        } else if (t + 1 == p.tiles) {
            multiply_one_by_two(p, rows, sums), t += 1;
        } else {
            multiply_two_by_two(p, rows, sums), t += 2;
        }
    }
}

CRATON_AMX void configure() {
    static const TileShapes shapes;
    _tile_loadconfig(&shapes);
}

CRATON_AMX void multiply(const TileProduct& product) {
    configure();
    multiply_tiles(product, 0);
    _tile_release();
}

template <Format format>
CRATON_AMX void multiply_strip(const Strip& strip, const BFloat* rows, int64_t tiles, float* sums) {
    thread_local Buffer<BFloat> memory;
    BFloat* const unpacked = memory.get(kStripBlocks * strip.groups * kTileNumbers);
    const TileProduct product{rows, tiles, strip.groups, unpacked, strip.count, strip.groups * kTileNumbers, sums,
                              kStripRows};
    configure();
    if (strip.count == kStripBlocks) {
        multiply_first<format>(strip, product, unpacked);
        multiply_tiles(product, 2);
    } else {
        const __m512i places = side_by_side();
        for (int64_t g = 0; g < strip.groups; ++g) {
            unpack_group<format>(strip.blocks, strip.groups, g, places, unpacked + g * kTileNumbers);
        }
        multiply_tiles(product, 0);
    }
    _tile_release();
}

CRATON_AMX CRATON_INLINE __m512 load_sixteen(const float* p) { return _mm512_loadu_ps(p); }
CRATON_AMX CRATON_INLINE __m512 load_sixteen(const BFloat* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
CRATON_AMX CRATON_INLINE __m512 load_sixteen(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Numbers first .. first + 15 of a row of the cache, of which it has `size`.
template <typename T>
CRATON_AMX CRATON_INLINE __m512 load_sixteen(const T* row, int64_t first, int64_t) {
    return load_sixteen(row + first);
}
CRATON_AMX CRATON_INLINE __m512 load_sixteen(const Code* row, int64_t first, int64_t size) {
    const __m128i quants = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + first));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quants)), _mm512_set1_ps(scale_of(row, size)));
}

// Number j of line i becomes number i of line j.
CRATON_AMX CRATON_INLINE void transpose(__m512i lines[16]) {
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int apart = 1; apart < 16; apart *= 2) {
        // Of two lines, the numbers whose place has the bit `apart` change sides.
        const __mmask16 upper = _mm512_test_epi32_mask(count, _mm512_set1_epi32(apart));
        const __m512i other = _mm512_xor_si512(count, _mm512_set1_epi32(apart));
        for (int i = 0; i < 16; ++i) {
            if (i & apart) continue;
            const __m512i a = lines[i], b = lines[i + apart];
            lines[i] = _mm512_mask_permutexvar_epi32(a, upper, other, b);
            lines[i + apart] = _mm512_mask_permutexvar_epi32(b, __mmask16(~upper), other, a);
        }
    }
}

template <typename T>
CRATON_AMX void pack_keys(const void* from, int64_t count, int64_t size, BFloat* weights) {
    const T* keys = static_cast<const T*>(from);
    for (int64_t first = 0; first < size; first += kGroup, weights += kTileNumbers) {
        __m512i lines[16];
        for (int64_t key = 0; key < 16; ++key) {
            const bool whole = first + 16 < size;  // heads are a multiple of 16, groups of 32
            const T* row = keys + key * row_length<T>(size);
            const __m512 low = key < count ? load_sixteen(row, first, size) : _mm512_setzero_ps();
            const __m512 high = key < count && whole ? load_sixteen(row, first + 16, size) : _mm512_setzero_ps();
            lines[key] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        }
        transpose(lines);
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(weights + i * kGroup, lines[i]);
    }
}

template <typename T>
CRATON_AMX void pack_values(const void* from, int64_t count, int64_t size, BFloat* weights, int64_t apart) {
    const auto line_of = [&](int64_t i, int64_t first) CRATON_AMX {
        const T* row = static_cast<const T*>(from) + i * row_length<T>(size);
        return i < count ? load_sixteen(row, first, size) : _mm512_setzero_ps();
    };
    const __m512i places = side_by_side();
    for (int64_t first = 0; first < size; first += kBlockRows, weights += apart) {
        uint8_t* line = reinterpret_cast<uint8_t*>(weights);
        for (int64_t i = 0; i < kGroup; i += 2, line += kVectorBytes) {
            store_line(line_of(i, first), line_of(i + 1, first), places, line);
        }
    }
}

// The system lends the tile registers when asked: their state makes every switch between threads dearer.
bool supported() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr TileMath amx = {
    {multiply_strip<Q4_0>, multiply_strip<Q4_1>, multiply_strip<Q8_0>},
    {round_row<float>, round_row<BFloat>},
    multiply,
    {pack_keys<float>, pack_keys<BFloat>, pack_keys<Half>, pack_keys<Code>},
    {pack_values<float>, pack_values<BFloat>, pack_values<Half>, pack_values<Code>},
};

}  // namespace

const TileMath* tile_math() {
    static const TileMath* const found = supported() ? &amx : nullptr;
    return found;
}

}  // namespace craton
#else

namespace craton {

const TileMath* tile_math() { return nullptr; }

}  // namespace craton
#endif
