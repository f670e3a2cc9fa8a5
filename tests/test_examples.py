"""Every example runs as a script on real input and prints what it promises."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = all(importlib.util.find_spec(name) for name in ("skimage", "sklearn", "transformers"))


@pytest.mark.skipif(not REAL_DATA, reason="real photographs and weights need the extra tokopt[bench]")
def test_vision_merges_a_real_dinov2_and_draws_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "vision.py"),
        "--rounds",
        "2",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 blocks reduced" in done.stdout and "times as fast" in done.stdout
    cosine = float(done.stdout.split("cosine to the unmerged model: mean ")[1].split(",")[0])
    assert cosine > 0.95
    assert (tmp_path / "tokens.png").stat().st_size > 10_000
    assert (tmp_path / "dinov2-merged.tokopt" / "manifest.json").exists()
