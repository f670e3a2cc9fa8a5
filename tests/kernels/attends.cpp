// Compares attention on every instruction set of this processor with plain C, without ONNX Runtime: for processors that
// are emulated. Prints their names; returns 1 where numbers differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../kernels/cached_attention/code.h"

using namespace tokopt;

static std::vector<float> random_numbers(size_t count) {
    std::vector<float> numbers(count);
    for (auto& number : numbers) number = static_cast<float>(std::rand() % 2001 - 1000) / 500;
    return numbers;
}

// What rows [rows, channels] of queries make of two parts of `count` slots, merged: [rows, channels].
static std::vector<float> attend(const Code& code, const std::vector<float>& queries, const std::vector<float>& keys,
                                 const std::vector<int8_t>& codes, const std::vector<uint8_t>& mask, size_t channels,
                                 size_t count) {
    const size_t rows = queries.size() / channels, vectors = (rows + code.width - 1) / code.width;
    const size_t lanes = vectors * code.width;
    const size_t row = code.few ? channels : 1, channel = code.few ? 1 : lanes;
    std::vector<float> q(lanes * channels), s(CHUNK * MOST_ROWS), values(count * channels);
    code.widen(codes.data(), values.size(), values.data());
    for (size_t r = 0; r < rows; ++r) {
        for (size_t c = 0; c < channels; ++c) q[r * row + c * channel] = queries[r * channels + c];
    }
    std::vector<int32_t> slots(count);
    for (size_t n = 0; n < count; ++n) slots[n] = ~int32_t(n);
    const Masks masks = {mask.data(), 1, count, 0};
    std::vector<float> o[2], m[2], l[2];
    Panel panels[2];
    for (size_t part : {0, 1}) {
        o[part].assign(lanes * channels, 0.f);
        m[part].assign(lanes, -std::numeric_limits<float>::infinity());
        l[part].assign(lanes, 0.f);
        panels[part] = {q.data(), s.data(), o[part].data(), m[part].data(), l[part].data(), 0, rows, channels};
        const size_t first = part * (count / 2), some = part ? count - first : count / 2;
        const Chunk chunk = {keys.data() + first * channels, values.data() + first * channels,
                             slots.data() + first, some, channels, 3.f, true, masks};
        code.attend[vectors - 1](panels[part], chunk);
    }
    code.merge[vectors - 1](panels[0], panels[1]);
    std::vector<float> result(rows * channels);
    for (size_t r = 0; r < rows; ++r) {
        for (size_t c = 0; c < channels; ++c)
            result[r * channels + c] = l[0][r] != 0 ? o[0][r * row + c * channel] / l[0][r] : 0;
    }
    return result;
}

static bool agree(const Code& code, const Code& plain, size_t rows, size_t channels, size_t count) {
    const auto queries = random_numbers(rows * channels), keys = random_numbers(count * channels);
    std::vector<int8_t> codes(count * channels);
    for (auto& number : codes) number = static_cast<int8_t>(std::rand() % 256 - 128);
    std::vector<uint8_t> mask(rows * count);
    for (auto& sees : mask) sees = std::rand() % 3 > 0;
    const auto got = attend(code, queries, keys, codes, mask, channels, count);
    double error = 0, size = 0;
    for (size_t r = 0; r < rows; ++r) {  // plain C may take fewer rows at once
        const std::vector<float> own(queries.begin() + r * channels, queries.begin() + (r + 1) * channels);
        const std::vector<uint8_t> sees(mask.begin() + r * count, mask.begin() + (r + 1) * count);
        const auto want = attend(plain, own, keys, codes, sees, channels, count);
        for (size_t c = 0; c < channels; ++c) {
            error += std::pow(got[r * channels + c] - want[c], 2);
            size += std::pow(want[c], 2);
        }
    }
    return error <= 1e-11 * size;
}

int main() {
    bool all = true;
    for (Isa isa : available()) {
        std::printf("%s\n", name(isa));
        for (size_t channels : {16, 64, 72})
            for (size_t count : {2, 37, 64})
                for (size_t rows = 1; rows <= code(isa, 1000, channels).rows(); ++rows) {
                    const Code& own = code(isa, rows, channels);
                    if (rows > own.rows() || agree(own, code(Isa::PLAIN, 1000, channels), rows, channels, count)) continue;
                    std::printf("channels %zu, slots %zu, rows %zu\n", channels, count, rows);
                    all = false;
                }
    }
    return all ? 0 : 1;
}
