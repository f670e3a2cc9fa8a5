// The products of one tile of 16 outputs. Included in the namespace of one instruction set after another, which says
// what TARGET is, how many outputs (WIDTH) a vector holds and how many vectors of sums there is room for (ROWS), and
// defines what is used here:
//
//   Int, Float   WIDTH sums, as 32-bit integers and as floats
//   Codes        weights of WIDTH outputs and 8 inputs (4 bits) or 4 inputs (8 bits), ready to be multiplied
//   Bytes        four inputs of a row, repeated
//   Part         sums over up to 32 inputs
//   STARTS       whether sums begin with what Rows says, which accounts for the zero point where all have the same
//
// Rows of activations are interleaved, four inputs of one row beside the same inputs of the next.

// Outputs from `first` on. With CHUNKS = 0 the tile says how many chunks of 32 inputs a group has.
template <int BITS, int R, int H, size_t CHUNKS>
TARGET static void strip(const Tile& tile, const Rows& rows, int first, float* y, size_t stride) {
    constexpr int STEPS = BITS;        // lines of 64 bytes for 32 inputs
    constexpr int DWORDS = 8 / STEPS;  // of four inputs each, in a line
    if (H * WIDTH == TILE) first = 0;
    Float total[R][H];
    UNROLL for (int h = 0; h < H; ++h) {
        const Float bias = tile.bias ? load(tile.bias + first + h * WIDTH) : all(0.f);
        UNROLL for (int r = 0; r < R; ++r)
            total[r][h] = bias;
    }
    const uint8_t* group = tile.groups;
    const int8_t* q = rows.q;
    const float* numbers = rows.numbers;
    Fetch next = rows.next.part(first / (H * WIDTH), TILE / (H * WIDTH)).part(0, tile.count);
    for (size_t g = 0; g < tile.count; ++g, next.from += next.bytes, group += tile.bytes, numbers += 3 * R) {
        next.now();
        const uint8_t* codes = group;
        Int sum[R][H];
        UNROLL for (int r = 0; r < R; ++r) {
            const Int start = STARTS ? all(integer(numbers + R + r)) : all(0);
            UNROLL for (int h = 0; h < H; ++h)
                sum[r][h] = start;
        }
        for (size_t chunk = 0; chunk < (CHUNKS ? CHUNKS : tile.chunks); ++chunk) {
            Part part[R][H];
            UNROLL for (int r = 0; r < R; ++r) {
                UNROLL for (int h = 0; h < H; ++h)
                    part[r][h] = begin(sum[r][h]);
            }
            UNROLL for (int step = 0; step < STEPS; ++step) {
                Codes w[H];
                UNROLL for (int h = 0; h < H; ++h)
                    w[h] = split<BITS>(codes + 64 * step + 4 * (first + h * WIDTH));
                UNROLL for (int r = 0; r < R; ++r) {
                    const int8_t* own = q + 4 * (DWORDS * step * R + r);
                    const Bytes low = repeated(own), high = BITS == 4 ? repeated(own + 4 * R) : low;
                    UNROLL for (int h = 0; h < H; ++h)
                        dot<BITS>(part[r][h], w[h], low, high, step == 0);
                }
            }
            codes += 64 * STEPS;
            q += 32 * R;
            UNROLL for (int r = 0; r < R; ++r) {
                UNROLL for (int h = 0; h < H; ++h)
                    sum[r][h] = end<BITS>(sum[r][h], part[r][h]);
            }
        }
        const uint8_t* others = codes + tile.scale_bytes();  // beside the scales
        UNROLL for (int h = 0; h < H; ++h) {
            const int output = first + h * WIDTH;
            const Float scale = tile.half ? load_half(codes + 2 * output) : load_full(codes + 4 * output);
            Float value[R];
            UNROLL for (int r = 0; r < R; ++r)
                value[r] = floats(sum[r][h]);
            if (tile.minimum) {
                const Float minimum = tile.half ? load_half(others + 2 * output) : load_full(others + 4 * output);
                UNROLL for (int r = 0; r < R; ++r) {
                    total[r][h] = plus(total[r][h], minimum, all(numbers[2 * R + r]));
                }
            } else if (tile.zero || !STARTS) {
                const Float zero = tile.zero ? load_byte(others + output) : all(BITS == 4 ? 8.f : 128.f);
                UNROLL for (int r = 0; r < R; ++r)
                    value[r] = minus(value[r], zero, all(numbers[2 * R + r]));
            }
            UNROLL for (int r = 0; r < R; ++r)
                total[r][h] = plus(total[r][h], scale * all(numbers[r]), value[r]);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int h = 0; h < H; ++h)
            store(y + r * stride + first + h * WIDTH, total[r][h]);
    }
}

template <int BITS, int R>
TARGET static void product(const Tile& tile, const Rows& rows, float* y, size_t stride) {
    constexpr int VECTORS = TILE / WIDTH;
    constexpr int H = R * VECTORS <= ROWS ? VECTORS : R * 2 <= ROWS && VECTORS > 1 ? 2 : 1;
    for (int first = 0; first < TILE; first += H * WIDTH) {
        (tile.chunks == 1 ? strip<BITS, R, H, 1> : strip<BITS, R, H, 0>)(tile, rows, first, y, stride);
    }
}
