// The instruction sets that kernels are written for, and which of them this processor has.
#pragma once

#include <string>
#include <vector>

namespace tokopt {

enum class Isa { PLAIN, NEON, AVX2, AVX_VNNI, AVX512_VNNI, AMX_INT8 };
constexpr int ISAS = 6;

const char* name(Isa isa);

// Fastest first; PLAIN is always the last.
const std::vector<Isa>& available();

// What TOKOPT_ISA names, else the fastest; throws Refused where the processor lacks it.
Isa chosen();

// Whether kernels should ask for the weights that they need next also where they do little with each. AMD's processors
// fetch them by themselves then, and are slower where they are asked to.
bool asks_ahead();

}  // namespace tokopt
