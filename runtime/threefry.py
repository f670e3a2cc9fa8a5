"""Random numbers that follow from a counter: those of the op ``tokopt::uniforms``, for a host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def uniforms(
    seed: NDArray[np.int64], stream: NDArray[np.int64], counter: NDArray[np.int64], count: int
) -> NDArray[np.float32]:
    """The numbers ``counter .. counter + count - 1`` of every row's stream [batch, count], in [0, 1).

    ``seed``, ``stream`` and ``counter`` are [batch]. Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), keyed by
    the lower word of the seed and the stream; what is encrypted is the counter and the upper word of the seed. The
    upper 24 bits of the first word of the result count.
    """
    first, second = (words.astype(np.uint32)[:, None] for words in (seed, stream))
    keys = (first, second, first ^ second ^ np.uint32(_PARITY))
    number = counter[:, None] + np.arange(count)
    x = number.astype(np.uint32) + keys[0]
    y = (seed[:, None] >> 32).astype(np.uint32) + keys[1]
    for turn in range(20):
        bits = _ROTATIONS[turn % 8]
        x = x + y
        y = (y << np.uint32(bits) | y >> np.uint32(32 - bits)) ^ x
        if turn % 4 == 3:
            group = turn // 4 + 1
            x = x + keys[group % 3]
            y = y + keys[(group + 1) % 3] + np.uint32(group)
    return ((x >> np.uint32(8)) * 2.0**-24).astype(np.float32)
