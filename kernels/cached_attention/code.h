// What the kernels are given, and the functions that each instruction set has.
#pragma once

#include <cfloat>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "../cpu/isa.h"
#include "../cpu/vector.h"

namespace tokopt {
namespace {

constexpr size_t CHUNK = 64;      // slots whose keys and values stay in a core's first cache
constexpr size_t MOST_ROWS = 32;  // of a panel
constexpr int MOST_VECTORS = 4;   // of rows
constexpr size_t FEW_ROWS = 8;    // for which lanes of channels are faster than lanes of rows

// What each row of queries of a key head sees. Rows of a token follow one another, one for each head of the group.
struct Masks {
    const uint8_t* first;
    size_t group, token, head;  // strides are in bytes, and 0 where all see the same

    const uint8_t* row(size_t r) const { return first + r / group * token + r % group * head; }
};

// Rows of queries, and what they have made of the slots so far: see panel.h.
struct Panel {
    float *q, *s, *o, *m, *l;
    size_t first, rows, channels;
};

// Slots that are attended to at once. `keys` and `values` are [count, channels].
struct Chunk {
    const float *keys, *values;
    const int32_t* slots;  // ~slot where not every row sees it
    size_t count, channels;
    float cap;
    bool partly;
    const Masks& masks;

    // Scores of what rows do not see become those of nothing; `slot` and `row` are strides.
    void hide(float* s, size_t slot, size_t row, size_t first, size_t rows) const {
        const uint8_t* sees[MOST_ROWS];
        for (size_t r = 0; r < rows; ++r) sees[r] = masks.row(first + r);
        for (size_t n = 0; n < count; ++n) {
            for (size_t r = 0; slots[n] < 0 && r < rows; ++r) {
                if (!sees[r][~slots[n]]) s[n * slot + r * row] = -std::numeric_limits<float>::infinity();
            }
        }
    }
};

struct Code {
    bool few;               // channels lie in the lanes of vectors, and not rows: see few.h
    size_t width, vectors;  // rows in a vector, vectors in a panel
    void (*attend[MOST_VECTORS])(const Panel&, const Chunk&);  // [vectors - 1]
    void (*merge[MOST_VECTORS])(const Panel&, const Panel& other);
    void (*widen)(const int8_t* from, size_t count, float* into);

    size_t rows() const { return width * vectors; }
};

namespace plain {
#define TARGET
using namespace vector_plain;
constexpr int VECTORS = 2, STEP = 4, FEW = 2;
#include "panel.h"
#include "few.h"
constexpr Code CODE = {false, WIDTH, VECTORS, {attend<1>, attend<2>}, {merge<1>, merge<2>}, widen};
constexpr Code FEW_CODE = {true, 1, 4, {attend_few<1>, attend_few<2>, attend_few<3>, attend_few<4>}, {merge_few<1>, merge_few<2>, merge_few<3>, merge_few<4>}, widen};
#undef TARGET
}  // namespace plain

#if X86
namespace avx2 {
#define TARGET TARGET_AVX2
using namespace vector_avx2;
constexpr int VECTORS = 2, STEP = 4, FEW = 2;
#include "panel.h"
#include "few.h"
constexpr Code CODE = {false, WIDTH, VECTORS, {attend<1>, attend<2>}, {merge<1>, merge<2>}, widen};
constexpr Code FEW_CODE = {true, 1, 4, {attend_few<1>, attend_few<2>, attend_few<3>, attend_few<4>}, {merge_few<1>, merge_few<2>, merge_few<3>, merge_few<4>}, widen};
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET TARGET_AVX512
using namespace vector_avx512;
constexpr int VECTORS = 2, STEP = 8, FEW = 4;
#include "panel.h"
#include "few.h"
constexpr Code CODE = {false, WIDTH, VECTORS, {attend<1>, attend<2>}, {merge<1>, merge<2>}, widen};
constexpr Code FEW_CODE = {true, 1, 4, {attend_few<1>, attend_few<2>, attend_few<3>, attend_few<4>}, {merge_few<1>, merge_few<2>, merge_few<3>, merge_few<4>}, widen};
#undef TARGET
}  // namespace avx512
#elif ARM
namespace neon {
#define TARGET
using namespace vector_neon;
constexpr int VECTORS = 4, STEP = 4, FEW = 4;
#include "panel.h"
#include "few.h"
constexpr Code CODE = {false, WIDTH,
                       VECTORS,
                       {attend<1>, attend<2>, attend<3>, attend<4>},
                       {merge<1>, merge<2>, merge<3>, merge<4>},
                       widen};
constexpr Code FEW_CODE = {true, 1, 4, {attend_few<1>, attend_few<2>, attend_few<3>, attend_few<4>}, {merge_few<1>, merge_few<2>, merge_few<3>, merge_few<4>}, widen};
#undef TARGET
}  // namespace neon
#endif

// What attends fastest with so many rows of queries in a strip.
const Code& code(Isa isa, size_t rows, size_t channels) {
    const auto fitting = [&](const Code& few, const Code& many, size_t width) -> const Code& {
        return rows <= FEW_ROWS && channels % width == 0 ? few : many;
    };
    switch (isa) {
#if X86
        case Isa::AVX2:
        case Isa::AVX_VNNI: return fitting(avx2::FEW_CODE, avx2::CODE, avx2::WIDTH);
        case Isa::AVX512_VNNI:
        case Isa::AMX_INT8: return fitting(avx512::FEW_CODE, avx512::CODE, avx512::WIDTH);
#endif
#if ARM
        case Isa::NEON: return fitting(neon::FEW_CODE, neon::CODE, neon::WIDTH);
#endif
        default: return fitting(plain::FEW_CODE, plain::CODE, plain::WIDTH);
    }
}

}  // namespace
}  // namespace tokopt
