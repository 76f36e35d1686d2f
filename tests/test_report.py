"""The HTML report: complete, self-contained, escaped, and rendered in a real browser without error or overflow."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.compression.report_html import render, write_html
from structmat.compression.report_json import read_report
from structmat.compression.report_verdict import verdict
from structmat.errors import FormatError


class Deep(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))
        self.embedding_of_something_with_a_long_name = nn.Embedding(10, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    torch.manual_seed(0)
    data = [(torch.randn(16, 32), torch.arange(16) % 5) for _ in range(3)]
    result = sm.compress(
        Deep(),
        budget=sm.Parameters(0.4),
        calibration=data,
        structures=["LowRank", "BlockDiagonal"],
        recover=sm.Distill(steps=30, held_out=data[:1], check_every=5),
        evaluate=lambda m: {"agreement": 0.9, "loss": 1234.5},
    )
    return json.loads(json.dumps(result.report.to_json()))


def many_layers(values: dict[str, Any], copies: int = 40) -> dict[str, Any]:
    """As of a deep transformer: long names, long structures, more layers than are open at first."""
    large = copy.deepcopy(values)
    large["layers"] = [
        {**copy.deepcopy(layer), "name": f"model.decoder.layers.{i}.self_attention.{layer['name']}.projection"}
        for i in range(copies)
        for layer in values["layers"]
    ]
    large["layers"][0]["structure"] = "Sum(parts=(LowRank(rank=16), BlockDiagonal(blocks=4), Sparse(density=0.1)))"
    large["model"] = "AVeryLongNameOfAModelForConditionalGenerationWithEverything"
    return large


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Collector:
    collector = Collector()
    collector.feed(page)
    collector.close()
    assert not collector.open
    return collector


def test_page_is_well_formed_and_self_contained(values: dict[str, Any]) -> None:
    page = render(values)
    found = parsed(page)
    assert not {"script", "img", "iframe", "object", "embed"} & set(found.tags)
    for name, value in found.attributes:
        if name in ("src", "href", "srcset", "data"):
            assert value == "data:,"
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_page_says_everything(values: dict[str, Any]) -> None:
    page = render(values)
    for layer in values["layers"]:
        assert layer["name"] in page
        if layer["structure_json"]["family"] != "Dense":
            assert layer["structure"] in page
    for words in (
        "Where the budget went",
        "The network",
        "Quality against size",
        "Layer by layer",
        "Quality",
        "Milliseconds",
        "Left as they were",
    ):
        assert words in page
    assert values["environment"]["processor"] in page.replace("&amp;", "&")
    assert "embedding_of_something_with_a_long_name" in page
    assert "1234.5" in page
    assert "held out" in page
    # a card and a small multiple for each layer; the budget, two strips of time, the frontier and the training
    assert page.count("<svg") == 2 * len(values["layers"]) + 5


def test_verdict_is_honest(values: dict[str, Any]) -> None:
    def text(data: dict[str, Any]) -> str:
        return " | ".join(f"{r.tone}: {r.text}" for r in verdict(data))

    assert "good: The budget is kept" in text(values)
    bad = copy.deepcopy(values)
    bad["budget"]["spent"] = 2 * bad["budget"]["limit"]
    bad["exact"] = False
    bad["timings"] = [{"batch": 1, "layers_before": 1, "layers_after": 1, "model_before": 1.0, "model_after": 2.5}]
    for layer in bad["layers"]:
        layer["slower"] = True
    assert "bad: The budget is exceeded" in text(bad)
    assert "The budget is kept" not in text(bad)
    assert "bad: On this machine the whole model is <strong>2.50 times slower</strong> at batch size 1" in text(bad)
    assert re.search(r"bad: \d+ of \d+ replaced layers run slower", text(bad))
    assert "stopped before it could prove" in text(bad)
    silent = {**values, "quality": {}, "timings": []}
    assert "quality was not measured" in text(silent)
    assert "was not timed" in text(silent)
    parsed(render({**silent, "recovery": None, "calibration": None, "skipped": []}))


def test_everything_from_outside_is_escaped(values: dict[str, Any]) -> None:
    attack = "<script>alert(1)</script>\"'&"

    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poisoned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v, key) for v in value]
        if isinstance(value, str) and key not in ("certificate",):
            return value + attack
        return value

    page = render({**poisoned(values), "quality": {"before": {attack: 1.0}, "after": {attack: 0.5}}})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    parsed(page)


def test_what_is_no_report_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="version None"):
        render({})
    with pytest.raises(FormatError, match="version 2"):
        render({**values, "structmat_report": 2})
    with pytest.raises(FormatError, match="KeyError: 'layers'"):
        render({k: v for k, v in values.items() if k != "layers"})
    with pytest.raises(FormatError, match="damaged"):
        render({**values, "parameters": {"before": "<b>", "after": 1}})
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(FormatError, match="no report"):
        read_report(tmp_path / "list.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        read_report(tmp_path / "broken.json")
    with pytest.raises(FormatError, match="can't be read"):
        read_report(tmp_path / "nothing.json")


def test_round_trip_through_the_file(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(values))
    page = write_html(read_report(tmp_path / "report.json"), tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == render(values)


# ------------------------------------------------------------------------------------------------------- browser


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium on this machine: the page is not looked at in a browser")


PROBE = """<script>
window.onerror = (m) => { document.documentElement.dataset.error = m; };
addEventListener("load", () => {
  const root = document.documentElement, wide = [];
  for (const e of document.querySelectorAll("main *")) {
    const box = e.getBoundingClientRect();
    if (box.right > root.clientWidth + 1 && !e.closest(".scroll")) wide.push(e.tagName + "." + e.className);
  }
  root.dataset.overflow = root.scrollWidth - root.clientWidth;
  root.dataset.wide = wide.slice(0, 5).join(" ");
  root.dataset.width = root.clientWidth;
  root.dataset.paper = getComputedStyle(document.body).backgroundColor;
});
</script></head>"""


def look(page: str, folder: Path, width: int, *, dark: bool) -> dict[str, str]:
    """Render in a real browser inside a frame of exactly this width; what the probe and the console said."""
    (folder / "page.html").write_text(page.replace("</head>", PROBE, 1), encoding="utf-8")
    # Headless windows have a least width of about 500: a frame has any.
    (folder / "frame.html").write_text(
        f'<!DOCTYPE html><iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
        '<script>addEventListener("load", () => setTimeout(() => {'
        " const data = document.querySelector('iframe').contentDocument.documentElement.dataset;"
        " document.body.append(JSON.stringify(data)); }, 50));</script>",
        encoding="utf-8",
    )
    command = [
        chromium(),
        *(
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
        ),
        *("--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"),
        *("--enable-logging=stderr", f"--window-size={width + 40},1000", f"--user-data-dir={folder / 'profile'}"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *("--virtual-time-budget=2000", "--dump-dom", (folder / "frame.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "LANG": "C.UTF-8"})
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    found = re.search(r"(\{&quot;.*?\}|\{\".*?\})</body>", done.stdout, re.S)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return json.loads(found.group(1).replace("&quot;", '"'))  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [390, 1280])
def test_browser_renders_without_error_or_overflow(values: dict[str, Any], tmp_path: Path, width: int) -> None:
    papers = []
    for dark in (False, True):
        folder = tmp_path / str(dark)
        folder.mkdir()
        found = look(render(many_layers(values) if dark else values), folder, width, dark=dark)
        assert "error" not in found
        assert found["width"] == str(width)
        assert (found["overflow"], found["wide"]) == ("0", "")
        papers.append(found["paper"])
    assert papers == ["rgb(251, 250, 248)", "rgb(20, 22, 26)"]


def test_the_browser_test_can_fail(values: dict[str, Any], tmp_path: Path) -> None:
    broken = render(values).replace("<main>", '<main><div style="width:3000px">x</div>', 1)
    assert int(look(broken, tmp_path, 390, dark=False)["overflow"]) > 0
