"""Random damage: to bytes, and to values of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300)
TEXTS = (
    "",
    " ",
    "batch",
    "tokens",
    "n",
    "state",
    "../x",
    "/etc/passwd",
    "a\n",
    "\0",
    "é",
    "\ud800",
    "x" * 2000,
    "{}",
)


def damage_bytes(rng: Random, data: bytes) -> bytes:
    """Bits flipped, or a stretch removed, doubled, zeroed, or filled with noise; never the same."""
    changed = bytearray(data)
    while bytes(changed) == data:
        start = rng.randrange(len(data) + 1)
        end = min(start + rng.choice((1, 4, 64, len(data))), len(data))
        match rng.randrange(6):
            case 0:
                for _ in range(rng.choice((1, 1, 2, 8))):
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = data[start:end]
            case 3:
                changed[start:end] = bytes(end - start)
            case 4:
                changed[start:end] = rng.randbytes(end - start)
            case _:
                changed += rng.randbytes(rng.choice((1, 100)))
        if not changed:
            return b""
    return bytes(changed)


def damage_json(rng: Random, value: Any, times: int = 1) -> Any:
    """A copy with a few values changed, removed, doubled, swapped or renamed."""
    made = deepcopy(value)
    for _ in range(times):
        places = [
            (p, key) for p in _containers(made) for key in (p if isinstance(p, dict) else range(len(p)))
        ]
        if places:
            _damage_at(rng, made, *rng.choice(places))
    return made


def any_value(rng: Random) -> Any:
    """Whatever JSON can hold."""
    return rng.choice([None, True, False, [], {}, [1], {"a": 1}, rng.choice(NUMBERS), rng.choice(TEXTS)])


def _containers(value: Any) -> list[Any]:
    found, todo = [], [value]
    while todo:
        item = todo.pop()
        if isinstance(item, (dict, list)):
            found.append(item)
            todo += item.values() if isinstance(item, dict) else item
    return found


def _damage_at(rng: Random, whole: Any, place: Any, key: Any) -> None:
    match rng.randrange(7):
        case 0:
            place[key] = any_value(rng)
        case 1:
            del place[key]
        case 2:
            other = rng.choice(_containers(whole))
            place[key] = deepcopy(rng.choice([*(other.values() if isinstance(other, dict) else other), 0]))
        case 3 if isinstance(place[key], (int, float)) and not isinstance(place[key], bool):
            place[key] = rng.choice(
                [place[key] + 1, place[key] - 1, place[key] * 2, -place[key], rng.choice(NUMBERS)]
            )
        case 3 | 4 if isinstance(place, dict):
            place[rng.choice([*place, *TEXTS])] = place.pop(key)
        case 5 if isinstance(place, list):
            place.insert(rng.randrange(len(place) + 1), deepcopy(place[key]))
        case 6 if isinstance(place, list):
            rng.shuffle(place)
        case _:
            place[key] = not place[key]


def change_meaning(rng: Random, value: Any, times: int = 1) -> Any:
    """A copy with a few facts changed to others of their type: seen at the same key elsewhere, or next to it."""
    made = deepcopy(value)
    for _ in range(times):
        leaves = list(_leaves(made))
        if not leaves:
            return made
        place, key, name = rng.choice(leaves)
        old = place[key]
        new = _plausible(rng, old, [p[k] for p, k, other in leaves if other == name])
        everywhere = rng.random() < 0.4
        for p, k, other in leaves:
            same = type(p[k]) is type(old) and p[k] == old and other == name
            if (p is place and k == key) or (everywhere and same):
                p[k] = deepcopy(new)
        if rng.random() < 0.3:
            _drop(rng, made)
    return made


def _plausible(rng: Random, old: Any, seen: list[Any]) -> Any:
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)) and rng.random() < 0.6:
        near = [old + 1, max(old - 1, 0), old * 2, old // 2, 0, 1, 2, 3, 64, 2**20, 2**31, 2**40]
        return type(old)(rng.choice(near))
    return rng.choice([*seen, None] if rng.random() < 0.8 else ["batch", "tokens", "n", "slots", 0, 1, 4])


def _drop(rng: Random, whole: Any) -> None:
    """Remove an item of a list, and perhaps all that speak of it by its name."""
    lists = [item for item in _containers(whole) if isinstance(item, list) and item]
    if not lists:
        return
    gone = (chosen := rng.choice(lists)).pop(rng.randrange(len(chosen)))
    if isinstance(gone, dict) and "name" in gone and rng.random() < 0.7:
        for items in lists:
            items[:] = [i for i in items if not isinstance(i, dict) or gone["name"] not in i.values()]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Container, key, and the name of the nearest field, of everything that is no container, or an empty one."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        inner = str(key) if isinstance(value, dict) else name
        if isinstance(item, (dict, list)) and item:
            yield from _leaves(item, inner)
        else:
            yield value, key, inner
