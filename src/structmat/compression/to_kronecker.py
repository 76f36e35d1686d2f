"""Trained models into Kronecker multi-layer networks: nearest sums of products, then an activation inside."""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structmat.compression.calibrate import calibrate
from structmat.compression.plan import Plan
from structmat.compression.replace import Replaced, replace_layers
from structmat.compression.running import Forward, call, evaluating, input_of, outcome
from structmat.compression.scan import Scan, scan
from structmat.errors import DataError, ModelError, StructureError
from structmat.nn.kronecker.activation import Activation, Slopes
from structmat.nn.kronecker.block import KroneckerBlock
from structmat.nn.kronecker.perturbation import Perturbation, perturbation
from structmat.nn.kronecker.shape import Bias
from structmat.nn.linear import StructuredLinear
from structmat.projection.project import DEFAULT_SWEEPS
from structmat.structure import Structure, count_parameters, resolve
from structmat.structures.dense import Dense
from structmat.structures.kronecker import Kronecker

Model = TypeVar("Model", bound=nn.Module)


class Start(enum.Enum):
    """What stands between the factors of converted layers at the start.

    ``LINEAR``: nothing; the layers stay linear sums of Kronecker products. ``SLOPES``: a rectifier whose slopes are
    learned from 1, one a term: the same function at the start. ``ANNEALED``: the same, but the slopes are not learned:
    :func:`structmat.nn.kronecker.set_slopes` moves them to 0 while one trains. ``SHIFT``: ReLU with biases so large
    that it does nothing on the calibration data. ``RELU``: ReLU at once.
    """

    LINEAR = "linear"
    SLOPES = "slopes"
    ANNEALED = "annealed"
    SHIFT = "shift"
    RELU = "relu"


_INNER: Mapping[Start, Activation] = {
    Start.SLOPES: Slopes(),
    Start.ANNEALED: Slopes(learned=False),
    Start.SHIFT: torch.relu,
    Start.RELU: torch.relu,
}


@dataclass(frozen=True)
class Converted:
    """One layer of a conversion.

    Args:
        fit: its nearest sum of Kronecker products, with errors and certificate.
        before, after: learned numbers, biases too.
    """

    fit: Replaced
    before: int
    after: int


@dataclass(frozen=True)
class Conversion(Generic[Model]):
    """What :func:`to_kronecker` returns.

    Args:
        model: the converted copy.
        start: what stands between the factors.
        layers: by name.
        error: relative distance of its outputs from the original ones on the calibration data, before any training.
        bound: what the perturbation theorem allows, for multi-layer perceptrons that start linear; otherwise None.
    """

    model: Model
    start: Start
    layers: Mapping[str, Converted]
    error: float
    bound: float | None

    def __str__(self) -> str:
        lines = [f"{'layer':<24} {'structure':<44} {'before':>10} {'after':>8} {'error':>7}"]
        for name, layer in self.layers.items():
            lines.append(
                f"{name:<24} {layer.fit.structure!s:<44} {layer.before:>10} {layer.after:>8} {layer.fit.error:>7.4f}"
            )
        bound = "no bound for this model" if self.bound is None else f"at most {self.bound:.4g} by the theorem"
        lines.append(f"start: {self.start.value}; relative error of the outputs {self.error:.4g}, {bound}")
        return "\n".join(lines)


