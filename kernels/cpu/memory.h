// Memory of kernels: weights that are packed once, and scratch that is kept between calls.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
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

// Lets go of pages of a constant that was read and is not needed any more, where they are a file's and nobody changed
// them (which the system says of each page): whoever reads them again gets them from the file.
inline void give_back(const uint8_t* data, size_t bytes) {
#if defined(__linux__)
    constexpr uint64_t PRESENT = uint64_t(1) << 63, OF_A_FILE = uint64_t(1) << 61;  // a changed page is of none
    static const int pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start = reinterpret_cast<uintptr_t>(data);
    uint64_t entries[512];
    size_t count = 0;
    for (uintptr_t first = (start + page - 1) / page, last = (start + bytes) / page; first < last; first += count) {
        const size_t wanted = std::min<size_t>(last - first, 512);
        const auto got = pread(pages, entries, 8 * wanted, static_cast<off_t>(8 * first));
        if (got < 8) return;
        count = static_cast<size_t>(got) / 8;
        for (size_t i = 0, run = 0; i < count; i = std::max(run, i + 1)) {
            run = i;
            while (run < count && (entries[run] & PRESENT) && (entries[run] & OF_A_FILE)) ++run;
            if (run > i) madvise(reinterpret_cast<void*>((first + i) * page), (run - i) * page, MADV_DONTNEED);
        }
    }
#else
    (void)data, (void)bytes;
#endif
}

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

// `hash` of what was before, and of these bytes.
inline uint64_t mixed(uint64_t hash, const uint8_t* data, size_t bytes) {
    for (; bytes >= 8; data += 8, bytes -= 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    for (; bytes; ++data, --bytes) hash = (hash ^ *data) * 0x9e3779b97f4a7c15u;
    return hash;
}

// The packed form of `from`, the same object for all sessions of the process that have this weight. A Weight is packed
// from a Source, which has a hash, and says whether it `holds` one.
template <class Weight, class Source>
std::shared_ptr<const Weight> shared(const Source& from) {
    // Never destroyed: a session may outlive the library's own static objects.
    static auto& mutex = *new std::mutex;
    static auto& known = *new std::multimap<uint64_t, std::weak_ptr<const Weight>>;
    static size_t room = 64;
    const uint64_t key = from.hash();
    const std::lock_guard<std::mutex> lock(mutex);
    const auto alike = known.equal_range(key);
    for (auto place = alike.first; place != alike.second; ++place) {
        const std::shared_ptr<const Weight> weight = place->second.lock();
        if (weight && weight->holds(from)) return weight;
    }
    if (known.size() >= room) {  // not for each of many weights: those that no session has any more
        for (auto place = known.begin(); place != known.end();) {
            place = place->second.expired() ? known.erase(place) : std::next(place);
        }
        room = 2 * known.size() + 64;
    }
    auto weight = std::make_shared<const Weight>(from);
    known.emplace(key, weight);
    return weight;
}

}  // namespace tokopt
