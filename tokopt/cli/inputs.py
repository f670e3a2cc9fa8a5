"""Inputs of ``tokopt run``: ``.npy`` and ``.npz`` files, images, or the artifact's own example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokopt.cli.models import require
from tokopt.errors import InputError
from tokopt.runtime.format.signature import Tensor
from tokopt.runtime.text import Tokenizer

if TYPE_CHECKING:
    from tokopt.analysis.calibration import Sample
    from tokopt.ir.bundle import Bundle

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_inputs(
    paths: Sequence[str], inputs: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
) -> dict[str, np.ndarray]:
    """Named arrays for the inputs of a model: one ``.npz``, or one ``.npy`` per input in order, or a batch of images.

    Images are resized to the program's height and width and normalised as ``(rgb - mean) / std``. Raises
    InputError for a file that is missing, of another kind, or unreadable.
    """
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"there is no file {path}")
    kinds = {"image" if Path(path).suffix.lower() in IMAGES else Path(path).suffix.lower() for path in paths}
    names = [tensor.name for tensor in inputs]
    if kinds == {"image"}:
        return {names[0]: _read_images(paths, inputs, mean, std)}
    if kinds == {".npz"} and len(paths) == 1:
        with _numpy_file(paths[0]) as arrays:
            return {name: arrays[name] for name in arrays.files}
    if kinds == {".npy"}:
        if len(paths) > len(names):
            raise InputError(
                f"{len(paths)} files were given, the program takes {len(names)}: {', '.join(names)}"
            )
        return {name: _numpy_file(path) for name, path in zip(names, paths, strict=False)}
    raise InputError(
        f"inputs are one .npz, or .npy files in the order of {', '.join(names)}, or images; not {paths}"
    )


TEXT = (".txt", ".md", ".rst")
WINDOW = 512
"""Tokens of one calibration sample of text."""


def read_samples(
    paths: Sequence[str], bundle: Bundle, mean: Sequence[float], std: Sequence[float]
) -> list[Sample]:
    """Samples for calibration: every file that ``run`` takes, one by one; text in windows for a language model."""
    if not bundle.schedule.generates:
        names = list(bundle.inputs)
        feeds = (read_inputs([path], tuple(bundle.inputs.values()), mean, std) for path in paths)
        return [[feed[name] for name in names if name in feed] for feed in feeds]
    if bundle.tokenizer is None or bundle.generation is None:
        raise InputError("the bundle has no tokenizer to read text with; capture the model from its folder")
    tokenizer = Tokenizer(bundle.tokenizer, bundle.generation.vocabulary)
    window = min(WINDOW, bundle.generation.context)
    samples: list[Sample] = []
    for path in paths:
        if Path(path).suffix.lower() not in TEXT:
            raise InputError(
                f"{path} is no text ({', '.join(TEXT)}), which a language model is calibrated with"
            )
        ids = tokenizer.encode(read_text(path))
        samples += [ids[start : start + window] for start in range(0, len(ids), window)]
    return samples


def read_text(path: str) -> str:
    """A file of text; raises InputError for any other."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no readable text: {error}") from error


def _numpy_file(path: str):
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is no numpy file without pickled objects: {error}") from error


def _read_images(
    paths: Sequence[str], inputs: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Images [batch, 3, height, width], float32: shorter side resized, centre cropped, normalised."""
    require("PIL")
    from PIL import Image, ImageOps

    axes = inputs[0].axes
    if (
        len(inputs) != 1
        or len(axes) != 4
        or axes[1] != 3
        or not isinstance(axes[2], int)
        or not isinstance(axes[3], int)
    ):
        raise InputError(
            "this program does not take one batch of RGB images of a fixed size; give .npy files"
        )
    size = (axes[3], axes[2])
    pixels = []
    for path in paths:
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise InputError(f"{path} is no readable image: {error}") from error
        pixels.append(np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC), np.float32) / 255)
    normalised = (np.stack(pixels) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), np.float32)
