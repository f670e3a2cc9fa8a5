"""The fused attention of ONNX Runtime hides later tokens inside, whatever the mask says.

``step`` takes any mask over the new tokens, and its fused form was run with every one of them: a tree whose children
come before their parents, and a block whose tokens see each other, were off by up to 0.8 without a word. The law: the
fused form computes masks that are proved, or found at run time, to be lower-triangular, the portable form all others,
and for every kind of mask the runtime gives what the program computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.fx import Node

import tokopt
from tests.zoo.decoders import HandWritten
from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import argument, attention_nodes
from tokopt.ir.program import Program
from tokopt.kernels import cpu
from tokopt.lower.onnx.export import lower
from tokopt.lower.onnx.rule import Outcome, Unfit
from tokopt.lower.onnxruntime.causal import require_causal
from tokopt.lower.onnxruntime.cpu import lower_for_cpu
from tokopt.rewrite.edit import call, close_graph, open_graph
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.buffers import Bound
from tokopt.runtime.engines.onnxruntime import ONE_ROW, PORTABLE

PARENTS = [-1, 0, 0, 1, 2]
"""A tree of five nodes in topological order."""

TOKENS = np.array([[5, 17, 3, 60, 9]])
COUNT = TOKENS.shape[1]


def tree(parents: list[int]) -> np.ndarray:
    """Every node sees itself and its ancestors."""
    sees = np.eye(len(parents), dtype=bool)
    for _ in parents:
        for node, parent in enumerate(parents):
            if parent >= 0:
                sees[node] |= sees[parent]
    return sees[None]


def turned(mask: np.ndarray) -> np.ndarray:
    """The same tree with its nodes in the opposite order."""
    return np.ascontiguousarray(mask[:, ::-1, ::-1])


def block() -> np.ndarray:
    """Tokens 1 to 3 see each other."""
    mask = np.tril(np.ones((1, COUNT, COUNT), bool))
    mask[:, 1:4, 1:4] = True
    return mask


MASKS = {
    "causal": (np.tril(np.ones((1, COUNT, COUNT), bool)), ONE_ROW),
    "tree": (tree(PARENTS), ONE_ROW),
    "alone": (np.eye(COUNT, dtype=bool)[None], ONE_ROW),
    "children before parents": (turned(tree(PARENTS)), PORTABLE),
    "block": (block(), PORTABLE),
    "all": (np.ones((1, COUNT, COUNT), bool), PORTABLE),
}


@cache
def decoder() -> Bundle:
    torch.manual_seed(0)
    model = HandWritten(hidden=16, heads=1, layers=1).eval().requires_grad_(False)
    return tokopt.capture_lm(model, generation=HandWritten.generation)


def with_mask(change: Callable[[Tensor], Tensor]) -> Program:
    """The program of a decoder that changes the mask before it attends, as a pass might."""
    program = decoder().main
    module = open_graph(program)
    (attention,) = attention_nodes(module.graph)
    mask = argument(attention, 3, "attn_mask")
    assert isinstance(mask, Node)
    with module.graph.inserting_before(attention):
        attention.replace_input_with(mask, call(module.graph, change, mask, like=attention))
    return close_graph(program, module)


@cache
def plain() -> tuple[Bundle, LanguageModel, list[str]]:
    """A decoder that takes the mask as it is, its artifact, and what export said."""
    bundle, lines = decoder(), list[str]()
    path = tokopt.export(bundle, Path(mkdtemp()) / "model.tokopt", progress=lines.append)
    return bundle, load(path, threads=1, kernels=False), lines


def expected(bundle: Bundle, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The program's logits [batch, tokens, vocabulary] for tokens in an empty cache."""
    given = {
        "tokens": torch.from_numpy(tokens),
        "positions": torch.arange(tokens.shape[1])[None],
        "mask": torch.from_numpy(mask),
        "rows": torch.arange(tokens.shape[1]),
    }
    sizes = {"batch": 1, "slots": 16}
    shapes = [[sizes[axis] if isinstance(axis, str) else axis for axis in s.axes] for s in bundle.states]
    states = [
        torch.full(shape, s.initial).to(getattr(torch, s.dtype))
        for shape, s in zip(shapes, bundle.states, strict=True)
    ]
    logits = bundle.main(*(given[spec.role] for spec in bundle.main.inputs if spec.role in given), *states)[0]
    return logits.numpy()


@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask_is_computed(name: str) -> None:
    """And the form changes in the midst of a request: what follows reads the cache that the other form wrote."""
    bundle, model, _ = plain()
    mask, form = MASKS[name]
    whole = np.concatenate([TOKENS, TOKENS[:, ::-1]], 1)
    after = np.tril(np.ones((1, 2 * COUNT, 2 * COUNT), bool))
    after[:, :COUNT, :COUNT] = mask
    wanted = expected(bundle, whole, after)
    request = model.open(1, 16)
    rows, positions = np.arange(COUNT), np.arange(COUNT)[None]
    first = request.step(TOKENS, positions, rows, mask=mask).logits
    assert first is not None and request.program.form == form
    np.testing.assert_allclose(first, wanted[:, :COUNT], atol=1e-4 * np.abs(wanted).max())
    second = request.step(TOKENS[:, ::-1], positions + COUNT, rows).logits
    assert second is not None and request.program.form == ONE_ROW
    np.testing.assert_allclose(second, wanted[:, COUNT:], atol=1e-4 * np.abs(wanted).max())


