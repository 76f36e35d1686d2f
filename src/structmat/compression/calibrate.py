"""Second moments of the inputs of layers, and of the loss's gradients in their outputs, streamed over batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structmat.compression.layers import Layer, Load, layer_named
from structmat.compression.progress import Progress
from structmat.compression.running import (
    GIVEN,
    LABELS,
    SQUARES,
    Forward,
    Loss,
    call,
    detached,
    device_of,
    evaluating,
    frozen,
    input_of,
    outcome,
    own_loss,
    sampled_loss,
    samples_in,
    to_device,
)
from structmat.compression.scan import Site, adapter_of, site_of
from structmat.compression.softening import peeked
from structmat.compression.split import split_apart
from structmat.compression.tables import LARGE_TABLE, looked_up, multiplied, together
from structmat.errors import DataError

logger = logging.getLogger(__name__)

_CHUNK = 4096
"""Rows whose products are summed in float32 before they are added up in float64."""


@dataclass(frozen=True)
class Moments:
    """What one layer saw.

    Args:
        second_moment: (in, in) float64, the mean of ``x x^T`` over the rows that the matrix multiplies; of a layer with
            several matrices (copies, in, in).
        gradient_moment: (out, out) float64, the mean of ``g g^T`` over output rows, ``g`` the gradient of the summed
            loss in the layer's output, or (copies, out, out); its mean eigenvalue alone, without axes, where the matrix
            would be too large; None where no gradient arrives.
        rows: that each matrix multiplied in all.
        calls: how often the layer was called.
        sizes: of the last input, where costs depend on them.
        lookups: rows of the matrix that were taken; see :mod:`structmat.compression.tables`.
    """

    second_moment: Tensor
    gradient_moment: Tensor | None
    rows: int
    calls: int
    sizes: tuple[int, ...] = ()
    lookups: int = 0

    def inputs(self, copy: int) -> Tensor:
        """The second moment of what one of the matrices multiplies."""
        return self.second_moment if self.second_moment.dim() == 2 else self.second_moment[copy]

    def gradients(self, copy: int) -> Tensor | None:
        """That of the gradients in its outputs."""
        found = self.gradient_moment
        return found if found is None or found.dim() in (0, 2) else found[copy]


@dataclass(frozen=True)
class Calibration:
    """What was seen of all layers.

    Args:
        moments: by the sites' names, in the order of their first calls; a layer that was never called is missing.
        loss: the mean loss of the batches, where there is one.
        batches: how many were read.
        samples: first axes of the batches, summed.
        terms: independent terms of the loss, such as predicted tokens, summed.
        kind: which loss the gradients are of.
        temperature: that logits were divided by for it; gradients are those of ``temperature`` times that loss.
    """

    moments: Mapping[str, Moments]
    loss: float | None
    batches: int
    samples: int
    terms: int
    kind: str
    temperature: float = 1.0

    def rows_per_sample(self, name: str) -> float:
        """Input rows that a layer sees for one sample; 1 for a layer that was never called."""
        return self.load(name).rows

    def load(self, name: str) -> Load:
        """What a layer does for one sample; one row for a layer that was never called."""
        found = self.moments.get(name)
        if found is None:
            return Load()
        return Load(found.rows / self.samples, found.sizes, found.lookups / self.samples)


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    gradients: bool = True,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Run a model over calibration data and keep second moments.

    The loss whose gradients are kept is the user's if given; otherwise, for logits, the cross-entropy to labels drawn
    from the model's own softmax at a temperature, and for any other output the squared error (see
    :func:`running.sampled_loss`), so that no labels are needed. Memory: the moments (float64) plus one batch with its
    activations. Time: a forward and a backward pass, and ``in**2 + out**2`` multiply-adds a row for every layer; layers
    that read the same input share that work. Where the temperature is to be found, the first few batches are read and
    run twice.

    Args:
        model: run in evaluation mode and without gradients for its parameters; both are restored.
        sites: the layers to watch, from :func:`structmat.compression.scan.scan`.
        loader: batches: tensors, tuples ``(inputs, labels)``, or dicts of arguments. Read once, but for
            its beginning; a generator will do.
        forward: ``forward(model, batch)``, if a batch is none of these.
        loss: ``loss(output, batch)``, a scalar.
        gradients: False leaves out the backward pass.
        temperature: of that softmax; None for the least at which at least half of the data count, which is 1 for most
            language models and above for classifiers that are certain of what they were trained on, see
            :mod:`structmat.compression.softening`. Without effect where a loss is given.
        seed: of the sampled labels.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no batch came, a batch can't be run, or activations or gradients are NaN or infinite.
    """
    with split_apart(model, [site.name for site in sites]):
        return _calibrated(model, sites, loader, forward, loss, gradients, temperature, seed, progress)


