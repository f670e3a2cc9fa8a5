"""What GGUF files take, from the file to text: ``python -m benchmarks.gguf model.gguf``.

Each goes through ``capture_lm``, ``keep_grid`` and ``export``, and its artifact is loaded and writes in another process
without torch: seconds and memory of every stage as in ``benchmarks.scale``, and how fast it writes and reads. Writes
``gguf.json`` and ``gguf.md`` in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.progress import write_report
from benchmarks.scale import GIB, HEAD, RESULTS, in_processes, row_of
from examples.data import cache_folder

PASSES = "keep_grid"
PROMPT = "Write a function in Python that returns the first n prime numbers, and explain how it works."
TOKENS, READ = 64, 512


def parameters(file: Path) -> int:
    """Numbers in all weights of a file."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)


def writing(artifact: Path) -> dict[str, Any]:
    """What an answer begins with, and tokens in a second: written, and read of a long prompt."""
    from tokopt.runtime import load

    model: Any = load(artifact, threads=2)
    ids = model.chat_prompt([{"role": "user", "content": PROMPT}])
    done = model.generate(ids, max_tokens=TOKENS)
    decoding = (done.statistics.new_tokens - 1) / done.statistics.decode_seconds
    long = (ids * (READ // len(ids) + 1))[:READ]
    clock = time.perf_counter()
    model.generate(long, max_tokens=1)
    reading = READ / (time.perf_counter() - clock)
    assert "torch" not in sys.modules
    return {"text": done.text, "written": decoding, "read": reading}


def measure(file: Path, artifact: Path) -> dict[str, Any]:
    """All of one file; its artifact stays."""
    found = in_processes(file, artifact, PASSES)
    command = [sys.executable, "-m", "benchmarks.gguf", "--write", str(artifact)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {
        "parameters": parameters(file),
        "file": file.stat().st_size,
        **found,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Stages as in ``scale.md``, then speed and the beginning of an answer."""
    lines = ["# From a GGUF file to text", ""]
    lines += [
        f"`capture_lm`, `{PASSES}` and `export` in one process, `load` and a first token in another without torch. "
        "Weights are counted in float32. Every cell has seconds, and the most memory that was resident, over the "
        "weights; in brackets without the pages of mapped files. Imports are in the memory and not in the seconds.",
        "",
    ]
    lines += HEAD
    lines += [row_of(name, row) for name, row in report["models"].items()]
    lines += [
        "",
        f"| model | file, GiB | artifact, GiB | tokens/s written | tokens/s read ({READ}) |",
        "|---" * 5 + "|",
    ]
    for name, row in report["models"].items():
        sizes = f"{row['file'] / GIB:.2f} | {row['artifact'] / GIB:.2f}"
        lines += [f"| {name} | {sizes} | {row['written']:.1f} | {row['read']:.0f} |"]
    lines += ["", f"To {PROMPT!r} they answer:", ""]
    for name, row in report["models"].items():
        lines += [f"{name}:", "", *(f"> {line}" for line in row["text"].splitlines()), ""]
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files of language models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        print(json.dumps(writing(options.write)))
        return
    folder = cache_folder() / "benchmark-gguf"
    folder.mkdir(parents=True, exist_ok=True)
    models = {file.stem: measure(file, folder / f"{file.stem}.tokopt") for file in options.files}
    report = {"machine": describe(2), "models": models}
    write_report(options.results, "gguf", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
