// tokopt.cpu::CachedAttention: writes new keys and values into a cache and attends to the slots in use; see
// reference.py.
#include <memory>
#include <string>
#include <vector>

#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"
#include "call.h"

namespace tokopt {
namespace {

enum Input : size_t {
    QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LENGTH, MASK, COS, SIN, KEY_SCALE, VALUE_SCALE, INPUTS
};
const char* const INPUT_NAMES[INPUTS] = {"query", "key", "value", "past_key",  "past_value", "length",
                                         "mask",  "cos", "sin",   "key_scale", "value_scale"};
// Tokens of a call that are computed alike, where the node asks for it: a prompt's are more, and no tree's.
constexpr size_t MOST_ALIKE = 64;

enum Output : size_t { RESULT, PRESENT_KEY, PRESENT_VALUE, OUTPUTS };

// What is known when the session is created.
struct Kernel {
    Api api;
    Isa isa;
    std::string where;
    int64_t heads, key_heads;
    float scale, cap;
    bool interleaved, alike, packed, rotates;
    std::vector<float> key_scale, value_scale;  // [key heads, channels], empty where the cache holds floats
};

Kernel read(const Api& api, const OrtKernelInfo* info, Isa isa, bool codes) {
    const Node node(api, info, "CachedAttention");
    Kernel kernel = {api,
                     isa,
                     node.says(),
                     node.integer("heads"),
                     node.integer("key_heads"),
                     node.number("scale"),
                     node.number("softcap"),
                     node.integer("interleaved") != 0,
                     node.integer("alike") != 0,
                     !node.has(KEY),
                     node.has(COS),
                     {},
                     {}};
    if (kernel.key_heads < 1 || kernel.heads < 1 || kernel.heads % kernel.key_heads)
        node.refuse("heads=" + std::to_string(kernel.heads) + " must be a multiple of key_heads=" +
                    std::to_string(kernel.key_heads));
    if (node.has(KEY) != node.has(VALUE)) node.refuse("key and value must be given together, or be packed in query");
    if (node.has(COS) != node.has(SIN)) node.refuse("cos and sin must be given together");
    for (const auto& [place, into] : {std::pair{KEY_SCALE, &kernel.key_scale}, {VALUE_SCALE, &kernel.value_scale}}) {
        const Tensor given = node.constant(place, INPUT_NAMES[place]);
        if (!given.data != !codes)
            node.refuse(std::string(INPUT_NAMES[place]) + (codes ? " is missing, which a cache of 8 bits needs"
                                                                 : " is given, which a cache of floats does not take"));
        if (!codes) continue;
        if (given.element != FLOAT || given.shape.size() != 3 || given.shape[0] != kernel.key_heads || given.shape[1] != 1)
            node.refuse(std::string(INPUT_NAMES[place]) + " must be float32 [" + std::to_string(kernel.key_heads) +
                        ", 1, channels], got " + text(given.shape));
        into->resize(size_t(given.shape[0] * given.shape[2]));
        std::memcpy(into->data(), given.data, 4 * into->size());
    }
    return kernel;
}

class Arguments {
  public:
    Arguments(const Kernel& kernel, const OrtKernelContext* context) : kernel(kernel), api(kernel.api), context(context) {}

    Given read() const {
        const Argument query = argument(QUERY), past = argument(PAST_KEY), values = argument(PAST_VALUE);
        if (query.rank != 3) refuse(QUERY, query, "[batch, tokens, heads x channels]");
        if (past.rank != 4 || past.sizes[1] != kernel.key_heads)
            refuse(PAST_KEY, past, "[batch, " + std::to_string(kernel.key_heads) + ", slots, channels]");
        fit(PAST_VALUE, values, {past.sizes[0], past.sizes[1], past.sizes[2], past.sizes[3]});
        const int64_t batch = query.sizes[0], tokens = query.sizes[1], slots = past.sizes[2], channels = past.sizes[3];
        if (past.sizes[0] != batch) refuse(PAST_KEY, past, "of a batch of " + std::to_string(batch));
        const int64_t heads = kernel.heads, key_heads = kernel.key_heads;
        const int64_t width = channels * (heads + (kernel.packed ? 2 * key_heads : 0));
        fit(QUERY, query, {batch, tokens, width});
        Given given = {};
        given.sizes = {size_t(batch), size_t(tokens),    size_t(slots), size_t(heads), size_t(key_heads),
                       size_t(channels), 0};
        given.queries = source(query);
        if (kernel.packed) {
            given.keys = given.values = given.queries;
            given.keys.data += 4 * heads * channels;
            given.values.data += 4 * (heads + key_heads) * channels;
        } else {
            const Argument key = argument(KEY), value = argument(VALUE);
            fit(KEY, key, {batch, tokens, key_heads * channels});
            fit(VALUE, value, {batch, tokens, key_heads * channels});
            given.keys = source(key), given.values = source(value);
        }
        given.caches = {past.data, values.data, nullptr, nullptr, scale(KEY_SCALE, kernel.key_scale, channels),
                        scale(VALUE_SCALE, kernel.value_scale, channels)};
        given.mask = mask(given.sizes);
        if (kernel.rotates) given.tables = tables(given.sizes);
        given.length = length(batch, tokens, slots);
        given.scale = kernel.scale, given.cap = kernel.cap, given.interleaved = kernel.interleaved;
        return given;
    }

