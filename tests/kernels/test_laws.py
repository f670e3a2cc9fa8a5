"""What must hold for any tokens: conservation, identity limits, padding, order, exactness on duplicates."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from tests.kernels import naive
from tests.kernels.forms import CASES, FORMS, Case, expected, float8_world, world
from tokopt.kernels import ops

MATCHING = [case for case in CASES if case.op.endswith("_match")]
PRUNING = [case for case in CASES if case.op in ("farthest_point", "top_tokens")]
matching = pytest.mark.parametrize("case", MATCHING, ids=str)
pruning = pytest.mark.parametrize("case", PRUNING, ids=str)
selecting = pytest.mark.parametrize("case", MATCHING + PRUNING, ids=str)
seeds = st.integers(0, 99)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def select(case: Case, arguments: dict) -> tuple[Tensor, ...]:
    return getattr(ops, case.op)(*arguments.values())


@selecting
@given(free=st.integers(2, 30), batch=st.integers(1, 3), share=st.floats(0, 1), seed=seeds)
def test_keep_and_drop_are_all_tokens_once(case: Case, free: int, batch: int, share: float, seed: int):
    """Keep and drop partition the tokens, the prefix stays first in order, and dest is a slot behind it."""
    tokens, r = case.prefix + free, int(share * case.most(free))
    keep, drop, *dest = select(case, world(case, batch, tokens, r, seed, padding=seed % 3))
    assert keep.shape == (batch, tokens - r)
    assert drop.shape == (batch, r)
    assert torch.equal(torch.cat([keep, drop], 1).sort(1).values, torch.arange(tokens).expand(batch, tokens))
    assert torch.equal(keep[:, : case.prefix], torch.arange(case.prefix).expand(batch, case.prefix))
    for slots in dest:
        assert slots.shape == drop.shape
        assert bool(((slots >= case.prefix) & (slots < tokens - r)).all())


@matching
@given(free=st.integers(2, 30), batch=st.integers(1, 3), share=st.floats(0, 1), seed=seeds)
def test_merging_conserves_size_and_mass(case: Case, free: int, batch: int, share: float, seed: int):
    """Sizes sum to what they summed to, exactly; so does size * x, within rounding."""
    tokens, r = case.prefix + free, int(share * (free // 2))
    arguments = world(case, batch, tokens, r, seed, padding=seed % 3)
    size, x = arguments["size"], normal(batch, tokens, 5, seed=seed)
    merged, new_size = ops.merge_tokens(x, size, *select(case, arguments))
    assert torch.equal(new_size.sum(1), size.sum(1))
    torch.testing.assert_close(
        (merged * new_size[..., None]).sum(1), (x * size[..., None]).sum(1), rtol=1e-5, atol=1e-4
    )


@selecting
def test_removing_nothing_only_reorders(case: Case):
    """r = 0: the merged tokens are the tokens bit for bit, in the order of keep."""
    arguments = world(case, 2, case.prefix + 9, 0, seed=1)
    keep, drop, *_ = select(case, arguments)
    x, size = normal(2, case.prefix + 9, 5), torch.full((2, case.prefix + 9), 3.0)
    merged, new_size = ops.merge_tokens(x, size, keep, drop, drop)
    assert torch.equal(merged, ops.gather_tokens(x, keep, 1))
    assert torch.equal(new_size, size)
    if case.op == "farthest_point":
        assert torch.equal(merged, x)


@pytest.mark.parametrize("form", FORMS)
def test_merging_duplicates_leaves_attention_unchanged(form: str):
    """Attention over merged exact duplicates with the log-size bias equals attention over the originals."""

    def run(op: str, *arguments: object, **static: object) -> list[Tensor]:
        case = next(case for case in CASES if case.op == op and case.static == static)
        given = dict(zip(case.arguments, (*arguments, *static.values()), strict=True))
        return [torch.from_numpy(output) for output in FORMS[form](case, given)]

    half = 12
    metric, size = normal(2, 1 + 2 * half, 8), torch.ones(2, 1 + 2 * half)
    twin = torch.randperm(half, generator=torch.Generator().manual_seed(3))
    metric[:, 2::2] = metric[:, 1::2][:, twin]
    value = torch.cat([metric, metric.cos()], dim=2)
    merged, new_size = run("merge_tokens", value, size, *run("bipartite_match", metric, size, half, prefix=1))
    assert torch.equal(new_size, torch.tensor([1.0] + [2.0] * half).expand(2, -1))
    query = normal(2, 1, 5, 8, seed=9)

    def attend(x: Tensor, bias: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(query, x[:, None, :, :8], x[:, None], attn_mask=bias)

    full = attend(value, None)
    assert float((attend(merged, run("log_size", new_size)[0]) - full).abs().max()) < 1e-6
    assert float((attend(merged, None) - full).abs().max()) > 1e-3


@matching
@given(free=st.integers(4, 20), half=st.integers(1, 3), share=st.floats(0, 1), seed=seeds)
def test_padding_behind_the_tokens_changes_no_real_merge(
    case: Case, free: int, half: int, share: float, seed: int
):
    """2 k paddings use up k of the r merges; the others are the merges without padding."""
    r = int(share * (free // 2))
    plain = world(case, 2, case.prefix + free, r, seed)
    padded = {**plain, "r": r + half}
    padded["metric"] = pad(plain["metric"], (0, 0, 0, 2 * half))
    padded["size"] = pad(plain["size"], (0, 2 * half))
    keep, drop, dest = select(case, plain)
    padded_keep, padded_drop, padded_dest = select(case, padded)
    tokens = case.prefix + free
    assert bool((padded_drop[:, :half] >= tokens).all())
    assert torch.equal(padded_drop[:, half:], drop)
    joined = padded_keep.gather(1, padded_dest)
    assert bool((joined[:, :half] >= tokens).all())
    assert torch.equal(joined[:, half:], keep.gather(1, dest))


@pruning
@given(free=st.integers(3, 20), padding=st.integers(1, 5), share=st.floats(0, 1), seed=seeds)
def test_padding_is_kept_last(case: Case, free: int, padding: int, share: float, seed: int):
    """Dropping ``padding`` more tokens of a padded batch keeps what is kept without padding."""
    r = int(share * (free - 1))
    plain = world(case, 2, case.prefix + free, r, seed)
    padded = {**plain, "r": r + padding}
    if "metric" in plain:
        padded["metric"] = pad(plain["metric"], (0, 0, 0, padding))
        padded["size"] = pad(plain["size"], (0, padding))
    else:
        padded["score"] = pad(plain["score"], (0, padding), value=-torch.inf)
    assert torch.equal(select(case, padded)[0], select(case, plain)[0])


@matching
def test_rows_of_padding_only_give_zeros(case: Case):
    """No NaN where all sizes and all vectors are zero."""
    arguments = world(case, 2, case.prefix + 8, 3, seed=0)
    arguments |= {name: torch.zeros_like(arguments[name]) for name in ("metric", "size")}
    x = normal(2, case.prefix + 8, 4)
    merged, size = ops.merge_tokens(x, arguments["size"], *select(case, arguments))
    assert torch.equal(merged, torch.zeros_like(merged))
    assert torch.equal(size, torch.zeros_like(size))
    assert bool(ops.log_size(size).isfinite().all())


@pytest.mark.parametrize("method", ["divprune", "kcenter"])
@given(free=st.integers(3, 24), seed=seeds, share=st.floats(0, 1))
def test_farthest_point_follows_a_permutation(method: str, free: int, seed: int, share: float):
    """Permuting the unprotected tokens permutes the chosen ones, as long as no choice is a tie."""
    metric, size, r = normal(1, 1 + free, 6, seed=seed), torch.ones(1, 1 + free), int(share * (free - 1))
    if method == "divprune":
        # DivPrune's first choice is a tie if the most remote token is its nearest one's nearest too.
        unit = normalize(metric[0, 1:], dim=-1)
        near = (unit @ unit.mT).fill_diagonal_(-2).max(dim=-1)
        remote = near.values.argmin()
        assume(near.indices[near.indices[remote]] != remote)
    shuffle = torch.randperm(free, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + shuffle])
    kept = ops.farthest_point(metric, size, r, 1, method)[0][0]
    moved = ops.farthest_point(metric[:, order], size, r, 1, method)[0][0]
    assert sorted(order[moved].tolist()) == kept.tolist()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_kcenter_covers_within_twice_the_optimum(seed: int, count: int):
    """No token is farther from the chosen ones than twice the best possible radius (brute force)."""
    x = normal(1, 9, 2, seed=seed)
    keep = ops.farthest_point(x, torch.ones(1, 9), 9 - count, 0, "kcenter")[0][0]
    distance = torch.cdist(x[0], x[0])

    def radius(centres: list[int]) -> float:
        return float(distance[:, centres].min(dim=1).values.max())

    best = min(radius(list(centres)) for centres in combinations(range(9), count))
    assert radius(keep.tolist()) <= 2 * best + 1e-6


@matching
def test_source_map_puts_merged_tokens_back(case: Case):
    """On the old grid every token shows its group's mean, and groups are what dest says."""
    arguments = world(case, 2, case.prefix + 12, 5, seed=2)
    keep, drop, dest = select(case, arguments)
    x = normal(2, case.prefix + 12, 4)
    merged, _ = ops.merge_tokens(x, arguments["size"], keep, drop, dest)
    grid = ops.gather_tokens(merged, ops.source_map(keep, drop, dest), 1)
    assert torch.equal(ops.gather_tokens(grid, keep, 1), merged)
    assert torch.equal(ops.gather_tokens(grid, drop, 1), ops.gather_tokens(merged, dest, 1))


