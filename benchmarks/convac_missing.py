"""A generative ConvAC on MNIST under missing pixels and rectangles, beside imputation and nearest neighbors.

    python -m benchmarks.convac_missing               3 epochs, one seed, and the baselines
    python -m benchmarks.convac_missing --all         20 epochs and 25,000 steps, three seeds
    python -m benchmarks.convac_missing table

One model, trained once on images of which a random share of the pixels is integrated out, is tested under every mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import convac_models as models
from benchmarks.convac_data import PROBABILITIES, RECTANGLES, Images, mnist
from benchmarks.files import RESULTS
from benchmarks.study import NOT_RUN, Cell, Study, curve_svg, markdown, of_name, save, spread

PIXELS = [f"p={p:g}" for p in PROBABILITIES]
MASKS = PIXELS + [f"{n} of {w}" for n, w in RECTANGLES]

DRAWN = (
    "deep mixture, 3 epochs", "deep mixture, 25000 steps, locations too", "shallow mixture, 3 epochs",
    "5 nearest neighbors", "ConvNet, missing = mean", "ConvNet, missing = background",
)  # fmt: skip
"""The curves of the picture, beside the published one."""

SPECIFIED = {
    "deep mixture, 3 epochs": (
        97.97, 97.95, 97.56, 95.40, 85.43, 69.01, 31.58, 97.25, 94.66, 86.33, 96.63, 89.79, 72.02, 95.88, 83.82, 60.54,
    ),
    "shallow mixture, 3 epochs": (93.6, 93.7, 92.8, 88.2, 73.2, 59.4, 28.7),
    "ConvNet, missing = background": (
        98.8, 96.5, 77.5, 37.6, 17.8, 14.1, 12.1, 93.2, 75.9, 48.5, 86.3, 56.9, 26.8, 78.7, 42.8, 21.5,
    ),
    "ConvNet, missing = mean": (
        98.8, 97.8, 83.0, 39.0, 17.0, 13.5, 11.0, 97.0, 88.5, 66.0, 94.3, 72.9, 38.8, 90.5, 58.2, 26.5,
    ),
    "5 nearest neighbors": (
        94.0, 93.8, 92.8, 90.3, 80.0, 63.4, 27.1, 92.4, 90.3, 83.2, 92.0, 85.2, 69.1, 91.7, 82.5, 58.0,
    ),
}  # fmt: skip
"""Single runs of an independent implementation, for comparison."""

PUBLISHED = (None, 98.9, 98.6, 97.2, 89.0, 74.0, 31.3)
"""ConvNets trained at the very rate that they are tested at (Sharir, Tamari, Cohen and Shashua, arXiv 1610.04167)."""


PUBLISHED_SETTINGS = {"how": "Nadam 0.975", "missing": 0.5}
"""Optimizer and marginalised share of Sharir, Tamari, Cohen and Shashua."""


def train_and_test(
    kind: str, steps: int | None, count: float, seed: int, *, published: bool = False, hidden: bool = False
) -> dict[str, Any]:
    """With the library's default settings, or the published ones: ``hidden`` integrates out locations as well."""
    train, test = mnist("train"), mnist("test")
    model, cut = models.mixture(train, kind, seed, hidden=hidden)
    steps = models.epochs(train, count) if steps is None else steps
    settings: dict[str, Any] = PUBLISHED_SETTINGS if published else {}
    generative = 0.01 if kind == "deep" else 0.1
    losses = models.train_mixture(model, cut, train, steps, seed, generative=generative, **settings)
    figures = models.mixture_figures(model, cut, test, seed)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"steps": steps, "parameters": parameters, "last_loss": losses[-1], **figures}


SHORT = 300
"""Steps of the comparison of training settings."""

SETTINGS = tuple((how, drawn) for drawn in (False, True) for how in models.OPTIMIZERS)
"""(optimizer, whether the share of marginalised pixels is drawn for each image)."""


def setting_name(how: str, drawn: bool) -> str:
    return f"setting, {how}, {'drawn rates' if drawn else 'one half'}"


def try_setting(how: str, drawn: bool, seed: int) -> dict[str, Any]:
    """A short training, and the first 2,000 test images."""
    train, test = mnist("train"), mnist("test")
    model, cut = models.mixture(train, "deep", seed)
    losses = models.train_mixture(model, cut, train, SHORT, seed, how=how, missing=None if drawn else 0.5)
    figures = models.mixture_figures(model, cut, Images(test.x[:2000], test.y[:2000]), seed, PIXELS)
    return {"steps": SHORT, "last_loss": losses[-1], **figures}


