// tokopt.cpu::ExpertLinear: every row of x times the weights in blocks of the experts that were chosen for it; see
// reference.py, and ../quantized_linear for how rows are rounded and multiplied.
#include <vector>

#include "../quantized_linear/call.h"
#include "experts.h"

namespace tokopt {
namespace {

struct Blocks {
    using Weight = tokopt::Weight;
    using Call = tokopt::Call;
    static constexpr char NAME[] = "ExpertLinear";
    static constexpr size_t SHARE = FIRST + CONSTANTS;

    static int type(size_t constant) { return type_of(static_cast<Constant>(constant)); }
    static bool optional(size_t constant) { return constant >= ZERO; }

    // Each expert's own part of the constants.
    static std::vector<Source> sources(const Node& node, bool gated) {
        const int64_t experts = node.integer("experts");
        const Source all = source_of(node, FIRST, gated, experts);
        const auto from = [](const uint8_t* data, size_t bytes) { return data ? data + bytes : nullptr; };
        std::vector<Source> parts;
        for (size_t e = 0; e < size_t(experts); ++e) {
            const Sizes& sizes = all.sizes;
            const size_t numbers = e * sizes.out * sizes.groups();
            parts.push_back({sizes,
                             all.codes + e * sizes.out * sizes.row_bytes(),
                             all.scale + numbers * sizes.float_bytes(),
                             from(all.zero, numbers),
                             from(all.minimum, numbers * sizes.float_bytes()),
                             from(all.bias, e * sizes.out * 4)});
        }
        return parts;
    }
};

}  // namespace

const OrtCustomOp* expert_linear(Isa isa) { return of<Blocks>(isa); }

}  // namespace tokopt
