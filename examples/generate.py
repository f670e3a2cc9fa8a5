"""Stream a chat answer from real SmolLM2 weights out of an artifact, without torch in this process.

    python examples/generate.py ["Your question"] [--output out]

The first run converts the packaged weights and exports ``out/smollm2.tokopt`` in another process; what runs
here is numpy, ONNX Runtime and the tokenizer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokopt.runtime import Sampling, load  # noqa: E402


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", nargs="?", default="Name three primary colours, one sentence each.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the artifact")
    return parser.parse_args()


def build(path: Path) -> None:
    print(f"exporting {path} ...", flush=True)
    code = "import sys, tokopt; from examples.data import smollm2; "
    code += "tokopt.export(tokopt.capture_lm(smollm2()), sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, path.absolute()], cwd=ROOT, check=True)


def main() -> None:
    args = options()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "smollm2.tokopt"
    if not path.exists():
        build(path)
    model = load(path)
    prompt = model.chat_prompt([{"role": "user", "content": args.question}])
    sampling = Sampling(temperature=args.temperature, seed=0)
    stream = model.stream(prompt, max_tokens=args.max_tokens, sampling=sampling)
    for piece in stream:
        print(piece, end="", flush=True)
    done = stream.generated.statistics
    print(
        f"\n\n{done.prompt_tokens} prompt tokens in {1e3 * done.prefill_seconds:.0f} ms, "
        f"{done.new_tokens} new ones at {done.tokens_per_second:.1f} tokens/s, "
        f"cache: {done.cache_slots} slots, {done.cache_bytes / 1e6:.1f} MB; "
        f"torch {'was' if 'torch' in sys.modules else 'was not'} imported"
    )


if __name__ == "__main__":
    main()
