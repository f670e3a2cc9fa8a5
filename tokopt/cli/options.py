"""Options and arguments that several verbs take."""

from __future__ import annotations

import argparse
from pathlib import Path

MODEL = "a Hugging Face folder, a .gguf or .pt2 file, an artifact, or module:factory"
SAMPLES = "images, .npy, .npz, or text for a language model"


def add_model(parser: argparse.ArgumentParser) -> None:
    """``artifact``: a model by any of its names."""
    parser.add_argument("artifact", metavar="MODEL", help=MODEL)


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """``pipeline``: its text."""
    parser.add_argument(
        "pipeline",
        metavar="PIPELINE",
        help='passes joined by commas, for example "tome{r=16},evit{keep=0.7}"',
    )


def add_artifact(parser: argparse.ArgumentParser) -> None:
    """``artifact``: the folder of an artifact, which is not captured."""
    parser.add_argument("artifact", metavar="ARTIFACT")


def add_samples(parser: argparse.ArgumentParser) -> None:
    """``inputs``: at least one file of real inputs."""
    parser.add_argument("inputs", nargs="+", metavar="FILE", help=SAMPLES)


def add_output(parser: argparse.ArgumentParser) -> None:
    """``output``: where the artifact goes."""
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="the artifact to write"
    )


def add_colours(parser: argparse.ArgumentParser) -> None:
    """``mean`` and ``std``: how images are normalised."""
    parser.add_argument(
        "--mean", type=numbers, default=(0.485, 0.456, 0.406), help="of each colour (default: ImageNet's)"
    )
    parser.add_argument(
        "--std", type=numbers, default=(0.229, 0.224, 0.225), help="of each colour (default: ImageNet's)"
    )


def add_batch(parser: argparse.ArgumentParser) -> None:
    """``batch``: rows of the timed inputs."""
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="batch size (default: that of the stored example)"
    )


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """``prompt``: the length of the text before what is timed of a language model."""
    parser.add_argument(
        "--prompt",
        type=positive,
        default=256,
        metavar="N",
        help="tokens that a language model has read before what is timed (default: 256)",
    )


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """``max_tokens``: the length of the text after the prompt."""
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="tokens of a text after its prompt, over which the time of one is a mean (default: 128)",
    )


def add_threads(parser: argparse._ActionsContainer) -> None:
    """``threads``: of the engine."""
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads of the engine (default: all cores)"
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """``backend``: the engine that runs an artifact."""
    parser.add_argument(
        "--backend",
        choices=("onnxruntime", "openvino", "tensorrt", "torch-cuda"),
        default="onnxruntime",
        help="the engine (default: onnxruntime; openvino takes encoders, tensorrt and torch-cuda their targets)",
    )


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def natural(text: str) -> int:
    """An integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def shape(text: str) -> tuple[int, ...]:
    """Sizes joined by commas.

    >>> shape("2,3,224,224")
    (2, 3, 224, 224)
    """
    return tuple(positive(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers joined by commas."""
    return tuple(float(part) for part in text.split(","))
