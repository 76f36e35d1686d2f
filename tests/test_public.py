"""The public face: names, their types and docstrings, and what a typo gives."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing

import pytest

import structmat as sm

STABLE = {
    "StructmatError", "Structure", "StructuredMatrix", "families", "matmul", "nn", "program", "project", "structures",
    "testing", "__version__",
}  # fmt: skip
"""Names that users rely on: removing one is a breaking change."""

MOST = 40
"""A handful of names can be learned; families and submodules come on top."""


def test_the_public_names() -> None:
    names = set(dir(sm))
    assert names >= STABLE
    assert names >= set(sm.families())
    own = {n for n in names - set(sm.families()) if not inspect.ismodule(getattr(sm, n))}
    assert len(own) <= MOST, sorted(own)


@pytest.mark.parametrize("name", sorted(dir(sm)))
def test_every_name_can_be_used(name: str) -> None:
    value = getattr(sm, name)
    assert value is getattr(sm, name), "a name means the same each time"


def test_type_checkers_see_what_is_loaded_lazily() -> None:
    source = inspect.getsource(sm)
    static = source[source.index("if TYPE_CHECKING:") : source.index("__version__ =")]
    for name in sm._HOME:
        if name != "families" or "families" in static:
            assert f" as {name}" in static, f"{name} is loaded lazily but not declared for type checkers"


def test_a_typo_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="LowRnak"):
        _ = sm.LowRnak
    with pytest.raises(AttributeError, match="LowRnak"):
        _ = sm.structures.LowRnak
    with pytest.raises(ImportError, match="LowRnak"):
        exec("from structmat import LowRnak")


def modules() -> list[str]:
    found = ["structmat"]
    for info in pkgutil.walk_packages(sm.__path__, "structmat."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            found.append(info.name)
    return found


def public_callables(module_name: str) -> list[tuple[str, object]]:
    """Functions, classes and their methods that a module defines under public names."""
    module = importlib.import_module(module_name)
    found: list[tuple[str, object]] = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module_name:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            found.append((f"{module_name}.{name}", value))
    return found


@pytest.mark.parametrize("module", modules())
def test_modules_say_what_they_are_for(module: str) -> None:
    assert (importlib.import_module(module).__doc__ or "").strip()


@pytest.mark.parametrize("module", modules())
def test_public_functions_have_types_and_docstrings(module: str) -> None:
    missing = []
    for name, value in public_callables(module):
        assert inspect.isfunction(value) or inspect.isclass(value)
        # Dataclasses write a docstring of their own: the signature, which says nothing.
        text = (value.__doc__ or "").strip()
        if not text or text.startswith(f"{value.__name__}("):
            missing.append(f"{name} has no docstring")
        if inspect.isfunction(value):
            untyped = [
                p for p in inspect.signature(value).parameters.values() if p.annotation is inspect.Parameter.empty
            ]
            if untyped or inspect.signature(value).return_annotation is inspect.Signature.empty:
                missing.append(f"{name} is not fully typed")
    assert missing == []


def test_the_types_of_public_functions_can_be_resolved() -> None:
    for name in ("matmul", "project", "families"):
        hints = typing.get_type_hints(getattr(sm, name))
        assert "return" in hints
