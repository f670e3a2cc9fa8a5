// One call: what it is given, and how it is shared out among threads.
//
// A unit is a row of the batch and one of its key heads. New keys and values are written first. Few rows of queries then
// read the slots in parts, which are merged by whoever is last; many are read in blocks, each over all of its slots.
//
// Rows of queries whose slots are listed together are a strip: all of a unit's. Where tokens are computed alike, a strip
// is the rows of one token, so that neither what it reads nor the order of any sum depends on the tokens beside it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "../cpu/memory.h"
#include "../cpu/ort.h"
#include "code.h"

namespace tokopt {
namespace {

struct Sizes {
    size_t batch, tokens, slots, heads, key_heads, channels;
    size_t pairs;  // of channels that are rotated
    size_t group() const { return heads / key_heads; }
    size_t units() const { return batch * key_heads; }
};

// [batch, tokens, heads, channels] of float32, at any address; strides are in bytes.
struct Source {
    const char* data;
    size_t row, token;
};

// [1 or batch, tokens, pairs]
struct Tables {
    const char *cos, *sin;
    size_t row;
};

// [1 or batch, 1 or the heads, 1 or tokens, slots]
struct Mask {
    const uint8_t* data;
    size_t row, head, token;
    bool by_key_head, by_head;
};

struct Caches {
    const char *keys, *values;          // [batch, key heads, slots, channels], as they were
    char *next_keys, *next_values;      // the same memory, or other memory
    const float *key_scale, *value_scale;  // [key heads, channels] of codes, or null
    size_t width() const { return key_scale ? 1 : 4; }
};

struct Given {
    Sizes sizes;
    Source queries, keys, values;
    Caches caches;
    const char* length;  // [batch]
    Mask mask;
    Tables tables;
    float scale, cap;
    bool interleaved;
    char* result;  // [batch, tokens, heads x channels]

    size_t start(size_t b) const {
        int64_t slot;
        std::memcpy(&slot, length + 8 * b, 8);
        return size_t(slot);
    }
};

// Takes memory piece by piece; without memory it only counts.
class Pieces {
  public:
    explicit Pieces(uint8_t* from = nullptr) : from(from) {}
    template <class T>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(from ? from + used : nullptr);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    size_t used = 0;

  private:
    uint8_t* const from;
};

class Call {
  public:
    Call(const Code& code, const Given& given, bool alike)
        : code(code),
          given(given),
          sizes(given.sizes),
          alike(alike),
          strips(alike ? sizes.tokens : 1),
          block(std::max<size_t>(1, alike ? sizes.tokens : BLOCK / sizes.group())),
          blocks((sizes.tokens + block - 1) / block) {}

    void run(const Api& api, const OrtKernelContext* context) {
        const size_t units = sizes.units();
        if (given.caches.keys != given.caches.next_keys || given.caches.values != given.caches.next_values)
            share(api, context, units, unit_bytes(), &Call::copy);
        if (!sizes.tokens) return;
        if (blocks > 1) {
            share(api, context, units * blocks, SERIAL, &Call::write);
            share(api, context, units * blocks, SERIAL, &Call::read_block);
            return;
        }
        static thread_local Scratch scratch;
        lists = given.mask.by_key_head || given.mask.by_head ? units : sizes.batch;
        prepare(scratch);
        const size_t work = sizes.tokens * (sizes.group() + 2) * sizes.channels;
        share(api, context, lists * strips, sizes.tokens / strips * sizes.slots / 8, &Call::list);
        share(api, context, units, work, &Call::start_unit);
        split();
        share(api, context, units * most_parts, SERIAL, &Call::read_part);
    }

  private:
    static constexpr size_t BLOCK = 128;     // rows of queries that are worked on together
    static constexpr size_t SERIAL = 32768;  // numbers that one thread moves sooner than it could share them out
    static constexpr size_t PART = 128;      // the fewest slots that are worth being shared out
    static constexpr size_t TASKS = 48;      // that many threads share out well

    // Does `work(i)` for every i below `total`; each costs about as much as moving `cost` numbers.
    void share(const Api& api, const OrtKernelContext* context, size_t total, size_t cost, void (Call::*work)(size_t)) {
        if (total == 1 || total * cost < SERIAL) {
            for (size_t i = 0; i < total; ++i) (this->*work)(i);
            return;
        }
        current = work;
        api.parallel(
            context,
            [](void* opaque, size_t i) {
                Call& call = *static_cast<Call*>(opaque);
                (call.*call.current)(i);
            },
            total, this);
    }

