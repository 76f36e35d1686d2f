"""Applying a plan: the final fits, put in the places of the layers."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from structmat.compression.budget import flops
from structmat.compression.calibrate import Calibration
from structmat.compression.layers import layer_named, layer_of, splitters, structured_layer_of
from structmat.compression.norms import layer_targets, norm_name
from structmat.compression.plan import Plan
from structmat.compression.progress import Progress
from structmat.compression.running import Forward
from structmat.compression.scan import Site, adapter_of, parent_and_child, site_of, tied_heads
from structmat.compression.screen import weakest
from structmat.compression.sequential import Prefix, Prefixes, corrected
from structmat.compression.split import split_, split_apart, whole_again_
from structmat.compression.workfolder import WorkFolder, digest
from structmat.errors import ModelError
from structmat.matrix import StructuredMatrix
from structmat.projection.project import DEFAULT_SWEEPS, project_target
from structmat.structure import Structure, count_stored, specs
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
        original: the same model as another object, which stays as it is. Then each layer, but matrices of recurrent
            states, is fitted behind the layers that are replaced before it (in the order of calls): on the inputs that
            it will see, for the outputs that it used to have (see :mod:`structmat.compression.sequential`). Both models
            run once over a part of the data, and once more where a layer is called several times. Needs
            ``calibration`` and ``loader``.
        loader, forward: as for :func:`structmat.compression.calibrate.calibrate`.
        sweeps: that an iterative fit may spend.
        seed: of fits with random starts.
        folder, key: where finished fits are kept, and the digest of what all of them depend on.
        progress: show a progress bar on stderr.

    Raises:
        ModelError: a layer of the plan is missing in the model, has another shape or is of no known kind.
    """
    # Where the model was not taken apart before, as by compress: parts of recurrent nets and of attention are layers.
    splits = split_(model)
    try:
        apart = contextlib.nullcontext() if original is None else split_apart(original, plan.changed)
        with apart:
            return _replaced(
                model,
                plan,
                calibration,
                original,
                loader,
                forward,
                sweeps,
                seed,
                folder or WorkFolder(None),
                key,
                progress,
            )
    finally:
        whole_again_(model, splits, plan.changed)