def test_log_size_of_one_is_exactly_zero():
    """Unmerged tokens get no bias at all."""
    assert torch.equal(ops.log_size(torch.ones(2, 3)), torch.zeros(2, 1, 1, 3))


@pytest.mark.parametrize("form", FORMS)
def test_float8_rounds_as_pytorch_casts(form: str):
    """On every number of E4M3, halfway between two and right beside it, and beyond 448, which is the end."""
    numbers = torch.arange(256).byte().view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    halves = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(halves, halves + side) for side in (-1, 1)]
    beyond = torch.tensor([449.0, 464.0, 480.0, 1e9, float("inf")])
    x = torch.cat([numbers, halves, *beside, beyond, -beyond, torch.tensor([float("nan")])])
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    case = Case("fake_float8", {"scale": 1.0})
    (got,) = FORMS[form](case, {"x": x.repeat(6).view(2, -1, 3), "scale": 1.0})
    np.testing.assert_array_equal(got.ravel()[: len(x)], wanted.numpy())
    np.testing.assert_array_equal(wanted.numpy(), naive.nearest_float8(x.double().numpy()))
    assert len(numbers) == 254 and bool((wanted[len(x) - 11 : -1].abs() == 448).all())


def test_float8_bytes_are_those_of_pytorch():
    """Every byte, NaN among them."""
    codes = torch.arange(256).byte().view(8, 32)
    (got,) = FORMS["onnx"](
        Case("dequantize_float8", inputs=float8_world()), {"codes": codes, "scale": torch.ones(8, 1)}
    )
    np.testing.assert_array_equal(got, codes.view(torch.float8_e4m3fn).float().numpy())


def test_gather_keeps_every_dtype_bit_for_bit():
    index = torch.tensor([[2, 0]])
    for dtype in (torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float64):
        x = normal(1, 3, 4).to(dtype)
        assert torch.equal(ops.gather_tokens(x, index, 1), x[:, [2, 0]])
    assert np.array_equal(ops.gather_tokens(torch.eye(3)[None], index, 2)[0].numpy(), np.eye(3)[:, [2, 0]])


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_that_nobody_chose_is_not_read(form: str) -> None:
    case = next(case for case in CASES if case.op == "expert_linear")
    arguments = world(case, 2, 9, 0, seed=0)
    arguments["chosen"] = arguments["chosen"] % 2 * 2
    want = expected(case, arguments)
    arguments["weight"][1] = torch.nan
    np.testing.assert_allclose(FORMS[form](case, arguments)[0], want[0], rtol=1e-5, atol=1e-6)
