// An activation times what it gates. Included in the namespaces of instruction sets, which say what TARGET is and bring
// the vectors of cpu/vector.h.
#include "../cpu/exponential.h"
#include "../cpu/gelu.h"

TARGET INLINE Float silu(Float x) {
    const Float none = all(0.f), one = all(1.f);
    const Float small = exponential(x < none ? x : -x);
    return x * (x < none ? small : one) / (one + small);
}

template <Gate GATE>
TARGET INLINE void apply_as(float* gate, const float* up, size_t count) {
    for (size_t i = 0; i < count; i += WIDTH) {
        const Float x = load(gate + i);
        const Float activated = GATE == Gate::SILU ? silu(x) : gelu<GATE == Gate::GELU>(x);
        store(gate + i, activated * load(up + i));
    }
}

// gate[i] becomes activation(gate[i]) * up[i], for whole tiles of them.
TARGET static void apply(Gate activation, float* gate, const float* up, size_t count) {
    switch (activation) {
        case Gate::SILU: return apply_as<Gate::SILU>(gate, up, count);
        case Gate::GELU: return apply_as<Gate::GELU>(gate, up, count);
        case Gate::GELU_TANH: return apply_as<Gate::GELU_TANH>(gate, up, count);
        case Gate::NONE: return;
    }
}
