"""structmat compress"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from structmat.cli import config, goals, recovery, splits
from structmat.cli.common import (
    fail,
    find,
    only_data_on_stdout,
    read_weights,
    refusing_bad_input,
    show,
    show_json,
    words,
)
from structmat.cli.config import merged, read_config


def compress(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(help="Config file (.toml), or weights alone (.safetensors, .npy, .npz). Or use --model."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Share to keep, such as 0.3, or UNIT=AMOUNT, such as memory=20MB; may be repeated. 0.5."),
    ] = None,
    unit: Annotated[
        str, typer.Option(help="Of amounts without one: parameters, flops, latency or memory.")
    ] = "parameters",
    batch: Annotated[int, typer.Option(min=1, help="Samples at once, for latency.")] = 1,
    group: Annotated[
        list[str] | None, typer.Option(help="PATTERN=SHARE, a budget of the layers that match; may be repeated.")
    ] = None,
    loss: Annotated[
        float | None, typer.Option(help="The smallest model that --evaluate finds at most so much worse.")
    ] = None,
    relative: Annotated[bool, typer.Option("--relative", help="--loss is a share of the original's value.")] = False,
    better: Annotated[str | None, typer.Option(help="higher or lower, for --loss; found out by default.")] = None,
    at_least: Annotated[float | None, typer.Option(help="The smallest model with at least this quality.")] = None,
    at_most: Annotated[float | None, typer.Option(help="The same where lower is better.")] = None,
    of: Annotated[str | None, typer.Option(help="Which number of --evaluate counts, if it returns several.")] = None,
    tries: Annotated[int | None, typer.Option(min=2, help="Models that are built for a quality at most.")] = None,
    frontier: Annotated[
        list[float] | None, typer.Option(help="Share at which a model is measured besides; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="How often the choice is made again.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the model, the plan and the report.")] = Path("compressed"),
    model: Annotated[
        str | None, typer.Option(help="package:factory, a function that returns the trained model.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="package:loader, a function that returns batches of data.")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="package:function, from the model to its quality: a number or several by name.")
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(help="package:function, from the model and a batch to the output."),
    ] = None,
    task_loss: Annotated[
        str | None, typer.Option(help="package:function, from the output and a batch to the task's own loss.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="That logits are divided by before their effect counts; one that fits the data by default."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Follow this plan.json instead of choosing.")] = None,
    recover: Annotated[
        int, typer.Option(min=0, help="Steps of recovery by distillation; in a config file a table of all settings.")
    ] = 0,
    step: Annotated[
        list[float] | None,
        typer.Option(help="Share to compress to and recover at first, before the budget; may be repeated."),
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only layers that match (glob); may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not layers that match (glob); may be repeated.")] = None,
    family: Annotated[list[str] | None, typer.Option("--family", help="Only this family; may be repeated.")] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=PARTS: rows that may get structures of their own: 3, 64,16,16 or gates."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compress a trained model, or the matrices of a file, under one budget or several, or to a quality.

    Writes the model (safetensors and JSON), plan.json, report.json and report.html. With a file the error is that of
    the weights; with --model and --calibration it is the effect on the model's output. A config file sets options by
    their names; the command line has the last word.
    """
    with refusing_bad_input():
        values, folder = dict(context.params), None
        if file is not None and file.suffix.lower() == ".toml":
            folder = file.resolve().parent
            values["file"] = None
            values = merged(context, values, read_config(file, OPTIONS), {"json": "as_json"})
        _compress(Settings(**values), folder)


OPTIONS: dict[str, config.Read] = {
    "file": config.path,
    "budget": goals.budgets,
    "unit": config.text,
    "batch": config.whole(1),
    "group": goals.groups,
    "loss": config.number,
    "relative": config.flag,
    "better": config.text,
    "at-least": config.number,
    "at-most": config.number,
    "of": config.text,
    "tries": config.whole(2),
    "frontier": config.numbers,
    "rounds": config.whole(0),
    "out": config.path,
    "model": config.text,
    "calibration": config.text,
    "evaluate": config.text,
    "forward": config.text,
    "task-loss": config.text,
    "temperature": config.number,
    "plan": config.path,
    "recover": recovery.recovery,
    "step": config.numbers,
    "include": config.texts,
    "exclude": config.texts,
    "family": config.texts,
    "split": splits.splits,
    "seed": config.integer,
    "json": config.flag,
}
"""What a config file may set: every option, by its name."""


