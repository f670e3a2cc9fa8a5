"""An engine in a process of its own, which answers lines of JSON with lines of JSON: engines can take turns so."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from statistics import median
from typing import Any

ANSWER = "answer: "
"""What a line of an engine begins with that is an answer; the others are the engine's own messages."""

PAUSE = 0.05
"""Seconds before a question: threads of the engine that answered last spin for a while, beside the next."""


class Worker:
    """The process of an engine: ``python -m module *arguments``, which has to call :func:`answer_all`."""

    def __init__(
        self, name: str, module: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """``environment`` is that of the process, by default this one's."""
        self.name = name
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, question: object = None) -> Any:
        """The answer to a question, both as JSON; raises RuntimeError where the process has ended."""
        assert self.process.stdin and self.process.stdout
        time.sleep(PAUSE)
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) and not line.startswith(ANSWER):
            pass
        if not line:
            raise RuntimeError(f"the engine {self.name} ended with status {self.process.wait()}")
        return json.loads(line.removeprefix(ANSWER))

    def close(self) -> None:
        """Have the process end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def answer_all(answer: Callable[[Any], object]) -> None:
    """Be such a process: answer every line on stdin."""
    for line in sys.stdin:
        print(ANSWER + json.dumps(answer(json.loads(line))), flush=True)


def medians(start: Sequence[Callable[[], Worker]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds of what every engine answers, numbers by name; the engines take turns."""
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(make())) for make in start]
        for worker in workers:
            worker.ask()  # the first allocates
        turns = [[worker.ask() for worker in workers] for _ in range(rounds)]
    return {
        worker.name: {key: median(turn[key] for turn in own) for key in own[0]}
        for worker, own in zip(workers, zip(*turns, strict=True), strict=True)
    }
