"""Calibration as a step of a run: made now, or when the folder was begun; and which layers it saw."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from structmat.compression.calibrate import Calibration, calibrate, from_tensors, to_tensors
from structmat.compression.evaluate import name_of
from structmat.compression.kept import Skipped
from structmat.compression.running import Forward, Loss
from structmat.compression.scan import Scan, Site
from structmat.compression.workfolder import WorkFolder, digest, form_and_start
from structmat.errors import ModelError

logger = logging.getLogger(__name__)


def calibrated(
    model: nn.Module,
    found: Scan,
    loader: Iterable[Any] | None,
    *,
    forward: Forward | None,
    loss: Loss | None,
    temperature: float | None,
    seed: int,
    work: WorkFolder,
    base: str,
    progress: bool,
) -> tuple[Calibration | None, str]:
    """What calibration saw, and a digest of that and all before it.

    Args:
        model: as for :func:`structmat.compression.calibrate.calibrate`.
        found: whose sites are watched.
        loader: None for no calibration.
        forward, loss, temperature, seed, progress: as for that function.
        work: where moments are kept.
        base: the digest of the model and of the settings so far.
    """
    if loader is None:
        return None, base
    key, start = digest(base, name_of(forward), name_of(loss), temperature), ""
    if work.path is not None:
        form, start = form_and_start(loader)
        key = digest(key, form)
    kept = work.load("calibration", key)
    if kept is not None:
        if kept[0]["start"] != start:
            logger.warning(
                "The calibration data starts with another batch than that of the moments in %s, which are used. Data "
                "that is shuffled anew does so; for other data, use another folder.",
                work.path,
            )
        return from_tensors(kept[0]["seen"], kept[1]), digest(key, kept[0]["start"])
    seen = calibrate(
        model,
        found.sites,
        loader,
        forward=forward,
        loss=loss,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    numbers, tensors = to_tensors(seen)
    work.store("calibration", key, {"seen": numbers, "start": start}, tensors)
    return seen, digest(key, start)


def called(found: Scan, seen: Calibration | None) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """The sites that take part, which are those that calibration saw, and the layers that do not.

    Raises:
        ModelError: no layer was called.
    """
    if seen is None:
        return found.sites, found.skipped
    sites = tuple(site for site in found.sites if site.name in seen.moments)
    idle = tuple(
        Skipped(site.name, site.kind, site.shape, site.numbers, "never called on calibration data")
        for site in found.sites
        if site.name not in seen.moments
    )
    if not sites:
        raise ModelError(
            f"None of the {len(found.sites)} layers was called on the calibration data. "
            f"Pass forward=... that runs the part of the model which holds them."
        )
    return sites, found.skipped + idle


def as_called(sites: Sequence[Site], seen: Calibration | None) -> list[Site]:
    """The sites in the order of their first calls."""
    order = {} if seen is None else {name: number for number, name in enumerate(seen.moments)}
    return sorted(sites, key=lambda site: order.get(site.name, len(order)))
