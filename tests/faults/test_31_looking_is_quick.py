"""``inspect`` opened half a gigabyte of weights to print one row thirty times, and logs were full of foreign bars.

The law: what only looks reads the manifest and what is stored for it; attentions that differ in their number alone are
one row; without a terminal other libraries draw no bars, and each of tokopt's own long stages says one line.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

import tokopt
from tests.cli.command import answer, complaint
from tests.matrix.language import bundle as decoder
from tests.matrix.test_matrix import captured
from tests.runtime.artifacts import sealed
from tests.zoo import ZOO
from tests.zoo.decoders import DECODERS
from tokopt.cli import main
from tokopt.cli.blocks import rows_by_kind


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of target torch whose program is gone: nothing that opens it can answer."""
    path = tokopt.export(decoder("llama"), tmp_path_factory.mktemp("look") / "llama.tokopt", target="torch")
    (path / "step.pt2").unlink()
    (path / "selftest.safetensors").unlink()
    return path


def test_inspect_reads_no_weights_and_starts_nothing_slow(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(model)]) == 0
    out, err = capsys.readouterr()
    (row,) = (line for line in out.splitlines() if "self_attn" in line)
    assert "layers.*.self_attn (2 of them)" in row and err == ""
    assert "rows: int64[rows], 6 states -> logits: float32[batch, rows, 97], 6 states" in out.splitlines()[0]
    found = answer(capsys, "inspect", model)
    assert len(found["blocks"]) == 2 and found["cost"]["parameters"] > 0


def test_the_stored_outline_is_what_the_program_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An older artifact, which has none, is opened, and the answers are the same."""
    path = tokopt.export(
        tokopt.optimize(captured("vit"), "tome{r=4}"), tmp_path / "vit.tokopt", target="torch"
    )
    stored = answer(capsys, "inspect", path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["outline.json"]
    (path / "manifest.json").write_text(json.dumps(sealed(manifest)))
    (path / "outline.json").unlink()
    assert answer(capsys, "inspect", path) == stored


GOOD = '"blocks": [], "cost": {"flops": 1, "parameters": 1, "nodes": 1}, "batch": 1'


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "no json",
        '{"blocks": [{}], "cost": {}, "batch": 1}',
        f'{{{GOOD}, "programs": []}}',
        f'{{{GOOD}, "programs": {{"step": []}}}}',
        f'{{{GOOD}, "programs": {{"other": {{{GOOD}}}}}}}',
    ],
)
def test_a_damaged_outline_is_a_typed_sentence(
    content: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (model / "manifest.json").read_text(), (model / "outline.json").read_text()
    assert "outline.json" in complaint_after(model, content, None, capsys)
    data = content.encode()
    entry = {"size": len(data), "sha256": sha256(data).hexdigest()}
    assert "outline.json is damaged" in complaint_after(model, content, entry, capsys)
    (model / "manifest.json").write_text(before[0])
    (model / "outline.json").write_text(before[1])


def complaint_after(model: Path, content: str, entry: dict | None, capsys: pytest.CaptureFixture[str]) -> str:
    """What inspect says of this outline, rehashed where an entry is given."""
    (model / "outline.json").write_text(content)
    if entry is not None:
        manifest = json.loads((model / "manifest.json").read_text())
        manifest["files"]["outline.json"] |= entry
        (model / "manifest.json").write_text(json.dumps(sealed(manifest)))
    return complaint(capsys, 2, "inspect", model)


def block(index: int | None, path: str, tokens: int = 9, note: str = "pre-norm") -> dict:
    return {
        "index": index,
        "path": path,
        "kind": "self",
        "tokens": tokens,
        "heads": 4,
        "flops": 1000,
        "note": note,
    }


def test_rows_are_kinds() -> None:
    """Alternating kinds are two rows, other token counts are rows of their own, and so is what no pass can reduce."""
    alternating = [block(i, f"layers.{i}.attn", note="local" if i % 3 else "global") for i in range(6)]
    spans = [(row[0], row[1]) for row in rows_by_kind(alternating)]
    assert spans == [("0,3", "layers.*.attn (2 of them)"), ("1-2,4-5", "layers.*.attn (4 of them)")]
    merged = [block(i, f"layers.{i}.attn", tokens=9 - i) for i in range(3)]
    assert [row[:2] for row in rows_by_kind(merged)] == [(str(i), f"layers.{i}.attn") for i in range(3)]
    mixed = [block(0, "layers.0.attn"), block(None, "pooling.attn"), block(None, "layers.1.attn")]
    assert [row[0] for row in rows_by_kind(mixed)] == ["0", "", ""]


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_without_a_terminal_there_are_lines_and_no_bars(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    built = DECODERS[name]() if name in DECODERS else ZOO[name].build()
    built.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    capfd.readouterr()
    assert main(["capture", str(tmp_path / "model"), "-o", str(tmp_path / "made.tokopt")]) == 0
    _, err = capfd.readouterr()
    lines = err.splitlines()
    assert "Loading weights" not in err and "\r" not in err
    assert lines and all(line.startswith("tokopt: ") for line in lines)
    if name == "llama":
        return
    assert main(["export", str(tmp_path / "made.tokopt"), "-o", str(tmp_path / "onnx.tokopt")]) == 0
    said = capfd.readouterr().err
    for stage in ("Exporting", "lowering", "running the self-test"):
        assert stage in said
