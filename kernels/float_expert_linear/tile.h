// Products of R rows and one tile of 32 outputs. Included in the namespace of one instruction set after another, which
// says what TARGET is, brings the vectors of cpu/vector.h, and says how many vectors of sums there is room for (ROOM).

// H vectors of outputs beside each other.
template <int R, int H>
TARGET static void strip(const float* w, const char* x, size_t inputs, float* sums) {
    Float total[R][H];
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int h = 0; h < H; ++h)
            total[r][h] = all(0.f);
    }
    for (size_t i = 0; i < inputs; ++i, w += TILE, x += 4 * R) {
        Float own[H];
        UNROLL for (int h = 0; h < H; ++h)
            own[h] = load(w + h * WIDTH);
        UNROLL for (int r = 0; r < R; ++r) {
            const Float value = all(at(x + 4 * r));
            UNROLL for (int h = 0; h < H; ++h)
                total[r][h] = plus(total[r][h], own[h], value);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int h = 0; h < H; ++h) {
            float* sum = sums + r * TILE + h * WIDTH;
            store(sum, load(sum) + total[r][h]);
        }
    }
}

template <int R>
TARGET static void product(const float* w, const char* x, size_t inputs, float* sums) {
    constexpr int VECTORS = TILE / WIDTH;
    constexpr int H = R * VECTORS <= ROOM ? VECTORS : R * VECTORS <= 2 * ROOM ? VECTORS / 2 : VECTORS / 4;
    for (int first = 0; first < TILE; first += H * WIDTH) strip<R, H>(w + first, x, inputs, sums + first);
}
