// An activation times what it gates. Included in the namespaces of instruction sets, for which the compiler finds the
// instructions of TARGET.

// e^x for x from -87 to 88, and of what is beyond them as of the nearer one; NaN stays NaN.
TARGET INLINE float exponential(float x) {
    constexpr float ROUND = 12582912, LOG2_E = 1.442695041f;  // as in quantize.h
    constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    const float shifted = x * LOG2_E + ROUND, whole = shifted - ROUND;
    const float r = x - whole * LN2_HIGH - whole * LN2_LOW;  // at most ln(2) / 2
    float series = 1.f / 5040;
    for (float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) series = series * r + factor;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000;  // 2^whole: the lowest bits of `shifted` are an integer
    float power;
    std::memcpy(&power, &bits, 4);
    return series * power;
}

TARGET INLINE float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

// The error function by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7.
TARGET INLINE float error_function(float x) {
    const float size = x < 0 ? -x : x, t = 1 / (1 + 0.3275911f * size);
    float series = 1.061405429f;
    for (float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) series = series * t + factor;
    const float value = 1 - series * t * exponential(-size * size);
    return x < 0 ? -value : value;
}

// gate[i] becomes activation(gate[i]) * up[i].
TARGET static void apply(Gate activation, float* gate, const float* up, size_t count) {
    switch (activation) {
        case Gate::SILU:
            for (size_t i = 0; i < count; ++i) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
            break;
        case Gate::GELU:
            for (size_t i = 0; i < count; ++i)
                gate[i] = 0.5f * gate[i] * (1 + error_function(gate[i] * 0.707106781f)) * up[i];
            break;
        case Gate::GELU_TANH:
            for (size_t i = 0; i < count; ++i) {
                const float cubed = gate[i] + 0.044715f * gate[i] * gate[i] * gate[i];
                gate[i] = gate[i] * sigmoid(1.595769122f * cubed) * up[i];
            }
            break;
        case Gate::NONE: break;
    }
}