@pytest.mark.skipif(cpu.library() is None, reason=cpu.problem())
@pytest.mark.parametrize("name", MASKS)
def test_tokopts_own_kernels_take_every_kind_of_mask(name: str) -> None:
    bundle, model, _ = plain()
    mask, _ = MASKS[name]
    wanted = expected(bundle, TOKENS, mask)
    request = load(model.path, threads=1).open(1, 16)
    found = request.step(TOKENS, np.arange(COUNT)[None], np.arange(COUNT), mask=mask).logits
    assert isinstance(request.program, Bound)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_fused_form_refuses_what_it_would_hide() -> None:
    _, model, lines = plain()
    entry = model.manifest.programs["step"]
    feed = {
        "tokens": TOKENS,
        "positions": np.arange(COUNT)[None],
        "mask": block(),
        "rows": np.array([-1]),
    } | model.open(1, 16).buffers.values
    assert set(feed) == {spec.name for spec in entry.inputs}
    with pytest.raises(InputError, match=r"in 'mask' a token sees a later one, .* run the form 'onnx'"):
        model.sessions.run("step", feed, ONE_ROW)
    assert "step: attention and its cache as one node: 1 of 1" in lines


@pytest.mark.parametrize(
    "mask", [np.ones((1, 2, 2), bool), np.ones((1, COUNT, COUNT)), [[True]], np.ones((2, COUNT, COUNT), bool)]
)
def test_a_mask_that_does_not_fit_is_refused(mask: np.ndarray) -> None:
    _, model, _ = plain()
    with pytest.raises(InputError, match=r"it must be a numpy array bool\[1, 5, 5\]"):
        model.open(1, 16).step(TOKENS, np.arange(COUNT)[None], mask=mask)


CHANGES = {
    "sees all slots": (lambda mask: mask | ~mask, "is not made by cache_mask"),
    "sees what the next one sees": (lambda mask: mask | mask.roll(-1, 2), "is not made by cache_mask"),
    "numbers": (lambda mask: torch.where(mask, 0.0, -1e9), "is numbers to add"),
    "hides more": (lambda mask: mask & (torch.arange(mask.shape[3]) != 2), None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_mask_that_the_program_makes_is_fused_where_it_hides_later_tokens(
    name: str, tmp_path: Path
) -> None:
    """What is fused is compared with the program."""
    change, reason = CHANGES[name]
    program = with_mask(change)
    outcomes: list[Outcome] = []
    path = lower(program, tmp_path, "step", check=False)
    fused = lower_for_cpu(program, path, report=outcomes.append)
    if reason is None:
        assert fused is not None
        assert str(outcomes[0]) == "attention and its cache as one node: 1 of 1"
    else:
        assert fused is None
        assert "0 of 1; left 1: its mask" in str(outcomes[0]) and reason in str(outcomes[0])


def test_an_example_that_the_form_does_not_take_is_not_fused(tmp_path: Path) -> None:
    """The example is what the form would be compared with."""
    program, outcomes = plain()[0].main, list[Outcome]()
    (place,) = [i for i, spec in enumerate(program.inputs) if spec.role == "mask"]
    example = list(program.example)
    example[place] = torch.ones_like(example[place])
    program = replace(program, example=tuple(example))
    path = lower(program, tmp_path, "step")
    assert lower_for_cpu(program, path, report=outcomes.append) is None
    assert "its mask may let a new token see a later one" in str(outcomes[0])


LOWER = np.tril(np.ones((1, 4, 4), bool))


def value(shape: Sequence[int | str], constant: np.ndarray | None = None) -> ir.Value:
    tensor = None if constant is None else ir.tensor(constant)
    return ir.Value(shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.BOOL), const_value=tensor)


def made(operation: str, *given: ir.Value, shape: Sequence[int | str] = (1, 4, 4)) -> ir.Value:
    node = ir.node(operation, given)
    node.outputs[0].shape = ir.Shape(shape)
    return node.outputs[0]


OWN: dict[str, tuple[Callable[[], ir.Value], bool]] = {
    "lower": (lambda: value((1, 4, 4), LOWER), True),
    "full": (lambda: value((1, 4, 4), LOWER | True), False),
    "one token": (lambda: value(("batch", 1, 1)), True),
    "unknown": (lambda: value(("batch", "tokens", "tokens")), False),
    "unknown and lower": (lambda: made("And", value((2, 4, 4)), value((1, 4, 4), LOWER)), True),
    "unknown or lower": (lambda: made("Or", value((2, 4, 4)), value((1, 4, 4), LOWER)), False),
    "lower, for many rows": (
        lambda: made("Expand", value((1, 4, 4), LOWER), value((3,)), shape=(9, 4, 4)),
        True,
    ),
    "one token's, repeated": (
        lambda: made("Expand", value((1, 1, 1), np.ones((1, 1, 1), bool)), value((3,))),
        False,
    ),
    "and one token's": (lambda: made("And", value((1, 4, 4)), value((1, 1, 1))), False),
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_proved_of_a_mask(name: str) -> None:
    """Nothing is promised, so the mask over the new tokens has to be lower-triangular itself."""
    build, fits = OWN[name]
    length = value(("batch",))
    view = ir.node(
        "full_view", [value(("batch", 1, "slots", 1)), value(("batch", 4)), build()], num_outputs=2
    )
    mask = made("cache_mask", *view.outputs, length, shape=("batch", 1, 4, "slots"))
    for placed in (mask, made("And", value(("batch", 1, 4, "slots")), mask, shape=("batch", 1, 4, "slots"))):
        with nullcontext() if fits else pytest.raises(Unfit, match="may let a new token see a later one"):
            require_causal(placed, length, None)
    with pytest.raises(Unfit, match="in other slots"):
        require_causal(mask, value(("batch",)), None)
