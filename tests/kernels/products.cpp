// Compares the kernels of every instruction set of this processor with plain C, without ONNX Runtime: for processors
// that are emulated. Prints their names; returns 1 where numbers differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../kernels/quantized_linear/kernels.h"
#include "../../kernels/quantized_linear/weight.h"

using namespace tokopt;

static std::vector<uint8_t> random_bytes(size_t count, int below) {
    std::vector<uint8_t> bytes(count);
    for (auto& byte : bytes) byte = static_cast<uint8_t>(std::rand() % below);
    return bytes;
}

struct Rounded {
    Rounded(const Code& code, const std::vector<float>& x, const Sizes& sizes, int offset, size_t R)
        : q(R * sizes.in), numbers(3 * R * sizes.groups()) {
        for (size_t r = 0; r < R; ++r)
            code.quantize(reinterpret_cast<const char*>(x.data() + r * sizes.in), sizes, offset,
                          {q.data(), numbers.data(), false}, R, r);
    }
    std::vector<int8_t> q;
    std::vector<float> numbers;
};

// Scales and sums [groups, 3, R] of the same rows; what integer sums begin with is the instruction set's own matter.
static bool alike(const std::vector<float>& own, const std::vector<float>& other, size_t R) {
    for (size_t i = 0; i < own.size(); ++i) {
        if (i / R % 3 != 1 && own[i] != other[i]) return false;
    }
    return true;
}

static bool agree(const Code& code, const Code& plain, const Sizes& sizes, size_t R) {
    const size_t numbers = sizes.out * sizes.groups();
    const auto codes = random_bytes(sizes.out * sizes.row_bytes(), 256);
    const auto zero = random_bytes(numbers, 1 << sizes.bits);
    std::vector<uint16_t> half(numbers);
    for (auto& number : half) number = static_cast<uint16_t>(0x2c00 + std::rand() % 1024);  // 1/16 to 1/8
    std::vector<float> full(numbers), x(R * sizes.in), bias(sizes.out, 0.5f);
    for (auto& number : full) number = 0.1f + static_cast<float>(std::rand() % 100) / 1000;
    for (auto& number : x) number = static_cast<float>(std::rand() % 2001 - 1000) / 100;
    const auto* scales =
        sizes.half ? reinterpret_cast<const uint8_t*>(half.data()) : reinterpret_cast<const uint8_t*>(full.data());
    const Weight weight({sizes, codes.data(), scales, sizes.zero ? zero.data() : nullptr,
                         sizes.minimum ? scales : nullptr, reinterpret_cast<const uint8_t*>(bias.data())});
    const int middle = sizes.zero || sizes.minimum ? 0 : 1 << (sizes.bits - 1);
    const int eight = sizes.bits == 8;
    const Rounded own(code, x, sizes, code.offset[eight] - middle, R), other(plain, x, sizes, -middle, R);
    if (own.q != other.q || !alike(own.numbers, other.numbers, R)) return false;
    for (size_t t = 0; t < sizes.tiles(); ++t) {
        std::vector<float> got(R * TILE), want(R * TILE);
        code.products[eight][R - 1](weight.tile(t),
                                    {own.q.data(), own.numbers.data(), {nullptr, 0}},
                                    got.data(), TILE);
        for (size_t r = 0; r < R; ++r) {  // plain C may take fewer rows at once
            const Rounded row(plain, {x.begin() + r * sizes.in, x.begin() + (r + 1) * sizes.in}, sizes, -middle, 1);
            plain.products[eight][0](weight.tile(t),
                                     {row.q.data(), row.numbers.data(), {nullptr, 0}},
                                     want.data() + r * TILE, TILE);
        }
        double error = 0, size = 0;
        for (size_t i = 0; i < got.size(); ++i) {
            error += std::pow(got[i] - want[i], 2);
            size += std::pow(want[i], 2);
        }
        if (!(error <= 1e-11 * size)) return false;
    }
    return true;
}

// What the compiler would find unused here.
void (*const unused)(const Source&) = release;

int main() {
    bool all = true;
    for (Isa isa : available()) {
        std::printf("%s\n", name(isa));
        for (int bits : {4, 8})
            for (size_t group : {32, 64, 128})
                for (int offset : {0, 1, 2})
                    for (bool half : {false, true})
                        for (size_t R = 1; R <= code(isa, 1).rows; ++R) {
                            const Sizes sizes = {3 * group, 21, group, bits, half, offset == 1, offset == 2};
                            if (agree(code(isa, R), code(Isa::PLAIN, R), sizes, R)) continue;
                            std::printf("bits %d, group %zu, offset %d, half %d, rows %zu\n", bits, group, offset, half,
                                        R);
                            all = false;
                        }
    }
    return all ? 0 : 1;
}
