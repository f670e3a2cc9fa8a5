// The weight of a node: packed in the order of the kernels, and shared by all sessions of the process.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../cpu/memory.h"
#include "code.h"

namespace tokopt {
namespace {

struct Size {
    size_t in, out;

    size_t padded() const { return (in + PAD - 1) / PAD * PAD; }
    size_t pairs() const { return (out + PAIR - 1) / PAIR; }
    size_t panel_bytes() const { return padded() * PANEL; }
    size_t pair_bytes() const { return 2 * panel_bytes() + 3 * 4 * PAIR; }
};

// Constant inputs of a node, as ONNX has them.
struct Source {
    Size size;
    const uint8_t* codes;  // [in, out]
    const char* scale;     // [out] float32
    const char* bias;      // [out] float32, or null

    uint64_t hash() const {
        return mixed(mixed(size.in, codes, size.in * size.out), reinterpret_cast<const uint8_t*>(scale), 4 * size.out);
    }
};

// Two panels after another, their codes as lines of four inputs, then the numbers of their outputs.
class Weight {
  public:
    explicit Weight(const Source& from) : size(from.size), memory(size.pair_bytes() * size.pairs()) {
        for (size_t pair = 0; pair < size.pairs(); ++pair) pack(from, pair, memory.data + pair * size.pair_bytes());
    }

    // Whether packing `from` would give this.
    bool holds(const Source& from) const {
        if (size.in != from.size.in || size.out != from.size.out) return false;
        std::vector<uint8_t> own(size.pair_bytes());
        for (size_t pair = 0; pair < size.pairs(); ++pair) {
            pack(from, pair, own.data());
            if (std::memcmp(own.data(), memory.data + pair * own.size(), own.size())) return false;
        }
        return true;
    }

    Panels panels(size_t pair) const {
        const uint8_t* data = memory.data + pair * size.pair_bytes();
        const uint8_t* numbers = data + 2 * size.panel_bytes();
        const auto* scale = reinterpret_cast<const float*>(numbers) + PAIR;
        return {reinterpret_cast<const int8_t*>(data),
                size.panel_bytes(),
                size.padded() / 4,
                reinterpret_cast<const int32_t*>(numbers),
                scale,
                scale + PAIR};
    }

    const Size size;

  private:
    void pack(const Source& from, size_t pair, uint8_t* into) const {
        std::memset(into, 0, size.pair_bytes());
        const size_t first = pair * PAIR, some = std::min<size_t>(PAIR, size.out - first);
        int32_t sums[PAIR] = {};
        for (size_t i = 0; i < size.in; ++i) {
            const uint8_t* row = from.codes + i * size.out + first;
            for (size_t o = 0; o < some; ++o) {
                const int code = row[o] - 128;
                into[o / PANEL * size.panel_bytes() + i / 4 * LINE + o % PANEL * 4 + i % 4] = uint8_t(code);
                sums[o] += code;
            }
        }
        uint8_t* numbers = into + 2 * size.panel_bytes();
        std::memcpy(numbers, sums, sizeof sums);
        std::memcpy(numbers + 4 * PAIR, from.scale + 4 * first, 4 * some);
        if (from.bias) std::memcpy(numbers + 8 * PAIR, from.bias + 4 * first, 4 * some);
    }

    const Packed memory;
};

}  // namespace
}  // namespace tokopt
