"""The token ops once more: float64, one loop per sentence of the method, nothing shared with the package.

Every function takes and returns numpy arrays with a leading batch axis; ties go to the lowest index, because
``sorted`` is stable and ``max`` returns the first of equals.
"""

from collections.abc import Callable

import numpy as np

Arrays = tuple[np.ndarray, ...]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    length = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / length) if length else 0.0


def per_row(rows: int, function: Callable[[int], tuple]) -> Arrays:
    """Stack the outputs of ``function(row)`` for every batch row."""
    outputs = [function(row) for row in range(rows)]
    return tuple(np.array(column) for column in zip(*outputs, strict=True))


def indices(outputs: Arrays) -> Arrays:
    return tuple(output.astype(np.int64) for output in outputs)


def bipartite_match(metric: np.ndarray, size: np.ndarray, r: int, prefix: int) -> Arrays:
    def one(row: int) -> tuple:
        x, empty = metric[row].astype(np.float64), size[row] == 0
        even = [i for i in range(prefix, len(x)) if i % 2 == 0]
        odd = [i for i in range(prefix, len(x)) if i % 2 == 1]
        score, partner = {}, {}
        for a in even:
            if empty[a]:
                score[a], partner[a] = np.inf, next((b for b in odd if empty[b]), odd[0])
            else:
                candidates = [b for b in odd if not empty[b]] or odd
                partner[a] = max(candidates, key=lambda b, a=a: cosine(x[a], x[b]))
                score[a] = cosine(x[a], x[partner[a]])
        drop = sorted(even, key=lambda a: -score[a])[:r]
        keep = [*range(prefix), *(a for a in even if a not in drop), *odd]
        return keep, drop, [keep.index(partner[a]) for a in drop]

    return indices(per_row(len(metric), one))


def energy_order(x: np.ndarray, empty: np.ndarray, prefix: int, margin: float) -> list[int]:
    """The unprotected tokens of one row, highest energy first, behind padding."""
    free = list(range(prefix, len(x)))
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    real = unit[[i for i in free if not empty[i]]]

    def energy(i: int) -> float:
        if empty[i]:
            return np.inf
        shifted = real @ unit[i] - margin
        return float(np.mean(np.where(shifted > 0, shifted, np.expm1(shifted))))

    return sorted(free, key=lambda i: -energy(i))


def energy_match(metric: np.ndarray, size: np.ndarray, r: int, prefix: int, margin: float) -> Arrays:
    def one(row: int) -> tuple:
        x, empty = metric[row].astype(np.float64), size[row] == 0
        order = energy_order(x, empty, prefix, margin)
        drop, other, rest = order[0 : 2 * r : 2], order[1 : 2 * r : 2], sorted(order[2 * r :])
        keep = [*range(prefix), *rest, *other]

        def partner(a: int) -> int:
            alike = [b for b in other if empty[b] == empty[a]] or other
            return max(alike, key=lambda b: cosine(x[a], x[b]))

        return keep, drop, [keep.index(partner(a)) for a in drop]

    return indices(per_row(len(metric), one))


def energy_bipartite_match(
    metric: np.ndarray, size: np.ndarray, r: int, prefix: int, margin: float
) -> Arrays:
    def one(row: int) -> tuple:
        x, empty = metric[row].astype(np.float64), size[row] == 0
        order = energy_order(x, empty, prefix, margin)
        even, odd = order[::2], order[1::2]
        score, partner = {}, {}
        for a in even:
            alike = [b for b in odd if empty[b] == empty[a]] or odd
            partner[a] = alike[0] if empty[a] else max(alike, key=lambda b, a=a: cosine(x[a], x[b]))
            score[a] = np.inf if empty[a] else cosine(x[a], x[partner[a]])
        drop = sorted(even, key=lambda a: -score[a])[:r]
        keep = [*range(prefix), *(a for a in even if a not in drop), *odd]
        return keep, drop, [keep.index(partner[a]) for a in drop]

    return indices(per_row(len(metric), one))


