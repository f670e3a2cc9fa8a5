"""What a large language model takes in memory and time: ``python -m benchmarks.scale``.

Models like Llama with random weights, of 50 to 853 million parameters, lie in folders in float32 and in bfloat16. Each
goes through ``capture_lm``, ``rtn{bits=4}`` and ``export`` in one process, then its artifact is loaded and gives a
first token in another one without torch. Of every stage the seconds, and the most memory that was resident in it, as
the kernel counts it; sampled also without pages of mapped files, which the kernel takes back when it needs them.
Finished parts are kept. Writes ``scale.json`` and ``scale.md`` in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.progress import Progress, write_report
from examples.data import cache_folder

RESULTS = Path(__file__).parent / "results"
PASSES = "rtn{bits=4}"
VOCABULARY = 32_000
DTYPES = ("float32", "bfloat16")
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """A model: layers, hidden size, that of the feed-forward layers, heads of 64 channels, and those of the keys."""

    layers: int
    hidden: int
    inner: int
    heads: int
    shared: int

    @property
    def parameters(self) -> int:
        """Numbers in all weights; the head is not tied to the embedding."""
        attention = 2 * self.hidden * 64 * (self.heads + self.shared)
        norms = 2 * self.hidden * self.layers + self.hidden
        return self.layers * (attention + 3 * self.hidden * self.inner) + 2 * VOCABULARY * self.hidden + norms


SIZES: Mapping[str, Size] = {
    "50M": Size(6, 512, 1408, 8, 2),
    "150M": Size(16, 768, 2112, 12, 3),
    "399M": Size(18, 1280, 3520, 20, 5),
    "853M": Size(16, 2048, 5632, 32, 8),
}


# --- memory ---------------------------------------------------------------------------------------------------


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory now, and the most that were since the count was set back."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    wanted = {"VmHWM:": "peak", "VmRSS:": "all", "RssAnon:": "own", "RssFile:": "files"}
    return {wanted[name]: 1024 * int(rest[0]) for name, *rest in fields if name in wanted}


@dataclass
class Stage:
    """Seconds of a stage, those of all cores together, and the most bytes in memory: all, and those of no file."""

    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    own: int = 0
    before: int = 0


@dataclass
class Watch:
    """The stages of a process, measured."""

    stages: dict[str, Stage] = field(default_factory=dict[str, Stage])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        done, found = threading.Event(), self.stages.setdefault(name, Stage())
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew
        found.before = resident()["all"]

        def sample() -> None:
            while not done.wait(0.01):
                found.own = max(found.own, resident()["own"])

        sampler = threading.Thread(target=sample, daemon=True)
        begun, worked = time.perf_counter(), time.process_time()
        sampler.start()
        try:
            yield
        finally:
            found.seconds, found.cpu = time.perf_counter() - begun, time.process_time() - worked
            done.set()
            sampler.join()
            found.peak = max(found.peak, resident()["peak"])
            found.own = max(found.own, resident()["own"])


# --- what is measured -----------------------------------------------------------------------------------------


def write_models(size: Size, folder: Path) -> None:
    """The folder of a model in every dtype, with the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.shared,
        head_dim=64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    for dtype in DTYPES:
        model.to(getattr(torch, dtype)).save_pretrained(folder / dtype)


def build(model: Path, artifact: Path, passes: str) -> dict[str, Any]:
    """Capture, optimise and export in this process."""
    watch = Watch()
    with watch.stage("imports"):
        import torch
        import transformers

        import tokopt
        import tokopt.artifact
        import tokopt.frontend.language
        import tokopt.lower.onnx.export

        torch.set_num_threads(2)
        transformers.logging.set_verbosity_error()
    with watch.stage("capture"):
        bundle = tokopt.capture_lm(model)
    with watch.stage("optimize"):
        bundle = tokopt.optimize(bundle, passes)
    with watch.stage("export"):
        tokopt.export(bundle, artifact, overwrite=True)
    return {name: asdict(stage) for name, stage in watch.stages.items()}


def first_token(artifact: Path) -> dict[str, Any]:
    """Load an artifact and generate a token, without torch."""
    watch = Watch()
    with watch.stage("runtime"):
        from tokopt.runtime import load
    with watch.stage("load"):
        model: Any = load(artifact, threads=2)
    with watch.stage("first token"):
        model.generate([1, 2, 3, 4], max_tokens=1)
    assert "torch" not in sys.modules
    return {name: asdict(stage) for name, stage in watch.stages.items()}


