"""The self-test that an artifact takes along: realistic inputs, what the programs make of them, and measured limits.

What an artifact is held to later (see :mod:`tokopt.runtime.selftest`) is measured when it is written, on the files
that are written: how far ONNX Runtime is from the exported program in float32 arithmetic, and how far with its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from tokopt.errors import LoweringError
from tokopt.ir.bundle import Bundle
from tokopt.ir.calls import call_inputs, initial
from tokopt.ir.memory import trim
from tokopt.ir.program import AxisRange, Program
from tokopt.lower.onnx.whole import Whole
from tokopt.lower.parity.precision import ROUNDINGS, half_precision_limit
from tokopt.lower.parity.selections import selects
from tokopt.runtime import LanguageModel, Sampling
from tokopt.runtime.engines.onnxruntime import Sessions
from tokopt.runtime.format.manifest import SELFTEST, Manifest
from tokopt.runtime.format.signature import find_role, wiring
from tokopt.runtime.numerics import LIMITS, SELFTEST_LIMITS
from tokopt.runtime.selftest import (
    COSINE,
    KL,
    LOOSEST,
    TASK_LOOSEST,
    FormChecks,
    SelfTest,
    check_forms,
    compared,
)

ROWS, READ, NEW, FREE = 2, 16, 4, 4
"""Texts of a language model's self-test, tokens in their cache, new tokens, and free slots after those."""

SPREAD = 4.0
"""How much further than here an output may be on a machine that rounds activations, or chooses tokens, differently."""

TASK_USUAL: Mapping[str, float] = {KL: 0.05, COSINE: 0.02}
"""What a task's measure may be however little was measured here: one token chosen differently gives as much."""

CHOICES = SELFTEST_LIMITS["approximate"] or 0.0
"""The NMSE that a program which chooses tokens may always have."""

Values = Mapping[str, tuple[Tensor, ...]]
"""Inputs or outputs of every program, by its name."""


def write_examples(bundle: Bundle, folder: Path, whole: Whole | None = None) -> None:
    """Write the example inputs of every program, ``whole`` among them, and what the program makes of them."""
    inputs = {name: program.example for name, program in bundle.programs.items()}
    _write(folder, _tensors(bundle, inputs, _outputs(bundle, inputs)) | _whole_tensors(whole))