def to_kronecker(
    model: Model,
    *,
    calibration: Iterable[Any],
    terms: int | float = 0.25,
    structure: Kronecker | None = None,
    overrides: Mapping[str, Structure] | None = None,
    start: Start | str = Start.SLOPES,
    bias: Bias | str = Bias.AXIS,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    forward: Forward | None = None,
    sweeps: int = DEFAULT_SWEEPS,
    seed: int = 0,
    progress: bool = False,
) -> Conversion[Model]:
    """A trained model with Kronecker blocks in place of its linear layers, ready to be fine-tuned.

    Each layer becomes the nearest sum of Kronecker products in the norm of its inputs, fitted behind the layers before
    it; then an activation is put between the factors that at the start changes nothing (or, with ``Start.RELU``, does).
    What training makes of it decides: :func:`structmat.nn.kronecker.absorb_` turns blocks whose slopes stayed near 1
    into linear layers again.

    Args:
        model: any module with ``nn.Linear`` layers; it is not modified.
        calibration: batches that can be read again: tensors, tuples ``(inputs, labels)`` or dicts.
        terms: of each layer: a number, or a fraction of the dense parameters.
        structure: instead of ``terms``, with sizes of factors.
        overrides: name of a layer to its structure: a :class:`Kronecker`, or ``Dense()`` to keep it.
        start: see :class:`Start`.
        bias: of the blocks; ``Start.SHIFT`` needs "full".
        include, exclude: glob patterns on names, as for :func:`structmat.compress`.
        forward: ``forward(model, batch)``, if a batch is none of the usual.
        sweeps, seed: of the fits.
        progress: show progress on stderr.

    Raises:
        ModelError: nothing to convert, or an override names no layer.
        StructureError: an override of another family.
        DataError: no calibration data.
    """
    start = Start(start)
    family = structure or Kronecker(terms)
    batches = list(calibration)
    if not batches:
        raise DataError("There is no calibration data: the loader is empty. Give at least one batch.")
    found = _linear(scan(model, include, exclude), model)
    wanted = _structures(found.sites, family, overrides or {})
    plan = Plan(wanted, {s.name: s.shape for s in found.sites}, None, seed)
    seen = calibrate(model, found.sites, batches, forward=forward, gradients=False, seed=seed, progress=progress)
    changed = copy.deepcopy(model)
    fits = replace_layers(
        changed,
        plan,
        calibration=seen,
        original=model,
        loader=batches,
        forward=forward,
        sweeps=sweeps,
        seed=seed,
        progress=progress,
    )
    before = {s.name: s.shape[0] * s.shape[1] + (s.shape[0] if s.bias else 0) for s in found.sites}
    limit = _bound(model, changed, batches, forward) if start is not Start.RELU else None
    activate_(changed, start, calibration=batches, bias=bias, forward=forward, names=[f.name for f in fits])
    layers = {
        fit.name: Converted(fit, before[fit.name], sum(p.numel() for p in changed.get_submodule(fit.name).parameters()))
        for fit in fits
    }
    return Conversion(changed, start, layers, _error(model, changed, batches, forward), limit)


