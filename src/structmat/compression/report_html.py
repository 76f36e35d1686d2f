"""The report as one self-contained HTML page that a person likes to read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from structmat.compression import report_charts as charts
from structmat.compression.report import VERSION, Report
from structmat.compression.report_charts import figure, milliseconds, number, percent
from structmat.compression.report_json import family, ratio, refusing_damage
from structmat.compression.report_verdict import Tone, signed, speed, verdict
from structmat.errors import FormatError
from structmat.files import write_text
from structmat.learn.pictures import film_strip
from structmat.learn.windows import Snapshot

_MULTIPLES = 48
"""Small multiples that are open at first; more fold away."""

_FILM_CELLS = 12
"""Squares along each side of a frame of moving windows."""

_CARDS = 120
"""Layers of the drawing of the network, likewise."""


def write_html(report: Report | Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the page of a report; the file appears whole or not at all. Raises as :func:`render`."""
    page = render(report)
    write_text(Path(path), page)
    return Path(path)


def render(report: Report | Mapping[str, Any]) -> str:
    """The page: one string of HTML with its styles and drawings inside, no script, nothing loaded from elsewhere.

    Args:
        report: the report, or the values of its ``report.json``. Every text in it is escaped.

    Raises:
        FormatError: it is no report, is of a newer version, or a field is missing or of the wrong kind.
    """
    data: Mapping[str, Any] = report.to_json() if isinstance(report, Report) else report
    version = data.get("structmat_report")
    if version != VERSION:
        raise FormatError(f"This is a report of version {version!r}; this structmat draws version {VERSION}.")
    with refusing_damage():
        return _page(data)


