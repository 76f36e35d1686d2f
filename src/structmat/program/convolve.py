"""Products with Toeplitz, Hankel and f-circulant blocks in PyTorch operations: how a ``Convolution`` runs.

Every block is a Toeplitz matrix of ``height + width - 1`` diagonals. Its product is a part of a cyclic convolution of
any length from there on, so transforms have a length they are fast for, and a twist costs nothing: it is put into the
diagonals. Nothing is ever divided by a power of the twist, as in the textbook's scaling of an f-circulant matrix to a
circulant one, so that all twists are equally stable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from structmat.modes import is_followed
from structmat.program.toeplitz import Convolution

_AT_ONCE = 1 << 19
"""Numbers of a part of the batch that is transformed at once where no gradients are recorded: what lies between the
transforms stays in the cache (at n = 4096 and 1024 rows this takes a quarter of the time of the whole at once)."""


def convolve(stage: Convolution, weight: Tensor, x: Tensor) -> Tensor:
    """Rows (batch, in_features) to (batch, out_features)."""
    if not stage.transform or x.shape[0] == 0:  # MKL refuses to transform an empty batch
        return x @ convolution_matrix(stage, weight).T
    dtype = torch.promote_types(x.dtype, weight.dtype)
    wide = torch.promote_types(dtype, torch.float32)  # half precision has no transforms on the CPU
    values = _kept_spectrum(stage, weight, wide)
    blocks, width = (stage.outputs, stage.height) if stage.transposed else (stage.inputs, stage.width)
    rows = x.reshape(x.shape[0], blocks, width)
    step = rows_at_once(stage)
    if not _may_write(x, weight) or x.shape[0] <= step:
        return _transformed(stage, rows.to(wide), values).flatten(1).to(dtype)
    result = x.new_empty(x.shape[0], stage.out_features, dtype=dtype)
    for begin in range(0, x.shape[0], step):
        part = _transformed(stage, rows[begin : begin + step].to(wide), values)
        result[begin : begin + step] = part.flatten(1)
    return result


def rows_at_once(stage: Convolution) -> int:
    """How many rows are transformed at once where no gradients are recorded."""
    return max(1, _AT_ONCE // (stage.length * max(stage.inputs, stage.outputs)))


_KEPT = WeakTensorKeyDictionary()
"""Spectra of weights that are not trained, with the version of the weight that they are of."""


def _kept_spectrum(stage: Convolution, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The spectrum of the weight: of one that learns nothing, as those of frozen layers, it is computed once.

    A change in place raises the weight's version, so that the spectrum is computed anew.
    """
    if weight.requires_grad or weight.is_inference() or is_followed():
        return spectrum(stage, weight.to(dtype))
    kept = _KEPT.get(weight)
    if kept is None or kept[0] != weight._version or kept[1] != (stage, dtype):
        kept = weight._version, (stage, dtype), spectrum(stage, weight.to(dtype))
        _KEPT[weight] = kept
    found: Tensor = kept[2]
    return found


def _may_write(x: Tensor, weight: Tensor) -> bool:
    """Whether results may be put together in place: nothing records or transforms the operations."""
    if is_followed():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def convolution_matrix(stage: Convolution, weight: Tensor) -> Tensor:
    """The stage's matrix (out_features, in_features)."""
    height, width = stage.height, stage.width
    i, j = torch.arange(height, device=weight.device)[:, None], torch.arange(width, device=weight.device)
    place = i + j if stage.hankel else i - j + width - 1
    blocks = diagonals(stage, weight).index_select(-1, place.flatten())
    matrix = blocks.reshape(stage.outputs, stage.inputs, height, width).transpose(1, 2)
    matrix = matrix.reshape(stage.outputs * height, stage.inputs * width)
    return matrix.T if stage.transposed else matrix


def diagonals(stage: Convolution, weight: Tensor) -> Tensor:
    """The entries (outputs, inputs, height + width - 1) of every block: on the diagonals ``i - j`` from the upper right
    corner on, or on the antidiagonals ``i + j``."""
    weight = weight.reshape(stage.outputs, stage.inputs, stage.entries)
    if stage.twist is None:
        return weight
    height, width, period = stage.height, stage.width, stage.period
    twisted = weight if stage.twist == 1.0 else stage.twist * weight
    if stage.hankel:
        wrapped = max(0, height + width - 1 - period)
        return torch.cat([weight[..., : height + width - 1 - wrapped], twisted[..., :wrapped]], -1)
    return torch.cat([twisted[..., period - width + 1 :], weight[..., :height]], -1)


def spectrum(stage: Convolution, weight: Tensor) -> Tensor:
    """Transforms (blocks out, blocks in, frequencies) of the effective weights."""
    if stage.is_circular:
        weight = weight.reshape(stage.outputs, stage.inputs, stage.period)
        if stage.transposed and not stage.hankel:
            weight = weight.flip(-1).roll(1, -1)
    else:
        weight = diagonals(stage, weight)
        if stage.transposed and not stage.hankel:
            weight = weight.flip(-1)
    if stage.transposed:
        weight = weight.transpose(0, 1)
    return _transform(weight, stage.length)


def _transformed(stage: Convolution, x: Tensor, weights: Tensor) -> Tensor:
    """``x`` (batch, blocks in, width), of the dtype of the weight, to (batch, blocks out, height)."""
    values = _transform(x.conj(), stage.length).conj() if stage.hankel else _transform(x, stage.length)
    if weights.shape[1] == 1:
        product = values * weights[:, 0]
    elif weights.shape[0] == 1:
        product = (values * weights[0]).sum(1, keepdim=True)
    else:
        product = torch.einsum("zcf,bcf->zbf", values, weights)
    result = torch.fft.ifft(product) if x.is_complex() else torch.fft.irfft(product, stage.length)
    cropped: Tensor = result[..., kept_places(stage)]
    return cropped


def kept_places(stage: Convolution) -> slice:
    """Where in the cyclic convolution a block's outputs lie."""
    kept, read = (stage.width, stage.height) if stage.transposed else (stage.height, stage.width)
    before = 0 if stage.hankel or stage.is_circular else read - 1
    return slice(before, before + kept)


def _transform(x: Tensor, length: int) -> Tensor:
    result: Tensor = torch.fft.fft(x, length) if x.is_complex() else torch.fft.rfft(x, length)
    return result
