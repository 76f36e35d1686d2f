"""structmat: structured linear maps in neural networks.

A structured matrix is a linear arithmetic circuit with learned constants. ``import structmat as sm`` gives the short
names below and every family (``sm.LowRank``, ``sm.Monarch``, ...). Names are loaded when first used, so that importing
the package is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structmat import circuit as circuit
    from structmat import displacement as displacement
    from structmat import learn as learn
    from structmat import nn as nn
    from structmat import transforms as transforms
    from structmat.compression.budget import Flops as Flops
    from structmat.compression.budget import Latency as Latency
    from structmat.compression.budget import Memory as Memory
    from structmat.compression.budget import Parameters as Parameters
    from structmat.compression.budget import Quality as Quality
    from structmat.compression.calibrate import calibrate as calibrate
    from structmat.compression.compress import Result as Result
    from structmat.compression.compress import compress as compress
    from structmat.compression.compress import compress_ as compress_
    from structmat.compression.distill import Distill as Distill
    from structmat.compression.inspection import inspect as inspect
    from structmat.compression.plan import Plan as Plan
    from structmat.compression.replace import freeze as freeze
    from structmat.compression.replace import to_dense as to_dense
    from structmat.compression.report import Report as Report
    from structmat.compression.scan import scan as scan
    from structmat.compression.to_kronecker import to_kronecker as to_kronecker
    from structmat.compression.tune import tune as tune
    from structmat.displacement.operators import displacement_rank as displacement_rank
    from structmat.errors import StructmatError as StructmatError
    from structmat.io import load as load
    from structmat.io import save as save
    from structmat.kernels.choice import backend as backend
    from structmat.learn.groups import parameter_groups as parameter_groups
    from structmat.matrix import StructuredMatrix as StructuredMatrix
    from structmat.matrix import matmul as matmul
    from structmat.projection.project import project as project
    from structmat.projection.rigidity import rigidity as rigidity
    from structmat.projection.robust import robust_pca as robust_pca
    from structmat.structure import Structure as Structure
    from structmat.structures.sum_of import SparsePlusLowRank as SparsePlusLowRank

__version__ = "0.1.0"

_HOME = {
    "Distill": "structmat.compression.distill",
    "Flops": "structmat.compression.budget",
    "Latency": "structmat.compression.budget",
    "Memory": "structmat.compression.budget",
    "Parameters": "structmat.compression.budget",
    "Plan": "structmat.compression.plan",
    "Quality": "structmat.compression.budget",
    "Report": "structmat.compression.report",
    "Result": "structmat.compression.compress",
    "StructmatError": "structmat.errors",
    "SparsePlusLowRank": "structmat.structures.sum_of",
    "Structure": "structmat.structure",
    "StructuredMatrix": "structmat.matrix",
    "backend": "structmat.kernels.choice",
    "calibrate": "structmat.compression.calibrate",
    "compress": "structmat.compression.compress",
    "compress_": "structmat.compression.compress",
    "matmul": "structmat.matrix",
    "displacement_rank": "structmat.displacement.operators",
    "families": "structmat.structures",
    "freeze": "structmat.compression.replace",
    "inspect": "structmat.compression.inspection",
    "load": "structmat.io",
    "parameter_groups": "structmat.learn.groups",
    "project": "structmat.projection.project",
    "rigidity": "structmat.projection.rigidity",
    "robust_pca": "structmat.projection.robust",
    "save": "structmat.io",
    "scan": "structmat.compression.scan",
    "to_dense": "structmat.compression.replace",
    "tune": "structmat.compression.tune",
    "to_kronecker": "structmat.compression.to_kronecker",
}
_MODULES = ("circuit", "displacement", "learn", "nn", "program", "structures", "testing", "transforms")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if not name.startswith("_"):
        structures = importlib.import_module("structmat.structures")
        if name in structures.families():
            return structures.families()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    structures = importlib.import_module("structmat.structures")
    return sorted({*_HOME, *_MODULES, *structures.families(), "__version__"})
