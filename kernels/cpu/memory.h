// Memory of kernels: weights that are packed once, and scratch that is kept between calls.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tokopt {

// Bytes of packed weights that the process holds now.
inline std::atomic<size_t> packed{0};

// Memory that weights lie in one after another: with large pages, fewer addresses are translated.
class Slab {
  public:
    static constexpr size_t PAGE = size_t(1) << 21, SIZE = 16 * PAGE;

    explicit Slab(size_t bytes) : size((bytes + PAGE - 1) / PAGE * PAGE) {
        void* memory = nullptr;
        if (posix_memalign(&memory, PAGE, size)) throw std::bad_alloc();
        data = static_cast<uint8_t*>(memory);
#if defined(__linux__)
        madvise(data, size, MADV_HUGEPAGE);  // a wish, which the system may not grant
#endif
    }
    ~Slab() { std::free(data); }
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;

    // Null where `bytes` more do not fit.
    uint8_t* next(size_t bytes) {
        if (bytes > size - used) return nullptr;
        used += bytes;
        return data + used - bytes;
    }

  private:
    const size_t size;
    size_t used = 0;
    uint8_t* data;
};

// A part of a slab; the slab is freed with the last of its parts.
struct Packed {
    explicit Packed(size_t bytes) : bytes(bytes) {
        static auto& mutex = *new std::mutex;
        static auto& newest = *new std::weak_ptr<Slab>;
        const std::lock_guard<std::mutex> lock(mutex);
        slab = newest.lock();
        data = slab ? slab->next(bytes) : nullptr;
        if (!data) {
            slab = std::make_shared<Slab>(std::max(bytes, Slab::SIZE));
            data = slab->next(bytes);
            newest = slab;
        }
        packed += bytes;
    }
    ~Packed() { packed -= bytes; }
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;

    const size_t bytes;
    uint8_t* data;

  private:
    std::shared_ptr<Slab> slab;
};

// Memory of a thread that calls kernels; it grows and is kept.
class Scratch {
  public:
    ~Scratch() { std::free(data); }
    uint8_t* of(size_t bytes) {
        if (bytes > size) {
            std::free(data);
            data = nullptr, size = 0;
            void* memory = nullptr;
            if (posix_memalign(&memory, 64, bytes)) throw std::bad_alloc();
            data = static_cast<uint8_t*>(memory), size = bytes;
        }
        return data;
    }

  private:
    uint8_t* data = nullptr;
    size_t size = 0;
};

}  // namespace tokopt
