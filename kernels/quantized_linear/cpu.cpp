// tokopt.cpu::QuantizedLinear: x [..., in] times a weight [out, in] of 4 or 8 bits in groups; see reference.py.
//
// Activations are rounded to 8 bits, products of a group summed in 32 bits, and the sums scaled in float32. The weight
// is packed once: tiles of 16 outputs lie one after another, and in a tile four inputs of all 16 outputs, then the
// next four. So a thread reads its part of the weight from beginning to end, once for all rows of x.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "../cpu/ops.h"
#include "../cpu/ort.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define ARM 1
#if defined(__clang__)
#define ARM_TARGET "dotprod"
#else
#define ARM_TARGET "arch=armv8.2-a+dotprod"
#endif
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define INLINE static inline __attribute__((always_inline))

// Keeps a vector in a register, and the order of the sums that led to it: reordered, they would need many more.
#define KEEP(vector) asm("" : "+x"(vector))

namespace tokopt {
namespace {

constexpr int TILE = 16;          // outputs that are interleaved
constexpr size_t CHUNK = 32;      // inputs, the smallest group
constexpr int MOST_ROWS = 8;      // that a kernel works on at once
constexpr size_t AHEAD = 4096;    // bytes between what is read and what is fetched

struct Sizes {
    size_t in, out, group;
    int bits;
    bool half;              // scales and minima have 16 bits
    bool zero, minimum;     // one of them at most is there

    size_t groups() const { return in / group; }
    size_t tiles() const { return (out + TILE - 1) / TILE; }
    size_t row_bytes() const { return in * bits / 8; }
    size_t float_bytes() const { return half ? 2 : 4; }
};

// What a kernel reads of one tile of 16 outputs, group after group: the codes, as lines of 64 bytes that hold 4 bytes of
// each output, then the 16 scales, and 16 zero points or minima.
struct Tile {
    const uint8_t* groups;
    const float* bias;      // [16], or null
    size_t count, bytes;    // of groups, of one group
    size_t chunks;          // of 32 inputs, in a group
    bool half, zero, minimum;

    size_t scale_bytes() const { return TILE * (half ? 2 : 4); }
};

// R rows of x in 8 bits, interleaved.
struct Rows {
    const int8_t* q;       // [in / 4, R, 4]
    const float* scale;    // [groups, R]
    const int32_t* start;  // [groups, R] what the integer sum begins with
    const float* sum;      // [groups, R] of q; times scale where the weight has minima
    bool first;            // of the blocks that the tile is multiplied with: it comes from memory
};

// How the numbers of a group are rounded: to `scale` times an integer.
struct Step {
    float scale, inverse;
    bool finite;
};

INLINE Step step_of(uint32_t peak_bits) {  // of the largest magnitude; NaN is above all numbers
    float peak;
    std::memcpy(&peak, &peak_bits, 4);
    if (peak_bits >= 0x7f800000) return {std::numeric_limits<float>::quiet_NaN(), 0, false};
    const float scale = peak / 127;
    if (scale < std::numeric_limits<float>::min()) return {0, 0, true};
    return {scale, 127 / peak, true};
}

// Where R rows of x go, interleaved.
struct Quantized {
    int8_t* q;
    float* scale;
    int32_t* start;
    float* sum;

