// Compares draws of tokens on every instruction set of this processor with plain C, without ONNX Runtime: for
// processors that are emulated. Prints their names; returns 1 where tokens or log-probabilities differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../kernels/draw_tokens/draw.h"

using namespace tokopt;

struct Drawn {
    int64_t token;
    float logprob;
};

static Drawn drawn(const Code& code, const std::vector<float>& logits, const Options& options, float uniform) {
    std::vector<double> room(Room(logits.size()).bytes() / sizeof(double) + 1);
    const Draw draw(code, reinterpret_cast<const char*>(logits.data()), logits.size(),
                    reinterpret_cast<uint8_t*>(room.data()));
    const int64_t token = draw.token(options, uniform);
    return {token, draw.logprob(token)};
}

static bool agree(const Code& code, const std::vector<float>& logits, const Options& options, float uniform) {
    const Drawn got = drawn(code, logits, options, uniform), want = drawn(plain::CODE, logits, options, uniform);
    const bool none = std::isnan(got.logprob) && std::isnan(want.logprob);
    return got.token == want.token && (none || std::fabs(got.logprob - want.logprob) < 1e-5f);
}

int main() {
    bool all = true;
    for (Isa isa : available()) {
        std::printf("%s\n", name(isa));
        for (size_t size : {size_t(1), size_t(63), size_t(64), size_t(65), size_t(1000)}) {
            for (int turn = 0; turn < 400; ++turn) {
                std::vector<float> logits(size);
                for (float& logit : logits) logit = static_cast<float>(std::rand() % 20001 - 10000) / 1000;
                if (turn % 10 == 0) logits[size / 2] = std::nanf("");
                const Options options = {turn % 3 * 0.7f, turn % 4 * 9, turn % 5 < 2 ? 1 : 0.8f, turn % 7 ? 0 : 0.1f};
                const float uniform = static_cast<float>(std::rand() % 1000) / 1000;
                if (agree(code(isa), logits, options, uniform)) continue;
                std::printf("%zu logits, turn %d\n", size, turn);
                all = false;
            }
        }
    }
    return all ? 0 : 1;
}
