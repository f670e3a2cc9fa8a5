// The kernels for Arm. Included by code.h.

#if defined(__clang__)
#define ARM_TARGET "dotprod"
#else
#define ARM_TARGET "arch=armv8.2-a+dotprod"
#endif

namespace neon {
#define TARGET __attribute__((target(ARM_TARGET)))
using vector_neon::all, vector_neon::load, vector_neon::store, vector_neon::plus, vector_neon::Float;
using Int = int32x4_t;
constexpr int WIDTH = 4, H = 4, BYTES = 1;

TARGET INLINE Int all(int32_t value) { return vdupq_n_s32(value); }
TARGET INLINE Float most(Float limit, Float value) { return vmaxq_f32(limit, value); }
TARGET INLINE Float least(Float limit, Float value) { return vminq_f32(limit, value); }
TARGET INLINE Float magnitude(Float value) { return vabsq_f32(value); }
TARGET INLINE Int integers(const int32_t* from) { return vld1q_s32(from); }
TARGET INLINE Float floats(Int value) { return vcvtq_f32_s32(value); }
TARGET INLINE Int nearest(Float value) { return vcvtnq_s32_f32(value); }
TARGET INLINE Float quotient(Float value, Float step, Float) { return vdivq_f32(value, step); }
TARGET INLINE void bytes(uint8_t* to, Int value) {
    const uint8x8_t code = vqmovun_s16(vcombine_s16(vqmovn_s32(value), vdup_n_s16(0)));
    vst1_lane_u32(reinterpret_cast<uint32_t*>(to), vreinterpret_u32_u8(code), 0);
}
// The products are of signed bytes: 128 is subtracted.
TARGET INLINE void narrow(uint8_t* q, size_t place, Int value, int) {
    uint8_t code[WIDTH];
    bytes(code, value);
    const int32_t moved = four(code) ^ int32_t(0x80808080);
    std::memcpy(q + place, &moved, 4);
}
TARGET INLINE void fill(uint8_t* q, size_t in, size_t padded) { std::memset(q + in, 0, padded - in); }
#include "numbers.h"

using Weights = int8x16_t;
using Row = int8x16_t;
TARGET INLINE Int none() { return all(int32_t(0)); }
TARGET INLINE Weights weights(const int8_t* from) { return vld1q_s8(from); }
TARGET INLINE Row row(const uint8_t* q) { return vreinterpretq_s8_s32(all(four(q))); }
TARGET INLINE void dot(Int& sum, Row x, Weights w) { sum = vdotq_s32(sum, w, x); }
TARGET INLINE void put(int32_t* to, const Int (&sum)[H]) { std::memcpy(to, sum, sizeof sum); }
#include "tile.h"
constexpr Code CODE = {
    6, 1, 128, round_row, finish, {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>}};
#undef TARGET
}  // namespace neon
