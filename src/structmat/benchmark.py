"""Structured layers against dense ones on the clock: how much faster, and how close to what the machine can do.

A *setting* is what all layers of one run have in common; each is measured in a process of its own, which is what
``structmat bench`` and ``python -m benchmarks.kernels`` do with lists of them. Within a setting dense, reference and
native run in turns: each is called once, finding its caches full of the others' weights, which is reported apart, and
then several times in a row (for about 2 milliseconds, at least once). A time is the median over turns of the mean of
the calls in a row.

*Efficiency* is the least time that the machine could need by the time that was needed. The least time is the larger of
two, plus one call of ``F.linear`` on 64 x 64: the bytes of input, output and weights at the rate of ``clone`` of so
many bytes; the operations at the rate of the dense layer of the same setting.
"""

from __future__ import annotations

import dataclasses
import enum
import gc
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.compression.candidates import families_of
from structmat.compression.report import environment
from structmat.compression.tune import tune
from structmat.compression.workfolder import write_json
from structmat.errors import FormatError, StructmatError, StructureError
from structmat.kernels import backend
from structmat.matrix import matmul
from structmat.nn.linear import StructuredLinear
from structmat.structure import Shape, Structure, count_stored, resolve
from structmat.structures import families
from structmat.structures.blast import BLAST
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.butterfly import Butterfly
from structmat.structures.cauchy_like import CauchyLike
from structmat.structures.dense import Dense
from structmat.structures.hankel_like import HankelLike
from structmat.structures.kronecker import Kronecker
from structmat.structures.ldr_subdiagonal import LDRSubdiagonal
from structmat.structures.ldr_tridiagonal import LDRTridiagonal
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch
from structmat.structures.pivoted_low_rank import PivotedLowRank
from structmat.structures.sparse import Sparse
from structmat.structures.sum_of import SparsePlusLowRank
from structmat.structures.toeplitz_like import ToeplitzLike
from structmat.structures.vandermonde_like import VandermondeLike

SECONDS = 2.0
"""To spend on a layer of a setting."""

ROW_SECONDS = 2e-3
"""To spend on calls in a row."""

FLOOR_SECONDS = 0.2
"""To spend on a copy, or on a small call, at most."""

FEWEST, FEWEST_SLOW = 7, 3
"""Turns that are made at least; and of what has used the layer's seconds before."""

DISPLACEMENT_RANK = 4
LOW_DISPLACEMENT_RANK = (ToeplitzLike, HankelLike, VandermondeLike, CauchyLike, LDRSubdiagonal, LDRTridiagonal)
"""Their products take time in proportion to the rank, and are made for small ones."""

FULL_SHARE = 8
"""Families without a typical member are measured at this part of the dense parameters."""


