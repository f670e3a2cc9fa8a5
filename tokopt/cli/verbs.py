"""One function per verb of the ``tokopt`` command: do the work, show it, return the exit code."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tokopt.cli.models import ExampleOptions, imported, read_bundle
from tokopt.cli.screen import Screen, si
from tokopt.errors import InputError
from tokopt.runtime.format.manifest import ENGINE

if TYPE_CHECKING:
    from tokopt.lower.tensorrt.engine import EngineOptions
    from tokopt.pipeline.manager import Report
    from tokopt.runtime.format.manifest import Manifest

OK, FAILED = 0, 1


def capture(args: Namespace, screen: Screen) -> int:
    """MODEL -> an artifact of target torch."""
    import tokopt

    options = ExampleOptions(args.image_size, args.tokens, tuple(args.shape), args.model_class)
    with screen.step(f"Capturing {args.model}"):
        bundle = read_bundle(args.model, options)
        path = tokopt.export(bundle, args.output, target="torch")
    program = bundle.main
    screen.line(f"{path}: {_spell(program.inputs)} -> {_spell(program.outputs)}")
    screen.finish({"artifact": path, "inputs": _specs(program.inputs), "outputs": _specs(program.outputs)})
    return OK


def optimize(args: Namespace, screen: Screen) -> int:
    """Run a pipeline and save the result as an artifact of target torch."""
    import tokopt
    from tokopt.cli.inputs import read_samples
    from tokopt.pipeline.base import Context
    from tokopt.pipeline.manager import as_pipeline
    from tokopt.pipeline.observers import dump_to

    pipeline = as_pipeline(args.pipeline)
    observers = (dump_to(args.dump),) if args.dump else ()
    with screen.step(f"Optimising {args.artifact} with {pipeline}"):
        given = read_bundle(args.artifact)
        samples = read_samples(args.calibrate, given, args.mean, args.std) if args.calibrate else None
        context = Context(args.strict, observers, args.reproducers, samples)
        bundle, report = pipeline.run(given, context)
        path = tokopt.export(bundle, args.output, target="torch")
    _show_report(report, screen)
    screen.line(f"{path}: {bundle.pipeline} ({bundle.semantics})")
    screen.finish({"artifact": path, "semantics": bundle.semantics, "passes": report.as_dict()["records"]})
    return OK


def export(args: Namespace, screen: Screen) -> int:
    """Lower a bundle to its deployable form."""
    import tokopt

    options = {name: getattr(args, name) for name in _SERVING if getattr(args, name) is not None}
    if options and args.target != "triton":
        raise InputError(
            f"--{next(iter(options)).replace('_', '-')} belongs to --target triton; leave it out"
        )
    engine = _engine_options(args)
    with screen.step(f"Exporting {args.artifact} to {args.target}"):
        if args.target == "triton":
            from tokopt.lower.triton.model import Serving, write_model

            source = args.artifact if _deployed(args.artifact) else read_bundle(args.artifact)
            if engine is not None:
                raise InputError("engine options mean nothing to the target 'triton'; leave them out")
            path = write_model(source, args.output, Serving(**options))
        else:
            path = tokopt.export(read_bundle(args.artifact), args.output, target=args.target, engine=engine)
    size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    note = "checked against the captured program"
    if args.target == "triton":
        note = f"for tritonserver --model-repository={Path(path).absolute().parent}"
    screen.line(f"{path}: {args.target}, {si(size)}B, {note}")
    screen.finish({"artifact": path, "target": args.target, "bytes": size})
    return OK


def _engine_options(args: Namespace) -> EngineOptions | None:
    """What the command says of engines; None when it says nothing."""
    given = (args.arch, tuple(args.profile), args.workspace, args.timing_cache, args.plugins)
    if given == (None, (), None, None, False):
        return None
    from tokopt.lower.tensorrt.engine import EngineOptions

    return EngineOptions(*given)


_SERVING = ("max_batch", "instances", "gpu", "threads", "slots")


def _deployed(name: str) -> Manifest | None:
    """The manifest of an artifact that a bundle cannot be made of again; None for every other name."""
    from tokopt.runtime.format.manifest import read_manifest

    if not (Path(name) / "manifest.json").is_file():
        return None
    manifest = read_manifest(Path(name))
    return None if any("torch" in entry.files for entry in manifest.programs.values()) else manifest


def inspect(args: Namespace, screen: Screen) -> int:
    """Blocks of a program, or the manifest of an artifact that only holds ONNX."""
    if manifest := _deployed(args.artifact):
        return _inspect_manifest(manifest, screen)
    with screen.step(f"Reading {args.artifact}"):
        bundle = read_bundle(args.artifact)
        from tokopt.analysis.cost import program_cost
        from tokopt.cli.blocks import describe_blocks

        program = bundle.main
        blocks, cost = describe_blocks(program), program_cost(program)
    screen.line(f"{_spell(program.inputs)} -> {_spell(program.outputs)}")
    screen.line(f"passes: {bundle.pipeline or 'none'} ({bundle.semantics})")
    screen.line()
    headers = ("block", "attention", "kind", "tokens", "heads", "FLOPs", "note")
    rows = [(b.index, b.path, b.kind, b.tokens, b.heads, si(b.flops), b.note) for b in blocks]
    screen.table(headers, rows)
    screen.line(
        f"{si(cost.flops)}FLOPs, {si(cost.parameters)}parameters, {cost.nodes} nodes, "
        f"at the example's batch of {program.example[0].shape[0]}"
    )
    blocks_data = [dataclasses.asdict(block) for block in blocks]
    screen.finish(
        {"pipeline": bundle.pipeline, "semantics": bundle.semantics, "blocks": blocks_data}
        | {
            "cost": dataclasses.asdict(cost),
            "inputs": _specs(program.inputs),
            "outputs": _specs(program.outputs),
        }
    )
    return OK


def _inspect_manifest(manifest: Manifest, screen: Screen) -> int:
    for name, program in manifest.programs.items():
        screen.line(f"{name}: {_spell(program.inputs)} -> {_spell(program.outputs)}")
    screen.line(f"passes: {manifest.pipeline or 'none'} ({manifest.semantics})")
    screen.line("made with " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    screen.line()
    for step in manifest.passes:
        screen.line(f"{step.text}: {step.matches} sites changed, {step.semantics}")
        for note in step.notes:
            screen.line(f"  {note}")
    _show_engines(manifest, screen)
    screen.table(("file", "bytes", "sha256"), [(n, f.size, f.sha256[:16]) for n, f in manifest.files.items()])
    screen.finish(dataclasses.asdict(manifest))
    return OK


def _show_engines(manifest: Manifest, screen: Screen) -> None:
    rows = []
    for name, program in manifest.programs.items():
        engine = program.engine
        if engine is not None:
            size = manifest.files[program.files[ENGINE]].size
            profiles = " ".join(f"{axis}={p}" for axis, p in engine.profiles.items())
            rows.append((name, engine.builder, engine.version, engine.arch, f"{si(size)}B", profiles))
    if rows:
        screen.table(("engine", "builder", "version", "arch", "size", "profiles"), rows)
        screen.line()


def estimate(args: Namespace, screen: Screen) -> int:
    """Run a pipeline in memory and predict what it saves; nothing is written."""
    from tokopt.measure.roofline import measure_machine, predict_seconds
    from tokopt.pipeline.base import Context
    from tokopt.pipeline.manager import as_pipeline

    pipeline = as_pipeline(args.pipeline)
    with screen.step(f"Estimating {pipeline}"):
        bundle, machine = read_bundle(args.artifact), measure_machine()
        if bundle.task != "encoder":
            raise InputError(
                "estimate predicts encoders, where the work does not depend on a cache; measure a language model "
                "with: tokopt generate"
            )
        seconds = [predict_seconds(bundle.main, machine)]
        watch = Context(observers=(lambda _, __, new: seconds.append(predict_seconds(new.main, machine)),))
        report = pipeline.run(bundle, watch)[1]
    _show_report(report, screen)
    speedups = [before / after for before, after in pairwise(seconds)]
    for record, speedup in zip(report.records, speedups, strict=True):
        screen.line(f"{record.text}: predicted speed-up {speedup:.2f}x")
    total = seconds[0] / seconds[-1]
    sizes = f"the example's sizes {[list(t.shape) for t in bundle.main.example]}"
    screen.line(f"{_verdict(total)} (roofline of this machine's CPU at {sizes}; tokopt bench measures)")
    records = [
        {**dataclasses.asdict(record), "predicted_speedup": speedup}
        for record, speedup in zip(report.records, speedups, strict=True)
    ]
    screen.finish({"predicted_speedup": total, "pays": total >= _PAYS, "passes": records})
    return OK


_PAYS = 1.05


def _verdict(speedup: float) -> str:
    if speedup >= _PAYS:
        return f"Predicted speed-up {speedup:.2f}x"
    if speedup > 1 / _PAYS:
        return f"No gain to expect: predicted {speedup:.2f}x, within the error of the prediction"
    return f"This would be slower: predicted {speedup:.2f}x, matching costs more than the removed tokens"


def run(args: Namespace, screen: Screen) -> int:
    """Run an artifact on files, or on its own example."""
    import numpy as np

    from tokopt.cli.inputs import read_inputs
    from tokopt.measure.timing import open_runner

    runner = open_runner(args.artifact, args.threads, args.backend)
    feed = read_inputs(args.inputs, runner.program, args.mean, args.std) if args.inputs else runner.example()
    outputs = {name: np.asarray(value) for name, value in runner.run(feed).items()}
    if args.output is not None:
        _save(args.output, outputs)
    rows = [
        (n, str(v.dtype), str(list(v.shape)), float(v.mean()), float(v.std())) for n, v in outputs.items()
    ]
    screen.table(("output", "dtype", "shape", "mean", "std"), rows)
    if args.output is not None:
        screen.line(f"saved to {args.output}")
    keys = ("name", "dtype", "shape", "mean", "std")
    screen.finish({"outputs": [dict(zip(keys, row, strict=True)) for row in rows], "saved": args.output})
    return OK


def _save(path: Path, outputs: dict) -> None:
    """One output as ``.npy``, any number as ``.npz``; the file is written whole or not at all."""
    import numpy as np

    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"{path} must end in .npy (one output) or .npz")
    if path.suffix == ".npy" and len(outputs) > 1:
        raise InputError(f"the program has {len(outputs)} outputs ({', '.join(outputs)}); save them as .npz")
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        if path.suffix == ".npy":
            np.save(stream, next(iter(outputs.values())))
        else:
            np.savez(stream, **outputs)
    partial.replace(path)


def generate(args: Namespace, screen: Screen) -> int:
    """Continue a prompt, or answer it as one message of a conversation."""
    from tokopt.runtime import LanguageModel, Sampling, load

    model = load(args.artifact, threads=args.threads, backend=args.backend)
    if not isinstance(model, LanguageModel):
        raise InputError(f"{args.artifact} is no language model; run it with: tokopt run {args.artifact}")
    sampling = Sampling(
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.typical_p,
        args.top_h,
        args.repetition_penalty,
        args.seed,
    )
    prompt = model.chat_prompt([{"role": "user", "content": args.prompt}]) if args.chat else args.prompt
    pieces = []
    for piece in model.stream(prompt, max_tokens=args.max_tokens, sampling=sampling, stop=args.stop):
        pieces.append(piece)
        if args.stream and not args.json:
            print(piece, end="", flush=True)
    text, done = "".join(pieces), model.statistics
    screen.line("" if args.stream else text)
    if sys.stderr.isatty():
        print(
            f"{done.new_tokens} tokens, {done.tokens_per_second:.1f} tokens/s, prefill "
            f"{1e3 * done.prefill_seconds:.0f} ms, cache {done.cache_slots} slots, {si(done.cache_bytes)}B",
            file=sys.stderr,
        )
    screen.finish({"text": text, **dataclasses.asdict(done), "tokens_per_second": done.tokens_per_second})
    return OK


def verify(args: Namespace, screen: Screen) -> int:
    """Check hashes and the self-test; exit 1 when anything is wrong."""
    import tokopt

    with screen.step(f"Verifying {args.artifact}"):
        report = tokopt.verify(args.artifact)
    for fault in report.faults:
        screen.line(f"fault: {fault}")
    rows = [
        (program, check.name, check.nmse, check.limit, "ok" if check.ok else "differs")
        for program, checks in report.outputs.items()
        for check in checks
    ]
    screen.table(("program", "output", "NMSE", "at most", ""), rows)
    screen.line(
        f"{report.path}: {report.files} files, " + ("verified" if report.ok else "NOT as it was written")
    )
    screen.finish(report.as_dict())
    return OK if report.ok else FAILED


def bench(args: Namespace, screen: Screen) -> int:
    """Time artifacts against each other, in turns."""
    from tokopt.measure.timing import interleaved_times

    with screen.step(f"Timing {len(args.artifacts)} artifacts, {args.rounds} rounds"):
        rounds = list(
            interleaved_times(args.artifacts, args.rounds, args.batch, args.threads, backend=args.backend)
        )
    results = []
    for index, path in enumerate(args.artifacts):
        seconds = [r[index] for r in rounds]
        results.append(
            {
                "artifact": path,
                "min_ms": 1e3 * min(seconds),
                "median_ms": 1e3 * statistics.median(seconds),
                "speedup": statistics.median(r[0] / r[index] for r in rounds),
            }
        )
    rows = [(r["artifact"], r["min_ms"], r["median_ms"], f"{r['speedup']:.2f}x") for r in results]
    screen.table(("artifact", "min ms", "median ms", "speed-up"), rows)
    if len(results) > 1:
        screen.line("Speed-up: the median, over rounds, of the first artifact's time by this one's.")
    screen.finish({"rounds": args.rounds, "batch": args.batch, "threads": args.threads, "results": results})
    return OK


def bisect(args: Namespace, screen: Screen) -> int:
    """Find the first pass that moves an output by more than the tolerance; exit 1 when there is one."""
    from tokopt.pipeline.bisect import bisect as run_bisection

    with screen.step(f"Bisecting {args.pipeline}"):
        found = run_bisection(read_bundle(args.artifact), args.pipeline, args.tolerance)
    rows = [
        (step.text, d.output, d.nmse, d.cosine, "" if d.nmse <= found.tolerance else "too far")
        for step in found.steps
        for d in step.differences
    ]
    screen.table(("after", "output", "NMSE", "cosine", ""), rows)
    culprit = found.culprit.text if found.culprit else None
    screen.line(f"first pass above {found.tolerance:g}: {culprit or 'none'}")
    screen.finish({**dataclasses.asdict(found), "culprit": culprit})
    return FAILED if culprit else OK


def compare(args: Namespace, screen: Screen) -> int:
    """How far two models are apart on real inputs, in terms of their task."""
    from tokopt.cli.inputs import read_samples
    from tokopt.measure.fidelity import fidelity

    with screen.step(f"Comparing {args.artifact} with {args.other}"):
        before, after = read_bundle(args.artifact), read_bundle(args.other)
        found = fidelity(before, after, read_samples(args.inputs, before, args.mean, args.std))
    screen.table(("measure", "value"), [(name, value) for name, value in found.as_dict().items()])
    screen.finish(found.as_dict())
    return OK


def tune(args: Namespace, screen: Screen) -> int:
    """Search a pipeline; exit 1 when none gains."""
    from tokopt.cli.inputs import read_samples
    from tokopt.measure.tuning import Machine
    from tokopt.measure.tuning import tune as run_search

    bundle = read_bundle(args.artifact)
    found = run_search(
        bundle,
        read_samples(args.inputs, bundle, args.mean, args.std),
        args.output,
        floor=args.floor,
        candidates=args.candidates,
        metric=imported(args.metric) if args.metric else None,
        minutes=args.minutes,
        machine=Machine(args.threads, args.prompt, args.batch),
        progress=lambda line: print(line, file=sys.stderr) if sys.stderr.isatty() else None,
    )
    measures = next((list(t.quality) for t in found.trials if t.quality), [])
    rows = [
        (
            trial.pipeline,
            f"{trial.speedup:.2f}x" if trial.speedup else "",
            "{:.2f} to {:.2f}".format(*trial.quartiles) if trial.quartiles else "",
            trial.milliseconds,
            *(trial.quality.get(measure) for measure in measures),
            trial.megabytes,
            trial.reason or ("best" if trial is found.winner else "front" if trial in found.front else ""),
        )
        for trial in found.trials
    ]
    screen.table(("pipeline", "speed-up", "quartiles", "ms", *measures, "MB", ""), rows)
    if found.untried:
        screen.line(f"{len(found.untried)} candidates were left for want of time; the same command goes on.")
    if found.winner is None:
        screen.line(f"No gain: nothing reaches {found.floor} and is faster than the model itself.")
    else:
        screen.line(f"{found.winner.pipeline}  ({args.output}/best.tokopt)")
    screen.finish(found.as_dict())
    return OK if found.winner else FAILED


def passes(args: Namespace, screen: Screen) -> int:
    """List the passes and their options."""
    from tokopt.passes import PASSES, load_pass
    from tokopt.pipeline.base import option_text
    from tokopt.pipeline.text import format_value

    listed = []
    for name in PASSES:
        cls = load_pass(name)
        fields = dataclasses.fields(cls)
        given = {f.name: format_value(f.default) for f in fields if f.default is not dataclasses.MISSING}
        summary = (cls.__doc__ or "").strip().split("\n\n")[0]
        listed.append(
            {
                "name": name,
                "semantics": cls.semantics,
                "options": {f.name: given.get(f.name) for f in fields},
                "usage": " ".join(option_text(cls, f) for f in fields),
                "summary": " ".join(summary.split()),
            }
        )
    rows = [(p["name"], p["semantics"], p["usage"], p["summary"]) for p in listed]
    screen.table(("pass", "semantics", "options and their defaults", ""), rows)
    screen.finish(listed)
    return OK


def _show_report(report: Report, screen: Screen) -> None:
    headers = ("pass", "sites", "tokens at the end", "FLOPs", "bytes", "nodes", "seconds")
    rows = []
    for r in report.records:
        before, after = r.before, r.after
        rows.append(
            (
                r.text,
                r.matches,
                f"{before.tokens[-1]} -> {after.tokens[-1]}" if before.tokens else "",
                f"{si(before.flops)} -> {si(after.flops)}",
                f"{si(before.bytes)} -> {si(after.bytes)}",
                f"{before.nodes} -> {after.nodes}",
                round(r.seconds, 1),
            )
        )
    screen.table(headers, rows)
    for record in report.records:
        for note in (*record.notes, *map(str, record.refusals)):
            screen.line(f"{record.text}: {note}")


def _spell(specs) -> str:
    return ", ".join(f"{s.name}: {s.dtype}[{', '.join(map(str, s.axes))}]" for s in specs)


def _specs(specs) -> list[dict]:
    return [dataclasses.asdict(spec) for spec in specs]
