// A panel of one to four rows of queries, for heads whose channels fill vectors: included after panel.h.
//
// Channels lie in the lanes of vectors, and a row after another: q and o are [rows, channels], s is [rows, CHUNK], m and
// l have one number a row. FEW vectors of channels are summed at once.

// Scores of SLOTS slots, of which keys lie one after another.
template <int R, int SLOTS>
TARGET INLINE void score_few(const float* q, const float* k, size_t channels, float* s) {
    Float sum[R][SLOTS];
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int i = 0; i < SLOTS; ++i) sum[r][i] = all(0.f);
    }
    for (size_t c = 0; c < channels; c += WIDTH) {
        Float own[R];
        UNROLL for (int r = 0; r < R; ++r) own[r] = load(q + r * channels + c);
        UNROLL for (int i = 0; i < SLOTS; ++i) {
            const Float keys = load(k + i * channels + c);
            UNROLL for (int r = 0; r < R; ++r) sum[r][i] = plus(sum[r][i], own[r], keys);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) {
        if constexpr (SLOTS == 4) {
            add_lanes(sum[r], s + r * CHUNK);
        } else {
            s[r * CHUNK] = add_lanes(sum[r][0]);
        }
    }
}

// o of V vectors of channels, times what earlier sums are worth, plus the values of `count` slots times s.
template <int R, int V>
TARGET INLINE void gather_few(const float* s, const float* values, size_t channels, size_t count, const float* worth,
                              float* o) {
    Float sum[R][V];
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) sum[r][v] = load(o + r * channels + v * WIDTH) * all(worth[r]);
    }
    for (size_t n = 0; n < count; ++n, values += channels) {
        Float own[V];
        UNROLL for (int v = 0; v < V; ++v) own[v] = load(values + v * WIDTH);
        UNROLL for (int r = 0; r < R; ++r) {
            const Float share = all(s[r * CHUNK + n]);
            UNROLL for (int v = 0; v < V; ++v) sum[r][v] = plus(sum[r][v], share, own[v]);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) store(o + r * channels + v * WIDTH, sum[r][v]);
    }
}

// One row's exponentials of scores; returns what earlier sums are worth beside them.
TARGET INLINE float weigh_few(float* s, size_t count, float& m, float& l) {
    const float none = -std::numeric_limits<float>::infinity();
    const size_t full = (count + WIDTH - 1) / WIDTH * WIDTH;
    for (size_t n = count; n < full; ++n) s[n] = none;
    Float most = all(m);
    for (size_t n = 0; n < full; n += WIDTH) most = larger(load(s + n), most);
    float lanes[WIDTH], before = m;
    store(lanes, most);
    for (float own : lanes) m = own > m ? own : m;
    const Float base = all(m < -FLT_MAX ? 0.f : m);
    Float sum = all(0.f);
    for (size_t n = 0; n < full; n += WIDTH) {
        const Float power = exponential(load(s + n) - base);
        store(s + n, power);
        sum = sum + power;
    }
    store(lanes, exponential(all(before) - base));
    l = l * lanes[0] + add_lanes(sum);
    return lanes[0];
}

template <int R>
TARGET static void attend_few(const Panel& panel, const Chunk& chunk) {
    const size_t channels = chunk.channels, count = chunk.count;
    size_t n = 0;
    for (; n + 4 <= count; n += 4) {
        ask(chunk.values + n * channels, 4 * channels);
        score_few<R, 4>(panel.q, chunk.keys + n * channels, channels, panel.s + n);
    }
    for (; n < count; ++n) score_few<R, 1>(panel.q, chunk.keys + n * channels, channels, panel.s + n);
    if (chunk.cap != 0) {
        for (size_t r = 0; r < R; ++r) {
            for (n = 0; n < CHUNK; n += WIDTH)
                store(panel.s + r * CHUNK + n, capped(load(panel.s + r * CHUNK + n), chunk.cap));
        }
    }
    if (chunk.partly) chunk.hide(panel.s, 1, CHUNK, panel.first, panel.rows);
    float worth[R];
    UNROLL for (int r = 0; r < R; ++r) worth[r] = weigh_few(panel.s + r * CHUNK, count, panel.m[r], panel.l[r]);
    size_t c = 0;
    for (; c + FEW * WIDTH <= channels; c += FEW * WIDTH)
        gather_few<R, FEW>(panel.s, chunk.values + c, channels, count, worth, panel.o + c);
    for (; c < channels; c += WIDTH)
        gather_few<R, 1>(panel.s, chunk.values + c, channels, count, worth, panel.o + c);
}

template <int R>
TARGET static void merge_few(const Panel& panel, const Panel& other) {
    for (size_t r = 0; r < R; ++r) {
        float& m = panel.m[r];
        float lanes[WIDTH];
        const float most = other.m[r] > m ? other.m[r] : m, base = most < -FLT_MAX ? 0 : most;
        store(lanes, exponential(all(m - base)));
        const float own = lanes[0];
        store(lanes, exponential(all(other.m[r] - base)));
        const float others = lanes[0];
        for (size_t c = r * panel.channels; c < (r + 1) * panel.channels; c += WIDTH)
            store(panel.o + c, plus(load(other.o + c) * all(others), load(panel.o + c), all(own)));
        panel.l[r] = panel.l[r] * own + other.l[r] * others;
        m = most;
    }
}
