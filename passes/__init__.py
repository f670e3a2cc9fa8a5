"""The passes, one method per file, imported on first use.

Adding a pass takes one file and one line in ``__init__.pyi``, an import that type checkers read as it is and of which
:data:`PASSES` is made; see CONTRIBUTING.md.
"""

import re
from importlib import import_module
from importlib.resources import files

_LINE = re.compile(r"^from (tokopt\.passes\.\S*?(\w+)) import (\w+) as \3$", re.MULTILINE)

PASSES = {
    name: f"{module}:{cls}"
    for module, name, cls in _LINE.findall(files(__package__).joinpath("__init__.pyi").read_text())
}
"""Text spelling of every pass, which is the name of its file -> ``module:class``."""


def load_pass(name: str) -> type:
    """The class of the pass spelled ``name``."""
    module, cls = PASSES[name].split(":")
    return getattr(import_module(module), cls)


def __getattr__(name: str) -> object:
    for home in PASSES.values():
        module, cls = home.split(":")
        if cls == name:
            return getattr(import_module(module), cls)
    raise AttributeError(f"module 'tokopt.passes' has no attribute {name!r}")
