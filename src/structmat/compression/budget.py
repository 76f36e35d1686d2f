"""What may be spent: parameters, operations, time or bytes; and the quality that may be lost."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from structmat.compression.timing import layer_microseconds
from structmat.errors import BudgetError, FormatError
from structmat.program import build, cost
from structmat.structure import Shape, Structure, count_stored


@runtime_checkable
class Budget(Protocol):
    """A share of, or an absolute amount of, what all compressible layers cost together."""

    unit: ClassVar[str]

    @property
    def amount(self) -> int | float:
        """A fraction of the dense cost, strictly between 0 and 1, or an absolute amount."""
        ...

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


_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Memory:
    """Bytes of what :func:`structmat.save` writes of the whole model: every tensor of it, compressed or not, and the
    description of its layers.

    What is not compressed counts, since it is in the file: an embedding alone may exceed the budget, which is an error.

    Args:
        amount: ``"20MB"`` (B, kB, MB, GB are powers of 1000; KiB, MiB, GiB of 1024), an integer of bytes, or a fraction
            of what would be written of the original, strictly between 0 and 1.
    """

    amount: int | float | str
    unit: ClassVar[str] = "bytes"

    def __post_init__(self) -> None:
        if isinstance(self.amount, str):
            object.__setattr__(self, "amount", parse_bytes(self.amount))
        _check(self)


def parse_bytes(text: str) -> int:
    """``"20MB"`` as 20,000,000; at most one space before the unit, no other units, a whole number of bytes.

    Raises:
        BudgetError: it is none of these; the message says what was probably meant.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if found is None or found[2] not in _BYTES:
        same = [unit for unit in _BYTES if found is not None and unit.lower() == found[2].lower()]
        meant = f" Did you mean {found[1]}{same[0]}?" if found is not None and same else ""
        raise BudgetError(
            f"Memory({text!r}) is no size: write a number and one of {', '.join(_BYTES)}, such as '20MB'.{meant}"
        )
    return math.floor(float(found[1]) * _BYTES[found[2]]) if "." in found[1] else int(found[1]) * _BYTES[found[2]]


@dataclass(frozen=True)
class Quality:
    """The smallest model that ``evaluate`` still accepts. Say in exactly one way what is accepted:

    - ``loss=0.01``: a value that is at most 0.01 worse than the original's, in the unit of ``evaluate``; with
      ``relative=True`` at most 1 % of the original's value worse.
    - ``at_least=0.97``: no smaller value; larger ones are better.
    - ``at_most=1.76``: no larger value; smaller ones are better.

    Which direction is worse: ``better="higher"`` (accuracy) or ``better="lower"`` (perplexity, bits). Left out, it is
    found: the smallest model that can be built is evaluated first, and where its value went is worse. Given, it is
    checked in the same way.

    Args:
        loss, relative, at_least, at_most: as above.
        better: "higher" or "lower"; only with ``loss``.
        of: which number, where ``evaluate`` returns several by name.
        minimise: what is made small: ``Parameters``, ``Flops`` or ``Latency``, or one with its settings, such as
            ``Latency(0.5, batch=8)``, whose amount does not matter.
        tries: models that are built and evaluated at most.
        precision: the search ends when an accepted model costs at most this much more than one that is not.
    """

    loss: float | None = None
    _: dataclasses.KW_ONLY
    better: Literal["higher", "lower"] | None = None
    relative: bool = False
    at_least: float | None = None
    at_most: float | None = None
    of: str | None = None
    minimise: Budget | type[Parameters] | type[Flops] | type[Latency] = Parameters
    tries: int = 8
    precision: float = 0.02

    def __post_init__(self) -> None:
        ways = {n: getattr(self, n) for n in ("loss", "at_least", "at_most") if getattr(self, n) is not None}
        if len(ways) != 1:
            raise BudgetError(
                f"Quality says what is accepted in exactly one way; got {', '.join(ways) or 'none'}. "
                f"Give loss=, at_least= or at_most=."
            )
        name, value = next(iter(ways.items()))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BudgetError(f"Quality({name}={value!r}): it is a finite number.")
        if self.loss is not None and self.loss < 0:
            raise BudgetError(
                f"Quality(loss={self.loss!r}): a loss is how much worse a value may be, and not negative. "
                f"Say by better= which direction is worse."
            )
        if self.loss is None and (self.better is not None or self.relative):
            raise BudgetError(f"Quality({name}=...) is absolute and says its direction: leave out better and relative.")
        if self.better not in (None, "higher", "lower"):
            raise BudgetError(f"Quality(better={self.better!r}): it is 'higher' or 'lower'.")
        kinds = (Parameters, Flops, Latency)
        if not isinstance(self.minimise, kinds) and self.minimise not in kinds:
            raise BudgetError(f"Quality(minimise={self.minimise!r}): it is Parameters, Flops or Latency.")
        tries: object = self.tries
        if not isinstance(tries, int) or isinstance(tries, bool) or tries < 2:
            raise BudgetError(f"Quality(tries={self.tries!r}): an integer of at least 2.")
        if not 0 < self.precision < 1:
            raise BudgetError(f"Quality(precision={self.precision!r}) lies strictly between 0 and 1.")

    @property
    def spends(self) -> Budget:
        """A budget in the unit that is made small."""
        return self.minimise(0.5) if isinstance(self.minimise, type) else self.minimise


def _check(budget: Parameters | Flops | Latency | Memory) -> None:
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


def to_json(goal: Budget | Memory | Quality) -> dict[str, Any]:
    """Plain values: ``{"budget": "Latency", "amount": 0.5, "batch": 1}``."""
    data: dict[str, Any] = {"budget": type(goal).__name__}
    if isinstance(goal, Quality):
        spends = {k: v for k, v in to_json(goal.spends).items() if k != "amount"}
        own = {f.name: getattr(goal, f.name) for f in dataclasses.fields(goal) if f.name != "minimise"}
        return data | {k: v for k, v in own.items() if v is not None} | {"minimise": spends}
    data["amount"] = goal.amount
    return data | {"batch": goal.batch} if isinstance(goal, Latency) else data


def from_json(data: object) -> Budget | Memory | Quality:
    """Read what :func:`to_json` wrote. Raises :class:`~structmat.errors.FormatError`."""
    kinds: dict[str, Any] = {k.__name__: k for k in (Parameters, Flops, Latency, Memory, Quality)}
    if not isinstance(data, Mapping) or data.get("budget") not in kinds:
        raise FormatError(f"A budget is an object whose 'budget' is one of {', '.join(kinds)}; got {data!r}.")
    own = {k: v for k, v in data.items() if k != "budget"}
    try:
        if isinstance(own.get("minimise"), Mapping):
            own["minimise"] = from_json({"amount": 0.5, **own["minimise"]})
        found: Budget | Memory | Quality = kinds[data["budget"]](**own)
    except (TypeError, BudgetError) as error:
        raise FormatError(f"{data!r} is no valid budget: {error}") from error
    return found
