"""Opening programs on an execution engine: ONNX Runtime, or another by name."""

# ONNX Runtime is untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime

from tokopt.arguments import check_integer, check_items, is_integer, wrong
from tokopt.errors import ArtifactError, InputError, MissingDependencyError
from tokopt.kernels import cpu
from tokopt.runtime.buffers import Bound, Buffers, check_reading, run_in_place
from tokopt.runtime.engines.kernels import choose_kernels
from tokopt.runtime.format.check_files import check_onnx
from tokopt.runtime.format.manifest import ONE_ROW, OWN, PORTABLE, Manifest
from tokopt.runtime.format.signature import find_role

Provider = str | tuple[str, Mapping[str, object]]
"""The name of an ONNX Runtime execution provider, alone or with its options."""

Backend = str | tuple[str, Mapping[str, object]]
"""``"onnxruntime"``, ``"tensorrt"``, or ``"openvino"``, alone or with OpenVINO's properties."""

BACKENDS = ("onnxruntime", "openvino", "tensorrt")

ACTIVATIONS = ("session.qdq_matmulnbits_accuracy_level", "4")
"""Products with weights in 4 or 8 bits round what they read to 8 bits per block, which is fast."""

IN_FLOAT = (("session.qdq_matmulnbits_accuracy_level", "1"), ("session.disable_quant_qdq", "1"))
"""Products in float32, which gives the same on every processor up to float32 rounding.

By the first, weights in 4 or 8 bits are expanded while they are multiplied. Where activations are quantized too, the
second keeps ONNX Runtime from multiplying integers; all weights are then expanded before.
"""

UNFOLDED = ["ConstantFolding"]
"""What ONNX Runtime must not do where weights are expanded: together they may not fit into memory."""

_CPU = "CPUExecutionProvider"


class Sessions:
    """The ONNX Runtime sessions of an artifact: one per program and form, opened when first asked for."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        *,
        kernels: bool = True,
        rounds: bool = True,
        spins: bool = True,
    ) -> None:
        """``kernels`` asks for the form that calls tokopt's own CPU kernels, ``rounds`` for activations of 8 bits.

        ``spins`` lets threads spin while they wait, which many calls gain from and a few calls only pay for.
        """
        self.folder, self.manifest, self.threads = folder, manifest, check_threads(threads)
        self.providers, self.rounds, self.spins = providers, rounds, spins
        self.names, self.options = _providers(providers)
        self.kernels = choose_kernels(manifest, kernels, self._cpu)
        self._open: dict[tuple[str, str], onnxruntime.InferenceSession] = {}

    def in_float(self) -> Sessions:
        """The same programs in :data:`IN_FLOAT` arithmetic, none of them open.

        Those that call tokopt's own kernels are executed by the bodies in their files.
        """
        wanted = self.kernels.library is not None
        return Sessions(
            self.folder,
            self.manifest,
            self.providers,
            self.threads,
            kernels=wanted,
            rounds=False,
            spins=self.spins,
        )

    def forms(self, program: str) -> tuple[str, ...]:
        """The forms of a program that this machine's provider and the installed kernels execute."""
        entry = self.manifest.programs[program]
        forms = [form for form in (PORTABLE, ONE_ROW) if form == PORTABLE or self._cpu]
        if self.kernels.library is not None and entry.kernels == cpu.VERSION:
            forms.append(OWN)
        return tuple(form for form in forms if form in entry.files)

    def best(self, program: str, batch: int) -> onnxruntime.InferenceSession:
        """The fastest session for so many rows."""
        forms = self.forms(program)
        if OWN in forms:
            return self.get(program, OWN)
        return self.get(program, ONE_ROW if batch == 1 and ONE_ROW in forms else PORTABLE)

    def get(self, program: str, form: str = PORTABLE) -> onnxruntime.InferenceSession:
        """The session of one form; raises ArtifactError when ONNX Runtime cannot load it."""
        if (program, form) not in self._open:
            path = check_onnx(self.folder, self.manifest.programs[program], form, self.manifest.files)
            self._open[program, form] = _session(path, self, form == OWN)
        return self._open[program, form]

    def buffers(self, batch: int, slots: int) -> Buffers:
        """The initial states of a language model."""
        return Buffers(self.manifest.states, batch, slots)

    def check_reading(self, batch: int, tokens: int, slots: int) -> None:
        """Raise InputError when a call that reads so many tokens of every row does not fit into memory."""
        check_reading(self.manifest.states, batch, tokens, slots)

    def bind(self, program: str, buffers: Buffers) -> Bound | Fitting:
        """A program whose states stay in ``buffers``."""
        entry = self.manifest.programs[program]
        mask, forms = find_role(entry.inputs, "mask"), self.forms(program)
        if mask is not None and buffers.batch == 1 and ONE_ROW in forms and OWN not in forms:
            return Fitting(self, program, mask.name, buffers)
        return Bound(self.best(program, buffers.batch), entry, buffers)

    def run(
        self, program: str, feed: Mapping[str, np.ndarray], form: str | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs of a program for arrays, states among them."""
        if form is None:
            form = OWN if OWN in self.forms(program) else PORTABLE
        entry, session = self.manifest.programs[program], cast(Any, self.get(program, form))
        mask = find_role(entry.inputs, "mask")
        if form == ONE_ROW and mask is not None and not hides_later(feed[mask.name]):
            raise InputError(
                f"in {mask.name!r} a token sees a later one, which this form of program {program!r} hides; run the "
                f"form {PORTABLE!r}"
            )
        names = [tensor.name for tensor in entry.outputs]
        if entry.aliases:
            return dict(zip(names, run_in_place(session, names, feed, entry.aliases), strict=True))
        return dict(zip(names, session.run(names, feed), strict=True))

    @property
    def _cpu(self) -> bool:
        return self.names == [_CPU]


class Fitting:
    """A program for one row whose states stay in buffers, in the form that fits the mask of each call.

    ONNX Runtime's fused form hides from a new token those after it, whatever the mask says; see :data:`.ONE_ROW`.
    """

    def __init__(self, sessions: Sessions, program: str, mask: str, buffers: Buffers) -> None:
        self.sessions, self.program, self.mask, self.buffers = sessions, program, mask, buffers
        self.form, self.bound = ONE_ROW, self._open(ONE_ROW)

    def bind(self) -> None:
        """Bind the buffers as they are now; to be called after they were resized."""
        self.bound.bind()

    def follow(self) -> None:
        """Bind states that another program left in other memory of the same size."""
        self.bound.follow()

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call: the states move on, the other outputs are returned (valid until the next call)."""
        form = ONE_ROW if hides_later(feed[self.mask]) else PORTABLE
        if form != self.form:
            self.form, self.bound = form, self._open(form)
        return self.bound.run(feed)

    def _open(self, form: str) -> Bound:
        session = self.sessions.get(self.program, form)
        return Bound(session, self.sessions.manifest.programs[self.program], self.buffers)


def hides_later(mask: np.ndarray) -> bool:
    """Whether in a mask [batch, tokens, tokens] no token sees a later one."""
    return mask.shape[-1] == 1 or not np.triu(mask, 1).any()


def _session(path: Path, opener: Sessions, own: bool) -> onnxruntime.InferenceSession:
    """A file, opened; ``own`` says that it calls tokopt's own kernels."""
    names, options = opener.names, opener.options
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors only: what matters is raised
    bodies = own and not opener.rounds  # what is executed is in the file, where weights are expanded
    own = own and opener.rounds
    exact = not opener.rounds and (bodies or _rounds_activations(path))
    for entry in (ACTIVATIONS,) if opener.rounds else IN_FLOAT if exact else IN_FLOAT[:1]:
        settings.add_session_config_entry(*entry)
    if not opener.spins:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    schedule = opener.manifest.schedule
    if len(schedule.programs) > 1 or schedule.commit is not None:
        # Every session has threads of its own; those of the one that ran last would spin beside those of the next.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    disabled = UNFOLDED if exact else None
    settings.enable_cpu_mem_arena = not exact  # it keeps what expanded weights took, and takes it doubled
    if own:
        settings.register_custom_ops_library(str(opener.kernels.library))
    if opener.threads is not None:
        settings.intra_op_num_threads = opener.threads
    try:
        session = onnxruntime.InferenceSession(
            path, settings, providers=names, provider_options=options, disabled_optimizers=disabled
        )
    except Exception as error:  # ONNX Runtime raises several unrelated classes
        reason = " ".join(str(error).split())
        remedy = "; load it with kernels=False" if own else ""
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {reason}{remedy}"
        ) from error
    if names[0] not in session.get_providers():
        raise MissingDependencyError(
            f"{names[0]} could not start and ONNX Runtime fell back to {', '.join(session.get_providers())}; "
            f"check its driver and libraries, or pass providers=[{_CPU!r}]"
        )
    return session


