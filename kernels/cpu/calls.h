// What products of rows and weights share out among the threads of a session.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "ort.h"

namespace tokopt {

// Where rows of x and y of float32 lie, at any address. Without lists, row r of x makes row r of y.
struct Places {
    const char* x;
    char* y;
    const uint32_t *from = nullptr, *to = nullptr;  // the rows of x and of y, one after another

    size_t read(size_t r) const { return from ? from[r] : r; }
    size_t written(size_t r) const { return to ? to[r] : r; }
};

// Several calls at once, each with its own weight and rows, on all threads of the session. A Call needs so many `bytes`,
// which it gets to `use`. Then it has `preparations` of the numbers that it `read`s, and, once all are done, `products`:
// pieces of work that it does, `prepare` and `multiply`, in any order and by any threads.
template <class Call>
class Calls {
  public:
    Calls(const Api& api, const OrtKernelContext* context, Call* calls, size_t count)
        : api(api), context(context), calls(calls), count(count) {}

    void run() {
        static thread_local Scratch scratch;
        size_t bytes = 0, numbers = 0;
        for (size_t i = 0; i < count; ++i) bytes += calls[i].bytes(), numbers += calls[i].read();
        uint8_t* memory = scratch.of(bytes);
        for (size_t i = 0; i < count; ++i) calls[i].use(memory), memory += calls[i].bytes();
        all(&Call::preparations, &Call::prepare, numbers < SERIAL);
        all(&Call::products, &Call::multiply, false);
    }

  private:
    static constexpr size_t SERIAL = 16384;  // numbers that one thread prepares sooner than it could share them out

    using Count = size_t (Call::*)() const;
    using Work = void (Call::*)(size_t) const;

    // Item i of `all`, whichever call it belongs to.
    void item(size_t i) const {
        const size_t own = size_t(std::upper_bound(ends, ends + count, i) - ends);
        (calls[own].*work)(own ? i - ends[own - 1] : i);
    }

    void all(Count items, Work does, bool alone) {
        static thread_local std::vector<size_t> sums;  // of the items of a call and of those before it
        sums.resize(count);
        size_t total = 0;
        for (size_t i = 0; i < count; ++i) sums[i] = total += (calls[i].*items)();
        ends = sums.data(), work = does;
        if (alone) {
            for (size_t i = 0; i < total; ++i) item(i);
        } else {
            api.parallel(
                context, [](void* own, size_t i) { static_cast<Calls*>(own)->item(i); }, total, this);
        }
    }

    const Api& api;
    const OrtKernelContext* context;
    Call* const calls;
    const size_t count;
    const size_t* ends = nullptr;
    Work work = nullptr;
};

}  // namespace tokopt