def convnet(how: str, seed: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(seed)
    train, test = mnist("train"), mnist("test")
    model, steps = models.convnet(), models.epochs(train, 3)
    models.train_classifier(model, lambda x: x, train, steps, seed)
    return {"steps": steps, **models.imputed_figures(model, train, test, how, seed)}


def neighbors(seed: int) -> dict[str, Any]:
    train, test = mnist("train"), mnist("test")
    first = Images(train.x[:20_000], train.y[:20_000])
    return models.neighbor_figures(first, Images(test.x[:2000], test.y[:2000]), seed)


def _cells() -> list[Cell]:
    found = [
        Cell("deep mixture, 3 epochs", lambda seed: train_and_test("deep", None, 3, seed)),
        Cell("shallow mixture, 3 epochs", lambda seed: train_and_test("shallow", None, 3, seed)),
        Cell("ConvNet, missing = background", lambda seed: convnet("background", seed)),
        Cell("ConvNet, missing = mean", lambda seed: convnet("mean", seed)),
        Cell("5 nearest neighbors", neighbors),
    ]
    for seed in range(3):
        for how, drawn in SETTINGS:
            run = lambda s, how=how, drawn=drawn: try_setting(how, drawn, s)  # noqa: E731
            found.append(Cell(setting_name(how, drawn), run, seed, extra=True))
    for seed in range(3):
        if seed:
            found += [Cell(c.name, c.run, seed, extra=True) for c in found[:2]]
        found.append(
            Cell("deep mixture, 20 epochs", lambda seed: train_and_test("deep", None, 20, seed), seed, extra=True)
        )
    published = "deep mixture, 25000 steps, published settings"
    long = {
        "deep mixture, 25000 steps": lambda s: train_and_test("deep", 25_000, 0, s),
        "deep mixture, 25000 steps, locations too": lambda s: train_and_test("deep", 25_000, 0, s, hidden=True),
        "deep mixture, 3 epochs, published settings": lambda s: train_and_test("deep", None, 3, s, published=True),
        published: lambda s: train_and_test("deep", 25_000, 0, s, published=True, hidden=True),
    }
    return found + [Cell(name, run, extra=True) for name, run in long.items()]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name in dict.fromkeys(cell.name for cell in CELLS if not cell.name.startswith("setting")):
        found = of_name(done, CELLS, name)
        cells = [spread([f["accuracy"][mask] for f in found]) for mask in MASKS] if found else [NOT_RUN] * len(MASKS)
        rows.append((name, *cells))
        if name in SPECIFIED:
            given = [f"{v:g}" for v in SPECIFIED[name]]
            rows.append(("*the same, elsewhere*", *given, *[""] * (len(MASKS) - len(given))))
    published = ["" if v is None else f"{v:g}" for v in PUBLISHED]
    rows.append(("*published ConvNets, one for each rate*", *published, *[""] * (len(MASKS) - len(published))))
    head = ("accuracy in per cent", *(m.replace("p=0", "none missing") if m == "p=0" else m for m in MASKS))
    lines = markdown(head, rows)
    curves = {}
    for name in DRAWN:
        found = of_name(done, CELLS, name)
        if found:
            curves[name] = [(p, sum(f["accuracy"][f"p={p:g}"] for f in found) / len(found)) for p in PROBABILITIES]
    if curves:
        curves["published, one ConvNet a rate"] = [
            (p, v) for p, v in zip(PROBABILITIES, PUBLISHED, strict=True) if v is not None
        ]
        picture = curve_svg(curves, "share of missing pixels", "test accuracy in %", logarithmic=False)
        save(RESULTS, "convac_missing.svg", picture)
        lines += ["", "![Accuracy by the share of missing pixels](convac_missing.svg)"]
    deep = of_name(done, CELLS, "deep mixture, 3 epochs")
    if deep:
        lines += ["", "Mean log-likelihood of what is observed, deep mixture, 3 epochs (nats):", ""]
        values = [spread([f["log_likelihood"][m] for f in deep], ".0f") for m in MASKS]
        lines += markdown(MASKS, [values])
    rows = []
    for how, drawn in SETTINGS:
        found = of_name(done, CELLS, setting_name(how, drawn))
        cells = [spread([f["accuracy"][p] for f in found], ".1f") if found else NOT_RUN for p in PIXELS]
        rows.append((how, "drawn for each image" if drawn else "one half", *cells))
    words = f"Training settings: {SHORT} steps, deep mixture, the first 2,000 test images. Rate 0.03 throughout."
    lines += ["", "## Training settings", "", words, ""]
    lines += markdown(("optimizer, first beta", "pixels marginalised", *PIXELS), rows)
    note = "Columns p: each pixel missing with that probability. Columns `n of w`: n missing squares of width w."
    return [note, "Nearest neighbors: 20,000 training images and the first 2,000 test images.", "", *lines]


CELLS = _cells()
STUDY = Study("convac_missing", "MNIST under missing pixels and rectangles", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()
