"""Where only the runtime is installed, verbs that compile printed a traceback (``No module named 'torch'``).

The law: what needs a package that an extra brings says so in one sentence, on the command line and in Python, and
verbs that only run artifacts work without.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tokopt.cli.verbs import VERBS

DATA = Path(__file__).parents[1] / "data" / "artifacts" / "format2"
ENCODER, LANGUAGE = DATA / "encoder", DATA / "llama"

PROGRAM = """
import sys, tokopt
from tokopt.extras import EXTRAS

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from tokopt.cli import main
for words in sys.stdin.read().splitlines():
    print("#", words)
    sys.stderr.write(f"# {words}\\n")
    try:
        print("->", main(words.split()))
    except SystemExit as error:
        print("->", error.code)
for name in ("capture", "optimize", "capture_lm", "tune"):
    try:
        getattr(tokopt, name)
    except tokopt.TokoptError as error:
        print(name, error)
"""

COMPILING = (
    "passes",
    f"optimize {ENCODER} rtn -o made",
    f"estimate {ENCODER} rtn",
    f"compare {ENCODER} {ENCODER} x.npy",
    f"tune {ENCODER} x.npy -o made",
    f"bisect {ENCODER} rtn --tolerance 1",
    "capture module:factory -o made",
    "capture model.pt2 -o made",
    f"export {ENCODER} -o made --target triton",
)
RUNNING = (
    f"inspect {ENCODER}",
    f"inspect {LANGUAGE}",
    f"verify {ENCODER}",
    f"verify {LANGUAGE}",
    f"run {ENCODER}",
    f"chat {LANGUAGE}",
    f"bench {ENCODER} --rounds 1",
    f"bench {LANGUAGE} --rounds 1 --prompt 8",
)
TEXT = f"generate {LANGUAGE} hello"


@cache
def output(folder: Path) -> tuple[dict[str, str], dict[str, str], str]:
    """Exit code and stderr of every command, and what Python says of the names that compile."""
    (folder / "module.py").write_text("import torch\n")
    (folder / "model.pt2").touch()
    commands = [*COMPILING, *RUNNING, TEXT]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="\n".join(commands), capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("\n-> ")
    codes = {words: part.split("\n")[0] for words, part in zip(commands, shown[1:], strict=True)}
    errors = dict(zip(commands, done.stderr.split("# ")[1:], strict=True))
    return codes, {words: text.partition("\n")[2] for words, text in errors.items()}, shown[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtime")


@pytest.mark.parametrize("words", COMPILING, ids=lambda words: words.split()[0])
def test_a_verb_that_compiles_names_the_extra(folder: Path, words: str) -> None:
    codes, errors, _ = output(folder)
    line = errors[words].splitlines()[-1]
    assert codes[words] == "2" and "Traceback" not in errors[words]
    assert line.startswith("tokopt: error: ") and line.endswith("pip install 'tokopt[compile]'")


@pytest.mark.parametrize("words", RUNNING, ids=lambda words: words.replace(str(DATA), ""))
def test_a_verb_that_runs_artifacts_works(folder: Path, words: str) -> None:
    codes, errors, _ = output(folder)
    assert codes[words] == "0", errors[words]


def test_text_needs_its_own_extra_or_a_tokenizer(folder: Path) -> None:
    codes, errors, _ = output(folder)
    assert codes[TEXT] == "2" and "has no tokenizer; pass token ids" in errors[TEXT]


def test_python_names_the_extra_too(folder: Path) -> None:
    said = output(folder)[2].splitlines()[1:]
    assert [line.split()[0] for line in said] == ["capture", "optimize", "capture_lm", "tune"]
    assert all(
        line.endswith("torch is not installed; install it with: pip install 'tokopt[compile]'")
        for line in said
    )


def test_every_verb_is_tried() -> None:
    assert {words.split()[0] for words in (*COMPILING, *RUNNING, TEXT)} == set(VERBS)
