"""The documentation is true: its Python runs, its commands parse, its links and examples hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

import tokopt
from tokopt.cli import command_parser
from tokopt.passes import PASSES

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ALL = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are marked ``language`` and nothing else."""
    found = re.findall(r"^ *```(.*?)\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for mark, code in found if mark == language]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order in one namespace that holds a small model and its images."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=4, hidden_size=32, intermediate_size=64)
    config.num_hidden_layers, config.num_attention_heads = 3, 4
    model = ViTModel(config).eval()
    images = torch.randn(2, 3, 32, 32)
    code = "\n".join(blocks(page, "python"))
    bundle = None if "tokopt.capture(" in code else tokopt.capture(model, (images,))
    exec(
        compile(code, page.name, "exec", dont_inherit=True),
        {"model": model, "images": images, "bundle": bundle, "tokopt": tokopt},
    )


@ALL
def test_commands_of_a_page_parse(page: Path) -> None:
    lines = "\n".join(blocks(page, "")).splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["tokopt"]:
            args = command_parser().parse_args(words[1:])
            if pipeline := getattr(args, "pipeline", None):
                tokopt.parse(pipeline)


@ALL
def test_links_of_a_page_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings]


@ALL
def test_pipelines_of_a_page_parse(page: Path) -> None:
    """Inline code such as ``tome{r=16}`` is a pipeline that exists."""
    names = "|".join(PASSES)
    for text in re.findall(rf"`\"?((?:{names})\{{[^`\"]+\}})\"?`", page.read_text()):
        if "..." not in text:
            assert tokopt.parse(text).passes


MODULES = [module.name for module in pkgutil.walk_packages(tokopt.__path__, "tokopt.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_pass_is_documented() -> None:
    pages = ("merge-and-prune.md", "kv-eviction.md", "quantization.md")
    text = "".join((ROOT / "docs" / page).read_text() for page in pages)
    readme = (ROOT / "README.md").read_text()
    for name in PASSES:
        assert f"\n## {name}\n" in text and f"| `{name}` |" in readme
