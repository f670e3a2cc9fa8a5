"""What token reduction costs: features of the reduced model against those of the model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import open_session
from examples.data import CLASSES, cache_folder, fashion_mnist, photograph_views, preprocess, write_atomically

Features = NDArray[np.float32]
NEIGHBOURS, TEMPERATURE = 20, 0.07  # the k-nearest-neighbour protocol of DINO (arXiv 2104.14294)
BATCH = 8


def photograph_features(artifact: Path, size: int, threads: int) -> Features:
    """Class features [40, hidden] of the photographs' views."""
    views = photograph_views(size)
    return _cached(artifact, f"photographs-{size}", lambda run: run(views), threads)


def fashion_features(artifact: Path, size: int, split: str, count: int, threads: int) -> Features:
    """Class features [count, hidden] of Fashion-MNIST images upsampled to ``size``."""

    def extract(run: Callable[[Features], Features]) -> Features:
        images, _ = fashion_mnist(split, count)
        parts = [list(images[i : i + BATCH]) for i in range(0, count, BATCH)]
        return np.concatenate([run(preprocess(part, size)) for part in parts])

    return _cached(artifact, f"fashion-{split}-{count}-{size}", extract, threads)


def predict(train: Features, labels: NDArray[np.int64], test: Features) -> NDArray[np.int64]:
    """Weighted vote of the nearest neighbours by cosine [test count]."""
    similarity = unit(test) @ unit(train).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]
    weight = np.exp(np.take_along_axis(similarity, nearest, axis=1) / TEMPERATURE)
    votes = np.stack([(weight * (labels[nearest] == c)).sum(axis=1) for c in range(CLASSES)], axis=1)
    return votes.argmax(axis=1)


def unit(x: Features) -> Features:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _cached(
    artifact: Path, what: str, extract: Callable[[Callable[[Features], Features]], Features], threads: int
) -> Features:
    """Features by the content of the ONNX file: an interrupted benchmark goes on where it stopped."""
    digest = hashlib.sha256()
    for file in ("forward.onnx", "weights.data"):
        digest.update((artifact / file).read_bytes())
    path = cache_folder() / "features" / f"{digest.hexdigest()[:24]}-{what}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    session = open_session(artifact, threads)
    name = session.get_inputs()[0].name
    features = extract(lambda images: np.asarray(session.run(None, {name: images})[0], np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: np.save(temporary, features))
    return features