def measure(name: str, dtype: str, root: Path) -> dict[str, Any]:
    """Every stage of a model, each part in a process of its own."""
    size, folder = SIZES[name], root / name
    if not (folder / dtype / "config.json").exists():
        write_models(size, folder)
    artifact = folder / f"{dtype}.tokopt"
    found = in_processes(folder / dtype, artifact, PASSES)
    shutil.rmtree(artifact)
    return {"parameters": size.parameters, **found}


def in_processes(model: Path, artifact: Path, passes: str) -> dict[str, Any]:
    """The stages of a model, of which one process builds and another one runs, and the bytes of its artifact."""
    stages: dict[str, Any] = {}
    for what, path in (("--build", model), ("--first", artifact)):
        command = [sys.executable, "-m", "benchmarks.scale", what, str(path), "--artifact", str(artifact)]
        command += ["--passes", passes]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        stages |= json.loads(done.stdout.splitlines()[-1])
    return {"artifact": sum(file.stat().st_size for file in artifact.iterdir()), "stages": stages}


# --- the report -----------------------------------------------------------------------------------------------


COUNTED = ("capture", "optimize", "export", "load", "first token")


HEAD = (
    f"| model | weights, GiB | {' | '.join(COUNTED)} | in all | of all cores | artifact, GiB |",
    "|---" * (len(COUNTED) + 5) + "|",
)


def markdown(report: Mapping[str, Any]) -> str:
    """One table per dtype of the files."""
    lines = ["# From a folder to the first token", ""]
    lines += [
        f"Models like Llama with random weights through `capture_lm`, `{PASSES}` and `export`, then `load` and a first "
        "token in a process without torch. Weights are counted in float32. Every cell has seconds, and the most memory "
        "that was resident, over the weights; in brackets without the pages of mapped files, which the kernel takes "
        "back when it needs them. Imports are not in the seconds, and in the memory they are. Seconds of all cores "
        "together tell a machine that others use from a slow one.",
    ]
    for dtype in DTYPES:
        keys = [f"{name} {dtype}" for name in SIZES]
        rows = {key: report["models"][key] for key in keys if key in report["models"]}
        if not rows:
            continue
        lines += ["", f"## Weights stored in {dtype}", ""]
        lines += HEAD
        lines += [row_of(key.split()[0], row) for key, row in rows.items()]
    base = next(iter(report["models"].values()))["stages"]
    lines += ["", f"Imports alone take {base['imports']['peak'] / GIB:.2f} GiB when a model is built, and "]
    lines[-1] += f"{base['runtime']['peak'] / GIB:.2f} GiB when an artifact is run."
    return "\n".join([*lines, "", "```json", json.dumps(report["machine"], indent=1), "```", ""])


def row_of(name: str, row: Mapping[str, Any]) -> str:
    weights, stages = 4 * row["parameters"], row["stages"]
    cells = []
    for key in COUNTED:
        stage = stages[key]
        most, own = stage["peak"] / weights, stage["own"] / weights
        cells.append(f"{stage['seconds']:.1f} s, {most:.2f}x ({own:.2f}x)")
    whole, cpu = (sum(stages[key][what] for key in COUNTED) for what in ("seconds", "cpu"))
    per = cpu / row["parameters"] * 1e8
    return (
        f"| {name} | {weights / GIB:.2f} | {' | '.join(cells)} | {whole:.0f} s | {cpu:.0f} s, {per:.0f} s per 100M | "
        f"{row['artifact'] / GIB:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--folder", type=Path, help="where models and measurements are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--artifact", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--passes", default=PASSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build is not None:
        print(json.dumps(build(options.build, options.artifact, options.passes)))
        return
    if options.first is not None:
        print(json.dumps(first_token(options.first)))
        return
    root = options.folder or cache_folder() / "benchmark-scale"
    options.results.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    progress = Progress(root)
    for name in options.sizes:
        for dtype in options.dtypes:
            found = progress.once(f"{name} {dtype}", lambda n=name, d=dtype: measure(n, d, root))
            print(row_of(f"{name} {dtype}", found), file=sys.stderr, flush=True)
    report = {"machine": describe(2), "models": progress.values}
    write_report(options.results, "scale", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