def farthest_point(metric: np.ndarray, size: np.ndarray, r: int, prefix: int, method: str) -> Arrays:
    def one(row: int) -> tuple:
        x, empty = metric[row].astype(np.float64), size[row] == 0
        free = list(range(prefix, len(x)))
        real = [i for i in free if not empty[i]]

        def distance(i: int, j: int) -> float:
            return 1 - cosine(x[i], x[j]) if method == "divprune" else float(np.linalg.norm(x[i] - x[j]))

        if not real:
            chosen = [free[0]]
        elif method == "divprune":
            chosen = [max(real, key=lambda i: min((distance(i, j) for j in real if j != i), default=np.inf))]
        else:
            mean = np.mean(x[real], axis=0)
            chosen = [min(real, key=lambda i: float(np.linalg.norm(x[i] - mean)))]
        while len(chosen) < len(free) - r:
            left = [i for i in real if i not in chosen]
            if left:
                chosen.append(max(left, key=lambda i: min(distance(i, j) for j in chosen)))
            else:
                chosen.append(next(i for i in free if i not in chosen))
        keep = [*range(prefix), *sorted(chosen)]
        return keep, [i for i in free if i not in chosen]

    return indices(per_row(len(metric), one))


def top_tokens(score: np.ndarray, r: int, prefix: int) -> Arrays:
    def one(row: int) -> tuple:
        order = sorted(range(prefix, score.shape[1]), key=lambda i: -score[row, i])
        count = len(order) - r
        return [*range(prefix), *order[:count]], order[count:]

    return indices(per_row(len(score), one))


def merge_tokens(
    x: np.ndarray, size: np.ndarray, keep: np.ndarray, drop: np.ndarray, dest: np.ndarray
) -> Arrays:
    def one(row: int) -> tuple:
        merged, sizes = [], []
        for slot, kept in enumerate(keep[row]):
            group = [kept, *(d for d, s in zip(drop[row], dest[row], strict=True) if s == slot)]
            weight = [float(size[row, i]) for i in group]
            total = sum(weight)
            mean = sum(w * x[row, i].astype(np.float64) for w, i in zip(weight, group, strict=True))
            merged.append(mean / total if total else 0 * mean)
            sizes.append(total)
        return merged, sizes

    return per_row(len(x), one)


def gather_tokens(x: np.ndarray, index: np.ndarray, dim: int) -> np.ndarray:
    shared = len(x) == 1
    return np.stack([np.take(x[0 if shared else row], index[row], axis=dim - 1) for row in range(len(index))])


def nearest_kept(metric: np.ndarray, keep: np.ndarray, drop: np.ndarray, prefix: int) -> np.ndarray:
    def one(row: int) -> tuple:
        x, slots = metric[row].astype(np.float64), range(prefix, keep.shape[1])
        return ([max(slots, key=lambda s: cosine(x[d], x[keep[row, s]])) for d in drop[row]],)

    return indices(per_row(len(metric), one))[0]


def source_map(keep: np.ndarray, drop: np.ndarray, dest: np.ndarray) -> np.ndarray:
    def one(row: int) -> tuple:
        slot = {old: new for new, old in enumerate(keep[row])}
        slot |= dict(zip(drop[row], dest[row], strict=True))
        return ([slot[old] for old in range(len(slot))],)

    return indices(per_row(len(keep), one))[0]


def log_size(size: np.ndarray) -> np.ndarray:
    tiny = float(np.finfo(np.float32).tiny)
    return np.log(np.maximum(size.astype(np.float64), tiny))[:, None, None, :]


def cache_write(cache: np.ndarray, new: np.ndarray, length: np.ndarray) -> np.ndarray:
    result = cache.copy()
    for row, start in enumerate(length):
        for i in range(new.shape[-2]):
            result[row, ..., start + i, :] = new[row, ..., i, :]
    return result


def move_entries(cache: np.ndarray, path: np.ndarray, length: np.ndarray) -> np.ndarray:
    result = cache.copy()
    for row, start in enumerate(length):
        for i, node in enumerate(path[row]):
            result[row, :, start + i] = cache[row, :, start + node]
    return result


