// What multiplies with weights of float32, and the functions that each instruction set has for it.
#pragma once

#include <cstddef>

#include "../cpu/isa.h"
#include "../cpu/vector.h"
#include "../quantized_linear/code.h"

namespace tokopt::floats {
namespace {

constexpr int TILE = 32;       // outputs that are interleaved
constexpr int MOST_ROWS = 12;  // that a kernel works on at once

// Adds to `sums` [R, 32] the products of R rows `x` [inputs, R], at any address, and `w` [inputs, 32].
using Product = void (*)(const float* w, const char* x, size_t inputs, float* sums);

// The functions of one instruction set.
struct Code {
    size_t rows;  // worked on at once
    Apply apply;
    Product products[MOST_ROWS];  // [rows - 1]
};

namespace plain {
#define TARGET
using namespace vector_plain;
constexpr int ROOM = 12;
#include "../quantized_linear/gate.h"
#include "tile.h"
constexpr Code CODE = {6, apply, {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>}};
#undef TARGET
}  // namespace plain

#if X86
namespace avx2 {
#define TARGET TARGET_AVX2
using namespace vector_avx2;
constexpr int ROOM = 12;
#include "../quantized_linear/gate.h"
#include "tile.h"
constexpr Code CODE = {6, apply, {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>}};
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET TARGET_AVX512
using namespace vector_avx512;
constexpr int ROOM = 24;
#include "../quantized_linear/gate.h"
#include "tile.h"
constexpr Code CODE = {12,
                       apply,
                       {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>, product<7>, product<8>,
                        product<9>, product<10>, product<11>, product<12>}};
#undef TARGET
}  // namespace avx512
#elif ARM
namespace neon {
#define TARGET
using namespace vector_neon;
constexpr int ROOM = 24;
#include "../quantized_linear/gate.h"
#include "tile.h"
constexpr Code CODE = {6, apply, {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>}};
#undef TARGET
}  // namespace neon
#endif

const Code& code(Isa isa) {
    switch (isa) {
#if X86
        case Isa::AVX2:
        case Isa::AVX_VNNI: return avx2::CODE;
        case Isa::AVX512_VNNI:
        case Isa::AMX_INT8: return avx512::CODE;
#endif
#if ARM
        case Isa::NEON: return neon::CODE;
#endif
        default: return plain::CODE;
    }
}

}  // namespace
}  // namespace tokopt::floats