class Work(enum.Enum):
    """What is timed.

    ``FORWARD``: the output of the frozen layer, without gradients. ``TRAINING``: the output and all gradients.
    ``REUSED``: the output into memory that is there (``structmat.matmul(..., out=)``, ``torch.mm(..., out=)``).
    ``TUNED``: as ``FORWARD``, after ``structmat.tune(..., allow_dense=True)``.
    """

    FORWARD = "forward"
    TRAINING = "training"
    REUSED = "reused"
    TUNED = "tuned"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all layers of one process have in common.

    Args:
        shape: (out_features, in_features).
        batch: rows of the input.
        dtype: ``"float32"``, or another of PyTorch's.
        work: what is timed.
        threads: of PyTorch.
    """

    shape: Shape
    batch: int
    dtype: str
    work: Work
    threads: int

    @property
    def key(self) -> str:
        """The name of its file."""
        return f"{self.shape[0]}x{self.shape[1]}_{self.batch}_{self.dtype}_{self.work.value}_{self.threads}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "shape": list(self.shape), "work": self.work.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Setting:
        """Read what :meth:`to_json` gave."""
        return cls(**{**data, "shape": tuple(data["shape"]), "work": Work(data["work"])})

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.shape[0]} x {self.shape[1]}, batch {self.batch}, {self.dtype}, {self.work.value}, {threads}"


def all_threads() -> tuple[int, ...]:
    """Every core, and one."""
    return tuple(dict.fromkeys((os.cpu_count() or 1, 1)))


def telling_settings() -> list[Setting]:
    """A subset that takes less than 20 minutes on 2 cores."""
    many, one = all_threads()[0], all_threads()[-1]
    small, large = (1024, 1024), (4096, 4096)
    found = [
        *itertools.product((small, large), (1, 64, 256, 2048), ("float32",), (Work.FORWARD,), (many,)),
        *itertools.product((small, large), (64, 256), ("float32",), (Work.TRAINING,), (many,)),
        (large, 2048, "float32", Work.REUSED, many),
        (large, 256, "bfloat16", Work.FORWARD, many),
        *itertools.product(((256, 256), small), (1, 64), ("float32",), (Work.TUNED,), (many,)),
        *itertools.product((small, large), (256,), ("float32",), (Work.FORWARD,), (one,)),
    ]
    return [Setting(*setting) for setting in dict.fromkeys(found)]


def every_setting() -> list[Setting]:
    """All shapes, batches, dtypes and numbers of threads; the telling ones first. Hours."""
    square = tuple((n, n) for n in (512, 1024, 2048, 4096, 8192))
    shapes = (*square, (3072, 768), (768, 3072), (11008, 4096), (4096, 11008))
    everything = itertools.product(shapes, (1, 16, 64, 256, 2048), ("float32", "bfloat16"), Work, all_threads())
    found = (Setting(*setting) for setting in everything)
    # Memory is fresh or not only where outputs are large.
    return list(
        dict.fromkeys([*telling_settings(), *(s for s in found if s.work is not Work.REUSED or s.batch >= 256)])
    )


def typical_members(shape: Shape) -> list[Structure]:
    """A member of every kind of family, at sizes as they are used."""
    small = min(shape)
    root = 2 ** round((small.bit_length() - 1) / 2)
    return _fitting(
        (
            Monarch(blocks=root),
            Butterfly(),
            Kronecker(terms=1, factors=2),
            BLAST(blocks=4, rank=max(1, small // 16)),
            BlockTensorTrain(rank=2),
            BlockDiagonal(blocks=8),
            LowRank(rank=max(1, small // 16)),
            PivotedLowRank(rank=max(1, small // 16)),
            Sparse(density=0.1),
            SparsePlusLowRank(rank=max(1, small // 32), density=0.02),
        ),
        shape,
    )


def every_member(shape: Shape) -> list[Structure]:
    """The typical ones, those of small displacement rank, and the first configuration of every other family."""
    found = typical_members(shape)
    found += _fitting((kind(rank=DISPLACEMENT_RANK) for kind in LOW_DISPLACEMENT_RANK), shape)
    others = {name: kind for name, kind in families().items() if kind not in {Dense, *map(type, found)}}
    for _, kind in sorted(others.items()):
        found += _fitting(list(kind.configurations(shape, shape[0] * shape[1] // FULL_SHARE))[:1], shape)
    return found


def members_within(shape: Shape, budget: float, names: Sequence[str] | None = None) -> list[Structure]:
    """What families offer within a share of the dense parameters; all families, or the named ones.

    Raises:
        StructureError: a name is that of no family.
    """
    count = int(budget * shape[0] * shape[1])
    kinds = [kind for kind in families_of(list(names) if names else None) if kind is not Dense]
    return [member for kind in kinds for member in _fitting(kind.configurations(shape, count), shape)]


def _fitting(structures: Iterable[Structure], shape: Shape) -> list[Structure]:
    """Resolved; without those that refuse the shape."""
    found = []
    for structure in structures:
        try:
            found.append(resolve(structure, shape))
        except StructmatError:
            continue
    return found


# ---------------------------------------------------------------------------------------------------- many settings


def run_settings(
    settings: Iterable[Setting],
    members: Callable[[Shape], Sequence[Structure]],
    *,
    seconds: float = SECONDS,
    folder: Path | None = None,
    again: bool = False,
) -> Iterator[dict[str, Any]]:
    """Measure one setting after the other, each in a process of its own, and yield the results.

    Args:
        settings: in the order in which they are run.
        members: the layers for a shape.
        seconds: to spend on each layer.
        folder: where results are kept, one JSON file each; what is there is not measured again, so that an interrupted
            run goes on where it stopped.
        again: measure it all the same.

    Raises:
        FormatError: a file in the folder is no result.
    """
    for setting in settings:
        path = None if folder is None else folder / f"{setting.key}.json"
        if path is not None and path.exists() and not again:
            yield read_result(path)
            continue
        result = _alone(setting, list(members(setting.shape)), seconds)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
        yield result


def read_result(path: Path) -> dict[str, Any]:
    """What was kept of a setting. Raises FormatError."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Setting.from_json(data["setting"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is no result of a benchmark. Remove it.") from error
    return data


