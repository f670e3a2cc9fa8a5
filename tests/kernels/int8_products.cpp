// Compares the linear of bytes on every instruction set of this processor with plain C, without ONNX Runtime: for
// processors that are emulated. Prints their names; returns 1 where sums or numbers differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../kernels/int8_linear/weight.h"

using namespace tokopt;

// The result of one block of rows.
static std::vector<float> result(const Code& code, const Weight& weight, const std::vector<float>& x, size_t R,
                                 const Grid& grid, Activation activation) {
    const Size& size = weight.size;
    const size_t stride = size.padded() * code.bytes;
    std::vector<uint8_t> q(MOST_ROWS * stride);
    std::vector<float> step(R), y(R * size.out);
    for (size_t r = 0; r < R; ++r)
        step[r] = code.round(reinterpret_cast<const char*>(x.data() + r * size.in), size.in, size.padded(), grid,
                             q.data() + r * stride);
    for (size_t pair = 0; pair < size.pairs(); ++pair) {
        alignas(64) int32_t sums[MOST_ROWS * PAIR];
        const Panels panels = weight.panels(pair);
        if (code.enter) code.enter();
        code.products[R - 1](q.data(), stride, panels, sums);
        if (code.leave) code.leave();
        code.finish(sums, R, panels, code.moved == WHOLE ? 0 : grid.zero - code.moved,
                    {activation, step.data(), reinterpret_cast<char*>(y.data() + pair * PAIR), size.out,
                     std::min<size_t>(PAIR, size.out - pair * PAIR)});
    }
    return y;
}

static bool agree(const Code& code, size_t R, const Grid& grid, Activation activation) {
    const Size size = {150, 41};
    std::vector<uint8_t> codes(size.in * size.out);
    for (auto& one : codes) one = static_cast<uint8_t>(std::rand() % 256);
    std::vector<float> scale(size.out, 0.01f), bias(size.out, 0.5f), x(R * size.in);
    for (auto& number : x) number = static_cast<float>(std::rand() % 2001 - 1000) / 100;
    const Weight weight({size, codes.data(), reinterpret_cast<const char*>(scale.data()),
                         reinterpret_cast<const char*>(bias.data())});
    const auto got = result(code, weight, x, R, grid, activation);
    std::vector<float> want;
    for (size_t r = 0; r < R; ++r) {  // plain C takes fewer rows at once
        const std::vector<float> row(x.begin() + r * size.in, x.begin() + (r + 1) * size.in);
        const auto own = result(plain::CODE, weight, row, 1, grid, activation);
        want.insert(want.end(), own.begin(), own.end());
    }
    double error = 0, sum = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        error += std::pow(got[i] - want[i], 2);
        sum += std::pow(want[i], 2);
    }
    return error <= 1e-11 * sum;
}

int main() {
    bool all = true;
    for (Isa isa : available()) {
        std::printf("%s\n", name(isa));
        const Code& own = code(isa, MOST_ROWS);
        for (size_t R = 1; R <= own.rows; ++R)
            for (const Grid& grid : {Grid{}, Grid{0.07f, 100}})
                for (Activation activation : {Activation::NONE, Activation::GELU, Activation::GELU_TANH}) {
                    if (agree(own, R, grid, activation)) continue;
                    std::printf("rows %zu, step %g, activation %d\n", R, double(grid.step), int(activation));
                    all = false;
                }
    }
    return all ? 0 : 1;
}
