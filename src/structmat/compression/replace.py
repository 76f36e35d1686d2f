"""Applying a plan: the final fits, put in the places of the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from structmat.compression.budget import flops
from structmat.compression.calibrate import Calibration
from structmat.compression.plan import Plan
from structmat.compression.progress import Progress
from structmat.compression.running import Forward
from structmat.compression.scan import Site, dense_weight, kind_of, parent_and_child
from structmat.compression.screen import layer_target, norm_name
from structmat.compression.sequential import Prefix, corrected, prefix_moments
from structmat.compression.workfolder import WorkFolder, digest
from structmat.errors import ModelError
from structmat.matrix import StructuredMatrix
from structmat.nn.linear import StructuredLinear
from structmat.projection.project import DEFAULT_SWEEPS, project_target
from structmat.structure import Structure, count_stored
from structmat.structure import to_json as structure_to_json

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Replaced:
    """One layer's final fit; errors as in :class:`structmat.projection.project.Projection`."""

    name: str
    structure: Structure
    parameters: int
    flops: int
    error: float
    lower_bound: float
    certificate: str
    method: str
    norm: str


def replace_layers(
    model: nn.Module,
    plan: Plan,
    *,
    calibration: Calibration | None = None,
    original: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    forward: Forward | None = None,
    sweeps: int = DEFAULT_SWEEPS,
    seed: int = 0,
    folder: WorkFolder | None = None,
    key: str = "",
    progress: bool = False,
) -> tuple[Replaced, ...]:
    """Fit the planned structures and put them into a model, in place. Layers that are kept are not touched.

    Biases, dtype, device, mode and whether gradients are required stay as they were. Fits happen in float64.

    Args:
        model: its layers are exchanged.
        plan: names and structures.
        calibration: moments that weigh the fits; without them, errors are those of the weights.
        original: the same model as another object, which stays as it is. Then each layer is fitted behind the layers
            that are replaced before it (in the order of calls): on the inputs that it will see, for the outputs that it
            used to have (see :mod:`structmat.compression.sequential`). Both models run over a part of the data for
            every group of layers that read the same input. Needs ``calibration`` and ``loader``.
        loader, forward: as for :func:`structmat.compression.calibrate.calibrate`.
        sweeps: that an iterative fit may spend.
        seed: of fits with random starts.
        folder, key: where finished fits are kept, and the digest of what all of them depend on.
        progress: show a progress bar on stderr.

    Raises:
        ModelError: a layer of the plan is missing in the model, has another shape or is not linear.
    """
    folder = folder or WorkFolder(None)
    sites = {name: _site(model, name, plan) for name in plan.changed}
    moments = dict(calibration.moments) if calibration is not None else {}
    order = [n for n in moments if n in sites] + [n for n in sites if n not in moments]
    numbers = {name: i for i, name in enumerate(plan.layers)}
    done: dict[str, Replaced] = {}
    prefixes: dict[int, Prefix | None] = {}  # by the identity of the moment that layers of one input share
    behind: dict[int, list[Any]] = {}  # likewise: what was replaced before, on which the fits then depend
    with Progress(progress) as bar:
        for name in bar.track(order, "replace"):
            site, structure = sites[name], plan.layers[name]
            seen = moments.get(name)
            before = [(n, structure_to_json(plan.layers[n])) for n in done] if original is not None else []
            if seen is not None:
                before = behind.setdefault(id(seen.second_moment), before)
            own = digest(key, name, structure_to_json(structure), before, sweeps, seed)
            piece = f"fit/{numbers[name]:04d}-{own[:8]}"  # fits of several plans lie side by side
            module = model.get_submodule(name)
            kept = folder.load(piece, own)
            if kept is not None:
                data, tensors = kept
                done[name] = Replaced(name, structure, **data)
                matrix = StructuredMatrix(structure, site.shape, tensors)
            else:
                weight, norm = dense_weight(module), ""
                if original is not None and calibration is not None and seen is not None and done:
                    assert loader is not None, "a fit behind the layers before needs the calibration data"
                    shared = id(seen.second_moment)
                    if shared not in prefixes:
                        calls = max(1, seen.calls // calibration.batches)
                        prefixes[shared] = prefix_moments(original, model, name, loader, forward=forward, calls=calls)
                    prefix = prefixes[shared]
                    if prefix is not None:
                        seen = replace(seen, second_moment=prefix.second_moment)
                        weight, norm = corrected(weight, prefix), ", behind the layers before"
                target = layer_target(site, weight, seen, sweeps=sweeps, seed=seed)
                found = project_target(target, structure, dtype=torch.float64, device=torch.device("cpu"))
                matrix = found.matrix
                done[name] = Replaced(
                    name=name,
                    structure=structure,
                    parameters=count_stored(structure, site.shape),
                    flops=flops(structure, site.shape),
                    error=found.error,
                    lower_bound=found.lower_bound,
                    certificate=found.certificate.value,
                    method=found.method,
                    norm=norm_name(target) + norm,
                )
                facts = {k: v for k, v in done[name].__dict__.items() if k not in ("name", "structure")}
                folder.store(piece, own, facts, matrix.tensors)
            put(model, site, _structured(module, matrix))
    return tuple(done[name] for name in plan.changed)


def _site(model: nn.Module, name: str, plan: Plan) -> Site:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"The plan names a layer {name}, which {type(model).__name__} does not have. "
            f"Apply the plan to the architecture that it was made for."
        ) from None
    kind = kind_of(module)
    if kind is None or not name:
        raise ModelError(f"The plan names a layer {name!r}, which is a {type(module).__name__} and can't be replaced.")
    shape = tuple(dense_weight(module).shape)
    if shape != plan.shapes[name]:
        raise ModelError(f"{name} has shape {shape} in the model and {plan.shapes[name]} in the plan.")
    aliases = [n for n, m in model.named_modules(remove_duplicate=False) if m is module and n != name]
    weight = cast(Tensor, module.weight)
    dtype = str(weight.dtype).removeprefix("torch.")
    return Site(name, kind, plan.shapes[name], module.bias is not None, dtype, tuple(aliases))


