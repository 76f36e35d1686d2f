"""Recovery: a compressed model is trained to answer as the original does."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.compression.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from structmat.compression.layers import structured_layer_of
from structmat.compression.moving import MovingWindows
from structmat.compression.progress import Progress
from structmat.compression.running import (
    Forward,
    Loss,
    Outcome,
    call,
    check_loader,
    device_of,
    evaluating,
    outcome,
    own_loss,
    to_device,
)
from structmat.compression.split import split_apart
from structmat.errors import DataError, StructureError
from structmat.learn.groups import recovery_groups
from structmat.nn.windows import WindowedLinear

logger = logging.getLogger(__name__)

_STEP_BACK = 1 / 3
"""What the learning rate is multiplied by when the model has moved away from the original."""

DIVERGENCE, SQUARES = "divergence of the logits", "squared error of the output"


@dataclass(frozen=True)
class Distill:
    """How to recover: distillation from the original model, after an optional layer-wise reconstruction.

    Args:
        steps: of the optimizer, one batch each; None if only ``minutes`` limits.
        minutes: stop after this time (resumed runs add up). The schedule follows whichever limit is nearer.
        learning_rate: for a dense layer; structured tensors get multiples, see
            :func:`structmat.learn.groups.recovery_groups`.
        temperature: of the softmax of both models (Hinton, Vinyals, Dean 2015); only for outputs that are logits.
        own_loss: weight of the task's own loss (the user's, the output's ``.loss``, or cross-entropy to the labels of a
            batch) that is added to the distance from the original.
        layerwise: steps before, in which each structured layer learns to put out what the original layer does, on
            inputs of the compressed model. No gradient passes from layer to layer.
        warmup: share of the steps in which the learning rate rises; then it falls along a cosine to zero.
        clip: largest norm of the gradient.
        weight_decay: for matrices that are not structured; structured tensors never decay.
        data: batches to train on, if others than those of calibration.
        held_out: batches to be judged by: the state that is nearest to the original on them is kept, so that recovery
            never ends farther from the original than it began; where a look finds the model farther away than at the
            start, the best state is taken up again with a third of the learning rate. Without them the last state is
            kept.
        windows: let the structure move while distilling: the windows of GBLR layers are learned, each layer at the
            numbers that it holds (see :class:`structmat.learn.windows.WindowLearner`), then made compact again. The
            state that ``held_out`` judges and keeps has its windows in whole numbers already. Needs ``steps``; windows
            stand still in the layerwise phase.
        check_every: steps between two looks at ``held_out``, and between two entries of the curve of losses.
        save_every: seconds between two checkpoints, where there is a folder.
    """

    steps: int | None = 300
    minutes: float | None = None
    learning_rate: float = 1e-3
    temperature: float = 1.0
    own_loss: float = 0.0
    layerwise: int = 0
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    windows: bool = False
    data: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    held_out: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    check_every: int = 25
    save_every: float = 60.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise StructureError("Distill(steps=None, minutes=None) would never end. Give one of the two.")
        if self.windows and self.steps is None:
            raise StructureError("Distill(windows=True, steps=None): windows need a number of steps. Give one.")
        rules = {
            "steps": self.steps is None or (_is_whole(self.steps) and self.steps >= 1),
            "minutes": self.minutes is None or self.minutes > 0,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "temperature": 0 < self.temperature < math.inf,
            "own_loss": 0 <= self.own_loss < math.inf,
            "layerwise": _is_whole(self.layerwise) and self.layerwise >= 0,
            "warmup": 0 <= self.warmup < 1,
            "clip": self.clip > 0,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "check_every": _is_whole(self.check_every) and self.check_every >= 1,
            "save_every": self.save_every >= 0,
        }
        for name, is_legal in rules.items():
            if not is_legal:
                raise StructureError(f"Distill({name}={getattr(self, name)!r}) is out of range; see its documentation.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Recovery:
    """What recovery did.

    Args:
        objective: the distance from the original that was made small.
        steps: of distillation, and before it ``layerwise_steps``.
        seconds: of all runs together.
        losses: (step, mean training loss since the entry before).
        held_out: (step, distance from the original on the held-out batches); empty without them.
        kept_step: whose state the model has now.
    """

    objective: str
    steps: int
    layerwise_steps: int
    seconds: float
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    kept_step: int


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

    Both run in evaluation mode (no dropout, fixed batch statistics) and have their modes back afterwards. Parameters in
    half precision learn in float32 and are rounded at each step. Equal seeds and data give equal results on one
    machine; the caller's random state is left alone.

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
        DataError: no batch, a batch that the model can't be called with, or a loss that is NaN or infinite.
        FormatError: the folder holds a checkpoint of another run.
    """
    settings = settings or Distill()
    check_loader(data if settings.data is None else settings.data)
    moving = None
    if settings.windows:
        assert settings.steps is not None
        moving = MovingWindows(model, settings.steps, seed)
    run = _Run(model, original, data if settings.data is None else settings.data, settings, forward, loss, seed, moving)
    # Layer by layer the original's matrices must be layers of their own too.
    layers = [name for name, _ in model.named_modules()]
    apart = split_apart(original, layers) if settings.layerwise else contextlib.nullcontext()
    with (
        apart,
        evaluating(model),
        evaluating(original),
        torch.random.fork_rng(devices=[]),
        Progress(show) as progress,
    ):
        done = run.go(Path(folder) if folder is not None else None, progress)
    if moving is not None:
        moving.harden()
    return done


