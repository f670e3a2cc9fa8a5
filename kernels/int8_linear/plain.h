// The kernels in plain C, for every processor. Included by code.h.

namespace plain {
#define TARGET

using Float = float;
using Int = int32_t;
constexpr int WIDTH = 1, BYTES = 1;

INLINE Float all(float value) { return value; }
INLINE Int all(int32_t value) { return value; }
INLINE Float load(const float* from) { return at(from); }
INLINE void store(float* to, Float value) { std::memcpy(to, &value, 4); }
INLINE Float plus(Float to, Float a, Float b) { return to + a * b; }
INLINE Float most(Float limit, Float value) { return value < limit ? limit : value; }
INLINE Float least(Float limit, Float value) { return value > limit ? limit : value; }
INLINE Float magnitude(Float value) { return std::fabs(value); }
INLINE Int integers(const int32_t* from) { return *from; }
INLINE Float floats(Int value) { return static_cast<float>(value); }
INLINE Int nearest(Float value) { return value == value ? static_cast<int32_t>(std::nearbyintf(value)) : 0; }
INLINE Float quotient(Float value, Float step, Float) { return value / step; }
INLINE void bytes(uint8_t* to, Int value) { *to = static_cast<uint8_t>(std::clamp(value, 0, 255)); }
INLINE void narrow(uint8_t* q, size_t place, Int value, int) { bytes(q + place, value); }
INLINE void fill(uint8_t* q, size_t in, size_t padded) { std::memset(q + in, 0, padded - in); }
#include "numbers.h"

template <int R>
void product(const uint8_t* q, size_t stride, const Panels& panels, int32_t* sums) {
    std::fill(sums, sums + R * PAIR, 0);
    for (size_t line = 0; line < panels.lines; ++line) {
        for (int o = 0; o < PAIR; ++o) {
            const int8_t* w = panels.codes + o / PANEL * panels.bytes + line * LINE + o % PANEL * 4;
            for (int r = 0; r < R; ++r) {
                for (int i = 0; i < 4; ++i) sums[r * PAIR + o] += w[i] * q[r * stride + 4 * line + i];
            }
        }
    }
}

constexpr Code CODE = {4, 1, 0, round_row, finish, {product<1>, product<2>, product<3>, product<4>}};
#undef TARGET
}  // namespace plain