    // 32 integers of row `r`, from input `first` on.
    void put(const int8_t* from, size_t first, size_t R, size_t r) const {
        int8_t* to = q + first * R + 4 * r;
        if (R == 1) {
            std::memcpy(to, from, CHUNK);
        } else {
            for (size_t i = 0; i < CHUNK / 4; ++i) std::memcpy(to + 4 * i * R, from + 4 * i, 4);
        }
    }
    // What the kernels need to know of a group; `offset` is what they added to the codes, less their zero point where
    // all have the same.
    void put(const Step& step, int32_t total, int offset, bool minimum, size_t place) const {
        scale[place] = step.scale;
        start[place] = offset * total;
        sum[place] = minimum ? step.scale * static_cast<float>(total) : static_cast<float>(total);
    }
};

using Product = void (*)(const Tile&, const Rows&, float* y, size_t stride);
using Quantize = void (*)(const char* x, const Sizes&, int offset, Quantized into, size_t R, size_t r);

// The functions of one instruction set.
struct Code {
    size_t rows;                      // worked on at once
    int offset[2];                    // subtracted from codes of 4 and of 8 bits before they are multiplied
    Quantize quantize;
    Product products[2][MOST_ROWS];   // [4 or 8 bits][rows - 1]
};

INLINE int32_t four(const int8_t* q) {
    int32_t dword;
    std::memcpy(&dword, q, 4);
    return dword;
}

// ---------------------------------------------------------------------------------------------------------- plain C

namespace plain {
#define TARGET
#include "quantize.h"

float number(const uint8_t* from, size_t place, bool half) {
    if (!half) {
        float value;
        std::memcpy(&value, from + 4 * place, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, from + 2 * place, 2);
    // Exponent and mantissa moved into those of a float, then scaled by the difference of the biases: 2^112.
    uint32_t wide = (bits & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &wide, 4);
    value *= 5192296858534827628530496329220096.f;
    if ((bits & 0x7c00) == 0x7c00) value = bits & 0x3ff ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    return bits & 0x8000 ? -value : value;
}

template <int BITS, int R>
void product(const Tile& tile, const Rows& rows, float* y, size_t stride) {
    float total[R][TILE];
    for (auto& row : total) {
        for (int o = 0; o < TILE; ++o) row[o] = tile.bias ? tile.bias[o] : 0;
    }
    const int8_t* q = rows.q;
    for (size_t g = 0; g < tile.count; ++g) {
        const uint8_t* codes = tile.groups + g * tile.bytes;
        int32_t sum[R][TILE];
        for (int r = 0; r < R; ++r) std::fill(sum[r], sum[r] + TILE, rows.start[g * R + r]);
        for (size_t line = 0; line < tile.chunks * BITS; ++line, codes += 4 * TILE) {
            for (int half = 0; half < 8 / BITS; ++half, q += 4 * R) {
                for (int o = 0; o < TILE; ++o) {
                    for (int i = 0; i < 4; ++i) {
                        const int code = BITS == 8 ? codes[4 * o + i] : codes[4 * o + i] >> 4 * half & 15;
                        for (int r = 0; r < R; ++r) sum[r][o] += code * q[4 * r + i];
                    }
                }
            }
        }
        for (int o = 0; o < TILE; ++o) {
            const uint8_t* others = codes + tile.scale_bytes();
            const float scale = number(codes, o, tile.half);
            const float zero = tile.zero ? others[o] : 0;
            const float minimum = tile.minimum ? number(others, o, tile.half) : 0;
            for (int r = 0; r < R; ++r) {
                const float q_sum = rows.sum[g * R + r];
                total[r][o] += minimum * q_sum;
                total[r][o] += scale * rows.scale[g * R + r] * (static_cast<float>(sum[r][o]) - zero * q_sum);
            }
        }
    }
    for (int r = 0; r < R; ++r) std::copy(total[r], total[r] + TILE, y + r * stride);
}

constexpr Code CODE = {4,
                       {0, 0},
                       quantize,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>}}};
#undef TARGET
}  // namespace plain

#if X86
// ------------------------------------------------------------------------------------------------------------- x86

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))

using Int = __m256i;
using Float = __m256;
constexpr int WIDTH = 8, ROWS = 4;

TARGET INLINE Int all(int32_t value) { return _mm256_set1_epi32(value); }
TARGET INLINE Float all(float value) { return _mm256_set1_ps(value); }
TARGET INLINE Float load(const float* from) { return _mm256_loadu_ps(from); }
TARGET INLINE void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
TARGET INLINE Float load_full(const uint8_t* from) { return load(reinterpret_cast<const float*>(from)); }
TARGET INLINE Float load_half(const uint8_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
TARGET INLINE Float load_byte(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
TARGET INLINE Float floats(Int value) { return _mm256_cvtepi32_ps(value); }
TARGET INLINE Float times(Float a, Float b) { return _mm256_mul_ps(a, b); }
TARGET INLINE Float plus(Float to, Float a, Float b) { return _mm256_fmadd_ps(a, b, to); }
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
        into.put(step, added(sums), offset, sizes.minimum, g * R + r);
    }
}

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
TARGET INLINE void dot(Part& part, const Codes& codes, const int8_t* q, size_t next) {
    const Int low = _mm256_maddubs_epi16(codes.low, all(four(q)));
    const Int high = _mm256_maddubs_epi16(codes.high, all(four(BITS == 4 ? q + next : q)));
    part.low = _mm256_add_epi16(part.low, low);
    Int& other = BITS == 4 ? part.low : part.high;
    KEEP(part.low);
    other = _mm256_add_epi16(other, high);
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
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>}}};
#undef TARGET
}  // namespace avx2