    size_t unit_bytes() const { return sizes.slots * sizes.channels * given.caches.width(); }
    size_t padded(size_t rows) const { return (rows + code.width - 1) / code.width * code.width; }
    size_t rows() const { return std::min(block, sizes.tokens) / strips * sizes.group(); }  // of a strip or block, at most
    size_t state() const { return (sizes.channels + 2) * padded(rows()); }                  // numbers: o, m and l

    void copy(size_t unit) {
        const size_t bytes = unit_bytes(), place = unit * bytes;
        const Caches& caches = given.caches;
        if (caches.keys != caches.next_keys) std::memcpy(caches.next_keys + place, caches.keys + place, bytes);
        if (caches.values != caches.next_values) std::memcpy(caches.next_values + place, caches.values + place, bytes);
    }

    // Channels of a head, rotated as token `t` of row `b` is.
    void rotate(const char* from, size_t b, size_t t, float* into) const {
        std::memcpy(into, from, 4 * sizes.channels);
        const size_t pairs = sizes.pairs;
        const char* cos = given.tables.cos + b * given.tables.row + 4 * t * pairs;
        const char* sin = given.tables.sin + b * given.tables.row + 4 * t * pairs;
        const size_t step = given.interleaved ? 2 : 1, other = given.interleaved ? 1 : pairs;
        for (size_t i = 0; i < pairs; ++i) {
            const float c = at(cos + 4 * i), s = at(sin + 4 * i), x = into[step * i], y = into[step * i + other];
            into[step * i] = c * x - s * y;
            into[step * i + other] = s * x + c * y;
        }
    }

    // `numbers` into a slot: as they are, or rounded as quantize_int8 does.
    void put(const float* numbers, const float* scale, size_t unit, size_t slot, char* cache) const {
        const size_t channels = sizes.channels;
        char* into = cache + (unit * sizes.slots + slot) * channels * given.caches.width();
        if (!scale) {
            std::memcpy(into, numbers, 4 * channels);
            return;
        }
        scale += unit % sizes.key_heads * channels;
        for (size_t c = 0; c < channels; ++c) {
            const float code = std::nearbyint(numbers[c] / scale[c]);
            into[c] = char(int8_t(code > -128 ? std::min(code, 127.f) : -128.f));
        }
    }

    // The new keys and values of block `i % blocks` of unit `i / blocks`.
    void write(size_t i) {
        static thread_local Scratch scratch;
        float* numbers = reinterpret_cast<float*>(scratch.of(4 * sizes.channels));
        const size_t unit = i / blocks, b = unit / sizes.key_heads, head = unit % sizes.key_heads;
        const size_t first = i % blocks * block, last = std::min(first + block, sizes.tokens), bytes = 4 * sizes.channels;
        for (size_t t = first; t < last; ++t) {
            const size_t slot = given.start(b) + t;
            rotate(given.keys.data + b * given.keys.row + t * given.keys.token + head * bytes, b, t, numbers);
            put(numbers, given.caches.key_scale, unit, slot, given.caches.next_keys);
            std::memcpy(numbers, given.values.data + b * given.values.row + t * given.values.token + head * bytes, bytes);
            put(numbers, given.caches.value_scale, unit, slot, given.caches.next_values);
        }
    }

    // The queries of tokens [first, last) of a unit, panel after panel: [channels, rows of the panel].
    void queries(size_t unit, size_t first, size_t last, float* into) const {
        static thread_local Scratch scratch;
        const size_t channels = sizes.channels, group = sizes.group(), all = (last - first) * group;
        float* numbers = reinterpret_cast<float*>(scratch.of(8 * channels));
        float* factor = numbers + channels;
        const size_t b = unit / sizes.key_heads, head = unit % sizes.key_heads;
        const float* scale = given.caches.key_scale;
        for (size_t c = 0; c < channels; ++c) factor[c] = given.scale * (scale ? scale[head * channels + c] : 1.f);
        std::fill(into, into + padded(all) * channels, 0.f);
        for (size_t r = 0; r < all; ++r) {
            const size_t t = first + r / group, own = head * group + r % group;
            rotate(given.queries.data + b * given.queries.row + t * given.queries.token + 4 * own * channels, b, t, numbers);
            const size_t panel = r / code.rows() * code.rows(), lanes = std::min(code.rows(), padded(all) - panel);
            const Layout layout = layout_of(lanes);
            float* to = into + panel * channels + r % code.rows() * layout.row;
            for (size_t c = 0; c < channels; ++c) to[c * layout.channel] = numbers[c] * factor[c];
        }
    }

