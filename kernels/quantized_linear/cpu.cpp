// tokopt.cpu::QuantizedLinear: x [..., in] times a weight [out, in] of 4 or 8 bits in groups; see reference.py.
//
// Activations are rounded to 8 bits, products of a group summed in 32 bits, and the sums scaled in float32. The weight
// is packed once: tiles of 16 outputs lie one after another, and in a tile four inputs of all 16 outputs, then the
// next four. So a thread reads its part of the weight from beginning to end, once for all rows of x.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/memory.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"
#include "code.h"
#include "weight.h"

namespace tokopt {
namespace {

struct Kernel {
    Api api;
    Isa isa;
    Gate gate;
    std::shared_ptr<const Weight> weight;
};

// One call: rows of x, rounded, times the weight. Rows are worked on in blocks, and the weight in tiles.
class Call {
  public:
    Call(const Kernel& kernel, const char* x, size_t rows, char* y)
        : code(tokopt::code(kernel.isa, rows)), weight(*kernel.weight), sizes(weight.sizes), gate(kernel.gate),
          x(x), rows(rows), y(y) {
        static thread_local Scratch scratch;
        blocks = (rows + code.rows - 1) / code.rows;
        const size_t room = code.full ? blocks * code.rows : rows;
        const size_t numbers = 3 * room * sizes.groups();
        into.numbers = reinterpret_cast<float*>(scratch.of(4 * numbers + room * sizes.in));
        into.q = reinterpret_cast<int8_t*>(into.numbers + numbers);
        into.chunks = code.full;
    }

    void run(const Api& api, const OrtKernelContext* context) {
        if (rows * sizes.in < SERIAL) {
            for (size_t block = 0; block < blocks; ++block) quantize(block);
        } else {
            api.parallel(
                context, [](void* call, size_t block) { static_cast<Call*>(call)->quantize(block); }, blocks, this);
        }
        parts = (rows + PART - 1) / PART;
        strip = sizes.halves();
        if (blocks > 1 || code.enter) strip *= std::clamp<size_t>(STRIP / weight.tile_bytes() / strip, 1, 4 / strip);
        const size_t strips = (sizes.tiles() + strip - 1) / strip;
        api.parallel(
            context, [](void* call, size_t i) { static_cast<Call*>(call)->multiply(i); }, strips * parts, this);
    }

  private:
    static constexpr size_t SERIAL = 16384;  // numbers that one thread rounds sooner than it could share them out
    static constexpr size_t PART = 64;       // rows whose rounded numbers stay in a core's second cache
    static constexpr size_t STRIP = 32768;   // bytes of weights that stay in its first cache, for all blocks of rows

    // Rows of a block: those that are there, and those that it is interleaved for.
    size_t given(size_t block) const { return std::min(code.rows, rows - block * code.rows); }
    size_t in_block(size_t block) const { return code.full ? code.rows : given(block); }

    // Block `block` of the rounded rows: those before it are all full.
    Quantized block_of(size_t block) const {
        const size_t first = block * code.rows;
        return {into.q + first * sizes.in, into.numbers + 3 * first * sizes.groups(), into.chunks};
    }

    void quantize(size_t block) const {
        const int added = code.offset[sizes.bits == 8];
        const int offset = sizes.zero || sizes.minimum ? added : added - (1 << (sizes.bits - 1));
        const size_t R = in_block(block), some = given(block);
        const Quantized own = block_of(block);
        if (some < R) {
            std::fill(own.q, own.q + R * sizes.in, int8_t(0));
            std::fill(own.numbers, own.numbers + 3 * R * sizes.groups(), 0.f);
        }
        for (size_t r = 0; r < some; ++r)
            code.quantize(x + (block * code.rows + r) * sizes.in * 4, sizes, offset, own, R, r);
    }

    // Part `i % parts` of the rows, times strip `i / parts` of tiles. Meanwhile the next strip comes from memory.
    void multiply(size_t i) const {
        const size_t first = i / parts * strip, last = std::min(first + strip, sizes.tiles());
        const size_t row = i % parts * PART, end = (std::min(row + PART, rows) + code.rows - 1) / code.rows;
        const size_t begin = row / code.rows, products = (end - begin) * (last - first);
        const Fetch next = {weight.tile(last).groups, (last - first) * weight.tile_bytes()};
        if (code.enter) code.enter();
        size_t product = 0;
        for (size_t block = begin; block < end; ++block) {
            for (size_t t = first; t < last; t += sizes.halves(), product += sizes.halves())
                multiply(block, t, next.part(product, products), next.part(product + 1, products));
        }
        if (code.leave) code.leave();
    }

