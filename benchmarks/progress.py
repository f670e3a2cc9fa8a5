"""Measurements that outlive a run that was cut off, and the report that they become."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from examples.data import write_atomically


class Progress:
    """Finished measurements by key, kept in a file that every new one is added to."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "measured.json"
        self.values: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of ``key``, measured now if it is not known."""
        if key not in self.values:
            self.put(key, measure())
        return self.values[key]

    def put(self, key: str, value: Any) -> None:
        self.values[key] = value
        write_atomically(self.file, lambda path: path.write_text(json.dumps(self.values)))


def write_report(folder: Path, name: str, report: Mapping[str, Any], text: str) -> None:
    """Put ``report`` into ``name.json`` of a folder, and what people read of it into ``name.md``, each as a whole."""
    write_atomically(
        folder / f"{name}.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n")
    )
    write_atomically(folder / f"{name}.md", lambda path: path.write_text(text))
