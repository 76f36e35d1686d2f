"""What the study of trained models compares: our way, and every baseline at the same number of parameters."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.real_data import RealModel

OURS, LOW_RANK, PRUNED, SMALL, DENSE = (
    "ours",
    "low rank, allocated",
    "magnitude pruning",
    "smaller dense network",
    "dense",
)
TUCKER = "Tucker-2, uniform"
COUNTED = "magnitude pruning, places counted"
PRUNINGS = (PRUNED, COUNTED)

METHODS = {
    OURS: "compress, every family, our allocation",
    LOW_RANK: "compress with low rank alone, our allocation",
    "whitened SVD, uniform": "activation-whitened SVD, one ratio for all layers",
    "SVD, uniform": "truncated SVD of the weights, one ratio for all layers",
    "Monarch, uniform": "Monarch with 4 blocks, one ratio for all layers",
    "BLAST, uniform": "BLAST with 4 blocks, one ratio for all layers",
    TUCKER: "Tucker-2 of the kernels, low rank of linear layers, one ratio for all layers",
    PRUNED: "the smallest weights of all layers together are zero; the places of the others are not counted",
    COUNTED: "the same with as many numbers less as say where the others are (a bit for each place), as ours counts",
    SMALL: "a narrower network of the same kind, distilled from the original from fresh weights",
    DENSE: "the original under the same recovery",
}

FRESH_RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of networks that start from fresh weights."""


def applies(method: str, real: RealModel) -> bool:
    """Whether a method is for a model of this kind."""
    return method not in (TUCKER, COUNTED) or real.convolutional


def rates(method: str, real: RealModel) -> tuple[float, ...]:
    """The learning rates that a method is tried with."""
    return FRESH_RATES if method == SMALL else real.rates


@dataclass(frozen=True)
class Made:
    """A compressed model, and what is known of its making; seconds are of the processor, for each thread."""

    model: nn.Module
    facts: dict[str, Any]


def make(method: str, budget: float, seed: int, real: RealModel, folder: Path) -> Made:
    """The compressed model before recovery.

    Args:
        method: of :data:`METHODS`.
        budget: share of the numbers of the compressible layers.
        seed: of calibration and fits.
        real: what is compressed.
        folder: for the work of ``compress``.
    """
    start = processor_seconds()
    if method == DENSE:
        return Made(real.load(), {"seconds": {"all": 0.0}, "layers": {}})
    if method in (OURS, LOW_RANK):
        made = _compressed(method, budget, seed, real, folder)
    elif method in PRUNINGS:
        made = _pruned(budget, real, counted=method == COUNTED)
    elif method == SMALL:
        torch.manual_seed(seed)
        width = narrow_width(real, budget)
        made = Made(real.narrow(width), {"layers": {}, "width": width})
    else:
        made = _uniform(method, budget, seed, real)
    seconds = {**made.facts.get("seconds", {}), "all": processor_seconds() - start}
    return Made(made.model, {**made.facts, "seconds": seconds})


def skeleton(method: str, budget: float, real: RealModel) -> nn.Module:
    """The module that a saved model of a method is loaded into."""
    return real.narrow(narrow_width(real, budget)) if method == SMALL else real.load()


def processor_seconds() -> float:
    """Of this process, for each of its threads: what a quiet machine would take."""
    return time.process_time() / torch.get_num_threads()


def _compressed(method: str, budget: float, seed: int, real: RealModel, folder: Path) -> Made:
    import structmat as sm

    result = sm.compress(
        real.load(),
        budget=sm.Parameters(budget),
        calibration=real.calibration(seed),
        structures=None if method == OURS else ("LowRank",),
        forward=real.forward,
        seed=seed,
        folder=folder,
        progress=True,
    )
    report = result.report
    chosen = [
        {
            "layer": layer.name,
            "structure": layer.structure,
            "parameters": layer.parameters / layer.dense_parameters,
            "loss": layer.predicted_loss,
        }
        for layer in report.layers
    ]
    return Made(
        result.model,
        {
            "seconds": dict(report.seconds),
            "layers": {layer.name: layer.structure for layer in report.layers},
            "predicted_loss": report.predicted_loss,
            "chosen": chosen,
        },
    )


# ------------------------------------------------------------------------------------------------ one ratio for all


