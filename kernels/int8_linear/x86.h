// The kernels for x86. Included by code.h.

// Keeps sums in a register, and the order of what led to them: reordered, they would need many more.
#define KEEP(vector) asm("" : "+v"(vector))

// Vectors of 256 bits, which two instruction sets share.
namespace numbers_avx2 {
#define TARGET TARGET_AVX2
using vector_avx2::all, vector_avx2::load, vector_avx2::store, vector_avx2::plus, vector_avx2::Float;
using Int = int32_t __attribute__((vector_size(32)));
constexpr int WIDTH = 8;

TARGET INLINE Int all(int32_t value) { return (Int)_mm256_set1_epi32(value); }
TARGET INLINE Float most(Float limit, Float value) { return _mm256_max_ps(limit, value); }  // of NaN, the second
TARGET INLINE Float least(Float limit, Float value) { return _mm256_min_ps(limit, value); }
TARGET INLINE Float magnitude(Float value) { return _mm256_andnot_ps(all(-0.f), value); }
TARGET INLINE Int integers(const int32_t* from) { return (Int)_mm256_loadu_si256((const __m256i*)from); }
TARGET INLINE Float floats(Int value) { return _mm256_cvtepi32_ps((__m256i)value); }
TARGET INLINE Int nearest(Float value) { return (Int)_mm256_cvtps_epi32(value); }
TARGET INLINE Float quotient(Float value, Float step, Float inverse) {
    const Float near = value * inverse;
    return plus(near, _mm256_fnmadd_ps(near, step, value), inverse);
}
TARGET INLINE __m128i in_16_bits(Int value) {
    return _mm_packs_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
}
TARGET INLINE void bytes(uint8_t* to, Int value) {
    const __m128i both = in_16_bits(value);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(both, both));
}
#undef TARGET
}  // namespace numbers_avx2

// AVX2 has no products of bytes that are exact: maddubs adds two of them in 16 bits, where it saturates. So bytes are
// widened to 16 bits, rows when they are rounded, weights as they are read.
namespace avx2 {
#define TARGET TARGET_AVX2
using namespace numbers_avx2;
constexpr int BYTES = 2;

TARGET INLINE void narrow(uint8_t* q, size_t place, Int value, int zero) {
    const __m128i code = _mm_max_epi16(_mm_min_epi16(in_16_bits(value), _mm_set1_epi16(255)), _mm_setzero_si128());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 2 * place), _mm_sub_epi16(code, _mm_set1_epi16(int16_t(zero))));
}
TARGET INLINE void fill(uint8_t* q, size_t in, size_t padded) { std::memset(q + 2 * in, 0, 2 * (padded - in)); }
#include "numbers.h"

// Of four outputs a vector has two sums each, of even and of odd pairs of inputs.
template <int R>
TARGET static void product(const uint8_t* q, size_t stride, const Panels& panels, int32_t* sums) {
    for (int first = 0; first < PAIR; first += 8) {
        __m256i low[R], high[R];
        UNROLL for (int r = 0; r < R; ++r)
            low[r] = high[r] = _mm256_setzero_si256();
        const int8_t* codes = panels.codes + first / PANEL * panels.bytes + first % PANEL * 4;
        for (size_t line = 0; line < panels.lines; ++line, codes += LINE) {
            const auto* both = reinterpret_cast<const __m128i*>(codes);
            const __m256i w_low = _mm256_cvtepi8_epi16(_mm_loadu_si128(both));
            const __m256i w_high = _mm256_cvtepi8_epi16(_mm_loadu_si128(both + 1));
            UNROLL for (int r = 0; r < R; ++r) {
                int64_t inputs;
                std::memcpy(&inputs, q + r * stride + 8 * line, 8);
                const __m256i x = _mm256_set1_epi64x(inputs);
                low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(x, w_low));
                KEEP(low[r]);
                high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(x, w_high));
                KEEP(high[r]);
            }
        }
        UNROLL for (int r = 0; r < R; ++r) {
            const __m256i mixed = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[r], high[r]), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * PAIR + first), mixed);
        }
    }
}
constexpr Code CODE = {
    6,      2,
    WHOLE,  round_row,
    finish, {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>}};
#undef TARGET
}  // namespace avx2

