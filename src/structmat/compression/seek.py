"""The smallest model that is good enough, by few builds: a search along the curve of predicted losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from structmat.compression.budget import Quality
from structmat.errors import BudgetError, DataError

logger = logging.getLogger(__name__)

AIM = 0.9
"""Of the loss that is allowed: predictions err to both sides, and a model that is accepted says more."""


@dataclass(frozen=True)
class Tried:
    """One model that was built and evaluated.

    Args:
        cost: of the compressible layers, in the unit that is made small.
        predicted_loss: the sum over the layers.
        quality: all that ``evaluate`` returned.
        value: the number that counts.
        worse: than the original's, positive where it is.
        accepted: whether it is good enough.
        key: tells equal plans.
    """

    cost: float
    predicted_loss: float
    quality: Mapping[str, float]
    value: float
    worse: float
    accepted: bool
    key: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        own = {k: v for k, v in self.__dict__.items() if k != "key"}
        return {**own, "quality": dict(self.quality)}


@dataclass(frozen=True)
class Size:
    """A choice at one size, before it is built: its cost, its predicted loss and what tells it from others."""

    cost: float
    predicted_loss: float
    key: str


@dataclass(frozen=True)
class Judge:
    """What is good enough.

    Args:
        quality: that is asked for.
        name: of the number that counts.
        before: its value for the original.
        better: "higher" or "lower"; None while it is not known.
    """

    quality: Quality
    name: str
    before: float
    better: str | None

    @property
    def allowed(self) -> float:
        """How much worse than the original's a value may be."""
        asked = self.quality
        if asked.loss is not None:
            return asked.loss * (abs(self.before) if asked.relative else 1.0)
        if asked.at_least is not None:
            return self.before - asked.at_least
        assert asked.at_most is not None
        return asked.at_most - self.before

    def worse(self, value: float) -> float:
        """By how much a value is worse than the original's; a value that is no number is infinitely so."""
        if math.isnan(value):
            return math.inf
        return self.before - value if self.better == "higher" else value - self.before

    def judged(self, size: Size, quality: Mapping[str, float]) -> Tried:
        """A model that was built, judged."""
        value = self.read(quality)
        worse = self.worse(value)
        # A difference of two numbers carries their rounding.
        rounding = 4e-16 * max(abs(value), abs(self.before)) if math.isfinite(value) else 0.0
        return Tried(size.cost, size.predicted_loss, quality, value, worse, worse <= self.allowed + rounding, size.key)

    def read(self, quality: Mapping[str, float]) -> float:
        """The number that counts."""
        if self.name not in quality:
            raise DataError(f"evaluate returned {', '.join(quality)} for a compressed model, and not {self.name}.")
        return quality[self.name]

    def directed(self, value: float) -> Judge:
        """With the direction that the value of the smallest model shows, or checked by it.

        Raises:
            DataError: the value contradicts ``better``.
        """
        if self.quality.loss is None:
            return self
        change = value - self.before
        if self.better is None:
            # Within the allowance either direction accepts it.
            return replace(self, better="higher" if change < 0 or math.isnan(change) else "lower")
        gained = change if self.better == "higher" else -change
        if gained > self.allowed and gained > 1e-9 * abs(self.before):
            other = "lower" if self.better == "higher" else "higher"
            raise DataError(
                f"The smallest model has {self.name} {value:.6g} and the original {self.before:.6g}, which better="
                f"{self.better!r} takes for a gain of {gained:.6g}. Say better={other!r} if that is a loss."
            )
        return self


def judge_of(quality: Quality, before: Mapping[str, float]) -> Judge:
    """The judge of a quality, from what ``evaluate`` returned for the original.

    Raises:
        BudgetError: it is not clear which number counts, the original itself is not good enough, or the loss is
            relative to 0.
    """
    name = quality.of
    if name is None:
        if len(before) != 1:
            raise BudgetError(
                f"evaluate returns {len(before)} numbers ({', '.join(before)}). Say which one counts: "
                f"Quality(of={next(iter(before), '')!r}, ...)."
            )
        name = next(iter(before))
    if name not in before:
        raise BudgetError(f"Quality(of={name!r}): evaluate returns {', '.join(before)}.")
    value = before[name]
    if not math.isfinite(value):
        raise BudgetError(f"The original has {name} {value}: nothing can be compared with it.")
    if quality.relative and value == 0.0:
        raise BudgetError(f"The original has {name} 0: no share of it can be lost. Leave out relative=True.")
    better: str | None = quality.better
    if quality.loss is None:
        better = "higher" if quality.at_least is not None else "lower"
    judge = Judge(quality, name, value, better)
    if judge.allowed < 0:
        bound = f"at_least={quality.at_least}" if quality.at_least is not None else f"at_most={quality.at_most}"
        raise BudgetError(f"The original itself has {name} {value:.6g}, which Quality({bound}) does not accept.")
    return judge


