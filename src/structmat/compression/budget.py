"""What may be spent: parameters, operations or time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from structmat.errors import BudgetError, FormatError
from structmat.matrix import StructuredMatrix
from structmat.nn.linear import StructuredLinear
from structmat.program import build, cost
from structmat.structure import Shape, Structure, count_parameters
from structmat.structures.dense import Dense


@runtime_checkable
class Budget(Protocol):
    """A share of, or an absolute amount of, what all compressible layers cost together."""

    unit: ClassVar[str]

    @property
    def amount(self) -> int | float: ...

    def cost(self, structure: Structure, shape: Shape, rows: float = 1.0) -> float:
        """What one layer costs: ``rows`` are the input rows that it sees for one sample."""
        ...


@dataclass(frozen=True)
class Parameters:
    """Learned numbers of the weights; biases are kept and not counted, nor are indices.

    Args:
        amount: a fraction of the dense weights' count, strictly between 0 and 1, or an absolute integer.
    """

    amount: int | float
    unit: ClassVar[str] = "parameters"

    def __post_init__(self) -> None:
        _check(self)

    def cost(self, structure: Structure, shape: Shape, rows: float = 1.0) -> float:
        return float(count_parameters(structure, shape))


@dataclass(frozen=True)
class Flops:
    """Multiplications plus additions for one sample; layers that see more rows of a sample count more.

    Args:
        amount: a fraction of the dense layers' operations, strictly between 0 and 1, or an absolute integer.
    """

    amount: int | float
    unit: ClassVar[str] = "FLOPs"

    def __post_init__(self) -> None:
        _check(self)

    def cost(self, structure: Structure, shape: Shape, rows: float = 1.0) -> float:
        return flops(structure, shape) * rows


@dataclass(frozen=True)
class Latency:
    """Time on this machine: the sum of the layers' measured medians, in microseconds.

    Args:
        amount: a fraction of the dense layers' time, strictly between 0 and 1, or an integer of microseconds.
        batch: samples that are run at once.
    """

    amount: int | float
    batch: int = 1
    unit: ClassVar[str] = "microseconds"

    def __post_init__(self) -> None:
        _check(self)
        if not isinstance(self.batch, int) or isinstance(self.batch, bool) or self.batch < 1:
            raise BudgetError(f"Latency(batch={self.batch!r}): batch is an integer of at least 1.")

    def cost(self, structure: Structure, shape: Shape, rows: float = 1.0) -> float:
        return median_microseconds(structure, shape, max(1, round(rows * self.batch)))


def _check(budget: Parameters | Flops | Latency) -> None:
    name, amount = type(budget).__name__, budget.amount
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise BudgetError(f"{name}({amount!r}): a budget is a fraction or an integer, not {type(amount).__name__}.")
    if isinstance(amount, float) and not 0.0 < amount < 1.0:
        raise BudgetError(
            f"{name}({amount!r}): a float means a fraction of all compressible layers and lies strictly between 0 and "
            f"1. Use {name}(0.5) for half of it, or an integer for an absolute amount."
        )
    if isinstance(amount, int) and amount < 1:
        raise BudgetError(f"{name}({amount!r}): an absolute budget is an integer of at least 1.")


def limit(budget: Budget, dense: float) -> float:
    """The most that may be spent, when the dense layers together cost ``dense``."""
    return budget.amount * dense if isinstance(budget.amount, float) else float(budget.amount)


def flops(structure: Structure, shape: Shape) -> int:
    """Operations of one product with a vector."""
    return cost(build(structure, shape)).flops


def to_json(budget: Budget) -> dict[str, Any]:
    """Plain values: ``{"budget": "Latency", "amount": 0.5, "batch": 1}``."""
    data: dict[str, Any] = {"budget": type(budget).__name__, "amount": budget.amount}
    return data | {"batch": budget.batch} if isinstance(budget, Latency) else data


def from_json(data: object) -> Budget:
    """Read what :func:`to_json` wrote. Raises :class:`~structmat.errors.FormatError`."""
    kinds: dict[str, Any] = {"Parameters": Parameters, "Flops": Flops, "Latency": Latency}
    if not isinstance(data, dict) or data.get("budget") not in kinds:
        raise FormatError(f"A budget is an object whose 'budget' is one of {', '.join(kinds)}; got {data!r}.")
    try:
        found: Budget = kinds[data["budget"]](**{k: v for k, v in data.items() if k != "budget"})
    except (TypeError, BudgetError) as error:
        raise FormatError(f"{data!r} is no valid budget: {error}") from error
    return found


@lru_cache(maxsize=65536)
def median_microseconds(structure: Structure, shape: Shape, rows: int, *, seconds: float = 0.02) -> float:
    """The median time of one float32 layer on this machine, for ``rows`` input rows; measured once a process.

    At least 7 runs after 2 that warm up, then until ``seconds`` have passed. "Keep dense" is timed as the ``nn.Linear``
    that stays.
    """
    out_features, in_features = shape
    layer: nn.Module
    if isinstance(structure, Dense):
        layer = nn.Linear(in_features, out_features, bias=False, dtype=torch.float32)
    else:
        generator = torch.Generator().manual_seed(0)
        layer = StructuredLinear.from_matrix(
            StructuredMatrix.random(structure, shape, generator=generator, dtype=torch.float32)
        )
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(2):
            layer(x)
        end = time.perf_counter() + seconds
        while len(times) < 7 or time.perf_counter() < end:
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)