// AVX2's vectors, and an instruction that adds four products of unsigned and signed bytes in 32 bits.
namespace avx_vnni {
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
using namespace numbers_avx2;
constexpr int H = 2, BYTES = 1;

TARGET INLINE void narrow(uint8_t* q, size_t place, Int value, int) { bytes(q + place, value); }
TARGET INLINE void fill(uint8_t* q, size_t in, size_t padded) { std::memset(q + in, 0, padded - in); }
#include "numbers.h"

using Weights = __m256i;
using Row = __m256i;
TARGET INLINE Int none() { return Int{}; }
TARGET INLINE Weights weights(const int8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
TARGET INLINE Row row(const uint8_t* q) { return _mm256_set1_epi32(four(q)); }
TARGET INLINE void dot(Int& sum, Row x, Weights w) { sum = (Int)_mm256_dpbusd_avx_epi32((__m256i)sum, x, w); }
TARGET INLINE void put(int32_t* to, const Int (&sum)[H]) { std::memcpy(to, sum, sizeof sum); }
#include "tile.h"
constexpr Code CODE = {
    6, 1, 0, round_row, finish, {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>}};
#undef TARGET
}  // namespace avx_vnni

namespace avx512_vnni {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
using vector_avx512::all, vector_avx512::load, vector_avx512::store, vector_avx512::plus, vector_avx512::Float;
using Int = int32_t __attribute__((vector_size(64)));
constexpr int WIDTH = 16, H = 2, BYTES = 1;

TARGET INLINE Int all(int32_t value) { return (Int)_mm512_set1_epi32(value); }
TARGET INLINE Float most(Float limit, Float value) { return _mm512_max_ps(limit, value); }  // of NaN, the second
TARGET INLINE Float least(Float limit, Float value) { return _mm512_min_ps(limit, value); }
TARGET INLINE Float magnitude(Float value) { return _mm512_abs_ps(value); }
TARGET INLINE Int integers(const int32_t* from) { return (Int)_mm512_loadu_si512(from); }
TARGET INLINE Float floats(Int value) { return _mm512_cvtepi32_ps((__m512i)value); }
TARGET INLINE Int nearest(Float value) { return (Int)_mm512_cvtps_epi32(value); }
TARGET INLINE Float quotient(Float value, Float step, Float inverse) {
    const Float near = value * inverse;
    return plus(near, _mm512_fnmadd_ps(near, step, value), inverse);
}
TARGET INLINE void bytes(uint8_t* to, Int value) {
    const __m512i positive = _mm512_max_epi32((__m512i)value, _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(positive));
}
TARGET INLINE void narrow(uint8_t* q, size_t place, Int value, int) { bytes(q + place, value); }
TARGET INLINE void fill(uint8_t* q, size_t in, size_t padded) { std::memset(q + in, 0, padded - in); }
#include "numbers.h"

using Weights = __m512i;
using Row = __m512i;
TARGET INLINE Int none() { return Int{}; }
TARGET INLINE Weights weights(const int8_t* from) { return _mm512_loadu_si512(from); }
TARGET INLINE Row row(const uint8_t* q) { return _mm512_set1_epi32(four(q)); }
TARGET INLINE void dot(Int& sum, Row x, Weights w) { sum = (Int)_mm512_dpbusd_epi32((__m512i)sum, x, w); }
TARGET INLINE void put(int32_t* to, const Int (&sum)[H]) { std::memcpy(to, sum, sizeof sum); }
#include "tile.h"
constexpr Code CODE = {12,
                       1,
                       0,
                       round_row,
                       finish,
                       {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>, product<7>, product<8>,
                        product<9>, product<10>, product<11>, product<12>}};
#undef TARGET
}  // namespace avx512_vnni

#if AMX
// AVX-512, and products of matrices: 16 rows times 16 outputs, 64 inputs at once.
namespace amx_int8 {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")))

// Of the tile registers: 0 to 3 have sums, 4 and 5 rows of x, 6 and 7 weights.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // in bytes
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Of 16 rows or 32; those beyond the last one are garbage, and so are their sums.
template <bool TWO>
TARGET static void product(const uint8_t* q, size_t stride, const Panels& panels, int32_t* sums) {
    asm volatile("" ::: "memory");  // the compiler does not know what a tile is loaded from
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
    const int8_t* codes = panels.codes;
    for (size_t line = 0; line < panels.lines; line += PANEL, codes += PANEL * LINE, q += PAD) {
        _tile_loadd(6, codes, LINE);
        _tile_loadd(7, codes + panels.bytes, LINE);
        _tile_loadd(4, q, stride);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if constexpr (TWO) {
            _tile_loadd(5, q + 16 * stride, stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 4 * PAIR);
    _tile_stored(1, sums + PANEL, 4 * PAIR);
    if constexpr (TWO) {
        _tile_stored(2, sums + 16 * PAIR, 4 * PAIR);
        _tile_stored(3, sums + 16 * PAIR + PANEL, 4 * PAIR);
    }
}

TARGET static void enter() {
    static const Shapes shapes;
    _tile_loadconfig(&shapes);
}
TARGET static void leave() { _tile_release(); }

constexpr Code of_rows() {
    Code code = avx512_vnni::CODE;
    code.rows = MOST_ROWS;
    for (int r = 0; r < MOST_ROWS; ++r) code.products[r] = r < 16 ? product<false> : product<true>;
    code.enter = enter, code.leave = leave;
    return code;
}
constexpr Code CODE = of_rows();
constexpr size_t FEW_ROWS = 8;  // that vectors multiply sooner
#undef TARGET
}  // namespace amx_int8
#endif
