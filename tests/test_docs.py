"""The documentation keeps its word: its Python runs, what it says that is printed is printed, its links lead somewhere.

A page's blocks run in order in one namespace, in an empty folder. Comments in the Markdown say what is special:
``<!-- not executed -->`` above a block leaves it out; ``<!-- output -->`` above a block that is not Python says that it
is what the Python block before it prints, to the letter. A block with a ``title`` is a file of that name.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from torch import nn

import structmat as sm
from structmat.cli import app
from structmat.program import build, stages

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import hooks  # noqa: E402

PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
INSTALLED = "own-family.md"
"""The page whose files make a package: it runs in a process of its own, with the package in place."""

MOST_SKIPPED = 1
"""Blocks that may be left out on all pages together."""

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: where its text begins, its language, the file that it is, and the comment above it."""

    line: int
    language: str
    title: str | None
    mark: str | None
    text: str


def blocks(markdown: str) -> list[Block]:
    return [
        Block(markdown[: found.start("text")].count("\n") + 1, found["language"], *found.group("title", "mark", "text"))
        for found in FENCE.finditer(markdown)
    ]


def name(page: Path) -> str:
    return page.name


def execute(page: Path, namespace: dict[str, Any]) -> int:
    """Run a page's blocks in the current folder; how many ran."""
    printed, count = "", 0
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}, line {block.line}"
        if block.mark == "output":
            assert printed == block.text, f"{where}: printed was\n{printed}"
        elif block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python" and block.mark != "not executed":
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                # Line numbers of the page, so that a traceback points into it.
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
            printed, count = stream.getvalue(), count + 1
    return count


def given() -> dict[str, Any]:
    """What the README takes for granted: a model, its architecture, batches, a weight and a second moment."""

    def build_my_model() -> nn.Module:
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))

    x = torch.randn(96, 24)
    return {
        "model": build_my_model(),
        "batches": list(x.split(32)),
        "W": torch.randn(32, 24),
        "C": x.T @ x / len(x),
        "build_my_model": build_my_model,
    }


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != INSTALLED], ids=name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sklearn" in page.read_text(encoding="utf-8"):
        pytest.importorskip("sklearn", reason="this page needs scikit-learn: pip install structmat[demo]")
    monkeypatch.chdir(tmp_path)
    execute(page, given() if page.name in ("README.md", "index.md") else {})


def test_a_family_of_ones_own_in_a_package(tmp_path: Path) -> None:
    """The page's files, and what pip makes of its pyproject.toml, in a folder that Python searches."""
    page = DOCS / INSTALLED
    project = tomllib.loads(next(b.text for b in blocks(page.read_text(encoding="utf-8")) if b.language == "toml"))
    points = [
        line
        for group, members in project["project"]["entry-points"].items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in members.items()))
    ]
    facts = f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: {project['project']['version']}\n"
    info = tmp_path / f"{project['project']['name'].replace('-', '_')}-{project['project']['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(facts, encoding="utf-8")
    (info / "entry_points.txt").write_text("\n".join(points) + "\n", encoding="utf-8")
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.title is not None:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    program = (
        "import sys, pathlib\nsys.path.insert(0, sys.argv[1])\nimport test_docs\n"
        "sys.exit(test_docs.execute(pathlib.Path(sys.argv[2]), {}) < 3)"
    )
    paths = [str(tmp_path), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program, str(ROOT / "tests"), str(page)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_marks_are_known_and_few_blocks_are_left_out() -> None:
    marks = []
    for page in PAGES:
        markdown = page.read_text(encoding="utf-8")
        found = blocks(markdown)
        assert len(found) == len(re.findall("^```", markdown, re.MULTILINE)) // 2, (
            f"a fence of {page.name} is not found"
        )
        marks += [block.mark for block in found]
    assert set(marks) <= {None, "not executed", "output"}
    assert marks.count("not executed") <= MOST_SKIPPED


def test_a_wrong_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"line 7: printed was\n\s*1"):
        execute(page, {})
    page.write_text("text\n\n```python\n1 / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        execute(page, {})


# ------------------------------------------------------------------------------------------------ families, links


@pytest.mark.parametrize("page", ["README.md", "docs/structures.md"])
def test_every_family_is_named(page: str) -> None:
    markdown = hooks.on_page_markdown((ROOT / page).read_text(encoding="utf-8"))
    own = [f for f in sm.families().values() if f.__module__.startswith("structmat.")]
    rows = [line.split("|")[1] for line in markdown.splitlines() if line.startswith("| `")]
    for family in own:
        assert any(re.search(rf"`{family.__name__}\b", row) for row in rows), f"{page} lacks {family.__name__}"


def test_every_public_name_is_documented() -> None:
    markdown = hooks.on_page_markdown((DOCS / "api.md").read_text(encoding="utf-8"))
    documented = {line.rpartition(".")[2] for line in markdown.splitlines() if line.startswith("::: ")}
    modules = {name for name in dir(sm) if isinstance(getattr(sm, name), types.ModuleType)}
    assert set(dir(sm)) - modules - {"__version__", "StructmatError"} <= documented


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as mkdocs makes them."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for found in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = found["target"].partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {found['target']}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {found['target']}; there are {anchors(target)}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f": {page.name}\n" in navigation


def test_the_picture_is_drawn_from_the_code(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib: pip install structmat[plot]")
    import make_picture

    make_picture.picture(tmp_path / "picture.svg")
    drawn, kept = ((folder / "picture.svg").read_text(encoding="utf-8") for folder in (tmp_path, DOCS))
    count = sum(1 + len(stages(build(s, make_picture.SHAPE))) for pair in make_picture.SHOWN for s in pair)
    assert drawn.count("<image") == kept.count("<image") == count


def test_pictures_of_studies_are_those_of_their_figures() -> None:
    shown = [name for page in PAGES for name in hooks.FIGURES.findall(page.read_text(encoding="utf-8"))]
    assert shown
    for name in shown:
        text = hooks.figures(name)
        assert not text.startswith("# ")
        for picture in re.findall(r"]\((\S+\.svg)\)", text):
            drawn, kept = ((folder / picture).read_text(encoding="utf-8") for folder in (hooks.RESULTS, DOCS))
            assert drawn == kept, picture


# --------------------------------------------------------------------------------------------------- command line


def options() -> dict[str, set[str]]:
    """Every option of every command."""
    group = typer.main.get_command(app)
    commands: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    return {
        command: {"--help", *(o for parameter in commands[command].params for o in parameter.opts if o[:2] == "--")}
        for command in commands
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_that_are_written_exist(page: Path) -> None:
    known = options()
    for line in re.findall(r"structmat ((?:[a-z]+ )[^\n`#]*)", page.read_text(encoding="utf-8").replace("\\\n", " ")):
        command, *words = line.split()
        if command in known:
            for option in (word.split("=")[0] for word in words if word.startswith("--")):
                assert option in known[command], f"{page.name}: structmat {line}"


def test_the_page_of_commands_is_complete() -> None:
    markdown = (DOCS / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## structmat (\w+)\n(.*?)(?=^## |\Z)", markdown, re.MULTILINE | re.DOTALL))
    known = options()
    assert set(sections) == set(known)
    for command, text in sections.items():
        named = set(re.findall(r"`(--[a-z-]+)", text))
        assert named == known[command] - {"--help"}, command
