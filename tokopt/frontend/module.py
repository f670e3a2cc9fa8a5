"""The front end: an ``nn.Module``, an ExportedProgram or a ``.pt2`` file becomes a normalised Bundle.

Not named ``capture.py``: once imported, a module ``tokopt.capture`` would hide the function of that name.
"""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from tokopt import errors
from tokopt.arguments import check_path
from tokopt.errors import ArtifactError, CaptureError, InputError
from tokopt.frontend.arguments import check_axes, check_example, check_tokenizer
from tokopt.frontend.from_numbers import FromNumbers
from tokopt.frontend.imaginary import InReal
from tokopt.frontend.normalize import normalize
from tokopt.frontend.pt2 import load_pt2
from tokopt.frontend.purity import check_captured, refuse_random, run_unchanged
from tokopt.ir.bundle import Bundle, fresh
from tokopt.ir.export import export_flat, output_specs
from tokopt.ir.format import Entry, Schedule
from tokopt.ir.graph import dtype_name
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.runtime.format.signature import DTYPES

Dynamic = Mapping[str, Sequence[str | None] | Mapping[int, str]]
"""Input name -> the name of each axis (None: static), or axis index -> name."""

TORCHSCRIPT = "torch.export cannot trace TorchScript; capture the nn.Module that was scripted or traced"

_SMALLEST_EXAMPLE = 2  # torch.export specialises axes whose example size is 0 or 1