    Masks masks_of(size_t b, size_t head, size_t first) const {
        const Mask& mask = given.mask;
        const size_t own = mask.by_head ? head * sizes.group() : mask.by_key_head ? head : 0;
        const uint8_t* from = mask.data + b * mask.row + own * mask.head + first * mask.token;
        return {from, sizes.group(), mask.token, mask.by_head ? mask.head : 0};
    }

    // The slots that any of some rows sees, as ~slot where not all do. `room` has two bytes a slot.
    size_t seen(const Masks& masks, size_t all, uint8_t* room, int32_t* into) const {
        const size_t slots = sizes.slots, step = masks.head ? 1 : masks.token ? masks.group : all;
        uint8_t *any = room, *every = room + slots;
        const uint8_t* one = masks.row(0);
        if (step < all) {
            std::memcpy(any, one, slots);
            std::memcpy(every, one, slots);
            for (size_t r = step; r < all; r += step) {
                const uint8_t* row = masks.row(r);
                for (size_t slot = 0; slot < slots; ++slot) any[slot] |= row[slot];
                for (size_t slot = 0; slot < slots; ++slot) every[slot] &= row[slot];
            }
            one = any;
        }
        size_t count = 0, slot = 0;
        const auto take = [&](size_t end) {
            for (; slot < end; ++slot) {
                into[count] = step < all && !every[slot] ? ~int32_t(slot) : int32_t(slot);
                count += one[slot] != 0;
            }
        };
        constexpr size_t WORD = 8;
        while (slot + WORD <= slots) {  // most are seen by all, or by none
            const size_t end = slot + WORD;
            if (same(step < all ? every + slot : one + slot, 0x0101010101010101u)) {
                for (; slot < end; ++slot) into[count++] = int32_t(slot);
            } else if (same(one + slot, 0)) {
                slot = end;
            } else {
                take(end);
            }
        }
        take(slots);
        return count;
    }

    // Whether eight bytes are those of a word.
    static bool same(const uint8_t* bytes, uint64_t word) { return std::memcmp(bytes, &word, sizeof word) == 0; }

    // Strides of queries and of sums in a panel.
    struct Layout {
        size_t row, channel;
    };
    Layout layout_of(size_t lanes) const { return code.few ? Layout{sizes.channels, 1} : Layout{1, lanes}; }

    // What rows of queries hold.
    struct Rows {
        size_t count;
        Masks masks;
        const float* q;
        float* state;  // o, then m, then l
    };

    void clear(float* own) const {
        const size_t lanes = padded(rows()), o = sizes.channels * lanes;
        std::fill(own, own + o, 0.f);
        std::fill(own + o, own + o + lanes, -std::numeric_limits<float>::infinity());
        std::fill(own + o + lanes, own + o + 2 * lanes, 0.f);
    }

    Panel panel_of(const float* q, float* s, float* own, size_t first, size_t count) const {
        const size_t lanes = padded(rows()), channels = sizes.channels;
        float* m = own + channels * lanes + first;
        return {const_cast<float*>(q) + first * channels, s,     own + first * channels, m, m + lanes, first,
                std::min(code.rows(), count - first),     channels};
    }
    size_t vectors(const Panel& panel) const { return (panel.rows + code.width - 1) / code.width; }

    // Keys or values of slots, as floats one after another: where they lie, or in `room`.
    const float* together(const char* cache, size_t unit, const int32_t* slots, size_t count, float* room) const {
        const size_t channels = sizes.channels, bytes = channels * given.caches.width();
        const auto slot = [&](size_t n) { return size_t(slots[n] < 0 ? ~slots[n] : slots[n]); };
        const char* from = cache + unit * unit_bytes();
        if (slot(count - 1) - slot(0) == count - 1) {
            from += slot(0) * bytes;
            if (!given.caches.key_scale) return reinterpret_cast<const float*>(from);
            code.widen(reinterpret_cast<const int8_t*>(from), count * channels, room);
            return room;
        }
        for (size_t n = 0; n < count; ++n) {
            const char* own = from + slot(n) * bytes;
            if (given.caches.key_scale)
                code.widen(reinterpret_cast<const int8_t*>(own), channels, room + n * channels);
            else
                std::memcpy(room + n * channels, own, bytes);
        }
        return room;
    }

