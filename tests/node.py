"""The host in Node.js of ``examples/node``, installed once per process."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


@cache
def host() -> Path:
    """The script, with its dependencies beside it."""
    npm = shutil.which("npm")
    assert npm and shutil.which("node"), "this test runs examples/node; install Node.js 20 or newer"
    folder = Path(tempfile.mkdtemp()) / "node"
    shutil.copytree(ROOT / "examples" / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    _run(npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder)
    return folder / "generate.mjs"


def generate(
    artifact: Path,
    prompt: Sequence[int],
    count: int,
    inputs: Mapping[str, np.ndarray] | None = None,
    sampling: Mapping[str, float] | None = None,
) -> list[int]:
    """The tokens after a prompt, as the host in Node.js prints them."""
    command: list[str | Path] = ["node", host(), artifact, ",".join(map(str, prompt)), str(count)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.json"
        file.write_text(json.dumps({name: array.tolist() for name, array in (inputs or {}).items()}))
        command += [file, json.dumps(sampling or {})]
        return _numbers(_run(*command))


def compare(artifact: Path, prompt: Sequence[int], count: int) -> tuple[list[int], str]:
    """The tokens that the host finds with and without speculation, and what it says of them."""
    said = _run("node", host(), artifact, ",".join(map(str, prompt)), str(count), "--compare")
    tokens, line = said.splitlines()
    return _numbers(tokens), line


def _numbers(line: str) -> list[int]:
    return [int(number) for number in line.strip().split(",")]


def choose_nodes(tree: Sequence[int], calls: Sequence[Sequence[float]]) -> list[int]:
    """The nodes that the host gives each of the calls, of which seconds, tokens, limit and confidence are given."""
    module = (ROOT / "examples" / "node" / "nodes.mjs").as_uri()
    script = f"""
    import {{ MeasuredNodes }} from {json.dumps(module)};
    const choice = new MeasuredNodes({json.dumps(list(tree))}), made = [];
    for (const [seconds, tokens, limit, level] of {json.dumps(calls)}) {{
      made.push(choice.choose(level, limit));
      choice.observe(made.at(-1), seconds, tokens, limit, level);
    }}
    console.log(made.join(','));
    """
    return _numbers(_run("node", "--input-type=module", "-e", script))


def _run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
