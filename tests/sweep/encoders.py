"""An encoder of text, images or sound: captured, optimised, exported, loaded, and compared with itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tokopt
from tests.sweep.exceptions import HELD, SHAPES, SIZES, VOCABULARY
from tests.sweep.outcome import EQUAL, REFUSED, UNBUILT, WRONG, Ending
from tests.sweep.trial import ending_of, first_line, optimized
from tokopt.ir.bundle import Bundle
from tokopt.runtime import Model, load

MERGED, QUANTIZED = "tome{r=2}", "int8"

BATCH = 5
"""Rows of the example: no other size of a model."""

TEXTS = ((1, 9), (3, 21), (2, 150))
"""Rows and tokens of the texts that an artifact is asked about; the longest is far beyond the example's."""

_CLOSE, _FLIPPED, _QUANTIZED = 1e-7, 1e-4, 0.1
"""Largest mean squared error of an output, as a part of its mean square: as it is, where a number between two steps may
be rounded to the other, and where weights and activations have 8 bits."""

_MOVES, _LAST_DIGITS = 6, 1e-6
"""How often, and by which part of them, the floats of a program are moved to see what other choices do."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """How a model may be called.

    ``make(rows, length)`` are its inputs, ``axes`` those that may vary, ``calls`` rows and lengths to compare at;
    ``fixed`` says what does not vary; ``held`` are inputs that the model itself holds, as numbers.
    """

    make: Callable[[int, int], Inputs]
    axes: Mapping[str, Mapping[int, str]]
    example: tuple[int, int]
    calls: tuple[tuple[int, int], ...]
    fixed: str = ""
    held: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def of(self, model: Any) -> Any:
        """The model that is called so."""
        return _Holding(model, self.held) if self.held else model


class _Holding(nn.Module):
    """A model that is given some of its inputs as numbers, inside the graph."""

    def __init__(self, model: Any, held: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.held = model, held

    def forward(self, pixel_values: Tensor) -> object:
        return self.model(pixel_values, **{name: torch.tensor(value) for name, value in self.held.items()})


def trial(model: Any, folder: Path, passes: bool = True) -> Iterator[tuple[str, Ending]]:
    """The ending without a pass (named ``""``), then that of every pass."""
    try:
        forms = _forms(model)
    except Exception as error:
        yield "", Ending(UNBUILT, first_line(error))
        return
    bundle: Any = None
    for form in forms:

        def plain(form: Form = form) -> Ending:
            nonlocal bundle
            called = form.of(model)
            bundle = tokopt.capture(called, (), form.make(*form.example), dynamic=form.axes)
            limit = max(_CLOSE, 4 * _noise(called, form))
            ending = compared(_exported(bundle, folder / "plain.tokopt"), form, _eager(called), limit)
            return Ending(EQUAL, form.fixed) if ending.outcome == EQUAL else ending

        ending = ending_of(plain)
        ending = replace(ending, detail=ending.detail.replace(_Holding.__name__, type(model).__name__))
        if ending.outcome != REFUSED:
            break
    yield "", ending
    if ending.outcome != EQUAL or not passes:
        return

    def merged() -> Ending:
        made = optimized(bundle, MERGED)
        return _same(_exported(made, folder / "merged.tokopt"), made, form, _CLOSE)

    def quantized() -> Ending:
        made = optimized(bundle, QUANTIZED)
        artifact = _exported(made, folder / "quantized.tokopt")
        same = _same(artifact, made, form, _FLIPPED)
        called = form.of(model)
        limit = max(_QUANTIZED, 2 * _rounding(called, form))
        return compared(artifact, form, _eager(called), limit) if same.outcome == EQUAL else same

    yield MERGED, ending_of(merged)
    yield QUANTIZED, ending_of(quantized)


def _same(artifact: Model, made: Bundle, form: Form, limit: float) -> Ending:
    """Whether an artifact says what its program says, or what that itself does where it chooses otherwise."""

    def wanted(inputs: Inputs) -> list[Tensor]:
        return list(made(*inputs.values()))

    least = max((bounds.min for axis, bounds in made.main.ranges.items() if axis != "batch"), default=0)
    form = replace(form, calls=tuple((rows, max(length, least)) for rows, length in form.calls))
    ending = compared(artifact, form, wanted, limit)
    if ending.outcome == WRONG:
        ending = compared(artifact, form, wanted, max(limit, 2 * _chosen_otherwise(made, form)))
    return ending


def _exported(bundle: Bundle, path: Path) -> Model:
    tokopt.export(bundle, path, overwrite=True)
    made = load(path, threads=1)
    assert isinstance(made, Model)
    return made


def _eager(model: Any) -> Callable[[Inputs], list[Tensor]]:
    def run(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return _tensors(model(**inputs))

    return run


def _noise(model: Any, form: Form) -> float:
    """How far the model's own float32 is off: convolutions normalized by random statistics lose most digits."""
    inputs = form.make(*form.calls[0])
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    try:
        wanted = _eager(copy.deepcopy(model).double())(exact)
    except Exception:  # a model that has a dtype of its own
        return 0.0
    pairs = zip(_eager(model)(inputs), wanted, strict=True)
    return max(
        (_error(one.numpy(), other, inputs.get("attention_mask")) for one, other in pairs), default=0.0
    )