    // `rows` attend to the slots of a chunk, `count` at most CHUNK; room: see chunk_room.
    void attend(const Rows& rows, size_t unit, const int32_t* slots, size_t count, float* room) const {
        const size_t channels = sizes.channels;
        float *keys = room + CHUNK * MOST_ROWS, *values = keys + CHUNK * channels;
        const Chunk chunk = {together(given.caches.next_keys, unit, slots, count, keys),
                             together(given.caches.next_values, unit, slots, count, values),
                             slots,
                             count,
                             channels,
                             given.cap,
                             std::any_of(slots, slots + count, [](int32_t slot) { return slot < 0; }),
                             rows.masks};
        for (size_t r = 0; r < rows.count; r += code.rows()) {
            const Panel panel = panel_of(rows.q, room, rows.state, r, rows.count);
            code.attend[vectors(panel) - 1](panel, chunk);
        }
    }
    size_t chunk_room() const { return CHUNK * (MOST_ROWS + 2 * sizes.channels); }

    // Rows of a unit, from token `first` on, are done.
    void finish(const Rows& rows, size_t unit, size_t first) const {
        const size_t channels = sizes.channels, group = sizes.group();
        const size_t b = unit / sizes.key_heads, head = unit % sizes.key_heads;
        const float* scale = given.caches.value_scale ? given.caches.value_scale + head * channels : nullptr;
        for (size_t r = 0; r < rows.count; ++r) {
            const Panel panel = panel_of(rows.q, nullptr, rows.state, r / code.rows() * code.rows(), rows.count);
            const size_t lane = r % code.rows();
            const Layout layout = layout_of(vectors(panel) * code.width);
            const float total = panel.l[lane], inverse = total != 0 ? 1 / total : 0;
            const size_t t = first + r / group, place = (b * sizes.tokens + t) * sizes.heads + head * group + r % group;
            for (size_t c = 0; c < channels; ++c) {
                const float value = panel.o[lane * layout.row + c * layout.channel] * inverse * (scale ? scale[c] : 1.f);
                std::memcpy(given.result + 4 * (place * channels + c), &value, 4);
            }
        }
    }

    // Many rows: a block of a unit reads all slots that it sees. The last blocks see the most and come first.
    void read_block(size_t i) {
        static thread_local Scratch scratch;
        const size_t units = sizes.units(), unit = i % units, first = (blocks - 1 - i / units) * block;
        const size_t last = std::min(first + block, sizes.tokens), count = (last - first) * sizes.group();
        const auto cut = [&](Pieces pieces, float*& q, float*& own, float*& room, int32_t*& slots, uint8_t*& bytes) {
            q = pieces.take<float>(padded(rows()) * sizes.channels);
            own = pieces.take<float>(state());
            room = pieces.take<float>(chunk_room());
            slots = pieces.take<int32_t>(sizes.slots);
            bytes = pieces.take<uint8_t>(2 * sizes.slots);
            return pieces.used;
        };
        float *q, *own, *room;
        int32_t* slots;
        uint8_t* bytes;
        cut(Pieces(scratch.of(cut(Pieces(), q, own, room, slots, bytes))), q, own, room, slots, bytes);
        const Rows rows = {count, masks_of(unit / sizes.key_heads, unit % sizes.key_heads, first), q, own};
        queries(unit, first, last, q);
        clear(own);
        const size_t all = seen(rows.masks, count, bytes, slots);
        for (size_t slot = 0; slot < all; slot += CHUNK)
            attend(rows, unit, slots + slot, std::min(CHUNK, all - slot), room);
        finish(rows, unit, first);
    }

    // Few rows: what the parts of a unit share.
    void prepare(Scratch& scratch) {
        const auto cut = [&](Pieces pieces) {
            q = pieces.take<float>(sizes.units() * strips * padded(rows()) * sizes.channels);
            slots = pieces.take<int32_t>(lists * strips * sizes.slots);
            bytes = pieces.take<uint8_t>(lists * strips * 2 * sizes.slots);
            counts = pieces.take<size_t>(lists * strips);
            return pieces.used;
        };
        cut(Pieces(scratch.of(cut(Pieces()))));
    }
    size_t tokens() const { return sizes.tokens / strips; }  // of a strip
    // The list of a unit's first strip; those of the others follow it.
    size_t list_of(size_t unit) const { return (lists == sizes.units() ? unit : unit / sizes.key_heads) * strips; }

    void list(size_t i) {
        const size_t unit = lists == sizes.units() ? i / strips : i / strips * sizes.key_heads;
        const Masks masks = masks_of(unit / sizes.key_heads, unit % sizes.key_heads, i % strips * tokens());
        counts[i] = seen(masks, rows(), bytes + 2 * i * sizes.slots, slots + i * sizes.slots);
    }