@dataclass(frozen=True)
class Settings:
    """The parameters of :func:`compress`."""

    file: Path | None
    budget: list[str] | None
    unit: str
    batch: int
    group: list[str] | None
    loss: float | None
    relative: bool
    better: str | None
    at_least: float | None
    at_most: float | None
    of: str | None
    tries: int | None
    frontier: list[float] | None
    rounds: int
    out: Path
    model: str | None
    calibration: str | None
    evaluate: str | None
    forward: str | None
    task_loss: str | None
    temperature: float | None
    plan: Path | None
    recover: int | Mapping[str, Any]
    step: list[float] | None
    include: list[str] | None
    exclude: list[str] | None
    family: list[str] | None
    split: list[str] | None
    seed: int
    as_json: bool


def _compress(given: Settings, folder: Path | None) -> None:
    """Run what the settings say; functions are searched in the config file's folder, too."""
    if (given.file is None) == (given.model is None):
        raise fail("Give either a file of weights or --model package:factory.")
    if given.file is not None and (given.calibration or given.evaluate or given.recover):
        raise fail("--calibration, --evaluate and --recover need --model: weights alone can't be run.")
    if given.plan is not None and (given.family or given.split):
        option = "--family" if given.family else "--split"
        raise fail(f"--plan says what every layer becomes; {option} has nothing to choose. Leave one of them out.")
    import structmat as sm
    from structmat.cli.summary import summary
    from structmat.compression.gradual import compress_gradually
    from structmat.compression.report_html import write_html

    quality = {n: getattr(given, n) for n in ("loss", "relative", "better", "at_least", "at_most", "of", "tries")}
    asked = goals.goal(given.budget or (), given.group or (), given.unit, given.batch, quality)
    if given.plan is not None and asked:
        raise fail("--plan says what every layer becomes; there is no budget to keep. Leave one of them out.")
    if given.plan is None and not asked:
        asked = goals.goal(("0.5",), (), given.unit, given.batch, {})
    if given.step and (given.plan is not None or len(asked) != 1 or not isinstance(asked[0], sm.Parameters | sm.Flops)):
        raise fail("--step goes before one --budget of parameters or flops. Leave out what else says where to go.")
    if given.step and not given.recover:
        raise fail("--step recovers at every size. Say how with --recover.")
    with only_data_on_stdout():
        network = _weights(given.file) if given.file is not None else find(str(given.model), "--model", folder)()
        loader = None if given.calibration is None else find(given.calibration, "--calibration", folder)()
        recover = recovery.distill(given.recover, folder)
        options: dict[str, Any] = {
            "calibration": loader,
            "include": tuple(given.include or ()),
            "exclude": tuple(given.exclude or ()),
            "structures": given.family or None,
            "split": splits.asked(given.split or ()),
            "forward": _function(given.forward, "--forward", folder),
            "loss": _function(given.task_loss, "--task-loss", folder),
            "temperature": given.temperature,
            "evaluate": _function(given.evaluate, "--evaluate", folder),
            "frontier": tuple(given.frontier or ()),
            "rounds": given.rounds,
            "folder": given.out / "work",
            "seed": given.seed,
            "progress": True,
        }
        if given.step:
            kind = type(asked[0])
            result = compress_gradually(network, [*map(kind, given.step), asked[0]], recover, **options)
        else:
            budget = None if given.plan is not None else asked[0] if len(asked) == 1 else asked
            plan = None if given.plan is None else sm.Plan.read(given.plan)
            result = sm.compress_(network, budget=budget, plan=plan, recover=recover, **options)
    sm.save(result.model, given.out / "model")
    result.plan.write(given.out / "plan.json")
    result.report.write(given.out / "report.json")
    page = write_html(result.report, given.out / "report.html")
    if given.as_json:
        show_json(result.report.to_json())
    else:
        show(summary(result.report))
    places = f"model   {given.out / 'model'}\nplan    {given.out / 'plan.json'}\nreport  {page.resolve()}"
    words().print(places, soft_wrap=True)


def _function(name: str | None, option: str, folder: Path | None) -> Callable[..., Any] | None:
    return None if name is None else find(name, option, folder)


def _weights(file: Path) -> Any:
    """A model whose linear layers are the matrices of a file, by their names; a trailing ``.weight`` is dropped."""
    import torch
    from torch import nn

    from structmat.errors import DataError

    tensors = read_weights(file)
    model = nn.Module()
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight").split(".")
        if tensor.dim() != 2 or not tensor.is_floating_point() or not all(path):
            continue
        with torch.device("meta"):
            linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        linear.weight = nn.Parameter(tensor)
        parent = model
        for part in path[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if path[-1] in parent._modules:
            raise DataError(f"{file}: {name} is also the name of a group of tensors. Rename it.")
        parent.add_module(path[-1], linear)
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        known = ", ".join(f"{n} {tuple(t.shape)}" for n, t in list(tensors.items())[:5]) or "nothing"
        raise DataError(f"{file} holds no matrix of real floating point numbers: {known}.")
    return model