// AVX2's vectors, and an instruction that adds four products of unsigned and signed bytes in 32 bits.
namespace avx_vnni {
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
using avx2::Int, avx2::Float, avx2::WIDTH, avx2::all, avx2::load, avx2::store, avx2::load_full, avx2::load_half;
using avx2::load_byte, avx2::floats, avx2::times, avx2::plus, avx2::minus, avx2::bytes, avx2::low_half, avx2::high_half;
constexpr int ROWS = 4;

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
TARGET INLINE void dot(Part& part, const Codes& codes, const int8_t* q, size_t next) {
    part = _mm256_dpbusd_avx_epi32(part, codes.low, all(four(q)));
    if (BITS == 4) part = _mm256_dpbusd_avx_epi32(part, codes.high, all(four(q + next)));
}
template <int BITS>
TARGET INLINE Int end(Int, Part part) {
    return part;
}

#include "tile.h"
constexpr Code CODE = {ROWS,
                       {0, 0},
                       avx2::quantize,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>}}};
#undef TARGET
}  // namespace avx_vnni

namespace avx512_vnni {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

using Int = __m512i;
using Float = __m512;
constexpr int WIDTH = 16, ROWS = 8;

TARGET INLINE Int all(int32_t value) { return _mm512_set1_epi32(value); }
TARGET INLINE Float all(float value) { return _mm512_set1_ps(value); }
TARGET INLINE Float load(const float* from) { return _mm512_loadu_ps(from); }
TARGET INLINE void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
TARGET INLINE Float load_full(const uint8_t* from) { return load(reinterpret_cast<const float*>(from)); }
TARGET INLINE Float load_half(const uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
TARGET INLINE Float load_byte(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
TARGET INLINE Float floats(Int value) { return _mm512_cvtepi32_ps(value); }
TARGET INLINE Float times(Float a, Float b) { return _mm512_mul_ps(a, b); }
TARGET INLINE Float plus(Float to, Float a, Float b) { return _mm512_fmadd_ps(a, b, to); }
TARGET INLINE Float minus(Float from, Float a, Float b) { return _mm512_fnmadd_ps(a, b, from); }

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
TARGET INLINE void dot(Part& part, const Codes& codes, const int8_t* q, size_t next) {
    part = _mm512_dpbusd_epi32(part, codes.low, all(four(q)));
    if (BITS == 4) part = _mm512_dpbusd_epi32(part, codes.high, all(four(q + next)));
}
template <int BITS>
TARGET INLINE Int end(Int, Part part) {
    return part;
}

#include "tile.h"
constexpr Code CODE = {ROWS,
                       {0, 0},
                       avx2::quantize,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>, product<4, 5>, product<4, 6>,
                         product<4, 7>, product<4, 8>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>, product<8, 5>, product<8, 6>,
                         product<8, 7>, product<8, 8>}}};
#undef TARGET
}  // namespace avx512_vnni
#endif

#if ARM
// ------------------------------------------------------------------------------------------------------------- Arm

namespace neon {
#define TARGET __attribute__((target(ARM_TARGET)))
#include "quantize.h"

using Int = int32x4_t;
using Float = float32x4_t;
constexpr int WIDTH = 4, ROWS = 8;

TARGET INLINE Int all(int32_t value) { return vdupq_n_s32(value); }
TARGET INLINE Float all(float value) { return vdupq_n_f32(value); }
TARGET INLINE Float load(const float* from) { return vld1q_f32(from); }
TARGET INLINE void store(float* to, Float value) { vst1q_f32(to, value); }
TARGET INLINE Float load_full(const uint8_t* from) { return load(reinterpret_cast<const float*>(from)); }
TARGET INLINE Float load_half(const uint8_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
}
TARGET INLINE Float load_byte(const uint8_t* from) {
    const uint8x8_t four = vreinterpret_u8_u32(vdup_n_u32(uint32_t(tokopt::four(reinterpret_cast<const int8_t*>(from)))));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four))));
}
TARGET INLINE Float floats(Int value) { return vcvtq_f32_s32(value); }
TARGET INLINE Float times(Float a, Float b) { return vmulq_f32(a, b); }
TARGET INLINE Float plus(Float to, Float a, Float b) { return vfmaq_f32(to, a, b); }
TARGET INLINE Float minus(Float from, Float a, Float b) { return vfmsq_f32(from, a, b); }

