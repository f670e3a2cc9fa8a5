"""A buffer that is written twice in one call, in every program of a bundle.

Chained writes into one cache were refused, and the aliases of the main program alone were looked at. The law: in every
program, a chain of writes into one buffer is accepted where nothing reads an earlier link, or a view of it, that the
next write does not wait for, and where the next value of a state is the last link. What is accepted, ONNX Runtime
computes with one buffer for all of it; what it would get wrong is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from torch import Tensor

from tests.ir.test_verifier import BOTH, ONE, Body, bundle, write, writing
from tokopt.errors import PassError
from tokopt.ir.format import Entry, Schedule
from tokopt.ir.verifier import verify_bundle
from tokopt.lower.onnx.export import lower
from tokopt.runtime.buffers import run_in_place

Case = tuple[Body, dict[str, str]]


def drafted_then_accepted(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    """A draft's entry is written and read, then what was accepted over it."""
    draft = write(cache, new, length)
    return write(draft, new * draft.mean((1, 2, 3), keepdim=True), length), draft


def three(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    first = write(cache, new, length)
    second = write(first, new * 2 + first.sum(), length + 1)
    return (write(second, new * 3 + second.sum(), length),)


def a_view_before(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    """A view that is read before the next write alone."""
    return (write(cache, new + cache.flatten(1).mean(1)[:, None, None, None], length),)


ACCEPTED: dict[str, Case] = {
    "a draft, then what is accepted": (drafted_then_accepted, BOTH),
    "only the last is bound": (drafted_then_accepted, ONE),
    "three": (three, ONE),
    "a view read before": (a_view_before, ONE),
}


def a_view_after(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    """The view is needed for the write, and read again after it."""
    view = cache.flatten(1)
    return write(cache, new + view.mean(1)[:, None, None, None], length), view * 2


def a_view_of_a_view(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    first = write(cache, new, length)
    view = first.unsqueeze(0).flatten(1, 2)
    return write(first, new + view.mean(), length + 1), first, view.exp()


def a_part(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    parts = cache.unbind(1)
    return write(cache, new + parts[0].mean(), length), parts[0] * 2


def the_buffer_itself(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return write(cache, new, length), cache


def the_first_is_the_state(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    """What the program calls the next cache is not what its buffer holds in the end."""
    first = write(cache, new, length)
    return first, write(first, new * 3, length + 1)


def nothing_is_written_into_the_state(cache: Tensor, new: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return cache, write(cache, new, length)


REFUSED: dict[str, tuple[Case, str]] = {
    "a view read after": ((a_view_after, ONE), "reads 'cache' while it is written in place"),
    "a view of a view": ((a_view_of_a_view, BOTH), "reads 'cache' while it is written in place"),
    "a part": ((a_part, ONE), "reads 'cache' while it is written in place"),
    "the buffer returned": ((the_buffer_itself, ONE), "reads 'cache' while it is written in place"),
    "the state is an earlier link": (
        (the_first_is_the_state, BOTH),
        "'next_cache' is the next value of a state and not the last that is written into 'cache'",
    ),
    "the state is the buffer": (
        (nothing_is_written_into_the_state, BOTH),
        "'cache' while it is written in place|'next_cache' is the next value of a state and not the last",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_chains_are_right_in_one_buffer(name: str, tmp_path: Path) -> None:
    """What aliases the buffer is its last content, whichever link the program returns."""
    made = writing(*ACCEPTED[name])
    verify_bundle(bundle(made))
    session = onnxruntime.InferenceSession(lower(made, tmp_path, "write", check=False))
    feed = {spec.name: t.numpy() for spec, t in zip(made.inputs, made.example, strict=True)}
    names = [spec.name for spec in made.outputs]
    wanted = dict(zip(names, made(*made.example), strict=True))
    for spec, got in zip(made.outputs, run_in_place(session, names, feed, made.aliases), strict=True):
        held = "next_cache" if spec.name in made.aliases else spec.name
        np.testing.assert_allclose(got, wanted[held].numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_chains_that_one_buffer_cannot_hold_are_refused(name: str) -> None:
    """In whichever program they are; without the aliases the program is well-formed."""
    (body, aliases), reason = REFUSED[name]
    made = writing(body, {})
    fine = bundle(made)
    verify_bundle(fine)
    with pytest.raises(PassError, match=f"program 'write' is not well-formed: .*({reason})"):
        verify_bundle(fine.with_program("write", replace(made, aliases=aliases)))
    other = replace(made, outputs=tuple(replace(spec, name=f"{spec.name}_2") for spec in made.outputs))
    both = replace(fine, schedule=Schedule((Entry("write", "encode"), Entry("second", "encode"))))
    both = both.with_program("second", other)
    verify_bundle(both)
    assert both.main_name == "second"
    with pytest.raises(PassError, match=f"program 'write' is not well-formed: .*({reason})"):
        verify_bundle(both.with_program("write", replace(made, aliases=aliases)))
    second = replace(other, aliases={f"{name}_2": source for name, source in aliases.items()})
    with pytest.raises(PassError, match="program 'second' is not well-formed"):
        verify_bundle(both.with_program("second", second))
