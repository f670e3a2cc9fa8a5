"""The experts' linear on every instruction set: rows meet what they chose; sharing, bad input, sanitizers."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto

from tests.kernels.linears import (
    CONSTANTS,
    FAILURES,
    Linear,
    chosen_model,
    naive,
    needs_library,
    nmse,
    packed_bytes,
    random_linear,
    random_rows,
    session,
    unaligned,
)
from tests.kernels.sanitizers import check_watched, examples, skip_when_watched
from tokopt.kernels import cpu

pytestmark = needs_library
every_isa = pytest.mark.parametrize("isa", cpu.isas() if cpu.library() else [])


@dataclass(frozen=True)
class Experts:
    """The constants of all experts, one below another, and how many there are."""

    linear: Linear
    count: int

    def alone(self, expert: int) -> Linear:
        """One expert's own constants."""
        every = self.linear.constants
        return self.linear.but(**{n: np.split(given, self.count)[expert] for n, given in every.items()})

    def want(self, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """[tokens, k, out] in float64, pair by pair; x is [tokens, in] or [tokens, k, in]."""
        width = self.linear.constants["codes"].shape[0] // self.count // (2 if self.linear.gate else 1)
        made = np.zeros((*chosen.shape, width))
        for token, place in np.ndindex(chosen.shape):
            if 0 <= chosen[token, place] < self.count:
                row = x[token] if x.ndim == 2 else x[token, place]
                made[token, place] = naive(self.alone(int(chosen[token, place])), row[None])[0]
        return made

    def model(self, *, share: bool = False, **attributes: int) -> ModelProto:
        """One node of the op."""
        given = {**self.linear.attributes, "experts": self.count, **attributes}
        return chosen_model("ExpertLinear", CONSTANTS, self.linear.constants, given, share=share)

    def run(self, given: Mapping[str, np.ndarray], isa: str = "", threads: int = 1) -> np.ndarray:
        (y,) = session(self.model(share="share" in given), isa, threads).run(None, dict(given))
        return np.asarray(y)


def experts(count: int = 3, outputs: int = 18, **kind: object) -> Experts:
    return Experts(random_linear(0, count * outputs, 2, **kind), count)  # type: ignore[arg-type]


@every_isa
@examples(40)
@given(st.data())
def test_every_row_meets_the_experts_that_it_chose(isa: str, data: st.DataObject) -> None:
    """Any number of tokens and experts, numbers that are no expert among them, one row for all or a row for each."""
    tokens = data.draw(st.sampled_from([0, 1, 2, 5, 9, 40, 70]), "tokens")
    count, k = data.draw(st.integers(1, 6), "experts"), data.draw(st.integers(1, 3), "k")
    gate = data.draw(st.sampled_from(["", "silu", "gelu"]), "gate")
    own = Experts(
        random_linear(
            data.draw(st.integers(0, 99), "seed"),
            count * data.draw(st.integers(1, 20), "outputs") * (2 if gate else 1),
            data.draw(st.integers(1, 3), "groups"),
            bits=data.draw(st.sampled_from([4, 8]), "bits"),
            offset=data.draw(st.sampled_from(["symmetric", "zero", "minimum"]), "offset"),
            bias=data.draw(st.booleans(), "bias"),
            gate=gate,
        ),
        count,
    )
    random = np.random.default_rng(data.draw(st.integers(0, 99), "seed of x"))
    chosen = random.integers(-1, count + 2, (tokens, k))
    shared = data.draw(st.booleans(), "shared")
    rows = random_rows(int(random.integers(99)), tokens * (1 if shared else k), own.linear)
    x = rows if shared else rows.reshape(tokens, k, own.linear.inputs)
    fed = {"x": unaligned(x) if data.draw(st.booleans(), "unaligned") else x, "chosen": chosen}
    got = own.run(fed, isa, data.draw(st.sampled_from([1, 2]), "threads"))
    want = own.want(x, chosen)
    plain = Experts(Linear(own.linear.constants, own.linear.bits, own.linear.group), count).want(x, chosen)
    assert got.shape == want.shape and got.dtype == np.float32
    assert ((got - want) ** 2).sum() <= 1e-11 * max((want**2).sum() + (plain**2).sum(), 1e-30)


@every_isa
def test_what_experts_made_is_summed_by_their_shares(isa: str) -> None:
    own, random = experts(4), np.random.default_rng(0)
    x = random_rows(1, 33, own.linear).reshape(11, 3, -1)
    chosen, share = random.integers(-1, 5, (11, 3)), random.uniform(-1, 1, (11, 3)).astype(np.float32)
    got = own.run({"x": x, "chosen": chosen, "share": share}, isa)
    want = (own.want(x, chosen) * share[..., None]).sum(1)
    assert got.shape == (11, 18) and nmse(got, want) < 1e-11


@every_isa
def test_a_token_gets_the_same_bits_beside_any_others(isa: str) -> None:
    """So a draft of many tokens is verified as one token would have been."""
    own, random = experts(2, 64), np.random.default_rng(0)
    x, chosen = random_rows(1, 40, own.linear), random.integers(0, 2, (40, 2))
    together = session(own.model(), isa)
    (whole,) = together.run(None, {"x": x, "chosen": chosen})
    for token in range(0, 40, 7):
        one = slice(token, token + 1)
        (alone,) = together.run(None, {"x": x[one], "chosen": chosen[one]})
        np.testing.assert_array_equal(np.asarray(alone)[0], np.asarray(whole)[token])


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    own = experts()
    x, chosen = random_rows(1, 9, own.linear), np.zeros((9, 1), np.int64)
    want = own.want(x, chosen)
    x[4, 40] = np.nan
    got, others = own.run({"x": x, "chosen": chosen}), np.arange(9) != 4
    assert np.isnan(got[4]).all() and nmse(got[others], want[others]) < 1e-11


def test_an_expert_that_nobody_chose_is_not_read() -> None:
    own, spoiled = experts(4), experts(4).linear.constants["scale"].copy()
    spoiled[18:36] = np.nan  # of expert 1
    x, chosen = random_rows(1, 9, own.linear), np.random.default_rng(0).choice([0, 2, 3], (9, 2))
    got = Experts(own.linear.but(scale=spoiled), 4).run({"x": x, "chosen": chosen})
    assert nmse(got, own.want(x, chosen)) < 1e-11


def test_sessions_share_packed_weights() -> None:
    gc.collect()
    before, own = packed_bytes(), experts(4, 64)
    sessions = [session(own.model()), session(own.model(share=True))]
    assert packed_bytes() - before >= own.linear.constants["codes"].nbytes
    once = packed_bytes()
    sessions.append(session(own.model()))
    assert packed_bytes() == once
    del sessions
    gc.collect()
    assert packed_bytes() == before


def test_outputs_that_experts_cannot_share_are_refused() -> None:
    own = experts(3, 6)
    with pytest.raises(FAILURES, match="not those of experts=4 with as many outputs each") as caught:
        session(own.model(experts=4))
    assert "tokopt.cpu::ExpertLinear 'experts': " in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"chosen": (3,)}, r"chosen must be \[tokens, k\], got \[3\]"),
        ({"chosen": (2, 2)}, "x has 3 rows, and must have one for each token or each chosen expert of"),
        ({"share": (3, 1)}, r"share must be \[3, 2\], got \[3, 1\]"),
        ({"x": (3, 32)}, r"x must be \[..., 64\], got \[3, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: Mapping[str, tuple[int, ...]], words: str) -> None:
    sizes = {"x": (3, 64), "chosen": (3, 2), "share": (3, 2), **shapes}
    fed = {n: np.zeros(s, np.int64 if n == "chosen" else np.float32) for n, s in sizes.items()}
    with pytest.raises(FAILURES, match=words):
        experts().run(fed)


@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