    // A tile, or two of which one gates the other.
    void multiply(size_t block, size_t t, Fetch next, Fetch after) const {
        const Quantized own = block_of(block);
        const Product product = code.products[sizes.bits == 8][in_block(block) - 1];
        float out[2][MOST_ROWS * TILE];
        product(weight.tile(t), {own.q, own.numbers, next}, out[0], TILE);
        if (sizes.gated) {
            product(weight.tile(t + 1), {own.q, own.numbers, after}, out[1], TILE);
            code.apply(gate, out[0], out[1], given(block) * TILE);
        }
        for (size_t r = 0; r < given(block); ++r) {
            const size_t place = (block * code.rows + r) * sizes.width() + sizes.column(t);
            std::memcpy(y + place * 4, out[0] + r * TILE, sizes.valid(t) * 4);
        }
    }

    const Code& code;
    const Weight& weight;
    const Sizes& sizes;
    const Gate gate;
    const char* x;  // [rows, in] of float32, at any address
    const size_t rows;
    char* y;  // [rows, width] of float32
    size_t blocks = 0, parts = 0, strip = 1;
    Quantized into;
};

enum Input : size_t { X, CODES, SCALE, ZERO, MINIMUM, BIAS, INPUTS };
const char* const INPUT_NAMES[INPUTS] = {"x", "codes", "scale", "zero", "minimum", "bias"};

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
    std::string joined;
    for (int64_t size : shape) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
    return "[" + joined + "]";
}

struct Constant {
    const uint8_t* data = nullptr;
    int element = 0;
    Shape shape;
};

// Reads a node, and refuses what the kernels could not compute.
class Node {
  public:
    Node(const Api& api, const OrtKernelInfo* info) : api(api), info(info) {}

    Gate gate() const {
        static const char* const names[] = {"", "silu", "gelu", "gelu_tanh"};
        const std::string wanted = api.string(info, "gate");
        for (Gate gate : {Gate::NONE, Gate::SILU, Gate::GELU, Gate::GELU_TANH}) {
            if (wanted == names[static_cast<int>(gate)]) return gate;
        }
        refuse("gate=" + wanted + " must be silu, gelu or gelu_tanh");
    }

    Source read() const {
        const int64_t bits = attribute("bits"), group = attribute("group");
        if (bits != 4 && bits != 8) refuse("bits=" + std::to_string(bits) + " must be 4 or 8");
        if (group != 32 && group != 64 && group != 128)
            refuse("group=" + std::to_string(group) + " must be 32, 64 or 128");
        const Constant codes = constant(CODES), scale = constant(SCALE), zero = constant(ZERO);
        const Constant minimum = constant(MINIMUM), bias = constant(BIAS);
        if (codes.element != UINT8 || codes.shape.size() != 2)
            refuse("codes must be bytes [out, in * bits / 8], got " + text(codes.shape));
        if (scale.element != FLOAT && scale.element != FLOAT16) refuse("scale must be float32 or float16");
        if (zero.data && minimum.data) refuse("zero and minimum exclude each other; give one of them");
        const int64_t out = codes.shape[0], in = codes.shape[1] * 8 / bits;
        if (out < 1 || in < 1 || in % group)
            refuse("codes " + text(codes.shape) + " of " + std::to_string(bits) +
                   " bits are not outputs of whole groups of " + std::to_string(group) + " inputs");
        const bool gated = gate() != Gate::NONE;
        if (gated && out % 2) refuse("codes " + text(codes.shape) + " have no half of the outputs that gates the other");
        const Shape numbers = {out, in / group};
        fit(SCALE, scale, scale.element, numbers);
        if (zero.data) fit(ZERO, zero, UINT8, numbers);
        if (minimum.data) fit(MINIMUM, minimum, scale.element, numbers);
        if (bias.data) fit(BIAS, bias, FLOAT, {out});
        const Sizes sizes = {size_t(in),
                             size_t(out),
                             size_t(group),
                             int(bits),
                             scale.element == FLOAT16,
                             zero.data != nullptr,
                             minimum.data != nullptr,
                             gated};
        return {sizes, codes.data, scale.data, zero.data, minimum.data, bias.data};
    }

