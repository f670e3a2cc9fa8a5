"""The documentation is true: its Python and its commands run, its links and examples hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTModel

import tokopt
from tests.commands import execute, furnish, verify_all
from tests.pages import PAGES, ROOT, blocks, commands, sentences
from tokopt.cli import command_parser
from tokopt.cli.verbs import VERBS
from tokopt.passes import PASSES

ALL = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])

NOT_EXECUTED = {
    "make demo": "installs packages; the script that it runs is run by tests/test_examples.py",
    "make test": "runs this test",
    "make lint": "runs before this test",
    "pip install torch==2.13.0": "installs packages",
    "pip install '.[compile,hf]'": "installs packages",
    "pip install .": "installs packages",
    ".venv/bin/python -m pytest tests/matrix -k mypass": "tests a pass that the reader has written",
    ".venv/bin/python -m pytest tests/matrix/test_eviction.py -k mypass": "tests a pass that the reader has written",
    'tokopt optimize reproducers/reproducer-tome-1a2b "tome{r=16}" -o out.tokopt --traceback': "takes what a pass "
    "that failed has left",
    "tritonserver --model-repository=$PWD/models": "a server that no package of Python brings",
}
"""The commands of the pages that are not executed here, and why."""

EXECUTABLE = [page for page in PAGES if any(block.mark in ("python", "sh") for block in blocks(page))]


@pytest.mark.parametrize("page", EXECUTABLE, ids=lambda page: page.name)
def test_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and commands in the order of the page, in one folder; every artifact that they write passes ``verify``.

    Python finds a small model and its images, commands the models, photographs and texts that pages name.
    """
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    names = small_model(captured=any("tokopt.capture(" in block.text for block in blocks(page)))
    for block in blocks(page):
        if block.mark == "python":
            exec(compile(block.text, page.name, "exec", dont_inherit=True), names)
        for command in commands(block):
            if command not in NOT_EXECUTED:
                execute(command)
    verify_all(tmp_path)


def small_model(captured: bool) -> dict[str, Any]:
    """The names that the Python of a page takes for granted; a bundle too, unless the page captures one."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=4, hidden_size=32, intermediate_size=64)
    config.num_hidden_layers, config.num_attention_heads = 3, 4
    model = ViTModel(config).eval()
    images = torch.randn(2, 3, 32, 32)
    bundle = None if captured else tokopt.capture(model, (images,))
    return {"model": model, "images": images, "bundle": bundle, "tokopt": tokopt}


def test_what_is_not_executed_stands_in_a_page() -> None:
    for command in NOT_EXECUTED:
        if command.startswith("tokopt "):
            command_parser().parse_args(shlex.split(command)[1:])
    assert set(NOT_EXECUTED) <= {
        command for page in PAGES for block in blocks(page) for command in commands(block)
    }


@ALL
def test_commands_are_marked_as_such(page: Path) -> None:
    """Or they would not be executed."""
    unmarked = "\n".join(block.text for block in blocks(page) if block.mark == "")
    assert not re.search(r"^ *(tokopt|python|pip|make|mkdir) ", unmarked, flags=re.MULTILINE)


@ALL
def test_commands_in_sentences_exist(page: Path) -> None:
    """What they name exists, and tokopt takes their options; most run for minutes, or on a GPU."""
    for command in re.findall(r"`((?:tokopt|python|make) [^`]+)`", sentences(page)):
        program, *words = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        elif program == "python" and words[0] == "-m":
            assert find_spec(words[1]), command
        elif program == "python":
            assert (ROOT / words[0]).is_file(), command
        elif len(words) > 1 and page.name != "CHANGELOG.md":
            command_parser().parse_args(words)
        else:
            assert words[0] in (*VERBS, "--help"), command


@ALL
def test_links_of_a_page_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)", sentences(page)):
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


MODULES = [
    module.name
    for module in pkgutil.walk_packages(tokopt.__path__, "tokopt.")
    if not module.name.endswith(
        (
            "libtokopt_cpu",  # has the suffix of a module, and is none
            "torch_tensorrt.converters",  # for the registry of a package that stands apart
        )
    )
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_pass_is_documented() -> None:
    pages = (
        "merge-and-prune.md",
        "kv-eviction.md",
        "quantization.md",
        "language-models.md",
        "speculation.md",
        "early-exit.md",
    )
    text = "".join((ROOT / "docs" / page).read_text() for page in pages)
    readme = (ROOT / "README.md").read_text()
    for name in PASSES:
        assert f"\n## {name}\n" in text and f"| `{name}` |" in readme
