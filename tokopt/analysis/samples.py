"""What callers give to calibrate, compare and tune with, as the tensors that a bundle takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tokopt.arguments import check_items
from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import BATCH
from tokopt.ir.graph import dtype_name
from tokopt.ir.program import TensorSpec
from tokopt.progress import track
from tokopt.runtime.text import Tokenizer, read_text

Array = Tensor | np.ndarray | Sequence[int]
Text = str | Path
Sample = Text | Array | Sequence[Array] | Sequence[str] | Mapping[str, Array | Text | Sequence[str]]
"""What a caller gives: tensors by name, or in order, or one alone; for a language model ids of texts, or texts.

What a tokenizer of transformers, a row of a dataset and a batch of a DataLoader hold is such a sample: labels and other
tensors that the model does not take are left out. Texts are given as they are, in lists, by the name ``text``, or as
paths of text files.
"""

WINDOW = 512
"""Tokens that a text is read in at a time, at most: a sample."""

FILES = (".txt", ".md", ".rst")
"""Endings of files of text: a line that ends so is the path of one."""

_MASK = "attention_mask"


def read_samples(bundle: Bundle, samples: Iterable[Sample]) -> Iterator[dict[str, Tensor]]:
    """The tensors of every sample by name, one after another: see :func:`tensors_of`.

    Raises InputError for samples that do not fit, and when there are none.
    """
    count = 0
    for sample in track(samples, "Calibrating"):
        for given in tensors_of(bundle, sample):
            yield given
            count += 1
    if not count:
        raise InputError("the calibration data is empty; pass a list of inputs")


def tensors_of(bundle: Bundle, sample: Sample) -> Iterator[dict[str, Tensor]]:
    """The tensors of a sample by name, those of :attr:`Bundle.inputs`; several times where it holds several texts.

    A text is cut into windows of 512 tokens, and rows of token ids that a mask pads are given one by one without the
    padding. Raises InputError for a sample that does not fit the bundle.
    """
    if texts := _texts(sample):
        for text in texts:
            yield from _read(bundle, text)
    elif isinstance(sample, Mapping):
        given = cast(Mapping[str, Array], sample)
        yield from _masked(bundle, given) if bundle.schedule.generates else [_named(bundle, given)]
    else:
        parts = _parts(bundle, cast(Array | Sequence[Array], sample))
        yield _named(bundle, dict(zip(bundle.inputs, parts, strict=False)))


# --- texts ----------------------------------------------------------------------------------------------


def _texts(sample: Sample) -> list[Text]:
    """The texts of a sample that holds nothing else."""
    if isinstance(sample, Mapping):
        return _texts(sample["text"]) if "text" in sample and "input_ids" not in sample else []
    if isinstance(sample, str | Path):
        return [sample]
    if isinstance(sample, Sequence) and sample and all(isinstance(text, str | Path) for text in sample):
        return list(cast(Sequence[Text], sample))
    return []


def _read(bundle: Bundle, text: Text) -> Iterator[dict[str, Tensor]]:
    """A text in windows."""
    if not bundle.schedule.generates or bundle.generation is None:
        raise InputError(
            f"a calibration sample is a text, and the model takes {', '.join(bundle.inputs)}; give its tensors"
        )
    if bundle.tokenizer is None:
        raise InputError(
            "the bundle has no tokenizer to read text with; capture the model from its folder, or give token ids"
        )
    if isinstance(text, Path) or (text.lower().endswith(FILES) and "\n" not in text):
        text = read_text(text)
    ids = _tokenizer(bundle.tokenizer, bundle.generation.vocabulary).encode(text)
    window = min(WINDOW, bundle.generation.context)
    for start in range(0, len(ids), window):
        yield _named(bundle, {_tokens(bundle): ids[start : start + window]})


@lru_cache(maxsize=1)
def _tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """That of the last bundle: one takes longer to make than a text to read."""
    return Tokenizer(text, vocabulary)


def _masked(bundle: Bundle, given: Mapping[str, Array]) -> Iterator[dict[str, Tensor]]:
    """What a tokenizer returns, as it is where nothing is padded, and else text by text."""
    name = _tokens(bundle)
    ids = given.get(name, given.get("input_ids"))
    if ids is None:
        raise _unlike(bundle, given)
    rest = {other: given[other] for other in bundle.inputs if other != name and other in given}
    if _MASK not in given or _MASK in rest:
        yield _named(bundle, {**rest, name: ids})
        return
    tokens, mask = _array(name, ids), _array(_MASK, given[_MASK])
    if tokens.shape != mask.shape or tokens.ndim not in (1, 2):
        raise InputError(
            f"a calibration sample has token ids of shape {list(tokens.shape)} and a mask of {list(mask.shape)}; "
            "give both as [texts, tokens]"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            "a calibration sample has a mask of other numbers than 1 for a token and 0 for padding; give such a mask"
        )
    if bool(mask.all()):
        yield _named(bundle, {**rest, name: tokens})
        return
    for place, (row, kept) in enumerate(zip(torch.atleast_2d(tokens), torch.atleast_2d(mask), strict=True)):
        yield _named(bundle, {**_row(bundle, rest, place), name: row[kept.bool()]})


def _row(bundle: Bundle, given: Mapping[str, Array], place: int) -> dict[str, Array]:
    """What tensors hold of one text of a batch; those without an axis for texts are for all of them."""
    return {
        name: _array(name, value)[place : place + 1] if BATCH in bundle.inputs[name].axes[:1] else value
        for name, value in given.items()
    }


def _tokens(bundle: Bundle) -> str:
    return next(name for name, spec in bundle.inputs.items() if spec.role == "tokens")


# --- tensors --------------------------------------------------------------------------------------------


def _parts(bundle: Bundle, sample: Array | Sequence[Array]) -> Sequence[Array]:
    """Tensors in the order of the bundle's inputs; labels may follow them, which look like none of them."""
    if isinstance(sample, (Tensor, np.ndarray)):
        return [sample]
    takes = "tensors by name, in their order, or one alone"
    parts = check_items("a calibration sample", sample, takes)
    count = len(bundle.inputs)
    if bundle.schedule.generates and count == 1 and not _are_tensors(parts):
        return [cast(Array, sample)]
    if _are_tensors(parts) and any(_alike(bundle, one, parts[:count]) for one in parts[count:]):
        raise InputError(
            f"a calibration sample has {len(parts)} tensors of which one behind the inputs looks like them, and the "
            f"model takes {', '.join(bundle.inputs)}; give tensors by name"
        )
    return parts