// The products are of signed bytes: 128 is subtracted from codes of 8 bits.
struct Codes {
    int8x16_t low, high;
};
template <int BITS>
TARGET INLINE Codes split(const uint8_t* from) {
    const uint8x16_t both = vld1q_u8(from);
    if (BITS == 8) {
        const int8x16_t shifted = vreinterpretq_s8_u8(veorq_u8(both, vdupq_n_u8(128)));
        return {shifted, shifted};
    }
    return {vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8(both, 4))};
}

using Part = Int;
TARGET INLINE Part begin(Int sum) { return sum; }
TARGET INLINE int8x16_t repeated(const int8_t* q) { return vreinterpretq_s8_s32(all(four(q))); }
template <int BITS>
TARGET INLINE void dot(Part& part, const Codes& codes, const int8_t* q, size_t next) {
    part = vdotq_s32(part, codes.low, repeated(q));
    if (BITS == 4) part = vdotq_s32(part, codes.high, repeated(q + next));
}
template <int BITS>
TARGET INLINE Int end(Int, Part part) {
    return part;
}

#include "tile.h"
constexpr Code CODE = {ROWS,
                       {0, 128},
                       quantize,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>, product<4, 5>, product<4, 6>,
                         product<4, 7>, product<4, 8>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>, product<8, 5>, product<8, 6>,
                         product<8, 7>, product<8, 8>}}};
#undef TARGET
}  // namespace neon
#endif

const Code& code(Isa isa) {
    switch (isa) {
#if X86
        case Isa::AVX2: return avx2::CODE;
        case Isa::AVX_VNNI: return avx_vnni::CODE;
        case Isa::AVX512_VNNI: return avx512_vnni::CODE;
#endif
#if ARM
        case Isa::NEON: return neon::CODE;
#endif
        default: return plain::CODE;
    }
}

// ------------------------------------------------------------------------------------------------------- the weight

// Constant inputs of a node, as ONNX has them.
struct Source {
    Sizes sizes;
    const uint8_t* codes;    // [out, in] of 4 or 8 bits
    const uint8_t* scale;    // [out, groups]
    const uint8_t* zero;     // [out, groups], or null
    const uint8_t* minimum;  // [out, groups], or null
    const uint8_t* bias;     // [out] float32, or null
};

// Codes of group `g` of tile `t`, in lines of 64 bytes.
void pack_codes(const uint8_t* from, const Sizes& sizes, size_t t, size_t g, uint8_t* into) {
    const size_t bytes = sizes.group * sizes.bits / 8;  // of one output
    for (size_t o = 0; o < TILE && t * TILE + o < sizes.out; ++o) {
        const uint8_t* row = from + ((t * TILE + o) * sizes.groups() + g) * bytes;
        for (size_t line = 0; line < bytes / 4; ++line) {
            uint32_t word;
            std::memcpy(&word, row + 4 * line, 4);
            if (sizes.bits == 4) {
                // Byte i gets input i in its low half and input i + 4 in its high half.
                uint32_t low = word & 0xffff, high = word >> 16;
                low = (low | low << 8) & 0x00ff00ff, high = (high | high << 8) & 0x00ff00ff;
                low = (low | low << 4) & 0x0f0f0f0f, high = (high | high << 4) & 0x0f0f0f0f;
                word = low | high << 4;
            }
            std::memcpy(into + (line * TILE + o) * 4, &word, 4);
        }
    }
}

// Numbers of group `g` of tile `t`, or zero where the tile is beyond the last output.
void pack_numbers(const uint8_t* from, const Sizes& sizes, size_t bytes, size_t t, size_t g, uint8_t* into) {
    for (size_t o = 0; o < TILE; ++o) {
        const size_t row = t * TILE + o;
        if (row < sizes.out) std::memcpy(into + o * bytes, from + (row * sizes.groups() + g) * bytes, bytes);
    }
}

std::atomic<size_t> packed{0};

