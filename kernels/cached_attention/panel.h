// A panel: up to ROWS rows of queries that attend to one chunk of slots after another. Included in the namespace of one
// instruction set after another, which says what TARGET is, brings the vectors of cpu/vector.h, and how many vectors of
// rows (VECTORS) and how many slots or channels (STEP) are worked on at once.
//
// Rows lie in the lanes of vectors, so every number of a slot is multiplied with all rows at once, nothing is summed
// across lanes, and any number of channels fits. A panel of V vectors holds, each as [..., V * WIDTH]:
//
//   q [channels]   queries            s [CHUNK]   scores of a chunk, then their exponentials
//   o [channels]   sums of values     m, l        the largest score so far, and the sum of exponentials

#include "../cpu/exponential.h"

constexpr size_t ROWS = VECTORS * WIDTH;

TARGET INLINE Float larger(Float a, Float b) { return a > b ? a : b; }

// cap * tanh(x / cap)
TARGET INLINE Float capped(Float x, float cap) {
    const Float one = all(1.f), none = all(0.f);
    const Float size = (x < none ? -x : x) / all(cap);
    const Float small = exponential(size * all(-2.f));
    const Float tanh = (one - small) / (one + small) * all(cap);
    return x < none ? -tanh : tanh;
}

// s of SLOTS slots, whose keys [SLOTS, channels] lie one after another.
template <int V, int SLOTS>
TARGET INLINE void score(const float* q, const float* k, size_t channels, float* s) {
    Float sum[SLOTS][V];
    UNROLL for (int i = 0; i < SLOTS; ++i) {
        UNROLL for (int v = 0; v < V; ++v) sum[i][v] = all(0.f);
    }
    for (size_t c = 0; c < channels; ++c, q += V * WIDTH) {
        Float own[V];
        UNROLL for (int v = 0; v < V; ++v) own[v] = load(q + v * WIDTH);
        UNROLL for (int i = 0; i < SLOTS; ++i) {
            const Float key = all(at(k + i * channels + c));
            UNROLL for (int v = 0; v < V; ++v) sum[i][v] = plus(sum[i][v], own[v], key);
        }
    }
    UNROLL for (int i = 0; i < SLOTS; ++i) {
        UNROLL for (int v = 0; v < V; ++v) store(s + (i * V + v) * WIDTH, sum[i][v]);
    }
}

// o of CHANNELS channels, times what earlier sums are worth, plus the values [count, stride] times s.
template <int V, int CHANNELS>
TARGET INLINE void gather(const float* s, const float* values, size_t stride, size_t count, const Float* worth,
                          float* o) {
    Float sum[CHANNELS][V];
    UNROLL for (int i = 0; i < CHANNELS; ++i) {
        UNROLL for (int v = 0; v < V; ++v) sum[i][v] = load(o + (i * V + v) * WIDTH) * worth[v];
    }
    for (size_t n = 0; n < count; ++n, s += V * WIDTH, values += stride) {
        Float own[V];
        UNROLL for (int v = 0; v < V; ++v) own[v] = load(s + v * WIDTH);
        UNROLL for (int i = 0; i < CHANNELS; ++i) {
            const Float value = all(at(values + i));
            UNROLL for (int v = 0; v < V; ++v) sum[i][v] = plus(sum[i][v], own[v], value);
        }
    }
    UNROLL for (int i = 0; i < CHANNELS; ++i) {
        UNROLL for (int v = 0; v < V; ++v) store(o + (i * V + v) * WIDTH, sum[i][v]);
    }
}

// Asks for numbers that are needed later, which come from memory while others are worked on.
TARGET INLINE void ask(const float* from, size_t count) {
    for (size_t i = 0; i < count; i += 64 / sizeof(float)) __builtin_prefetch(from + i);
}

template <int V>
TARGET static void scores(const float* q, const Chunk& chunk, float* s) {
    const size_t channels = chunk.channels, count = chunk.count;
    const float* k = chunk.keys;
    size_t n = 0;
    for (; n + STEP <= count; n += STEP) {
        ask(chunk.values + n * channels, STEP * channels);
        score<V, STEP>(q, k + n * channels, channels, s + n * V * WIDTH);
    }
    for (; n + 2 <= count; n += 2) score<V, 2>(q, k + n * channels, channels, s + n * V * WIDTH);
    if (n < count) score<V, 1>(q, k + n * channels, channels, s + n * V * WIDTH);
}

// Makes exponentials of scores, and says what earlier sums are worth beside them.
template <int V>
TARGET static void weigh(float* s, size_t count, float* m, float* l, Float* worth) {
    UNROLL for (int v = 0; v < V; ++v, s += WIDTH, m += WIDTH, l += WIDTH) {
        const Float before = load(m);
        Float most = before;
        for (size_t n = 0; n < count; ++n) most = larger(load(s + n * V * WIDTH), most);
        const Float base = most < all(-FLT_MAX) ? all(0.f) : most;  // of a row that sees nothing yet
        worth[v] = exponential(before - base);
        Float sum = load(l) * worth[v];
        for (size_t n = 0; n < count; ++n) {
            float* own = s + n * V * WIDTH;
            const Float power = exponential(load(own) - base);
            store(own, power);
            sum = sum + power;
        }
        store(m, most);
        store(l, sum);
    }
}

template <int V>
TARGET static void attend(const Panel& panel, const Chunk& chunk) {
    const size_t channels = chunk.channels;
    scores<V>(panel.q, chunk, panel.s);
    if (chunk.cap != 0) {
        for (size_t i = 0; i < chunk.count * V; ++i)
            store(panel.s + i * WIDTH, capped(load(panel.s + i * WIDTH), chunk.cap));
    }
    if (chunk.partly) chunk.hide(panel.s, V * WIDTH, 1, panel.first, panel.rows);
    Float worth[V];
    weigh<V>(panel.s, chunk.count, panel.m, panel.l, worth);
    size_t c = 0;
    for (; c + STEP <= channels; c += STEP)
        gather<V, STEP>(panel.s, chunk.values + c, channels, chunk.count, worth, panel.o + c * V * WIDTH);
    for (; c < channels; ++c)
        gather<V, 1>(panel.s, chunk.values + c, channels, chunk.count, worth, panel.o + c * V * WIDTH);
}

// Adds what the same rows have made of other slots.
template <int V>
TARGET static void merge(const Panel& panel, const Panel& other) {
    UNROLL for (int v = 0; v < V; ++v) {
        float *m = panel.m + v * WIDTH, *l = panel.l + v * WIDTH;
        const Float most = larger(load(m), load(other.m + v * WIDTH));
        const Float base = most < all(-FLT_MAX) ? all(0.f) : most;
        const Float own = exponential(load(m) - base), others = exponential(load(other.m + v * WIDTH) - base);
        for (size_t c = 0; c < panel.channels; ++c) {
            const size_t place = (c * V + v) * WIDTH;
            store(panel.o + place, plus(load(other.o + place) * others, load(panel.o + place), own));
        }
        store(l, plus(load(other.l + v * WIDTH) * others, load(l), own));
        store(m, most);
    }
}

TARGET static void widen(const int8_t* from, size_t count, float* into) {
    size_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(into + i, codes(from + i));
    for (; i < count; ++i) into[i] = from[i];
}