def _replaced(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration | None,
    original: nn.Module | None,
    loader: Iterable[Any] | None,
    forward: Forward | None,
    sweeps: int,
    seed: int,
    folder: WorkFolder,
    key: str,
    progress: bool,
) -> tuple[Replaced, ...]:
    sites = {name: _site(model, name, plan) for name in plan.changed}
    moments = dict(calibration.moments) if calibration is not None else {}
    order = [n for n in moments if n in sites] + [n for n in sites if n not in moments]
    numbers = {name: i for i, name in enumerate(plan.layers)}
    done: dict[str, Replaced] = {}
    found: dict[int, Prefix | None] = {}  # by the identity of the moment that layers of one input share
    behind: dict[int, list[Any]] = {}  # likewise: what was replaced before, on which the fits then depend
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Progress(progress))
        prefixes = None
        if original is not None and loader is not None:
            prefixes = stack.enter_context(Prefixes(original, model, order, loader, forward=forward))
        for name in bar.track(order, "replace"):
            site, structure = sites[name], plan.layers[name]
            seen = moments.get(name)
            looks_up = layer_named(site.kind).looks_up
            follows = original is not None and not _feeds_back(model, name) and not looks_up
            before = [(n, structure_to_json(plan.layers[n])) for n in done] if follows else []
            if seen is not None and follows:
                before = behind.setdefault(id(seen.second_moment), before)
            own = digest(key, name, structure_to_json(structure), before, sweeps, seed)
            piece = f"fit/{numbers[name]:04d}-{own[:8]}"  # fits of several plans lie side by side
            module = model.get_submodule(name)
            kept = folder.load(piece, own)
            if kept is not None:
                data, tensors = kept
                done[name] = Replaced(name, structure, **data)
                matrices = [
                    StructuredMatrix(structure, site.shape, _of_copy(tensors, copy)) for copy in range(site.copies)
                ]
            else:
                weights, norm = adapter_of(module).matrices(module), ""
                if follows and calibration is not None and seen is not None and done:
                    assert prefixes is not None, "a fit behind the layers before needs the calibration data"
                    shared = id(seen.second_moment)
                    if shared not in found:
                        found[shared] = prefixes.moments(name, max(1, seen.calls // calibration.batches))
                    prefix = found[shared]
                    if prefix is not None:
                        seen = replace(seen, second_moment=prefix.second_moment)
                        weights, norm = corrected(weights, prefix), ", behind the layers before"
                targets = layer_targets(site, weights, seen, sweeps=sweeps, seed=seed)
                fits = [
                    project_target(target, structure, dtype=torch.float64, device=torch.device("cpu"))
                    for target in targets
                ]
                matrices = [fit.matrix for fit in fits]
                sizes = [target.norm() for target in targets]
                done[name] = Replaced(
                    name=name,
                    structure=structure,
                    parameters=site.copies * count_stored(structure, site.shape),
                    flops=site.copies * flops(structure, site.shape),
                    error=_together([fit.error for fit in fits], sizes),
                    lower_bound=_together([fit.lower_bound for fit in fits], sizes),
                    certificate=weakest([fit.certificate for fit in fits]).value,
                    method=fits[0].method,
                    norm=norm_name(targets[0]) + norm,
                )
                facts = {k: v for k, v in done[name].__dict__.items() if k not in ("name", "structure")}
                tensors = {f"{copy}.{n}": t for copy, m in enumerate(matrices) for n, t in m.tensors.items()}
                folder.store(piece, own, facts, tensors)
            layer = structured(module, matrices)
            put(model, site, layer)
            if prefixes is not None:
                prefixes.replaced(name)
            for head in site.tied:
                parent, child = parent_and_child(model, head)
                setattr(parent, child, _tied(layer, model.get_submodule(head), site))
    return tuple(done[name] for name in plan.changed)


def _feeds_back(model: nn.Module, name: str) -> bool:
    """Whether a layer reads what it did itself: its inputs behind the layers before are not those that it will get,
    and a weight that makes up for them is worse than none (measured: an encoder and decoder of GRUs at a quarter of
    its size, 74 % of phonemes wrong instead of 18 %)."""
    parent, child = parent_and_child(model, name)
    return any(splitter.is_split(parent) and splitter.feeds_back(child) for splitter in splitters())


def _of_copy(tensors: Mapping[str, Tensor], copy: int) -> dict[str, Tensor]:
    """Those of one of a layer's matrices."""
    start = f"{copy}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _together(errors: Sequence[float], sizes: Sequence[float]) -> float:
    """The relative error of several matrices, from those of each and their norms."""
    whole = math.hypot(*sizes)
    if len(errors) == 1 or whole == 0:
        return errors[0]
    return math.hypot(*(error * size for error, size in zip(errors, sizes, strict=True))) / whole


def _site(model: nn.Module, name: str, plan: Plan) -> Site:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"The plan names a layer {name}, which {type(model).__name__} does not have. "
            f"Apply the plan to the architecture that it was made for."
        ) from None
    adapter = layer_of(module)
    if adapter is None or not name:
        raise ModelError(f"The plan names a layer {name!r}, which is a {type(module).__name__} and can't be replaced.")
    aliases = [n for n, m in model.named_modules(remove_duplicate=False) if m is module and n != name]
    site = site_of(name, module, tuple(aliases), tied_heads(model, module) if adapter.looks_up else ())
    if site.shape != plan.shapes[name]:
        raise ModelError(f"{name} has shape {site.shape} in the model and {plan.shapes[name]} in the plan.")
    return site


def structured(module: nn.Module, matrices: Sequence[StructuredMatrix]) -> nn.Module:
    """The layer of other matrices that takes a dense module's place: its bias, dtype, device, mode and
    ``requires_grad``."""
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, getattr(module, "bias", None))
    moved = [matrix.to(dtype=weight.dtype, device=weight.device) for matrix in matrices]
    layer = adapter_of(module).build(module, moved)
    for name, parameter in layer.named_parameters():
        source = bias if name == "bias" and bias is not None else weight
        parameter.requires_grad_(source.requires_grad)
    return layer.train(module.training)


def _tied(layer: nn.Module, head: nn.Module, site: Site) -> nn.Module:
    """The layer that takes the place of a head which held the weight of a site's embedding."""
    if structured_layer_of(head) is not None:
        return head  # under another of its names it was replaced
    made = layer_named(site.kind).tied(layer, head)
    bias = cast(nn.Parameter | None, head.bias)
    if bias is not None:
        made.get_parameter("bias").requires_grad_(bias.requires_grad)
    return made.train(head.training)


