// Products of R rows and 32 outputs. Included in the namespace of one instruction set after another, which says what
// TARGET is, how many outputs (WIDTH) a vector of sums holds and how many vectors of them (H) stand beside each
// other, and defines what is used here:
//
//   Int, none       WIDTH sums, 0
//   Weights, Row    four inputs of WIDTH outputs; four inputs of one row, repeated
//   weights, row    from memory
//   dot             sums and products
//   put             the sums of a row to memory, H vectors of them

template <int R>
TARGET static void product(const uint8_t* q, size_t stride, const Panels& panels, int32_t* sums) {
    constexpr int OUTPUTS = WIDTH * H;
    for (int first = 0; first < PAIR; first += OUTPUTS) {
        Int sum[R][H];
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int h = 0; h < H; ++h)
                sum[r][h] = none();
        }
        const int8_t* codes = panels.codes + first / PANEL * panels.bytes + first % PANEL * 4;
        const size_t next = WIDTH == PANEL ? panels.bytes : 4 * WIDTH;  // from one vector of weights to the other
        for (size_t line = 0; line < panels.lines; ++line) {
            Weights w[H];
            UNROLL for (int h = 0; h < H; ++h)
                w[h] = weights(codes + line * LINE + h * next);
            UNROLL for (int r = 0; r < R; ++r) {
                const Row x = row(q + r * stride + line * BYTES * 4);
                UNROLL for (int h = 0; h < H; ++h)
                    dot(sum[r][h], x, w[h]);
            }
        }
        UNROLL for (int r = 0; r < R; ++r)
            put(sums + r * PAIR + first, sum[r]);
    }
}
