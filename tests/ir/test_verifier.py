"""What the verifier refuses: buffers that are read while they are written, and bundles that contradict themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.ir.toys import chained, program
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import Entry, Link, Occupancy, Port, Schedule, State
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.ir.verifier import verify_bundle
from tokopt.kernels import ops
from tokopt.lower.onnx.export import lower
from tokopt.runtime.buffers import run_in_place

SLOTS, CHANNELS = 7, 4
CACHE = ("batch", 1, "slots", CHANNELS)

Body = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""``cache``, ``new`` [batch, 1, 1, channels] and ``length`` [batch] -> the outputs."""


class Writing(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.body(*tensors)


def write(cache: Tensor, new: Tensor, length: Tensor) -> Tensor:
    return ops.cache_write(cache, new, length)


def writing(body: Body, aliases: dict[str, str]) -> Program:
    """A program that writes a cache; its outputs are ``next_cache`` and then ``out_1``, ``out_2``, ..."""
    cache = torch.arange(2.0 * SLOTS * CHANNELS).view(2, 1, SLOTS, CHANNELS)
    inputs = [
        (TensorSpec("cache", "float32", CACHE, "state", "cache"), cache),
        (TensorSpec("new", "float32", ("batch", 1, 1, CHANNELS)), -torch.ones(2, 1, 1, CHANNELS)),
        (TensorSpec("length", "int64", ("batch",), "state", "length"), torch.tensor([1, 3])),
    ]
    count = len(body(*(tensor for _, tensor in inputs)))
    outputs = [TensorSpec("next_cache", "float32", (), "state", "cache")]
    outputs += [TensorSpec(f"out_{i}", "float32", (), "output") for i in range(1, count)]
    return program(Writing(body), inputs, outputs, aliases)


def bundle(made: Program) -> Bundle:
    states = (
        State("cache", "memory", "float32", CACHE, occupancy=Occupancy("length")),
        State("length", "length", "int64", ("batch",)),
    )
    return Bundle({"write": made}, Schedule((Entry("write", "encode"),)), states)


# --- aliases ----------------------------------------------------------------------------------------------

ONE = {"next_cache": "cache"}
BOTH = {"next_cache": "cache", "out_1": "cache"}


def chain(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    """Two writes; the second writes what was read after the first."""
    first = write(cache, new, length)
    second = write(first, new + first.sum((1, 2, 3), keepdim=True), length + 1)
    return second, first


def moving(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    """A write, and a move of what it wrote to the slot before."""
    first = write(cache, new, length)
    return ops.move_entries(first, torch.ones_like(length)[:, None], length - 1), first


def once(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return (write(cache, new, length),)


def read_at_the_end(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    held = write(cache, new, length)
    return held, held.sum()


def read_before(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return (write(cache, new + cache.mean((1, 2), keepdim=True), length),)


@pytest.mark.parametrize(
    ("body", "aliases"),
    [(once, ONE), (read_at_the_end, ONE), (read_before, ONE), (chain, ONE), (chain, BOTH), (moving, BOTH)],
)
def test_chains_of_writes_are_accepted(body: Body, aliases: dict[str, str]) -> None:
    """The last link may be read by anything; an earlier one by what the next write needs."""
    verify_bundle(bundle(writing(body, aliases)))


def read_beside(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    first = write(cache, new, length)
    return write(first, new, length + 1), first.sum()


def read_beside_a_move(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    moved, first = moving(cache, new, length)
    return moved, first.sum()


def read_the_old(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return write(cache, new, length), cache.sum()


def fork(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return write(cache, new, length), write(cache, new, length + 1)


def scaled(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return (write(cache, new, length) * 2,)


@pytest.mark.parametrize(
    ("body", "aliases", "reason"),
    [
        (
            read_beside,
            ONE,
            r"sum\.default \(test_verifier\.py:\d+\) reads 'cache' while it is written in place",
        ),
        (
            read_beside_a_move,
            ONE,
            r"sum\.default \(test_verifier\.py:\d+\) reads 'cache' while it is written in place",
        ),
        (
            read_the_old,
            ONE,
            r"sum\.default \(test_verifier\.py:\d+\) reads 'cache' while it is written in place",
        ),
        (fork, BOTH, "'cache' is written in place twice from one value"),
        (scaled, ONE, "'next_cache' is not only written in place"),
    ],
)
def test_what_one_buffer_cannot_hold_is_refused(body: Body, aliases: dict[str, str], reason: str) -> None:
    """Without the alias the same program is well-formed."""
    made = writing(body, {})
    verify_bundle(bundle(made))
    with pytest.raises(PassError, match=f"program 'write' is not well-formed: .*{reason}"):
        verify_bundle(bundle(replace(made, aliases=aliases)))


@pytest.mark.parametrize("body", [chain, moving])
def test_onnxruntime_writes_one_buffer_for_two_outputs(body: Body, tmp_path: Path) -> None:
    """Bound to one buffer, both outputs are the last link, and what was read between the writes is right."""
    made = writing(body, BOTH)
    session = onnxruntime.InferenceSession(lower(made, tmp_path, "write", check=False))
    names = [spec.name for spec in made.outputs]
    feed = {spec.name: t.numpy() for spec, t in zip(made.inputs, made.example, strict=True)}
    last, first = run_in_place(session, names, feed, made.aliases)
    wanted, _ = made(*made.example)
    np.testing.assert_allclose(last, wanted.numpy())
    np.testing.assert_array_equal(first, last)


# --- bundles ----------------------------------------------------------------------------------------------


def with_program(name: str, **changes: Any) -> Bundle:
    made = chained()
    return made.with_program(name, replace(made.programs[name], **changes))


def with_input(name: str, place: int, **changes: Any) -> Bundle:
    inputs = list(chained().programs[name].inputs)
    inputs[place] = replace(inputs[place], **changes)
    return with_program(name, inputs=tuple(inputs))


def with_output(name: str, place: int, **changes: Any) -> Bundle:
    outputs = list(chained().programs[name].outputs)
    outputs[place] = replace(outputs[place], **changes)
    return with_program(name, outputs=tuple(outputs))


def with_state(place: int, **changes: Any) -> Bundle:
    states = list(chained().states)
    states[place] = replace(states[place], **changes)
    return replace(chained(), states=tuple(states))


def without_program(name: str) -> Bundle:
    made = chained()
    return replace(made, programs={n: p for n, p in made.programs.items() if n != name})


def with_schedule(*entries: Entry) -> Bundle:
    return replace(chained(), schedule=Schedule(entries))


FAULTS: dict[str, tuple[Callable[[], Bundle], str]] = {
    "a program is dropped": (lambda: without_program("hear"), "'hear'"),
    "a link is dropped": (
        lambda: replace(chained(), links=chained().links[:1]),
        "'context' of program 'step' has the role 'link' and no link leads to it",
    ),
    "a link comes from nowhere": (
        lambda: replace(
            chained(),
            links=(chained().links[0], Link(Port("hear", "x"), Port("step", "context"), "call")),
        ),
        "a link names 'x' of program 'hear', which is not among the outputs",
    ),
    "a link of other axes": (
        lambda: replace(
            chained(),
            links=(chained().links[0], Link(Port("see", "features"), Port("step", "context"), "call")),
        ),
        "the link from 'features' of program 'see' to 'context' of program 'step' needs one dtype and the same axes",
    ),
    "a link that a decode outlives": (
        lambda: replace(chained(), links=tuple(replace(link, when="once") for link in chained().links)),
        "the link to 'context' of program 'step' is of a program that runs more than once",
    ),
    "an order that a link forbids": (
        lambda: with_schedule(*(chained().schedule.entries[i] for i in (1, 0, 2, 3))),
        "the link to 'features' of program 'hear' comes from 'features' of program 'see', which does not run before",
    ),
    "a state that is not there": (
        lambda: replace(chained(), states=chained().states[:-1]),
        "of program 'step' names the state 'value_1', which is not there",
    ),
    "a state without its occupancy": (
        lambda: with_state(2, occupancy=None),
        "state 'key_0' has slots without an occupancy",
    ),
    "a state of another dtype": (
        lambda: with_state(2, dtype="int8"),
        "'key_0' of program 'step' has another dtype or other axes than the state 'key_0'",
    ),
    "an input that the graph has otherwise": (
        lambda: with_input("hear", 1, dtype="float16"),
        "program 'hear' is not well-formed: 'sounds' is torch.float32, its spec says float16",
    ),
    "an axis that the graph fixes": (
        lambda: with_input("see", 0, axes=("batch", 3, 16, 15)),
        "program 'see' is not well-formed: 'images': size 16, spec 15",
    ),
    "an output that the graph has otherwise": (
        lambda: with_output("see", 1, axes=("batch", 40)),
        "program 'see' is not well-formed: 'summary': size 48, spec 40",
    ),
    "an output too many": (
        lambda: with_program(
            "see", outputs=(*chained().programs["see"].outputs, TensorSpec("x", "float32", (), "output"))
        ),
        "program 'see' is not well-formed: 2 outputs, 3 specs",
    ),
    "a range of no axis": (
        lambda: with_program("see", ranges={"batch": AxisRange(), "sounds": AxisRange()}),
        r"program 'see' is not well-formed: named axes \['batch'\] but ranges for \['batch', 'sounds'\]",
    ),
    "an example of another shape": (
        lambda: with_program("hear", example=(torch.zeros(2, 9, 48), torch.zeros(2, 48))),
        r"program 'hear' is not well-formed: example of 'features' has shape \(2, 9, 48\)",
    ),
    "an alias of an output that is not there": (
        lambda: with_program("step", aliases={"next_key_7": "key_0"}),
        "the alias of output 'next_key_7' in program 'step' names 'next_key_7', which is not there",
    ),
    "an alias of another state": (
        lambda: with_program("step", aliases={"next_key_0": "key_1"}),
        "the alias of output 'next_key_0' in program 'step' is input 'key_1', which is not the state 'key_0'",
    ),
}


def test_the_toy_is_consistent() -> None:
    verify_bundle(chained())


@pytest.mark.parametrize("fault", FAULTS)
def test_inconsistent_bundles_are_refused_where_they_are(fault: str) -> None:
    make, reason = FAULTS[fault]
    with pytest.raises(PassError, match=reason) as caught:
        verify_bundle(make())
    assert "\n" not in str(caught.value)
    with pytest.raises(PassError, match=reason):  # before any pass
        tokopt.optimize(make(), "cast")
