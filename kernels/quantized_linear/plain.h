// The kernels in plain C, for every processor. Included by kernels.h.

namespace plain {
#define TARGET
using namespace vector_plain;
#include "quantize.h"
#include "gate.h"

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
    using Limits = std::numeric_limits<float>;
    if ((bits & 0x7c00) == 0x7c00) value = bits & 0x3ff ? Limits::quiet_NaN() : Limits::infinity();
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
        const float* numbers = rows.numbers + 3 * R * g;
        int32_t sum[R][TILE];
        for (int r = 0; r < R; ++r) std::fill(sum[r], sum[r] + TILE, integer(numbers + R + r));
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
                const float q_sum = numbers[2 * R + r];
                total[r][o] += minimum * q_sum;
                total[r][o] += scale * numbers[r] * (static_cast<float>(sum[r][o]) - zero * q_sum);
            }
        }
    }
    for (int r = 0; r < R; ++r) std::copy(total[r], total[r] + TILE, y + r * stride);
}

constexpr Code CODE = {4,
                       {0, 0},
                       quantize,
                       apply,
                       {{product<4, 1>, product<4, 2>, product<4, 3>, product<4, 4>},
                        {product<8, 1>, product<8, 2>, product<8, 3>, product<8, 4>}}};
#undef TARGET
}  // namespace plain