// Memory that weights lie in one after another: with large pages, fewer addresses are translated.
class Slab {
  public:
    static constexpr size_t PAGE = size_t(1) << 21, SIZE = 16 * PAGE;

    explicit Slab(size_t bytes) : size((bytes + PAGE - 1) / PAGE * PAGE) {
        void* memory = nullptr;
        if (posix_memalign(&memory, PAGE, size)) throw std::bad_alloc();
        data = static_cast<uint8_t*>(memory);
#if defined(__linux__)
        madvise(data, size, MADV_HUGEPAGE);  // a wish, which the system may not grant
#endif
    }
    ~Slab() { std::free(data); }
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;

    // Null where `bytes` more do not fit.
    uint8_t* next(size_t bytes) {
        if (bytes > size - used) return nullptr;
        used += bytes;
        return data + used - bytes;
    }

  private:
    const size_t size;
    size_t used = 0;
    uint8_t* data;
};

// A part of a slab; the slab is freed with the last of its parts.
struct Packed {
    explicit Packed(size_t bytes) : bytes(bytes) {
        static auto& mutex = *new std::mutex;
        static auto& newest = *new std::weak_ptr<Slab>;
        const std::lock_guard<std::mutex> lock(mutex);
        slab = newest.lock();
        data = slab ? slab->next(bytes) : nullptr;
        if (!data) {
            slab = std::make_shared<Slab>(std::max(bytes, Slab::SIZE));
            data = slab->next(bytes);
            newest = slab;
        }
        packed += bytes;
    }
    ~Packed() { packed -= bytes; }
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;

    const size_t bytes;
    uint8_t* data;

  private:
    std::shared_ptr<Slab> slab;
};

// A weight in the order of the kernels.
class Weight {
  public:
    explicit Weight(const Source& from)
        : sizes(from.sizes), has_bias(from.bias), memory(tile_bytes() * sizes.tiles()) {
        for (size_t t = 0; t < sizes.tiles(); ++t) pack(from, t, memory.data + t * tile_bytes());
    }

    // Whether packing `from` would give this.
    bool holds(const Source& from) const {
        const Sizes& other = from.sizes;
        if (sizes.in != other.in || sizes.out != other.out || sizes.group != other.group || sizes.bits != other.bits ||
            sizes.half != other.half || sizes.zero != other.zero || sizes.minimum != other.minimum ||
            has_bias != (from.bias != nullptr))
            return false;
        std::vector<uint8_t> own(tile_bytes());
        for (size_t t = 0; t < sizes.tiles(); ++t) {
            pack(from, t, own.data());
            if (std::memcmp(own.data(), memory.data + t * own.size(), own.size())) return false;
        }
        return true;
    }

    Tile tile(size_t t) const {
        const uint8_t* data = memory.data + t * tile_bytes();
        const float* bias = has_bias ? reinterpret_cast<const float*>(data + bias_place()) : nullptr;
        return {data, bias, sizes.groups(), group_bytes(), sizes.group / CHUNK, sizes.half, sizes.zero, sizes.minimum};
    }

    const Sizes sizes;

  private:
    size_t code_bytes() const { return TILE * sizes.group * sizes.bits / 8; }
    size_t scale_bytes() const { return TILE * sizes.float_bytes(); }
    size_t group_bytes() const {
        return code_bytes() + scale_bytes() + (sizes.zero ? TILE : sizes.minimum ? scale_bytes() : 0);
    }
    size_t bias_place() const { return sizes.groups() * group_bytes(); }
    size_t tile_bytes() const { return (bias_place() + (has_bias ? 4 * TILE : 0) + 63) / 64 * 64; }

    void pack(const Source& from, size_t t, uint8_t* into) const {
        std::memset(into, 0, tile_bytes());  // what lies between the parts, and beyond the last output
        for (size_t g = 0; g < sizes.groups(); ++g) {
            uint8_t* group = into + g * group_bytes();
            uint8_t* numbers = group + code_bytes();
            pack_codes(from.codes, sizes, t, g, group);
            pack_numbers(from.scale, sizes, sizes.float_bytes(), t, g, numbers);
            if (sizes.zero) pack_numbers(from.zero, sizes, 1, t, g, numbers + scale_bytes());
            if (sizes.minimum) pack_numbers(from.minimum, sizes, sizes.float_bytes(), t, g, numbers + scale_bytes());
        }
        if (has_bias) {
            const size_t valid = std::min<size_t>(TILE, sizes.out - t * TILE);
            std::memcpy(into + bias_place(), from.bias + 4 * TILE * t, 4 * valid);
        }
    }