def write_selftest(
    bundle: Bundle,
    folder: Path,
    manifest: Manifest,
    whole: Whole | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Write the self-test of the artifact in ``folder``, whose programs compute those of ``bundle``.

    ``manifest`` describes the programs that are there, ``whole`` among them. The self-test runs as ``tokopt verify``
    will run it, and how far each output was off decides how far it may be; ``tolerance`` replaces the NMSE that its
    dtype always allows. Raises LoweringError when an output is so far off that no limit would tell a broken artifact
    from this one.
    """
    inputs = _inputs(bundle, folder, manifest)
    outputs = _outputs(bundle, inputs)
    tensors = _tensors(bundle, inputs, outputs) | _whole_tensors(whole)
    limits = {name: _usual_limits(program, tolerance) for name, program in bundle.programs.items()}
    if whole is not None:
        limits[whole.name] = {
            spec.name: limits[bundle.main_name].get(spec.name, 0.0) for spec in whole.entry.outputs
        }
    tests = {
        name: SelfTest(_arrays(tensors, f"{name}/inputs/"), _arrays(tensors, f"{name}/outputs/"), usual)
        for name, usual in limits.items()
    }

    def opened() -> Sessions:
        trim()
        return Sessions(folder, manifest, spins=False)

    found = check_forms(manifest, tests, opened)
    for name, test in tests.items():
        keys = (name, *(f"{name}.{form}" for form in manifest.programs[name].files))
        tensors |= _limits(name, test, [found[key] for key in keys if key in found])
    _write(folder, tensors)


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / SELFTEST).write_bytes(save(tensors))


def _outputs(bundle: Bundle, inputs: Values) -> Values:
    return {name: program(*inputs[name]) for name, program in bundle.programs.items()}


def _tensors(bundle: Bundle, inputs: Values, outputs: Values) -> dict[str, Tensor]:
    """Inputs, and outputs that are compared, of every program under the names that they have in the file."""
    sides = (("inputs", inputs), ("outputs", outputs))
    return {
        f"{name}/{side}/{spec.name}": value.detach().clone().contiguous()
        for name, program in bundle.programs.items()
        for side, values in sides
        for spec, value in zip(getattr(program, side), values[name], strict=True)
        if side == "inputs" or spec.name in compared(program.outputs, bundle.states)
    }


def _whole_tensors(whole: Whole | None) -> dict[str, Tensor]:
    """Inputs and outputs of the program of all stages."""
    if whole is None:
        return {}
    sides = (
        ("inputs", whole.entry.inputs, whole.inputs),
        ("outputs", whole.entry.outputs, whole.outputs),
    )
    return {
        f"{whole.name}/{side}/{spec.name}": value.detach().clone().contiguous()
        for side, specs, values in sides
        for spec, value in zip(specs, values, strict=True)
    }


def _arrays(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    """Those of a program and a side, by name."""
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {name: value.numpy(force=True) for name, value in found.items()}


# --- limits -----------------------------------------------------------------------------------------------


def _usual_limits(program: Program, tolerance: float | None) -> dict[str, float]:
    """The NMSE that every output may have, whatever is measured here."""
    known = half_precision_limit(program) if tolerance is None else tolerance
    if known is None and selects(program):
        known = CHOICES
    return {spec.name: LIMITS.get(spec.dtype, 0.0) if known is None else known for spec in program.outputs}


def _limits(name: str, test: SelfTest, forms: Sequence[FormChecks]) -> dict[str, Tensor]:
    """The limits of a program's outputs as they are stored, from what its forms gave here."""
    stored: dict[str, float] = {}
    for check in (check for form in forms for check in form.outputs):
        if not check.nmse <= LOOSEST:
            raise _too_far(name, check.name, f"NMSE {check.nmse:.2g}", LOOSEST)
        key = f"{name}/limits/{check.name}"
        limit = max(test.limits[check.name], _spread(check.nmse))
        stored[key] = max(stored.get(key, 0.0), min(limit, LOOSEST))
    for check in (check for form in forms for check in form.tasks):
        most = TASK_LOOSEST[check.measure] / SPREAD
        if not check.value <= most:
            raise _too_far(name, check.name, f"{check.measure} {check.value:.2g}", most)
        key = f"{name}/{check.measure}/{check.name}"
        stored[key] = max(stored.get(key, 0.0), TASK_USUAL[check.measure], SPREAD * check.value)
    return {key: torch.tensor(limit, dtype=torch.float64) for key, limit in stored.items()}


def _spread(nmse: float) -> float:
    """The NMSE that other machines may have: of sums in another order, or, where that changed choices, of others."""
    return max(min(ROUNDINGS * nmse, CHOICES), SPREAD * nmse)


def _too_far(name: str, output: str, found: str, limit: float) -> LoweringError:
    return LoweringError(
        f"output {output!r} of program {name!r} is too far from the exported program as ONNX Runtime computes it: "
        f"{found}, at most {limit:.2g} is allowed; quantize less of the model (skip=[...], bits=8), or capture with "
        "real inputs where the example is noise"
    )


# --- inputs -----------------------------------------------------------------------------------------------


def _inputs(bundle: Bundle, folder: Path, manifest: Manifest) -> Values:
    """The inputs that programs are tested with: in the middle of a text where one is read, else the example."""
    inputs = {name: program.example for name, program in bundle.programs.items()}
    readers = [name for name in bundle.entries if _reads_text(bundle, name)]
    if readers:
        text = _own_text(folder, manifest)
        inputs |= {name: _after_prompt(bundle, bundle.programs[name], text) for name in readers}
    return inputs


def _reads_text(bundle: Bundle, name: str) -> bool:
    """Whether tokens and states are all that a program reads, in any number, and predictions what it gives."""
    program = bundle.programs[name]
    tokens = find_role(program.inputs, "tokens")
    if tokens is None or find_role(program.outputs, "logits") is None or bundle.encoders:
        return False
    if bundle.generation is None or bundle.generation.context < ROWS * (READ + NEW):
        return False
    return not any(spec.role in ("link", "input") for spec in program.inputs) and all(
        isinstance(axis, str) and _holds(program.ranges[axis], sizes)
        for axis, sizes in zip(tokens.axes, ((ROWS,), (NEW, READ)), strict=True)
    )


def _holds(bounds: AxisRange, sizes: Sequence[int]) -> bool:
    return all(bounds.min <= size and (bounds.max is None or size <= bounds.max) for size in sizes)


def _own_text(folder: Path, manifest: Manifest) -> Tensor:
    """Tokens [rows, tokens] that the artifact draws itself: text as the model has seen it."""
    settings = manifest.generation
    assert settings is not None
    bare = replace(manifest, generation=replace(settings, eos=()), tokenizer=None)
    model = LanguageModel(folder, bare, Sessions(folder, bare, spins=False))
    known = settings.bos is not None and settings.bos < settings.vocabulary  # small models keep a large one's
    first, count = (settings.bos if known else 0) or 0, ROWS * (READ + NEW)
    drawn = model.generate([first], max_tokens=count - 1, sampling=Sampling(1.0, seed=0))
    return torch.tensor([first, *drawn.tokens]).view(ROWS, -1)


def _after_prompt(bundle: Bundle, program: Program, text: Tensor) -> tuple[Tensor, ...]:
    """The inputs for the last :data:`NEW` tokens of ``text`` once those before are read; the first row is padded."""
    padding = torch.arange(ROWS) == 0
    positions = torch.arange(READ + NEW) - padding[:, None].long()  # -1 is padding
    states = {state.name: initial(state, ROWS, READ + NEW + FREE) for state in bundle.states}
    made = program(*call_inputs(program, text[:, :READ], positions[:, :READ], states))
    names = wiring(program.outputs)
    states |= {
        names[spec.name]: value
        for spec, value in zip(program.outputs, made, strict=True)
        if spec.name in names
    }
    return call_inputs(program, text[:, READ:], positions[:, READ:], states)
