// The token that is drawn from one row of logits, and how probable it is; nothing is sorted.
#pragma once

#include <cmath>

#include "code.h"

namespace tokopt {
namespace {

constexpr float LOWEST = -104;  // a scaled logit that is so low has a weight of 0
constexpr int HALVINGS = 32;    // of what a threshold is known to
constexpr int NARROWINGS = 4;   // halvings after which what is left is looked at one by one

// How tokens of a row are drawn, as truncated_softmax says.
struct Options {
    float temperature;
    int64_t top_k;
    float top_p, min_p;
};

// A logit as its distance to the largest one (the bits of a number that is not negative have its order), and its weight.
struct Item {
    uint32_t distance;
    float weight;
};

// The distance at which weights, from the largest logit on, sum to `wanted`; `before` is the sum of others before them.
uint32_t reach(Item* items, size_t count, double before, double wanted) {
    const auto closer = [](const Item& a, const Item& b) { return a.distance < b.distance; };
    const auto [least, most] = std::minmax_element(items, items + count, closer);
    uint32_t low = least->distance, high = most->distance;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        uint32_t last = low, next = high;  // on either side of the middle
        size_t near = 0;
        double sum = 0;
        for (size_t i = 0; i < count; ++i) {
            const Item item = items[i];
            const bool is_near = item.distance <= middle;
            items[i] = items[near], items[near] = item;
            near += is_near;
            sum += is_near ? double(item.weight) : 0;
            last = std::max(last, is_near ? item.distance : low);
            next = std::min(next, is_near ? high : item.distance);
        }
        if (before + sum >= wanted) {
            count = near, high = last;
        } else {
            items += near, count -= near, before += sum, low = next;
        }
    }
    return low;
}

// A threshold is `low` or more, and less than `high`, from which on the weights sum to `before`.
struct Bracket {
    float low = LOWEST, high = 1;
    double before = 0;
};

// What the bisection of truncated_softmax finds, where the largest threshold that does is `exact`.
float bisected(float exact) {
    float low = LOWEST, high = 1;
    for (int i = 0; i < HALVINGS; ++i) {
        const float middle = (low + high) * 0.5f;
        (exact >= middle ? low : high) = middle;
    }
    return low;
}

// Bytes beside a row of so many logits.
struct Room {
    explicit Room(size_t size) : blocks((size + BLOCK - 1) / BLOCK) {}
    size_t bytes() const { return blocks * (BLOCK * sizeof(Item) + sizeof(double) + sizeof(float)); }

    const size_t blocks;
};

// One row; `room` has the bytes that its size needs.
class Draw {
  public:
    Draw(const Code& code, const char* logits, size_t size, uint8_t* room)
        : code(code),
          size(size),
          blocks(Room(size).blocks),
          sum(reinterpret_cast<double*>(room)),
          items(reinterpret_cast<Item*>(sum + blocks)),
          row(logits, size, reinterpret_cast<float*>(items + blocks * BLOCK)) {
        const bool numbers = code.peaks(row, row.peak);
        row.most = *std::max_element(row.peak, row.peak + blocks);
        is_distribution = numbers && std::fabs(row.most) <= std::numeric_limits<float>::max();
    }

    // -1 where a logit is NaN or +inf, or all are -inf.
    int64_t token(const Options& options, float uniform) const {
        if (!is_distribution) return -1;
        return options.temperature > 0 ? drawn(options, uniform) : likeliest();
    }

    // The logarithm of a token's probability in the softmax of the logits as they are.
    float logprob(int64_t token) const {
        if (token < 0) return std::numeric_limits<float>::quiet_NaN();
        const double all = code.sums(row, {1, LOWEST, 0}, false, sum);
        return static_cast<float>(double(at(row.x + 4 * token)) - row.most - std::log(all));
    }

  private:
    // The first of them.
    int64_t likeliest() const {
        const size_t b = size_t(std::find(row.peak, row.peak + blocks, row.most) - row.peak);
        const float* x = row.block(b);
        size_t i = 0;
        while (at(x + i) != row.most) ++i;
        return int64_t(b * BLOCK + i);
    }

    int64_t drawn(const Options& options, float uniform) const {
        Cut cut = {std::max(options.temperature, std::numeric_limits<float>::min()), LOWEST, 0};
        if (options.top_k > 0 && options.top_k < int64_t(size)) cut.floor = threshold(cut, true, double(options.top_k));
        double total = code.sums(row, cut, false, sum);
        if (options.top_p < 1) cut.floor = std::max(cut.floor, threshold(cut, false, options.top_p * total));
        cut.least = options.min_p;
        if (options.top_p < 1 || options.min_p > 0) total = code.sums(row, cut, false, sum);
        return reached(cut, uniform * total);
    }

    // The largest one such that the weights at or above it, or their number, are `wanted` or more.
    float threshold(const Cut& cut, bool counted, double wanted) const {
        Cut found = {cut.temperature, -1, 0};
        Bracket bracket;
        const auto enough = [&](float floor) {
            found.floor = floor;
            const double got = code.sums(row, found, counted, sum);
            if (got >= wanted) return bracket.low = floor, true;
            return bracket.high = floor, bracket.before = got, false;
        };
        for (float floor = -1; !enough(std::max(floor, cut.floor)); floor *= 2) {
            if (floor <= cut.floor) return cut.floor;  // there are not so many
        }
        for (int i = 0; i < NARROWINGS; ++i) enough((bracket.low + std::min(bracket.high, 0.f)) / 2);
        const size_t count = collected(cut.temperature, counted, bracket);
        const uint32_t distance = reach(items, count, bracket.before, wanted);
        float exact;
        std::memcpy(&exact, &distance, 4);
        return bisected(-exact);
    }

    // How many items lie in the bracket.
    size_t collected(float temperature, bool counted, const Bracket& bracket) const {
        size_t count = 0;
        float logits[BLOCK], weights[BLOCK];
        for (size_t b = 0; b < blocks; ++b) {
            if (row.scaled(row.peak[b], temperature) < bracket.low) continue;
            code.entries(row, b, temperature, logits, weights);
            for (size_t i = 0; i < BLOCK; ++i) {
                const float distance = std::fabs(logits[i]);
                std::memcpy(&items[count].distance, &distance, 4);
                items[count].weight = counted ? 1 : weights[i];
                count += logits[i] >= bracket.low && logits[i] < bracket.high;
            }
        }
        return count;
    }

    // The first token at which the sum of weights exceeds `wanted`, given the sums of blocks.
    int64_t reached(const Cut& cut, double wanted) const {
        double before = 0;
        size_t b = 0;
        while (before + sum[b] <= wanted) before += sum[b++];
        float logits[BLOCK], weights[BLOCK];
        code.entries(row, b, cut.temperature, logits, weights);
        size_t found = 0;
        for (size_t i = 0; i < BLOCK && before <= wanted; ++i) {
            if (logits[i] < cut.floor || weights[i] < cut.least || weights[i] == 0) continue;
            before += weights[i], found = i;  // the last of a block whose sum in another order is less
        }
        return int64_t(b * BLOCK + found);
    }

    const Code& code;
    const size_t size, blocks;
    double* const sum;
    Item* const items;
    Row row;
    bool is_distribution;
};

}  // namespace
}  // namespace tokopt