class _Flat(torch.nn.Module):
    """The user's model in tokopt's calling convention: positional tensors in, a flat tuple of tensors out."""

    def __init__(self, model: torch.nn.Module, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model = model
        self._leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self._spec = spec
        self.mode: type[InReal] = InReal
        """What the model is traced under."""
        self.overwritten: Sequence[bool] | None = None
        """Which inputs the model writes to: it gets copies of them."""

    def call(self, tensors: Sequence[torch.Tensor]) -> object:
        overwritten = self.overwritten or [False] * len(tensors)
        given = iter([t.clone() if copy else t for t, copy in zip(tensors, overwritten, strict=True)])
        leaves = [
            next(given) if is_tensor else leaf
            for leaf, is_tensor in zip(self._leaves, self._is_tensor, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self.model(*args, **kwargs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self.mode():
            made = self.call(tensors)
        return tuple(leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor))


def capture(
    model: torch.nn.Module | torch.export.ExportedProgram | str | Path,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic | None = None,
    ranges: Mapping[str, AxisRange] | None = None,
    tokenizer: str | None = None,
) -> Bundle:
    """Capture a model on example inputs.

    ``model`` is a module, an ExportedProgram, or the path of a ``.pt2`` file (the last two bring their own
    example inputs when ``args`` is empty, and keep the dynamic axes they have). ``dynamic`` names the axes
    that may change, for example ``{"ids": ("batch", "tokens"), "mask": ("batch", "tokens")}``; without it,
    axis 0 of every input is ``batch``; ``{}`` makes everything static. ``ranges`` bounds the named axes.
    ``tokenizer`` is the text of a ``tokenizer.json`` that travels with the artifact.

    The graph is normalised: masks that hide nothing are dropped and softmax chains become
    ``scaled_dot_product_attention``. Raises CaptureError when ``torch.export`` cannot trace the model or an
    axis cannot be dynamic, when the model draws random numbers or keeps something between calls, and InputError when
    the example does not fit ``dynamic``.
    """
    check_example(args, kwargs)
    check_axes(dynamic, ranges)
    check_tokenizer(tokenizer)
    if isinstance(model, (str, Path)):
        model = check_path("model", model)
    module, args, kwargs, own = _as_module(model, args, dict(kwargs or {}))
    with evaluation(module):
        leaves, spec = pytree.tree_flatten((args, kwargs))
        flat = _Flat(module, leaves, spec)
        names = _input_names(module, args, kwargs)
        if dynamic is None and own is not None:
            dynamic = dict(zip(names, own, strict=True))
        example = tuple(leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor))
        if not example:
            raise CaptureError("capture needs example inputs; pass them as capture(model, (images,))")
        axes = _named_axes(names, example, dynamic)
        example = _grow_example(example, axes)
        _check_sizes(names, example, axes)
        inputs = tuple(
            TensorSpec(name, dtype_name(t.dtype), tuple(a or s for a, s in zip(ax, t.shape, strict=True)))
            for name, t, ax in zip(names, example, axes, strict=True)
        )
        used = {axis: AxisRange() for spec in inputs for axis in spec.axes if isinstance(axis, str)}
        for axis in ranges or {}:
            if axis not in used:
                known = ", ".join(used) or "none"
                raise InputError(
                    f"ranges names the axis {axis!r}, which is not dynamic; those that are: {known}"
                )
        bounds = {**used, **(ranges or {})}
        outputs = _outputs(flat, example, names)
        _check_dtypes({**dict(zip(names, example, strict=True)), **outputs}, type(module).__name__)
        try:
            graph, bounds = _exported(flat, example, inputs, bounds)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(explain(error, module, inputs)) from error
        blank = tuple(TensorSpec(name, "float32", (), "output") for name in outputs)
        program = Program(graph, inputs, blank, bounds, example)
        refuse_random(program.module, type(module).__name__)
        program = replace(program, outputs=output_specs(program))
        check_captured(program, list(outputs.values()), type(module).__name__)
    program = normalize(program)
    return Bundle({"forward": program}, Schedule((Entry("forward", "encode"),)), tokenizer=tokenizer)


def _exported(
    flat: _Flat,
    example: tuple[torch.Tensor, ...],
    inputs: tuple[TensorSpec, ...],
    bounds: Mapping[str, AxisRange],
) -> tuple[torch.fx.GraphModule, Mapping[str, AxisRange]]:
    """As :func:`export_flat`; where a size is read off values, those that follow from numbers are computed before."""
    try:
        return export_flat(flat, example, inputs, bounds)
    except (CaptureError, GuardOnDataDependentSymNode) as error:
        flat.mode = FromNumbers
        try:
            return export_flat(flat, example, inputs, bounds)
        except Exception:
            raise error from None  # the values are those of inputs


def _as_module(
    model: Any, args: tuple, kwargs: dict
) -> tuple[torch.nn.Module, tuple, dict, list[dict[int, str]] | None]:
    """The module, its example inputs, and the dynamic axes that an ExportedProgram brings."""
    own = None
    if isinstance(model, (str, Path)):
        if not Path(model).is_file():
            raise CaptureError(
                f"no such file: {model}; capture takes a module, an ExportedProgram or a .pt2 file"
            )
        import tokopt.kernels.registry  # noqa: F401  # registers the ops that the file may call

        try:
            model = load_pt2(Path(model))
        except ArtifactError as error:
            raise CaptureError(str(error)) from error
    if isinstance(model, torch.export.ExportedProgram):
        if not args and not kwargs and model.example_inputs is not None:
            args, kwargs = model.example_inputs
        own = _exported_axes(model)
        model = model.module(check_guards=False)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(TORCHSCRIPT)
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}; pass an nn.Module, an ExportedProgram or a .pt2 path"
        )
    return model, tuple(args), dict(kwargs), own


def _exported_axes(exported: torch.export.ExportedProgram) -> list[dict[int, str]]:
    """The symbolic axes of every input tensor, in order; the first that leads a tensor is named ``batch``."""
    names: dict[str, str] = {}
    result = []
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.name not in exported.graph_signature.user_inputs or not isinstance(value, torch.Tensor):
            continue
        axes: dict[int, str] = {}
        for i, size in enumerate(value.shape):
            if not isinstance(size, int):
                leads = i == 0 and "batch" not in names.values()
                axes[i] = names.setdefault(str(size), "batch" if leads else f"axis_{len(names)}")
        result.append(axes)
    return result