def _alone(setting: Setting, structures: list[Structure], seconds: float) -> dict[str, Any]:
    """In a fresh process: what the allocator keeps from earlier settings would change the times of large outputs."""
    context = multiprocessing.get_context("spawn")
    # An interruption reaches both processes; this one says so.
    with ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        return pool.submit(_untuned, setting, structures, seconds).result()


def _untuned(setting: Setting, structures: list[Structure], seconds: float) -> dict[str, Any]:
    """What was measured by ``tune`` on this machine before decides nothing here, and is not changed."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STRUCTMAT_CACHE"] = folder
        return run_setting(setting, structures, seconds)


# ------------------------------------------------------------------------------------------------------ one setting


def run_setting(setting: Setting, structures: Sequence[Structure], seconds: float = SECONDS) -> dict[str, Any]:
    """Time layers in one setting, in this process, whose number of threads it changes.

    Returns:
        ``setting``, ``environment`` and ``layers``, plain values. Of each layer: ``structure``, ``family``, ``stored``
        numbers, ``operations_ratio`` (dense by structured), ``microseconds`` by what ran (``dense``, ``auto``,
        ``reference``, ``native``), ``dense_by`` (the time of dense by each of them) and ``dense_by_first`` (the same of
        first calls), ``floor`` (microseconds of a ``call``, of the ``memory`` and of the ``operations``), and
        ``efficiency`` of ``auto``.
    """
    torch.set_num_threads(setting.threads)
    generator = torch.Generator().manual_seed(0)
    call = _call_seconds(generator, min(seconds, FLOOR_SECONDS))
    rows = [_run_layer(setting, structure, generator, call, seconds) for structure in structures]
    return {"setting": setting.to_json(), "layers": rows, "environment": environment()}


def _call_seconds(generator: torch.Generator, seconds: float) -> float:
    weight, one = torch.randn(64, 64, generator=generator), torch.randn(1, 64, generator=generator)
    with torch.inference_mode():
        return statistics.median(in_turns({"call": lambda: F.linear(one, weight)}, seconds)[1]["call"])


def _run_layer(
    setting: Setting, structure: Structure, generator: torch.Generator, call: float, seconds: float
) -> dict[str, Any]:
    """One layer beside the dense one."""
    dtype: torch.dtype = getattr(torch, setting.dtype)
    height, width = setting.shape
    weight = torch.randn(height, width, generator=generator).to(dtype)
    layer = StructuredLinear(width, height, bias=False, structure=structure, generator=generator).to(dtype)
    x = torch.randn(setting.batch, width, generator=generator).to(dtype)
    flops, stored = layer.matrix.flops, count_stored(structure, setting.shape)
    dense, structured = _works(setting, layer, weight, x, generator)

    def on(name: str) -> Callable[[], object]:
        def run() -> object:
            with backend(name):
                return structured()

        return run

    runs = {"dense": dense, "auto": structured}
    for name in () if setting.work is Work.TUNED else ("reference", "native"):
        try:
            on(name)()
        except StructureError:
            continue
        runs[name] = on(name)
    firsts, times = in_turns(runs, seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    passes = 3 if setting.work is Work.TRAINING else 1
    moved = passes * (setting.batch * (height + width) + stored) * x.element_size()
    floor = {
        "call": call,
        "memory": _memory_seconds(setting, moved, min(seconds, FLOOR_SECONDS)),
        "operations": flops / (2 * height * width) * medians["dense"],
    }
    return {
        "family": type(structure).__name__,
        "structure": str(structure),
        "stored": stored,
        "operations_ratio": 2 * height * width / flops if flops else None,
        "microseconds": {name: 1e6 * value for name, value in medians.items()},
        "dense_by": ratios(times),
        "dense_by_first": ratios(firsts),
        "floor": {name: 1e6 * value for name, value in floor.items()},
        "efficiency": (max(floor["memory"], floor["operations"]) + call) / medians["auto"],
    }


def _memory_seconds(setting: Setting, moved: int, seconds: float) -> float:
    """The time in which a copy reads and writes so many bytes together, into fresh memory or such that is there."""
    source = torch.empty(max(1, moved // 2 // 4))
    target = torch.empty_like(source)
    with torch.inference_mode():
        run: Callable[[], object] = source.clone
        if setting.work is Work.REUSED:
            run = lambda: target.copy_(source)  # noqa: E731
        return statistics.median(in_turns({"copy": run}, seconds)[1]["copy"])


def _works(
    setting: Setting, layer: StructuredLinear, weight: Tensor, x: Tensor, generator: torch.Generator
) -> tuple[Callable[[], object], Callable[[], object]]:
    """What is timed of the dense layer and of the structured one."""
    if setting.work is Work.TRAINING:
        weight.requires_grad_()
        given = torch.randn(setting.batch, setting.shape[0], generator=generator).to(x.dtype)
        wanted, parameters = x.clone().requires_grad_(), list(layer.parameters())
        return (
            lambda: torch.autograd.grad(F.linear(wanted, weight), [wanted, weight], given),
            lambda: torch.autograd.grad(layer(wanted), [wanted, *parameters], given),
        )
    if setting.work is Work.REUSED:
        matrix, y = layer.requires_grad_(False).matrix, x.new_empty(setting.batch, setting.shape[0])
        columns, out = x.T, y.T
        return _quiet(lambda: torch.mm(x, weight.T, out=y)), _quiet(lambda: matmul(matrix, columns, out=out))
    module: nn.Module = layer.freeze(setting.batch)
    if setting.work is Work.TUNED:
        tune(module, [setting.batch], allow_dense=True, seconds=0.3)
    return _quiet(lambda: F.linear(x, weight)), _quiet(lambda: module(x))


def _quiet(work: Callable[[], object]) -> Callable[[], object]:
    """Without gradients."""

    def run() -> object:
        with torch.inference_mode():
            return work()

    return run


Times = dict[str, list[float]]


def in_turns(runs: dict[str, Callable[[], object]], seconds: float) -> tuple[Times, Times]:
    """Seconds of the first call of each turn, and of the mean of those that follow it in a row.

    What is so slow that it used its ``seconds`` alone takes part in fewer turns.
    """
    calls = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = min(100, max(1, math.ceil(ROW_SECONDS / max(time.perf_counter() - start, 1e-9))))
    firsts: Times = {name: [] for name in runs}
    rest: Times = {name: [] for name in runs}
    used = dict.fromkeys(runs, 0.0)
    names, main = list(runs), next(iter(runs))
    collects = gc.isenabled()
    gc.disable()
    try:
        while len(firsts[main]) < FEWEST or sum(used.values()) < seconds:
            for name in names:
                if name != main and len(firsts[name]) >= FEWEST_SLOW and used[name] > seconds:
                    continue
                run = runs[name]
                start = time.perf_counter()
                run()
                middle = time.perf_counter()
                for _ in range(calls[name]):
                    run()
                end = time.perf_counter()
                firsts[name].append(middle - start)
                rest[name].append((end - middle) / calls[name])
                used[name] += end - start
            names.reverse()  # nobody always follows the same one
    finally:
        if collects:
            gc.enable()
    return firsts, rest


def ratios(times: Times) -> dict[str, float]:
    """Medians over turns of the time of dense by that of each."""
    # What left early took part in the first turns.
    return {
        name: statistics.median(d / t for d, t in zip(times["dense"], found, strict=False))
        for name, found in times.items()
    }