def _structured(module: nn.Module, matrix: StructuredMatrix) -> StructuredLinear:
    """The layer that takes a module's place: its bias, dtype, device, mode and ``requires_grad``."""
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, module.bias)
    layer = StructuredLinear.from_matrix(matrix.to(dtype=weight.dtype, device=weight.device), bias)
    for name, parameter in layer.named_parameters():
        source = bias if name == "bias" and bias is not None else weight
        parameter.requires_grad_(source.requires_grad)
    return layer.train(module.training)


def put(model: nn.Module, site: Site, layer: nn.Module) -> None:
    """Put a module in a site's places, under all its names."""
    for name in (site.name, *site.aliases):
        parent, child = parent_and_child(model, name)
        setattr(parent, child, layer)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fast path of evaluation reads weights; these are the switches by which it declines.
            parent.activation_relu_or_gelu = 0
            for module in model.modules():
                if isinstance(module, nn.TransformerEncoder):
                    module.enable_nested_tensor = module.use_nested_tensor = False


def to_dense(model: Model) -> Model:
    """A copy of a model in which every structured layer is an ``nn.Linear`` with the same weight and bias again."""
    return _converted(model, _dense)


def freeze(model: Model, rows: int | None = None) -> Model:
    """A copy of a model for deployment, in evaluation mode: every structured layer is a ``FrozenLinear``.

    Its stages are merged where that runs faster, and what would be put together at every call (the matrix of a sparse
    stage, for one) is put together once, which may take more memory. A frozen model computes the same but can't be
    trained or saved by :func:`structmat.save`: keep the model that it was made from.

    Args:
        model: with structured layers.
        rows: of a layer's typical input, all leading axes together: tokens, for a language model. Many by default; 1
            for a model that answers one request at a time.
    """
    return _converted(model, lambda layer: layer.freeze(rows)).eval()


@contextmanager
def frozen_layers(model: nn.Module, rows: int | None = None) -> Iterator[None]:
    """The model itself with frozen layers for a while: what :func:`freeze` would make, without copying the rest."""
    places = [(parent_and_child(model, name), module) for name, module in _structured_layers(model)]
    made = {id(module): module.freeze(rows) for _, module in places}
    try:
        for (parent, child), module in places:
            setattr(parent, child, made[id(module)])
        yield
    finally:
        for (parent, child), module in places:
            setattr(parent, child, module)


def _converted(model: Model, convert: Callable[[StructuredLinear], nn.Module]) -> Model:
    """A copy in which every structured layer is converted, one that stands in two places once."""
    # What the memo holds is not copied but taken from there.
    return copy.deepcopy(model, {id(layer): convert(layer) for _, layer in _structured_layers(model, once=True)})


def _structured_layers(model: nn.Module, *, once: bool = False) -> list[tuple[str, StructuredLinear]]:
    """Structured layers by all their names, or each by the first."""
    found = model.named_modules(remove_duplicate=once)
    return [(name, module) for name, module in found if isinstance(module, StructuredLinear)]


def _dense(layer: StructuredLinear) -> nn.Linear:
    linear = layer.to_linear()
    required = [p.requires_grad for n, p in layer.named_parameters() if n != "bias"]
    linear.weight.requires_grad_(any(required))
    if layer.bias is not None:
        linear.bias.requires_grad_(layer.bias.requires_grad)
    return linear


def selected(sites: Sequence[Site], names: Iterable[str]) -> list[Site]:
    """The sites with these names, in the order of the sites."""
    wanted = set(names)
    return [site for site in sites if site.name in wanted]