def _calibrated(
    model: nn.Module,
    sites: Sequence[Site],
    loader: Iterable[Any],
    forward: Forward | None,
    loss: Loss | None,
    gradients: bool,
    temperature: float | None,
    seed: int,
    progress: bool,
) -> Calibration:
    if loss is not None or not gradients:
        temperature = 1.0
    elif temperature is None:
        temperature, loader = peeked(model, loader, forward)
    watch = _Watch(sites, model)
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    losses: list[float] = []
    batches = samples = terms = 0
    kind = SQUARES
    with evaluating(model), frozen(model), watch, torch.set_grad_enabled(gradients), Progress(progress) as bar:
        for batch in bar.track(loader, "calibrate"):
            batch = to_device(batch, device)
            watch.start()
            output = call(model, batch, forward)
            own = own_loss(output, batch, loss)
            result = outcome(output, batch) if loss is None or own is None else None
            kind = GIVEN if result is None else LABELS if result.classes else SQUARES
            count = samples_in(batch) if result is None else result.values.shape[0]
            if own is not None:
                losses.append(detached(own) or 0.0)
            if gradients:
                # The mean of a user's loss over its terms is undone, so that gradients are those of a sum.
                objective = own * count if result is None and own is not None else None
                if result is not None:
                    objective = temperature * sampled_loss(result.softened(temperature), generator)
                if objective is not None and objective.requires_grad:
                    objective.backward()
            watch.finish()
            batches, samples, terms = batches + 1, samples + samples_in(batch), terms + count
    if batches == 0:
        raise DataError(
            "The calibration data is empty: not one batch came. "
            "Pass at least one batch; a generator that has been read once is empty."
        )
    if samples == 0:
        raise DataError(f"The calibration data is empty: {batches} batches came, and none held a sample.")
    if gradients and not any(r.gradient is not None or r.has_gradient for r in watch.records.values()):
        logger.warning("No gradient reached any layer: the model's output does not depend on them differentiably.")
    mean_loss = sum(losses) / len(losses) if losses else None
    return Calibration(watch.moments(), mean_loss, batches, samples, terms, kind, temperature)


@dataclass
class _Record:
    inputs: Tensor
    gradient: Tensor | None = None
    rows: int = 0
    calls: int = 0
    sizes: tuple[int, ...] = ()
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))
    has_gradient: bool = False

    def counted(self, parts: Iterable[Tensor], size: int) -> None:
        """How often each row of a table was taken."""
        for positions in parts:
            more = torch.bincount(positions.flatten(), minlength=size).double().cpu()
            self.counts = self.counts + more if self.counts.numel() else more
            self.rows += positions.numel()


@dataclass
class _Shared:
    """The last input seen and its product: query, key and value read the same one."""

    tensor: Tensor | None = None
    version: int = 0
    detail: object = None
    rows: int = 0
    product: Tensor = field(default_factory=lambda: torch.zeros(0))


