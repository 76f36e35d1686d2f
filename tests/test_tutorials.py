"""The tutorials run, show what they say, and the pictures in the documentation are what the code draws today."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
TUTORIALS = {path.stem: path for path in sorted((DOCS / "tutorials").glob("*.py"))}


def test_there_are_tutorials() -> None:
    assert {"convac_expressive_power", "convac_missing_pixels", "kronecker"} <= set(TUTORIALS)


def test_expressive_power_in_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runpy.run_path(str(TUTORIALS["convac_expressive_power"]))
    run["main"](tmp_path)
    drawn = (tmp_path / "convac_cut.svg").read_text(encoding="utf-8")
    assert drawn == (DOCS / "convac_cut.svg").read_text(encoding="utf-8"), "run the tutorial with the docs folder"
    printed = capsys.readouterr().out
    assert "square windows, left | right half of a 4 x 4 image: rank 2." in printed
    assert "mirror windows, left | right half of a 4 x 4 image: rank 16." in printed


def test_a_classifier_that_shrugs_at_missing_pixels() -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's: pip install structmat[demo]")
    found = runpy.run_path(str(TUTORIALS["convac_missing_pixels"]))["main"]()
    mixture, usual = zip(*found.values(), strict=True)
    assert mixture[0] > 90
    assert mixture[2] > 75, "half of the pixels are missing"
    assert mixture[2] > usual[2] + 20


def test_from_a_perceptron_to_a_kronecker_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's: pip install structmat[demo]")
    found = runpy.run_path(str(TUTORIALS["kronecker"]))["main"](tmp_path)
    drawn = (tmp_path / "kronecker_extended.svg").read_text(encoding="utf-8")
    shown = (DOCS / "kronecker_extended.svg").read_text(encoding="utf-8")
    assert drawn == shown, "run the tutorial with the docs folder"
    assert found["perceptron"] > 90
    assert found["fine-tuned"] > found["perceptron"] - 3
    assert found["fine-tuned"] >= found["converted"]
    assert found["from scratch"] > 88
    assert "2,378 parameters, 906 of them biases, not 19,210." in capsys.readouterr().out
