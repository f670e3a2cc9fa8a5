"""Random numbers that follow from a counter."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse

WORD = 2**32 - 1
"""The largest 32-bit word."""

PARITY = 0x1BD11BDA
"""The constant of Threefry's key schedule."""

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
"""By how many bits the rounds of Threefry-2x32 rotate, four rounds at a time."""


def uniforms(seed: Tensor, stream: Tensor, counter: Tensor, count: int) -> Tensor:
    """The numbers ``counter .. counter + count - 1`` of every row's stream, in [0, 1).

    Threefry-2x32 with 20 rounds (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"): the same on
    every machine and in every form. The key is the lower word of the seed and the stream; what is encrypted is the
    counter and the upper word of the seed. Of the first word of the result the upper 24 bits count.

    Args:
        seed: [batch] int64, not negative.
        stream: [batch] int64 below 2**32, which of the seed's streams a row draws from.
        counter: [batch] int64; counters that differ by 2**32 give the same number.
        count: numbers of each row.

    Returns:
        [batch, count] float32, multiples of 2**-24.

    Raises:
        InputError: numbers of dimensions that disagree, or a negative count.
    """
    check(seed, stream, counter, count)
    number = counter[:, None] + torch.arange(count, device=counter.device)
    word = threefry((seed[:, None], stream[:, None]), (number, (seed >> 32)[:, None]))
    return (word >> 8).float() * 2.0**-24


def threefry(key: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor]) -> Tensor:
    """The first word of a block of two words (int64, of which the lower 32 bits count), encrypted."""
    keys = [key[0] & WORD, key[1] & WORD]
    keys.append(keys[0] ^ keys[1] ^ PARITY)
    x, y = (block[0] + keys[0]) & WORD, (block[1] + keys[1]) & WORD
    for group in range(5):
        for bits in ROTATIONS[group % 2]:
            x = (x + y) & WORD
            y = ((y << bits) & WORD | (y >> (32 - bits))) ^ x
        x = (x + keys[(group + 1) % 3]) & WORD
        y = (y + keys[(group + 2) % 3] + group + 1) & WORD
    return x


def fake(seed: Tensor, stream: Tensor, counter: Tensor, count: int) -> Tensor:
    """An empty output of the right shape."""
    check(seed, stream, counter, count)
    return torch.empty((seed.shape[0], count), dtype=torch.float32, device=seed.device)


def check(seed: Tensor, stream: Tensor, counter: Tensor, count: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (seed.ndim, stream.ndim, counter.ndim) != (1, 1, 1),
        "tokopt::uniforms: seed, stream and counter must be [batch], got "
        f"{seed.ndim}, {stream.ndim} and {counter.ndim} dimensions.",
    )
    refuse(count < 0, f"tokopt::uniforms: count={count} is negative; give how many numbers a row needs.")
