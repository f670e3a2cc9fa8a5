// tokopt.cpu::QuantizedLinear: x [..., in] times a weight [out, in] of 4 or 8 bits in groups; see reference.py.
//
// Activations are rounded to 8 bits, products of a group summed in 32 bits, and the sums scaled in float32. The weight
// is packed once: tiles of 16 outputs lie one after another, and in a tile four inputs of all 16 outputs, then the
// next four. So a thread reads its part of the weight from beginning to end, once for all rows of x.
#include <memory>

#include "../cpu/memory.h"
#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"
#include "call.h"
#include "kernels.h"
#include "source.h"

namespace tokopt {
namespace {

constexpr char NAME[] = "QuantizedLinear";

struct Kernel {
    Api api;
    Isa isa;
    Gate gate;
    std::shared_ptr<const Weight> weight;
};

constexpr size_t FIRST = 1;  // constant, after x

OrtStatus* create(Isa isa, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] {
        const Node node(api, info, NAME);
        const Gate gate = gate_of(api, info, node);
        const Source given = source_of(node, FIRST, gate != Gate::NONE);
        *kernel = new Kernel{api, isa, gate, shared<Weight>(given)};
        release(given);
    });
}

OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    return infer_rows(context, [&](const Api& api, const Shape& codes) {
        return api.has_attribute(context, "gate") ? codes[0] / 2 : codes[0];
    });
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    const Api& api = kernel.api;
    return guarded(api, [&] {
        RowInput x(api, context, kernel.weight->sizes.in, NAME);
        char* y = x.output(api, context, kernel.weight->sizes.width());
        if (!x.rows) return;
        Call call(kernel.isa, *kernel.weight, kernel.gate, {x.data, y}, x.rows);
        Calls<Call>(api, context, &call, 1).run();
    });
}

template <Isa ISA>
constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel>();
    op.GetName = [](const OrtCustomOp*) { return NAME; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return FIRST + CONSTANTS; };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int {
        return place < FIRST ? FLOAT : type_of(static_cast<Constant>(place - FIRST));
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t place) -> int {
        return place >= FIRST + ZERO ? OPTIONAL : REQUIRED;
    };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return FLOAT; };
    op.CreateKernelV2 = [](const OrtCustomOp*, void* const* api, const OrtKernelInfo* info, void** kernel) {
        return create(ISA, api, info, kernel);
    };
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer;
    return op;
}

}  // namespace

const OrtCustomOp* quantized_linear(Isa isa) {
    return of_isa(isa, [](auto own) { return op<own.value>(); });
}

size_t packed_bytes() { return packed; }

}  // namespace tokopt
