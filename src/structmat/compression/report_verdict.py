"""What a person must know of a report, in a few sentences."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from typing import Any

from structmat.compression.report_charts import figure, number, percent
from structmat.compression.report_json import family, ratio, refusing_damage


class Tone(enum.StrEnum):
    """How a remark is meant; also the name of its style."""

    GOOD = "good"
    BAD = "bad"
    PLAIN = "plain"


@dataclass(frozen=True)
class Remark:
    """A sentence of the verdict.

    Args:
        tone: how it is meant.
        text: HTML.
    """

    tone: Tone
    text: str


def verdict(data: Mapping[str, Any]) -> list[Remark]:
    """What a person must know, good or bad, in a few sentences."""
    remarks = [
        *_budget_remarks(data["budget"], data.get("tried", ())),
        *_quality_remarks(data["quality"]),
        *_time_remarks(data),
    ]
    slower = [layer for layer in data["layers"] if layer["slower"] and family(layer) != "Dense"]
    changed = [layer for layer in data["layers"] if family(layer) != "Dense"]
    if slower:
        names = ", ".join(f"<code>{escape(str(layer['name']))}</code>" for layer in slower[:3])
        more = f" and {len(slower) - 3} more" if len(slower) > 3 else ""
        text = f"{len(slower)} of {len(changed)} replaced layers run slower than dense here: {names}{more}."
        remarks.append(Remark(Tone.BAD, text))
    if not data["exact"]:
        remarks.append(Remark(Tone.BAD, "The solver was stopped before it could prove that no better choice fits."))
    return remarks


def verdict_text(data: Mapping[str, Any]) -> list[str]:
    """The verdict as plain text. Raises :class:`~structmat.errors.FormatError` for a damaged report."""
    signs = {Tone.GOOD: "+", Tone.BAD: "!", Tone.PLAIN: " "}
    with refusing_damage():
        return [f"{signs[r.tone]} {unescape(re.sub('<[^>]*>', '', r.text))}" for r in verdict(data)]


def _budget_remarks(budget: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> list[Remark]:
    """That each limit is kept, and the quality that was asked for."""
    if "allowed" in budget:
        before, allowed, name = float(budget["before"]), float(budget["allowed"]), escape(str(budget["of"]))
        bound = before - allowed if budget["better"] == "higher" else before + allowed
        relation = "at least" if budget["better"] == "higher" else "at most"
        accepted = [one for one in tried if one["accepted"]]
        spent = f"{percent(float(budget['spent']) / float(budget['dense']))} of the {escape(str(budget['unit']))}"
        best = min(accepted, key=lambda one: float(one["cost"]), default=None)
        end = (
            f"the smallest one that was found has {figure(float(best['value']))} with {spent}"
            if best is not None
            else "no smaller one was found, so that the layers stay as they were"
        )
        asked = f"{name.capitalize()} of {relation} {figure(bound)} was asked for (the original has {figure(before)})"
        tone = Tone.PLAIN if best is None else Tone.GOOD
        remarks = [Remark(tone, f"{asked}; of {len(tried)} models tried {end}.")]
        return remarks + [_limit_remark(one) for one in budget["goals"]]
    return [_limit_remark(one) for one in budget.get("goals", (budget,))]


def _limit_remark(budget: Mapping[str, Any]) -> Remark:
    spent, most, dense = float(budget["spent"]), float(budget["limit"]), float(budget["dense"])
    unit = escape(str(budget["unit"]))
    where = "the saved model" if budget["budget"] == "Memory" else "the compressible layers"
    is_kept = spent <= most * (1 + 1e-9)
    text = (
        f"The budget is {'kept' if is_kept else 'exceeded'}: {number(spent)} of at most {number(most)} {unit} in "
        f"{where}, {percent(spent / dense)} of what they had."
    )
    return Remark(Tone.GOOD if is_kept else Tone.BAD, text)


def _quality_remarks(quality: Mapping[str, Mapping[str, float]]) -> list[Remark]:
    if "before" not in quality or "after" not in quality:
        return [Remark(Tone.PLAIN, "The quality was not measured: no <code>evaluate</code> function was given.")]
    remarks = []
    for name, before in quality["before"].items():
        after = float(quality["after"][name])
        text = f"{escape(str(name)).capitalize()}: {figure(float(before))} before, {figure(after)} after compression"
        last = after
        if "recovered" in quality:
            last = float(quality["recovered"][name])
            text += f", <strong>{figure(last)}</strong> after recovery"
        remarks.append(Remark(Tone.PLAIN, f"{text} ({signed(last - float(before))})."))
    return remarks


def _time_remarks(data: Mapping[str, Any]) -> list[Remark]:
    parts, tones = [], []
    for timing in data["timings"]:
        if timing["model_before"] is not None and timing["model_after"] is not None:
            tone, words = speed(ratio(timing, "model"))
            parts.append(f"{words} at batch size {int(timing['batch'])}")
            tones.append(tone)
    if not parts:
        return [Remark(Tone.PLAIN, "The whole model was not timed: no data was given to run it on.")]
    tone = Tone.BAD if Tone.BAD in tones else Tone.GOOD if Tone.GOOD in tones else Tone.PLAIN
    return [Remark(tone, f"On this machine the whole model is {', '.join(parts)}.")]


def speed(ratio: float) -> tuple[Tone, str]:
    """How a ratio of times after by before is to be taken, and in words (HTML)."""
    if ratio > 1.03:
        return Tone.BAD, f"<strong>{ratio:.2f} times slower</strong>"
    if ratio < 0.97:
        return Tone.GOOD, f"{1 / ratio:.2f} times faster"
    return Tone.PLAIN, "equally fast"


def signed(value: float) -> str:
    """A difference (HTML)."""
    return f"{'+' if value > 0 else '&#8722;' if value < 0 else '&#177;'}{figure(abs(value))}"
