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
#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"
#include "code.h"
#include "weight.h"

namespace tokopt {
namespace {

constexpr char NAME[] = "QuantizedLinear";

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
    static constexpr size_t FEW = 2;         // rows whose products do not keep a processor from fetching by itself
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
        const bool ask = rows > FEW || asks_ahead();
        const Fetch next = {weight.tile(last).groups, ask ? (last - first) * weight.tile_bytes() : 0};
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
        const size_t valid = sizes.valid(t), row = sizes.width() * 4;
        char* into = y + block * code.rows * row + sizes.column(t) * 4;
        for (size_t r = 0; r < given(block); ++r, into += row) {
            if (valid == TILE)
                std::memcpy(into, out[0] + r * TILE, TILE * 4);
            else
                std::memcpy(into, out[0] + r * TILE, valid * 4);
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

Gate gate(const Api& api, const OrtKernelInfo* info, const Node& node) {
    static const char* const names[] = {"", "silu", "gelu", "gelu_tanh"};
    const std::string wanted = api.string(info, "gate");
    for (Gate gate : {Gate::NONE, Gate::SILU, Gate::GELU, Gate::GELU_TANH}) {
        if (wanted == names[static_cast<int>(gate)]) return gate;
    }
    node.refuse("gate=" + wanted + " must be silu, gelu or gelu_tanh");
}

void fit(const Node& node, Input place, const Tensor& given, int element, const Shape& shape) {
    const std::string name = INPUT_NAMES[place];
    if (given.element != element)
        node.refuse(name + (place == MINIMUM ? " must have the type of scale" : " is of another type"));
    if (given.shape != shape) node.refuse(name + " must be " + text(shape) + ", got " + text(given.shape));
}

Source source(const Node& node, bool gated) {
    const int64_t bits = node.integer("bits"), group = node.integer("group");
    if (bits != 4 && bits != 8) node.refuse("bits=" + std::to_string(bits) + " must be 4 or 8");
    if (group != 32 && group != 64 && group != 128)
        node.refuse("group=" + std::to_string(group) + " must be 32, 64 or 128");
    const auto constant = [&](Input place) { return node.constant(place, INPUT_NAMES[place]); };
    for (Input place : {CODES, SCALE}) {
        if (!node.has(place)) node.refuse(std::string(INPUT_NAMES[place]) + " is missing");
    }
    const Tensor codes = constant(CODES), scale = constant(SCALE), zero = constant(ZERO);
    const Tensor minimum = constant(MINIMUM), bias = constant(BIAS);
    if (codes.element != UINT8 || codes.shape.size() != 2)
        node.refuse("codes must be bytes [out, in * bits / 8], got " + text(codes.shape));
    if (scale.element != FLOAT && scale.element != FLOAT16) node.refuse("scale must be float32 or float16");
    if (zero.data && minimum.data) node.refuse("zero and minimum exclude each other; give one of them");
    const int64_t out = codes.shape[0], in = codes.shape[1] * 8 / bits;
    if (out < 1 || in < 1 || in % group)
        node.refuse("codes " + text(codes.shape) + " of " + std::to_string(bits) +
                    " bits are not outputs of whole groups of " + std::to_string(group) + " inputs");
    if (gated && out % 2) node.refuse("codes " + text(codes.shape) + " have no half of the outputs that gates the other");
    const Shape numbers = {out, in / group};
    fit(node, SCALE, scale, scale.element, numbers);
    if (zero.data) fit(node, ZERO, zero, UINT8, numbers);
    if (minimum.data) fit(node, MINIMUM, minimum, scale.element, numbers);
    if (bias.data) fit(node, BIAS, bias, FLOAT, {out});
    const Sizes sizes = {size_t(in),
                         size_t(out),
                         size_t(group),
                         int(bits),
                         scale.element == FLOAT16,
                         zero.data != nullptr,
                         minimum.data != nullptr,
                         gated};
    const auto bytes = [](const Tensor& given) { return reinterpret_cast<const uint8_t*>(given.data); };
    return {sizes, bytes(codes), bytes(scale), bytes(zero), bytes(minimum), bytes(bias)};
}

OrtStatus* create(Isa isa, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] {
        const Node node(api, info, NAME);
        const Gate gates = gate(api, info, node);
        const Source given = source(node, gates != Gate::NONE);
        *kernel = new Kernel{api, isa, gates, shared<Weight>(given)};
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
        if (x.rows) Call(kernel, x.data, x.rows, y).run(api, context);
    });
}

template <Isa ISA>
constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel>();
    op.GetName = [](const OrtCustomOp*) { return NAME; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int {
        return place == SCALE || place == MINIMUM ? ANY : place == CODES || place == ZERO ? UINT8 : FLOAT;
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t place) -> int {
        return place >= ZERO ? OPTIONAL : REQUIRED;
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