def _families(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """ "Dense" first, then the chosen families by the parameters they hold, then those that were only tried."""
    held: dict[str, float] = {}
    for layer in layers:
        held[family(layer)] = held.get(family(layer), 0.0) + float(layer["parameters"])
    tried = dict.fromkeys(family(c) for layer in layers for c in layer["candidates"])
    names = [*sorted(held, key=lambda n: -held[n]), *sorted(n for n in tried if n not in held)]
    return ["Dense", *(name for name in names if name != "Dense")]


def _page(data: Mapping[str, Any]) -> str:
    layers = data["layers"]
    names = _families(layers)
    colours = {name: index for index, name in enumerate(names)}
    share = float(data["parameters"]["after"]) / float(data["parameters"]["before"])
    title = f"{data['model']} at {100 * share:.0f} % of its parameters"
    sections = [
        _head(data, title),
        _tiles(data),
        _section("Where the budget went", _budget_lead(layers, names), _budget(layers, names, colours, share)),
        _section(
            "The network",
            "From input to output: each matrix (sides by the square root of its sizes), filled by what is kept; below "
            "the dense layer&#8217;s time and that of this one, alone at batch size 1.",
            _network(layers, colours),
        ),
        _frontier(data),
        _section("Layer by layer", _layers_lead(layers), _rows(layers, colours)),
        _section(
            "What each layer could have become",
            "Relative error of every candidate against its share of the dense parameters. A ring marks what was "
            "chosen. The choice weighs each layer's effect on the output, so that equal errors need not be equal "
            "losses.",
            _multiples(layers, names, colours),
        ),
        _quality(data),
        _times(data),
        _kept(data["skipped"]),
        _about(data),
    ]
    style = (files("structmat.compression") / "report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, lead: str, body: str) -> str:
    words = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{words}{body}</section>"


def _head(data: Mapping[str, Any], title: str) -> str:
    signs = {Tone.GOOD: "&#10003;", Tone.BAD: "!", Tone.PLAIN: "&#183;"}
    items = "".join(
        f'<li class="{r.tone}"><span class="sign" aria-hidden="true">{signs[r.tone]}</span><span>{r.text}</span></li>'
        for r in verdict(data)
    )
    heading = f'<p class="brand">structmat report</p><h1>{escape(title)}</h1>'
    return f'<header>{heading}<ul class="verdict">{items}</ul></header>'


def _tiles(data: Mapping[str, Any]) -> str:
    tiles = [
        _tile("Compressible parameters", data["parameters"]),
        _tile("Whole model", data["model_parameters"]),
        _tile("Whole model, bytes", data["model_bytes"]),
        _tile("FLOPs a sample, those layers", data["flops"]),
    ]
    timed = [t for t in data["timings"] if t["model_before"] is not None and t["model_after"] is not None]
    if timed:
        first = timed[0]
        pair = {"before": float(first["model_before"]), "after": float(first["model_after"])}
        tiles.append(_tile(f"Time at batch {int(first['batch'])}", pair, milliseconds))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(title: str, totals: Mapping[str, Any], show: Any = number) -> str:
    before, after = float(totals["before"]), float(totals["after"])
    share = after / before if before else 1.0
    more = " more" if share > 1.03 else ""
    return (
        f'<div class="tile{more}"><h3>{escape(title)}</h3><p class="big">{percent(share)}</p>'
        f'<div class="track"><div class="fill" style="width:{min(100.0, 100 * share):.2f}%"></div></div>'
        f"<p>{show(before)} &#8594; {show(after)}</p></div>"
    )


def _budget_lead(layers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    chosen = [name for name in names[1:] if any(family(layer) == name for layer in layers)]
    kept = sum(family(layer) == "Dense" for layer in layers)
    words = f"{len(layers)} compressible {'layer' if len(layers) == 1 else 'layers'}"
    kinds = f"{len(chosen)} {'structure' if len(chosen) == 1 else 'different structures'} chosen"
    return f"{words}; {kinds}, {kept} kept dense. The coloured area is what is left of the network."


def _budget(
    layers: Sequence[Mapping[str, Any]], names: Sequence[str], colours: Mapping[str, int], overall: float
) -> str:
    columns = [
        (
            str(layer["name"]),
            str(layer["structure"]),
            colours[family(layer)],
            float(layer["dense_parameters"]),
            float(layer["parameters"]) / float(layer["dense_parameters"]),
        )
        for layer in layers
    ]
    present = [name for name in names if any(family(layer) == name for layer in layers)]
    notes = {}
    for name in present:
        own = [layer for layer in layers if family(layer) == name]
        count = f"{len(own)} {'layer' if len(own) == 1 else 'layers'}"
        notes[name] = f"{count}, {number(sum(float(layer['parameters']) for layer in own))}"
    swatches = "".join(
        f'<li><span class="swatch" style="background:{charts.colour(colours[name])}"></span>'
        f"{escape('kept dense' if name == 'Dense' else name)} <small>{notes[name]}</small></li>"
        for name in present
    )
    return f'<ul class="legend">{swatches}</ul>{charts.skyline(columns, overall)}'


def _network(layers: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> str:
    largest = max(int(side) for layer in layers for side in layer["shape"])
    dense = [float(layer["dense_microseconds"]) for layer in layers]
    now = [float(layer["microseconds"]) for layer in layers]
    most = max([*dense, *now])
    cards = [
        charts.layer_card(
            i + 1,
            str(layer["name"]),
            "kept dense" if family(layer) == "Dense" else str(layer["structure"]),
            colours[family(layer)],
            (int(layer["shape"][0]), int(layer["shape"][1])),
            largest,
            float(layer["parameters"]) / float(layer["dense_parameters"]),
            (dense[i], now[i], most),
        )
        for i, layer in enumerate(layers)
    ]
    total = max(sum(dense), sum(now))
    rows = ""
    for name, values in (("before", dense), ("after", now)):
        places = [
            (f"{layer['name']}: {value:.1f} us", 0 if name == "before" else colours[family(layer)], value)
            for layer, value in zip(layers, values, strict=True)
        ]
        drawing = charts.strip(places, total, f"time of the layers {name}")
        rows += f"<tr><th>{name}</th><td>{drawing}</td><td class='num'>{milliseconds(sum(values) / 1e3)}</td></tr>"
    shown, folded = cards[:_CARDS], cards[_CARDS:]
    more = (
        f'<details><summary>{len(folded)} more layers</summary><ol class="network">{"".join(folded)}</ol></details>'
        if folded
        else ""
    )
    return (
        f'<ol class="network">{"".join(shown)}</ol>{more}<h3>Where the time goes</h3>'
        f'<table class="strips"><tbody>{rows}</tbody></table>'
    )


def _frontier(data: Mapping[str, Any]) -> str:
    points = data.get("frontier", ())
    if len(points) < 2:
        return ""
    line = [(float(p["share"]), float(p["predicted_loss"])) for p in points]
    best: list[tuple[float, float]] = []  # a model that was measured need not lie on the best predicted line
    for share, value in line:
        if not best or value < best[-1][1]:
            best.append((share, value))
    ring = [(float(p["share"]), float(p["predicted_loss"]), True) for p in points if p["chosen"]]
    drawn = [charts.scatter(best, [(s, v, False) for s, v in best[:-1]] + ring, "predicted loss", logarithmic=True)]
    measured = [p for p in points if p["quality"] is not None]
    before = data["quality"].get("before", {})
    budget = data["budget"]
    for name in before if len(measured) > 1 else ():
        dots = [(float(p["share"]), float(p["quality"][name]), bool(p["chosen"])) for p in measured]
        bound = None
        if "allowed" in budget and budget["of"] == name:
            sign = -1.0 if budget["better"] == "higher" else 1.0
            bound = float(budget["before"]) + sign * float(budget["allowed"])
        ends = [(s, v) for s, v, _ in dots]
        if max(s for s, _ in ends) < 1.0:
            ends.append((1.0, float(before[name])))
        drawn.append(
            charts.scatter(ends, dots, f"{name}, measured", logarithmic=False, level=float(before[name]), bound=bound)
        )
    lead = (
        "What the same screening offers at other sizes, as a share of the dense cost. "
        "A ring marks this model; each of the others can be built from its plan."
    )
    if len(drawn) > 1:
        lead += " Dashed: the original."
        if "allowed" in budget:
            lead += " Dotted: what was asked for."
    return _section("Quality against size", lead, f'<div class="planes">{"".join(drawn)}</div>')


def _layers_lead(layers: Sequence[Mapping[str, Any]]) -> str:
    norms = {
        "weights": "of the weights",
        "inputs": "of the outputs on the calibration inputs",
        "inputs and outputs": "of the outputs, weighed by their effect on the model's output",
    }
    found = [norms.get(n, escape(n)) for n in dict.fromkeys(str(layer["norm"]) for layer in layers)]
    return (
        "A track is as long as the layer was large, its filling is what is kept. "
        f"Errors are relative, {'; '.join(found)}. "
        "&#8220;Optimal&#8221; means that no member of that structure fits better: a theorem, not a hope."
    )


def _rows(layers: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> str:
    largest = max(float(layer["dense_parameters"]) for layer in layers)
    rows = []
    for layer in layers:
        dense = float(layer["dense_parameters"])
        share = float(layer["parameters"]) / dense
        kept = family(layer) == "Dense"
        proof = {"optimal": "optimal", "bound": f"at least {float(layer['lower_bound']):.2g}", "none": ""}[
            str(layer["certificate"])
        ]
        error = "" if kept else f"{figure(float(layer['error']))}{f' <small>{proof}</small>' if proof else ''}"
        speed = float(layer["microseconds"]) / max(float(layer["dense_microseconds"]), 1e-9)
        size = " &#215; ".join(str(int(n)) for n in layer["shape"])
        slow = " slow" if speed > 1.03 and not kept else ""
        rows.append(
            f'<tr><th scope="row">{escape(str(layer["name"]))} <small>{size}</small></th>'
            f'<td class="bar">{charts.bar(share, dense / largest, colours[family(layer)])}</td>'
            f'<td class="what">{"kept dense" if kept else escape(str(layer["structure"]))}</td>'
            f'<td class="num" data-label="kept">{percent(share)}</td>'
            f'<td class="num" data-label="error">{error}</td>'
            f'<td class="num{slow}" data-label="time">{speed:.2f}&#215;</td></tr>'
        )
    return (
        '<table class="layers"><thead><tr><th>layer</th><th></th><th>structure</th><th class="num">kept</th>'
        '<th class="num">error</th><th class="num">time</th></tr></thead><tbody>' + "".join(rows) + "</tbody></table>"
        '<p class="note">Time: the layer alone at batch size 1, as a multiple of the dense layer&#8217;s.</p>'
    )


def _multiples(layers: Sequence[Mapping[str, Any]], names: Sequence[str], colours: Mapping[str, int]) -> str:
    errors = [float(c["error"]) for layer in layers for c in layer["candidates"] if float(c["error"]) > 0]
    lowest = max(-4, min(-1, math.floor(math.log10(min(errors))))) if errors else -1
    drawn = []
    for layer in layers:
        dense = float(layer["dense_parameters"])
        points: dict[str, list[tuple[float, float]]] = {}
        for candidate in layer["candidates"]:
            if family(candidate) != "Dense":
                place = (float(candidate["parameters"]) / dense, float(candidate["error"]))
                points.setdefault(family(candidate), []).append(place)
        chosen = next((c for c in layer["candidates"] if c["structure"] == layer["structure_json"]), None)
        ring = (float(chosen["parameters"]) / dense, float(chosen["error"])) if chosen is not None else None
        name = escape(str(layer["name"]))
        structure = "kept dense" if family(layer) == "Dense" else escape(str(layer["structure"]))
        label = f"{layer['name']}: error against parameters of {len(layer['candidates'])} candidates"
        drawn.append(
            f"<figure><figcaption><strong>{name}</strong><span>{structure}</span></figcaption>"
            f"{charts.candidates(points, colours, ring, label, lowest)}</figure>"
        )
    tried = [name for name in names[1:] if any(family(c) == name for layer in layers for c in layer["candidates"])]
    swatches = "".join(
        f'<li><span class="swatch" style="background:{charts.colour(colours[n])}"></span>{escape(n)}</li>'
        for n in tried
    )
    shown, folded = drawn[:_MULTIPLES], drawn[_MULTIPLES:]
    more = (
        f'<details><summary>{len(folded)} more layers</summary><div class="multiples">{"".join(folded)}</div></details>'
        if folded
        else ""
    )
    return f'<ul class="legend">{swatches}</ul><div class="multiples">{"".join(shown)}</div>{more}'


def _quality(data: Mapping[str, Any]) -> str:
    quality, recovery = data["quality"], data["recovery"]
    if not quality and recovery is None:
        return ""
    body = ""
    if quality:
        moments = [m for m in ("before", "after", "recovered") if m in quality]
        titles = {"before": "original", "after": "compressed", "recovered": "recovered"}
        heads = "".join(f'<th class="num">{titles[m]}</th>' for m in moments)
        rows = "".join(
            f'<tr><th scope="row">{escape(str(name))}</th>'
            + "".join(
                f'<td class="num">{figure(float(quality[m][name]))}'
                + (f" <small>{signed(float(quality[m][name]) - float(before))}</small>" if m != "before" else "")
                + "</td>"
                for m in moments
            )
            + "</tr>"
            for name, before in quality["before"].items()
        )
        body += (
            f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    lead = "No recovery was asked for."
    if recovery is not None:
        softness = float(recovery.get("temperature", 1.0))  # reports of earlier versions have none
        lead = (
            f"Recovery: {int(recovery['steps'])} steps of distillation from the original"
            + (f" after {int(recovery['layerwise_steps'])} layer by layer" if recovery["layerwise_steps"] else "")
            + f", {float(recovery['seconds']):.0f} seconds, objective: {escape(str(recovery['objective']))}"
            + (f" at temperature {softness:g}" if softness != 1.0 else "")
            + f". The state of step {int(recovery['kept_step'])} is kept."
        )
        series = {
            "training": [(float(x), float(y)) for x, y in recovery["losses"]],
            "held out": [(float(x), float(y)) for x, y in recovery["held_out"]],
        }
        series = {name: line for name, line in series.items() if len(line) > 1}
        if series:
            body += charts.curve(series, "step of recovery")
        body += "".join(_film(film) for film in recovery.get("windows", ()))
    return _section("Quality", lead, body)


def _film(film: Mapping[str, Any]) -> str:
    """The windows of a layer that moved during recovery."""
    name = str(film["layer"])
    frames = [Snapshot(int(f["step"]), 0, {name: torch.tensor(f["windows"])}) for f in film["frames"]]
    rows, columns = film["shape"]
    strip = film_strip(frames, name, (int(rows), int(columns)), cells=_FILM_CELLS)
    return (
        f'<figure class="film">{strip}<figcaption>Windows of <code>{escape(name)}</code>, darker where more terms '
        f"cover the matrix; they moved by {float(film['moved']):.1%} of a side on average.</figcaption></figure>"
    )


def _times(data: Mapping[str, Any]) -> str:
    timings = data["timings"]
    if not timings:
        return ""
    rows = []
    for timing in timings:
        cells = f'<th scope="row">{int(timing["batch"])}</th>'
        for kind in ("model", "layers"):
            before, after = timing[f"{kind}_before"], timing[f"{kind}_after"]
            if before is None or after is None:
                cells += "<td></td><td></td>"
                continue
            times = ratio(timing, kind)
            tone, _ = speed(times)
            scale = max(float(before), float(after))
            cells += (
                f"<td>{charts.pair(float(before), float(after), scale)}</td>"
                f'<td class="num {"slow" if tone is Tone.BAD else ""}">{times:.2f}&#215;</td>'
            )
        rows.append(f"<tr>{cells}</tr>")
    environment = data["environment"]
    lead = (
        f"Medians on {escape(str(environment['processor']))}, {int(environment['threads'])} "
        f"{'thread' if int(environment['threads']) == 1 else 'threads'}; before above, after below. "
        "&#8220;Layers alone&#8221; is the sum of single compressible layers."
    )
    table = (
        '<table class="times"><thead><tr><th>batch</th><th colspan="2">whole model</th>'
        f'<th colspan="2">layers alone</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    return _section("Milliseconds", lead, table)


def _kept(skipped: Sequence[Mapping[str, Any]]) -> str:
    if not skipped:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(s["name"]) or "(the model itself)")} '
        f"<small>{escape(str(s['kind']))}</small></th>"
        f'<td class="num">{number(float(s["parameters"]))}</td><td>{escape(str(s["reason"]))}</td></tr>'
        for s in skipped
    )
    head = '<tr><th>layer</th><th class="num">parameters</th><th>why</th></tr>'
    table = f'<table class="kept"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    return _section("Left as they were", "Layers that did not take part, and the reason.", table)


def _about(data: Mapping[str, Any]) -> str:
    seconds = {str(k): float(v) for k, v in data["seconds"].items()}
    total = sum(seconds.values()) or 1.0
    steps = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><div class="track"><div class="fill" '
        f'style="width:{100 * value / total:.2f}%"></div></div></td><td class="num">{value:.1f}&#8239;s</td></tr>'
        for name, value in seconds.items()
    )
    facts = {**data["environment"], "seed": data["seed"]}
    calibration = data["calibration"]
    if calibration is not None:
        facts |= {f"calibration {key}": value for key, value in calibration.items()}
    refused: dict[str, int] = {}
    for layer in data["layers"]:
        for reason, count in layer["refused"].items():
            refused[str(reason)] = refused.get(str(reason), 0) + int(count)
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{_fact(v)}</dd>" for k, v in facts.items())
    reasons = "".join(f"<li>{count:,} {escape(reason)}</li>" for reason, count in sorted(refused.items()))
    notes = f"<h3>Candidates refused</h3><ul>{reasons}</ul>" if reasons else ""
    proof = "proved to be the best choice of these candidates" if data["exact"] else "not proved to be the best choice"
    lead = f"Predicted loss {figure(float(data['predicted_loss']))}, {proof}. {total:.0f} seconds in all."
    body = f'<table class="steps"><tbody>{steps}</tbody></table>{notes}<dl>{items}</dl>'
    return _section("How this was made", lead, body)


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return figure(value)
    return escape(str(value))
