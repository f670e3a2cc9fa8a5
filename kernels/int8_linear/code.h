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

// sign(z) f(|z|) as z P(z^2) / Q(z^2), and 1 beyond `end`; to 2e-8 of it (fitted by weighted least squares).
struct Rational {
    float p[6], q[6], end;
};
constexpr Rational ERF = {{1.1283791439f, 0.19154061385f, 0.052873941860f, 3.8076850295e-3f, 2.8466727726e-4f, 2.0258572147e-6f},
                          {1.f, 0.50308112771f, 0.11455541542f, 0.015054142279f, 1.1705919959e-3f, 3.7830197860e-5f},
                          3.95f};
constexpr Rational TANH = {{0.99999997961f, 0.13380981037f, 3.4955344394e-3f, 2.0608184343e-5f, 1.3353414125e-8f, 0.f},
                           {1.f, 0.46714296691f, 0.025876779624f, 3.2855462189e-4f, 7.7760472570e-7f, 0.f},
                           9.f};

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
