// A row of logits, and the functions that each instruction set has for it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../cpu/isa.h"
#include "../cpu/vector.h"

namespace tokopt {
namespace {

constexpr size_t BLOCK = 64;  // logits that are looked at together, or not at all

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Logits at any address, in blocks, of which the last is filled up with -inf. The largest logit is known beside them,
// and that of each block.
struct Row {
    // `peak` has room for every block.
    Row(const char* x, size_t size, float* peak) : x(x), blocks((size + BLOCK - 1) / BLOCK), peak(peak) {
        std::fill(tail, tail + BLOCK, NOTHING);
        const size_t whole = (blocks - 1) * BLOCK;
        std::memcpy(tail, x + 4 * whole, 4 * (size - whole));
    }
    Row(const Row&) = delete;

    const float* block(size_t b) const {
        return b + 1 < blocks ? reinterpret_cast<const float*>(x + 4 * b * BLOCK) : tail;
    }
    float scaled(float logit, float temperature) const { return (logit - most) / temperature; }

    const char* const x;
    const size_t blocks;
    float* const peak;
    float most = NOTHING;

  private:
    float tail[BLOCK];
};

// The logits that count: those that are not below `floor` once they are scaled, and whose weights are not below `least`.
struct Cut {
    float temperature, floor, least;
};

struct Code {
    // The largest logit of every block; whether all are numbers.
    bool (*peaks)(const Row&, float* peak);
    // The sum of the weights that count, and of those of every block; or how many they are.
    double (*sums)(const Row&, const Cut&, bool counted, double* sum);
    // The scaled logits of a block, and their weights.
    void (*entries)(const Row&, size_t block, float temperature, float* scaled, float* weight);
};

namespace plain {
#define TARGET
using namespace vector_plain;
#include "../cpu/exponential.h"
#include "row.h"
#undef TARGET
}  // namespace plain

#if X86
namespace avx2 {
#define TARGET TARGET_AVX2
using namespace vector_avx2;
#include "../cpu/exponential.h"
#include "row.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET TARGET_AVX512
using namespace vector_avx512;
#include "../cpu/exponential.h"
#include "row.h"
#undef TARGET
}  // namespace avx512
#elif ARM
namespace neon {
#define TARGET
using namespace vector_neon;
#include "../cpu/exponential.h"
#include "row.h"
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
}  // namespace tokopt
