// Numbers to bytes, and sums to numbers. Included in the namespace of one instruction set after another, which says
// what TARGET is and how many numbers (WIDTH) a vector holds, and defines what is used here:
//
//   Int, Float          WIDTH integers of 32 bits, floats
//   all, load, plus     as in vector.h; loads are from any address
//   integers, floats    integers from memory; as floats
//   nearest             floats as integers, ties to even
//   quotient            value / step, rounded as a division is
//   bytes               stores integers as bytes, what is outside of 0 to 255 as the nearest
//   narrow              stores codes as products want them, less what is subtracted

// A row, `tail` numbers at the end filled up with zeros.
TARGET INLINE Float take_some(const char* from, size_t numbers) {
    if (numbers >= size_t(WIDTH)) return load(reinterpret_cast<const float*>(from));
    float some[WIDTH] = {};
    std::memcpy(some, from, 4 * numbers);
    return load(some);
}
TARGET INLINE float greatest(Float values) {
    float each[WIDTH], most = 0;
    store(each, values);
    for (float one : each) most = one > most ? one : most;
    return most;
}
TARGET INLINE bool is_number(Float zeros) {
    float each[WIDTH], sum = 0;
    store(each, zeros);
    for (float one : each) sum += one;
    return sum == 0;
}
// Beyond the codes on either side, but finite; what is no number stays.
TARGET INLINE Float bounded(Float value, float step) {
    return least(all(512 * step), most(all(-512 * step), value));
}

TARGET static float round_row(const char* x, size_t in, size_t padded, const Grid& grid, uint8_t* q) {
    Float step = all(grid.step), bad = all(0.f);
    float own = grid.step;
    if (!grid.known()) {
        Float peak = all(0.f);
        for (size_t i = 0; i < in; i += WIDTH) {
            const Float value = take_some(x + 4 * i, in - i);
            peak = most(peak, magnitude(value));
            bad = plus(bad, value, all(0.f));
        }
        own = std::max(greatest(peak) / 127, SMALLEST_STEP);
        if (!is_number(bad)) own = 1, bad = all(std::numeric_limits<float>::quiet_NaN());
        step = all(own);
    }
    const Float inverse = all(1.f) / step;
    const Int zero = all(int32_t(grid.zero));
    for (size_t i = 0; i < in; i += WIDTH) {
        const Float value = bounded(take_some(x + 4 * i, in - i), own);
        bad = plus(bad, value, all(0.f));
        narrow(q, i, nearest(quotient(value, step, inverse)) + zero, grid.zero);
    }
    fill(q, in, padded);
    return is_number(bad) ? own : std::numeric_limits<float>::quiet_NaN();
}

#include "../cpu/gelu.h"

template <Activation ACTIVATION>
TARGET INLINE Float activated(Float x) {
    if constexpr (ACTIVATION == Activation::NONE) return x;
    return gelu<ACTIVATION == Activation::GELU>(x);
}

template <Activation ACTIVATION>
TARGET INLINE void finish_as(const int32_t* sums, size_t R, const Panels& panels, int zero, const End& end) {
    alignas(64) int32_t start[PAIR];
    for (int o = 0; o < PAIR; ++o) start[o] = -zero * panels.sums[o];
    for (size_t r = 0; r < R; ++r) {
        float y[PAIR];
        UNROLL for (int o = 0; o < PAIR; o += WIDTH) {
            const Int sum = integers(sums + r * PAIR + o) + integers(start + o);
            const Float scale = load(panels.scale + o) * all(end.step[r]);
            store(y + o, activated<ACTIVATION>(plus(load(panels.bias + o), floats(sum), scale)));
        }
        std::memcpy(end.y + 4 * r * end.stride, y, 4 * end.outputs);
    }
}

TARGET static void finish(const int32_t* sums, size_t R, const Panels& panels, int zero, const End& end) {
    switch (end.activation) {
        case Activation::NONE: return finish_as<Activation::NONE>(sums, R, panels, zero, end);
        case Activation::GELU: return finish_as<Activation::GELU>(sums, R, panels, zero, end);
        case Activation::GELU_TANH: return finish_as<Activation::GELU_TANH>(sums, R, panels, zero, end);
    }
}
