// What a kernel is given, and the functions that each instruction set has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../cpu/isa.h"
#include "../cpu/outputs.h"
#include "../cpu/vector.h"

#if defined(__linux__) && defined(__x86_64__)
#define AMX 1
#endif

namespace tokopt {

constexpr int TILE = 16;       // outputs that are interleaved
constexpr size_t CHUNK = 32;   // inputs, the smallest group
constexpr int MOST_ROWS = 16;  // that a kernel works on at once

// What the first half of the outputs goes through before it is multiplied by the second.
enum class Gate { NONE, SILU, GELU, GELU_TANH };

struct Sizes : Outputs<TILE> {
    size_t in, group;
    int bits;
    bool half;           // scales and minima have 16 bits
    bool zero, minimum;  // one of them at most is there

    size_t groups() const { return in / group; }
    size_t row_bytes() const { return in * bits / 8; }
    size_t float_bytes() const { return half ? 2 : 4; }
};

// What a kernel reads of one tile of 16 outputs, group after group: the codes, as lines of 64 bytes that hold 4 bytes
// of each output, then the 16 scales, and 16 zero points or minima.
struct Tile {
    const uint8_t* groups;
    const float* bias;    // [16], or null
    size_t count, bytes;  // of groups, of one group
    size_t chunks;        // of 32 inputs, in a group
    bool half, zero, minimum;

    size_t scale_bytes() const { return TILE * (half ? 2 : 4); }
};

// Memory that will be needed next, fetched piece by piece while something else is computed.
struct Fetch {
    const uint8_t* from;
    size_t bytes;

    Fetch part(size_t i, size_t parts) const { return {from + bytes / parts * i, bytes / parts}; }
    void now() const {
        for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);  // into the second cache, which waits for more lines at once
    }
};

// R rows of x in 8 bits, interleaved.
struct Rows {
    const int8_t* q;       // [in / 4, R, 4]
    const float* numbers;  // [groups, 3, R] as Quantized has them
    Fetch next;            // meanwhile
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
    float* numbers;  // [groups, 3, R] of a group: its scale; what integer sums begin with, an int32; the sum of q,
                     // times scale where the weight has minima
    bool chunks;     // interleave 32 inputs of each row, and not 4

    // 32 integers of row `r`, from input `first` on.
    void put(const int8_t* from, size_t first, size_t R, size_t r) const {
        int8_t* to = q + first * R + 4 * r;
        if (R == 1 || chunks) {
            std::memcpy(q + first * R + CHUNK * r, from, CHUNK);
        } else {
            for (size_t i = 0; i < CHUNK / 4; ++i) std::memcpy(to + 4 * i * R, from + 4 * i, 4);
        }
    }
    // What the kernels need to know of group `g`; `offset` is what they added to the codes, less their zero point where
    // all have the same.
    void put(const Step& step, int32_t total, int offset, bool minimum, size_t g, size_t R, size_t r) const {
        float* to = numbers + 3 * R * g + r;
        const int32_t start = offset * total;
        to[0] = step.scale;
        std::memcpy(to + R, &start, 4);
        to[2 * R] = minimum ? step.scale * static_cast<float>(total) : static_cast<float>(total);
    }
};

using Product = void (*)(const Tile&, const Rows&, float* y, size_t stride);
using Apply = void (*)(Gate activation, float* gate, const float* up, size_t count);
using Quantize = void (*)(const char* x, const Sizes&, int offset, Quantized into, size_t R, size_t r);

// The functions of one instruction set.
struct Code {
    size_t rows;    // worked on at once
    int offset[2];  // subtracted from codes of 4 and of 8 bits before they are multiplied
    Quantize quantize;
    Apply apply;
    Product products[2][MOST_ROWS];  // [4 or 8 bits][rows - 1]
    bool full = false;               // always works on all `rows`, whose 32 inputs lie together
    void (*enter)() = nullptr;       // called by a thread before products, and `leave` after them
    void (*leave)() = nullptr;
};

INLINE int32_t integer(const float* from) {
    int32_t bits;
    std::memcpy(&bits, from, 4);
    return bits;
}
INLINE int32_t four(const int8_t* q) {
    int32_t dword;
    std::memcpy(&dword, q, 4);
    return dword;
}

// What multiplies `rows` rows fastest: kernels.h defines it.
const Code& code(Isa isa, size_t rows);

}  // namespace tokopt
