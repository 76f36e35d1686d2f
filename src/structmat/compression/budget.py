"""What may be spent: parameters, operations or time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from structmat.compression.timing import layer_microseconds
from structmat.errors import BudgetError, FormatError
from structmat.program import build, cost
from structmat.structure import Shape, Structure, count_stored


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
    """Stored numbers of the weights: learned ones, and one for every index. Biases are kept and not counted.

    Args:
        amount: a fraction of the dense weights' count, strictly between 0 and 1, or an absolute integer.
    """

    amount: int | float
    unit: ClassVar[str] = "parameters"

    def __post_init__(self) -> None:
        _check(self)

    def cost(self, structure: Structure, shape: Shape, rows: float = 1.0) -> float:
        return float(count_stored(structure, shape))


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
        batch: object = self.batch
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise BudgetError(f"Latency(batch={self.batch!r}): batch is an integer of at least 1.")

    def cost(self, structure: Structure, shape: Shape, rows: float = 1.0) -> float:
        return layer_microseconds(structure, shape, max(1, round(rows * self.batch)))


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
