"""The experts' linear in float32 on every instruction set: rows meet what they chose; bad input, sanitizers."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto

from tests.kernels.linears import (
    ACTIVATIONS,
    FAILURES,
    chosen_model,
    needs_library,
    nmse,
    on_linux,
    packed_bytes,
    session,
    sessions_of_a_file,
    unaligned,
)
from tests.kernels.sanitizers import check_watched, examples, skip_when_watched
from tokopt.kernels import cpu

pytestmark = needs_library
every_isa = pytest.mark.parametrize("isa", cpu.isas() if cpu.library() else [])


@dataclass(frozen=True)
class Experts:
    """Constants by name: ``weight`` [experts, in, out], maybe ``bias`` [experts, out]; and the gate, if any."""

    constants: Mapping[str, np.ndarray]
    gate: str = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Experts, inputs and outputs."""
        return self.constants["weight"].shape

    def want(self, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """[tokens, k, out] in float64, pair by pair; x is [tokens, in] or [tokens, k, in]."""
        experts, _, outputs = self.sizes
        made = np.zeros((*chosen.shape, outputs // 2 if self.gate else outputs))
        weight, bias = self.constants["weight"].astype(np.float64), self.constants.get("bias")
        for token, place in np.ndindex(chosen.shape):
            expert = int(chosen[token, place])
            if 0 <= expert < experts:
                y = (x[token] if x.ndim == 2 else x[token, place]) @ weight[expert]
                y = y if bias is None else y + bias[expert]
                gates, up = np.split(y, 2) if self.gate else (y, y)
                made[token, place] = ACTIVATIONS[self.gate](gates) * up if self.gate else y
        return made

    def model(self, *, share: bool = False) -> ModelProto:
        """One node of the op."""
        attributes = {"gate": self.gate} if self.gate else {}
        return chosen_model("FloatExpertLinear", ("weight", "bias"), self.constants, attributes, share=share)

    def run(self, given: Mapping[str, np.ndarray], isa: str = "", threads: int = 1) -> np.ndarray:
        (y,) = session(self.model(share="share" in given), isa, threads).run(None, dict(given))
        return np.asarray(y)


def experts(
    count: int = 3, inputs: int = 40, outputs: int = 38, *, bias: bool = False, gate: str = ""
) -> Experts:
    random = np.random.default_rng(count)
    constants = {"weight": normal(random, count, inputs, outputs)}
    return Experts(constants | ({"bias": normal(random, count, outputs)} if bias else {}), gate)


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


@every_isa
@examples(40)
@given(st.data())
def test_every_row_meets_the_experts_that_it_chose(isa: str, data: st.DataObject) -> None:
    """Any number of tokens and experts, numbers that are no expert among them, one row for all or a row for each."""
    tokens = data.draw(st.sampled_from([0, 1, 2, 5, 9, 40, 120]), "tokens")
    count, k = data.draw(st.integers(1, 6), "experts"), data.draw(st.integers(1, 3), "k")
    gate = data.draw(st.sampled_from(["", "silu", "gelu"]), "gate")
    inputs = data.draw(st.sampled_from([1, 7, 64, 512, 515]), "inputs")
    outputs = data.draw(st.integers(1, 70), "outputs") * (2 if gate else 1)
    own = experts(count, inputs, outputs, bias=data.draw(st.booleans(), "bias"), gate=gate)
    random = np.random.default_rng(data.draw(st.integers(0, 99), "seed of x"))
    chosen = random.integers(-1, count + 2, (tokens, k))
    x = (
        normal(random, tokens, inputs)
        if data.draw(st.booleans(), "shared")
        else normal(random, tokens, k, inputs)
    )
    fed = {"x": unaligned(x) if data.draw(st.booleans(), "unaligned") else x, "chosen": chosen}
    got = own.run(fed, isa, data.draw(st.sampled_from([1, 2]), "threads"))
    want, plain = own.want(x, chosen), replace(own, gate="").want(x, chosen)
    assert got.shape == want.shape and got.dtype == np.float32
    assert ((got - want) ** 2).sum() <= 1e-12 * max((want**2).sum() + (plain**2).sum(), 1e-30)
    assert not got[(chosen < 0) | (chosen >= count)].any()


@every_isa
def test_what_experts_made_is_summed_by_their_shares(isa: str) -> None:
    own, random = experts(4, bias=True), np.random.default_rng(0)
    x, chosen, share = normal(random, 11, 3, 40), random.integers(-1, 5, (11, 3)), normal(random, 11, 3)
    got = own.run({"x": x, "chosen": chosen, "share": share}, isa)
    want = (own.want(x, chosen) * share[..., None]).sum(1)
    assert got.shape == (11, 38) and nmse(got, want) < 1e-12


@pytest.mark.parametrize("gate", ["", "silu", "gelu_tanh"])
def test_the_reference_says_the_same(gate: str) -> None:
    import torch

    from tokopt.kernels.float_expert_linear.reference import float_expert_linear

    own, random = experts(4, bias=True, gate=gate), np.random.default_rng(0)
    chosen, share = random.integers(-1, 6, (9, 2)), random.standard_normal((9, 2))
    for x in (random.standard_normal((9, 40)), random.standard_normal((9, 2, 40))):
        given = [torch.from_numpy(array) for array in (x, chosen)]
        constants = {name: torch.from_numpy(array).double() for name, array in own.constants.items()}
        got = float_expert_linear(*given, **constants, gate=gate or None)
        assert nmse(got.numpy(), own.want(x, chosen)) < 1e-24
        summed = float_expert_linear(*given, **constants, share=torch.from_numpy(share), gate=gate or None)
        assert nmse(summed.numpy(), (own.want(x, chosen) * share[..., None]).sum(1)) < 1e-24


@every_isa
def test_a_token_gets_the_same_bits_beside_any_others(isa: str) -> None:
    """So a draft of many tokens is verified as one token would have been."""
    own, random = experts(2, 600, 64, gate="silu"), np.random.default_rng(0)
    x, chosen = normal(random, 40, 600), random.integers(0, 2, (40, 2))
    together = session(own.model(), isa)
    (whole,) = together.run(None, {"x": x, "chosen": chosen})
    for token in range(0, 40, 7):
        one = slice(token, token + 1)
        (alone,) = together.run(None, {"x": x[one], "chosen": chosen[one]})
        np.testing.assert_array_equal(np.asarray(alone)[0], np.asarray(whole)[token])


@every_isa
@pytest.mark.parametrize("gate", ["", "silu"])
def test_a_row_that_holds_nan_is_nan_and_spoils_no_other(isa: str, gate: str) -> None:
    own, random = experts(gate=gate), np.random.default_rng(0)
    x, chosen = normal(random, 9, 40), np.zeros((9, 1), np.int64)
    want = own.want(x, chosen)
    x[4, 20] = np.nan
    got, others = own.run({"x": x, "chosen": chosen}, isa), np.arange(9) != 4
    assert np.isnan(got[4]).all() and nmse(got[others], want[others]) < 1e-12


def test_an_expert_that_nobody_chose_is_not_read() -> None:
    own, random = experts(4), np.random.default_rng(0)
    spoiled = own.constants["weight"].copy()
    spoiled[1] = np.nan
    x, chosen = normal(random, 9, 40), random.choice([0, 2, 3], (9, 2))
    got = Experts({"weight": spoiled}).run({"x": x, "chosen": chosen})
    assert nmse(got, own.want(x, chosen)) < 1e-12


def test_sessions_share_packed_weights() -> None:
    gc.collect()
    before, own = packed_bytes(), experts(4, 64, 64)
    sessions = [session(own.model()), session(own.model(share=True))]
    assert packed_bytes() - before >= own.constants["weight"].nbytes
    once = packed_bytes()
    sessions.append(session(own.model()))
    assert packed_bytes() == once
    sessions.append(session(Experts({**own.constants, "bias": np.ones((4, 64), np.float32)}).model()))
    assert packed_bytes() == 2 * once - before  # another bias is another weight
    del sessions
    gc.collect()
    assert packed_bytes() == before


@on_linux
def test_pages_of_a_file_are_given_back(tmp_path: Path) -> None:
    sessions, held = sessions_of_a_file(experts(4, 512, 512).model(), tmp_path)
    assert len(sessions) == 2 and held < 0.1


@pytest.mark.parametrize(
    ("changed", "gate", "words"),
    [
        ({"weight": (40, 38)}, "", r"weight must be \[experts, in, out\], got \[40, 38\]"),
        ({"weight": (0, 40, 38)}, "", r"weight must be \[experts, in, out\], got \[0, 40, 38\]"),
        ({"weight": (3, 40, 37)}, "silu", "has no half of the outputs that gates the other"),
        ({"bias": (3, 37)}, "", r"bias must be \[3, 38\], got \[3, 37\]"),
        ({}, "tanh", "gate=tanh must be silu, gelu or gelu_tanh"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    changed: Mapping[str, tuple[int, ...]], gate: str, words: str
) -> None:
    constants = {**experts().constants, **{n: np.zeros(s, np.float32) for n, s in changed.items()}}
    with pytest.raises(FAILURES, match=words) as caught:
        session(Experts(constants, gate).model())
    assert "tokopt.cpu::FloatExpertLinear 'experts': " in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"chosen": (3,)}, r"chosen must be \[tokens, k\], got \[3\]"),
        ({"chosen": (2, 2)}, "x has 3 rows, and must have one for each token or each chosen expert of"),
        ({"share": (3, 1)}, r"share must be \[3, 2\], got \[3, 1\]"),
        ({"x": (3, 32)}, r"x must be \[..., 40\], got \[3, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: Mapping[str, tuple[int, ...]], words: str) -> None:
    sizes: dict[str, Any] = {"x": (3, 40), "chosen": (3, 2), "share": (3, 2), **shapes}
    fed = {n: np.zeros(s, np.int64 if n == "chosen" else np.float32) for n, s in sizes.items()}
    with pytest.raises(FAILURES, match=f"tokopt.cpu::FloatExpertLinear: {words}"):
        experts().run(fed)


@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
