"""The order of imports of the library, read from its source.

What counts: imports that run when a module is loaded, at its top level or inside ``try`` and ``if`` there. What does
not: imports under ``if TYPE_CHECKING`` (they never run) and inside functions (they run when called, and are how a lower
layer offers a convenience of a higher one without depending on it).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "structure", "sizes", "circuit", "places", "files", "processor", "modes"}),
    frozenset({"program"}),
    frozenset({"kernels"}),
    frozenset({"matrix"}),
    frozenset({"projection", "structures", "displacement", "polynomials", "chains", "transforms", "windows"}),
    frozenset({"nn"}),
    frozenset({"learn", "compression", "testing", "io", "file_format", "benchmark"}),
    frozenset({"integrations", "cli", "inspect", "plot", "__main__"}),
)
"""From the lowest to the highest; a module may import its own layer and those below."""


def level(part: str) -> int:
    """The number of a top-level module's layer."""
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def loaded_imports(tree: ast.Module) -> Iterator[str]:
    """Full names of what a module imports when it is loaded."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            assert node.module is not None
            # `from structmat import nn` names a module by its alias.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                pending += node.body
            pending += node.orelse
        elif isinstance(node, ast.Try):
            pending += [*node.body, *node.orelse, *node.finalbody]
            pending += [statement for handler in node.handlers for statement in handler.body]
        elif isinstance(node, ast.ClassDef | ast.With):
            pending += node.body


def violations(package: Path) -> list[str]:
    """One line for each import that points upwards, and each top-level module that belongs to no layer."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).with_suffix("").parts
        if inside == ("__init__",):
            continue
        own = inside[0]
        if not any(own in layer for layer in LAYERS):
            found.append(f"{path.relative_to(package)}: {own} belongs to no layer")
            continue
        for name in loaded_imports(ast.parse(path.read_text(encoding="utf-8"))):
            head, *rest = name.split(".")
            if head != "structmat" or not rest:
                continue
            other = rest[0]
            known = any(other in layer for layer in LAYERS)
            if known and level(other) > level(own):
                found.append(f"{path.relative_to(package)} imports {name}, of a higher layer")
    return found
