"""Training step and inference of an MNIST-sized network beside forms in plain PyTorch, in the same run.

    python -m benchmarks.convac_speed               one thread
    python -m benchmarks.convac_speed --all         two threads too
    python -m benchmarks.convac_speed table

256 locations, 32 representation channels, widths (32, 64, 128, 256), windows of 2 x 2, shared filters, batch 128,
float32. Each figure is the median of several runs, the forms in turns; each run follows one of the same form that is
not counted, so that none pays for what another left in the caches. What a form keeps for its backward pass is counted
without its parameters and without the input, which is there anyway.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.study import NOT_RUN, Cell, Study, markdown, of_name
from structmat.nn import ConvAC, ModeTree
from structmat.nn.convac import Log, Plain, RootMeanSquare, Scaled, SignedLog

LOCATIONS, BATCH, CHANNELS, OUTPUTS, WINDOW = 256, 128, 32, 10, 4
WIDTHS = ((32, 64, 128, 256), (16, 32, 64, 128), (64, 128, 256, 512))
RUNS = 15
OBVIOUS, BEST = "plain PyTorch, batched products and prod", "plain PyTorch, one product a layer"


def _weights(widths: tuple[int, ...]) -> nn.ParameterList:
    sizes = (CHANNELS, *widths, OUTPUTS)
    shapes = zip(sizes[1:], sizes, strict=False)
    return nn.ParameterList([torch.randn(a, b) * b**-0.5 for a, b in shapes])


def batched(weights: nn.ParameterList, x: Tensor) -> Tensor:
    """The obvious form: (locations, channels, batch), batched products, ``prod``."""
    for w in list(weights)[:-1]:
        x = (w[None] @ x).unflatten(0, (-1, WINDOW)).prod(1)
    return weights[-1] @ x[0]


def convolved(weights: nn.ParameterList, x: Tensor) -> Tensor:
    """(batch, channels, 1, locations): ``conv2d`` of size 1, strided slices."""
    for w in list(weights)[:-1]:
        x = F.conv2d(x, w[:, :, None, None])
        x = (x[..., 0::4] * x[..., 1::4]) * (x[..., 2::4] * x[..., 3::4])
    return weights[-1] @ x[:, :, 0, 0].T


def one_product(weights: nn.ParameterList, x: Tensor) -> Tensor:
    """(channels, locations, batch): one matrix product a layer, slices. The best plain form."""
    for w in list(weights)[:-1]:
        y = (w @ x.flatten(1)).view(w.shape[0], -1, WINDOW, BATCH)
        x = (y[:, :, 0] * y[:, :, 1]) * (y[:, :, 2] * y[:, :, 3])
    return weights[-1] @ x[:, 0]


PLAIN: dict[str, tuple[Callable[[nn.ParameterList, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    OBVIOUS: (batched, lambda x: x.permute(2, 1, 0)),
    "plain PyTorch, conv2d": (convolved, lambda x: x.unsqueeze(2)),
    BEST: (one_product, lambda x: x.permute(1, 2, 0)),
}
OURS = {
    "ConvAC, plain": Plain(),
    "ConvAC, scaled": Scaled(),
    "ConvAC, rms": RootMeanSquare(),
    "ConvAC, log": Log(),
    "ConvAC, signed log": SignedLog(),
}


def forms(widths: tuple[int, ...]) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Each form's parameters and one forward pass."""
    torch.manual_seed(0)
    x = torch.rand(BATCH, CHANNELS, LOCATIONS) + 0.5
    found: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    for name, (form, lay_out) in PLAIN.items():
        weights, laid = _weights(widths), lay_out(x).contiguous()
        found[name] = (weights, lambda form=form, weights=weights, laid=laid: form(weights, laid))
    for name, semiring in OURS.items():
        constraint = "simplex" if isinstance(semiring, Log) else "none"
        net = ConvAC(
            None, ModeTree.square(16, 16), widths, OUTPUTS, channels=CHANNELS, semiring=semiring, constraint=constraint
        )
        # As for the other forms, the layout of the input is not part of the time.
        laid = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        net._ordered = True
        found[name] = (net, lambda net=net, laid=laid: net(laid))
    return found


