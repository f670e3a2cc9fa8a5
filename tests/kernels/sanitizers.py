"""Tests of the library once more, with addresses and undefined behaviour watched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.shared import once

ROOT = Path(__file__).resolve().parents[2]

WATCHED = "TOKOPT_TEST_LIBRARY" in os.environ
"""Whether this is a run with sanitizers."""

skip_when_watched = pytest.mark.skipif(WATCHED, reason="this is the run with sanitizers")


def examples(count: int) -> settings:
    """Let hypothesis draw ``count`` examples: under sanitizers a sixteenth, and others in every run.

    That budget keeps the watched run of an op below 8 seconds.
    """
    return settings(
        max_examples=count // 16 if WATCHED else count,
        derandomize=not WATCHED,
        deadline=None,
        print_blob=True,
    )


def check_watched(file: str) -> None:
    """Run a file's tests of the library once more, built with sanitizers; skip where g++ has none."""
    # A program that is not C++ brings no exceptions, which the sanitizer wants to find before it starts.
    preloaded = ":".join(map(runtime_library, ("libasan.so", "libstdc++.so.6")))
    environment = {
        **os.environ,
        "TOKOPT_TEST_LIBRARY": str(once("watched_libtokopt_cpu.so", build_watched)),
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are no concern of the library
    }
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, file, "-k", "not reference and not sanitizers"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def build_watched(path: Path) -> None:
    """Compile the library with sanitizers."""
    sources = [*(ROOT / "kernels" / "cpu").glob("*.cpp"), *(ROOT / "kernels").glob("*/cpu.cpp")]
    flags = ["-std=c++17", "-O0", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    watched = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, *watched, *map(str, sources), "-o", str(path)], check=True)


def runtime_library(name: str) -> str:
    """The path of a library of g++; skips the test where there is none."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"g++ has no {name}")
    return str(path.resolve())
