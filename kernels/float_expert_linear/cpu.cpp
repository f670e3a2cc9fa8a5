// tokopt.cpu::FloatExpertLinear: every row of x times the float32 weights of the experts that were chosen for it; see
// reference.py.
//
// Tiles of 32 outputs of a weight lie one after another, and in a tile the weights of one input after another. So a
// thread reads its part of the weight from beginning to end, once for all rows that chose it.
#include <vector>

#include "../expert_linear/experts.h"
#include "call.h"
#include "source.h"

namespace tokopt {
namespace {

struct Floats {
    using Weight = floats::Weight;
    using Call = floats::Call;
    static constexpr char NAME[] = "FloatExpertLinear";
    static constexpr size_t SHARE = FIRST + floats::CONSTANTS;

    static int type(size_t) { return FLOAT; }
    static bool optional(size_t constant) { return constant == floats::BIAS; }
    static std::vector<floats::Source> sources(const Node& node, bool gated) { return floats::sources_of(node, FIRST, gated); }
};

}  // namespace

const OrtCustomOp* float_expert_linear(Isa isa) { return of<Floats>(isa); }

}  // namespace tokopt
