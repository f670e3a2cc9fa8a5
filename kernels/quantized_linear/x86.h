// The kernels for x86. Included by kernels.h.

// Keeps a vector in a register, and the order of the sums that led to it: reordered, they would need many more.
#define KEEP(vector) asm volatile("" : "+x"(vector))

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))

using vector_avx2::all, vector_avx2::load, vector_avx2::store, vector_avx2::plus;
using vector_avx2::Bits, vector_avx2::Float, vector_avx2::WIDTH;
using Int = __m256i;
constexpr int ROWS = 8;
constexpr bool STARTS = false;

TARGET INLINE Int all(int32_t value) { return _mm256_set1_epi32(value); }
TARGET INLINE Float load_full(const uint8_t* from) { return load(reinterpret_cast<const float*>(from)); }
TARGET INLINE Float load_half(const uint8_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
TARGET INLINE Float load_byte(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
TARGET INLINE Float floats(Int value) { return _mm256_cvtepi32_ps(value); }
TARGET INLINE Float minus(Float from, Float a, Float b) { return _mm256_fnmadd_ps(a, b, from); }
TARGET INLINE Int bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(from)); }
// The largest and the sum of the eight numbers of a vector.
TARGET INLINE uint32_t largest(Int values) {
    __m128i most = _mm_max_epu32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1))));
}
TARGET INLINE int32_t added(Int values) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}
// 32 numbers times `inverse`, as bytes.
TARGET INLINE Int rounded(const char* x, float inverse) {
    Int q[4];
    UNROLL for (int i = 0; i < 4; ++i) {
        const Float values = _mm256_loadu_ps(reinterpret_cast<const float*>(x + 32 * i));
        q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values, all(inverse)));
    }
    const Int mixed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// As plain::quantize.
TARGET static void quantize(const char* x, const Sizes& sizes, int offset, Quantized into, size_t R, size_t r) {
    for (size_t g = 0; g < sizes.groups(); ++g, x += 4 * sizes.group) {
        Int most = _mm256_setzero_si256();
        for (size_t i = 0; i < 4 * sizes.group; i += 32) {
            const Int magnitude = _mm256_and_si256(bytes(reinterpret_cast<const uint8_t*>(x + i)), all(0x7fffffff));
            most = _mm256_max_epu32(most, magnitude);
        }
        const Step step = step_of(largest(most));
        Int sums = _mm256_setzero_si256();
        for (size_t chunk = 0; chunk < sizes.group; chunk += CHUNK) {
            const Int q = step.finite ? rounded(x + 4 * chunk, step.inverse) : _mm256_setzero_si256();
            const Int pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            int8_t in_order[CHUNK];
            _mm256_storeu_si256(reinterpret_cast<Int*>(in_order), q);
            into.put(in_order, g * sizes.group + chunk, R, r);
        }
        into.put(step, added(sums), offset, sizes.minimum, g, R, r);
    }
}

using Bytes = Int;
TARGET INLINE Bytes repeated(const int8_t* q) { return all(four(q)); }

#include "gate.h"

TARGET INLINE Int low_half(Int both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }
TARGET INLINE Int high_half(Int both) { return low_half(_mm256_srli_epi16(both, 4)); }

// Halves of bytes: of 4 bits they are codes of different inputs, of 8 bits parts of the same codes.
struct Codes {
    Int low, high;
};
template <int BITS>
TARGET INLINE Codes split(const uint8_t* from) {
    const Int both = bytes(from);
    return {low_half(both), high_half(both)};
}

// maddubs adds two products in 16 bits. Of halves they are at most 2 * 15 * 127, so that the eight such sums of 32
// inputs fit too; of whole bytes, 2 * 255 * 127 would be too much already.
struct Part {
    Int low, high;
};
TARGET INLINE Part begin(Int) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
template <int BITS>
TARGET INLINE void dot(Part& part, const Codes& codes, Bytes q_low, Bytes q_high, bool first) {
    const Int low = _mm256_maddubs_epi16(codes.low, q_low);
    const Int high = _mm256_maddubs_epi16(codes.high, q_high);
    part.low = first ? low : _mm256_add_epi16(part.low, low);
    KEEP(part.low);
    Int& other = BITS == 4 ? part.low : part.high;
    other = BITS == 8 && first ? high : _mm256_add_epi16(other, high);
    KEEP(other);
}
template <int BITS>
TARGET INLINE Int end(Int sum, const Part& part) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part.low, _mm256_set1_epi16(1)));
    return BITS == 4 ? sum : _mm256_add_epi32(sum, _mm256_madd_epi16(part.high, _mm256_set1_epi16(16)));
}

#include "tile.h"
constexpr Code CODE = {ROWS,
                       {0, 0},
                       quantize,
                       apply,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>, product<4, 5>, product<4, 6>,
                         product<4, 7>, product<4, 8>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>, product<8, 5>, product<8, 6>,
                         product<8, 7>, product<8, 8>}}};