def _uniform(method: str, budget: float, seed: int, real: RealModel) -> Made:
    """One family at one ratio for all layers, fitted on second moments of the inputs, but for those whose literature
    has the weights alone: the plain SVD and Tucker-2."""
    from structmat.compression.calibrate import calibrate
    from structmat.compression.plan import Plan
    from structmat.compression.replace import replace_layers
    from structmat.compression.scan import scan
    from structmat.compression.split import split_apart

    model = real.load()
    sites = scan(model).sites
    seen = None
    if method not in ("SVD, uniform", TUCKER):
        with split_apart(model, [site.name for site in sites]):
            seen = calibrate(model, sites, real.calibration(seed), forward=real.forward, gradients=False, seed=seed)
    shapes = {site.name: site.shape for site in sites}
    plan = Plan({site.name: uniform_structure(method, budget, site) for site in sites}, shapes, seed=seed)
    replace_layers(model, plan, calibration=seen, seed=seed, progress=True)
    return Made(model, {"layers": {name: str(s) for name, s in plan.layers.items()}})


def uniform_structure(method: str, budget: float, site: Any) -> Any:
    """The method's structure for a layer, or dense where even its smallest member holds more than the ratio allows."""
    import structmat as sm
    from structmat.compression.layers import layer_named
    from structmat.errors import ShapeError
    from structmat.structure import resolve

    if method == TUCKER:
        tucker = layer_named(site.kind).forms(site).get("Tucker")
        most = int(budget * site.shape[0] * site.shape[1])
        found = None if tucker is None else next(iter(tucker(most)), None)
        if found is not None:
            return found
    structure = {
        "Monarch, uniform": sm.Monarch(blocks=4, rank=budget),
        "BLAST, uniform": sm.BLAST(blocks=4, rank=budget),
    }.get(method, sm.LowRank(rank=budget))
    try:
        return resolve(structure, site.shape)
    except ShapeError:
        return sm.Dense()


# --------------------------------------------------------------------------------------------------------- pruning


def _pruned(budget: float, real: RealModel, *, counted: bool) -> Made:
    """The largest weights of all compressible layers together; all others are zero.

    Args:
        counted: whether what a sparse layer holds besides its nonzeros is part of the budget.
    """
    model = real.load()
    places = _places(model) if counted else 0
    with compressible(model) as weights:
        sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
        count = int(budget * sizes.numel()) - places
        threshold = float(sizes.kthvalue(sizes.numel() - count).values) if count < sizes.numel() else -1.0
        layers = {}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(weight.abs() > threshold)
                layers[name] = f"{int((weight != 0).sum())} of {weight.numel()} weights"
    return Made(model, {"layers": layers})


def _places(model: nn.Module) -> int:
    """What sparse layers in the places of all compressible ones hold besides their nonzeros."""
    import structmat as sm
    from structmat.compression.scan import scan
    from structmat.structure import count_stored

    total = 0
    for site in scan(model).sites:
        some = site.shape[0] * site.shape[1] // 4  # a bit for each place is less than a number for each of these
        total += site.copies * (count_stored(sm.Sparse(nonzeros=some), site.shape) - some)
    return total


@contextlib.contextmanager
def compressible(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of all layers that compress would take, by name; writing to them changes the model."""
    from structmat.compression.scan import scan
    from structmat.compression.split import split_apart

    names = [site.name for site in scan(model).sites]
    with split_apart(model, names):
        yield {name: model.get_submodule(name).weight for name in names}  # type: ignore[misc]


def as_sparse(model: nn.Module) -> nn.Module:
    """A pruned model whose layers multiply by sparse matrices, as it learns and would be deployed."""
    import copy

    import structmat as sm
    from structmat.compression.plan import Plan
    from structmat.compression.replace import replace_layers
    from structmat.compression.scan import scan

    found = copy.deepcopy(model)
    sites = scan(found).sites
    with compressible(found) as weights:
        counts = {name: int((weight != 0).sum()) for name, weight in weights.items()}
    copies = {site.name: site.copies for site in sites}
    layers = {n: sm.Sparse(nonzeros=max(1, count // copies[n])) for n, count in counts.items()}
    replace_layers(found, Plan(layers, {site.name: site.shape for site in sites}))
    return found


# --------------------------------------------------------------------------------------------------- smaller dense


def numbers(model: nn.Module) -> int:
    """Numbers of all layers that compress would take."""
    from structmat.compression.scan import scan

    return sum(site.numbers for site in scan(model).sites)


FEWEST_UNITS = 4
"""Of a narrower network."""


def narrow_width(real: RealModel, budget: float) -> int:
    """The largest width at which the same kind of network has at most this share of the original's numbers."""
    most = budget * numbers(real.load())
    low, high = 1, real.width
    random = torch.random.get_rng_state()
    while high - low > 1:
        middle = (low + high) // 2
        fits = middle < FEWEST_UNITS or numbers(real.narrow(middle)) <= most
        low, high = (middle, high) if fits else (low, middle)
    torch.random.set_rng_state(random)
    return low