def keep_slots(
    score: np.ndarray, used: np.ndarray, budget: np.ndarray, sinks: int, recent: int
) -> np.ndarray:
    result = np.zeros(score.shape, bool)
    for b, head in np.ndindex(score.shape[:2]):
        real = [slot for slot in range(used.shape[1]) if used[b, slot]]
        guarded = [slot for rank, slot in enumerate(real) if rank < sinks or rank >= len(real) - recent]
        others = sorted((slot for slot in real if slot not in guarded), key=lambda s: -score[b, head, s])
        result[b, head, (guarded + others)[: max(budget[b], 0)]] = True
    return result


def quantize_keys(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch, heads, slots, channels = x.shape
    codes = np.zeros(x.shape, np.uint8)
    scale, zero = np.zeros((2, batch, heads, slots * channels // group), np.float32)
    for b, h, g, c in np.ndindex(batch, heads, slots // group, channels):
        values = x[b, h, g * group : (g + 1) * group, c]
        low, step = values.min(), (values.max() - values.min()) / np.float32(255)
        scale[b, h, g * channels + c], zero[b, h, g * channels + c] = step, low
        codes[b, h, g * group : (g + 1) * group, c] = np.rint((values - low) / (step or 1))
    shape = (batch, heads, slots, channels // group)
    return codes, scale.reshape(shape), zero.reshape(shape)


def dequantize_keys(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    batch, heads, slots, channels = codes.shape
    group = channels // scale.shape[-1]
    scale, zero = (v.reshape(batch, heads, -1) for v in (scale, zero))
    x = np.zeros(codes.shape, np.float64)
    for b, h, s, c in np.ndindex(batch, heads, slots // group * group, channels):
        place = s // group * channels + c
        x[b, h, s, c] = float(codes[b, h, s, c]) * scale[b, h, place] + zero[b, h, place]
    return x


def latest_repeat(text: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for row, last in zip(text.tolist(), end.tolist(), strict=True):
        best = (0, -1)
        for place in range(last):
            agreed = 0
            while agreed < min(3, place + 1) and row[place - agreed] == row[last - agreed]:
                agreed += 1
            if agreed:
                best = max(best, (agreed, place))
        found.append(best)
    agreed, places = np.array(found, np.int64).reshape(-1, 2).T
    return places, agreed


def cache_mask(
    slots: np.ndarray, positions: np.ndarray, own: np.ndarray, length: np.ndarray, window: int
) -> np.ndarray:
    batch, tokens = positions.shape
    held = slots[..., 0]
    result = np.zeros((batch, held.shape[1], tokens, held.shape[2]), bool)
    for b, head, query, slot in np.ndindex(result.shape):
        new = slot - length[b]
        inside = 0 <= new < tokens
        at = positions[b, new] if inside else held[b, head, slot]
        seen = at >= 0 and (not window or positions[b, query] - at < window)
        result[b, head, query, slot] = query == new or (seen and (not inside or own[b, query, new]))
    return result


def dequantize_weight(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: int) -> np.ndarray:
    weight = np.zeros(codes.shape, np.float64)
    for out, i in np.ndindex(codes.shape):
        step, middle = scale[out, i // group], zero[out, i // group]
        weight[out, i] = (float(codes[out, i]) - float(middle)) * float(step)
    return weight.astype(np.float32)


def expert_linear(x: np.ndarray, chosen: np.ndarray, weight: np.ndarray) -> np.ndarray:
    made = np.zeros((*chosen.shape, weight.shape[1]))
    for token, place in np.ndindex(chosen.shape):
        if 0 <= chosen[token, place] < len(weight):
            row = x[token, place if x.shape[1] > 1 else 0].astype(np.float64)
            made[token, place] = weight[chosen[token, place]].astype(np.float64) @ row
    return made.astype(np.float32)


def quantize_int8(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    codes = np.zeros(x.shape, np.int8)
    for b, h, s, c in np.ndindex(x.shape):
        codes[b, h, s, c] = min(max(np.rint(x[b, h, s, c] / scale[h, 0, c]), -128), 127)
    return codes


def dequantize_int8(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (codes.astype(np.float64) * scale.astype(np.float64)).astype(np.float32)


def fake_quantize(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    codes = np.clip(np.rint(x.astype(np.float64) / scale) + zero, -128, 127)
    return ((codes - zero) * scale).astype(np.float32)


def fake_float8(x: np.ndarray, scale: float) -> np.ndarray:
    return (nearest_float8(x.astype(np.float64) / scale) * scale).astype(np.float32)


def nearest_float8(x: np.ndarray) -> np.ndarray:
    """By the definition of E4M3: the nearest multiple of the step between numbers of that exponent, 448 at most."""
    _, exponent = np.frexp(x)
    step = 2.0 ** (np.maximum(exponent - 1, -6) - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def dequantize_float8(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    codes = codes.astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return (np.where(codes < 128, size, -size) * scale).astype(np.float32)


def attention_mass(
    query: np.ndarray, key: np.ndarray, mask: np.ndarray, positions: np.ndarray, scale: float
) -> Arrays:
    def one(row: int) -> tuple:
        q, k = query[row].astype(np.float64), key[row].astype(np.float64)
        mass = np.zeros((k.shape[0], k.shape[1], 1))
        for head in range(len(q)):
            keys = head // (len(q) // len(k))
            sees = mask[row][head if len(mask[row]) > 1 else 0]
            for i in np.flatnonzero(positions[row] >= 0):
                weights = np.where(sees[i], np.exp(scale * k[keys] @ q[head, i]), 0)
                mass[keys, :, 0] += weights / weights.sum()
        return (mass.astype(np.float32),)

    return per_row(len(query), one)


def draw(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    result = np.full(uniform.shape, -1)
    for place in np.ndindex(uniform.shape):
        weights = [float(p) for p in probabilities[place]]
        reached = float(uniform[place]) * sum(weights)
        if sum(weights) > 0:
            result[place] = next(i for i in range(len(weights)) if sum(weights[: i + 1]) > reached)
    return result


def draw_tokens(
    logits: np.ndarray,
    uniform: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
) -> Arrays:
    token = draw(truncated_softmax(logits, temperature, top_k, top_p, min_p), uniform)
    wide = logits.astype(np.float64)
    softmax = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    chosen = np.take_along_axis(softmax, token[..., None], -1)[..., 0]
    return token, np.log(chosen).astype(np.float32)


def likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    result = np.zeros((*logits.shape[:2], count), np.int64)
    for place in np.ndindex(result.shape[:2]):
        result[place] = sorted(range(logits.shape[2]), key=lambda token: -logits[(*place, token)])[:count]
    return result


def truncated_softmax(
    logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray
) -> np.ndarray:
    result = np.zeros(logits.shape)
    for b, r in np.ndindex(logits.shape[:2]):
        order = sorted(range(logits.shape[2]), key=lambda token: -logits[b, r, token])
        if not temperature[b]:
            result[b, r, order[0]] = 1
            continue
        weight = np.exp((logits[b, r].astype(np.float64) - logits[b, r].max()) / temperature[b])
        kept = order[: int(top_k[b]) or None]
        mass, likely = 0.0, []
        for token in kept:
            if mass < top_p[b] * weight[kept].sum():
                likely.append(token)
                mass += weight[token]
        likely = [token for token in likely if weight[token] >= min_p[b]]
        result[b, r, likely] = weight[likely] / weight[likely].sum()
    return result.astype(np.float32)


def uniforms(seed: np.ndarray, stream: np.ndarray, counter: np.ndarray, count: int) -> np.ndarray:
    """Threefry-2x32 with 20 rounds, as its authors write it, in Python's own integers."""
    word, rotations = 2**32, [13, 15, 26, 6, 17, 29, 16, 24]
    result = np.zeros((len(seed), count), np.float32)
    for row, i in np.ndindex(result.shape):
        key = [int(seed[row]) % word, int(stream[row]) % word]
        key.append(key[0] ^ key[1] ^ 0x1BD11BDA)
        x = [(int(counter[row]) + i + key[0]) % word, ((int(seed[row]) >> 32) + key[1]) % word]
        for turn in range(20):
            x[0] = (x[0] + x[1]) % word
            bits = rotations[turn % 8]
            x[1] = (x[1] << bits | x[1] >> (32 - bits)) % word ^ x[0]
            if turn % 4 == 3:
                s = turn // 4 + 1
                x = [(x[0] + key[s % 3]) % word, (x[1] + key[(s + 1) % 3] + s) % word]
        result[row, i] = (x[0] >> 8) / 2**24
    return result
