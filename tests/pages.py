"""The pages of the documentation, and what stands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: its mark (``python``, ``sh``, nothing, ...) and its lines."""

    mark: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.findall(r"^ *```(.*?)\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(mark, text) for mark, text in found]


def commands(block: Block) -> list[str]:
    """The commands of a block marked ``sh``, without their comments."""
    if block.mark != "sh":
        return []
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in block.text.splitlines())
    return [line for line in lines if line]


def sentences(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
