"""What is measured of a compressed model: its size, its operations, its time, its bytes."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.compress_methods import PRUNED, PRUNINGS, SMALL, as_sparse, numbers
from benchmarks.real_data import RealModel


def deployed(method: str, model: nn.Module) -> nn.Module:
    """The model in the form in which it is stored and run."""
    return as_sparse(model) if method in PRUNINGS else model


def sizes(method: str, real: RealModel, original: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Numbers and operations for a sample, of the compressible layers, and numbers of the whole model. Of a pruned
    model the weights that are not zero count and their places do not."""
    from structmat.compression.calibrate import calibrate
    from structmat.compression.layers import layer_named, structured_layer_of
    from structmat.compression.scan import scan
    from structmat.compression.split import split_apart
    from structmat.structure import count_stored
    from structmat.structures.dense import Dense
    from structmat.structures.sparse import Sparse

    whole = sum(p.numel() for p in original.parameters())
    if method == SMALL:
        before, after = numbers(original), numbers(model)
        found = {"original": {"parameters": before}, "compressed": {"parameters": after}}
        return {
            "compressible": found,
            "model_parameters": {"original": whole, "compressed": sum(p.numel() for p in model.parameters())},
        }
    sites = scan(original).sites
    names = [site.name for site in sites]
    totals = {which: {"parameters": 0.0, "flops": 0.0} for which in ("original", "compressed")}
    with split_apart(original, names), split_apart(model, names):
        seen = calibrate(original, sites, real.calibration(0)[:1], forward=real.forward, gradients=False)
        for site in sites:
            module, adapter = model.get_submodule(site.name), structured_layer_of(model.get_submodule(site.name))
            structure = Dense() if adapter is None else adapter.content(module).structure
            for which, chosen in (("original", Dense()), ("compressed", structure)):
                stored = chosen.nonzeros if isinstance(chosen, Sparse) and method == PRUNED else None
                count = count_stored(chosen, site.shape) if stored is None else stored
                totals[which]["parameters"] += site.copies * count
                load = seen.load(site.name)
                totals[which]["flops"] += layer_named(site.kind).flops(site, chosen, load)
    saved = totals["original"]["parameters"] - totals["compressed"]["parameters"]
    return {"compressible": totals, "model_parameters": {"original": whole, "compressed": whole - saved}}


def milliseconds(real: RealModel, original: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Medians of both models, run in turns in this process, and their ratio; the compressed one is frozen."""
    import structmat as sm
    from structmat.compression.timing import time_models

    found = {}
    for size in real.batches:
        frozen = sm.freeze(model, rows=size * real.rows)
        (timing,) = time_models(original, frozen, {size: real.sample(size)}, forward=real.forward, seconds=3.0)
        found[str(size)] = {"original": timing.before, "compressed": timing.after, "ratio": timing.ratio}
    return found


def tuned_milliseconds(real: RealModel, original: nn.Module, model: nn.Module) -> dict[str, Any]:
    """The same after ``sm.tune`` on an example of the size that is timed: for deployment at that size."""
    import structmat as sm
    from structmat.compression.timing import time_models

    found = {}
    for size in real.batches:
        example, rows = real.sample(size), size * real.rows
        frozen = sm.freeze(model, rows=rows)
        sm.tune(frozen, (rows,), allow_dense=True, example=example, forward=real.forward)
        (timing,) = time_models(original, frozen, {size: example}, forward=real.forward, seconds=3.0)
        found[str(size)] = {"original": timing.before, "compressed": timing.after, "ratio": timing.ratio}
    return found


def disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())


def peak() -> int:
    """Megabytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