class evaluation:
    """Evaluation mode without gradients, and the attention fast path (one opaque op) off; restored after."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.training = [(m, m.training) for m in self.module.modules()]
        self.gradients = [(p, p.requires_grad) for p in self.module.parameters()]
        self.fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        for m, _ in self.training:
            m.training = False
        for p, _ in self.gradients:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self.fastpath)
        for m, training in self.training:
            m.training = training
        for p, wanted in self.gradients:
            p.requires_grad_(wanted)


def _input_names(module: torch.nn.Module, args: tuple, kwargs: dict) -> list[str]:
    """One name per tensor: the parameter of ``forward`` it belongs to, with its path inside when nested."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the example inputs do not fit {type(module).__name__}.forward: {error}") from error
    roots = [*_positional_names(signature, len(args)), *kwargs]
    names: list[str] = []
    for root, value in zip(roots, [*args, *kwargs.values()], strict=True):
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                names.append(fresh(_path_name(root, path), names))
    return names


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    """The parameters that ``count`` positional arguments go to; several of ``*args`` are numbered."""
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            rest = count - len(names)
            names += [f"{parameter.name}_{i}" if rest > 1 else parameter.name for i in range(rest)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count]


def _path_name(root: str, path: tuple) -> str:
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return re.sub(r"\W", "_", "_".join(filter(None, [root, *parts])))


