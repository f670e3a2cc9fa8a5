// Passes over a row of logits. Included in the namespace of one instruction set after another, which says what TARGET
// is, brings the vectors of cpu/vector.h and their exponential.

TARGET static bool peaks(const Row& row, float* peak) {
    Bits bad = {};
    for (size_t b = 0; b < row.blocks; ++b) {
        const float* x = row.block(b);
        Float most = all(NOTHING);
        UNROLL for (size_t i = 0; i < BLOCK; i += WIDTH) {
            const Float logit = load(x + i);
            bad |= (Bits)(logit != logit);
            most = logit > most ? logit : most;
        }
        peak[b] = most_lanes(most);
    }
    uint32_t each[WIDTH], any = 0;
    std::memcpy(each, &bad, sizeof each);
    for (uint32_t one : each) any |= one;
    return !any;
}

template <bool DIVIDED>
TARGET INLINE Float scaled(Float logit, Float most, Float temperature) {
    const Float below = logit - most;
    return DIVIDED ? below / temperature : below;
}

template <bool DIVIDED, bool COUNTED>
TARGET INLINE double sums_as(const Row& row, const Cut& cut, double* sum) {
    const Float most = all(row.most), temperature = all(cut.temperature), none = all(0.f);
    const Float floor = all(cut.floor), least = all(cut.least);
    double total = 0;
    for (size_t b = 0; b < row.blocks; ++b) {
        Float own = none;
        if (row.scaled(row.peak[b], cut.temperature) >= cut.floor) {
            const float* x = row.block(b);
            UNROLL for (size_t i = 0; i < BLOCK; i += WIDTH) {
                const Float logit = scaled<DIVIDED>(load(x + i), most, temperature);
                Float weight = COUNTED ? all(1.f) : exponential(logit);
                weight = weight < least ? none : weight;
                own = own + (logit < floor ? none : weight);
            }
        }
        sum[b] = add_lanes(own);
        total += sum[b];
    }
    return total;
}

TARGET static double sums(const Row& row, const Cut& cut, bool counted, double* sum) {
    if (counted) return sums_as<true, true>(row, cut, sum);
    return cut.temperature == 1 ? sums_as<false, false>(row, cut, sum) : sums_as<true, false>(row, cut, sum);
}

TARGET static void entries(const Row& row, size_t block, float temperature, float* logits, float* weights) {
    const float* x = row.block(block);
    UNROLL for (size_t i = 0; i < BLOCK; i += WIDTH) {
        const Float logit = scaled<true>(load(x + i), all(row.most), all(temperature));
        store(logits + i, logit);
        store(weights + i, exponential(logit));
    }
}

constexpr Code CODE = {peaks, sums, entries};
