"""Run and time artifacts of either target: ONNX Runtime for ``onnx``, torch for ``torch``."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from tokopt.arguments import LARGEST, check_integer, check_path
from tokopt.errors import ArtifactError, InputError, MissingDependencyError, TokoptError
from tokopt.extras import explained
from tokopt.ir.format import BATCH
from tokopt.measure.text_times import DecodeTimer, WritingTimer
from tokopt.runtime import load
from tokopt.runtime.buffers import available_memory
from tokopt.runtime.engines.onnxruntime import Backend, check_threads
from tokopt.runtime.format.manifest import PORTABLE, Manifest, read_manifest
from tokopt.runtime.inputs import Interface
from tokopt.runtime.selftest import read_selftest

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Feed = dict[str, np.ndarray]


class Run(Protocol):
    """An opened artifact as a function: outputs by name, those of the exit after ``depth`` blocks where it is given."""

    def __call__(self, feed: Feed, depth: int | None = None) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True)
class Runner:
    """An opened artifact: its manifest, and a function from named inputs to named outputs."""

    folder: Path
    manifest: Manifest
    run: Run

    @property
    def program(self) -> Interface:
        """What is fed and what comes back."""
        return Interface.of(self.manifest)

    def example(self, batch: int | None = None) -> Feed:
        """The inputs of the artifact's self-test, repeated or cut along the axis ``batch``."""
        axes = {tensor.name: tensor.axes for tensor in self.program.inputs}
        stored: Feed = {}
        for entry in self.manifest.schedule.of_role("encode"):
            found = read_selftest(self.folder, self.manifest, entry.program).inputs
            stored |= {name: array for name, array in found.items() if name in axes and name not in stored}
        if batch is None:
            return stored
        batch = self._checked(batch, stored)
        for name, array in stored.items():
            if BATCH in axes[name]:
                axis = axes[name].index(BATCH)
                stored[name] = np.take(array, np.arange(batch) % array.shape[axis], axis)
        return stored

    def _checked(self, batch: object, stored: Feed) -> int:
        """A batch that the artifact takes and that fits into memory; raises InputError."""
        count, bounds = check_integer("batch", batch, 1, LARGEST), self.program.ranges.get(BATCH)
        if bounds is None or (bounds.max is not None and count > bounds.max):
            raise InputError(f"{self.folder} cannot run a batch of {count}; leave --batch out")
        places = {t.name: t.axes.index(BATCH) for t in self.program.inputs if BATCH in t.axes}
        wanted = sum(count * stored[n].nbytes // stored[n].shape[axis] for n, axis in places.items())
        free = available_memory()
        if free is not None and wanted > free:
            raise InputError(
                f"inputs of a batch of {count} take {wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are "
                "free; give a smaller one"
            )
        return count


def open_runner(path: str | Path, threads: int | None = None, backend: Backend = "onnxruntime") -> Runner:
    """Open an artifact.

    ``backend`` executes ONNX; an artifact of target ``torch`` is executed by torch on the CPU, or with ``"torch-cuda"``
    on a GPU with the CUDA kernels of the token ops. Raises ArtifactError, InputError for a backend that cannot execute
    it, and MissingDependencyError where there is no GPU.
    """
    folder = check_path("path", path)
    manifest = read_manifest(folder)
    if manifest.schedule.generates:
        raise ArtifactError(f"{folder} is a language model; use it with: tokopt generate {folder} PROMPT")
    if backend == "torch-cuda":
        return _torch_runner(folder, manifest, "cuda")
    if all(PORTABLE in program.files for program in manifest.programs.values()):
        model = load(folder, threads=threads, backend=backend)
        return Runner(folder, manifest, lambda feed, depth=None: model.run(**feed, depth=depth))
    if backend != "onnxruntime":
        raise InputError(
            f"{folder} is of target torch; export it for {backend} with: tokopt export {folder} -o DIR"
        )
    threads = check_threads(threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return _torch_runner(folder, manifest, "cpu")


def _torch_runner(folder: Path, manifest: Manifest, device: str) -> Runner:
    """An artifact of target ``torch`` on a device."""
    import torch

    import tokopt
    from tokopt.ir.assemble import assemble

    if device == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            f"torch {torch.__version__} finds no CUDA device; leave out --backend torch-cuda"
        )
    bundle = tokopt.open_bundle(folder)
    if len(bundle.entries) > 1:
        raise ArtifactError(
            f"{folder} has several programs; export it for ONNX Runtime with: tokopt export {folder} -o DIR"
        )
    program = bundle.main
    module = module_on(assemble(program), device)
    inputs, outputs = [spec.name for spec in program.inputs], [spec.name for spec in program.outputs]

    @torch.no_grad()
    def run(feed: Feed, depth: int | None = None) -> Mapping[str, np.ndarray]:
        if depth is not None:
            raise InputError(f"depth={depth} means nothing to a model without exits; leave it out")
        if missing := [name for name in inputs if name not in feed]:
            raise InputError(f"input {missing[0]!r} is missing; the program takes {', '.join(inputs)}")
        values = module(*(torch.from_numpy(feed[name]).to(device) for name in inputs))
        return dict(zip(outputs, (value.cpu().numpy() for value in values), strict=True))

    return Runner(folder, manifest, run)


def module_on(exported: ExportedProgram, device: str) -> Callable[..., Any]:
    """A program with its weights, and all tensors that it makes itself, on ``device``; the one given stays as it is."""
    from torch.export.passes import move_to_device_pass

    with warnings.catch_warnings():  # torch's own copying of its trees is deprecated by torch
        warnings.simplefilter("ignore", FutureWarning)
        return move_to_device_pass(deepcopy(exported), device).module(check_guards=False)


def interleaved_times(
    paths: Sequence[str],
    rounds: int,
    batch: int | None,
    threads: int | None,
    prompt: int | None = None,
    backend: Backend = "onnxruntime",
    feeds: Sequence[Feed] = (),
    texts: Sequence[Feed] = (),
    drafter: str = "",
) -> Iterator[tuple[float, ...]]:
    """Yield, per round, the seconds that each artifact took: an encoder for its stored example, repeated or cut to
    ``batch``, or for all of ``feeds`` where they are given; a language model for one token of those that it decodes
    after ``prompt`` of them, or of those that it writes after ``texts`` where they are given, with a ``drafter`` of
    the host where it verifies.

    They take turns as :func:`interleaved` says.
    """
    if prompt is None:
        return interleaved(paths, rounds, EncoderTimer(batch, threads, backend, tuple(feeds)))
    if texts:
        return interleaved(paths, rounds, WritingTimer(tuple(texts), prompt, threads, drafter=drafter))
    return interleaved(paths, rounds, DecodeTimer(prompt, threads))


Answer = TypeVar("Answer", covariant=True)


class Timer(Protocol[Answer]):
    """What is measured of an artifact; it travels to another process."""

    def open(self, path: str) -> Callable[[], Answer]:
        """Open an artifact; every call of the result measures once."""
        ...


@dataclass(frozen=True)
class EncoderTimer:
    """The seconds that an encoder takes for its stored example, repeated or cut to ``batch``, or for all ``feeds``."""

    batch: int | None
    threads: int | None
    backend: Backend
    feeds: tuple[Feed, ...] = ()

    def open(self, path: str) -> Callable[[], float]:
        """As :class:`Timer`."""
        runner = open_runner(path, self.threads, self.backend)
        feeds = self.feeds or (runner.example(self.batch),)

        def measure() -> float:
            start = time.perf_counter()
            for feed in feeds:
                runner.run(feed)
            return time.perf_counter() - start

        return measure


def interleaved(paths: Sequence[str], rounds: int, timer: Timer[Answer]) -> Iterator[tuple[Answer, ...]]:
    """Yield, per round, what ``timer`` measured of each artifact; they take turns as :func:`in_turns` says."""
    return in_turns([(path, timer) for path in paths], rounds)


def in_turns(jobs: Sequence[tuple[str, Timer[Answer]]], rounds: int) -> Iterator[tuple[Answer, ...]]:
    """Yield, per round, what every job's timer measured of its artifact.

    Every job runs in a process of its own, so that the thread pools of two engines do not disturb each
    other; within a round they take turns, and the order is reversed every other round, so that a machine that
    slows down slows all of them. The first measurement of each, which allocates, is dropped.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers: list[Connection] = []
        for path, timer in jobs:
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(there, path, timer), daemon=True)
            process.start()
            there.close()
            stack.callback(process.join, 10)
            stack.enter_context(here)  # closed first, which ends the worker
            _answer(here, path)
            workers.append(here)
        for number in range(rounds):
            order = range(len(jobs)) if number % 2 == 0 else reversed(range(len(jobs)))
            answers: dict[int, Answer] = {}
            for index in order:
                workers[index].send("run")
                answers[index] = _answer(workers[index], jobs[index][0])
            yield tuple(answers[index] for index in range(len(jobs)))


def _answer(worker: Connection, path: str) -> Any:
    try:
        answer = worker.recv()
    except EOFError as error:
        raise TokoptError(f"the process that ran {path} ended without an answer (out of memory?)") from error
    if isinstance(answer, str):
        raise TokoptError(answer)
    return answer


def _worker(pipe: Connection, path: str, timer: Timer[object]) -> None:
    try:
        measure = timer.open(path)
        pipe.send(measure())
        while True:
            pipe.recv()
            pipe.send(measure())
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except ModuleNotFoundError as error:
        pipe.send(str(explained(error) or f"{path}: {error}"))
    except Exception as error:
        pipe.send(
            str(error) if isinstance(error, TokoptError) else f"{path}: {type(error).__name__}: {error}"
        )
