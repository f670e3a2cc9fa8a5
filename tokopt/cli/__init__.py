"""The ``tokopt`` command: one verb per step from a model to a file that runs.

Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 3 a pass refused in strict mode.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from tokopt import __version__
from tokopt.cli.screen import Screen
from tokopt.errors import PassRefused, TokoptError

BAD_INPUT, REFUSED, INTERRUPTED = 2, 3, 130

_MODEL = "a Hugging Face folder, a .pt2 file, an artifact, or module:factory"
_PIPELINE = 'passes joined by commas, for example "tome{r=16},evit{keep=0.7}"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors of tokopt are one line on stderr."""
    args = _parser().parse_args(argv)
    verbs = import_module("tokopt.cli.verbs")
    try:
        code = getattr(verbs, args.verb)(args, Screen(args.json))
        sys.stdout.flush()
        return code
    except TokoptError as error:
        if args.traceback:
            raise
        print(f"tokopt: error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, PassRefused) else BAD_INPUT
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokopt",
        description="Make transformer models do less work per token: capture, optimise, export, run.",
        epilog="exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 3 refused in strict mode",
    )
    parser.add_argument("--version", action="version", version=f"tokopt {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        added.add_argument("--traceback", action="store_true", help="show where an error was raised")
        return added

    p = verb(
        "capture",
        "turn a model into an artifact that the other verbs read",
        "tokopt capture ./dinov2-small -o dino.tokopt",
    )
    p.add_argument("model", metavar="MODEL", help=_MODEL)
    _output(p)
    p.add_argument("--image-size", type=int, metavar="N", help="pixels per side of the example images")
    p.add_argument("--tokens", type=int, metavar="N", help="length of the example text (default: 32)")
    p.add_argument(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="2,3,224,224",
        help="shape of a random float32 example for a factory that returns none; once per input",
    )
    p.add_argument(
        "--class", dest="model_class", metavar="NAME", help="class of transformers (default: AutoModel)"
    )

    p = verb(
        "optimize", "run a pipeline of passes", 'tokopt optimize dino.tokopt "tome{r=16}" -o merged.tokopt'
    )
    _artifact_and_pipeline(p)
    _output(p)
    p.add_argument(
        "--strict", action="store_true", help="exit with 3 when a pass refuses a site or changes nothing"
    )
    p.add_argument(
        "--calibrate",
        nargs="+",
        metavar="FILE",
        help="real inputs for passes that measure: images, .npy, .npz, or text for a language model",
    )
    _colours(p)
    p.add_argument("--dump", type=Path, metavar="DIR", help="write the program's code there after every pass")
    p.add_argument(
        "--reproducers", type=Path, metavar="DIR", help="where to write a reproducer when a pass fails"
    )

    p = verb(
        "export",
        "lower a bundle and save it for the runtime",
        "tokopt export merged.tokopt -o vit.tokopt --target onnx",
    )
    p.add_argument("artifact", metavar="MODEL", help=_MODEL)
    _output(p)
    p.add_argument(
        "--target", choices=("onnx", "torch", "tensorrt", "triton"), default="onnx", help="default: onnx"
    )
    engine = p.add_argument_group("engines of the target tensorrt")
    engine.add_argument(
        "--arch", metavar="sm_86", help="compute capability (default: that of this machine's GPU)"
    )
    engine.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="batch=1:8:32",
        help="smallest, most frequent and largest size of a named axis, or its only one (slots=1024); once per axis",
    )
    engine.add_argument(
        "--workspace", type=float, metavar="GIB", help="bound of the builder's scratch memory"
    )
    engine.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="where TensorRT keeps measurements for the next build",
    )
    engine.add_argument(
        "--plugins",
        action="store_true",
        help="compute token ops by CUDA kernels in the engine (TensorRT alone)",
    )
    triton = p.add_argument_group(
        "--target triton",
        "DIR is the model's folder in the repository of a Triton Inference Server: tokopt export vit.tokopt -o "
        "models/vit --target triton --gpu",
    )
    triton.add_argument("--max-batch", type=_positive, metavar="N", help="rows computed at once (default: 8)")
    triton.add_argument("--instances", type=_positive, metavar="N", help="copies of the model (default: 1)")
    triton.add_argument("--gpu", action="store_true", default=None, help="on every GPU (default: on the CPU)")
    triton.add_argument(
        "--slots", type=_positive, metavar="N", help="tokens that a sequence can hold (default: the context)"
    )
    _threads(triton)

    p = verb(
        "inspect",
        "show attention sites, tokens and cost, or the manifest of an ONNX artifact",
        "tokopt inspect dino.tokopt",
    )
    p.add_argument("artifact", metavar="MODEL", help=_MODEL)

    p = verb(
        "estimate",
        "predict what a pipeline saves, before exporting anything",
        'tokopt estimate dino.tokopt "tome{r=16}"',
    )
    _artifact_and_pipeline(p)

    p = verb(
        "run",
        "run an artifact on .npy, .npz or image files",
        "tokopt run vit.tokopt photo.jpg -o features.npy",
    )
    p.add_argument("artifact", metavar="ARTIFACT")
    p.add_argument(
        "inputs", nargs="*", metavar="FILE", help="inputs (default: the example stored in the artifact)"
    )
    p.add_argument("-o", "--output", type=Path, metavar="FILE", help="save to .npy or .npz")
    _colours(p)
    _threads(p)
    _backend(p)

    p = verb(
        "generate",
        "continue a prompt with a language model",
        'tokopt generate smollm2.tokopt "Name three colours." --chat --stream',
    )
    p.add_argument("artifact", metavar="ARTIFACT")
    p.add_argument("prompt", metavar="PROMPT")
    p.add_argument("--stream", action="store_true", help="show the text as it comes")
    p.add_argument("--chat", action="store_true", help="the prompt is a message; use the chat template")
    p.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="default: 128")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    for name, default, summary in (
        ("temperature", 0.0, "0 (the default) is greedy"),
        ("top-p", 1.0, "draw from the likeliest tokens of this mass"),
        ("min-p", 0.0, "draw from tokens this likely, relative to the likeliest"),
        ("typical-p", 1.0, "locally typical sampling: mass"),
        ("top-h", 0.0, "Top-H sampling: share of the entropy"),
        ("repetition-penalty", 1.0, "above 1: avoid tokens that were there before"),
    ):
        p.add_argument(f"--{name}", type=float, default=default, metavar="X", help=summary)
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    p.add_argument("--seed", type=int, metavar="N", help="repeat the same draws")
    _threads(p)
    _backend(p)

    p = verb("verify", "check an artifact's hashes and run its self-test", "tokopt verify vit.tokopt")
    p.add_argument("artifact", metavar="ARTIFACT")

    p = verb(
        "bench",
        "time artifacts in turns and print their ratio to the first",
        "tokopt bench plain.tokopt merged.tokopt",
    )
    p.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    p.add_argument("--rounds", type=_positive, default=20, metavar="N", help="default: 20")
    _batch(p)
    _threads(p)
    _backend(p)

    p = verb(
        "bisect",
        "find the first pass after which the outputs differ too much",
        'tokopt bisect dino.tokopt "tome{r=8},evit{keep=0.7}" --tolerance 0.1',
    )
    _artifact_and_pipeline(p)
    p.add_argument(
        "--tolerance",
        type=float,
        required=True,
        metavar="X",
        help="the largest normalised mean squared error that is fine",
    )

    p = verb(
        "compare",
        "measure what a pipeline cost, on real inputs: cosine, or KL, top-1 and perplexity",
        "tokopt compare smollm2.bundle.tokopt w4.bundle.tokopt text.txt",
    )
    p.add_argument("artifact", metavar="MODEL", help=_MODEL)
    p.add_argument("other", metavar="MODEL", help="what was made of it")
    p.add_argument(
        "inputs", nargs="+", metavar="FILE", help="images, .npy, .npz, or text for a language model"
    )
    _colours(p)

    p = verb(
        "tune",
        "search the fastest pipeline of sufficient quality on this machine",
        'tokopt tune dino.bundle.tokopt photos/*.jpg -o tuned --floor "cosine>=0.99" --minutes 20',
    )
    p.add_argument("artifact", metavar="MODEL", help=_MODEL)
    p.add_argument(
        "inputs", nargs="+", metavar="FILE", help="images, .npy, .npz, or text for a language model"
    )
    _output(p)
    p.add_argument("--floor", default="", metavar="F", help="default: cosine>=0.99, or KL<=0.05")
    p.add_argument(
        "--metric",
        metavar="module:function",
        help='a measure of your own, of an artifact\'s folder: --metric mine:accuracy --floor "metric>=0.8"',
    )
    p.add_argument(
        "--candidates",
        action="append",
        default=[],
        nargs="+",
        metavar="PIPELINE",
        help="methods of one kind, of which a pipeline takes one; give it once per kind",
    )
    p.add_argument(
        "--minutes", type=float, default=30.0, metavar="N", help="no trial begins later (default: 30)"
    )
    p.add_argument(
        "--prompt",
        type=_positive,
        default=256,
        metavar="N",
        help="tokens before those that are timed (default: 256)",
    )
    _batch(p)
    _threads(p)
    _colours(p)

    verb("passes", "list the passes with their options", "tokopt passes")
    return parser


def _artifact_and_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="MODEL", help=_MODEL)
    parser.add_argument("pipeline", metavar="PIPELINE", help=_PIPELINE)


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="the artifact to write"
    )


def _colours(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mean", type=_numbers, default=(0.485, 0.456, 0.406), help="of each colour (default: ImageNet's)"
    )
    parser.add_argument(
        "--std", type=_numbers, default=(0.229, 0.224, 0.225), help="of each colour (default: ImageNet's)"
    )


def _batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=_positive, metavar="N", help="batch size (default: that of the stored example)"
    )


def _threads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="threads of the engine (default: all cores)"
    )


def _backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("onnxruntime", "openvino", "tensorrt", "torch-cuda"),
        default="onnxruntime",
        help="the engine (default: onnxruntime; openvino takes encoders, tensorrt and torch-cuda their targets)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
