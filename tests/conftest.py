"""Every test runs on one thread, without a network, and with the same random examples each time."""

import gc
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

from tests.shared import share_folder
from tests.zoo import ZOO
from tests.zoo.decoders import DECODERS

MODELS = (*ZOO, *DECODERS)

SLOW = ("test_examples.py", "test_docs.py", "test_tuning.py")
"""Files whose single tests take a minute: models with real weights."""

SHARED = "answer"
"""The fixture of an artifact that takes half a minute: its first test begins the run, and the others find it made."""

torch.set_num_threads(1)
settings.register_profile("tokopt", deadline=None, derandomize=True)
settings.load_profile("tokopt")


def group_of(nodeid: str) -> str:
    """What one worker has to run: all tests of a model of the zoo, which it captures once, or else all of a file.

    Single tests of slow files go to whoever is free.
    """
    file, _, test = nodeid.partition("::")
    names = set(test.rpartition("[")[2].rstrip("]").split("-"))
    return next((model for model in MODELS if model in names), nodeid if file.endswith(SLOW) else file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Share tests out by :func:`group_of`; marks of groups are lost between pytest 9.2 and pytest-xdist 3.8."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests by their group, the longest first, so that no worker ends alone."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(group_of(item.nodeid), []).append(item)
    slow = [group for group in groups if any(file in group for file in SLOW)]
    shared = [group for group in slow if SHARED in getattr(groups[group][0], "fixturenames", ())]
    slow = [*shared[:1], *(group for group in slow if group not in shared), *shared[1:]]
    models = sorted((group for group in groups if group in MODELS), key=lambda group: -len(groups[group]))
    items[:] = [item for group in dict.fromkeys((*slow, *models, *groups)) for item in groups[group]]


def pytest_collection_finish() -> None:
    """Let garbage be looked for among what tests make only: what is imported and collected stays anyway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="session", autouse=True)
def folder_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tell :func:`tests.shared.once` where the workers of this run share files."""
    share_folder(tmp_path_factory)
