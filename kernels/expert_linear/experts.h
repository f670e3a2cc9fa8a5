// Products of rows with the weights of the experts that were chosen for them, for weights of any kind.
//
// Each expert's weight is packed by itself. A call sorts the rows by expert: a weight is read once for all the rows
// that chose it, and not at all where none did.
//
// An op says what is special to it in a struct `Own`: its NAME; `Weight`, and `Call`, which multiplies with it, for
// ../cpu/calls.h; its constants, which begin at input FIRST and end before input SHARE, by their `type` and whether each
// is `optional`; and the `sources` of the weights of all experts of a node.
#pragma once

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
#include "../quantized_linear/source.h"

namespace tokopt {
namespace {

constexpr size_t CHOSEN = 1, FIRST = 2;

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
}  // namespace tokopt
