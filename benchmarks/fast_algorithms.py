"""Fast algorithms found: from the matrix itself, and by gradient descent from random starts.

    python -m benchmarks.fast_algorithms                      what is in closed form, baselines, descent at seed 0 to 64
    python -m benchmarks.fast_algorithms run --all            descent to 256, convolutions too, three seeds
    python -m benchmarks.fast_algorithms run --only descent_dft
    python -m benchmarks.fast_algorithms table                the tables again, from what is there

The study is that of Dao et al., "Learning fast algorithms for linear transforms using butterfly factorizations" (ICML
2019), with its targets, scales and criterion: a root mean square error (RMSE) of an entry below 1e-4. Its baselines
hold as many numbers as one butterfly, 2 N log2 N: that many entries; a rank of log2 N; both together, the best split of
a few, by alternation.

Descent: butterflies with the same block at all places of a stage (tied), after a relaxed permutation with three logits
that all levels share; cosine and sine transforms have one level of the whole vector more, with logits of its own, and
convolutions are two such pairs. Starts are random and come 24 at once, each with a learning rate of its own. After 250
steps of Adam at that rate the best six go on, for 800 steps with falling rates; each step sees new random inputs, no
more than 32, in place of the whole identity. Then the permutation is rounded, and the blocks of the best three are
polished by L-BFGS on all entries. This is repeated until one succeeds or the time of the cell is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import structmat as sm
from benchmarks.study import NOT_RUN, Cell, Study, markdown, of_name
from structmat import transforms
from structmat.projection.orders import digit_reversal

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
SUCCESS = 1e-4
SEEDS = 3
F64, C128 = torch.float64, torch.complex128

# ------------------------------------------------------------------------------------------------------------ targets


def target(name: str, size: int, seed: int = 0) -> Tensor:
    """The matrix (N, N) in the scale of the published study, from definitions, not from the library's transforms."""
    j = torch.arange(size, dtype=F64)
    k = j[:, None]
    root = math.sqrt(size)
    if name == "dft":
        return torch.polar(torch.ones(size, size, dtype=F64), -2 * math.pi * ((k * j) % size) / size) / root
    if name == "hartley":
        angle = 2 * math.pi * ((k * j) % size) / size
        return (angle.cos() + angle.sin()) / root
    if name == "dct":
        return 2 * torch.cos(math.pi * k * (2 * j + 1) / (2 * size)) / root
    if name == "dst":
        return 2 * torch.sin(math.pi * (k + 1) * (2 * j + 1) / (2 * size)) / root
    if name == "hadamard":
        found = torch.ones(1, 1, dtype=F64)
        for _ in range(size.bit_length() - 1):
            found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
        return found / root
    generator = torch.Generator().manual_seed(seed)
    if name == "convolution":
        kernel = torch.randn(size, generator=generator, dtype=F64)
        return kernel[((k - j) % size).long()] / root
    if name == "legendre":
        points = np.linspace(-1, 1, size + 2)[1:-1]
        return torch.from_numpy(np.polynomial.legendre.legvander(points, size - 1).T.copy()) / root
    if name == "hilbert":
        hilbert = 1 / (k + j + 1)
        return hilbert / torch.linalg.matrix_norm(hilbert, 2)
    assert name == "randn", name
    return torch.randn(size, size, generator=generator, dtype=F64) / root


TARGETS = ("dft", "dct", "dst", "convolution", "hadamard", "hartley", "legendre", "hilbert", "randn")
DIRECT = TARGETS[:6]


def rmse(found: Tensor, wanted: Tensor) -> float:
    """Per entry."""
    return float(torch.linalg.norm(found.to(C128) - wanted.to(C128))) / wanted.shape[0]


# ------------------------------------------------------------------------------------------------ from the matrix


def _fourier(matrix: Tensor) -> sm.StructuredMatrix:
    return sm.project(matrix, sm.PermutedButterfly()).matrix


def _hartley(matrix: Tensor) -> Tensor:
    """The even and odd parts of its rows are the Fourier transform, which is factorized; the real part of (1 + i) times
    it is the answer."""
    mirrored = matrix.roll(-1, 0).flip(0)  # row -k
    found = _fourier(torch.complex((matrix + mirrored) / 2, -(matrix - mirrored) / 2))
    return ((1 + 1j) * found.to_dense()).real


