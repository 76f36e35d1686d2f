"""Products with each family on the clock, beside other libraries that have the same structure.

    python -m benchmarks.peers                       all cells
    python -m benchmarks.peers run --only toeplitz
    python -m benchmarks.peers table                 the table again, from what is there

Peers, each where it is installed: `scipy.linalg.matmul_toeplitz`, PyTorch's FFT, `torch-structured` (its pure PyTorch
forms: its kernels need a GPU) and `lazylinop`; their versions are noted. None is a requirement of structmat; see
`benchmarks/requirements-peers.txt`. A cell is one structure, size and batch: all methods in one process, one after the
other in every round, and the median over the rounds. Ours is a frozen layer, as one deploys it. float32, and complex64
for the Fourier transform. Every method's result is compared with the dense product first; one that is off by more than
1e-3 is refused. Those that do the same product with another matrix of the structure are not compared. Left out:
`fwht` of lazylinop, which took 0.2 s and 4 s for 4 and 64 vectors of 1,024 numbers.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import structmat as sm
from benchmarks.study import NOT_RUN, Cell, Study, markdown
from structmat import transforms

SIZES, BATCHES = (1024, 4096), (1, 64, 1024)
ROUNDS, SECONDS = 40, 1.0
Call = Callable[[], Any]


def methods(kind: str, size: int, batch: int) -> dict[str, Call]:
    """Ours first, then the dense product, then the peers: calls without arguments."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.complex64 if kind == "dft" else torch.float32
    x = torch.randn(batch, size, generator=generator, dtype=dtype)
    given = member(kind, size, generator, dtype)
    layer = sm.nn.StructuredLinear(size, size, bias=False, structure=given.structure, dtype=dtype)
    pairs = {key: torch.view_as_real(t) if t.is_complex() else t for key, t in given.tensors.items()}
    layer.load_state_dict({**layer.state_dict(), **pairs})
    frozen = layer.eval().freeze()
    dense = given.to_dense()
    found: dict[str, Call] = {"ours": lambda: frozen(x), "dense": lambda: torch.nn.functional.linear(x, dense)}
    for name, make in PEERS.get(kind, {}).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[name] = make(given, dense, x)
            except (ImportError, OSError):
                continue
    return found


def member(kind: str, size: int, generator: torch.Generator, dtype: torch.dtype) -> sm.StructuredMatrix:
    if kind == "dft":
        return transforms.dft(size, dtype=dtype)
    if kind == "hadamard":
        return transforms.hadamard(size, dtype=dtype)
    return sm.StructuredMatrix.random(STRUCTURES[kind](size), (size, size), generator=generator, dtype=dtype)


