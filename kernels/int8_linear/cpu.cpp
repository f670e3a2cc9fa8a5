// tokopt.cpu::Int8Linear: x [..., in] in 8 bits times a weight [in, out] in 8 bits; see reference.py.
//
// Rows of x are rounded once, in parallel; then parts of the rows are multiplied with strips of the weight. Sums of
// products are exact, and what comes after them (scales, bias, activation, rounding) is done while they are in cache.
#include <algorithm>
#include <memory>
#include <string>

#include "../cpu/memory.h"
#include "../cpu/node.h"
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
        *kernel = new Kernel{api, isa, shared<Weight>(source(node)), steps, then};
    });
}

// The output has the shape of x, but for its last axis.
OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    const Api api(registered());
    return guarded(api, [&] {
        const OrtShapeInfo *x = api.input_shape(context, X), *codes = api.input_shape(context, CODES);
        Shape shape(api.rank(x)), sizes(api.rank(codes));
        if (shape.empty() || sizes.size() < 2) return;  // not known
        api.dimensions(x, shape.data(), shape.size());
        api.dimensions(codes, sizes.data(), sizes.size());
        std::vector<const char*> names(shape.size());
        api.symbols(x, names.data(), names.size());
        shape.back() = sizes[1], names.back() = "";
        api.set_output_shape(context, 0, FLOAT, shape, names);
    });
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    const Api& api = kernel.api;
    return guarded(api, [&] {
        constexpr size_t MOST_AXES = 16;
        const OrtValue* x = api.input(context, X);
        int64_t shape[MOST_AXES];
        OrtShapeInfo* info = api.shape_info(x);
        const size_t rank = api.rank(info);
        if (rank <= MOST_AXES) api.dimensions(info, shape, rank);
        api.release(info);
        const Size& size = kernel.weight->size;
        if (rank < 1 || rank > MOST_AXES || shape[rank - 1] != int64_t(size.in))
            throw Refused(
                "tokopt.cpu::Int8Linear: x must be [..., " + std::to_string(size.in) + "], got " +
                (rank < 1 || rank > MOST_AXES ? std::to_string(rank) + " axes" : text({shape, shape + rank})) + ".");
        size_t rows = 1;
        for (size_t axis = 0; axis + 1 < rank; ++axis) rows *= size_t(shape[axis]);
        shape[rank - 1] = int64_t(size.out);
        char* y = static_cast<char*>(api.output(context, 0, shape, rank));
        if (rows) Call(kernel, static_cast<const char*>(api.data(x)), rows, y).run(api, context);
    });
}

template <Isa ISA>
constexpr OrtCustomOp op() {
    OrtCustomOp op = {};
    op.version = ORT_VERSION;
    op.GetName = [](const OrtCustomOp*) { return NAME; };
    op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int {
        return place == CODES ? UINT8 : FLOAT;
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t place) -> int {
        return place == BIAS ? OPTIONAL : REQUIRED;
    };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return FLOAT; };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return REQUIRED; };
    op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    op.GetEndVersion = [](const OrtCustomOp*) { return VERSION; };
    op.CreateKernelV2 = [](const OrtCustomOp*, void* const* api, const OrtKernelInfo* info, void** kernel) {
        return create(ISA, api, info, kernel);
    };
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer;
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

}  // namespace

const OrtCustomOp* int8_linear(Isa isa) {
    static const OrtCustomOp ops[ISAS] = {op<Isa::PLAIN>(),    op<Isa::NEON>(),        op<Isa::AVX2>(),
                                          op<Isa::AVX_VNNI>(), op<Isa::AVX512_VNNI>(), op<Isa::AMX_INT8>()};
    return &ops[static_cast<int>(isa)];
}

}  // namespace tokopt
