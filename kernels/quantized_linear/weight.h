// The weight of a node: packed in the order of the kernels, and shared by all sessions of the process.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../cpu/memory.h"
#include "code.h"

namespace tokopt {

// Constant inputs of a node, as ONNX has them.
struct Source {
    Sizes sizes;
    const uint8_t* codes;    // [out, in] of 4 or 8 bits
    const uint8_t* scale;    // [out, groups]
    const uint8_t* zero;     // [out, groups], or null
    const uint8_t* minimum;  // [out, groups], or null
    const uint8_t* bias;     // [out] float32, or null

    uint64_t hash() const {
        const uint64_t key = mixed(sizes.in, codes, sizes.out * sizes.row_bytes());
        return mixed(key, scale, sizes.out * sizes.groups() * sizes.float_bytes());
    }
};

// What a session needs no more once its weight is packed.
inline void release(const Source& from) {
    const Sizes& sizes = from.sizes;
    const size_t numbers = sizes.out * sizes.groups();
    give_back(from.codes, sizes.out * sizes.row_bytes());
    give_back(from.scale, numbers * sizes.float_bytes());
    if (from.zero) give_back(from.zero, numbers);
    if (from.minimum) give_back(from.minimum, numbers * sizes.float_bytes());
}

// Codes of group `g` of tile `t`, in lines of 64 bytes.
inline void pack_codes(const uint8_t* from, const Sizes& sizes, size_t t, size_t g, uint8_t* into) {
    const size_t bytes = sizes.group * sizes.bits / 8;  // of one output
    for (size_t o = 0; o < sizes.valid(t); ++o) {
        const uint8_t* row = from + ((sizes.output(t) + o) * sizes.groups() + g) * bytes;
        for (size_t line = 0; line < bytes / 4; ++line) {
            uint32_t word;
            std::memcpy(&word, row + 4 * line, 4);
            if (sizes.bits == 4) {
                // Byte i gets input i in its low half and input i + 4 in its high half.
                uint32_t low = word & 0xffff, high = word >> 16;
                low = (low | low << 8) & 0x00ff00ff, high = (high | high << 8) & 0x00ff00ff;
                low = (low | low << 4) & 0x0f0f0f0f, high = (high | high << 4) & 0x0f0f0f0f;
                word = low | high << 4;
            }
            std::memcpy(into + (line * TILE + o) * 4, &word, 4);
        }
    }
}

// Numbers of group `g` of tile `t`, or zero where the tile is beyond the last output.
inline void pack_numbers(const uint8_t* from, const Sizes& sizes, size_t bytes, size_t t, size_t g, uint8_t* into) {
    for (size_t o = 0; o < sizes.valid(t); ++o)
        std::memcpy(into + o * bytes, from + ((sizes.output(t) + o) * sizes.groups() + g) * bytes, bytes);
}

// A weight in the order of the kernels.
class Weight {
  public:
    explicit Weight(const Source& from) : sizes(from.sizes), has_bias(from.bias), memory(tile_bytes() * sizes.tiles()) {
        for (size_t t = 0; t < sizes.tiles(); ++t) pack(from, t, memory.data + t * tile_bytes());
    }

    // Whether packing `from` would give this.
    bool holds(const Source& from) const {
        const Sizes& other = from.sizes;
        if (sizes.in != other.in || sizes.out != other.out || sizes.group != other.group || sizes.bits != other.bits ||
            sizes.half != other.half || sizes.zero != other.zero || sizes.minimum != other.minimum ||
            sizes.gated != other.gated || has_bias != (from.bias != nullptr))
            return false;
        std::vector<uint8_t> own(tile_bytes());
        for (size_t t = 0; t < sizes.tiles(); ++t) {
            pack(from, t, own.data());
            if (std::memcmp(own.data(), memory.data + t * own.size(), own.size())) return false;
        }
        return true;
    }

    Tile tile(size_t t) const {
        const uint8_t* data = memory.data + t * tile_bytes();
        const float* bias = has_bias ? reinterpret_cast<const float*>(data + bias_place()) : nullptr;
        return {data, bias, sizes.groups(), group_bytes(), sizes.group / CHUNK, sizes.half, sizes.zero, sizes.minimum};
    }

    size_t tile_bytes() const { return (bias_place() + (has_bias ? 4 * TILE : 0) + 63) / 64 * 64; }

    const Sizes sizes;

  private:
    size_t code_bytes() const { return TILE * sizes.group * sizes.bits / 8; }
    size_t scale_bytes() const { return TILE * sizes.float_bytes(); }
    size_t group_bytes() const {
        return code_bytes() + scale_bytes() + (sizes.zero ? TILE : sizes.minimum ? scale_bytes() : 0);
    }
    size_t bias_place() const { return sizes.groups() * group_bytes(); }

    void pack(const Source& from, size_t t, uint8_t* into) const {
        std::memset(into, 0, tile_bytes());  // what lies between the parts, and beyond the last output
        for (size_t g = 0; g < sizes.groups(); ++g) {
            uint8_t* group = into + g * group_bytes();
            uint8_t* numbers = group + code_bytes();
            pack_codes(from.codes, sizes, t, g, group);
            pack_numbers(from.scale, sizes, sizes.float_bytes(), t, g, numbers);
            if (sizes.zero) pack_numbers(from.zero, sizes, 1, t, g, numbers + scale_bytes());
            if (sizes.minimum) pack_numbers(from.minimum, sizes, sizes.float_bytes(), t, g, numbers + scale_bytes());
        }
        if (has_bias) {
            std::memcpy(into + bias_place(), from.bias + 4 * sizes.output(t), 4 * sizes.valid(t));
        }
    }

    const bool has_bias;
    const Packed memory;
};

}  // namespace tokopt
