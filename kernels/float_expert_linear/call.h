// Rows of x times the weight of one expert: what a call of the op shares out among threads, by ../cpu/calls.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "../cpu/calls.h"
#include "code.h"
#include "weight.h"

namespace tokopt::floats {
namespace {

class Call {
  public:
    Call(Isa isa, const Weight& weight, Gate gate, const Places& places, size_t rows)
        : code(floats::code(isa)), weight(weight), sizes(weight.sizes), gate(gate), places(places), rows(rows) {}

    size_t bytes() const { return interleaves() ? (4 * read() + 63) / 64 * 64 : 0; }
    void use(uint8_t* memory) { x = reinterpret_cast<char*>(memory); }

    size_t preparations() const { return interleaves() ? (rows + code.rows - 1) / code.rows : 0; }
    size_t products() const { return sizes.tiles() / sizes.halves() * parts(); }
    size_t read() const { return rows * sizes.in; }

    // Interleaves the rows of a block: one number of each, then the next of each.
    void prepare(size_t block) const {
        const size_t first = block * code.rows, R = in_block(first);
        char* own = x + 4 * first * sizes.in;
        for (size_t r = 0; r < R; ++r) {
            const char* from = row(first + r);
            for (size_t i = 0; i < sizes.in; ++i) std::memcpy(own + 4 * (i * R + r), from + 4 * i, 4);
        }
    }

    // Part `i % parts` of the rows, times tile `i / parts`, or times two of which one gates the other.
    void multiply(size_t i) const {
        alignas(64) float sums[2][PART * TILE];
        const size_t first = i % parts() * PART, end = std::min(first + PART, rows), t = i / parts() * sizes.halves();
        for (size_t half = 0; half < sizes.halves(); ++half) sum(t + half, first, end, sums[half]);
        if (sizes.gated) code.apply(gate, sums[0], sums[1], (end - first) * TILE);
        for (size_t r = first; r < end; ++r)
            std::memcpy(places.y + 4 * (places.written(r) * sizes.width() + sizes.column(t)), sums[0] + (r - first) * TILE,
                        4 * sizes.valid(t));
    }

  private:
    static constexpr size_t PART = 96;    // rows whose numbers stay in a core's second cache: whole blocks of any code
    static constexpr size_t CHUNK = 512;  // inputs of a tile, which stay there beside them

    bool interleaves() const { return rows > 1; }
    size_t parts() const { return (rows + PART - 1) / PART; }
    size_t in_block(size_t first) const { return std::min(code.rows, rows - first); }
    const char* row(size_t r) const { return places.x + 4 * places.read(r) * sizes.in; }

    // What tile `t` makes of rows `first` to `end`, with its bias.
    void sum(size_t t, size_t first, size_t end, float* into) const {
        for (size_t r = 0; r < end - first; ++r) std::memcpy(into + r * TILE, weight.bias(t), 4 * TILE);
        for (size_t i = 0; i < sizes.in; i += CHUNK) {
            for (size_t r = first; r < end; r += code.rows) {
                const size_t R = in_block(r);
                const char* own = interleaves() ? x + 4 * (r * sizes.in + i * R) : row(0) + 4 * i;
                code.products[R - 1](weight.tile(t) + i * TILE, own, std::min(CHUNK, sizes.in - i), into + (r - first) * TILE);
            }
        }
    }

    const Code& code;
    const Weight& weight;
    const Sizes& sizes;
    const Gate gate;
    const Places places;
    const size_t rows;
    char* x = nullptr;  // [rows, in], interleaved block by block
};

}  // namespace
}  // namespace tokopt::floats