class _Watch:
    """Hooks on the sites' modules while a model runs."""

    def __init__(self, sites: Sequence[Site], model: nn.Module) -> None:
        self.tables = {site.name: site for site in sites if layer_named(site.kind).looks_up}
        heads = [
            site_of(name, model.get_submodule(name))
            for site in self.tables.values()
            for name in _distinct(model, site.tied)
        ]
        self.sites = {site.name: site for site in (*sites, *heads)}
        self.heads = {site.name for site in heads}
        self.modules = {name: model.get_submodule(name) for name in self.sites}
        self.records: dict[str, _Record] = {}
        self._handles: list[RemovableHandle] = []
        self._last = _Shared()

    def __enter__(self) -> _Watch:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = _Shared()

    def start(self) -> None:
        self._last = _Shared()

    def finish(self) -> None:
        self._last = _Shared()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        site, adapter = self.sites[name], adapter_of(self.modules[name])

        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            x = input_of(arguments, named)
            record = self.records.get(name)
            if record is None:
                size = site.shape[1]
                record = self.records[name] = _Record(torch.zeros(site.copies, size, size, dtype=torch.float64))
            if name in self.tables:
                record.counted(adapter.rows(module, x.detach()), site.shape[0])
            elif x.numel():
                product, rows = self._product(site, adapter, x)
                record.inputs += product
                record.rows += rows
                record.sizes = adapter.sizes(module, x)
            record.calls += 1
            if not torch.is_grad_enabled():
                return None
            fresh = not output.requires_grad
            if fresh:
                output.requires_grad_()
            output.register_hook(lambda g: self._gradient(name, adapter, g))
            # What follows may work in place, which a leaf that requires a gradient forbids.
            return output.clone() if fresh else None

        return hook

    def _product(self, site: Site, adapter: Layer, x: Tensor) -> tuple[Tensor, int]:
        """The sum of ``x x^T`` over rows, and how many these are."""
        last, detail = self._last, (site.kind, site.detail)
        if last.tensor is x and last.version == x._version and last.detail == detail:
            return last.product, last.rows
        product, rows = gram(adapter.rows(self.modules[site.name], x.detach()), site.copies, site.shape[1])
        _check_finite(product, site.name, "inputs")
        self._last = _Shared(x, x._version, detail, rows, product)
        return product, rows

    def _gradient(self, name: str, adapter: Layer, gradient: Tensor) -> None:
        site, record = self.sites[name], self.records[name]
        if name in self.tables or (name in self.heads and site.shape[0] > LARGE_TABLE):
            rows = adapter.output_rows(self.modules[name], gradient.detach())
            product = gram([rows], 1, site.shape[1])[0] if name in self.tables else rows.double().square().sum().cpu()
            _check_finite(product, name, "gradients in the outputs")
            if name in self.tables:
                record.inputs += product
                record.has_gradient = True
            else:
                record.gradient = product if record.gradient is None else record.gradient + product
            return
        product, _ = gram([adapter.output_rows(self.modules[name], gradient.detach())], site.copies, site.shape[0])
        _check_finite(product, name, "gradients in the outputs")
        record.gradient = product if record.gradient is None else record.gradient.add_(product)

    def moments(self) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        for name, record in self.records.items():
            if record.rows == 0 or name in self.heads:
                continue
            if name in self.tables:
                found[name] = self._table(name, record)
                continue
            inputs = (record.inputs[0] if len(record.inputs) == 1 else record.inputs) / record.rows
            for other in found.values():  # layers that read the same input share one tensor
                if other.rows == record.rows and torch.equal(other.second_moment, inputs):
                    inputs = other.second_moment
                    break
            gradient = None if record.gradient is None else record.gradient / record.rows
            if gradient is not None and len(gradient) == 1:
                gradient = gradient[0]
            found[name] = Moments(inputs, gradient, record.rows, record.calls, record.sizes)
        return found

    def _table(self, name: str, record: _Record) -> Moments:
        """Of an embedding and the heads that are tied to it."""
        site = self.tables[name]
        uses = [looked_up(record.inputs[0] if record.has_gradient else None, record.counts, site.shape)]
        for head in self.heads & set(site.tied):
            own = self.records.get(head)
            if own is not None and own.rows:
                outer = own.gradient[0] if own.gradient is not None and own.gradient.dim() else own.gradient
                uses.append(multiplied(own.inputs[0], outer, own.rows, site.shape))
        rows = sum(use.rows for use in uses[1:]) or record.rows
        second, gradient = together(uses, rows)
        return Moments(second, gradient, rows, record.calls, (), record.rows)


def _distinct(model: nn.Module, names: Sequence[str]) -> list[str]:
    """One name of each module."""
    return list({id(model.get_submodule(name)): name for name in reversed(names)}.values())


def gram(parts: Iterable[Tensor], copies: int, size: int) -> tuple[Tensor, int]:
    """The sums of ``x x^T`` over the rows of parts (copies, rows, size), in float64 on the CPU, and how many rows."""
    total, count = torch.zeros(copies, size, size, dtype=torch.float64), 0
    for part in parts:
        count += part.shape[1]
        for chunk in part.split(_CHUNK, 1):
            wide = chunk if chunk.dtype == torch.float64 else chunk.float()
            total += (wide.mT @ wide).to(device="cpu", dtype=torch.float64)
    return total, count


def _check_finite(product: Tensor, name: str, what: str) -> None:
    if not bool(torch.isfinite(product).all()):
        raise DataError(
            f"The {what} of {name} are NaN or infinite on the calibration data. "
            f"Look at the batches and at the layers before it, or run the model in float32."
        )


# ---------------------------------------------------------------------------------------------------------- disk


_FACTS = ("loss", "batches", "samples", "terms", "kind", "temperature")


def facts(seen: Calibration) -> dict[str, Any]:
    """What there is besides moments, as JSON values."""
    return {n: getattr(seen, n) for n in _FACTS}


def to_tensors(seen: Calibration) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON values and tensors; moments that layers share are kept once."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    layers = []
    for number, (name, moments) in enumerate(seen.moments.items()):
        shared = names.setdefault(id(moments.second_moment), f"second.{number}")
        tensors[shared] = moments.second_moment
        if moments.gradient_moment is not None:
            tensors[f"gradient.{number}"] = moments.gradient_moment
        layers.append(
            {
                "name": name,
                "second": shared,
                "rows": moments.rows,
                "calls": moments.calls,
                "sizes": list(moments.sizes),
                "lookups": moments.lookups,
            }
        )
    return {**facts(seen), "layers": layers}, tensors


def from_tensors(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    """Read what :func:`to_tensors` made."""
    moments = {
        layer["name"]: Moments(
            tensors[layer["second"]],
            tensors.get(f"gradient.{i}"),
            layer["rows"],
            layer["calls"],
            tuple(layer["sizes"]),
            layer.get("lookups", 0),
        )
        for i, layer in enumerate(data["layers"])
    }
    known = {n: data[n] for n in _FACTS}
    return Calibration(moments, **known)


def load_of(site: Site, seen: Calibration | None) -> Load:
    """What a layer does for one sample; one row if nothing was seen."""
    return Load() if seen is None else seen.load(site.name)
