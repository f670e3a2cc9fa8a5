// tokopt.cpu::Int8Linear: x [..., in] in 8 bits times a weight [in, out] in 8 bits; see reference.py.
//
// Rows of x are rounded once, in parallel; then parts of the rows are multiplied with strips of the weight. Sums of
// products are exact, and what comes after them (scales, bias, activation, rounding) is done while they are in cache.
#include <algorithm>
#include <memory>
#include <string>

#include "../cpu/memory.h"
#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"
#include "code.h"
#include "weight.h"

namespace tokopt {
namespace {

constexpr char NAME[] = "Int8Linear";

struct Kernel {
    Api api;
    Isa isa;
    std::shared_ptr<const Weight> weight;
    Grid grid;  // of x; unknown where every row has its own step
    Activation activation;
};

// One call: rows of x, rounded, times the weight.
class Call {
  public:
    Call(const Kernel& kernel, const char* x, size_t rows, char* y)
        : code(tokopt::code(kernel.isa, rows)), kernel(kernel), size(kernel.weight->size), x(x), rows(rows), y(y) {
        static thread_local Scratch scratch;
        // An odd number of cache lines: rows do not all lie in the same few places of the cache.
        stride = (size.padded() * code.bytes / 64 | 1) * 64;
        const size_t room = (rows + code.rows - 1) / code.rows * code.rows;
        q = scratch.of(room * (stride + 4));
        step = reinterpret_cast<float*>(q + room * stride);
    }

    void run(const Api& api, const OrtKernelContext* context) {
        const size_t blocks = (rows + ROUNDED - 1) / ROUNDED;
        if (rows * size.in < SERIAL) {
            for (size_t block = 0; block < blocks; ++block) round(block);
        } else {
            api.parallel(
                context, [](void* call, size_t block) { static_cast<Call*>(call)->round(block); }, blocks, this);
        }
        parts = (rows + PART - 1) / PART;
        strip = std::max<size_t>(STRIP / size.pair_bytes(), 1);
        const size_t strips = (size.pairs() + strip - 1) / strip;
        api.parallel(
            context, [](void* call, size_t i) { static_cast<Call*>(call)->multiply(i); }, strips * parts, this);
    }

  private:
    static constexpr size_t SERIAL = 32768;  // numbers that one thread rounds sooner than it could share them out
    static constexpr size_t ROUNDED = 16;    // rows at once
    static constexpr size_t PART = 96;       // rows whose codes stay in a core's second cache: whole blocks of any code
    static constexpr size_t STRIP = 65536;   // bytes of weights that stay there beside them

    void round(size_t block) const {
        for (size_t r = block * ROUNDED; r < std::min((block + 1) * ROUNDED, rows); ++r) {
            step[r] = code.round(x + 4 * r * size.in, size.in, size.padded(), kernel.grid, q + r * stride);
        }
    }

    // Part `i % parts` of the rows, times strip `i / parts` of the weight.
    void multiply(size_t i) const {
        const size_t first = i / parts * strip, last = std::min(first + strip, size.pairs());
        const size_t begin = i % parts * PART, end = std::min(begin + PART, rows);
        if (code.enter) code.enter();
        for (size_t r = begin; r < end; r += code.rows) {
            for (size_t pair = first; pair < last; ++pair) multiply(r, std::min(code.rows, end - r), pair);
        }
        if (code.leave) code.leave();
    }

    void multiply(size_t first, size_t R, size_t pair) const {
        alignas(64) int32_t sums[MOST_ROWS * PAIR];
        const Panels panels = kernel.weight->panels(pair);
        code.products[R - 1](q + first * stride, stride, panels, sums);
        const End end = {kernel.activation, step + first, y + (first * size.out + pair * PAIR) * 4, size.out,
                         std::min<size_t>(PAIR, size.out - pair * PAIR)};
        code.finish(sums, R, panels, code.moved == WHOLE ? 0 : kernel.grid.zero - code.moved, end);
    }

    const Code& code;
    const Kernel& kernel;
    const Size& size;
    const char* x;  // [rows, in] of float32, at any address
    const size_t rows;
    char* y;  // [rows, out]
    size_t stride = 0, parts = 0, strip = 1;
    uint8_t* q;
    float* step;
};

enum Input : size_t { X, CODES, SCALE, BIAS, INPUTS };

Grid grid(const Api& api, const OrtKernelInfo* info, const Node& node) {
    Grid found;
    if (!api.number(info, "step", &found.step)) return {};
    if (!(found.step >= SMALLEST_STEP && found.step <= 1 / SMALLEST_STEP))
        node.refuse("step=" + std::to_string(found.step) + " must be a positive number");
    const int64_t zero = node.integer("zero");
    if (zero < 0 || zero > 255) node.refuse("zero=" + std::to_string(zero) + " must be 0 to 255");
    found.zero = int(zero);
    return found;
}

Activation activation(const Api& api, const OrtKernelInfo* info, const Node& node) {
    const std::string name = api.string(info, "activation");
    if (name.empty()) return Activation::NONE;
    if (name == "gelu") return Activation::GELU;
    if (name == "gelu_tanh") return Activation::GELU_TANH;
    node.refuse("activation '" + name + "' must be gelu, gelu_tanh or left out");
}

Source source(const Node& node) {
    const Tensor codes = node.constant(CODES, "codes"), scale = node.constant(SCALE, "scale");
    const Tensor bias = node.constant(BIAS, "bias");
    if (codes.element != UINT8 || codes.shape.size() != 2)
        node.refuse("codes must be bytes [in, out], got " + text(codes.shape));
    const int64_t in = codes.shape[0], out = codes.shape[1];
    if (in < 1 || out < 1) node.refuse("codes " + text(codes.shape) + " are empty");
    if (in > int64_t(MOST_INPUTS))
        node.refuse(std::to_string(in) + " inputs are more than " + std::to_string(MOST_INPUTS) +
                    ", whose products may not fit into 32 bits");
    const Shape outputs = {out};
    if (scale.element != FLOAT || scale.shape != outputs)
        node.refuse("scale must be float32 " + text(outputs) + ", got " + text(scale.shape));
    if (bias.data && bias.shape != outputs) node.refuse("bias must be " + text(outputs) + ", got " + text(bias.shape));
    return {{size_t(in), size_t(out)}, reinterpret_cast<const uint8_t*>(codes.data), scale.data, bias.data};
}

OrtStatus* create(Isa isa, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] {
        const Node node(api, info, NAME);
        const Grid steps = grid(api, info, node);
        const Activation then = activation(api, info, node);
        const Source from = source(node);
        *kernel = new Kernel{api, isa, shared<Weight>(from), steps, then};
        give_back(from.codes, from.size.in * from.size.out);  // they are packed
    });
}

OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    return infer_rows(context, [](const Api&, const Shape& codes) { return codes[1]; });
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    const Api& api = kernel.api;
    return guarded(api, [&] {
        RowInput x(api, context, kernel.weight->size.in, NAME);
        char* y = x.output(api, context, kernel.weight->size.out);
        if (x.rows) Call(kernel, x.data, x.rows, y).run(api, context);
    });
}

template <Isa ISA>
constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel>();
    op.GetName = [](const OrtCustomOp*) { return NAME; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int {
        return place == CODES ? UINT8 : FLOAT;
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t place) -> int {
        return place == BIAS ? OPTIONAL : REQUIRED;
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

const OrtCustomOp* int8_linear(Isa isa) {
    return of_isa(isa, [](auto own) { return op<own.value>(); });
}

}  // namespace tokopt
