// The functions of every instruction set, for the one file that defines what code.h declares.
#pragma once

#include "code.h"

namespace tokopt {
namespace {

#include "plain.h"
#if X86
#include "x86.h"
#elif ARM
#include "arm.h"
#endif

}  // namespace

const Code& code(Isa isa, size_t rows) {
    switch (isa) {
#if AMX
        case Isa::AMX_INT8: return rows > avx512_vnni::CODE.rows ? amx_int8::CODE : avx512_vnni::CODE;
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

}  // namespace tokopt
