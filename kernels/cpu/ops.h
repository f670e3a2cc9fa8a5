// The ops of the library, each defined in kernels/<op>/cpu.cpp.
#pragma once

#include <cstddef>

#include "isa.h"
#include "ort.h"

namespace tokopt {

// Of the domain tokopt.cpu: raised when an op's inputs, attributes or meaning change.
constexpr int VERSION = 2;

// The table of functions that the library was registered with.
void* const* registered();

const OrtCustomOp* quantized_linear(Isa isa);
const OrtCustomOp* expert_linear(Isa isa);
const OrtCustomOp* float_expert_linear(Isa isa);
const OrtCustomOp* cached_attention(Isa isa, bool codes);
const OrtCustomOp* int8_linear(Isa isa);
const OrtCustomOp* draw_tokens(Isa isa);

// The same for all instruction sets.
const OrtCustomOp* uniforms();
const OrtCustomOp* move_entries();
const OrtCustomOp* latest_repeat();

// Bytes of packed weights that this process holds now.
size_t packed_bytes();

}  // namespace tokopt