def _convolution(matrix: Tensor) -> Tensor:
    """The Fourier transform makes it diagonal; the diagonal is the transform of a kernel."""
    size = matrix.shape[0]
    fourier = target("dft", size)
    diagonal = ((fourier @ matrix.to(C128)) * fourier.conj()).sum(1)  # of F C F^*, with F unitary
    return transforms.convolution(torch.fft.ifft(diagonal).real).to_dense()


HOW: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "dft": ("hierarchical, order found", lambda m: _fourier(m).to_dense()),
    "hadamard": ("hierarchical", lambda m: sm.project(m, sm.Butterfly()).matrix.to_dense()),
    "hartley": ("through the Fourier transform", _hartley),
    "dct": ("explicit form", lambda m: transforms.dct(m.shape[0]).to_dense() / math.sqrt(m.shape[0])),
    "dst": ("explicit form", lambda m: transforms.dst(m.shape[0]).to_dense() / math.sqrt(m.shape[0])),
    "convolution": ("diagonalized", _convolution),
}


def direct_cell(name: str, size: int, seed: int) -> dict[str, Any]:
    wanted = target(name, size, seed)
    start = time.perf_counter()
    found = HOW[name][1](wanted)
    return {"rmse": rmse(found, wanted), "seconds_fit": time.perf_counter() - start, "how": HOW[name][0]}


# ---------------------------------------------------------------------------------------------------------- baselines


