// Rows of x, rounded, times one weight: what a call of an op shares out among threads, by ../cpu/calls.h. Rows are worked
// on in blocks, and the weight in tiles.
#pragma once

#include <algorithm>
#include <cstring>

#include "../cpu/calls.h"
#include "code.h"
#include "weight.h"

namespace tokopt {

class Call {
  public:
    Call(Isa isa, const Weight& weight, Gate gate, const Places& places, size_t rows)
        : code(tokopt::code(isa, rows)), weight(weight), sizes(weight.sizes), gate(gate), places(places), rows(rows) {
        blocks = (rows + code.rows - 1) / code.rows;
        parts = (rows + PART - 1) / PART;
        strip = sizes.halves();
        if (blocks > 1 || code.enter) strip *= std::clamp<size_t>(STRIP / weight.tile_bytes() / strip, 1, 4 / strip);
    }

    // Bytes for the rounded rows, which are given before anything is done.
    size_t bytes() const { return (4 * numbers() + room() * sizes.in + 63) / 64 * 64; }
    void use(uint8_t* memory) {
        into.numbers = reinterpret_cast<float*>(memory);
        into.q = reinterpret_cast<int8_t*>(into.numbers + numbers());
        into.chunks = code.full;
    }

    size_t preparations() const { return blocks; }
    size_t products() const { return (sizes.tiles() + strip - 1) / strip * parts; }
    size_t read() const { return rows * sizes.in; }

    void prepare(size_t block) const {
        const int added = code.offset[sizes.bits == 8];
        const int offset = sizes.zero || sizes.minimum ? added : added - (1 << (sizes.bits - 1));
        const size_t R = in_block(block), some = given(block);
        const Quantized own = block_of(block);
        if (some < R) {
            std::fill(own.q, own.q + R * sizes.in, int8_t(0));
            std::fill(own.numbers, own.numbers + 3 * R * sizes.groups(), 0.f);
        }
        for (size_t r = 0; r < some; ++r)
            code.quantize(places.x + places.read(block * code.rows + r) * sizes.in * 4, sizes, offset, own, R, r);
    }

    // Part `i % parts` of the rows, times strip `i / parts` of tiles. Meanwhile the next strip comes from memory.
    void multiply(size_t i) const {
        const size_t first = i / parts * strip, last = std::min(first + strip, sizes.tiles());
        const size_t row = i % parts * PART, end = (std::min(row + PART, rows) + code.rows - 1) / code.rows;
        const size_t begin = row / code.rows, products = (end - begin) * (last - first);
        const bool ask = rows > FEW || asks_ahead();
        const Fetch next = {weight.tile(last).groups, ask ? (last - first) * weight.tile_bytes() : 0};
        if (code.enter) code.enter();
        size_t product = 0;
        for (size_t block = begin; block < end; ++block) {
            for (size_t t = first; t < last; t += sizes.halves(), product += sizes.halves())
                multiply(block, t, next.part(product, products), next.part(product + 1, products));
        }
        if (code.leave) code.leave();
    }

  private:
    static constexpr size_t FEW = 2;        // rows whose products do not keep a processor from fetching by itself
    static constexpr size_t PART = 64;      // rows whose rounded numbers stay in a core's second cache
    static constexpr size_t STRIP = 32768;  // bytes of weights that stay in its first cache, for all blocks of rows

    // Rows of a block: those that are there, and those that it is interleaved for.
    size_t given(size_t block) const { return std::min(code.rows, rows - block * code.rows); }
    size_t in_block(size_t block) const { return code.full ? code.rows : given(block); }

    size_t room() const { return code.full ? blocks * code.rows : rows; }
    size_t numbers() const { return 3 * room() * sizes.groups(); }

    // Block `block` of the rounded rows: those before it are all full.
    Quantized block_of(size_t block) const {
        const size_t first = block * code.rows;
        return {into.q + first * sizes.in, into.numbers + 3 * first * sizes.groups(), into.chunks};
    }

    // A tile, or two of which one gates the other.
    void multiply(size_t block, size_t t, Fetch next, Fetch after) const {
        const Quantized own = block_of(block);
        const Product product = code.products[sizes.bits == 8][in_block(block) - 1];
        float out[2][MOST_ROWS * TILE];
        product(weight.tile(t), {own.q, own.numbers, next}, out[0], TILE);
        if (sizes.gated) {
            product(weight.tile(t + 1), {own.q, own.numbers, after}, out[1], TILE);
            code.apply(gate, out[0], out[1], given(block) * TILE);
        }
        const size_t valid = sizes.valid(t), row = sizes.width() * 4;
        for (size_t r = 0; r < given(block); ++r) {
            char* into = places.y + places.written(block * code.rows + r) * row + sizes.column(t) * 4;
            if (valid == TILE)
                std::memcpy(into, out[0] + r * TILE, TILE * 4);
            else
                std::memcpy(into, out[0] + r * TILE, valid * 4);
        }
    }

    const Code& code;
    const Weight& weight;
    const Sizes& sizes;
    const Gate gate;
    const Places places;
    const size_t rows;
    size_t blocks, parts, strip;
    Quantized into = {};
};

}  // namespace tokopt
