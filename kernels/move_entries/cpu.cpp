// tokopt.cpu::MoveEntries: the entries of a path of nodes to the first slots of a cache [batch, heads, slots, channels];
// see reference.py. It copies bytes, whatever the numbers are.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>

#include "../cpu/memory.h"
#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"

namespace tokopt {
namespace {

constexpr char NAME[] = "MoveEntries";

enum Input : size_t { CACHE, PATH, LENGTH, INPUTS };

struct Kernel {
    Api api;
    std::string where;
};

// Bytes of a number by its type in ONNX; 0 where it has none of its own.
size_t width(int element) {
    constexpr size_t WIDTHS[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 8, 16, 2};
    return element < int(std::size(WIDTHS)) ? WIDTHS[element] : 0;
}

int64_t number(const char* data, size_t i) {
    int64_t value;
    std::memcpy(&value, data + 8 * i, 8);
    return value;
}

// What a call is given, looked at before anything is moved.
class Given {
  public:
    Given(const Kernel& kernel, const OrtKernelContext* context)
        : cache(tensor(kernel.api, kernel.api.input(context, CACHE))), kernel(kernel) {
        const Argument path = argument(kernel.api, kernel.api.input(context, PATH));
        const Argument length = argument(kernel.api, kernel.api.input(context, LENGTH));
        if (cache.shape.size() != 4) refuse("cache must be [batch, heads, slots, channels], got " + text(cache.shape));
        if (!width(cache.element)) refuse("cache must have numbers of whole bytes");
        const int64_t rows = cache.shape[0];
        if (path.rank != 2 || path.sizes[0] != rows)
            refuse("path must be [" + std::to_string(rows) + ", nodes], got " + text(path));
        if (!length.is({rows})) refuse("length must be " + text(Shape{rows}) + ", got " + text(length));
        batch = size_t(rows), heads = size_t(cache.shape[1]), nodes = size_t(path.sizes[1]);
        entry = size_t(cache.shape[3]) * width(cache.element), head = size_t(cache.shape[2]) * entry;
        lengths = length.data, paths = path.data;
        for (size_t b = 0; b < batch; ++b) check(b);
    }

    size_t first(size_t b) const { return size_t(number(lengths, b)); }
    size_t node(size_t b, size_t i) const { return size_t(number(paths, b * nodes + i)); }

    const Tensor cache;
    size_t batch, heads, nodes;
    size_t entry, head;  // bytes of a slot, and of all slots of a head

  private:
    [[noreturn]] void refuse(const std::string& what) const { throw Refused(kernel.where + what + "."); }

    void check(size_t b) const {
        const int64_t slots = cache.shape[2], first = number(lengths, b), count = int64_t(nodes);
        const std::string row = "row " + std::to_string(b);
        if (first < 0 || first > slots - count)
            refuse(row + " has length " + std::to_string(first) + ", and " + std::to_string(count) +
                   " nodes do not fit into " + std::to_string(slots) + " slots from there; give it more slots");
        for (size_t i = 0; i < nodes; ++i) {
            const int64_t at = number(paths, b * nodes + i);
            if (at < 0 || at >= slots - first)
                refuse("path of " + row + " has node " + std::to_string(at) + ", which is in none of the " +
                       std::to_string(slots) + " slots from length " + std::to_string(first) + " on");
        }
    }

    const Kernel& kernel;
    const char *lengths, *paths;
};

// All that is moved is read before anything is written: a node's new slot may be another's old one.
void move(const Given& given, char* cache) {
    static thread_local Scratch scratch;
    const size_t entry = given.entry;
    char* held = reinterpret_cast<char*>(scratch.of(given.nodes * entry));
    for (size_t unit = 0; unit < given.batch * given.heads; ++unit) {
        const size_t b = unit / given.heads;
        char* slots = cache + unit * given.head + given.first(b) * entry;
        for (size_t i = 0; i < given.nodes; ++i) std::memcpy(held + i * entry, slots + given.node(b, i) * entry, entry);
        std::memcpy(slots, held, given.nodes * entry);
    }
}

OrtStatus* create(const OrtCustomOp*, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] { *kernel = new Kernel{api, Node(api, info, NAME).says()}; });
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    return guarded(kernel.api, [&] {
        const Given given(kernel, context);
        const Shape& shape = given.cache.shape;
        char* cache = static_cast<char*>(kernel.api.output(context, 0, shape.data(), shape.size()));
        const size_t bytes = given.batch * given.heads * given.head;
        if (!bytes) return;
        if (cache != given.cache.data) std::memcpy(cache, given.cache.data, bytes);
        if (given.nodes) move(given, cache);
    });
}

// The cache stays as it is.
OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    const Api api(registered());
    return guarded(api, [&] {
        const OrtShapeInfo* info = api.input_shape(context, CACHE);
        Shape shape(api.rank(info));
        if (shape.empty()) return;  // not known
        std::vector<const char*> names(shape.size());
        api.dimensions(info, shape.data(), shape.size());
        api.symbols(info, names.data(), names.size());
        api.set_output_shape(context, 0, api.element(info), shape, names);
    });
}

constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel>();
    op.GetName = [](const OrtCustomOp*) { return NAME; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int { return place == CACHE ? ANY : INT64; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ANY; };  // that of the cache
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer;
    return op;
}

}  // namespace

const OrtCustomOp* move_entries() {
    static const OrtCustomOp made = op();
    return &made;
}

}  // namespace tokopt
