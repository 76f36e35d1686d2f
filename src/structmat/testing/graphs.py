"""Checks of compiled and exported layers: ``torch.compile``, ``torch.export``, ONNX."""

from __future__ import annotations

import importlib.util
import io
import logging
import shutil

import torch
from torch import Tensor

from structmat.nn.linear import StructuredLinear
from structmat.testing.case import Case, SkippedCheckError, allowed_error, allowed_gradient_errors


def check_compile(case: Case) -> None:
    """``torch.compile(fullgraph=True)`` for a fixed and for a changing batch, forward and backward (``aot_eager``)."""
    _check_compiled(case, "aot_eager")


def check_inductor(case: Case) -> None:
    """The same through the code generator that runs in practice."""
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise SkippedCheckError("there is no C++ compiler for inductor")
    _check_compiled(case, "inductor")


def _check_compiled(case: Case, backend: str) -> None:
    for dynamic, batches in ((False, (4,)), (True, (4, 7))):
        layer = case.layer(torch.float64)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
        kind = "dynamic" if dynamic else "static"
        for batch in batches:
            x = case.rows(batch, dtype=torch.float64)
            _compare_with_eager(case, f"{backend}, {kind} batch {batch}", layer, compiled, x)
    torch._dynamo.reset()


def _compare_with_eager(case: Case, what: str, layer: StructuredLinear, compiled: object, x: Tensor) -> None:
    assert callable(compiled)
    weights = case.gaussian(x.shape[0], case.shape[0], dtype=torch.float64, draw=2)
    names = [name for name, _ in layer.named_parameters()]
    outcomes = []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        outcomes.append((y, torch.autograd.grad((y * weights).sum(), [leaf, *layer.parameters()])))
    (expected, expected_grads), (got, grads) = outcomes
    allowed = 2 * _allowed(layer, x)
    case.compare(f"the output compiled by {what}", got, expected, allowed)
    on_input, on_tensors = allowed_gradient_errors(layer.matrix.program, layer.tensors(), x, weights, torch.float64)
    on_tensors["bias"] = 4 * x.shape[0] * torch.finfo(torch.float64).eps * weights.abs().sum(0)
    limits = [on_input, *(on_tensors[name] for name in names)]
    for name, value, reference, limit in zip(["the input", *names], grads, expected_grads, limits, strict=True):
        case.compare(f"the gradient of {name} compiled by {what}", value, reference, limit)


def _allowed(layer: StructuredLinear, x: Tensor) -> Tensor:
    dtype = x.dtype
    error = allowed_error(layer.matrix.program, layer.tensors(), x, dtype)
    if layer.bias is not None:
        error = error + 4 * torch.finfo(dtype).eps * layer.bias.detach().abs().to(torch.float64)
    return error


def _dynamic_batch() -> dict[str, dict[int, object]]:
    return {"input": {0: torch.export.Dim("batch", min=2, max=1 << 20)}}


def check_export(case: Case) -> None:
    """``torch.export`` with a free batch, saved and loaded, gives the same outputs."""
    layer = case.layer(torch.float64).eval()
    x = case.rows(4, dtype=torch.float64)
    torch._dynamo.reset()
    exported = torch.export.export(layer, (x,), dynamic_shapes=_dynamic_batch())
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (4, 7):
        rows = case.rows(batch, dtype=torch.float64)
        allowed = 2 * _allowed(layer, rows)
        case.compare(f"the exported program, reloaded, at batch {batch}", loaded(rows), layer(rows), allowed)


def check_onnx(case: Case) -> None:
    """The ONNX model of a layer with a free batch gives, in onnxruntime, the same outputs up to float32 rounding."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise SkippedCheckError(f"{', '.join(missing)} not installed (pip install 'structmat[onnx]')")
    import onnxruntime

    layer = case.layer(torch.float32).eval()
    x = case.rows(4, dtype=torch.float32)
    torch._dynamo.reset()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        made = torch.onnx.export(layer, (x,), dynamo=True, verbose=False, dynamic_shapes=_dynamic_batch())
    finally:
        logger.setLevel(level)
    assert made is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = made.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for batch in (4, 7):
        rows = case.rows(batch, dtype=torch.float32)
        (y,) = session.run(None, {name: rows.numpy()})
        with torch.no_grad():
            case.compare(
                f"the ONNX model at batch {batch}", torch.from_numpy(y), layer(rows), 2 * _allowed(layer, rows)
            )
