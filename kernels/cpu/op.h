// What the ops of the library have in common, and those that multiply rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "node.h"
#include "ops.h"
#include "ort.h"

namespace tokopt {

// An op of the CPU whose inputs and outputs are all required; what else it is, it says itself.
template <class Kernel>
constexpr OrtCustomOp common_op() {
    OrtCustomOp op = {};
    op.version = ORT_VERSION;
    op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return REQUIRED; };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return REQUIRED; };
    op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    op.GetEndVersion = [](const OrtCustomOp*) { return VERSION; };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

// An op of one instruction set: `make` is called once with each, as a constant.
template <class Make>
const OrtCustomOp* of_isa(Isa isa, const Make& make) {
    static const OrtCustomOp ops[ISAS] = {make(std::integral_constant<Isa, Isa::PLAIN>()),
                                          make(std::integral_constant<Isa, Isa::NEON>()),
                                          make(std::integral_constant<Isa, Isa::AVX2>()),
                                          make(std::integral_constant<Isa, Isa::AVX_VNNI>()),
                                          make(std::integral_constant<Isa, Isa::AVX512_VNNI>()),
                                          make(std::integral_constant<Isa, Isa::AMX_INT8>())};
    return &ops[static_cast<int>(isa)];
}

// Input 0 of a call: rows [..., in] of float32, at any address.
struct RowInput {
    static constexpr size_t MOST_AXES = 16;

    // Refuses another number of entries than `in`.
    RowInput(const Api& api, const OrtKernelContext* context, size_t in, const char* op) {
        const OrtValue* x = api.input(context, 0);
        OrtShapeInfo* info = api.shape_info(x);
        rank = api.rank(info);
        if (rank <= MOST_AXES) api.dimensions(info, shape, rank);
        api.release(info);
        const bool known = rank >= 1 && rank <= MOST_AXES;
        if (!known || shape[rank - 1] != int64_t(in))
            throw Refused("tokopt.cpu::" + std::string(op) + ": x must be [..., " + std::to_string(in) + "], got " +
                          (known ? text({shape, shape + rank}) : std::to_string(rank) + " axes") + ".");
        for (size_t axis = 0; axis + 1 < rank; ++axis) rows *= size_t(shape[axis]);
        data = static_cast<const char*>(api.data(x));
    }

    // Output 0: as many rows of `out` entries.
    char* output(const Api& api, OrtKernelContext* context, size_t out) {
        shape[rank - 1] = int64_t(out);
        return static_cast<char*>(api.output(context, 0, shape, rank));
    }

    const char* data = nullptr;
    size_t rows = 1, rank = 0;
    int64_t shape[MOST_AXES] = {};
};

// Output 0 has the shape of input 0, but for its last axis, whose size follows from the two sizes of input 1.
template <class Last>
OrtStatus* infer_rows(OrtShapeInferContext* context, const Last& last) {
    const Api api(registered());
    return guarded(api, [&] {
        const OrtShapeInfo *x = api.input_shape(context, 0), *codes = api.input_shape(context, 1);
        Shape shape(api.rank(x)), sizes(api.rank(codes));
        if (shape.empty() || sizes.size() < 2) return;  // not known
        api.dimensions(x, shape.data(), shape.size());
        api.dimensions(codes, sizes.data(), sizes.size());
        std::vector<const char*> names(shape.size());
        api.symbols(x, names.data(), names.size());
        shape.back() = last(api, sizes), names.back() = "";
        api.set_output_shape(context, 0, FLOAT, shape, names);
    });
}

}  // namespace tokopt
