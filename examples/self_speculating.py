"""Run an artifact that speculates by itself in bare ONNX Runtime: the same text in fewer calls.

    python examples/self_speculating.py [ARTIFACT] [--prompt TEXT]

Without an artifact the first run makes one of the packaged SmolLM2 in another process (``speculate``, in float32). What
writes the text is numpy and ONNX Runtime alone, by the manifest; ``tokenizers`` reads and spells the words. Of 4 bits
ONNX Runtime's own products round a row otherwise beside others, which may tip a near tie; then it says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]

MAKE = """
import sys, tokopt
from examples.data import smollm2
tokopt.export(tokopt.optimize(tokopt.capture_lm(smollm2()), "speculate"), sys.argv[1])
"""

PROMPT = """class Point:
    def set_x(self, x):
        self.x = x
        return self

    def set_y(self, y):
        self.y = y
        return self

    def set_z(self, z):
"""
"""Code repeats itself, which is what the drafter looks for; a text that never does is written no faster."""

GREEDY = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0, "stream": 0}
"""What a program that draws tokens is told, by role."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("out/self-speculating.tokopt"))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=100)
    return parser.parse_args()


def make(path: Path) -> None:
    print(f"making {path} ...", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", MAKE, path.absolute()], cwd=ROOT, check=True)


class Written(NamedTuple):
    """New tokens, and the calls and seconds of decoding."""

    tokens: list[int]
    calls: int
    seconds: float

    @property
    def speed(self) -> float:
        return (len(self.tokens) - 1) / self.seconds


class Model:
    """An artifact's programs, and what its manifest says of them."""

    def __init__(self, path: Path) -> None:
        self.manifest: Any = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        schedule = self.manifest["schedule"]
        self.reading = next((e["program"] for e in schedule["entries"] if e["role"] == "prefill"), "")
        decoding = {len(e["tree"]): e for e in schedule["entries"] if e["role"] == "decode"}
        self.nodes = max(decoding, default=0)
        if not self.nodes or schedule["triggers"]:
            raise SystemExit(
                f"{path} does not speculate, or evicts as well; give one made with speculate alone"
            )
        self.plain, self.speculating = decoding[min(decoding)]["program"], decoding[self.nodes]["program"]
        self.tree: list[int] = decoding[self.nodes]["tree"]
        self.programs = self.manifest["programs"]
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3  # without bound buffers each call copies the cache, and warns
        # Two sessions run in turns: the threads of one are not to spin beside those of the other.
        quiet.add_session_config_entry("session.force_spinning_stop", "1")
        self.sessions: dict[str, Any] = {
            name: onnxruntime.InferenceSession(path / program["files"]["onnx"], quiet)
            for name, program in self.programs.items()
        }

    def states(self, slots: int) -> dict[str, np.ndarray]:
        """The values at the start of a text, with room for so many tokens."""
        sizes = {"batch": 1}
        return {
            state["name"]: np.full(
                [axis if isinstance(axis, int) else sizes.get(axis, slots) for axis in state["axes"]],
                state["initial"],
                state["dtype"],
            )
            for state in self.manifest["states"]
        }

    def call(
        self, name: str, states: dict[str, np.ndarray], given: dict[str, np.ndarray], limit: int
    ) -> list[int]:
        """Run a program: the tokens that it commits. ``states`` gets their next values."""
        program = self.programs[name]
        values = given | {"limit": np.array([limit]), "rows": np.array([-1])}
        feed = {}
        for tensor in program["inputs"]:
            if tensor["role"] == "state":
                feed[tensor["name"]] = states[tensor["state"]]
            elif tensor["role"] in GREEDY:
                feed[tensor["name"]] = np.full(1, GREEDY[tensor["role"]], tensor["dtype"])
            else:
                feed[tensor["name"]] = values[tensor["role"]]
        outputs = program["outputs"]
        results = self.sessions[name].run([tensor["name"] for tensor in outputs], feed)
        made = {}
        for tensor, result in zip(outputs, results, strict=True):
            if tensor["role"] == "state":
                states[tensor["state"]] = result
            else:
                made[tensor["role"]] = result
        return made["tokens"][0, : made["count"][0]].tolist()

    def write(self, prompt: list[int], count: int, nodes: int) -> Written:
        """Go on with a prompt, where every call is given the first ``nodes`` nodes of the tree.

        One node alone proposes nothing, so that the program runs which does without a tree.
        """
        name = self.plain if nodes == 1 else self.speculating
        states = self.states(len(prompt) + count + nodes)
        size, parent = len(prompt), np.array(self.tree[:nodes])
        given = {
            "tokens": np.array([prompt]),
            "positions": np.arange(size)[None],
            "mask": np.tril(np.ones((1, size, size), bool)),
        }
        tokens = self.call(self.reading, states, given, count)
        calls, begun = 0, time.perf_counter()
        while len(tokens) < count and tokens[-1] not in self.manifest["generation"]["eos"]:
            position = size + len(tokens) - 1
            given = {
                "tokens": np.array([tokens[-1:]]),
                "positions": np.array([[position]]),
                "parent": parent,
                "mask": np.ones((1, 1, 1), bool),
            }
            tokens += self.call(name, states, given, count - len(tokens))
            calls += 1
        return Written(tokens, calls, time.perf_counter() - begun)


def main() -> None:
    args = options()
    if not args.artifact.exists():
        make(args.artifact)
    model = Model(args.artifact)
    tokenizer = Tokenizer.from_file(str(args.artifact / model.manifest["tokenizer"]))
    prompt = tokenizer.encode(args.prompt).ids
    nodes = model.nodes
    for size in (1, nodes):
        model.write(prompt, min(args.max_tokens, 8), size)  # the first calls allocate
    plain, fast = (model.write(prompt, args.max_tokens, size) for size in (1, nodes))
    print(tokenizer.decode(fast.tokens))
    for name, done in (("1 node", plain), (f"{nodes} nodes", fast)):
        print(f"{name}: {len(done.tokens)} tokens in {done.calls} calls, {done.speed:.1f} tokens/s")
    if fast.tokens != plain.tokens:
        raise SystemExit("the texts differ")
    print(f"the same text, {fast.speed / plain.speed:.2f} times as fast")


if __name__ == "__main__":
    main()