def _rounds_activations(path: Path) -> bool:
    """Whether a file quantizes activations, whose products ONNX Runtime computes in 8 bits."""
    return (
        b"QuantizeLinear" in path.read_bytes()
    )  # also of DynamicQuantizeLinear, and not of DequantizeLinear


MOST_THREADS = 1024
"""Each thread of an engine is started at once; what is beyond any machine's cores is a mistake."""


def check_threads(threads: object) -> int | None:
    """The number of threads, proved to be one; raises InputError."""
    if threads is None:
        return None
    if not is_integer(threads):
        raise wrong("threads", threads, f"an integer from 1 to {MOST_THREADS}, or None for all cores")
    return check_integer("threads", threads, 1, MOST_THREADS)


def named_options(name: str, value: object, takes: str) -> tuple[str, dict[str, object]]:
    """A name, or a pair of a name and its options: how a backend or a provider is said; raises InputError."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, (tuple, list)):
        pair = tuple(cast("Sequence[object]", value))
        if len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Mapping):
            options = cast("Mapping[object, object]", pair[1])
            if all(isinstance(key, str) for key in options):
                return pair[0], dict(cast("Mapping[str, object]", options))
    raise wrong(name, value, takes)


def _providers(providers: Sequence[Provider] | None) -> tuple[list[str], list[dict[str, object]]]:
    """Names and options, each name proved to be available."""
    takes = "a list of names of execution providers, or of pairs of a name and a mapping of its options"
    chosen = [_CPU] if providers is None else [providers]
    if providers is not None and not isinstance(providers, str):
        chosen = check_items("providers", providers, takes)
    pairs = [named_options("an item of providers", item, takes) for item in chosen]
    available = onnxruntime.get_available_providers()
    if not pairs:
        raise InputError(f"providers is empty; choose among {', '.join(available)}")
    for name, _ in pairs:
        if name in available:
            continue
        if name in onnxruntime.get_all_providers():
            raise MissingDependencyError(
                f"{name} is not part of the installed ONNX Runtime, which has {', '.join(available)}; for "
                "NVIDIA GPUs install tokopt[gpu]"
            )
        raise InputError(
            f"{name!r} is no execution provider of ONNX Runtime; there are {', '.join(available)}, and more "
            "with tokopt[gpu]"
        )
    for name, options in pairs:
        if name == _CPU and options:
            raise InputError(f"{_CPU} takes no options, and ignores {', '.join(options)}; leave them out")
    return [name for name, _ in pairs], [options for _, options in pairs]