def baseline_cell(name: str, size: int, seed: int) -> dict[str, Any]:
    wanted = target(name, size, seed)
    levels = size.bit_length() - 1
    budget = min(2 * size * levels, size * size)
    absolute = wanted.abs().flatten().sort(descending=True).values
    values = torch.linalg.svdvals(wanted)
    both, rank = math.inf, 0
    for r in sorted({1, 2, levels // 2, levels - 1} - {0}):
        rest = budget - 2 * size * r
        if rest > 0 and r < size:
            structure = sm.Sum(sm.LowRank(r), sm.Sparse(nonzeros=rest))
            error = sm.project(wanted, structure, sweeps=4 if size <= 256 else 0).error
            error *= float(torch.linalg.norm(wanted)) / size
            if error < both:
                both, rank = error, r
    return {
        "sparse": float(absolute[budget:].square().sum().sqrt()) / size,
        "low rank": float(values[levels:].square().sum().sqrt()) / size,
        "sparse + low rank": both,
        "rank": rank,
        "norm": float(torch.linalg.norm(wanted)) / size,
    }


# ------------------------------------------------------------------------------------------------------------ descent


@dataclass(frozen=True)
class Model:
    """Relaxed butterflies: how many, whether the levels share logits, whether the first level comes twice (the one more
    has logits of its own), and whether the real part is taken."""

    pairs: int
    shared: bool
    twice: bool
    real: bool


MODELS = {
    "dft": Model(1, True, False, False),
    "hadamard": Model(1, True, False, True),
    "hartley": Model(1, True, False, True),
    "dct": Model(1, True, True, True),
    "dst": Model(1, True, True, True),
    "convolution": Model(2, True, False, True),
}
RATES = (0.01, 0.02, 0.04)
STARTS, FIRST_STEPS, STEPS, POLISHED = 24, 250, 800, 3
INPUTS = 32
DEVIATION = 2.0
"""Of the logits of a start. With the right permutation nearly every start succeeds, and the descent rarely changes a
decision once it is made: starts differ by it."""

SECONDS = {8: 30, 16: 60, 32: 120, 64: 180, 128: 300, 256: 600}
ROUNDS, PROGRESS, HOPELESS = 5, 0.8, 0.02
"""L-BFGS goes on, 400 steps at a time, while that lowers the error to less than the second number times what it was,
and where it is below the third after the first time."""

Params = dict[str, Tensor]


def blocks_of(model: Model, size: int) -> list[int]:
    blocks = [size >> level for level in range(size.bit_length() - 2)]
    return blocks[:1] * model.twice + blocks


def fresh(model: Model, size: int, starts: int, generator: torch.Generator) -> Params:
    """Unitary blocks, logits of deviation 2."""
    found: Params = {}
    levels = 1 + model.twice if model.shared else len(blocks_of(model, size))
    for pair in range(model.pairs):
        found[f"logits{pair}"] = DEVIATION * torch.randn(starts, levels, 3, generator=generator, dtype=F64)
        for stage in range(size.bit_length() - 1):
            normal = torch.randn(starts, 1 << stage, 2, 2, generator=generator, dtype=C128)
            unitary, upper = torch.linalg.qr(normal)
            phases = torch.sgn(upper.diagonal(dim1=-2, dim2=-1))
            blocks = (unitary * phases[..., None, :]).permute(0, 2, 3, 1).contiguous()
            found[f"blocks{pair}_{stage}"] = torch.view_as_real(blocks)
    return found


def applied(model: Model, size: int, params: Params, inputs: Tensor) -> Tensor:
    """The matrices times inputs (N, columns): (starts, N, columns)."""
    starts, columns = params["blocks0_0"].shape[0], inputs.shape[1]
    dtype = torch.complex64 if params["blocks0_0"].dtype == torch.float32 else C128
    x = inputs.to(dtype).expand(starts, size, columns)
    for pair in range(model.pairs):
        probabilities = torch.sigmoid(params[f"logits{pair}"])
        for level, block in enumerate(blocks_of(model, size)):
            own = probabilities[:, min(level, int(model.twice)) if model.shared else level]
            half = block // 2
            for number in range(3):
                p = own[:, number, None, None, None]
                grid = x.reshape(starts, size // block, block, columns)
                if number == 0:
                    moved = torch.cat([grid[:, :, ::2], grid[:, :, 1::2]], 2)
                elif number == 1:
                    moved = torch.cat([grid[:, :, :half].flip(2), grid[:, :, half:]], 2)
                else:
                    moved = torch.cat([grid[:, :, :half], grid[:, :, half:].flip(2)], 2)
                x = (p * moved + (1 - p) * grid).reshape(starts, size, columns)
        for stage in range(size.bit_length() - 1):
            span = 1 << stage
            w = torch.view_as_complex(params[f"blocks{pair}_{stage}"])[:, :, :, None, :, None]
            halves = x.reshape(starts, size // (2 * span), 2, span, columns)
            u, v = halves[:, :, 0], halves[:, :, 1]
            x = torch.stack([w[:, 0, 0] * u + w[:, 0, 1] * v, w[:, 1, 0] * u + w[:, 1, 1] * v], 2)
            x = x.reshape(starts, size, columns)
    return x


def errors(model: Model, wanted: Tensor, params: Params, inputs: Tensor | None = None) -> Tensor:
    """Mean squares of the entries (starts,); for inputs (N, columns) of deviation 1, what they make of them."""
    size = wanted.shape[0]
    found = applied(model, size, params, torch.eye(size, dtype=F64) if inputs is None else inputs)
    goal = wanted if inputs is None else wanted @ inputs.to(wanted.dtype)
    rest = (found.real if model.real else found) - goal
    return rest.abs().square().mean((1, 2)) / (1 if inputs is None else size)


def adam(
    model: Model,
    wanted: Tensor,
    params: Params,
    rates: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    falling: bool,
    until: float,
) -> Params:
    """Adam on random inputs, new ones at each step; every start has its own rate, which stays, or falls to zero along a
    cosine. Ends early at a time of the clock."""
    params = {name: t.clone().requires_grad_() for name, t in params.items()}
    first = {name: torch.zeros_like(t) for name, t in params.items()}
    second = {name: torch.zeros_like(t) for name, t in params.items()}
    size = wanted.shape[0]
    for step in range(1, steps + 1):
        inputs = None if size <= INPUTS else torch.randn(size, INPUTS, generator=generator)
        gradients = torch.autograd.grad(errors(model, wanted, params, inputs).sum(), list(params.values()))
        with torch.no_grad():
            factor = 0.5 * (1 + math.cos(math.pi * step / steps)) if falling else 1.0
            for (name, value), gradient in zip(params.items(), gradients, strict=True):
                first[name].mul_(0.9).add_(gradient, alpha=0.1)
                second[name].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                move = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-10)
                value -= factor * rates.reshape(-1, *[1] * (value.dim() - 1)).to(value) * move
        if time.perf_counter() > until:
            break
    return {name: t.detach() for name, t in params.items()}


def polish(model: Model, wanted: Tensor, params: Params) -> float:
    """The permutation rounded, the blocks by L-BFGS in double precision: the RMSE."""
    fixed = {n: torch.where(t > 0, 100.0, -100.0).to(F64) for n, t in params.items() if n.startswith("logits")}
    free = {n: t.to(F64).clone().requires_grad_() for n, t in params.items() if n not in fixed}
    optimizer = torch.optim.LBFGS(
        free.values(),
        max_iter=400,
        history_size=20,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = errors(model, wanted, {**fixed, **free}).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    found = math.inf
    for _ in range(ROUNDS):
        optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            before, found = found, math.sqrt(float(errors(model, wanted, {**fixed, **free})))
        if found < SUCCESS or not found < PROGRESS * before or found > HOPELESS:
            break
    return found


def kept(params: Params, index: Tensor) -> Params:
    return {name: tensor[index] for name, tensor in params.items()}


def descent_cell(name: str, size: int, seed: int) -> dict[str, Any]:
    """Starts until one has an RMSE below 1e-4, or the time is over."""
    model, wanted = MODELS[name], target(name, size, seed)
    single = wanted.to(torch.complex64 if wanted.is_complex() else torch.float32)
    begin, tried, best = time.perf_counter(), 0, math.inf
    until = begin + SECONDS[size]
    generator = torch.Generator().manual_seed(seed)
    while time.perf_counter() < until and best >= SUCCESS:
        rates = torch.tensor(RATES * (STARTS // len(RATES)))
        found = {n: t.float() for n, t in fresh(model, size, STARTS, generator).items()}
        found = adam(model, single, found, rates, FIRST_STEPS, generator, falling=False, until=until)
        tried += STARTS
        for few, steps in ((STARTS // 4, STEPS), (POLISHED, 0)):
            with torch.no_grad():
                least = torch.cat([errors(model, wanted, kept(found, i)) for i in torch.arange(len(rates)).split(1)])
            chosen = least.argsort()[:few]
            found, rates = kept(found, chosen), rates[chosen]
            if steps:
                found = adam(model, single, found, rates, steps, generator, falling=True, until=until)
        for index in torch.arange(POLISHED).split(1):
            best = min(best, polish(model, wanted, kept(found, index)))
            if best < SUCCESS:
                break
    return {"rmse": best, "starts": tried, "seconds_fit": time.perf_counter() - begin}


# ------------------------------------------------------------------------------------------------------- given matrices


def given_cell(name: str, size: int, seed: int) -> dict[str, Any]:
    """A given matrix factorized: ours, and `ksd` of lazylinop, in turn in one process, all threads."""
    wanted = (target(name, size) * math.sqrt(size)).to(C128 if name == "dft" else F64)
    structure = sm.PermutedButterfly() if name == "dft" else sm.Butterfly()
    torch.set_num_threads(2)
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    start = time.perf_counter()
    ours = sm.project(wanted, structure)
    found["ours"] = {"seconds": time.perf_counter() - start, "error": ours.error, "method": ours.method}
    try:
        import lazylinop  # type: ignore[import-not-found]
        from lazylinop.butterfly import Chain, ksd  # type: ignore[import-not-found]
    except ImportError:
        found["ksd"] = None
        return found
    given = wanted.numpy()
    levels = size.bit_length() - 1
    if name == "dft":  # it is not told the order either, and does not look for one: it gets it here, before the clock
        given = given[:, digit_reversal(size, (2,) * levels).numpy()]
    chain = Chain.square_dyadic(given.shape)
    start = time.perf_counter()
    theirs = ksd(given, chain)
    seconds = time.perf_counter() - start
    dense = theirs.toarray()
    error = float(np.linalg.norm(dense - given) / np.linalg.norm(given))
    found["ksd"] = {"seconds": seconds, "error": error, "version": lazylinop.__version__}
    return found


GIVEN = [("dft", 1024), ("hadamard", 1024), ("dft", 4096), ("hadamard", 4096)]

# ------------------------------------------------------------------------------------------------------------- tables


def _cells() -> list[Cell]:
    made = [Cell(f"direct {name} {size}", partial(direct_cell, name, size)) for size in SIZES for name in DIRECT]
    made += [Cell(f"baseline {name} {size}", partial(baseline_cell, name, size)) for size in SIZES for name in TARGETS]
    made += [Cell(f"given {name} {size}", partial(given_cell, name, size)) for name, size in GIVEN]
    made += [
        Cell(
            f"descent {name} {size}",
            partial(descent_cell, name, size),
            seed,
            extra=seed > 0 or size > 64 or (name == "convolution" and size > 16),
        )
        for seed in range(SEEDS)
        for size in SECONDS
        for name in DIRECT
    ]
    return made


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    head = ("target", "how", *map(str, SIZES))
    rows = []
    for name in TARGETS:
        if name in DIRECT:
            rows.append(_row(done, name, f"from the matrix: {HOW[name][0]}", f"direct {name}", "rmse"))
            rows.append(_row(done, name, "descent, random starts", f"descent {name}", "rmse"))
        for kind in ("sparse", "low rank", "sparse + low rank"):
            rows.append(_row(done, name, kind, f"baseline {name}", kind))
    lines = [
        "## RMSE of an entry",
        "",
        "Success is an RMSE below 1e-4. Descent: seed 0; a dash marks sizes beyond those of the study on two cores.",
        "",
        *markdown(head, rows),
        "",
        "## Seconds, from the matrix",
        "",
        *markdown(
            ("target", *map(str, SIZES)),
            [(name, *_values(done, f"direct {name}", "seconds_fit", ".2f", SIZES)) for name in DIRECT],
        ),
        "",
        "## Descent",
        "",
        "Seconds, and starts that were needed (or tried, where the RMSE is above 1e-4), by seed.",
        "",
    ]
    descent = []
    for name in DIRECT:
        cells = []
        for size in SECONDS:
            found = of_name(done, CELLS, f"descent {name} {size}")
            told = [f"{f['rmse']:.0e}, {f['starts']}, {f['seconds_fit']:.0f} s" for f in found]
            cells.append("; ".join(told) or NOT_RUN)
        descent.append((name, *cells))
    lines += markdown(("target", *map(str, SECONDS)), descent)
    lines += ["", "## A given matrix, beside `ksd` of lazylinop", "", _GIVEN, ""]
    given = []
    for name, size in GIVEN:
        found = of_name(done, CELLS, f"given {name} {size}")
        if not found:
            given.append((f"{name} {size}", *[NOT_RUN] * 4))
            continue
        ours, theirs = found[0]["ours"], found[0]["ksd"]
        other = ("not installed", "—") if theirs is None else (f"{theirs['seconds']:.2f}", f"{theirs['error']:.1e}")
        given.append((f"{name} {size}", f"{ours['seconds']:.2f}", f"{ours['error']:.1e}", *other))
    lines += markdown(("matrix", "ours, s", "error", "ksd, s", "error"), given)
    return lines


_GIVEN = (
    "Relative errors in the Frobenius norm, two threads, one process, one after the other. Ours finds the bit reversal "
    "of the Fourier transform; `ksd` is given the matrix with its columns in that order, which takes it no time here."
)


def _row(done: Mapping[str, dict[str, Any]], name: str, how: str, cell: str, key: str) -> tuple[str, ...]:
    sizes = tuple(SECONDS) if cell.startswith("descent") else SIZES
    values = _values(done, cell, key, ".1e" if "baseline" not in cell else ".3g", sizes)
    return (name, how, *values, *["—"] * (len(SIZES) - len(sizes)))


def _values(done: Mapping[str, dict[str, Any]], cell: str, key: str, form: str, sizes: Sequence[int]) -> list[str]:
    found = [of_name(done, CELLS, f"{cell} {size}") for size in sizes]
    return [format(f[0][key], form) if f and f[0][key] != math.inf else "—" if f else NOT_RUN for f in found]


CELLS: Sequence[Cell] = _cells()
STUDY = Study("fast_algorithms", "Fast algorithms of linear transforms", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
