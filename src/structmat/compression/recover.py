"""Recovery: a compressed model is trained to answer as the original does."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from structmat.compression.distill import Distill, Optimizer, Rates, Recovery
from structmat.compression.moving import MovingWindows
from structmat.compression.objectives import DIVERGENCE, SQUARES, distance
from structmat.compression.passes import endless
from structmat.compression.progress import Progress
from structmat.compression.reconstruct import first_batches, reconstruct
from structmat.compression.running import Forward, Loss, check_loader, device_of, evaluating, to_device
from structmat.compression.softening import peeked
from structmat.compression.split import split_apart
from structmat.compression.statistics import reestimate, tensors_of
from structmat.compression.teaching import Teaching
from structmat.compression.thinning import LOOK_EVERY, Thinning
from structmat.compression.workfolder import digest, fingerprint
from structmat.errors import DataError
from structmat.learn.groups import parameter_groups, recovery_groups
from structmat.learn.layouts import layouts
from structmat.learn.soap import SOAP

logger = logging.getLogger(__name__)

_STEP_BACK = 1 / 3
"""What the learning rate is multiplied by when the model has moved away from the original."""

_JUDGED = (0.5, 0.75)
"""Shares of the steps from which on a look says whether it has. Not before: at its highest the rate shakes a model that
is near the original by several times its distance, and most of that is gone when the rate has fallen."""

_FAR, _WILD = 1.5, 30.0
"""Away is beyond so many times the distance of the start; at any look, where it is beyond the second."""

CLOSED_FORM_BATCHES = 24
"""At most so many of the first batches are read to solve last factors again."""

STATISTICS_BATCHES = 16
"""Likewise to estimate batch statistics again."""

PEEKED_BATCHES = 16
"""Likewise to find a temperature."""

__all__ = ["DIVERGENCE", "SQUARES", "Distill", "Optimizer", "Rates", "Recovery", "distance", "recover"]


def recover(
    model: nn.Module,
    original: nn.Module,
    data: Iterable[Any],
    settings: Distill | None = None,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> Recovery:
    """Train ``model`` in place to answer as ``original`` does; every parameter that requires a gradient learns.

    Both run in evaluation mode (no dropout; fixed batch statistics, unless ``settings.normalise``) and have their modes
    back afterwards. Parameters in half precision learn in float32 and are rounded at each step. Equal seeds and data
    give equal results on one machine; the caller's random state is left alone.

    Args:
        model: the compressed model.
        original: the model to imitate; not changed.
        data: an iterable of batches that can be read again and again; ``settings.data`` goes before.
        settings: :class:`Distill` by default.
        forward: ``forward(model, batch)`` returns the output.
        loss: ``loss(output, batch)`` returns the task's scalar loss, used if ``settings.own_loss`` is positive.
        seed: for loaders that shuffle.
        folder: for checkpoints; a run that was killed goes on from there and ends with the same weights.
        show: a progress bar on stderr.

    Raises:
        DataError: no batch, a batch that the model can't be called with, or a loss, a distance on ``held_out`` or, in
            the end, a weight that is NaN or infinite.
        FormatError: the folder holds a checkpoint of another run.
    """
    settings = settings or Distill()
    check_loader(data if settings.data is None else settings.data)
    # Where parts are compared, the original's matrices must be layers of their own too.
    layers = [name for name, _ in model.named_modules()]
    compares = settings.layerwise or settings.blockwise or settings.hidden or settings.anneal or settings.thin
    moving, thinning = None, None
    with split_apart(original, layers) if compares else contextlib.nullcontext():
        if settings.windows:
            assert settings.steps is not None
            moving = MovingWindows(model, settings.steps, seed)
        if settings.thin:
            thinning = Thinning(model, original, settings.thin)
        try:
            data = data if settings.data is None else settings.data
            run = _Run(model, original, data, settings, forward, loss, seed, moving, thinning)
            with (
                evaluating(model),
                evaluating(original),
                torch.random.fork_rng(devices=[]),
                Progress(show) as progress,
            ):
                done = run.go(Path(folder) if folder is not None else None, progress)
        finally:
            if thinning is not None:  # what is interrupted has its structures too
                thinning.harden()
    if moving is not None:
        moving.harden()
        done = replace(done, windows=moving.films())
    return done


class _Run:
    """One recovery: the state that a checkpoint holds, and the loop."""

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        data: Iterable[Any],
        settings: Distill,
        forward: Forward | None,
        loss: Loss | None,
        seed: int,
        moving: MovingWindows | None,
        thinning: Thinning | None,
    ) -> None:
        self.moving, self.thinning = moving, thinning
        self.model, self.original, self.data, self.settings = model, original, data, settings
        self.forward, self.seed = forward, seed
        self.start = digest(fingerprint(model), fingerprint(original))
        self.device = device_of(model)
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.names:
            raise DataError("No parameter of the model requires a gradient: there is nothing to recover with.")
        self.masters = {n: p if _is_wide(p) else p.detach().float().requires_grad_() for n, p in self.names.items()}
        by_parameter = {id(p): self.masters[n] for n, p in self.names.items()}
        make = recovery_groups if settings.rates is Rates.LAYER else parameter_groups
        groups = make(model, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        for group in groups:
            if settings.rates is Rates.EQUAL:
                group["lr"] = settings.learning_rate
            group["params"] = [by_parameter[id(p)] for p in group["params"]]
            group["top"] = group["lr"]
        self.optimizer = self._optimizer(groups)
        temperature = settings.temperature or peeked(original, first_batches(data, PEEKED_BATCHES, seed), forward)[0]
        self.teaching = Teaching(model, original, settings, forward, loss, temperature)
        self.buffers = tensors_of(model)  # of these
        self.step = 0  # of all phases together
        self.seconds = 0.0
        self.losses: list[tuple[int, float]] = []
        self.recent: list[float] = []
        self.first: float | None = None  # loss of distillation, at its first step
        self.checks: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] | None = None
        self.caution = 1.0  # factor of all learning rates
        self.judged = 0  # how often it was asked whether that shall be lower
        self.looks = tuple(at for at in _JUDGED if at > settings.thin)
        self.done = False
        self.closed_form: dict[str, Any] | None = None
        self.statistics: dict[str, Any] | None = None

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        rate, betas = self.settings.learning_rate, (0.9, 0.95)
        if self.settings.optimizer is Optimizer.ADAM:
            return torch.optim.AdamW(groups, lr=rate, betas=betas)
        known = layouts(self.model)
        by_master = {self.masters[name]: known[p] for name, p in self.names.items() if p in known}
        return SOAP(groups, lr=rate, betas=betas, layouts=by_master)

    # ------------------------------------------------------------------------------------------------- the loop

    def go(self, folder: Path | None, progress: Progress) -> Recovery:
        settings = self.settings
        if settings.anneal:  # from the factors as they were fitted, also where the run goes on
            self.teaching.fade()
        if folder is not None:
            self._resume(folder)
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        if not self.done:
            if settings.held_out is not None and not self.checks:
                self._check()
            if settings.closed_form and self.closed_form is None:
                self._solve()
            if self.thinning is not None and self.step == 0:
                self.thinning.begin()
                self._read()
            for _ in progress.track(self._steps(started), "recover", total=self._total()):
                if folder is not None and time.monotonic() - saved >= settings.save_every:
                    self._save(folder)
                    saved = time.monotonic()
            self._note()
            if settings.held_out is None:
                self._look_back()
            elif self.checks[-1][0] != self.step:
                self._check()
            if self.best is not None:
                self._write(self.best)
            if settings.statistics and not settings.normalise and self.teaching.normalisations:
                batches = first_batches(self.data, STATISTICS_BATCHES, self.seed)
                found = reestimate(
                    self.model,
                    self.original,
                    batches,
                    forward=self.forward,
                    temperature=self.teaching.temperature,
                )
                self.statistics = None if found is None else asdict(found)
            self.done, self.best = True, None
            if folder is not None:
                self._save(folder)
        kept = self.step if not self.checks else min(self.checks, key=lambda check: (check[1], check[0]))[0]
        for parameter in self.names.values():
            parameter.grad = None
        logger.info("recovery: %d steps in %.1f s, state of step %d kept", self.step, self.seconds, kept)
        layerwise = min(self.step, settings.layerwise)
        blockwise = min(self.step - layerwise, settings.blockwise)
        return Recovery(
            self.teaching.objective,
            self.step - layerwise - blockwise,
            layerwise,
            self.seconds,
            tuple(self.losses),
            tuple(self.checks),
            kept,
            blockwise,
            self.closed_form,
            self.statistics,
            temperature=self.teaching.temperature,
        )

    def _look_back(self) -> None:
        """Without held-out batches the last state stays: refuse one that is none, and say where it is farther off than
        the first. Annealing and thinning begin near the original, so that their first loss says nothing."""
        for name, parameter in self.names.items():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise DataError(
                    f"Recovery made {name} NaN or infinite: lower learning_rate={self.settings.learning_rate}, or give "
                    f"held_out=..., so that the best state is kept."
                )
        first, last = self.first, self.losses[-1][1] if self.losses else 0.0
        near = self.settings.anneal or self.settings.thin
        if first is not None and not near and last > _FAR * first:
            logger.warning(
                "recovery ends farther from the original than it began: the training loss was %.4g at the first step "
                "and is %.4g at the end. Lower learning_rate=%g, or give held_out=..., so that the best state is kept.",
                first,
                last,
                self.settings.learning_rate,
            )

    def _solve(self) -> None:
        """Last factors by least squares, unless the held-out batches are farther off then."""
        held = self._state()
        batches = first_batches(self.data, CLOSED_FORM_BATCHES, self.seed)
        changed = reconstruct(self.model, self.original, batches, forward=self.forward)
        self._read()
        self.closed_form = {"layers": len(changed), "kept": True}
        if self.settings.held_out is not None:
            before, after = self.checks[-1][1], self.teaching.held_out()
            self.closed_form |= {"before": before, "after": after, "kept": after < before}
            if after < before:
                self.checks, self.best = [(self.step, after)], self._state()
            else:
                self._write(held)

    def _total(self) -> int | None:
        return None if self.settings.steps is None else self.settings.before + self.settings.steps - self.step

    def _steps(self, started: float) -> Iterator[int]:
        for batch in endless(self.data, self.seed, self.step):
            share = self._share()
            if share >= 1.0:
                return
            batch = to_device(batch, self.device)
            if self.thinning is not None and not self.thinning.is_over and self.step % LOOK_EVERY == 0:
                draw = (self.seed + self.step * 1_000_003) % 2**63  # the same where a run goes on
                self.thinning.look(self.teaching.sensitivities(batch, self.thinning.weights, draw))
            self._learn(batch, share)
            self.step += 1
            self.seconds = time.monotonic() - started
            if self.thinning is not None:
                self.thinning.step(self._thinned(), self._share())
                self._publish()
            if self.step % self.settings.check_every == 0:
                self._note()
                if self.settings.held_out is not None and not self._fades():
                    self._check()
                    self._judge(self._share())
                    if self.step > self.settings.before and self._has_stalled():
                        return
            yield self.step

    def _fades(self) -> bool:
        """Whether something is still added back or not yet dropped, so that the model itself says little yet."""
        if self.thinning is not None and not self.thinning.is_over:
            return True
        return self.step > self.settings.before and self.teaching.rest(self._share()) > 0

    def _thinned(self) -> list[Tensor]:
        """What loses entries, in the precision in which it learns."""
        assert self.thinning is not None
        names = {id(parameter): name for name, parameter in self.names.items()}
        return [self.masters[names[id(weight)]] for weight in self.thinning.weights]

    def _has_stalled(self) -> bool:
        patience = self.settings.patience
        if patience is None:
            return False
        values = [value for _, value in self.checks]
        return len(values) - 1 - values.index(min(values)) >= patience

    def _judge(self, share: float) -> None:
        """Where the rate was too high for a model that is as near as this one: on from the best state with a lower
        one."""
        if self.step <= self.settings.before:
            return
        due = sum(share >= at for at in self.looks)
        most = (_FAR if due > self.judged else _WILD) * self.checks[0][1]
        self.judged = due
        if self.checks[-1][1] <= most:
            return
        assert self.best is not None
        logger.info("recovery: step %d is farther from the original than the start; on with a lower rate", self.step)
        self._write(self.best)
        self.optimizer.state.clear()
        self.caution *= _STEP_BACK
        if self.moving is not None:
            self.moving.slow_down(self.caution)

    def _share(self) -> float:
        """How much of the phase is over, 0 to 1."""
        settings = self.settings
        time_share = 0.0 if settings.minutes is None else self.seconds / (60 * settings.minutes)
        for start, length in ((0, settings.layerwise), (settings.layerwise, settings.blockwise)):
            if start <= self.step < start + length:
                return 1.0 if time_share >= 1.0 else (self.step - start) / length
        done = 0.0 if settings.steps is None else (self.step - self.settings.before) / settings.steps
        return max(time_share, done)

    def _learn(self, batch: Any, share: float) -> None:
        scale = self.caution * _schedule(share, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * scale
        value = self.teaching.error(batch, self.step, share)
        if not bool(torch.isfinite(value)):
            raise DataError(
                f"The loss of recovery is {float(value.detach())} at step {self.step}: look at the data, or lower "
                f"learning_rate={self.settings.learning_rate}."
            )
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.names.values():
            parameter.grad = None
        moves = self.moving is not None and self.step >= self.settings.before
        leaves = self.moving.leaves() if self.moving is not None and moves else []
        torch.autograd.backward(value, inputs=[*self.names.values(), *leaves])
        for name, parameter in self.names.items():
            if self.masters[name] is not parameter and parameter.grad is not None:
                self.masters[name].grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters.values(), self.settings.clip)
        self.optimizer.step()
        self._publish()
        if self.moving is not None and moves:
            self.moving.step()
        self.recent.append(float(value.detach()))
        if self.step == self.settings.before:
            self.first = self.recent[-1]

    def _publish(self) -> None:
        """Round the float32 masters to the parameters in half precision."""
        with torch.no_grad():
            for name, parameter in self.names.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def _note(self) -> None:
        if self.recent:
            self.losses.append((self.step, math.fsum(self.recent) / len(self.recent)))
            self.recent = []

    def _as_deployed(self) -> contextlib.AbstractContextManager[None]:
        """Windows as they will be when they are compact."""
        return contextlib.nullcontext() if self.moving is None else self.moving.as_deployed()

    def _check(self) -> None:
        """Measure the distance on the held-out batches; keep the state if it is the best."""
        with self._as_deployed():
            value = self.teaching.held_out()
            if value < min((other for _, other in self.checks), default=math.inf):
                self.best = self._state()
        self.checks.append((self.step, value))

    # ------------------------------------------------------------------------------------------------------ the state

    def _state(self) -> dict[str, Tensor]:
        """What learns, the batch statistics, and where windows are."""
        held = {name: master.detach().clone() for name, master in self.masters.items()}
        held |= {name: buffer.clone() for name, buffer in self.buffers.items()}
        return held if self.moving is None else held | self.moving.places()

    def _write(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in (self.masters | self.buffers).items():
                tensor.copy_(state[name])
        if self.moving is not None:
            self.moving.place(state)
        if self.thinning is not None and self.thinning.is_over:
            self.thinning.follow(self._thinned())
        self._publish()

    def _read(self) -> None:
        """Take over parameters that were changed from outside."""
        with torch.no_grad():
            for name, parameter in self.names.items():
                if self.masters[name] is not parameter:
                    self.masters[name].copy_(parameter)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on."""
        return {
            "settings": self.settings.identity,
            "start": self.start,
            "seed": self.seed,
            "tensors": {name: list(parameter.shape) for name, parameter in self.names.items()},
        }

    def _save(self, folder: Path) -> None:
        tensors = {f"value.{name}": tensor for name, tensor in self._state().items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        if self.best is not None:
            tensors |= {f"best.{name}": value for name, value in self.best.items()}
        if self.moving is not None:
            tensors |= {f"moving.{name}": value for name, value in self.moving.tensors().items()}
        if self.thinning is not None:
            tensors |= {f"thinning.{name}": value for name, value in self.thinning.tensors().items()}
        tensors["random"] = torch.random.get_rng_state()
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "objective": self.teaching.objective,
            "losses": self.losses,
            "recent": self.recent,
            "first": self.first,
            "checks": self.checks,
            "caution": self.caution,
            "judged": self.judged,
            "closed_form": self.closed_form,
            "statistics": self.statistics,
            "done": self.done,
            "moving": None if self.moving is None else self.moving.facts(),
            "dropped": None if self.thinning is None else self.thinning.dropped,
        }
        write_checkpoint(folder, Checkpoint(self._identity(), facts, tensors))

    def _resume(self, folder: Path) -> None:
        found = read_checkpoint(folder, self._identity())
        if found is None:
            return
        facts, tensors = found.facts, found.tensors
        self._write(_of(tensors, "value."))
        saved = _of(tensors, "optimizer.")
        for name, master in self.masters.items():
            state = {key.removesuffix(f".{name}"): t for key, t in saved.items() if key.endswith(f".{name}")}
            state = {key: t.to("cpu" if key == "step" else master.device) for key, t in state.items() if "." not in key}
            if state:
                self.optimizer.state[master] = state
        if any(key.startswith("best.") for key in tensors):
            self.best = {name: tensor.to(self.device) for name, tensor in _of(tensors, "best.").items()}
        torch.random.set_rng_state(tensors["random"])
        self.step, self.seconds, self.teaching.objective = facts["step"], facts["seconds"], facts["objective"]
        self.losses = [(int(s), float(v)) for s, v in facts["losses"]]
        self.checks = [(int(s), float(v)) for s, v in facts["checks"]]
        self.recent, self.done = [float(v) for v in facts["recent"]], bool(facts["done"])
        self.caution, self.judged = float(facts["caution"]), int(facts.get("judged", 0))  # older ones lack it
        self.closed_form, self.statistics = facts["closed_form"], facts["statistics"]
        self.first = facts.get("first")  # older ones lack it
        if self.moving is not None:
            self.moving.load(facts["moving"], _of(tensors, "moving."))
            self.moving.slow_down(self.caution)
        if self.thinning is not None:
            self.thinning.load(facts["dropped"], _of(tensors, "thinning."))
        logger.info("recovery goes on from step %d", self.step)


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names have the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_wide(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.float64)


def _schedule(share: float, warmup: float) -> float:
    """Factor of the learning rate: a linear rise, then a cosine to zero."""
    if share < warmup:
        return max(share, 1e-3) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (share - warmup) / (1.0 - warmup)))
