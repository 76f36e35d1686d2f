"""What mkdocs does to the pages when it builds them: what they say of the families is generated from the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gen_families
import gen_wishes

import structmat as sm

TABLE = "<!-- the table of families -->"
WISHES = "<!-- the table of wishes -->"
CLASSES = "<!-- the classes of families -->"
"""Marks on a line of their own, in whose place the text goes."""

FIGURES = re.compile(r"^<!-- the figures of (\w+) -->$", re.MULTILINE)
"""The same for what a study wrote; its pictures lie beside the page."""

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Replace the marks; the name and the arguments are those that mkdocs calls."""
    if TABLE in markdown:
        markdown = markdown.replace(TABLE, gen_families.table())
    if WISHES in markdown:
        markdown = markdown.replace(WISHES, gen_wishes.table())
    several = len(FIGURES.findall(markdown)) > 1
    markdown = FIGURES.sub(lambda mark: figures(mark[1], deeper=several), markdown)
    return markdown.replace(CLASSES, classes()) if CLASSES in markdown else markdown


def figures(study: str, *, deeper: bool = False) -> str:
    """The tables of a study without their title, which the page has; ``deeper``: as a part of a page."""
    text = (RESULTS / f"{study}.md").read_text(encoding="utf-8").partition("\n")[2].lstrip()
    return re.sub("^##", "###", text, flags=re.MULTILINE) if deeper else text


def on_page_content(html: str, **page: Any) -> str:
    """Roles of docstrings, ``:func:`name```, as code, and as a link where the name is whole."""
    return re.sub(r":(?:attr|class|func|meth|mod|obj):<code>(~?)([\w.]+)</code>", _reference, html)


def _reference(role: re.Match[str]) -> str:
    short, name = role[1], role[2]
    code = f"<code>{name.rpartition('.')[2] if short else name}</code>"
    # mkdocstrings turns it into a link if the name is documented.
    return f'<autoref optional identifier="{name}">{code}</autoref>' if "." in name else code


def classes() -> str:
    """The documentation of the library's own families, as mkdocstrings is asked for it."""
    own = (f for f in sm.families().values() if f.__module__.startswith("structmat."))
    return "\n".join(f"::: {f.__module__}.{f.__name__}\n    options:\n      members: false\n" for f in own)
