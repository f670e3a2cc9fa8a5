"""How soon a chat answers: ``python -m benchmarks.chat``.

SmolLM2-135M with the weights of its file (``keep_grid``) talks about pages of Python's documentation: messages of some
200 tokens, answers of at most as many. Every turn of a chat, which reads what is new, takes turns with reading all of
the same tokens, as a model without a past does; the tokens of both answers are compared. Then several chats take their
last turn one by one and together, in one batch. Writes ``chat.json`` and ``chat.md`` in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.kv.quality import documentation
from benchmarks.machine import describe
from benchmarks.progress import write_report
from benchmarks.quantize import artifact

RESULTS = Path(__file__).parent / "results"
MODEL, METHOD = "SmolLM2-135M-Instruct", "keep_grid"
TURNS, TOKENS, ANSWER = 5, 400, 200
"""Turns; tokens of each with its answer, about; new tokens of an answer, at most."""

CHATS, SHORT = 4, 64
"""Chats that take a turn together, and new tokens of their answers, at most."""


def messages(model: Any) -> list[str]:
    """What the user says: pages of the documentation."""
    ids = model.tokenizer.encode(documentation())
    size = TOKENS - ANSWER
    parts = [ids[place * 4 * size : place * 4 * size + size] for place in range(TURNS)]
    return [f"Continue this text: {model.tokenizer.decode(part)}" for part in parts]


def first_token(answer: Callable[[int], Any]) -> float:
    """Seconds until there is one."""
    clock = time.perf_counter()
    answer(1)
    return time.perf_counter() - clock


def turns(model: Any, rounds: int) -> list[dict[str, Any]]:
    """Each turn: tokens before it, seconds to its first token of both ways, and whether both answers are the same."""
    found: list[dict[str, Any]] = []
    chat = model.chat()
    for message in messages(model):
        prompt = chat.prompt(message)
        kept: list[float] = []
        whole: list[float] = []
        for _ in range(rounds):
            kept.append(first_token(lambda most, message=message: chat.say(message, max_tokens=most)))
            chat.rewind()
            whole.append(first_token(lambda most, prompt=prompt: model.generate(prompt, max_tokens=most)))
        answer, alone = (
            chat.say(message, max_tokens=ANSWER),
            model.generate(prompt, max_tokens=ANSWER),
        )
        found.append(
            {
                "tokens": len(prompt),
                "read": answer.statistics.prompt_tokens,
                "chat": median(kept),
                "whole": median(whole),
                "same": answer.tokens == alone.tokens,
            }
        )
    return found


def together(model: Any, rounds: int) -> dict[str, Any]:
    """New tokens per second of decoding of several chats, one by one and in one batch; whether answers are the same."""
    said = messages(model)[:CHATS]
    speeds: dict[str, list[float]] = {"alone": [], "together": []}
    same = True
    for _ in range(rounds):
        alone = [model.chat().say(message, max_tokens=SHORT) for message in said]
        joint = model.say_all([model.chat() for _ in said], said, max_tokens=SHORT)
        seconds = sum(answer.statistics.decode_seconds for answer in alone)
        speeds["alone"].append(sum(answer.statistics.new_tokens for answer in alone) / seconds)
        speeds["together"].append(joint[0].statistics.tokens_per_second)
        same = same and joint == alone
    return {"chats": len(said), **{name: median(found) for name, found in speeds.items()}, "same": same}


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"# Time to the first token of a chat's turns: {MODEL}, `{METHOD}`",
        "",
        "Milliseconds, medians; the chat reads what is new, and the other reads the same tokens, all of them.",
        "",
        "| turn | tokens | of them read by the chat | chat | reading all | ratio | same answer |",
        "|---" * 7 + "|",
    ]
    for place, turn in enumerate(report["turns"], 1):
        lines.append(
            f"| {place} | {turn['tokens']} | {turn['read']} | {1e3 * turn['chat']:.0f} | {1e3 * turn['whole']:.0f} | "
            f"{turn['chat'] / turn['whole']:.2f} | {'yes' if turn['same'] else 'no'} |"
        )
    several = report["together"]
    lines += [
        "",
        f"{several['chats']} chats, whose answers have at most {SHORT} tokens, write {several['alone']:.0f} tokens a "
        f"second one by one and {several['together']:.0f} together (`say_all`), "
        f"{'the same' if several['same'] else 'some other'} tokens.",
    ]
    return "\n".join([*lines, "", "```json", json.dumps(report["machine"], indent=1), "```", ""])


def main() -> None:
    from tokopt.runtime import load

    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    artifact(MODEL, "float32")  # which others are calibrated on
    model = load(artifact(MODEL, METHOD), threads=options.threads, verify=False)
    report = {
        "turns": turns(model, options.rounds),
        "together": together(model, options.rounds),
        "machine": describe(options.threads),
    }
    text = markdown(report)
    write_report(RESULTS, "chat", report, text)
    print(text)


if __name__ == "__main__":
    main()