def _rounding(model: Any, form: Form) -> float:
    """How far the model is off where its linears round weights and rows of activations to 8 bits by themselves."""
    rounded = copy.deepcopy(model)
    for part in rounded.modules():
        if isinstance(part, nn.Linear):
            part.weight.data = _rounded(part.weight.data)
            part.register_forward_pre_hook(lambda _, given: (_rounded(given[0]), *given[1:]))
    worst = 0.0
    for rows, length in form.calls:
        inputs = form.make(rows, length)
        pairs = zip(_eager(rounded)(inputs), _eager(model)(inputs), strict=True)
        errors = (_error(one.numpy(), other, inputs.get("attention_mask")) for one, other in pairs)
        worst = max(worst, *errors)
    return worst


def _chosen_otherwise(made: Bundle, form: Form) -> float:
    """How far a program is off where its floats move by their last digits, at the sizes compared.

    A number between two steps is rounded to the other then, and of two pairs of tokens that are as alike the other one
    merges. That is all that another order of sums may do.
    """
    module, worst = made.main.module, 0.0
    held = [*module.named_parameters(), *module.named_buffers()]
    for seed in range(_MOVES):
        random = _random(seed)
        moved = {
            name: values * (1 + _LAST_DIGITS * torch.randn(values.shape, generator=random))
            for name, values in held
            if values.is_floating_point()
        }
        for rows, length in form.calls:
            inputs = form.make(rows, length)
            others = torch.func.functional_call(module, moved, tuple(inputs.values()))
            pairs = zip(others, made(*inputs.values()), strict=True)
            worst = max(
                worst, *(_error(one.numpy(), two, inputs.get("attention_mask")) for one, two in pairs)
            )
    return worst


def _rounded(values: Tensor) -> Tensor:
    """Rows in 255 steps."""
    step = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (values / step).round() * step


def _tensors(result: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def compared(
    artifact: Model, form: Form, wanted: Callable[[Inputs], list[Tensor]], limit: float = _CLOSE
) -> Ending:
    """Every output at every size; what stands at padding means nothing."""
    for rows, length in form.calls:
        inputs = form.make(rows, length)
        got = list(artifact.run(**{name: value.numpy() for name, value in inputs.items()}).values())
        where = f"of {rows} rows{f' of length {length}' if length else ''}"
        expected = wanted(inputs)
        if len(got) != len(expected):
            return Ending(WRONG, f"it gives {len(got)} outputs {where}, and the model {len(expected)}")
        for place, (one, other) in enumerate(zip(got, expected, strict=True)):
            error = _error(np.asarray(one), other, inputs.get("attention_mask"))
            if not error <= limit:
                return Ending(WRONG, f"output {place} {where} is off by {error:.1g} of its square")
    return Ending(EQUAL)


def _error(got: np.ndarray, wanted: Tensor, mask: Tensor | None) -> float:
    if got.shape != tuple(wanted.shape):
        return float("inf")
    one, other = got.astype(np.float64), wanted.double().numpy()
    if mask is not None and one.shape[:2] == tuple(mask.shape):
        one, other = one[mask.bool().numpy()], other[mask.bool().numpy()]
    return float(((one - other) ** 2).mean() / max((other**2).mean(), 1e-30)) if one.size else 0.0


# --- inputs ---------------------------------------------------------------------------------------------


def _forms(model: Any) -> list[Form]:
    """The forms of the first kind of inputs that the model runs on, the freest first."""
    failed: Exception | None = None
    for forms in _kinds(model):
        try:
            out = _eager(forms[0].of(model))(forms[0].make(*forms[0].example))
        except Exception as error:
            failed = failed or error
            continue
        if not all(value.isfinite().all() for value in out if value.is_floating_point()):
            raise ValueError("the small random model gives NaN")
        return forms
    raise failed or ValueError("there is nothing to run it on")


def _kinds(model: Any) -> Iterator[list[Form]]:
    name, parameters = type(model).__name__, list(inspect.signature(model.forward).parameters)
    if name in HELD:
        yield _held(SHAPES[name], HELD[name])
    elif name in SHAPES:
        yield [_fixed(SHAPES[name])]
    else:
        read = model.main_input_name
        yield from _KINDS[read if read in parameters else parameters[0]](model)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _text(model: Any) -> Iterator[list[Form]]:
    masked = "attention_mask" in inspect.signature(model.forward).parameters

    def make(rows: int, length: int) -> Inputs:
        ids = torch.randint(5, VOCABULARY, (rows, length), generator=_random(length))
        if not masked:
            return {"input_ids": ids}
        lengths = torch.tensor([length, max(length - 9, 2), length - 2, length, length - 1])[:rows]
        mask = (torch.arange(length) < lengths[:, None]).long()
        return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}

    def axes(*names: str) -> dict[str, dict[int, str]]:
        return {name: dict(enumerate(names)) for name in make(2, 8)}

    still = tuple((rows, 21) for rows, _ in TEXTS)
    yield [
        Form(make, axes("batch", "tokens"), (BATCH, 21), TEXTS),
        Form(make, axes("batch"), (BATCH, 21), still, "with a fixed number of tokens"),
    ]