def distance(student: Outcome, teacher: Outcome, temperature: float, weights: Tensor | None) -> Tensor:
    """The mean over terms of ``T^2 KL(teacher || student)`` at temperature ``T`` for logits, else the squared error as
    a share of the teacher's mean square."""
    wanted, reached = teacher.values.float(), student.values.float()
    if teacher.classes:
        log_p = F.log_softmax(wanted / temperature, -1)
        log_q = F.log_softmax(reached / temperature, -1)
        # A logit of minus infinity forbids a class: it contributes nothing, not 0 * inf.
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
        return terms.mean() if weights is None else (terms * weights).sum() / weights.sum().clamp(min=1.0)
    return (reached - wanted).square().mean() / wanted.square().mean().clamp(min=1e-30)


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
    ) -> None:
        self.moving = moving
        self.model, self.original, self.data, self.settings = model, original, data, settings
        self.forward, self.loss, self.seed = forward, loss, seed
        self.device = device_of(model)
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.names:
            raise DataError("No parameter of the model requires a gradient: there is nothing to recover with.")
        self.masters = {n: p if _is_wide(p) else p.detach().float().requires_grad_() for n, p in self.names.items()}
        by_parameter = {id(p): self.masters[n] for n, p in self.names.items()}
        groups = recovery_groups(model, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        for group in groups:
            group["params"] = [by_parameter[id(p)] for p in group["params"]]
            group["top"] = group["lr"]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        self.step = 0  # of both phases together
        self.seconds = 0.0
        self.objective = ""
        self.losses: list[tuple[int, float]] = []
        self.recent: list[float] = []
        self.checks: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] | None = None
        self.caution = 1.0  # factor of all learning rates
        self.done = False

    # ------------------------------------------------------------------------------------------------- the loop

    def go(self, folder: Path | None, progress: Progress) -> Recovery:
        if folder is not None:
            self._resume(folder)
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        if not self.done:
            if self.settings.held_out is not None and not self.checks:
                self._check()
            for _ in progress.track(self._steps(started), "recover", total=self._total()):
                if folder is not None and time.monotonic() - saved >= self.settings.save_every:
                    self._save(folder)
                    saved = time.monotonic()
            self._note()
            if self.settings.held_out is not None and self.checks[-1][0] != self.step:
                self._check()
            self.done = True
            if folder is not None:
                self._save(folder)
        kept = self.step
        if self.best is not None:
            self._write(self.best)
            kept = min(self.checks, key=lambda check: (check[1], check[0]))[0]
        for parameter in self.names.values():
            parameter.grad = None
        logger.info("recovery: %d steps in %.1f s, state of step %d kept", self.step, self.seconds, kept)
        layerwise = min(self.step, self.settings.layerwise)
        return Recovery(
            self.objective,
            self.step - layerwise,
            layerwise,
            self.seconds,
            tuple(self.losses),
            tuple(self.checks),
            kept,
        )

    def _total(self) -> int | None:
        return None if self.settings.steps is None else self.settings.layerwise + self.settings.steps - self.step

    def _steps(self, started: float) -> Iterator[int]:
        for batch in _endless(self.data, self.seed, self.step):
            share = self._share()
            if share >= 1.0:
                return
            self._learn(to_device(batch, self.device), share)
            self.step += 1
            self.seconds = time.monotonic() - started
            if self.step % self.settings.check_every == 0:
                self._note()
                if self.settings.held_out is not None:
                    self._check()
                    if self.step > self.settings.layerwise and self.checks[-1][1] > self.checks[0][1]:
                        self._step_back()
            yield self.step

    def _step_back(self) -> None:
        """The rate was too high for a model that is as near as this one: on from the best state with a lower one."""
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
        if self.step < settings.layerwise:
            return 1.0 if time_share >= 1.0 else self.step / settings.layerwise
        done = 0.0 if settings.steps is None else (self.step - settings.layerwise) / settings.steps
        return max(time_share, done)

    def _learn(self, batch: Any, share: float) -> None:
        scale = self.caution * _schedule(share, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * scale
        value = self._layerwise(batch) if self.step < self.settings.layerwise else self._distance(batch, own=True)
        if not bool(torch.isfinite(value)):
            raise DataError(
                f"The loss of recovery is {float(value.detach())} at step {self.step}: look at the data, or lower "
                f"learning_rate={self.settings.learning_rate}."
            )
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.names.values():
            parameter.grad = None
        moves = self.moving is not None and self.step >= self.settings.layerwise
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

    # --------------------------------------------------------------------------------------------- the objectives

    def _distance(self, batch: Any, *, own: bool) -> Tensor:
        with torch.no_grad():
            teacher = outcome(call(self.original, batch, self.forward), batch)
        output = call(self.model, batch, self.forward)
        self.objective = DIVERGENCE if teacher.classes else SQUARES
        value = distance(outcome(output, batch), teacher, self.settings.temperature, _weights(batch, teacher))
        if own and self.settings.own_loss > 0:
            task = own_loss(output, batch, self.loss)
            if task is None:
                raise DataError(
                    f"Distill(own_loss={self.settings.own_loss}) needs a loss and the batches have no labels. "
                    f"Pass loss=lambda output, batch: ..."
                )
            value = value + self.settings.own_loss * task
        return value

    def _layerwise(self, batch: Any) -> Tensor:
        """The mean over structured layers of the squared error of their outputs, relative to the original layer's."""
        names = [
            n
            for n, m in self.model.named_modules()
            if structured_layer_of(m) is not None or isinstance(m, WindowedLinear)
        ]
        wanted: dict[str, list[Tensor]] = {name: [] for name in names}
        errors: list[Tensor] = []
        handles = []
        for name in names:
            keep = wanted[name].append
            handles.append(
                self.original.get_submodule(name).register_forward_hook(
                    lambda module, args, output, keep=keep: keep(output.detach())
                )
            )
        try:
            with torch.no_grad():
                call(self.original, batch, self.forward)
            queues = {name: iter(outputs) for name, outputs in wanted.items()}
            for name in names:
                layer = self.model.get_submodule(name)
                handles.append(layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:])))

                def measure(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                    goal = next(queues[name], None)
                    if goal is not None:  # the original may call a layer less often, for data-dependent control flow
                        size = goal.float().square().mean().clamp(min=1e-30)
                        errors.append((output.float() - goal.float()).square().mean() / size)

                handles.append(layer.register_forward_hook(measure))
            call(self.model, batch, self.forward)
        finally:
            for handle in handles:
                handle.remove()
        if not errors:
            raise DataError("The model called none of its structured layers: layerwise has nothing to reconstruct.")
        return torch.stack(errors).mean()

    def _check(self) -> None:
        """Measure the distance on the held-out batches; keep the state if it is the best."""
        assert self.settings.held_out is not None
        total, count = 0.0, 0
        with torch.no_grad(), contextlib.nullcontext() if self.moving is None else self.moving.as_deployed():
            for batch in self.settings.held_out:
                total += float(self._distance(to_device(batch, self.device), own=False))
                count += 1
            if not count:
                raise DataError("held_out has no batches. Leave it out, or give some.")
            mean = total / count
            if mean < min((value for _, value in self.checks), default=math.inf):
                self.best = {name: master.detach().clone() for name, master in self.masters.items()}
                if self.moving is not None:
                    self.best |= self.moving.places()
        self.checks.append((self.step, mean))

    def _write(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state[name])
        if self.moving is not None and any(name.endswith(".widths") for name in state):
            self.moving.place(state)
        self._publish()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on."""
        settings = self.settings
        options = {n: getattr(settings, n) for n in settings.__dataclass_fields__ if n not in _NOT_IDENTITY}
        return {
            "settings": options,
            "seed": self.seed,
            "tensors": {name: list(parameter.shape) for name, parameter in self.names.items()},
        }

    def _save(self, folder: Path) -> None:
        tensors = {f"value.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        if self.best is not None:
            tensors |= {f"best.{name}": value for name, value in self.best.items()}
        if self.moving is not None:
            tensors |= {f"moving.{name}": value for name, value in self.moving.tensors().items()}
        tensors["random"] = torch.random.get_rng_state()
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "objective": self.objective,
            "losses": self.losses,
            "recent": self.recent,
            "checks": self.checks,
            "caution": self.caution,
            "done": self.done,
            "moving": None if self.moving is None else self.moving.facts(),
        }
        write_checkpoint(folder, Checkpoint(self._identity(), facts, tensors))

    def _resume(self, folder: Path) -> None:
        found = read_checkpoint(folder, self._identity())
        if found is None:
            return
        facts, tensors = found.facts, found.tensors
        self._write({name: tensors[f"value.{name}"] for name in self.masters})
        for name, master in self.masters.items():
            state = {
                key: tensors[f"optimizer.{key}.{name}"].to(master.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{key}.{name}" in tensors
            }
            if state:
                self.optimizer.state[master] = state
        if any(key.startswith("best.") for key in tensors):
            self.best = {
                n.removeprefix("best."): t.to(self.device) for n, t in tensors.items() if n.startswith("best.")
            }
        torch.random.set_rng_state(tensors["random"])
        self.step, self.seconds, self.objective = facts["step"], facts["seconds"], facts["objective"]
        self.losses = [(int(s), float(v)) for s, v in facts["losses"]]
        self.checks = [(int(s), float(v)) for s, v in facts["checks"]]
        self.recent, self.done = [float(v) for v in facts["recent"]], bool(facts["done"])
        self.caution = float(facts["caution"])
        if self.moving is not None:
            own = {n.removeprefix("moving."): t for n, t in tensors.items() if n.startswith("moving.")}
            self.moving.load(facts["moving"], own)
            self.moving.slow_down(self.caution)
        logger.info("recovery goes on from step %d", self.step)


_NOT_IDENTITY = ("data", "held_out", "save_every")


def _is_wide(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.float64)


def _schedule(share: float, warmup: float) -> float:
    """Factor of the learning rate: a linear rise, then a cosine to zero."""
    if share < warmup:
        return max(share, 1e-3) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (share - warmup) / (1.0 - warmup)))


def _weights(batch: Any, teacher: Outcome) -> Tensor | None:
    """1 for terms that count and 0 for padding, where the batch says so by an ``attention_mask``."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if isinstance(mask, Tensor) and teacher.classes and mask.numel() == teacher.values.shape[0]:
        return mask.reshape(-1).to(teacher.values.device, torch.float32)
    return None


def _endless(data: Iterable[Any], seed: int, skip: int) -> Iterator[Any]:
    """The batches, pass after pass; each pass begins with its own seed, so that one can be entered in the middle."""
    epoch = 0
    while True:
        # The training steps draw from the global generator too: keep the loader's draws apart from theirs.
        outside = torch.random.get_rng_state()
        torch.manual_seed(seed + epoch)
        batches = iter(data)
        inside = torch.random.get_rng_state()
        torch.random.set_rng_state(outside)
        count = 0
        while True:
            outside = torch.random.get_rng_state()
            torch.random.set_rng_state(inside)
            batch = next(batches, _END)
            inside = torch.random.get_rng_state()
            torch.random.set_rng_state(outside)
            if batch is _END:
                break
            count += 1
            if skip > 0:
                skip -= 1
            else:
                yield batch
        if count == 0:
            raise DataError("The data for recovery has no batches.")
        epoch += 1


_END = object()
