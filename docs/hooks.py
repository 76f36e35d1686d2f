"""What mkdocs does to the pages: what they say of the families is generated from the code when they are built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gen_families

import structmat as sm

TABLE = "<!-- the table of families -->"
CLASSES = "<!-- the classes of families -->"
"""Marks on a line of their own, in whose place the text goes."""


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Replace the marks; the name and the arguments are those that mkdocs calls."""
    if TABLE in markdown:
        markdown = markdown.replace(TABLE, gen_families.table())
    return markdown.replace(CLASSES, classes()) if CLASSES in markdown else markdown


def classes() -> str:
    """The documentation of the library's own families, as mkdocstrings is asked for it."""
    own = (f for f in sm.families().values() if f.__module__.startswith("structmat."))
    return "\n".join(f"::: {f.__module__}.{f.__name__}\n    options:\n      members: false\n" for f in own)
