"""Render every template of a list on standard input in less memory than they ask for, and print what happened."""

from __future__ import annotations

import json
import resource
import sys
import time

from tokopt.errors import InputError
from tokopt.runtime import sandbox
from tokopt.runtime.chat import render_chat

MESSAGES = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "yes"}]
MEMORY = 2**29

if __name__ == "__main__":
    sandbox.BUDGET = sandbox.BUDGET // 4  # the same limit sooner
    render_chat("{{ messages }}", MESSAGES, {})
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
    for template in json.load(sys.stdin):
        try:
            outcome = f"rendered {len(render_chat(template, MESSAGES, {}))} characters"
        except InputError as error:
            outcome = f"refused: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        print(json.dumps([template[:100], outcome[:400], time.process_time()]), flush=True)