def seek(
    judge: Judge,
    curve: Sequence[tuple[float, float]],
    size: Callable[[float], Size],
    attempt: Callable[[Size], Mapping[str, float]],
    tried: list[Tried],
    *,
    dense_is_allowed: bool = True,
) -> tuple[Judge, float]:
    """Search the least cost whose model is accepted.

    The smallest model comes first: it shows which direction is worse. Then the range between a model that is accepted
    (the original at first) and one that is not is narrowed down. Where to try next is read off the predicted losses:
    what is measured is taken for a power of what is predicted, between the two ends; every third try halves the range
    of the logarithms instead, so that the search ends whatever the predictions are worth.

    Args:
        judge: what is accepted.
        curve: (cost, predicted loss) by rising cost, from the smallest choice to the richest.
        size: the choice within a cost.
        attempt: build and evaluate a choice.
        tried: an empty list, which gets all that is tried, in order.
        dense_is_allowed: whether the original would keep all other limits; else the richest choice is tried, too.

    Returns:
        The judge with the direction, and the cost to choose within: that of the smallest accepted model, or of the
        original where none is.

    Raises:
        BudgetError: other limits are such that not even the richest choice is accepted.
        DataError: the direction is contradicted.
    """
    least, most = curve[0][0], curve[-1][0]

    def go(within: float) -> Tried:
        nonlocal judge
        chosen = size(within)
        known = next((t for t in tried if t.key == chosen.key), None)
        if known is not None:
            return known
        quality = attempt(chosen)
        if not tried:
            judge = judge.directed(judge.read(quality))
        tried.append(judge.judged(chosen, quality))
        logger.info("cost %.6g: %s %.6g, accepted: %s", chosen.cost, judge.name, tried[-1].value, tried[-1].accepted)
        return tried[-1]

    low = go(least)
    if low.accepted:
        return judge, low.cost
    low_cost, high_cost, high = low.cost, most, None
    if not dense_is_allowed:
        high = go(most)
        if not high.accepted:
            raise BudgetError(
                f"The largest model within the other budgets has {judge.name} {high.value:.6g}, worse than what is "
                f"accepted (the original has {judge.before:.6g}). Allow more in one of them."
            )
        high_cost = high.cost
    bisect = True  # what is predicted for the smallest model of all says nothing about others
    while len(tried) < judge.quality.tries and high_cost > low_cost * (1 + judge.quality.precision):
        middle = math.sqrt(low_cost * high_cost)
        guess = middle if bisect else _guess(judge.allowed, curve, low, high) or middle
        margin = (high_cost / low_cost) ** 0.1
        within = min(max(guess, low_cost * margin), high_cost / margin)
        count = len(tried)
        found = go(within)
        # Sizes lie on a grid: where the choice is one that was tried, everything up to here is known.
        bisect = len(tried) == count or len(tried) % 3 == 0
        if found.accepted:
            high, high_cost = found, found.cost
        else:
            low, low_cost = found, max(within, found.cost)
    return judge, high_cost


def _guess(allowed: float, curve: Sequence[tuple[float, float]], low: Tried, high: Tried | None) -> float:
    """The cost at which predictions, put right by what was measured, lose what is allowed; 0 if they say nothing."""
    aim = AIM * allowed
    if not (aim > 0 and math.isfinite(low.worse) and low.predicted_loss > 0):
        return 0.0
    power = 1.0
    if high is not None and 0 < high.worse < low.worse and 0 < high.predicted_loss < low.predicted_loss:
        power = math.log(low.predicted_loss / high.predicted_loss) / math.log(low.worse / high.worse)
        power = min(max(power, 0.2), 5.0)
    wanted = low.predicted_loss * (aim / low.worse) ** power
    return next((cost for cost, loss in curve if loss <= wanted), curve[-1][0])
