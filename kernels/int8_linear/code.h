// What a kernel is given, and the functions that each instruction set has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../cpu/isa.h"
#include "../cpu/vector.h"

#if defined(__linux__) && defined(__x86_64__)
#define AMX 1
#endif

namespace tokopt {
namespace {

constexpr int PANEL = 16;            // outputs that are interleaved
constexpr int PAIR = 2 * PANEL;      // outputs that a kernel works on at once
constexpr size_t LINE = 4 * PANEL;   // bytes: four inputs of each output of a panel
constexpr size_t PAD = 64;           // inputs: weights and rows are filled up with zeros to whole ones of them
constexpr size_t MOST_INPUTS = 65536;  // products of that many bytes fit into 32 bits
constexpr int MOST_ROWS = 32;        // that a kernel works on at once

constexpr float SMALLEST_STEP = 1e-30f;  // of a row whose step is found as it comes

enum class Activation { NONE, GELU, GELU_TANH };

// Steps of numbers that are rounded to bytes: (code - zero) * step.
struct Grid {
    float step = 0;
    int zero = 128;

    bool known() const { return step > 0; }
};

// Two panels of a weight: signed bytes, a line after the other; and numbers of each of their outputs.
struct Panels {
    const int8_t* codes;
    size_t bytes, lines;  // of one panel
    const int32_t* sums;  // of all codes of an output
    const float* scale;
    const float* bias;  // or zeros
};

// What becomes of the sums of some rows and 32 outputs.
struct End {
    Activation activation;
    const float* step;  // of each row of x
    char* y;            // [rows, stride] of float32, at any address
    size_t stride;
    size_t outputs;     // that there are, at most 32
};

// Rounds one row of `in` numbers; `q` has room for `padded`. Returns its step, NaN where a number is not one.
using Round = float (*)(const char* x, size_t in, size_t padded, const Grid&, uint8_t* q);
using Product = void (*)(const uint8_t* q, size_t stride, const Panels&, int32_t* sums);  // [R, 32]
using Finish = void (*)(const int32_t* sums, size_t R, const Panels&, int zero, const End&);

// The functions of one instruction set.
struct Code {
    size_t rows;       // worked on at once
    size_t bytes;      // of a rounded number
    int moved;         // what is subtracted from a code, before it is multiplied: 0, 128 or, where WHOLE, its zero point
    Round round;
    Finish finish;
    Product products[MOST_ROWS];    // [rows - 1]
    void (*enter)() = nullptr;      // called by a thread before products, and `leave` after them
    void (*leave)() = nullptr;
};
constexpr int WHOLE = -1;

INLINE int32_t four(const void* from) {
    int32_t dword;
    std::memcpy(&dword, from, 4);
    return dword;
}

#include "plain.h"
#if X86
#include "x86.h"
#elif ARM
#include "arm.h"
#endif

// What multiplies `rows` rows fastest.
const Code& code(Isa isa, size_t rows) {
    switch (isa) {
#if AMX
        case Isa::AMX_INT8: return rows > amx_int8::FEW_ROWS ? amx_int8::CODE : avx512_vnni::CODE;
#endif
#if X86
        case Isa::AVX2: return avx2::CODE;
        case Isa::AVX_VNNI: return avx_vnni::CODE;
        case Isa::AVX512_VNNI: return avx512_vnni::CODE;
#endif
#if ARM
        case Isa::NEON: return neon::CODE;
#endif
        default: return (void)rows, plain::CODE;
    }
}

}  // namespace
}  // namespace tokopt
