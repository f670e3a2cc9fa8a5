// The weight of one expert: packed in the order of the kernels, and shared by all sessions of the process.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../cpu/memory.h"
#include "../cpu/outputs.h"
#include "code.h"

namespace tokopt::floats {
namespace {

struct Sizes : Outputs<TILE> {
    size_t in;

    size_t bytes() const { return 4 * in * out; }
};

// Constant inputs of a node, as ONNX has them: of one expert.
struct Source {
    Sizes sizes;
    const uint8_t* weight;  // [in, out]
    const uint8_t* bias;    // [out], or null

    uint64_t hash() const { return mixed(sizes.in, weight, sizes.bytes()); }
};

// What a session needs no more once its weight is packed.
void release(const Source& from) { give_back(from.weight, from.sizes.bytes()); }

// Tiles one after another: the biases of 32 outputs, or zeros, then input after input what it is multiplied with.
class Weight {
  public:
    explicit Weight(const Source& from) : sizes(from.sizes), memory(4 * numbers() * sizes.tiles()) {
        for (size_t t = 0; t < sizes.tiles(); ++t) pack(from, t, begin(t));
    }

    // Whether packing `from` would give this.
    bool holds(const Source& from) const {
        const Sizes& other = from.sizes;
        if (sizes.in != other.in || sizes.out != other.out || sizes.gated != other.gated) return false;
        std::vector<float> own(numbers());
        for (size_t t = 0; t < sizes.tiles(); ++t) {
            pack(from, t, own.data());
            if (std::memcmp(own.data(), begin(t), 4 * own.size())) return false;
        }
        return true;
    }

    const float* bias(size_t t) const { return begin(t); }
    const float* tile(size_t t) const { return begin(t) + TILE; }

    const Sizes sizes;

  private:
    size_t numbers() const { return TILE * (1 + sizes.in); }  // of a tile
    float* begin(size_t t) const { return reinterpret_cast<float*>(memory.data) + t * numbers(); }

    void pack(const Source& from, size_t t, float* into) const {
        std::memset(into, 0, 4 * numbers());  // what is beyond the last output
        const size_t place = 4 * sizes.output(t), bytes = 4 * sizes.valid(t);
        if (from.bias) std::memcpy(into, from.bias + place, bytes);
        for (size_t i = 0; i < sizes.in; ++i)
            std::memcpy(into + TILE * (1 + i), from.weight + 4 * i * sizes.out + place, bytes);
    }

    const Packed memory;
};

}  // namespace
}  // namespace tokopt::floats