#undef TARGET
}  // namespace avx2

// AVX2's vectors, and an instruction that adds four products of unsigned and signed bytes in 32 bits.
namespace avx_vnni {
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
using avx2::Int, avx2::Float, avx2::WIDTH, avx2::all, avx2::load, avx2::store, avx2::load_full, avx2::load_half;
using avx2::load_byte, avx2::floats, avx2::plus, avx2::minus, avx2::bytes, avx2::Bytes, avx2::repeated, avx2::low_half, avx2::high_half;
constexpr int ROWS = 8;
constexpr bool STARTS = true;

struct Codes {
    Int low, high;
};
template <int BITS>
TARGET INLINE Codes split(const uint8_t* from) {
    const Int both = bytes(from);
    return BITS == 8 ? Codes{both, both} : Codes{low_half(both), high_half(both)};
}

using Part = Int;
TARGET INLINE Part begin(Int sum) { return sum; }
template <int BITS>
TARGET INLINE void dot(Part& part, const Codes& codes, Bytes low, Bytes high, bool) {
    part = _mm256_dpbusd_avx_epi32(part, codes.low, low);
    KEEP(part);
    if (BITS == 4) part = _mm256_dpbusd_avx_epi32(part, codes.high, high);
    KEEP(part);
}
template <int BITS>
TARGET INLINE Int end(Int, Part part) {
    return part;
}

#include "tile.h"
constexpr Code CODE = {ROWS,
                       {0, 0},
                       avx2::quantize,
                       avx2::apply,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>, product<4, 5>, product<4, 6>,
                         product<4, 7>, product<4, 8>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>, product<8, 5>, product<8, 6>,
                         product<8, 7>, product<8, 8>}}};
#undef TARGET
}  // namespace avx_vnni

namespace avx512_vnni {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

using vector_avx512::all, vector_avx512::load, vector_avx512::store, vector_avx512::plus;
using vector_avx512::Bits, vector_avx512::Float, vector_avx512::WIDTH;
using Int = __m512i;
constexpr int ROWS = 8;
constexpr bool STARTS = true;

TARGET INLINE Int all(int32_t value) { return _mm512_set1_epi32(value); }
TARGET INLINE Float load_full(const uint8_t* from) { return load(reinterpret_cast<const float*>(from)); }
TARGET INLINE Float load_half(const uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
TARGET INLINE Float load_byte(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
TARGET INLINE Float floats(Int value) { return _mm512_cvtepi32_ps(value); }
TARGET INLINE Float minus(Float from, Float a, Float b) { return _mm512_fnmadd_ps(a, b, from); }
#include "gate.h"

using Bytes = Int;
TARGET INLINE Bytes repeated(const int8_t* q) { return all(four(q)); }

struct Codes {
    Int low, high;
};
template <int BITS>
TARGET INLINE Codes split(const uint8_t* from) {
    const Int both = _mm512_loadu_si512(from), mask = _mm512_set1_epi8(15);
    if (BITS == 8) return {both, both};
    return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
}

using Part = Int;
TARGET INLINE Part begin(Int sum) { return sum; }
template <int BITS>
TARGET INLINE void dot(Part& part, const Codes& codes, Bytes low, Bytes high, bool) {
    part = _mm512_dpbusd_epi32(part, codes.low, low);
    KEEP(part);
    if (BITS == 4) part = _mm512_dpbusd_epi32(part, codes.high, high);
    KEEP(part);
}
template <int BITS>
TARGET INLINE Int end(Int, Part part) {
    return part;
}

#include "tile.h"
constexpr Code CODE = {ROWS,
                       {0, 0},
                       avx2::quantize,
                       apply,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>, product<4, 5>, product<4, 6>,
                         product<4, 7>, product<4, 8>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>, product<8, 5>, product<8, 6>,
                         product<8, 7>, product<8, 8>}}};
#undef TARGET
}  // namespace avx512_vnni

#if AMX
// AVX-512, and products of matrices: R rows times 16 outputs, 32 inputs at once. The weights of a tile are unpacked and
// its sums are read through memory, some groups ahead of what is done with them, so that none waits for another.
namespace amx_int8 {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")))
using namespace avx512_vnni;

constexpr int R = 16;
constexpr size_t AHEAD = 2;                 // groups that are multiplied before the sums of one are used
constexpr size_t UNPACKED = 6;              // groups whose codes are unpacked before
constexpr size_t RING = 8;                  // groups whose codes or sums are held
constexpr size_t GROUP_BYTES = 128 * TILE;  // of the largest group, unpacked

// Of the tile registers: 0 and 1 have sums, 2 and 4 codes, 3 and 5 rows of x.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns[16] = {64, 64, 64, CHUNK, 64, CHUNK};  // in bytes
    uint8_t rows[16] = {R, R, CHUNK / 4, R, CHUNK / 4, R};
};