    const bool has_bias;
    const Packed memory;
};

uint64_t mixed(uint64_t hash, const uint8_t* data, size_t bytes) {
    for (; bytes >= 8; data += 8, bytes -= 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    for (; bytes; ++data, --bytes) hash = (hash ^ *data) * 0x9e3779b97f4a7c15u;
    return hash;
}

// The packed form of `from`, the same object for all sessions of the process that have this weight.
std::shared_ptr<const Weight> shared(const Source& from) {
    // Never destroyed: a session may outlive the library's own static objects.
    static auto& mutex = *new std::mutex;
    static auto& known = *new std::unordered_multimap<uint64_t, std::weak_ptr<const Weight>>;
    const Sizes& sizes = from.sizes;
    uint64_t key = mixed(sizes.in, from.codes, sizes.out * sizes.row_bytes());
    key = mixed(key, from.scale, sizes.out * sizes.groups() * sizes.float_bytes());
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto [found, end] = known.equal_range(key); found != end;) {
        const std::shared_ptr<const Weight> weight = found->second.lock();
        if (weight && weight->holds(from)) return weight;
        found = weight ? std::next(found) : known.erase(found);
    }
    auto weight = std::make_shared<const Weight>(from);
    known.emplace(key, weight);
    return weight;
}

// ------------------------------------------------------------------------------------------------------- the kernel

// Memory of a thread that calls kernels; it grows and is kept.
class Scratch {
  public:
    ~Scratch() { std::free(data); }
    uint8_t* of(size_t bytes) {
        if (bytes > size) {
            std::free(data);
            data = nullptr, size = 0;
            void* memory = nullptr;
            if (posix_memalign(&memory, 64, bytes)) throw std::bad_alloc();
            data = static_cast<uint8_t*>(memory), size = bytes;
        }
        return data;
    }

  private:
    uint8_t* data = nullptr;
    size_t size = 0;
};

struct Kernel {
    Api api;
    const Code* code;
    std::shared_ptr<const Weight> weight;
};

// One call: rows of x, rounded, times the weight. Rows are worked on in blocks, and the weight in tiles.
class Call {
  public:
    Call(const Kernel& kernel, const char* x, size_t rows, char* y)
        : code(*kernel.code), weight(*kernel.weight), sizes(weight.sizes), x(x), rows(rows), y(y) {
        static thread_local Scratch scratch;
        const size_t groups = sizes.groups();
        into.scale = reinterpret_cast<float*>(scratch.of(rows * (12 * groups + sizes.in)));
        into.start = reinterpret_cast<int32_t*>(into.scale + rows * groups);
        into.sum = reinterpret_cast<float*>(into.start + rows * groups);
        into.q = reinterpret_cast<int8_t*>(into.sum + rows * groups);
    }

    void run(const Api& api, const OrtKernelContext* context) {
        const size_t blocks = (rows + code.rows - 1) / code.rows;
        if (rows * sizes.in < SERIAL) {
            for (size_t block = 0; block < blocks; ++block) quantize(block);
        } else {
            api.parallel(context, [](void* call, size_t block) { static_cast<Call*>(call)->quantize(block); }, blocks, this);
        }
        parts = (rows + PART - 1) / PART;
        api.parallel(context, [](void* call, size_t i) { static_cast<Call*>(call)->multiply(i); }, sizes.tiles() * parts,
                     this);
    }

  private:
    static constexpr size_t SERIAL = 16384;  // numbers that one thread rounds sooner than it could share them out
    static constexpr size_t PART = 64;       // rows whose rounded numbers stay in a core's cache

    size_t in_block(size_t block) const { return std::min(code.rows, rows - block * code.rows); }

    // Block `block` of the rounded rows: those before it are all full.
    Quantized block_of(size_t block) const {
        const size_t first = block * code.rows, groups = sizes.groups();
        return {into.q + first * sizes.in, into.scale + first * groups, into.start + first * groups,
                into.sum + first * groups};
    }

    void quantize(size_t block) const {
        const int added = code.offset[sizes.bits == 8];
        const int offset = sizes.zero || sizes.minimum ? added : added - (1 << (sizes.bits - 1));
        const size_t R = in_block(block);
        for (size_t r = 0; r < R; ++r)
            code.quantize(x + (block * code.rows + r) * sizes.in * 4, sizes, offset, block_of(block), R, r);
    }

