// Rounds row `r` of `R` to 8 bits. Included in the namespaces of instruction sets, for which the compiler
// finds the instructions of TARGET.

TARGET static void quantize(const char* x, const Sizes& sizes, int offset, Quantized into, size_t R, size_t r) {
    constexpr float ROUND = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits of the sum
    constexpr int32_t ROUND_BITS = 0x4b400000;
    for (size_t g = 0; g < sizes.groups(); ++g, x += 4 * sizes.group) {
        uint32_t peak_bits = 0;
        for (size_t chunk = 0; chunk < sizes.group; chunk += CHUNK) {
            uint32_t bits[CHUNK];
            std::memcpy(bits, x + 4 * chunk, sizeof bits);
            for (uint32_t own : bits) peak_bits = std::max(peak_bits, own & 0x7fffffff);
        }
        const Step step = step_of(peak_bits);
        int32_t total = 0;
        for (size_t chunk = 0; chunk < sizes.group; chunk += CHUNK) {
            float values[CHUNK];
            int8_t q[CHUNK] = {};
            std::memcpy(values, x + 4 * chunk, sizeof values);
            for (size_t i = 0; step.finite && i < CHUNK; ++i) {
                const float shifted = values[i] * step.inverse + ROUND;
                int32_t rounded;
                std::memcpy(&rounded, &shifted, 4);
                q[i] = static_cast<int8_t>(rounded - ROUND_BITS);
                total += rounded - ROUND_BITS;
            }
            into.put(q, g * sizes.group + chunk, R, r);
        }
        into.put(step, total, offset, sizes.minimum, g, R, r);
    }
}
