"""What every process of the sweep needs, imported once for all of them."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import torch
import transformers

import tokopt.artifact
import tokopt.frontend.language
import tokopt.lower.onnx.whole
import tokopt.passes  # noqa: F401

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