    // Part `i % parts` of the rows, times tile `i / parts`.
    void multiply(size_t i) const {
        const size_t t = i / parts, part = i % parts;
        const Tile tile = weight.tile(t);
        const size_t valid = std::min<size_t>(TILE, sizes.out - t * TILE);
        const size_t end = std::min((part + 1) * PART, rows);
        for (size_t row = part * PART; row < end; row += code.rows) {
            const size_t block = row / code.rows, R = in_block(block);
            const Quantized own = block_of(block);
            float out[MOST_ROWS * TILE];
            const Rows block_rows = {own.q, own.scale, own.start, own.sum, row == 0};
            code.products[sizes.bits == 8][R - 1](tile, block_rows, out, TILE);
            for (size_t r = 0; r < R; ++r) {
                std::memcpy(y + ((row + r) * sizes.out + t * TILE) * 4, out + r * TILE, valid * 4);
            }
        }
    }

    const Code& code;
    const Weight& weight;
    const Sizes& sizes;
    const char* x;  // [rows, in] of float32, at any address
    const size_t rows;
    char* y;  // [rows, out] of float32
    size_t parts = 0;
    Quantized into;
};

// ----------------------------------------------------------------------------------------------- reading the node

enum Input : size_t { X, CODES, SCALE, ZERO, MINIMUM, BIAS, INPUTS };
const char* const INPUT_NAMES[INPUTS] = {"x", "codes", "scale", "zero", "minimum", "bias"};

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
    std::string joined;
    for (int64_t size : shape) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
    return "[" + joined + "]";
}

struct Constant {
    const uint8_t* data = nullptr;
    int element = 0;
    Shape shape;
};

// Reads a node, and refuses what the kernels could not compute.
class Node {
  public:
    Node(const Api& api, const OrtKernelInfo* info) : api(api), info(info) {}

    Source read() const {
        const int64_t bits = attribute("bits"), group = attribute("group");
        if (bits != 4 && bits != 8) refuse("bits=" + std::to_string(bits) + " must be 4 or 8");
        if (group != 32 && group != 64 && group != 128)
            refuse("group=" + std::to_string(group) + " must be 32, 64 or 128");
        const Constant codes = constant(CODES), scale = constant(SCALE), zero = constant(ZERO);
        const Constant minimum = constant(MINIMUM), bias = constant(BIAS);
        if (codes.element != UINT8 || codes.shape.size() != 2)
            refuse("codes must be bytes [out, in * bits / 8], got " + text(codes.shape));
        if (scale.element != FLOAT && scale.element != FLOAT16) refuse("scale must be float32 or float16");
        if (zero.data && minimum.data) refuse("zero and minimum exclude each other; give one of them");
        const int64_t out = codes.shape[0], in = codes.shape[1] * 8 / bits;
        if (out < 1 || in < 1 || in % group)
            refuse("codes " + text(codes.shape) + " of " + std::to_string(bits) + " bits are not outputs of whole groups of " +
                   std::to_string(group) + " inputs");
        const Shape numbers = {out, in / group};
        fit(SCALE, scale, scale.element, numbers);
        if (zero.data) fit(ZERO, zero, UINT8, numbers);
        if (minimum.data) fit(MINIMUM, minimum, scale.element, numbers);
        if (bias.data) fit(BIAS, bias, FLOAT, {out});
        const Sizes sizes = {size_t(in), size_t(out), size_t(group), int(bits), scale.element == FLOAT16,
                             zero.data != nullptr, minimum.data != nullptr};
        return {sizes, codes.data, scale.data, zero.data, minimum.data, bias.data};
    }

  private:
    [[noreturn]] void refuse(const std::string& what) const {
        throw Refused("tokopt.cpu::QuantizedLinear '" + api.node_name(info) + "': " + what + ".");
    }

    int64_t attribute(const char* name) const {
        int64_t value = 0;
        if (!api.integer(info, name, &value)) refuse("attribute " + std::string(name) + " is missing");
        return value;
    }

