// tokopt.cpu::LatestRepeat: where the end of a text [batch, size] occurred before; see reference.py. A text is read from
// its end, and no further than to a place that agrees in all entries that are looked for.
#include <string>

#include "../cpu/node.h"
#include "../cpu/op.h"
#include "../cpu/ops.h"
#include "../cpu/ort.h"

namespace tokopt {
namespace {

constexpr char NAME[] = "LatestRepeat";
constexpr int64_t WORDS = 3;

enum Input : size_t { TEXT, END, INPUTS };

struct Kernel {
    Api api;
    std::string where;
};

struct Found {
    int64_t place = -1, agreed = 0;
};

Found search(Numbers<int32_t> text, int64_t end) {
    Found best;
    for (int64_t place = end - 1; place >= 0 && best.agreed < WORDS; --place) {
        int64_t agreed = 0;
        while (agreed < WORDS && agreed <= place && text[size_t(place - agreed)] == text[size_t(end - agreed)]) ++agreed;
        if (agreed > best.agreed) best = {place, agreed};
    }
    return best;
}

// What a call is given, looked at before anything is read.
class Given {
  public:
    Given(const Kernel& kernel, const OrtKernelContext* context) : kernel(kernel) {
        const Argument given = argument(kernel.api, kernel.api.input(context, TEXT));
        if (given.rank != 2) refuse("text must be [batch, size], got " + tokopt::text(given));
        batch = given.sizes[0], size = given.sizes[1], text = given.data;
        const Argument last = argument(kernel.api, kernel.api.input(context, END));
        if (!last.is({batch})) refuse("end must be " + tokopt::text(Shape{batch}) + ", got " + tokopt::text(last));
        end = {last.data};
        for (size_t b = 0; b < size_t(batch); ++b) {
            if (end[b] >= size)
                refuse("row " + std::to_string(b) + " ends at " + std::to_string(end[b]) + ", and its text has " +
                       std::to_string(size) + " entries");
        }
    }

    Found row(size_t b) const { return search({text + sizeof(int32_t) * b * size_t(size)}, end[b]); }

    int64_t batch, size;

  private:
    [[noreturn]] void refuse(const std::string& what) const { throw Refused(kernel.where + what + "."); }

    const Kernel& kernel;
    const char* text;
    Numbers<int64_t> end{nullptr};
};

OrtStatus* create(const OrtCustomOp*, void* const* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&] { *kernel = new Kernel{api, Node(api, info, NAME).says()}; });
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    return guarded(kernel.api, [&] {
        const Given given(kernel, context);
        const int64_t shape[] = {given.batch};
        char* places = static_cast<char*>(kernel.api.output(context, 0, shape, 1));
        char* lengths = static_cast<char*>(kernel.api.output(context, 1, shape, 1));
        for (size_t b = 0; b < size_t(given.batch); ++b) {
            const Found found = given.row(b);
            std::memcpy(places + 8 * b, &found.place, 8);
            std::memcpy(lengths + 8 * b, &found.agreed, 8);
        }
    });
}

constexpr OrtCustomOp op() {
    OrtCustomOp op = common_op<Kernel>();
    op.GetName = [](const OrtCustomOp*) { return NAME; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.GetInputType = [](const OrtCustomOp*, size_t place) -> int { return place == TEXT ? INT32 : INT64; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(2); };
    op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return INT64; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    return op;
}

}  // namespace

const OrtCustomOp* latest_repeat() {
    static const OrtCustomOp made = op();
    return &made;
}

}  // namespace tokopt