def _images(model: Any) -> Iterator[list[Form]]:
    config, name = model.config, model.main_input_name
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    size = getattr(config, "image_size", None) or SIZES["image_size"]
    high, wide = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None) or 4
    for shape in (
        (channels, high, wide),
        (frames, channels, high, wide),
        (channels, 64, 64),
        (channels, 224, 224),
    ):
        yield [_fixed({name: shape})]


def _fixed(shapes: Mapping[str, tuple[int, ...]], note: str = "") -> Form:
    """Rows of inputs of these shapes."""

    def make(rows: int, _: int) -> Inputs:
        return {
            name: torch.randn(rows, *shape, generator=_random(rows + place))
            for place, (name, shape) in enumerate(shapes.items())
        }

    axes = {name: {0: "batch"} for name in shapes}
    return Form(make, axes, (BATCH, 0), ((1, 0), (3, 0)), note)


def _held(shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, Any]) -> list[Form]:
    """Patches of pictures in a row, and the sizes of the pictures: as inputs, or as numbers that the model holds."""

    def patches(_: int, seed: int) -> Inputs:
        return {name: torch.randn(shape, generator=_random(seed)) for name, shape in shapes.items()}

    def both(rows: int, seed: int) -> Inputs:
        return patches(rows, seed) | {name: torch.tensor(value) for name, value in held.items()}

    calls = ((1, 1), (1, 2))
    note = f"with {' and '.join(held)} as numbers in the model"
    return [Form(both, {}, (1, 0), calls), Form(patches, {}, (1, 0), calls, note, held)]


def _sound(model: Any) -> Iterator[list[Form]]:
    """A wave, or features of frames in either order; their number may vary, or not."""
    name, config = model.main_input_name, model.config
    bands = next(
        (
            size
            for key in ("num_mel_bins", "feature_size", "input_dim", "feature_projection_input_dim", "n_mels")
            if isinstance(size := getattr(config, key, None), int)
        ),
        SIZES["num_mel_bins"],
    )
    bands *= getattr(config, "num_stacked_frames", 1)
    lengths = (
        getattr(config, "max_length", None),
        2 * (getattr(config, "max_source_positions", None) or 0),
        96,
        200,
    )
    for length in [length for length in lengths if length]:
        for masked in (False, True):
            yield _varying(name, lambda n: (n, bands), length, 1, masked)
            yield _varying(name, lambda n: (bands, n), length, 2, masked)
    for length in (2400, 3840, 6400):
        yield _varying(name, lambda n: (n,), length, 1)
        yield _varying(name, lambda n: (1, n), length, 2)


def _varying(
    name: str, shape: Callable[[int], tuple[int, ...]], length: int, axis: int, masked: bool = False
) -> list[Form]:
    def make(rows: int, length: int) -> Inputs:
        made = {name: torch.randn(rows, *shape(length), generator=_random(rows + length))}
        if masked:
            lengths = torch.tensor([length, length - 9, length // 2, length, length - 1])[:rows]
            made[f"{name}_mask"] = (torch.arange(length) < lengths[:, None]).long()
        return made

    free = {name: {0: "batch", axis: "frames"}}
    if masked:
        free[f"{name}_mask"] = {0: "batch", 1: "frames"}
    calls = ((1, length), (2, length // 2), (2, 3 * length))
    rows = {one: {0: "batch"} for one in free}
    note = "with a fixed number of frames"
    still = Form(make, rows, (BATCH, length), ((1, length), (3, length)), note)
    return [Form(make, free, (BATCH, length), calls), still]


_KINDS: dict[str, Callable[[Any], Iterator[list[Form]]]] = {
    "input_ids": _text,
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "input_values": _sound,
    "input_features": _sound,
}
