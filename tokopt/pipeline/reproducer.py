"""What is left behind of a pass that failed: enough to run it again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tokopt.ir.bundle import Bundle
from tokopt.pipeline.base import Pass
from tokopt.place import make_folder, writing


def write_reproducer(bundle: Bundle, passes: Sequence[Pass], folder: Path) -> Path:
    """Save the bundle that entered the first of ``passes``, which failed, with their text, ready to be run again.

    Raises TokoptError when it cannot be written.
    """
    from tokopt.artifact import export

    make_folder(folder)
    path = folder / f"reproducer-{passes[0].name}-{time.time_ns():x}"
    export(bundle, path, target="torch")
    with writing(path / "pipeline.txt") as file:
        file.write_text(",".join(map(str, passes)) + "\n")
    return path
