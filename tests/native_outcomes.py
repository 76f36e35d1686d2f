"""What the native backend makes of a program, against the reference."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from structmat.kernels import native, operator
from structmat.kernels.text import Text, text_of
from structmat.program import Program, reference

here = native()
needs_native = pytest.mark.skipif(not here.available, reason=f"no native library: {here.reason}")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def assert_equal(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None = None) -> None:
    """The native outcome is the float64 reference, to the rounding of the dtype."""
    text = text_of(program)
    assert isinstance(text, Text), text
    given, words = operator.arguments(text, tensors, bias), text.plain if bias is None else text.biased
    x = x if operator.is_by_rows(x) else x.contiguous()
    found = operator.run(x, given, words)
    if x.dim() == 2 and len(x) >= operator.FEW_ROWS:  # the other layout of the input, of the outcome, or of both
        columns = x.T.contiguous().T
        into = torch.full((program.out_features + 1, 2 * len(x)), torch.nan, dtype=x.dtype)
        y = into[1:, : len(x)].T
        if operator.is_by_features(columns) and operator.is_by_features(y):
            assert torch.equal(operator.run(columns, given, words), found)
            for source in (x, columns):
                operator.run_into(source, given, words, y.fill_(torch.nan))
                assert torch.equal(y, found)
            assert into[0].isnan().all()
            assert into[:, len(x) :].isnan().all()
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    wanted = reference.apply(program, wide, x.double())
    if bias is not None:
        wanted = wanted + bias.double()
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    if found.numel():
        size = float(wanted.abs().max())
        assert float((found.double() - wanted).abs().max()) <= TOLERANCE[x.dtype] * max(size, 1e-3), program
