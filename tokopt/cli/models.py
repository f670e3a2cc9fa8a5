"""How a model is named on the command line, and the example inputs that it is captured with.

A name is the folder of a Hugging Face model, a ``.gguf`` or ``.pt2`` file, an artifact directory, or
``module:factory``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokopt.errors import CaptureError, InputError, TokoptError
from tokopt.extras import explained, missing
from tokopt.progress import without_bars
from tokopt.runtime.format.manifest import MANIFEST, Manifest, read_manifest

if TYPE_CHECKING:
    from tokopt.ir.bundle import Bundle
    from tokopt.ir.program import AxisRange


@dataclass(frozen=True)
class ExampleOptions:
    """How to make example inputs: sizes that the user gave, None where the model's files decide."""

    image_size: int | None = None
    tokens: int | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    model_class: str | None = None


@dataclass(frozen=True)
class _Model:
    """The arguments of ``tokopt.capture``."""

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Any] | None = None
    ranges: Mapping[str, AxisRange] | None = None
    tokenizer: str | None = None


def read_bundle(
    name: str, options: ExampleOptions | None = None, say: Callable[[str], None] | None = None
) -> Bundle:
    """The bundle of an artifact, or a freshly captured one; ``say`` is told what a user may not expect of its weights.

    Raises InputError when nothing has that name, CaptureError when it cannot be captured, ArtifactError when
    the artifact cannot be opened.
    """
    import tokopt

    options = options or ExampleOptions()
    path = Path(name)
    if (path / MANIFEST).is_file():
        return tokopt.open_bundle(path)
    if path.suffix == ".pt2" and path.is_file():
        return tokopt.capture(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return tokopt.capture_lm(path)
    if (path / "config.json").is_file() and options.model_class is None and _is_language_model(path):
        require("transformers")
        if say is not None:
            _say_expansion(path, say)
        return tokopt.capture_lm(path)
    if (path / "config.json").is_file():
        found = _hugging_face(path, options)
    elif ":" in name and not path.exists():
        found = _from_factory(name, options)
    else:
        raise InputError(
            f"{name!r} names no model: {_why_no_model(path)}; give the folder of a Hugging Face model, a .gguf or .pt2 "
            "file, an artifact, or module:factory"
        )
    return tokopt.capture(
        found.model,
        found.args,
        found.kwargs,
        dynamic=found.dynamic,
        ranges=found.ranges,
        tokenizer=found.tokenizer,
    )


def _why_no_model(path: Path) -> str:
    """What is there of that name, as the reason why it is no model."""
    if path.is_dir():
        return f"the folder has neither config.json nor {MANIFEST}"
    return (
        "the file ends in neither .gguf nor .pt2"
        if path.exists()
        else "nothing of that name is on this machine"
    )


def deployed_manifest(name: str) -> Manifest | None:
    """The manifest of an artifact that a bundle cannot be made of again; None for every other name."""
    if not (Path(name) / MANIFEST).is_file():
        return None
    manifest = read_manifest(Path(name))
    return None if any("torch" in entry.files for entry in manifest.programs.values()) else manifest


def _say_expansion(folder: Path, say: Callable[[str], None]) -> None:
    from tokopt.frontend.stored import expansion_note

    try:
        note = expansion_note(folder)
    except (OSError, ValueError, KeyError, TypeError):  # the capture says what is wrong with a file
        return
    if note is not None:
        say(note)


def _is_language_model(folder: Path) -> bool:
    names = json.loads((folder / "config.json").read_text()).get("architectures") or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def require(package: str) -> None:
    """Raise MissingDependencyError, naming the extra, when an optional package is not installed."""
    if find_spec(package) is None:
        raise missing(package)


def imported(name: str) -> Any:
    """The object ``module:name`` of the user; raises CaptureError."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` does: the user's module lies in the current folder
    try:
        target: Any = import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except Exception as error:
        raise _failure(name, error) from error
    finally:
        sys.path.remove("")
    return target


def _failure(name: str, error: Exception) -> TokoptError:
    """What is raised where the user's own code fails: the extra to install where it misses one of ours."""
    found = explained(error) if isinstance(error, ModuleNotFoundError) else None
    return found or CaptureError(f"{name}: {type(error).__name__}: {error}; see it with --traceback")


def _from_factory(name: str, options: ExampleOptions) -> _Model:
    """Call ``module:factory``: it returns a module, or (module, args), or (module, args, dynamic)."""
    factory = imported(name)
    try:
        made = factory()
    except Exception as error:
        raise _failure(name, error) from error
    parts = list(made) if isinstance(made, tuple) else [made]
    if not 1 <= len(parts) <= 3:
        raise CaptureError(
            f"{name} returned {len(parts)} values; return module, (module, args) or (module, args, dynamic)"
        )
    model, args, dynamic = parts + [None] * (3 - len(parts))
    if isinstance(args, Mapping):
        return _Model(model, kwargs=args, dynamic=dynamic)
    if args is None:
        args = _random(options.shapes)
    args = args if isinstance(args, tuple) else (args,)
    if not args:
        raise InputError(
            f"{name} returned no example inputs; return (module, args), or give --shape 2,3,224,224"
        )
    return _Model(model, args, dynamic=dynamic)


def _random(shapes: tuple[tuple[int, ...], ...]) -> tuple[Any, ...]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _hugging_face(folder: Path, options: ExampleOptions) -> _Model:
    require("transformers")
    import transformers

    cls = getattr(transformers, options.model_class or "AutoModel", None)
    if cls is None:
        raise InputError(
            f"transformers has no class {options.model_class!r}; name one such as CLIPVisionModel"
        )
    try:
        with without_bars():
            model = cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CaptureError(
            f"{folder} cannot be loaded by transformers: {' '.join(str(error).split())}"
        ) from error
    config, wanted = model.config, model.main_input_name
    if config.is_encoder_decoder or (hasattr(config, "vision_config") and hasattr(config, "text_config")):
        raise CaptureError(
            f"{folder} holds several models in one ({type(model).__name__}); capture one of them with "
            "--class (for example CLIPVisionModel), or write a module:factory that returns it"
        )
    if wanted == "pixel_values":
        return _Model(model, kwargs={wanted: _image_example(folder, config, options)})
    if wanted == "input_ids":
        return _text_model(folder, model, options)
    raise CaptureError(
        f"{folder} takes {wanted}; write a module:factory that returns (model, example inputs)"
    )


def _image_example(folder: Path, config: Any, options: ExampleOptions) -> Any:
    """Images [2, channels, height, width] of the size that the image processor makes.

    They are smooth with a little noise, as photographs are: patches of noise alone are all alike, and what chooses
    among them chooses at random.
    """
    import torch
    from torch.nn.functional import interpolate

    size = options.image_size or _processor_size(folder) or getattr(config, "image_size", None)
    if size is None:
        raise InputError(f"{folder} does not say its image size; give --image-size")
    height, width = (size, size) if isinstance(size, int) else size
    channels, generator = getattr(config, "num_channels", 3), torch.Generator().manual_seed(0)
    coarse = torch.randn(2, channels, 6, 6, generator=generator)
    noise = torch.randn(2, channels, height, width, generator=generator)
    return interpolate(coarse, (height, width), mode="bicubic") + 0.1 * noise


def _processor_size(folder: Path) -> tuple[int, int] | None:
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    for key in ("crop_size", "size") if settings.get("do_center_crop", True) else ("size",):
        size = settings.get(key)
        if isinstance(size, int):
            return size, size
        if isinstance(size, dict) and "height" in size and "width" in size:
            return size["height"], size["width"]
    return None


def _text_model(folder: Path, model: Any, options: ExampleOptions) -> _Model:
    import torch

    from tokopt.frontend.texts import read_texts
    from tokopt.ir.program import AxisRange

    longest = getattr(model.config, "max_position_embeddings", None)
    count = options.tokens or min(32, longest or 32)
    ids = torch.randint(0, model.config.vocab_size, (2, count), generator=torch.Generator().manual_seed(0))
    axes = ("batch", "tokens")
    return _Model(
        model,
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic={"input_ids": axes, "attention_mask": axes},
        ranges={"tokens": AxisRange(2, longest)},
        tokenizer=read_texts(folder).tokenizer,
    )
