"""``tokopt export``: lower a bundle to its deployable form."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokopt.cli.models import deployed_manifest, read_bundle
from tokopt.cli.options import add_model, add_output, add_threads, positive
from tokopt.cli.screen import Screen, si
from tokopt.cli.verb import OK, Verb
from tokopt.errors import InputError

if TYPE_CHECKING:
    from tokopt.lower.tensorrt.engine import EngineOptions

_SERVING = ("max_batch", "instances", "gpu", "threads", "slots")
"""The options of ``--target triton``, by the names of :class:`tokopt.lower.triton.model.Serving`."""


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    add_output(parser)
    parser.add_argument(
        "--target",
        choices=("onnx", "torch", "tensorrt", "torch-tensorrt", "triton"),
        default="onnx",
        help="default: onnx",
    )
    _add_engine_options(parser)
    _add_serving_options(parser)


def _add_engine_options(parser: ArgumentParser) -> None:
    engine = parser.add_argument_group("engines of the targets tensorrt and torch-tensorrt")
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
    engine.add_argument(
        "--strict",
        action="store_true",
        help="refuse what Torch-TensorRT would leave to PyTorch",
    )


def _add_serving_options(parser: ArgumentParser) -> None:
    triton = parser.add_argument_group(
        "--target triton",
        "DIR is the model's folder in the repository of a Triton Inference Server: tokopt export vit.tokopt -o "
        "models/vit --target triton --gpu",
    )
    triton.add_argument("--max-batch", type=positive, metavar="N", help="rows computed at once (default: 8)")
    triton.add_argument("--instances", type=positive, metavar="N", help="copies of the model (default: 1)")
    triton.add_argument("--gpu", action="store_true", default=None, help="on every GPU (default: on the CPU)")
    triton.add_argument(
        "--slots", type=positive, metavar="N", help="tokens that a sequence can hold (default: the context)"
    )
    add_threads(triton)


def run(args: Namespace, screen: Screen) -> int:
    serving = {name: getattr(args, name) for name in _SERVING if getattr(args, name) is not None}
    engine = _engine_options(args)
    if serving and args.target != "triton":
        raise InputError(
            f"--{next(iter(serving)).replace('_', '-')} belongs to --target triton; leave it out"
        )
    steps: list[str] = []
    with screen.step(f"Exporting {args.artifact} to {args.target}") as say:

        def note_step(line: str) -> None:
            steps.append(line)
            say(line)

        if args.target == "triton":
            path = _write_triton(args, serving, engine)
            note = f"for tritonserver --model-repository={path.absolute().parent}"
        else:
            import tokopt

            bundle = read_bundle(args.artifact, say=note_step)
            path = tokopt.export(bundle, args.output, target=args.target, engine=engine, progress=note_step)
            note = "checked against the captured program"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for step in steps:
        screen.line(step)
    screen.line(f"{path}: {args.target}, {si(size)}B, {note}")
    screen.finish({"artifact": path, "target": args.target, "bytes": size, "steps": steps})
    return OK


def _engine_options(args: Namespace) -> EngineOptions | None:
    """What the command says of engines; None when it says nothing."""
    given = (args.arch, tuple(args.profile), args.workspace, args.timing_cache, args.plugins, args.strict)
    if given == (None, (), None, None, False, False):
        return None
    from tokopt.lower.tensorrt.engine import EngineOptions

    return EngineOptions(*given)


def _write_triton(args: Namespace, serving: dict[str, Any], engine: EngineOptions | None) -> Path:
    """The model's folder in Triton's repository, made of a bundle or of an artifact as it is."""
    from tokopt.lower.triton.model import Serving, write_model

    if engine is not None:
        raise InputError("engine options mean nothing to the target 'triton'; leave them out")
    source = args.artifact if deployed_manifest(args.artifact) else read_bundle(args.artifact)
    return write_model(source, args.output, Serving(**serving))


VERB = Verb(
    "lower a bundle and save it for the runtime",
    "tokopt export merged.tokopt -o vit.tokopt --target onnx",
    add_options,
    run,
)
