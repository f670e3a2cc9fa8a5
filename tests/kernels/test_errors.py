"""Arguments outside the contract raise InputError, one sentence, before any maths."""

import pytest
import torch

from tokopt.errors import InputError
from tokopt.kernels import ops

METRIC, SIZE = torch.ones(2, 9, 4), torch.ones(2, 9)
X, INDEX = METRIC, torch.zeros(2, 3, dtype=torch.int64)

BAD = {
    "r too large": (lambda: ops.bipartite_match(METRIC, SIZE, 5, 1), "r=5 is more than the 4 tokens"),
    "r negative": (lambda: ops.energy_match(METRIC, SIZE, -1, 1, 0.5), "r=-1 is negative"),
    "prefix negative": (lambda: ops.bipartite_match(METRIC, SIZE, 1, -1), "prefix=-1 is negative"),
    "nothing unprotected": (
        lambda: ops.bipartite_match(METRIC, SIZE, 0, 8),
        "fewer than 2 beside",
    ),
    "nothing kept": (lambda: ops.farthest_point(METRIC, SIZE, 8, 1, "kcenter"), "more than the 7 tokens"),
    "unknown method": (
        lambda: ops.farthest_point(METRIC, SIZE, 1, 1, "best"),
        "use one of divprune",
    ),
    "score r": (lambda: ops.top_tokens(SIZE, 9, 1), "r=9 is more than the 8 tokens"),
    "score rank": (lambda: ops.top_tokens(METRIC, 1, 1), "score must be [batch, tokens]"),
    "metric rank": (
        lambda: ops.bipartite_match(SIZE, SIZE, 1, 1),
        "metric must be [batch, tokens",
    ),
    "cache rank": (lambda: ops.cache_write(METRIC, X[0], INDEX[:, 0]), "cache and new must be [batch"),
    "text rank": (
        lambda: ops.latest_repeat(INDEX[0].int(), INDEX[:, 0]),
        "text must be [batch, size] and end [batch], got 1 and 1",
    ),
    "path rank": (
        lambda: ops.move_entries(METRIC, INDEX, INDEX[:, 0]),
        "cache must be [batch, heads, slots, channels]",
    ),
    "mask rank": (
        lambda: ops.cache_mask(X, INDEX, INDEX, INDEX[:, 0], 0),
        "slots must be [batch, heads, slots, 1]",
    ),
    "window negative": (
        lambda: ops.cache_mask(INDEX[:, None, :, None], INDEX, INDEX[:, :, None] > 0, INDEX[:, 0], -1),
        "window=-1 is negative",
    ),
    "keep rank": (lambda: ops.keep_slots(METRIC[0], SIZE > 0, INDEX[:, 0], 0, 0), "used [batch, slots]"),
    "experts rank": (
        lambda: ops.expert_linear(METRIC, INDEX, SIZE),
        "weight [experts, out, in], got 3, 2 and 2",
    ),
    "experts inputs": (
        lambda: ops.expert_linear(METRIC, INDEX, METRIC[..., :3]),
        "x has 4 inputs and weight 3",
    ),
    "experts tokens": (lambda: ops.expert_linear(METRIC[:1], INDEX, METRIC), "x has 1 tokens and chosen 2"),
    "experts rows": (lambda: ops.expert_linear(METRIC, INDEX, METRIC), "x has 9 rows for each token"),
    "weight groups": (
        lambda: ops.dequantize_weight(INDEX.byte(), SIZE[:, :1], INDEX[:, :1].byte(), 2),
        "3 inputs are not 1 groups of 2",
    ),
    "weight rank": (
        lambda: ops.dequantize_weight(X.byte(), SIZE, INDEX.byte(), 1),
        "codes must be [out, in]",
    ),
    "group 0": (
        lambda: ops.dequantize_weight(INDEX.byte(), SIZE, INDEX.byte(), 0),
        "group=0 must be positive",
    ),
    "scale 0": (lambda: ops.fake_quantize(X, 0.0, 0), "scale=0.0 must be positive"),
    "float8 scale": (lambda: ops.fake_float8(X, -1.0), "scale=-1.0 must be positive"),
    "float8 sizes": (
        lambda: ops.dequantize_float8(INDEX.byte(), SIZE[:, :1].T),
        "codes must be [out, in] and scale [out, 1], got [2, 3] and [1, 2]",
    ),
    "float8 codes": (
        lambda: ops.dequantize_float8(INDEX, SIZE[:, :1]),
        "codes must be bytes (uint8), got torch.int64",
    ),
    "zero far": (lambda: ops.fake_quantize(X, 1.0, 128), "zero=128 must be -128 to 127"),
    "scale sizes": (
        lambda: ops.quantize_int8(X[:, None], SIZE[:, None, :4]),
        "scale [heads, 1, channels], got [2, 1, 9, 4] and [2, 1, 4]",
    ),
    "codes rank": (lambda: ops.dequantize_int8(X.to(torch.int8), X), "codes must be [batch, heads, slots"),
    "sinks negative": (lambda: ops.keep_slots(METRIC, INDEX > 0, INDEX[:, 0], -1, 0), "sinks=-1"),
    "other tokens": (
        lambda: ops.energy_match(METRIC, SIZE[:, 1:], 1, 1, 0.5),
        "tokens=9 and size",
    ),
    "other batch": (lambda: ops.bipartite_match(METRIC, SIZE[:1], 1, 1), "batch=2 and size has batch=1"),
    "no dest": (lambda: ops.merge_tokens(X, SIZE, INDEX, INDEX, INDEX[:, 1:]), "3 drops and 2 dests"),
    "merge rank": (lambda: ops.merge_tokens(SIZE, SIZE, INDEX, INDEX, INDEX), "x must be [batch, tokens"),
    "merge tokens": (
        lambda: ops.merge_tokens(X[:, 1:], SIZE, INDEX, INDEX, INDEX),
        "8 tokens and size 9",
    ),
    "dim 0": (lambda: ops.gather_tokens(METRIC, INDEX, 0), "dim=0 is not a token axis"),
    "dim 3": (lambda: ops.gather_tokens(METRIC, INDEX, 3), "use 1 to 2"),
    "index rank": (lambda: ops.gather_tokens(METRIC, INDEX[0], 1), "index must be [batch, kept]"),
    "gather batch": (lambda: ops.gather_tokens(METRIC, INDEX[[0, 0, 0]], 1), "batch=2 and index batch=3"),
    "kept prefix only": (lambda: ops.nearest_kept(METRIC, INDEX, INDEX, 3), "fewer than 1 beside"),
    "nearest rank": (lambda: ops.nearest_kept(SIZE, INDEX, INDEX, 1), "metric must be [batch, tokens"),
    "source dests": (lambda: ops.source_map(INDEX, INDEX, INDEX[:, 1:]), "3 drops and 2 dests"),
    "source rank": (lambda: ops.source_map(INDEX[0], INDEX, INDEX), "must be [batch, tokens]"),
    "size rank": (lambda: ops.log_size(METRIC), "size must be [batch, tokens]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str):
    call, words = BAD[name]
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert message.startswith("tokopt::")
    assert message.count(". ") == 0, "one sentence"
    assert message.endswith(".")


def test_bad_arguments_are_refused_at_export():
    """The fake kernel checks too: a wrong r is found while a pass re-exports, not when the model runs."""

    class Model(torch.nn.Module):
        def forward(self, metric: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return ops.bipartite_match(metric, size, 5, 1)

    with pytest.raises(InputError, match="r=5 is more than the 4 tokens"):
        torch.export.export(Model(), (METRIC, SIZE), strict=False)
