// Reading the weights of a node, of all experts.
#pragma once

#include <string>
#include <vector>

#include "../cpu/node.h"
#include "weight.h"

namespace tokopt::floats {
namespace {

// The constant inputs of a node; the first of them is at the place that an op says.
enum Constant : size_t { WEIGHT, BIAS, CONSTANTS };

// The weight of each expert; constants begin at input `first`.
std::vector<Source> sources_of(const Node& node, size_t first, bool gated) {
    const Tensor weight = node.constant(first + WEIGHT, "weight"), bias = node.constant(first + BIAS, "bias");
    const Shape& shape = weight.shape;
    if (shape.size() != 3 || shape[0] < 1 || shape[1] < 1 || shape[2] < 1)
        node.refuse("weight must be [experts, in, out], got " + text(shape));
    if (gated && shape[2] % 2) node.refuse("weight " + text(shape) + " has no half of the outputs that gates the other");
    const Shape outputs = {shape[0], shape[2]};
    if (bias.data && bias.shape != outputs) node.refuse("bias must be " + text(outputs) + ", got " + text(bias.shape));
    const Sizes sizes = {{size_t(shape[2]), gated}, size_t(shape[1])};
    std::vector<Source> experts;
    for (size_t e = 0; e < size_t(shape[0]); ++e) {
        const auto* own = reinterpret_cast<const uint8_t*>(weight.data) + e * sizes.bytes();
        const auto* added = reinterpret_cast<const uint8_t*>(bias.data) + 4 * e * sizes.out;
        experts.push_back({sizes, own, bias.data ? added : nullptr});
    }
    return experts;
}

}  // namespace
}  // namespace tokopt::floats