    float* queries_of(size_t unit, size_t strip) const {
        return q + (unit * strips + strip) * padded(rows()) * sizes.channels;
    }

    void start_unit(size_t unit) {
        write(unit);
        for (size_t strip = 0; strip < strips; ++strip)
            queries(unit, strip * tokens(), (strip + 1) * tokens(), queries_of(unit, strip));
    }

    // So many parts that the threads have enough to share out, and that none is small; for strips of a token always the
    // same, which its sums depend on.
    void split() {
        static thread_local Scratch scratch;
        size_t total = 0, most = 1;
        for (size_t unit = 0; unit < sizes.units(); ++unit) {
            total += counts[list_of(unit)];
            most = std::max(most, longest(unit));
        }
        part = alike ? PART : std::max(PART, (total / TASKS + CHUNK - 1) / CHUNK * CHUNK);
        most_parts = (most + part - 1) / part;
        const auto cut = [&](Pieces pieces) {
            pending = pieces.take<std::atomic<size_t>>(sizes.units());
            states = pieces.take<float>(most_parts > 1 ? sizes.units() * most_parts * strips * state() : 0);
            return pieces.used;
        };
        cut(Pieces(scratch.of(cut(Pieces()))));
        for (size_t unit = 0; unit < sizes.units(); ++unit)
            new (&pending[unit]) std::atomic<size_t>(parts_of(longest(unit)));
    }
    size_t longest(size_t unit) const {
        const size_t* own = counts + list_of(unit);
        return *std::max_element(own, own + strips);
    }
    size_t parts_of(size_t count) const { return std::max<size_t>(1, (count + part - 1) / part); }

    // The sums of a part of a unit's slots, strip after strip.
    float* state_of(size_t unit, size_t own_part, size_t strip, float* alone) const {
        return (most_parts > 1 ? states + (unit * most_parts + own_part) * strips * state() : alone) + strip * state();
    }

    void read_part(size_t i) {
        static thread_local Scratch scratch;
        const size_t unit = i / most_parts, own_part = i % most_parts, list = list_of(unit);
        if (own_part >= parts_of(longest(unit))) return;
        float* room = reinterpret_cast<float*>(scratch.of(4 * (chunk_room() + strips * state())));
        float* alone = room + chunk_room();
        const auto rows_of = [&](size_t strip, size_t own_part) {
            const Masks masks = masks_of(unit / sizes.key_heads, unit % sizes.key_heads, strip * tokens());
            return Rows{rows(), masks, queries_of(unit, strip), state_of(unit, own_part, strip, alone)};
        };
        for (size_t strip = 0; strip < strips; ++strip) clear(state_of(unit, own_part, strip, alone));
        for (size_t first = own_part * part; first < (own_part + 1) * part; first += CHUNK) {
            for (size_t strip = 0; strip < strips; ++strip) {
                const size_t count = counts[list + strip];
                if (first < count)
                    attend(rows_of(strip, own_part), unit, slots + (list + strip) * sizes.slots + first,
                           std::min(CHUNK, count - first), room);
            }
        }
        if (pending[unit].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        for (size_t strip = 0; strip < strips; ++strip) {
            const Rows rows = rows_of(strip, 0);
            for (size_t p = 1; p < parts_of(counts[list + strip]); ++p) join(rows, state_of(unit, p, strip, alone));
            finish(rows, unit, strip * tokens());
        }
    }

    // What rows have made of another part of their slots.
    void join(const Rows& rows, float* other) const {
        for (size_t r = 0; r < rows.count; r += code.rows()) {
            const Panel into = panel_of(rows.q, nullptr, rows.state, r, rows.count);
            code.merge[vectors(into) - 1](into, panel_of(rows.q, nullptr, other, r, rows.count));
        }
    }

    const Code& code;
    const Given& given;
    const Sizes& sizes;
    const bool alike;
    const size_t strips;         // of a unit; one for each token where tokens are computed alike
    const size_t block, blocks;  // tokens of a block of queries, and how many blocks there are
    void (Call::*current)(size_t) = nullptr;
    size_t lists = 0, part = 1, most_parts = 1;
    float *q = nullptr, *states = nullptr;
    int32_t* slots = nullptr;
    uint8_t* bytes = nullptr;
    size_t* counts = nullptr;
    std::atomic<size_t>* pending = nullptr;
};

}  // namespace
}  // namespace tokopt
