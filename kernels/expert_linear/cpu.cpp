// tokopt.cpu::ExpertLinear and FloatExpertLinear: every row of x times the weights of the experts that were chosen for
// it; see reference.py. The first has weights in blocks, and rounds and multiplies as ../quantized_linear says, the
// second has weights of float32.
//
// Each expert's weight is packed by itself. A call sorts the rows by expert: a weight is read once for all the rows
// that chose it, and not at all where none did.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/calls.h"
#include "../cpu/memory.h"
#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"
#include "../quantized_linear/call.h"
#include "../quantized_linear/source.h"
#include "call.h"
#include "source.h"

namespace tokopt {
namespace {

constexpr size_t CHOSEN = 1, FIRST = 2;  // the first constant

// What is special to an op: its weights, which are the constants of its node, and what multiplies with them.
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

struct Floats {
    using Weight = floats::Weight;
    using Call = floats::Call;
    static constexpr char NAME[] = "FloatExpertLinear";
    static constexpr size_t SHARE = FIRST + floats::CONSTANTS;

    static int type(size_t) { return FLOAT; }
    static bool optional(size_t constant) { return constant == floats::BIAS; }
    static std::vector<floats::Source> sources(const Node& node, bool gated) { return floats::sources_of(node, FIRST, gated); }
};

template <class Own>
struct Kernel {
    Api api;
    Isa isa;
    Gate gate;
    bool shares;
    std::vector<std::shared_ptr<const typename Own::Weight>> experts;

    size_t in() const { return experts[0]->sizes.in; }
    size_t width() const { return experts[0]->sizes.width(); }
};

template <class Own>
OrtStatus* create(Isa isa, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] {
        const Node node(api, info, Own::NAME);
        const Gate gate = gate_of(api, info, node);
        auto made = std::make_unique<Kernel<Own>>(Kernel<Own>{api, isa, gate, node.has(Own::SHARE), {}});
        for (const auto& source : Own::sources(node, gate != Gate::NONE)) {
            made->experts.push_back(shared<typename Own::Weight>(source));
            release(source);
        }
        *kernel = made.release();
    });
}

// The rows of a call, by expert. It keeps its memory for the next call of its thread.
template <class Call>
struct Sorted {
    std::vector<uint32_t> begins, from, to;
    std::vector<Call> calls;

    // Pair i of a token and an expert reads row i / `shared` of x, and makes row i of y.
    void sort(Numbers<int64_t> chosen, size_t pairs, size_t shared, size_t experts) {
        begins.assign(experts + 1, 0), from.resize(pairs), to.resize(pairs);
        const auto known = [&](size_t i) { return chosen[i] >= 0 && size_t(chosen[i]) < experts; };
        for (size_t i = 0; i < pairs; ++i) {
            if (known(i)) ++begins[size_t(chosen[i]) + 1];
        }
        for (size_t e = 0; e < experts; ++e) begins[e + 1] += begins[e];
        for (size_t i = 0; i < pairs; ++i) {
            if (!known(i)) continue;
            const uint32_t place = begins[size_t(chosen[i])]++;
            from[place] = uint32_t(i / shared), to[place] = uint32_t(i);
        }
        for (size_t e = experts; e > 0; --e) begins[e] = begins[e - 1];
        begins[0] = 0;
    }
    size_t count(size_t e) const { return begins[e + 1] - begins[e]; }
};

// y [tokens, width]: what the experts of each token made, times their shares.
void add_up(const char* made, Numbers<float> share, size_t tokens, size_t k, size_t width, char* y) {
    for (size_t t = 0; t < tokens; ++t) {
        float* into = reinterpret_cast<float*>(y) + t * width;
        const float* rows = reinterpret_cast<const float*>(made) + t * k * width;
        std::fill(into, into + width, 0.f);
        for (size_t j = 0; j < k; ++j) {
            const float factor = share[t * k + j];
            for (size_t i = 0; i < width; ++i) into[i] += factor * rows[j * width + i];
        }
    }
}

