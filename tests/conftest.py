"""Every test runs on one thread, without a network, and with the same random examples each time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("tokopt", deadline=None, derandomize=True)
settings.load_profile("tokopt")
