"""Inputs of ``tokopt run``: ``.npy`` and ``.npz`` files, images, or the artifact's own example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokopt.cli.models import require
from tokopt.errors import InputError
from tokopt.runtime.format.signature import Tensor

if TYPE_CHECKING:
    from tokopt.analysis.samples import Sample
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


def read_samples(
    paths: Sequence[str], bundle: Bundle, mean: Sequence[float], std: Sequence[float]
) -> list[Sample]:
    """Samples for calibration: every file that ``run`` takes, one by one; text for a language model."""
    from tokopt.analysis.samples import FILES

    if not bundle.schedule.generates:
        names = list(bundle.inputs)
        feeds = (read_inputs([path], tuple(bundle.inputs.values()), mean, std) for path in paths)
        return [[feed[name] for name in names if name in feed] for feed in feeds]
    for path in paths:
        if not path.lower().endswith(FILES):
            raise InputError(
                f"{path} is no text ({', '.join(FILES)}), of which the samples of a language model are"
            )
    return [Path(path) for path in paths]


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
