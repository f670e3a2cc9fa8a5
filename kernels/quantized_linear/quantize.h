// Rounds a row of activations to 8 bits. Included in one namespace of cpu.cpp after another, so that the compiler uses
// the instructions of each TARGET.

// Row `r` of the `R` that `into` interleaves. `offset` is what the kernel has added to the codes, less their zero
// point where all have the same.
TARGET static void quantize(const char* x, const Sizes& sizes, int offset, Quantized into, size_t R, size_t r) {
    constexpr float ROUND = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits of the sum
    constexpr int32_t ROUND_BITS = 0x4b400000;
    for (size_t g = 0; g < sizes.in / sizes.group; ++g, x += 4 * sizes.group) {
        uint32_t peak_bits = 0;
        for (size_t chunk = 0; chunk < sizes.group; chunk += CHUNK) {
            uint32_t bits[CHUNK];
            std::memcpy(bits, x + 4 * chunk, sizeof bits);
            for (uint32_t own : bits) {
                const uint32_t magnitude = own & 0x7fffffff;  // ordered as the numbers are, with NaN above all
                peak_bits = magnitude > peak_bits ? magnitude : peak_bits;
            }
        }
        float peak;
        std::memcpy(&peak, &peak_bits, 4);
        const bool finite = peak_bits < 0x7f800000;
        float scale = finite ? peak / 127 : std::numeric_limits<float>::quiet_NaN();
        if (scale < std::numeric_limits<float>::min()) scale = 0;
        const float inverse = scale > 0 ? 127 / peak : 0;
        int sum = 0;
        for (size_t chunk = 0; chunk < sizes.group; chunk += CHUNK) {
            float values[CHUNK];
            int8_t q[CHUNK] = {};
            if (finite) {
                std::memcpy(values, x + 4 * chunk, sizeof values);
                for (size_t i = 0; i < CHUNK; ++i) {
                    const float shifted = values[i] * inverse + ROUND;
                    int32_t rounded;
                    std::memcpy(&rounded, &shifted, 4);
                    rounded -= ROUND_BITS;
                    q[i] = static_cast<int8_t>(rounded);
                    sum += rounded;
                }
            }
            int8_t* to = into.q + (g * sizes.group + chunk) * R + 4 * r;
            for (size_t i = 0; i < CHUNK / 4; ++i) std::memcpy(to + 4 * i * R, q + 4 * i, 4);
        }
        into.scale[g * R + r] = scale;
        into.start[g * R + r] = offset * sum;
        into.sum[g * R + r] = sizes.minimum ? scale * static_cast<float>(sum) : static_cast<float>(sum);
    }
}