def activate_(
    model: nn.Module,
    start: Start | str = Start.SLOPES,
    *,
    calibration: Iterable[Any] = (),
    bias: Bias | str = Bias.AXIS,
    forward: Forward | None = None,
    names: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Turn linear layers that are sums of Kronecker products into Kronecker blocks, in place.

    For models that :func:`structmat.compress` made: ``activate_(result.model)``, then train.

    Args:
        model: with layers of the family :class:`Kronecker`.
        start: what to put between the factors, see :class:`Start`.
        calibration: needed by ``Start.SHIFT`` alone.
        bias: of the blocks; biases inside start at 0.
        forward: as for :func:`to_kronecker`.
        names: of the layers; all of the family if not given.

    Returns:
        The names of the layers that became blocks.

    Raises:
        ModelError: no layer is of the family.
        DataError: ``Start.SHIFT`` without calibration data.
    """
    start = Start(start)
    held = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear)
        and isinstance(module.structure, Kronecker)
        and (names is None or name in names)
    }
    if not held:
        raise ModelError("The model has no layer that is a sum of Kronecker products. Convert it with to_kronecker.")
    if start is Start.LINEAR:
        return ()
    chosen = Bias.FULL if start is Start.SHIFT else Bias(bias)
    blocks = {
        name: KroneckerBlock.from_structured(layer, inner=_INNER[start], bias=chosen) for name, layer in held.items()
    }
    if start is Start.SHIFT:
        _shift(model, held, blocks, calibration, forward)
    for name, block in blocks.items():
        model.set_submodule(name, block)
    return tuple(blocks)


def _linear(found: Scan, model: nn.Module) -> Scan:
    """The linear layers of a scan: those that follow one another, not parts of recurrent nets or of attention."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sites = tuple(site for site in found.sites if site.name in linear or site.kind == "Conv1D")
    if not sites:
        raise ModelError(f"{type(model).__name__} has no linear layer to convert: give a model with nn.Linear layers.")
    return replace(found, sites=sites)


def _structures(sites: Sequence[Any], family: Kronecker, overrides: Mapping[str, Structure]) -> dict[str, Structure]:
    names = {site.name for site in sites}
    for name, structure in overrides.items():
        if name not in names:
            raise ModelError(f"overrides names the layer {name!r}; the layers are {', '.join(sorted(names))}.")
        if not isinstance(structure, Kronecker | Dense):
            raise StructureError(f"overrides[{name!r}] is {structure}; a conversion knows Kronecker and Dense.")
    made: dict[str, Structure] = {}
    for site in sites:
        one = resolve(overrides.get(site.name, family), site.shape)
        # A sum that is no smaller than the matrix is the matrix, at more operations.
        made[site.name] = one if count_parameters(one, site.shape) < site.shape[0] * site.shape[1] else Dense()
    return made


@torch.no_grad()
def _shift(
    model: nn.Module,
    layers: Mapping[str, StructuredLinear],
    blocks: Mapping[str, KroneckerBlock],
    calibration: Iterable[Any],
    forward: Forward | None,
) -> None:
    """Biases with which ReLU does nothing on the calibration data: at least minus the least value that it meets."""
    least: dict[tuple[str, int], Tensor] = {}

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            # Without its activations the block is linear: see what each of them would meet.
            for gap, rows in linear_hidden(blocks[name], input_of(args, named)):
                low = rows.reshape(-1, gap.numel).amin(0)
                key = (name, gap.place)
                least[key] = torch.minimum(least[key], low) if key in least else low

        return look

    handles: list[RemovableHandle] = [
        layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with evaluating(model):
            for batch in calibration:
                call(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    for name, block in blocks.items():
        (chain,) = block.chains
        tensors: dict[str, Tensor] = dict(chain.named_parameters())
        # What the biases alone make of every sample, as long as no activation does anything.
        constant = block.factors()[0].new_zeros(block.in_features)
        for gap, program in zip(chain.layout.active, chain.programs, strict=False):
            if (name, gap.place) not in least:
                raise DataError(f"The bias shift needs calibration data; layer {name} saw none.")
            constant = chain.stage(program, tensors, constant, None)
            shift = (-least[name, gap.place] - constant).clamp(min=0)
            own = chain.get_parameter(f"bias{gap.place}")
            own.copy_(shift.reshape(own.shape))
            constant = constant + shift
        assert block.bias is not None
        block.bias.sub_(chain.stage(chain.programs[-1], tensors, constant, None))


def linear_hidden(block: KroneckerBlock, x: Tensor) -> list[tuple[Any, Tensor]]:
    """What would arrive at each activation of a block of one order if none of them did anything."""
    (chain,) = block.chains
    tensors: dict[str, Tensor] = dict(chain.named_parameters())
    found = []
    for gap, program in zip(chain.layout.active, chain.programs, strict=False):
        x = chain.stage(program, tensors, x, None)
        found.append((gap, x))
    return found


@torch.no_grad()
def _error(model: nn.Module, changed: nn.Module, batches: Sequence[Any], forward: Forward | None) -> float:
    squares = [0.0, 0.0]
    with evaluating(model), evaluating(changed):
        for batch in batches:
            a, b = (outcome(call(m, batch, forward), batch).values.double() for m in (model, changed))
            squares[0] += float((b - a).square().sum())
            squares[1] += float(a.square().sum())
    return float((squares[0] / max(squares[1], 1e-300)) ** 0.5)


def _bound(model: nn.Module, changed: nn.Module, batches: Sequence[Any], forward: Forward | None) -> float | None:
    """The theorem's bound over all batches; None for what is no multi-layer perceptron of known activations."""
    if forward is not None or not isinstance(model, nn.Sequential) or not isinstance(changed, nn.Sequential):
        return None
    found: list[Perturbation] = []
    for batch in batches:
        x = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, tuple | list) else None
        if x is None or x.dim() != 2:
            return None
        try:
            found.append(perturbation(model, changed, x))
        except ModelError:
            return None
    bound = torch.cat([p.bound for p in found]).norm()
    return float(bound / torch.cat([p.size for p in found]).norm())
