// The kernels for Arm. Included by kernels.h.

#if defined(__clang__)
#define ARM_TARGET "dotprod"
#else
#define ARM_TARGET "arch=armv8.2-a+dotprod"
#endif

namespace neon {
#define TARGET __attribute__((target(ARM_TARGET)))
using vector_neon::all, vector_neon::load, vector_neon::store, vector_neon::plus;
using vector_neon::Bits, vector_neon::Float, vector_neon::WIDTH;
#include "quantize.h"
#include "gate.h"

using Int = int32x4_t;
constexpr int ROWS = 8;
constexpr bool STARTS = true;

TARGET INLINE Int all(int32_t value) { return vdupq_n_s32(value); }
TARGET INLINE Float load_full(const uint8_t* from) { return load(reinterpret_cast<const float*>(from)); }
TARGET INLINE Float load_half(const uint8_t* from) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))); }
TARGET INLINE Float load_byte(const uint8_t* from) {
    const auto dword = static_cast<uint32_t>(four(reinterpret_cast<const int8_t*>(from)));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(dword))))));
}
TARGET INLINE Float floats(Int value) { return vcvtq_f32_s32(value); }
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
using Bytes = int8x16_t;
TARGET INLINE Bytes repeated(const int8_t* q) { return vreinterpretq_s8_s32(all(four(q))); }
template <int BITS>
TARGET INLINE void dot(Part& part, const Codes& codes, Bytes low, Bytes high, bool) {
    part = vdotq_s32(part, codes.low, low);
    if (BITS == 4) part = vdotq_s32(part, codes.high, high);
}
template <int BITS>
TARGET INLINE Int end(Int, Part part) {
    return part;
}

#include "tile.h"
constexpr Code CODE = {ROWS,
                       {0, 128},
                       quantize,
                       apply,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>, product<4, 5>, product<4, 6>,
                         product<4, 7>, product<4, 8>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>, product<8, 5>, product<8, 6>,
                         product<8, 7>, product<8, 8>}}};
#undef TARGET
}  // namespace neon
