// tokopt.cpu::Uniforms: the random numbers [batch, count] that follow from counters; see reference.py. They are too few
// for vectors or threads: one op stands for the many by which graphs of standard ops compute them.
#include <string>

#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"

namespace tokopt {
namespace {

constexpr char NAME[] = "Uniforms";

enum Input : size_t { SEED, STREAM, COUNTER, COUNT, INPUTS };

struct Kernel {
    Api api;
    std::string where;
};

uint32_t rotated(uint32_t word, int bits) { return word << bits | word >> (32 - bits); }

// The first word of the block x, y, encrypted with Threefry-2x32 in 20 rounds.
uint32_t threefry(uint32_t a, uint32_t b, uint32_t x, uint32_t y) {
    constexpr int ROTATIONS[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const uint32_t keys[] = {a, b, a ^ b ^ 0x1BD11BDAu};
    x += keys[0], y += keys[1];
    for (uint32_t group = 0; group < 5; ++group) {
        for (int bits : ROTATIONS[group % 2]) x += y, y = rotated(y, bits) ^ x;
        x += keys[(group + 1) % 3], y += keys[(group + 2) % 3] + group + 1;
    }
    return x;
}

// What a call is given, looked at before anything is computed.
class Given {
  public:
    Given(const Kernel& kernel, const OrtKernelContext* context) : kernel(kernel) {
        const Argument given = argument(kernel.api, kernel.api.input(context, SEED));
        if (given.rank != 1) refuse("seed must be [batch], got " + text(given));
        batch = given.sizes[0], seed = {given.data};
        stream = {of_every_row(context, STREAM, "stream")};
        counter = {of_every_row(context, COUNTER, "counter")};
        const Argument wanted = argument(kernel.api, kernel.api.input(context, COUNT));
        if (wanted.rank != 0 && !wanted.is({1})) refuse("count must be one number, got " + text(wanted));
        count = Numbers<int64_t>{wanted.data}[0];
        if (count < 0) refuse("count must not be negative, got " + std::to_string(count));
    }

    // Of a row's words the lower 32 bits count, but for the seed's, whose upper ones are the block's second word.
    void row(size_t b, char* into) const {
        const uint64_t key = uint64_t(seed[b]), first = uint64_t(counter[b]);
        for (size_t i = 0; i < size_t(count); ++i) {
            const uint32_t word =
                threefry(uint32_t(key), uint32_t(stream[b]), uint32_t(first + i), uint32_t(key >> 32));
            const float number = float(word >> 8) * 0x1p-24f;
            std::memcpy(into + sizeof number * i, &number, sizeof number);
        }
    }

    int64_t batch, count;

  private:
    [[noreturn]] void refuse(const std::string& what) const { throw Refused(kernel.where + what + "."); }

    const char* of_every_row(const OrtKernelContext* context, Input place, const char* name) const {
        const Argument given = argument(kernel.api, kernel.api.input(context, place));
        if (!given.is({batch})) refuse(std::string(name) + " must be " + text(Shape{batch}) + ", got " + text(given));
        return given.data;
    }

    const Kernel& kernel;
    Numbers<int64_t> seed, stream, counter;
};

OrtStatus* create(const OrtCustomOp*, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] { *kernel = new Kernel{api, Node(api, info, NAME).says()}; });
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    return guarded(kernel.api, [&] {
        const Given given(kernel, context);
        const int64_t shape[] = {given.batch, given.count};
        char* numbers = static_cast<char*>(kernel.api.output(context, 0, shape, 2));
        for (size_t b = 0; b < size_t(given.batch); ++b)
            given.row(b, numbers + sizeof(float) * b * size_t(given.count));
    });
}

constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel>();
    op.GetName = [](const OrtCustomOp*) { return NAME; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t) -> int { return INT64; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return FLOAT; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    return op;
}

}  // namespace

const OrtCustomOp* uniforms() {
    static const OrtCustomOp made = op();
    return &made;
}

}  // namespace tokopt