// Codes of 4 bits of group `g`, as bytes.
TARGET INLINE void unpack(const Tile& tile, size_t g, uint8_t* into) {
    const uint8_t* codes = tile.groups + g * tile.bytes;
    for (size_t line = 0; line < 4 * tile.chunks; ++line) {
        const Codes halves = split<4>(codes + 64 * line);
        _mm512_store_si512(into + 128 * line, halves.low);
        _mm512_store_si512(into + 128 * line + 64, halves.high);
    }
}

// `into` becomes the products of all chunks of a group, by way of tile register SUMS. Their names are constants.
#define PRODUCTS(SUMS, CODES, X)                                                                  \
    _tile_zero(SUMS);                                                                             \
    for (size_t chunk = 0; chunk < chunks; ++chunk, q += CHUNK * R, codes += CHUNK * TILE) {      \
        _tile_loadd(CODES, codes, 64);                                                            \
        _tile_loadd(X, q, CHUNK);                                                                 \
        _tile_dpbsud(SUMS, X, CODES);                                                             \
    }                                                                                             \
    _tile_stored(SUMS, into, 64);

TARGET INLINE void multiply(size_t g, size_t chunks, const int8_t* q, const uint8_t* codes, int32_t (*into)[TILE]) {
    if (g % 2) {
        PRODUCTS(1, 4, 5)
    } else {
        PRODUCTS(0, 2, 3)
    }
}
#undef PRODUCTS

template <int BITS>
TARGET static void product(const Tile& tile, const Rows& rows, float* y, size_t stride) {
    alignas(64) int32_t sums[RING][R][TILE];
    alignas(64) uint8_t lines[BITS == 4 ? RING : 1][GROUP_BYTES];
    Float total[R];
    UNROLL for (int r = 0; r < R; ++r)
        total[r] = tile.bias ? load(tile.bias) : all(0.f);
    const Float middle = all(BITS == 4 ? 8.f : 128.f);
    const float* numbers = rows.numbers;
    const auto begin = [&](size_t g) TARGET __attribute__((always_inline)) {
        if (g < tile.count) {
            const uint8_t* codes = BITS == 4 ? lines[g % RING] : tile.groups + g * tile.bytes;
            const size_t chunks = tile.chunks;
            multiply(g, chunks, rows.q + g * chunks * CHUNK * R, codes, sums[g % RING]);
        }
    };
    for (size_t g = 0; BITS == 4 && g < std::min(tile.count, UNPACKED); ++g) unpack(tile, g, lines[g]);
    asm volatile("" ::: "memory");  // the compiler does not know what a tile is loaded from
    for (size_t g = 0; g < AHEAD; ++g) begin(g);
    Fetch next = rows.next.part(0, tile.count);
    for (size_t g = 0; g < tile.count; ++g, next.from += next.bytes, numbers += 3 * R) {
        next.now();
        if (BITS == 4 && g + UNPACKED < tile.count) unpack(tile, g + UNPACKED, lines[(g + UNPACKED) % RING]);
        asm volatile("" ::: "memory");
        begin(g + AHEAD);
        asm volatile("" ::: "memory");
        const int32_t (*own)[TILE] = sums[g % RING];
        const uint8_t* scales = tile.groups + g * tile.bytes + 64 * BITS * tile.chunks;
        const uint8_t* others = scales + tile.scale_bytes();
        const Float scale = tile.half ? load_half(scales) : load_full(scales);
        if (tile.minimum) {
            const Float minimum = tile.half ? load_half(others) : load_full(others);
            UNROLL for (int r = 0; r < R; ++r) {
                total[r] = plus(total[r], minimum, all(numbers[2 * R + r]));
                total[r] = plus(total[r], scale * all(numbers[r]), floats(_mm512_load_si512(own[r])));
            }
        } else {
            const Float zero = tile.zero ? load_byte(others) : middle;
            UNROLL for (int r = 0; r < R; ++r) {
                const Float value = minus(floats(_mm512_load_si512(own[r])), zero, all(numbers[2 * R + r]));
                total[r] = plus(total[r], scale * all(numbers[r]), value);
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        store(y + r * stride, total[r]);
}

TARGET static void enter() {
    static const Shapes shapes;
    _tile_loadconfig(&shapes);
}
TARGET static void leave() { _tile_release(); }

constexpr Code of_sixteen() {
    Code code = {R, {0, 0}, avx2::quantize, apply, {}, true, enter, leave};
    code.products[0][R - 1] = product<4>;
    code.products[1][R - 1] = product<8>;
    return code;
}
constexpr Code CODE = of_sixteen();
#undef TARGET
}  // namespace amx_int8
#endif