def _alike(bundle: Bundle, part: object, inputs: Sequence[object]) -> bool:
    """Whether what follows the inputs may be one of them: a tensor of the shape of one, or another text."""
    if not isinstance(part, (Tensor, np.ndarray)):
        return False
    shapes = [np.shape(cast(np.ndarray, one)) for one in inputs if isinstance(one, (Tensor, np.ndarray))]
    text = bundle.schedule.generates and len(inputs) == 1 and part.ndim == len(shapes[0])
    return tuple(part.shape) in shapes or text


def _are_tensors(parts: Sequence[object]) -> bool:
    """Whether a list holds tensors, and not the numbers of one."""
    return bool(parts) and isinstance(parts[0], (Tensor, np.ndarray)) and parts[0].ndim > 0


def _named(bundle: Bundle, given: Mapping[str, Array]) -> dict[str, Tensor]:
    """What the model takes of tensors by name."""
    specs = bundle.inputs
    if not specs.keys() <= given.keys():
        raise _unlike(bundle, given)
    if _MASK in given and _MASK not in specs and not bool(_array(_MASK, given[_MASK]).all()):
        raise InputError(
            f"a calibration sample is padded and the model takes no {_MASK}; capture it with one, or give inputs "
            "without padding"
        )
    return {name: _tensor(bundle, spec, given[name]) for name, spec in specs.items()}


def _unlike(bundle: Bundle, given: Mapping[str, object]) -> InputError:
    has = ", ".join(map(str, given)) or "nothing"
    return InputError(f"a calibration sample has {has}, the model takes {', '.join(bundle.inputs)}")


def _array(name: str, value: Array) -> Tensor:
    try:
        made = torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))
        if made.layout != torch.strided or made.is_meta:
            raise TypeError("it has no numbers in rows")
        return made
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a calibration sample gives a {type(value).__name__} for {name!r} that is no array of numbers; give a "
            "tensor, or for a language model token ids"
        ) from error


def _tensor(bundle: Bundle, spec: TensorSpec, value: Array) -> Tensor:
    tensor = _array(spec.name, value)
    if spec.role == "tokens":
        assert bundle.generation is not None
        return _token_ids(tensor, bundle.generation.vocabulary)
    if tensor.ndim != len(spec.axes) or any(
        isinstance(axis, int) and axis != size for axis, size in zip(spec.axes, tensor.shape, strict=True)
    ):
        raise InputError(
            f"a calibration sample has shape {list(tensor.shape)} for {spec.name!r}, which is {spec.axes}"
        )
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
        raise InputError(
            f"a calibration sample has {dtype_name(tensor.dtype)} for {spec.name!r}, which is {spec.dtype}"
        )
    return tensor.to(dtype)


def _token_ids(ids: Tensor, vocabulary: int) -> Tensor:
    """Ids of one text or of several [batch, tokens]."""
    ids = ids[None] if ids.ndim == 1 else ids
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    ids = ids.long() if whole else ids  # files of tokens hold uint16, of which torch finds no largest one
    if (
        not whole
        or ids.ndim != 2
        or not ids.numel()
        or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
    ):
        raise InputError(
            f"a calibration sample of shape {list(ids.shape)} is no text: give token ids below {vocabulary}"
        )
    return ids