STRUCTURES: Mapping[str, Callable[[int], sm.Structure]] = {
    "toeplitz": lambda n: sm.Toeplitz(),
    "circulant": lambda n: sm.Circulant(),
    "toeplitz-like": lambda n: sm.ToeplitzLike(4),
    "hankel-like": lambda n: sm.HankelLike(4),
    "LDR": lambda n: sm.LDRSubdiagonal(1),
    "low rank": lambda n: sm.LowRank(n // 32),
    "butterfly": lambda n: sm.Butterfly(),
    "monarch": lambda n: sm.Monarch(round(n**0.5)),
    "kaleidoscope": lambda n: sm.Kaleidoscope(),
    "fastfood": lambda n: sm.Fastfood(),
    "BLAST": lambda n: sm.BLAST(4, n // 16),
    "HODLR": lambda n: sm.HODLR(4, 4),
    "ACDC": lambda n: sm.ACDC(1),
}
KINDS = ("dft", "hadamard", *STRUCTURES)


def _scipy_toeplitz(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    pair, columns = (dense[:, 0].numpy(), dense[0].numpy()), x.numpy().T
    return lambda: scipy.linalg.matmul_toeplitz(pair, columns).T


def _torch_fft(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    return lambda: torch.fft.fft(x)


def _fft_circulant(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    spectrum = torch.fft.rfft(dense[:, 0])
    size = x.shape[-1]
    return lambda: torch.fft.irfft(torch.fft.rfft(x) * spectrum, size)


def _fft_toeplitz(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    size = x.shape[-1]
    column = torch.cat([dense[:, 0], dense.new_zeros(1), dense[0, 1:].flip(0)])
    spectrum = torch.fft.rfft(column)
    return lambda: torch.fft.irfft(torch.fft.rfft(x, 2 * size) * spectrum, 2 * size)[..., :size]


def _ts_circulant(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from torch_structured.structured.circulant import circulant_multiply  # type: ignore[import-not-found]

    column = dense[:, 0].contiguous()
    return lambda: circulant_multiply(column, x)


def _ts_toeplitz_like(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from torch_structured.structured.toeplitz import toeplitz_mult  # type: ignore[import-not-found]

    left, right = given.tensors["left"], given.tensors["right"]
    return lambda: toeplitz_mult(left, right, x)


def _ts_butterfly(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from torch_structured.butterfly import butterfly_multiply  # type: ignore[import-not-found]

    size = x.shape[-1]
    twiddle = torch.empty(1, 1, size.bit_length() - 1, size // 2, 2, 2)
    for stage in range(size.bit_length() - 1):  # (n / 2s, 2, 2, s) to pairs in order
        twiddle[0, 0, stage] = given.tensors[f"factor{stage}"].permute(0, 3, 1, 2).reshape(size // 2, 2, 2)
    return lambda: butterfly_multiply(twiddle, x[:, None], True)[:, 0]


def _ts_hadamard(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from torch_structured.structured.hadamard import hadamard_transform  # type: ignore[import-not-found]

    return lambda: hadamard_transform(x)


def _ts_monarch(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from torch_structured.monarch.blockdiag_butterfly_multiply import (  # type: ignore[import-not-found]
        blockdiag_butterfly_multiply,
    )

    first, second = given.tensors["right"], given.tensors["left"].permute(2, 0, 1).contiguous()
    return lambda: blockdiag_butterfly_multiply(x, first, second)


def _ts_fastfood(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from torch_structured.structured.fastfood import fastfood_multiply  # type: ignore[import-not-found]

    scales, gains, signs, order = (given.tensors[name] for name in ("scales", "gains", "signs", "order"))
    return lambda: fastfood_multiply(scales, gains, signs, order, x)


def _ts_subdiagonal(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from torch_structured.structured.krylov import subdiag_mult_conv  # type: ignore[import-not-found]

    below, beside = (given.tensors[f"{side}_operator"][:-1].contiguous() for side in ("left", "right"))
    return lambda: subdiag_mult_conv(below, beside, given.tensors["left"], given.tensors["right"], x)


def _lazy_chain(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from lazylinop.butterfly import ksm  # type: ignore[import-not-found]

    factors = [given.tensors[f"factor{i}"].numpy() for i in range(len(given.tensors))]
    operator = ksm([np.ascontiguousarray(f) for f in reversed(factors)])
    columns = np.ascontiguousarray(x.numpy().T)
    return lambda: (operator @ columns).T


def _lazy_fft(given: sm.StructuredMatrix, dense: Tensor, x: Tensor) -> Call:
    from lazylinop.signal import fft  # type: ignore[import-not-found]

    operator, columns = fft(x.shape[-1]), np.ascontiguousarray(x.numpy().T)
    return lambda: (operator @ columns).T


Peer = Callable[[sm.StructuredMatrix, Tensor, Tensor], Call]
PEERS: Mapping[str, Mapping[str, Peer]] = {
    "dft": {"PyTorch FFT": _torch_fft, "lazylinop": _lazy_fft},
    "hadamard": {"torch-structured": _ts_hadamard},
    "toeplitz": {"scipy matmul_toeplitz": _scipy_toeplitz, "by hand with torch.fft": _fft_toeplitz},
    "circulant": {"torch-structured": _ts_circulant, "by hand with torch.fft": _fft_circulant},
    "toeplitz-like": {"torch-structured": _ts_toeplitz_like},
    "butterfly": {"torch-structured": _ts_butterfly, "lazylinop": _lazy_chain},
    "monarch": {"torch-structured": _ts_monarch},
    "fastfood": {"torch-structured": _ts_fastfood},
    "LDR": {"torch-structured": _ts_subdiagonal},
}

UNCHECKED = {("toeplitz-like", "torch-structured"), ("dft", "lazylinop")}
"""The same work in another normalisation: timed, not compared."""


def cell(kind: str, size: int, batch: int, seed: int) -> dict[str, Any]:
    """Milliseconds of each method: medians of interleaved calls."""
    with torch.no_grad():
        calls = methods(kind, size, batch)
        wanted = torch.as_tensor(calls["dense"]())
        refused = {}
        for name, call in list(calls.items()):
            try:
                result = torch.as_tensor(np.asarray(call()))
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {error}"[:200]
                del calls[name]
                continue
            off = 9.0
            if result.shape == wanted.shape:
                off = float(torch.linalg.norm(result - wanted) / torch.linalg.norm(wanted))
            if off > 1e-3 and (kind, name) not in UNCHECKED:
                refused[name] = f"its result is off by {off:.1g}"
                del calls[name]
        times: dict[str, list[float]] = {name: [] for name in calls}
        begin = time.perf_counter()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            if time.perf_counter() - begin > SECONDS:
                break
    return {
        "milliseconds": {name: 1000 * statistics.median(own) for name, own in times.items()},
        "rounds": len(times["ours"]),
        "refused": refused,
        "peers": {p: _version(p) for p in ("scipy", "torch-structured", "lazylinop")},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _name(kind: str, size: int, batch: int) -> str:
    return f"{kind} {size} batch {batch}"


CELLS: Sequence[Cell] = [
    Cell(_name(kind, size, batch), partial(cell, kind, size, batch))
    for size in SIZES
    for kind in KINDS
    for batch in BATCHES
]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    rows, words = [], set()
    for own in CELLS:
        found = done.get(own.key)
        if found is None:
            rows.append((own.name, *[NOT_RUN] * 4))
            continue
        times = dict(found["milliseconds"])
        ours, dense = times.pop("ours"), times.pop("dense")
        peers = ", ".join(f"{name} {value:.3g}" for name, value in times.items()) or "—"
        best = f"{min(times.values()) / ours:.2f}" if times else "—"
        rows.append((own.name, f"{ours:.3g}", f"{dense:.3g} ({dense / ours:.1f})", peers, best))
        words |= {f"{own.name}: {name} was left out, {why}." for name, why in found["refused"].items()}
    head = ("structure, n, batch", "ours, ms", "dense, ms (by ours)", "peers, ms", "best peer by ours")
    note = "Medians in one process, all methods in turn. Above 1 in the last column: ours is faster."
    return [note, "", *markdown(head, rows), "", *sorted(words)]


STUDY = Study("peers", "Products beside other libraries", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