template <class Own>
OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    using Call = typename Own::Call;
    const Kernel<Own>& kernel = *static_cast<Kernel<Own>*>(opaque);
    const Api& api = kernel.api;
    return guarded(api, [&] {
        static thread_local Sorted<Call> sorted;
        static thread_local Scratch memory;
        const RowInput x(api, context, kernel.in(), Own::NAME);
        const Argument chosen = argument(api, api.input(context, CHOSEN));
        const auto refuse = [](const std::string& what) {
            throw Refused("tokopt.cpu::" + std::string(Own::NAME) + ": " + what + ".");
        };
        if (chosen.rank != 2) refuse("chosen must be [tokens, k], got " + text(chosen));
        const size_t tokens = size_t(chosen.sizes[0]), k = size_t(chosen.sizes[1]), pairs = tokens * k;
        if (x.rows != tokens && x.rows != pairs)
            refuse("x has " + std::to_string(x.rows) + " rows, and must have one for each token or each chosen expert of " +
                   text(chosen));
        const OrtValue* given = kernel.shares ? api.input(context, Own::SHARE) : nullptr;
        const Argument share = given ? argument(api, given) : Argument();
        if (given && !share.is({chosen.sizes[0], chosen.sizes[1]}))
            refuse("share must be " + text(chosen) + ", got " + text(share));
        const size_t width = kernel.width(), experts = kernel.experts.size();
        const int64_t shape[] = {chosen.sizes[0], chosen.sizes[1], int64_t(width)}, summed[] = {shape[0], shape[2]};
        char* y = static_cast<char*>(given ? api.output(context, 0, summed, 2) : api.output(context, 0, shape, 3));
        char* made = given ? reinterpret_cast<char*>(memory.of(pairs * width * 4)) : y;
        sorted.sort({chosen.data}, pairs, x.rows == pairs ? 1 : k, experts);
        if (sorted.begins[experts] < pairs) std::memset(made, 0, pairs * width * 4);  // some have no expert
        sorted.calls.clear();
        for (size_t e = 0; e < experts; ++e) {
            const uint32_t first = sorted.begins[e];
            const Places places = {x.data, made, sorted.from.data() + first, sorted.to.data() + first};
            if (sorted.count(e)) sorted.calls.emplace_back(kernel.isa, *kernel.experts[e], kernel.gate, places, sorted.count(e));
        }
        if (!sorted.calls.empty()) Calls<Call>(api, context, sorted.calls.data(), sorted.calls.size()).run();
        if (given) add_up(made, {share.data}, tokens, k, width, y);
    });
}

template <Isa ISA, class Own>
constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel<Own>>();
    op.GetName = [](const OrtCustomOp*) -> const char* { return Own::NAME; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return Own::SHARE + 1; };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int {
        if (place >= FIRST && place < Own::SHARE) return Own::type(place - FIRST);
        return place == CHOSEN ? INT64 : FLOAT;
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t place) -> int {
        const bool optional = place == Own::SHARE || (place >= FIRST && Own::optional(place - FIRST));
        return optional ? OPTIONAL : REQUIRED;
    };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return FLOAT; };
    op.CreateKernelV2 = [](const OrtCustomOp*, void* const* api, const OrtKernelInfo* info, void** kernel) {
        return create<Own>(ISA, api, info, kernel);
    };
    op.KernelComputeV2 = compute<Own>;
    return op;
}

template <class Own>
const OrtCustomOp* of(Isa isa) {
    return of_isa(isa, [](auto own) { return op<own.value, Own>(); });
}

}  // namespace

const OrtCustomOp* expert_linear(Isa isa) { return of<Blocks>(isa); }
const OrtCustomOp* float_expert_linear(Isa isa) { return of<Floats>(isa); }

}  // namespace tokopt
