"""Which structure does a matrix have?"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from structmat.compression.candidates import Choice, families_of
from structmat.compression.identify import identify
from structmat.compression.traits import Measures, Trait
from structmat.errors import ShapeError, StructureError
from structmat.projection.project import make_target, project_target
from structmat.projection.target import Certificate, Target
from structmat.structure import Shape, Structure, count_stored, resolve, to_json
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of the dense parameter count at which each family is tried."""

_EXACT = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 3e-6, torch.complex64: 3e-6}
_EXACT_IN_HALF_PRECISION = 4e-3
"""Relative errors up to these are the rounding of the matrix itself."""

_MOST_SIZES = 64
"""How many smaller sizes of an exact structure are tried for each of its integers."""


@dataclass(frozen=True)
class Finding:
    """One structure that was tried.

    Args:
        structure: resolved for the shape.
        numbers: what it stores, indices too.
        error: relative, in the norm of the inspection.
        lower_bound: no member of the structure has a smaller relative error.
        certificate: ``"optimal"``, ``"bound"`` or ``"none"``.
        is_exact: whether the error is no more than the rounding of the matrix.
    """

    structure: Structure
    numbers: int
    error: float
    lower_bound: float
    certificate: str
    is_exact: bool

    @property
    def family(self) -> str:
        return type(self.structure).__name__


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found. ``print`` shows a table; :meth:`plot` draws it.

    Args:
        shape: of the matrix.
        norm: ``"Frobenius"`` or ``"activation-weighted"``.
        shares: of the dense parameter count, at which families were tried.
        findings: by family and rising size.
        refused: families that could not be tried, with the reason.
        traits: what the matrix is, exactly or nearly, by name; exact ones first, then by size. None on noise, or where
            only certain structures were asked for.
        measures: ranks, density, bandwidth and distances; None where only certain structures were asked for.
        weight: the matrix, for pictures.
    """

    shape: Shape
    norm: str
    shares: tuple[float, ...]
    findings: tuple[Finding, ...]
    refused: Mapping[str, str]
    traits: tuple[Trait, ...] = ()
    measures: Measures | None = None
    weight: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def dense(self) -> int:
        """Numbers of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def exact(self) -> tuple[Finding, ...]:
        """Structures smaller than dense that the matrix has exactly, smallest first; one a family."""
        found: dict[str, Finding] = {}
        for finding in sorted(self.findings, key=lambda f: f.numbers):
            if finding.is_exact and finding.numbers < self.dense:
                found.setdefault(finding.family, finding)
        return tuple(found.values())

    def best(self, share: float) -> Finding | None:
        """The smallest error within a share of the dense parameter count, the smaller structure if errors tie."""
        within = [f for f in self.findings if f.numbers <= share * self.dense]
        return min(within, key=lambda f: (0.0 if f.is_exact else f.error, f.numbers), default=None)

    @property
    def verdict(self) -> str:
        """The answer in a sentence."""
        if self.exact:
            first, *others = self.exact
            if self.traits and self.traits[0].numbers < first.numbers:
                trait = self.traits[0]
                also = f" (also exactly {first.structure}, {first.numbers:,} numbers)"
                return (
                    f"This matrix is {trait.name}, relative error {trait.error:.1g}: {trait.numbers:,} numbers{also}."
                )
            also = f" (it is also {' and '.join(str(f.structure) for f in others[:3])})" if others else ""
            return (
                f"This matrix is exactly {first.structure}: {first.numbers:,} numbers instead of {self.dense:,}, "
                f"{first.numbers / self.dense:.1%}{also}."
            )
        if self.traits:
            trait = self.traits[0]
            return f"This matrix is {trait.name}, relative error {trait.error:.1g}: {trait.numbers:,} numbers."
        half = self.best(0.5)
        if half is None:
            return "No structure tried fits into half of the dense parameters."
        return (
            f"It has no structure exactly. Nearest within half of the parameters is {half.structure}, "
            f"relative error {half.error:.3g}."
        )

    def table(self) -> Table:
        """Relative error of every family within each share of the dense parameters."""
        rows, columns = self.shape
        table = Table(title=f"{rows} x {columns}: relative error ({self.norm} norm) within a share of the parameters")
        table.add_column("family")
        for share in self.shares:
            table.add_column(f"{share:.1%}" if share < 0.1 else f"{share:.0%}", justify="right")
        table.add_column("exact from", justify="right")
        smallest = {f.family: f for f in self.exact}
        names = dict.fromkeys(f.family for f in self.findings)
        winners = [self.best(share) for share in self.shares]
        for name in sorted(names, key=lambda n: (n not in smallest, self._rank(n))):
            cells = []
            for share, winner in zip(self.shares, winners, strict=True):
                own = [f for f in self.findings if f.family == name and f.numbers <= share * self.dense]
                least = min(own, key=lambda f: f.error, default=None)
                if least is None:
                    cells.append(Text("-", style="dim"))
                else:
                    won = winner is not None and winner.family == name
                    text = "exact" if least.is_exact else f"{least.error:.4f}"
                    cells.append(Text(text, style="bold green" if won else ""))
            found = smallest.get(name)
            table.add_row(name, *cells, str(found.structure) if found else "")
        return table

    def _rank(self, family: str) -> float:
        return min(f.error for f in self.findings if f.family == family)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        if self.measures is not None:
            yield Text(self.measures.sentence)
        yield self.verdict
        for trait in self.traits[1:]:
            yield Text(f"It is also {trait.name}, relative error {trait.error:.1g}, {trait.numbers:,} numbers.")
        for name, reason in self.refused.items():
            yield Text(f"{name} was not tried: {reason}", style="dim")

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "shape": list(self.shape),
            "norm": self.norm,
            "verdict": self.verdict,
            "traits": [{"name": t.name, "error": t.error, "numbers": t.numbers} for t in self.traits],
            "measures": None if self.measures is None else dataclasses.asdict(self.measures),
            "exact": [to_json(f.structure) for f in self.exact],
            "findings": [
                {
                    "structure": to_json(f.structure),
                    "numbers": f.numbers,
                    "share": f.numbers / self.dense,
                    "error": f.error,
                    "lower_bound": f.lower_bound,
                    "certificate": f.certificate,
                    "exact": f.is_exact,
                }
                for f in self.findings
            ],
            "refused": dict(self.refused),
        }

    def plot(self, axes: Any = None) -> Any:
        """Draw error against parameters, a line for each family. Needs matplotlib (``pip install structmat[plot]``).

        Args:
            axes: of matplotlib; a new figure's by default.

        Returns:
            The axes.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
        for name in dict.fromkeys(f.family for f in self.findings):
            own = sorted((f for f in self.findings if f.family == name), key=lambda f: f.numbers)
            floor = 1e-8  # exact ones lie at the bottom of the logarithmic axis
            axes.plot(
                [f.numbers / self.dense for f in own], [max(f.error, floor) for f in own], marker="o", ms=3, label=name
            )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="share of the dense parameters",
            ylabel="relative error",
            title=f"{self.shape[0]} x {self.shape[1]}, {self.norm} norm",
        )
        axes.legend(fontsize="small", ncols=2)
        return axes

    def picture(self, axes: Any = None) -> Any:
        """Draw the sizes of the entries, in the order that shows the first trait. Needs matplotlib.

        Args:
            axes: of matplotlib; a new figure's by default.

        Returns:
            The axes.

        Raises:
            StructureError: the inspection was made without the matrix.
        """
        if self.weight is None:
            raise StructureError("This inspection does not hold its matrix. Use the one that inspect(matrix) returns.")
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(5, 5), layout="constrained").subplots()
        shown = self.weight.abs()
        trait = self.traits[0] if self.traits else None
        if trait is not None:
            shown = shown if trait.rows is None else shown[trait.rows]
            shown = shown if trait.columns is None else shown[:, trait.columns]
        axes.imshow(shown.numpy(), cmap="viridis", interpolation="nearest")
        axes.set(title=trait.name if trait is not None else "no structure", xlabel="input", ylabel="output")
        return axes


def inspect(
    matrix: Tensor,
    second_moment: Tensor | None = None,
    *,
    structures: Sequence[Choice] | None = None,
    shares: Sequence[float] = SHARES,
    sweeps: int = 0,
    seed: int = 0,
) -> Inspection:
    """Which structure does this matrix have? Error against parameters for every family.

    Each family is tried at its configurations within each share of the dense parameter count. Where it fits exactly,
    smaller sizes are tried until the smallest exact one is found. Without a choice of structures and without weights
    the matrix is also measured and named: by support, ranks, displacement ranks, Kronecker products, butterfly and
    Monarch matrices as given, in the usual orders and with rows and columns shuffled, the classical transforms with
    rows or columns reordered and scaled, nodes, recurrences, and structure plus low rank
    (:mod:`structmat.compression.identify`).

    Args:
        matrix: (out_features, in_features), real or complex.
        second_moment: (in_features, in_features) of the inputs, to weigh errors by what reaches the output.
        structures: families (names or classes) or single structures; all families by default.
        shares: of the dense parameter count, between 0 and 1.
        sweeps: 0 screens by closed forms and cheap starts; 20 lets iterative families (BLAST, sums) fit in full.
        seed: for fits with random starts.

    Raises:
        DataError: the matrix has NaN or infinite entries.
        ShapeError: the matrix has not two axes.
        StructureError: a share is not between 0 and 1, or a family is unknown.
    """
    for share in shares:
        if not 0 < share < 1:
            raise StructureError(f"shares={tuple(shares)!r}: each lies strictly between 0 and 1.")
    target = make_target(matrix, second_moment, sweeps=sweeps, seed=seed)
    tolerance = _EXACT.get(matrix.dtype, _EXACT_IN_HALF_PRECISION)
    worker = _Worker(target, tolerance)
    for structure in structures or ():
        if isinstance(structure, Structure):
            worker.refuse_or_try(structure)
    for kind in families_of(structures):
        if kind is Dense:
            continue
        worker.try_family(kind, tuple(shares))
    order = sorted(worker.found.values(), key=lambda f: (f.family, f.numbers, f.error))
    norm = "Frobenius" if second_moment is None else "activation-weighted"
    measures, traits = (
        (None, ()) if structures is not None or second_moment is not None else identify(target, tolerance)
    )
    return Inspection(target.shape, norm, tuple(shares), tuple(order), worker.refused, traits, measures, target.weight)


class _Worker:
    def __init__(self, target: Target, tolerance: float) -> None:
        self.target, self.tolerance = target, tolerance
        self.found: dict[Structure, Finding] = {}
        self.refused: dict[str, str] = {}

    def refuse_or_try(self, structure: Structure) -> Finding | None:
        try:
            return self.try_one(structure)
        except ShapeError as error:
            self.refused.setdefault(type(structure).__name__, str(error))
            return None

    def try_one(self, structure: Structure) -> Finding:
        structure = resolve(structure, self.target.shape)
        if structure not in self.found:
            result = project_target(
                self.target, structure, dtype=self.target.weight.dtype, device=self.target.weight.device
            )
            self.found[structure] = Finding(
                structure,
                count_stored(structure, self.target.shape),
                result.error,
                result.lower_bound,
                result.certificate.value,
                result.error <= self.tolerance,
            )
        return self.found[structure]

    def try_family(self, kind: type[Structure], shares: tuple[float, ...]) -> None:
        size = self.target.shape[0] * self.target.shape[1]
        exact: list[Finding] = []
        last: Finding | None = None
        for share in sorted(shares):
            for structure in kind.configurations(self.target.shape, int(share * size)):
                finding = self.refuse_or_try(structure)
                if finding is not None:
                    last = finding
                    if finding.is_exact:
                        exact.append(finding)
            if exact:
                break  # larger members of the family are exact too
        if not exact and last is not None and last.certificate != Certificate.NONE.value:
            # Configurations keep to sizes that run fast; what the matrix has may lie between them.
            self.shrink(last)
        if exact:
            self.shrink(min(exact, key=lambda f: f.numbers))

    def shrink(self, finding: Finding) -> None:
        """Try smaller sizes of a structure, integer by integer, and go on from the smallest exact one."""
        for field in dataclasses.fields(finding.structure):  # type: ignore[arg-type]
            value = getattr(finding.structure, field.name)
            if isinstance(value, int) and not isinstance(value, bool):
                for smaller in self.smaller(finding, field.name, value):
                    tried = self.refuse_or_try(smaller)
                    if tried is not None and tried.is_exact:
                        finding = tried
                        break

    def smaller(self, finding: Finding, name: str, value: int) -> Iterator[Structure]:
        """The same structure with another integer that stores fewer numbers, smallest first."""
        values = {*range(1, min(_MOST_SIZES, 2 * max(self.target.shape)) + 1), *range(max(1, value - 16), value)}
        sized = []
        for other in values - {value}:
            try:
                changed: Structure = dataclasses.replace(finding.structure, **{name: other})  # type: ignore[type-var]
                numbers = count_stored(resolve(changed, self.target.shape), self.target.shape)
            except (ShapeError, StructureError):
                continue
            if numbers < finding.numbers:
                sized.append((numbers, other, changed))
        for _, _, changed in sorted(sized, key=lambda entry: entry[:2])[-_MOST_SIZES:]:
            yield changed
