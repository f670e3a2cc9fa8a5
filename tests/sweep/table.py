"""``docs/models.md``, made of the outcomes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.sweep.outcome import EQUAL, FAILS, LIMIT, REFUSED, UNBUILT, WRONG, Ending, Outcome, read_outcomes

OUTCOMES = Path(__file__).parent / "outcomes.json"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

_PLACE = re.compile(r"^pass .*?: refused in strict mode: |step: |(?<=default) at [\w.]+ \(\w+\.py:\d+\)")
"""What tells classes apart that are refused for one reason."""

_WORDS = {
    EQUAL: "equal",
    REFUSED: "refused",
    WRONG: "**wrong**",
    FAILS: "**fails**",
    LIMIT: "**over its limit**",
    UNBUILT: "not tried",
}


def write_table() -> None:
    PAGE.write_text(table(OUTCOMES), encoding="utf-8")


def table(path: Path) -> str:
    """The page."""
    versions = json.loads(path.read_text(encoding="utf-8"))
    outcomes = list(read_outcomes(path).values())
    parts = [_HEAD.format(transformers=versions["transformers"], torch=versions["torch"])]
    families = sorted({one.family for one in outcomes})
    parts.append(_counts(outcomes, families))
    parts += [_section(family, [one for one in outcomes if one.family == family]) for family in families]
    return "\n".join(parts)


_HEAD = """# Models

Which classes of transformers {transformers} tokopt takes (torch {torch}), tried one by one. Every causal language model
and every encoder of text, images and sound is built small and random, in a process of its own, captured, optimised,
exported, loaded, and compared with itself in eager PyTorch. `python -m tests.sweep` does it and writes this page.

- **Language models**: 24 greedy tokens after three prompts in one padded batch are those of transformers' `generate`,
  one prompt at a time; the log-probabilities of a text of 200 tokens, far beyond the example of the capture, are the
  model's. A quantization to 8 bits keeps the log-probabilities close. An eviction whose budget holds the text changes
  no token, and one whose budget does not runs.
- **Encoders**: every output is the model's for several numbers of rows, and where they may vary for texts and sounds
  of several lengths, with padding, up to seven times the example's. Merged tokens and integer products give what the
  optimised program gives in PyTorch at those sizes; integer products stay as close to the model as rounding lets them.
- **equal** is that all of this holds; **refused** that tokopt said why not, in one sentence, before it wrote anything;
  **not tried** that transformers does not build or run the class by itself, small and random, as it is said there.
  Classes and passes that are missing have not had their turn yet.
"""


def _counts(outcomes: Iterable[Outcome], families: list[str]) -> str:
    counted = Counter((one.family, one.plain.outcome) for one in outcomes)
    shown = [word for word in _WORDS if any(counted[family, word] for family in families)]
    rows = [f"| | {' | '.join(_WORDS[word] for word in shown)} |", f"|---{'|---' * len(shown)}|"]
    rows += [
        f"| {family} | {' | '.join(str(counted[family, word]) for word in shown)} |" for family in families
    ]
    return "\n".join(rows) + "\n"


def _section(family: str, outcomes: list[Outcome]) -> str:
    passes = sorted({text for one in outcomes for text in one.passes})
    lines = [
        f"## {family.capitalize()}\n",
        f"| class | as it is {''.join(f'| `{text}` ' for text in passes)}|",
        f"|---|---{'|---' * len(passes)}|",
    ]
    notes: dict[str, int] = {}
    for one in outcomes:
        cells = [one.plain, *(one.passes.get(text) for text in passes)]
        lines.append(f"| {one.name} | {' | '.join(_cell(cell, one.name, notes) for cell in cells)} |")
    lines += ["", *(f"{number}. {sentence}" for sentence, number in notes.items())]
    return "\n".join(lines) + "\n"


def _cell(ending: Ending | None, name: str, notes: dict[str, int]) -> str:
    """The word, and the number of the sentence; classes share sentences that differ in their name alone."""
    if ending is None:
        return ""
    if not ending.detail:
        return _WORDS[ending.outcome]
    sentence = _PLACE.sub("", ending.detail.replace(name, "it")).replace("|", "\\|").replace("<", "\\<")
    number = notes.setdefault(sentence, len(notes) + 1)
    return f"{_WORDS[ending.outcome]} ({number})"