def kept(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a recorded forward pass keeps beside parameters and the input."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}
    leaves = LOCATIONS * CHANNELS * BATCH * 4

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outcome = run()
    del outcome
    return sum(sizes.values()) - leaves


def without_gradients(run: Callable[[], Tensor]) -> Callable[[], object]:
    """Inference."""
    return torch.no_grad()(run)


def training_step(module: nn.Module, run: Callable[[], Tensor]) -> Callable[[], object]:
    """Forward and backward."""

    def step() -> None:
        module.zero_grad()
        run().sum().backward()

    return step


def second(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the second of two calls."""
    call()
    start = clock()
    call()
    return clock() - start


def milliseconds(widths: tuple[int, ...]) -> dict[str, Any]:
    """Medians of inference and of a training step (forward and backward), and what is kept between."""
    known = forms(widths)
    # The time that the process had, where that is one thread's: on a shared machine it says more than the clock.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, dict[str, list[float]]] = {name: {"inference": [], "step": []} for name in known}
    for _ in range(RUNS):
        for name, (module, run) in known.items():
            found[name]["inference"].append(second(without_gradients(run), clock))
            found[name]["step"].append(second(training_step(module, run), clock))
    medians = {n: {what: 1e3 * statistics.median(t) for what, t in own.items()} for n, own in found.items()}
    held = {name: kept(module, run) for name, (module, run) in known.items()}
    return {"milliseconds": medians, "kept": held, "threads": torch.get_num_threads()}


def on_threads(threads: int, widths: tuple[int, ...]) -> dict[str, Any]:
    """Figures with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return milliseconds(widths)
    finally:
        torch.set_num_threads(before)


CELLS = [
    Cell(
        f"widths {widths}, {threads} thread{'s' * (threads > 1)}",
        lambda _, threads=threads, widths=widths: on_threads(threads, widths),
        extra=threads > 1,
    )
    for threads in (1, 2)
    for widths in WIDTHS
]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    head = ("form", *(cell.name for cell in CELLS))

    def table(names: Iterable[str], entry: Callable[[dict[str, Any], str], str]) -> list[str]:
        rows = []
        for name in names:
            found = [of_name(done, CELLS, cell.name) for cell in CELLS]
            rows.append([name, *(entry(own[0], name) if own else NOT_RUN for own in found)])
        return markdown(head, rows)

    def times(own: dict[str, Any], name: str) -> str:
        figures = own["milliseconds"][name]
        return f"{figures['inference']:.1f} / {figures['step']:.1f}"

    def ratios(own: dict[str, Any], name: str) -> str:
        all_forms = own["milliseconds"]
        ours, best, obvious = all_forms[name], all_forms[BEST], all_forms[OBVIOUS]
        times = {what: best[what] / ours[what] for what in ours}
        return f"{times['inference']:.2f} / {times['step']:.2f} ({obvious['step'] / ours['step']:.2f})"

    def megabytes(own: dict[str, Any], name: str) -> str:
        return f"{own['kept'][name] / 1e6:.1f}"

    native = ("ConvAC, plain", "ConvAC, scaled", "ConvAC, rms", "ConvAC, log")
    return [
        "Milliseconds for a batch of 128: inference / training step (forward and backward).",
        "",
        *table((*PLAIN, *OURS), times),
        "",
        f'How many times faster than "{BEST}": inference / training step (step against the obvious form).',
        "",
        *table(native, ratios),
        "",
        "Megabytes kept for the backward pass beside parameters and input.",
        "",
        *table((*PLAIN, *OURS), megabytes),
    ]


STUDY = Study("convac_speed", "Speed beside plain PyTorch forms", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