  private:
    [[noreturn]] void refuse(Input place, const Argument& given, const std::string& wanted) const {
        throw Refused(kernel.where + INPUT_NAMES[place] + " must be " + wanted + ", got " + text(given) + ".");
    }

    Argument argument(Input place) const { return tokopt::argument(api, api.input(context, place)); }

    void fit(Input place, const Argument& given, std::initializer_list<int64_t> sizes) const {
        if (!given.is(sizes)) refuse(place, given, text(Shape(sizes)));
    }

    static Source source(const Argument& given) {
        const size_t token = 4 * size_t(given.sizes[2]);
        return {given.data, size_t(given.sizes[1]) * token, token};
    }

    const float* scale(Input place, const std::vector<float>& held, int64_t channels) const {
        if (held.empty()) return nullptr;
        if (held.size() != size_t(kernel.key_heads * channels))
            throw Refused(kernel.where + INPUT_NAMES[place] + " must be [" + std::to_string(kernel.key_heads) + ", 1, " +
                          std::to_string(channels) + "], got " + std::to_string(held.size()) + " numbers.");
        return held.data();
    }

    Mask mask(const Sizes& sizes) const {
        const Argument given = argument(MASK);
        const int64_t heads = given.sizes[1], batch = given.sizes[0], tokens = given.sizes[2];
        const bool by_head = heads != 1 && heads == kernel.heads, by_key_head = heads != 1 && heads == kernel.key_heads;
        const auto is = [](int64_t size, size_t wanted) { return size == 1 || size == int64_t(wanted); };
        if (given.rank != 4 || !is(batch, sizes.batch) || !(heads == 1 || by_head || by_key_head) ||
            !is(tokens, sizes.tokens) || given.sizes[3] != int64_t(sizes.slots))
            refuse(MASK, given, "[1 or " + std::to_string(sizes.batch) + ", 1 or the heads, 1 or " +
                                    std::to_string(sizes.tokens) + ", " + std::to_string(sizes.slots) + "]");
        const size_t head = size_t(tokens) * sizes.slots;
        return {reinterpret_cast<const uint8_t*>(given.data),
                batch == 1 ? 0 : size_t(heads) * head,
                heads == 1 ? 0 : head,
                tokens == 1 ? 0 : sizes.slots,
                by_key_head,
                by_head && !by_key_head};
    }

    Tables tables(Sizes& sizes) const {
        const Argument cos = argument(COS), sin = argument(SIN);
        const int64_t pairs = cos.rank == 3 ? cos.sizes[2] : -1;
        const auto is_batch = [&](const Argument& given) { return given.sizes[0] == 1 || given.sizes[0] == int64_t(sizes.batch); };
        if (pairs < 0 || 2 * pairs > int64_t(sizes.channels) || !is_batch(cos) || cos.sizes[1] != int64_t(sizes.tokens))
            refuse(COS, cos, "[1 or " + std::to_string(sizes.batch) + ", " + std::to_string(sizes.tokens) +
                                 ", at most " + std::to_string(sizes.channels / 2) + "]");
        fit(SIN, sin, {cos.sizes[0], cos.sizes[1], pairs});
        sizes.pairs = size_t(pairs);
        return {cos.data, sin.data, cos.sizes[0] == 1 ? 0 : 4 * sizes.tokens * sizes.pairs};
    }