def put(model: nn.Module, site: Site, layer: nn.Module) -> None:
    """Put a module in a site's places, under all its names."""
    for name in (site.name, *site.aliases):
        parent, child = parent_and_child(model, name)
        setattr(parent, child, layer)
        decline_fast_paths(model, name)


def decline_fast_paths(model: nn.Module, name: str) -> None:
    """Let an ``nn.TransformerEncoderLayer`` whose part was replaced call it: its fast path of evaluation reads weights,
    and these are the switches by which it declines."""
    parts = name.split(".")
    parents = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    for layer in parents:
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0
            for module in model.modules():
                if isinstance(module, nn.TransformerEncoder):
                    module.enable_nested_tensor = module.use_nested_tensor = False


def to_dense(model: Model) -> Model:
    """A copy of a model in which every structured layer is one of PyTorch's with the same weight and bias again:
    ``nn.Linear``, convolutions, recurrent nets, ``nn.MultiheadAttention``."""

    def dense(module: nn.Module) -> nn.Module | None:
        for splitter in splitters():
            if splitter.is_split(module):
                return splitter.join(_copied(module, _converted(module, dense_layer)))
        return dense_layer(module)

    def dense_layer(module: nn.Module) -> nn.Module | None:
        adapter = structured_layer_of(module)
        return None if adapter is None else adapter.to_dense(module)

    found = _converted(model, dense)
    tables: dict[tuple[int, ...], nn.Module] = {}
    for module in model.modules():  # heads that held the tensors of an embedding hold its weight
        adapter, made = structured_layer_of(module), found.get(id(module))
        if adapter is None or made is None:
            continue
        content = adapter.content(module)
        paths = adapter.paths(module)
        own = tuple(id(attrgetter(paths.get(name, name))(module)) for name in specs(content.structure, content.shape))
        if tables.setdefault(own, made) is not made and any(p is not None for p in module.parameters()):
            made.register_parameter("weight", tables[own].get_parameter("weight"))
    return _copied(model, found)


def freeze(model: Model, rows: int | None = None) -> Model:
    """A copy of a model for deployment, in evaluation mode: every structured layer is a frozen one.

    Its stages are merged where that runs faster, and what would be put together at every call (the matrix of a sparse
    stage, for one) is put together once, which may take more memory. A frozen model computes the same but can't be
    trained or saved by :func:`structmat.save`: keep the model that it was made from.

    Args:
        model: with structured layers.
        rows: of a layer's typical input, all leading axes together: tokens, for a language model. Many by default; 1
            for a model that answers one request at a time.
    """
    return _copied(model, _converted(model, lambda module: _frozen(module, rows))).eval()


def _frozen(module: nn.Module, rows: int | None) -> nn.Module | None:
    """A module for deployment if it is structured."""
    for splitter in splitters():
        if splitter.is_split(module):
            return splitter.freeze(module, rows)
    adapter = structured_layer_of(module)
    return None if adapter is None else adapter.freeze(module, rows)


@contextmanager
def frozen_layers(model: nn.Module, rows: int | None = None) -> Iterator[None]:
    """The model itself with frozen layers for a while: what :func:`freeze` would make, without copying the rest."""
    made = _converted(model, lambda module: _frozen(module, rows))
    named = list(model.named_modules(remove_duplicate=False))
    places = [(parent_and_child(model, name), module) for name, module in named if id(module) in made and name]
    try:
        for (parent, child), module in places:
            setattr(parent, child, made[id(module)])
        yield
    finally:
        for (parent, child), module in places:
            setattr(parent, child, module)


def _converted(model: nn.Module, convert: Callable[[nn.Module], nn.Module | None]) -> dict[int, nn.Module]:
    """What becomes of the outermost modules that are converted, by identity."""
    found: dict[int, nn.Module] = {}

    def walk(module: nn.Module) -> None:
        if id(module) in found:
            return
        made = convert(module)
        if made is not None:
            found[id(module)] = made
            return
        for child in module.children():
            walk(child)

    walk(model)
    return found


def _copied(model: Model, converted: dict[int, nn.Module]) -> Model:
    """A copy with converted modules (by identity) in the places of theirs."""
    # What the memo holds is not copied but taken from there.
    return copy.deepcopy(model, cast(dict[int, Any], converted))
