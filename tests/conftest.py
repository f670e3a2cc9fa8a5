"""Every test runs on one thread, without a network, and with the same random examples each time."""

import gc
import os

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

torch.set_num_threads(1)
settings.register_profile("tokopt", deadline=None, derandomize=True)
settings.load_profile("tokopt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker run all tests of a model of the zoo, which it captures once, or else all of a file.

    The longest come first, so that no worker ends alone.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        given = getattr(item, "callspec", None)
        model = given.params.get("name") if given is not None else None
        group = model if isinstance(model, str) and model in MODELS else item.location[0]
        item.add_marker(pytest.mark.xdist_group(group))
        groups.setdefault(group, []).append(item)
    slow = [group for group in groups if group.endswith(SLOW)]
    models = sorted((group for group in groups if group in MODELS), key=lambda group: -len(groups[group]))
    items[:] = [item for group in dict.fromkeys((*slow, *models, *groups)) for item in groups[group]]


def pytest_collection_finish() -> None:
    """Let garbage be looked for among what tests make only: what is imported and collected stays anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def folder_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tell :func:`tests.shared.once` where the workers of this run share files."""
    share_folder(tmp_path_factory)
