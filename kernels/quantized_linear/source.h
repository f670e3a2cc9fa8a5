// Reading the weight of a node: its constants and attributes, which several ops have in common.
#pragma once

#include <string>

#include "../cpu/node.h"
#include "code.h"
#include "weight.h"

namespace tokopt {

// The constant inputs of a node; the first of them is at the place that an op says.
enum Constant : size_t { CODES, SCALE, ZERO, MINIMUM, BIAS, CONSTANTS };
inline const char* const CONSTANT_NAMES[CONSTANTS] = {"codes", "scale", "zero", "minimum", "bias"};

inline int type_of(Constant constant) {
    return constant == SCALE || constant == MINIMUM ? ANY : constant == BIAS ? FLOAT : UINT8;
}

inline Gate gate_of(const Api& api, const OrtKernelInfo* info, const Node& node) {
    static const char* const names[] = {"", "silu", "gelu", "gelu_tanh"};
    const std::string wanted = api.string(info, "gate");
    for (Gate gate : {Gate::NONE, Gate::SILU, Gate::GELU, Gate::GELU_TANH}) {
        if (wanted == names[static_cast<int>(gate)]) return gate;
    }
    node.refuse("gate=" + wanted + " must be silu, gelu or gelu_tanh");
}

inline void fit(const Node& node, Constant place, const Tensor& given, int element, const Shape& shape) {
    const std::string name = CONSTANT_NAMES[place];
    if (given.element != element)
        node.refuse(name + (place == MINIMUM ? " must have the type of scale" : " is of another type"));
    if (given.shape != shape) node.refuse(name + " must be " + text(shape) + ", got " + text(given.shape));
}

// The weight whose constants begin at input `first`: of `experts` matrices one below another.
inline Source source_of(const Node& node, size_t first, bool gated, int64_t experts = 1) {
    const int64_t bits = node.integer("bits"), group = node.integer("group");
    if (bits != 4 && bits != 8) node.refuse("bits=" + std::to_string(bits) + " must be 4 or 8");
    if (group != 32 && group != 64 && group != 128)
        node.refuse("group=" + std::to_string(group) + " must be 32, 64 or 128");
    const auto constant = [&](Constant place) { return node.constant(first + place, CONSTANT_NAMES[place]); };
    for (Constant place : {CODES, SCALE}) {
        if (!node.has(first + place)) node.refuse(std::string(CONSTANT_NAMES[place]) + " is missing");
    }
    const Tensor codes = constant(CODES), scale = constant(SCALE), zero = constant(ZERO);
    const Tensor minimum = constant(MINIMUM), bias = constant(BIAS);
    if (codes.element != UINT8 || codes.shape.size() != 2)
        node.refuse("codes must be bytes [out, in * bits / 8], got " + text(codes.shape));
    if (scale.element != FLOAT && scale.element != FLOAT16) node.refuse("scale must be float32 or float16");
    if (zero.data && minimum.data) node.refuse("zero and minimum exclude each other; give one of them");
    const int64_t all = codes.shape[0], in = codes.shape[1] * 8 / bits;
    if (all < 1 || in < 1 || in % group)
        node.refuse("codes " + text(codes.shape) + " of " + std::to_string(bits) +
                    " bits are not outputs of whole groups of " + std::to_string(group) + " inputs");
    if (experts < 1 || all % experts)
        node.refuse("codes " + text(codes.shape) + " are not those of experts=" + std::to_string(experts) +
                    " with as many outputs each");
    const int64_t out = all / experts;
    if (gated && out % 2) node.refuse("codes " + text(codes.shape) + " have no half of the outputs that gates the other");
    const Shape numbers = {all, in / group};
    fit(node, SCALE, scale, scale.element, numbers);
    if (zero.data) fit(node, ZERO, zero, UINT8, numbers);
    if (minimum.data) fit(node, MINIMUM, minimum, scale.element, numbers);
    if (bias.data) fit(node, BIAS, bias, FLOAT, {all});
    const Sizes sizes = {{size_t(out), gated},
                         size_t(in),
                         size_t(group),
                         int(bits),
                         scale.element == FLOAT16,
                         zero.data != nullptr,
                         minimum.data != nullptr};
    const auto bytes = [](const Tensor& given) { return reinterpret_cast<const uint8_t*>(given.data); };
    return {sizes, bytes(codes), bytes(scale), bytes(zero), bytes(minimum), bytes(bias)};
}

}  // namespace tokopt