    const char* length(int64_t batch, int64_t tokens, int64_t slots) const {
        const Argument given = argument(LENGTH);
        fit(LENGTH, given, {batch});
        for (int64_t b = 0; b < batch; ++b) {
            int64_t first;
            std::memcpy(&first, given.data + 8 * b, 8);
            if (first < 0 || first > slots - tokens)
                throw Refused(kernel.where + "row " + std::to_string(b) + " has length " + std::to_string(first) + ", and " +
                              std::to_string(tokens) + " new tokens do not fit into " + std::to_string(slots) +
                              " slots from there; give it more slots.");
        }
        return given.data;
    }

    const Kernel& kernel;
    const Api& api;
    const OrtKernelContext* context;
};

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    const Api& api = kernel.api;
    return guarded(api, [&] {
        Given given = Arguments(kernel, context).read();
        const Sizes& sizes = given.sizes;
        const int64_t result[] = {int64_t(sizes.batch), int64_t(sizes.tokens), int64_t(sizes.heads * sizes.channels)};
        const int64_t cache[] = {int64_t(sizes.batch), int64_t(sizes.key_heads), int64_t(sizes.slots), int64_t(sizes.channels)};
        given.result = static_cast<char*>(api.output(context, RESULT, result, 3));
        given.caches.next_keys = static_cast<char*>(api.output(context, PRESENT_KEY, cache, 4));
        given.caches.next_values = static_cast<char*>(api.output(context, PRESENT_VALUE, cache, 4));
        const bool alike = kernel.alike && sizes.tokens <= MOST_ALIKE;
        const Code& fastest = code(kernel.isa, (alike ? 1 : sizes.tokens) * sizes.group(), sizes.channels);
        Call(fastest, given, alike).run(api, context);
    });
}

// The heads and their channels; -1 where that is not known.
int64_t width(const Api& api, OrtShapeInferContext* context) {
    const OrtShapeInfo* info = api.input_shape(context, PAST_KEY);
    Shape shape(api.rank(info));
    if (shape.empty()) return -1;
    api.dimensions(info, shape.data(), shape.size());
    return shape.back() < 0 ? -1 : shape.back() * api.integer(context, "heads");
}

// The result has the rows and tokens of the queries, the caches stay as they are.
OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    const Api api(registered());
    return guarded(api, [&] {
        for (const auto& [place, from] : {std::pair{RESULT, QUERY}, {PRESENT_KEY, PAST_KEY}, {PRESENT_VALUE, PAST_VALUE}}) {
            const OrtShapeInfo* info = api.input_shape(context, from);
            Shape shape(api.rank(info));
            if (shape.empty()) continue;  // not known
            std::vector<const char*> names(shape.size());
            api.dimensions(info, shape.data(), shape.size());
            api.symbols(info, names.data(), names.size());
            if (place == RESULT) shape.back() = width(api, context), names.back() = "";
            api.set_output_shape(context, place, api.element(info), shape, names);
        }
    });
}

template <Isa ISA, bool CODES>
constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel>();
    op.GetName = [](const OrtCustomOp*) { return "CachedAttention"; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int {
        const bool cache = place == PAST_KEY || place == PAST_VALUE;
        return place == LENGTH ? INT64 : place == MASK ? BOOL : cache && CODES ? INT8 : FLOAT;
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t place) -> int {
        return place == KEY || place == VALUE || place >= COS ? OPTIONAL : REQUIRED;
    };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(OUTPUTS); };
    op.GetOutputType = [](const OrtCustomOp*, size_t place) -> int { return place != RESULT && CODES ? INT8 : FLOAT; };
    op.CreateKernelV2 = [](const OrtCustomOp*, void* const* table, const OrtKernelInfo* info, void** kernel) {
        const Api api(table);
        return guarded(api, [&] { *kernel = new Kernel(read(api, info, ISA, CODES)); });
    };
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer;
    return op;
}

template <bool CODES>
const OrtCustomOp* of(Isa isa) {
    return of_isa(isa, [](auto own) { return op<own.value, CODES>(); });
}

}  // namespace

const OrtCustomOp* cached_attention(Isa isa, bool codes) { return codes ? of<true>(isa) : of<false>(isa); }

}  // namespace tokopt