  private:
    [[noreturn]] void refuse(const std::string& what) const {
        throw Refused("tokopt.cpu::QuantizedLinear '" + api.node_name(info) + "': " + what + ".");
    }

    int64_t attribute(const char* name) const {
        int64_t value = 0;
        if (!api.integer(info, name, &value)) refuse("attribute " + std::string(name) + " is missing");
        return value;
    }

    // Without data where an optional input is left out.
    Constant constant(Input place) const {
        if (place >= api.inputs(info) || api.input_name(info, place).empty()) {
            if (place == CODES || place == SCALE) refuse(std::string(INPUT_NAMES[place]) + " is missing");
            return {};
        }
        const OrtValue* value = api.constant(info, place);
        if (!value) refuse(std::string(INPUT_NAMES[place]) + " must be a constant");
        OrtShapeInfo* shape_info = api.shape_info(value);
        Constant found;
        found.element = api.element(shape_info);
        found.shape.resize(api.rank(shape_info));
        api.dimensions(shape_info, found.shape.data(), found.shape.size());
        api.release(shape_info);
        found.data = static_cast<const uint8_t*>(api.data(value));
        return found;
    }

    void fit(Input place, const Constant& given, int element, const Shape& shape) const {
        const std::string name = INPUT_NAMES[place];
        if (given.element != element)
            refuse(name + (place == MINIMUM ? " must have the type of scale" : " is of another type"));
        if (given.shape != shape) refuse(name + " must be " + text(shape) + ", got " + text(given.shape));
    }

    const Api& api;
    const OrtKernelInfo* info;
};

OrtStatus* create(Isa isa, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] {
        const Node node(api, info);
        const Source source = node.read();
        *kernel = new Kernel{api, isa, node.gate(), shared<Weight>(source)};
        release(source);
    });
}

// The output has the shape of x, but for its last axis.
OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    const Api api(registered());
    return guarded(api, [&] {
        const OrtShapeInfo *x = api.input_shape(context, X), *codes = api.input_shape(context, CODES);
        Shape shape(api.rank(x)), sizes(api.rank(codes));
        if (shape.empty() || sizes.empty()) return;  // not known
        api.dimensions(x, shape.data(), shape.size());
        api.dimensions(codes, sizes.data(), sizes.size());
        std::vector<const char*> names(shape.size());
        api.symbols(x, names.data(), names.size());
        shape.back() = api.has_attribute(context, "gate") ? sizes[0] / 2 : sizes[0], names.back() = "";
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
        const Sizes& sizes = kernel.weight->sizes;
        if (rank < 1 || rank > MOST_AXES || shape[rank - 1] != int64_t(sizes.in))
            throw Refused(
                "tokopt.cpu::QuantizedLinear: x must be [..., " + std::to_string(sizes.in) + "], got " +
                (rank < 1 || rank > MOST_AXES ? std::to_string(rank) + " axes" : text({shape, shape + rank})) + ".");
        size_t rows = 1;
        for (size_t axis = 0; axis + 1 < rank; ++axis) rows *= size_t(shape[axis]);
        shape[rank - 1] = int64_t(sizes.width());
        char* y = static_cast<char*>(api.output(context, 0, shape, rank));
        if (rows) Call(kernel, static_cast<const char*>(api.data(x)), rows, y).run(api, context);
    });
}

template <Isa ISA>
constexpr OrtCustomOp op() {
    OrtCustomOp op = {};
    op.version = ORT_VERSION;
    op.GetName = [](const OrtCustomOp*) { return "QuantizedLinear"; };
    op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int {
        return place == SCALE || place == MINIMUM ? ANY : place == CODES || place == ZERO ? UINT8 : FLOAT;
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t place) -> int {
        return place >= ZERO ? OPTIONAL : REQUIRED;
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

const OrtCustomOp* quantized_linear(Isa isa) {
    static const OrtCustomOp ops[ISAS] = {op<Isa::PLAIN>(),    op<Isa::NEON>(),        op<Isa::AVX2>(),
                                          op<Isa::AVX_VNNI>(), op<Isa::AVX512_VNNI>(), op<Isa::AMX_INT8>()};
    return &ops[static_cast<int>(isa)];
}

size_t packed_bytes() { return packed; }

}  // namespace tokopt