def _outputs(
    flat: _Flat, example: tuple[torch.Tensor, ...], inputs: Sequence[str]
) -> dict[str, torch.Tensor]:
    """What the model gives on the example, by names that no input has; notes which inputs it writes to."""
    overwritten: list[bool] = []

    def call() -> object:
        copies = [tensor.clone() for tensor in example]
        before = [tensor._version for tensor in copies]
        try:
            result = flat.call(copies)
        except Exception as error:
            raise CaptureError(
                f"{type(flat.model).__name__} fails on the example inputs: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error
        overwritten[:] = [tensor._version != count for tensor, count in zip(copies, before, strict=True)]
        return result

    with torch.no_grad():
        result = run_unchanged(flat.model, call)
    flat.overwritten = overwritten
    if isinstance(result, torch.Tensor):
        return {fresh("output", inputs): result}
    named: dict[str, torch.Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(result)[0]:
        if isinstance(leaf, torch.Tensor):
            name = _path_name("", path)
            name = f"output_{name}" if name.isdigit() or name in inputs else name
            named[fresh(name, [*inputs, *named])] = leaf
    if not named:
        raise CaptureError(f"{type(flat.model).__name__} returns no tensor")
    return named


def _check_dtypes(tensors: Mapping[str, torch.Tensor], model: str) -> None:
    for name, tensor in tensors.items():
        if dtype_name(tensor.dtype) not in DTYPES:
            raise CaptureError(
                f"{name!r} of {model} is {dtype_name(tensor.dtype)}, which no artifact can hold; convert it inside "
                "the model"
            )


def _named_axes(
    names: list[str], example: tuple[torch.Tensor, ...], dynamic: Dynamic | None
) -> list[tuple[str | None, ...]]:
    if dynamic is None:
        dynamic = {name: {0: "batch"} for name, t in zip(names, example, strict=True) if t.dim()}
    for name in dynamic:
        if name not in names:
            raise InputError(
                f"dynamic names the input {name!r}, which the model does not have; it has {names}"
            )
    result = []
    for name, tensor in zip(names, example, strict=True):
        given = dynamic.get(name, {})
        by_index = given if isinstance(given, Mapping) else dict(enumerate(given))
        if any(not -tensor.dim() <= i < tensor.dim() for i in by_index):
            raise InputError(f"dynamic names axis {max(by_index)} of {name!r}, which has {tensor.dim()} axes")
        by_index = {i % tensor.dim(): axis for i, axis in by_index.items()}
        result.append(tuple(by_index.get(i) for i in range(tensor.dim())))
    return result


def _grow_example(
    example: tuple[torch.Tensor, ...], axes: list[tuple[str | None, ...]]
) -> tuple[torch.Tensor, ...]:
    """Repeat the example along dynamic axes of size 1, which ``torch.export`` would otherwise make static."""
    grown = []
    for tensor, names in zip(example, axes, strict=True):
        if 0 in tensor.shape:
            raise InputError(f"an example input has shape {tuple(tensor.shape)}; every axis needs at least 1")
        repeats = [_SMALLEST_EXAMPLE if n and s == 1 else 1 for n, s in zip(names, tensor.shape, strict=True)]
        grown.append(tensor.repeat(repeats) if any(r > 1 for r in repeats) else tensor)
    return tuple(grown)


def _check_sizes(
    names: list[str], example: tuple[torch.Tensor, ...], axes: list[tuple[str | None, ...]]
) -> None:
    """An axis of one name has one size."""
    known: dict[str, tuple[str, int]] = {}
    for name, tensor, named in zip(names, example, axes, strict=True):
        for axis, size in zip(named, tensor.shape, strict=True):
            other, found = known.setdefault(axis, (name, size)) if axis else (name, size)
            if found != size:
                raise InputError(
                    f"axis {axis!r} is {found} in {other!r} and {size} in {name!r}; give them names of their own in "
                    "dynamic, or an example of one size"
                )


_OWN = ("/imaginary.py",)
"""Files of tokopt that a model's functions run through."""


def explain(
    error: Exception, model: torch.nn.Module, inputs: tuple[TensorSpec, ...], *, fixable: bool = True
) -> str:
    """One sentence from an error of ``torch.export``, naming the user's axis and the line of the model.

    ``fixable`` says that whoever captures chose the axes that vary, and may fix one. What torch says itself is the
    cause of the error that is raised with this sentence.
    """
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        return TORCHSCRIPT
    text = str(error)
    name = type(model).__name__
    axes = sorted({axis for spec in inputs for axis in spec.axes if isinstance(axis, str)})
    line = [at for at in re.findall(r'File "([^"]+)", line (\d+)', text) if not at[0].endswith(_OWN)]
    where = f" (at {line[-1][0].rsplit('/', 1)[-1]}:{line[-1][1]})" if line else ""
    leave = "leave {} out of dynamic, or " if fixable else ""
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            f"{name} cannot be captured{where}: it decides by the values of its inputs what to compute, and a graph "
            "computes the same of all; make it independent of them (torch.where in place of if, all experts in place "
            "of a loop over the chosen ones)"
        )
    for axis in axes:
        if found := re.search(rf"\b{axis}\b\s*=\s*(\d+)\b(?!\*)", text):
            return (
                f"{name} fixes axis {axis!r} to {found[1]}{where}; {leave.format(repr(axis))}make the model "
                "independent of that size"
            )
    asked = re.search(r"Not all values of (\w+) = ", text)
    tied = [
        axis for axis in axes if (asked and asked[1] == axis) or f"({axis})" in text or f"'{axis}'" in text
    ]
    if tied:
        axis = tied[0]
        multiple = re.search(rf"\b{axis} = (\d+)\*_{axis}\b", text)
        sizes = f"multiples of {multiple[1]}" if multiple else "some of its sizes"
        return (
            f"{name} cannot be captured with axis {axis!r} dynamic{where}: it fits only {sizes}, or torch.export "
            f"cannot prove that it fits all; {leave.format(repr(axis))}make the model independent of that size"
        )
    where = where or place_in_model(error)
    if "expected to contain only concrete integers" in text:
        listed = ", ".join(map(repr, axes))
        return (
            f"{name} cannot be captured{where}: an operator there takes sizes that are fixed alone; "
            f"{leave.format(listed)}do without that operator"
        )
    return (
        f"{name} cannot be captured{where}: torch.export does not follow what the model does there; write it in "
        "another way, or capture a part of the model without it"
    )


def place_in_model(error: BaseException) -> str:
    """`` (at file:line)``: the innermost line of the model's code that an error went through; empty without one."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours, torchs = (str(Path(file).resolve().parent) + os.sep for file in (errors.__file__, torch.__file__))
    inside = next((place for place, file in enumerate(frames) if file.startswith(ours)), len(frames))
    lines = [
        f" (at {Path(frame.filename).name}:{frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)[inside:]
        if not frame.filename.startswith((ours, torchs, "<"))
    ]
    return lines[-1] if lines else ""
