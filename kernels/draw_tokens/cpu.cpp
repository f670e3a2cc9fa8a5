// tokopt.cpu::DrawTokens: a token of every row of logits [batch, rows, vocabulary], and its log-probability; see
// reference.py. A thread reads a row several times while it is in its cache, and writes two numbers.
#include <string>

#include "../cpu/memory.h"
#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"
#include "draw.h"

namespace tokopt {
namespace {

constexpr char NAME[] = "DrawTokens";

enum Input : size_t { LOGITS, UNIFORM, TEMPERATURE, TOP_K, TOP_P, MIN_P, INPUTS };
enum Output : size_t { TOKEN, LOGPROB, OUTPUTS };
constexpr const char* INPUT_NAMES[] = {"logits", "uniform", "temperature", "top_k", "top_p", "min_p"};

struct Kernel {
    Api api;
    Isa isa;
    bool logprobs;  // whether they are read
    std::string where;
};

// What a call is given, looked at before anything is computed.
class Given {
  public:
    Given(const Kernel& kernel, const OrtKernelContext* context) : kernel(kernel) {
        const Argument given = argument(kernel.api, kernel.api.input(context, LOGITS));
        if (given.rank != 3 || given.sizes[2] < 1)
            refuse("logits must be [batch, rows, vocabulary], got " + text(given));
        logits = given.data;
        batch = size_t(given.sizes[0]), rows = size_t(given.sizes[1]), vocabulary = size_t(given.sizes[2]);
        uniform = {fitting(context, UNIFORM, {given.sizes[0], given.sizes[1]})};
        temperature = {fitting(context, TEMPERATURE, {given.sizes[0]})};
        top_k = {fitting(context, TOP_K, {given.sizes[0]})};
        top_p = {fitting(context, TOP_P, {given.sizes[0]})};
        min_p = {fitting(context, MIN_P, {given.sizes[0]})};
        for (size_t b = 0; b < batch; ++b) check(b);
        for (size_t i = 0; i < batch * rows; ++i) check(uniform[i] >= 0 && uniform[i] < 1, i / rows, UNIFORM, "in [0, 1)");
    }

    Options options(size_t b) const { return {temperature[b], top_k[b], top_p[b], min_p[b]}; }

    size_t batch, rows, vocabulary;
    const char* logits;
    Numbers<float> uniform, temperature, top_p, min_p;
    Numbers<int64_t> top_k;

  private:
    [[noreturn]] void refuse(const std::string& what) const { throw Refused(kernel.where + what + "."); }

    const char* fitting(const OrtKernelContext* context, Input place, std::initializer_list<int64_t> sizes) const {
        const Argument given = argument(kernel.api, kernel.api.input(context, place));
        if (!given.is(sizes))
            refuse(std::string(INPUT_NAMES[place]) + " must be " + text(Shape(sizes)) + ", got " + text(given));
        return given.data;
    }

    void check(bool good, size_t b, Input place, const char* wanted) const {
        if (!good) refuse(std::string(INPUT_NAMES[place]) + " of row " + std::to_string(b) + " must be " + wanted);
    }
    // NaN is none of these.
    void check(size_t b) const {
        check(temperature[b] >= 0 && temperature[b] <= std::numeric_limits<float>::max(), b, TEMPERATURE,
              "a number that is not negative");
        check(top_k[b] >= 0, b, TOP_K, "0 or more");
        check(top_p[b] > 0, b, TOP_P, "above 0");
        check(min_p[b] >= 0 && min_p[b] <= 1, b, MIN_P, "0 to 1");
    }

    const Kernel& kernel;
};

struct Call {
    const Code& code;
    const Given& given;
    char *token, *logprob;  // the latter is null where nobody reads it

    void run(size_t i) const {
        static thread_local Scratch scratch;
        const size_t size = given.vocabulary;
        const Draw draw(code, given.logits + 4 * i * size, size, scratch.of(Room(size).bytes()));
        const int64_t drawn = draw.token(given.options(i / given.rows), given.uniform[i]);
        std::memcpy(token + 8 * i, &drawn, 8);
        if (!logprob) return;
        const float known = draw.logprob(drawn);
        std::memcpy(logprob + 4 * i, &known, 4);
    }
};

OrtStatus* create(Isa isa, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] {
        const Node node(api, info, NAME);
        *kernel = new Kernel{api, isa, api.outputs(info) == OUTPUTS, node.says()};
    });
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    const Api& api = kernel.api;
    return guarded(api, [&] {
        const Given given(kernel, context);
        const int64_t shape[] = {int64_t(given.batch), int64_t(given.rows)};
        char* token = static_cast<char*>(api.output(context, TOKEN, shape, 2));
        char* logprob = kernel.logprobs ? static_cast<char*>(api.output(context, LOGPROB, shape, 2)) : nullptr;
        Call call = {code(kernel.isa), given, token, logprob};
        if (const size_t total = given.batch * given.rows)
            api.parallel(context, [](void* call, size_t i) { static_cast<Call*>(call)->run(i); }, total, &call);
    });
}

// Both outputs are [batch, rows].
OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    const Api api(registered());
    return guarded(api, [&] {
        const OrtShapeInfo* info = api.input_shape(context, LOGITS);
        Shape shape(api.rank(info));
        if (shape.size() != 3) return;  // not known
        std::vector<const char*> names(3);
        api.dimensions(info, shape.data(), 3);
        api.symbols(info, names.data(), 3);
        shape.pop_back(), names.pop_back();
        api.set_output_shape(context, TOKEN, INT64, shape, names);
        api.set_output_shape(context, LOGPROB, FLOAT, shape, names);
    });
}

template <Isa ISA>
constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel>();
    op.GetName = [](const OrtCustomOp*) { return NAME; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int { return place == TOP_K ? INT64 : FLOAT; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(OUTPUTS); };
    op.GetOutputType = [](const OrtCustomOp*, size_t place) -> int { return place == TOKEN ? INT64 : FLOAT; };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t place) -> int {
        return place == LOGPROB ? OPTIONAL : REQUIRED;
    };
    op.CreateKernelV2 = [](const OrtCustomOp*, void* const* api, const OrtKernelInfo* info, void** kernel) {
        return create(ISA, api, info, kernel);
    };
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer;
    return op;
}

}  // namespace

const OrtCustomOp* draw_tokens(Isa isa) {
    return of_isa(isa, [](auto own) { return op<own.value>(); });
}

}  // namespace tokopt