    // Without data where an optional input is left out.
    Constant constant(Input place) const {
        if (place >= api.inputs(info) || api.input_name(info, place).empty()) {
            if (place == CODES || place == SCALE) refuse(std::string(INPUT_NAMES[place]) + " is missing");
            return {};
        }
        const OrtValue* value = api.constant(info, place);
        if (!value) refuse(std::string(INPUT_NAMES[place]) + " must be a constant");
        OrtShapeInfo* shape_info = api.shape_info(value);
        Constant found;
        found.element = api.element(shape_info);
        found.shape.resize(api.rank(shape_info));
        api.dimensions(shape_info, found.shape.data(), found.shape.size());
        api.release(shape_info);
        found.data = static_cast<const uint8_t*>(api.data(value));
        return found;
    }

    void fit(Input place, const Constant& given, int element, const Shape& shape) const {
        const std::string name = INPUT_NAMES[place];
        if (given.element != element) refuse(name + (place == MINIMUM ? " must have the type of scale" : " is of another type"));
        if (given.shape != shape) refuse(name + " must be " + text(shape) + ", got " + text(given.shape));
    }

    const Api& api;
    const OrtKernelInfo* info;
};

OrtStatus* create(Isa isa, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] { *kernel = new Kernel{api, &code(isa), shared(Node(api, info).read())}; });
}

// The output has the shape of x, but for its last axis.
OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    const Api api(registered());
    return guarded(api, [&] {
        const OrtShapeInfo *x = api.input_shape(context, X), *codes = api.input_shape(context, CODES);
        Shape shape(api.rank(x)), sizes(api.rank(codes));
        if (shape.empty() || sizes.empty()) return;  // not known
        api.dimensions(x, shape.data(), shape.size());
        api.dimensions(codes, sizes.data(), sizes.size());
        std::vector<const char*> names(shape.size());
        api.symbols(x, names.data(), names.size());
        shape.back() = sizes[0], names.back() = "";
        api.set_output_shape(context, 0, FLOAT, shape, names);
    });
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    const Api& api = kernel.api;
    return guarded(api, [&] {
        constexpr size_t MOST_AXES = 16;
        const OrtValue* x = api.input(context, X);
        int64_t shape[MOST_AXES];
        OrtShapeInfo* info = api.shape_info(x);
        const size_t rank = api.rank(info);
        if (rank <= MOST_AXES) api.dimensions(info, shape, rank);
        api.release(info);
        const Sizes& sizes = kernel.weight->sizes;
        if (rank < 1 || rank > MOST_AXES || shape[rank - 1] != int64_t(sizes.in))
            throw Refused("tokopt.cpu::QuantizedLinear: x must be [..., " + std::to_string(sizes.in) + "], got " +
                          (rank < 1 || rank > MOST_AXES ? std::to_string(rank) + " axes" : text({shape, shape + rank})) + ".");
        size_t rows = 1;
        for (size_t axis = 0; axis + 1 < rank; ++axis) rows *= size_t(shape[axis]);
        shape[rank - 1] = int64_t(sizes.out);
        char* y = static_cast<char*>(api.output(context, 0, shape, rank));
        if (rows) Call(kernel, static_cast<const char*>(api.data(x)), rows, y).run(api, context);
    });
}

template <Isa ISA>
constexpr OrtCustomOp op() {
    OrtCustomOp op = {};
    op.version = ORT_VERSION;
    op.GetName = [](const OrtCustomOp*) { return "QuantizedLinear"; };
    op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int {
        return place == SCALE || place == MINIMUM ? ANY : place == CODES || place == ZERO ? UINT8 : FLOAT;
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t place) -> int { return place >= ZERO ? OPTIONAL : REQUIRED; };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return FLOAT; };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return REQUIRED; };
    op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    op.GetEndVersion = [](const OrtCustomOp*) { return VERSION; };
    op.CreateKernelV2 = [](const OrtCustomOp*, void* const* api, const OrtKernelInfo* info, void** kernel) {
        return create(ISA, api, info, kernel);
    };
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer;
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

}  // namespace

const OrtCustomOp* quantized_linear(Isa isa) {
    static const OrtCustomOp ops[ISAS] = {op<Isa::PLAIN>(), op<Isa::NEON>(), op<Isa::AVX2>(), op<Isa::AVX_VNNI>(),
                                          op<Isa::AVX512_VNNI>()};
    return &ops[static_cast<int>(isa)];
}

size_t packed_bytes() { return packed; }

}  // namespace tokopt
