// The outputs of a weight in tiles, which kernels work on one after another.
#pragma once

#include <algorithm>
#include <cstddef>

namespace tokopt {

// So many outputs in tiles of TILE.
template <int TILE>
struct Outputs {
    size_t out;
    bool gated;  // tiles of the first half of the outputs, which gate the second, and of the second take turns

    size_t halves() const { return gated ? 2 : 1; }
    size_t width() const { return out / halves(); }  // of y
    size_t tiles() const { return (width() + TILE - 1) / TILE * halves(); }
    // The first output of a tile, of all or of one half, and how many there are.
    size_t column(size_t t) const { return t / halves() * TILE; }
    size_t valid(size_t t) const { return std::min<size_t>(TILE, width() - column(t)); }
    size_t output(size_t t) const { return t % halves() * width() + column(t); }
};

}  // namespace tokopt
