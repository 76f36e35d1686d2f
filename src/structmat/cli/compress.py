"""structmat compress"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

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


def compress(
    file: Annotated[
        Path | None, typer.Argument(help="Weights alone: a .safetensors, .npy or .npz file. Or use --model.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Share to keep, strictly between 0 and 1.")] = 0.5,
    unit: Annotated[str, typer.Option(help="Of the budget: parameters, flops or latency.")] = "parameters",
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
    plan: Annotated[Path | None, typer.Option(help="Follow this plan.json instead of choosing.")] = None,
    recover: Annotated[int, typer.Option(min=0, help="Steps of recovery by distillation (with --model).")] = 0,
    include: Annotated[list[str] | None, typer.Option(help="Only layers that match (glob); may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not layers that match (glob); may be repeated.")] = None,
    family: Annotated[list[str] | None, typer.Option("--family", help="Only this family; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compress a trained model, or the matrices of a file, under one budget.

    Writes the model (safetensors and JSON), plan.json, report.json and report.html. With a file the error is that of
    the weights; with --model and --calibration it is the effect on the model's output.
    """
    with refusing_bad_input():
        if (file is None) == (model is None):
            raise fail("Give either a file of weights or --model package:factory.")
        if file is not None and (calibration or evaluate or recover):
            raise fail("--calibration, --evaluate and --recover need --model: weights alone can't be run.")
        if plan is not None and family:
            raise fail("--plan says what every layer becomes; --family has nothing to choose. Leave one of them out.")
        import structmat as sm
        from structmat.cli.summary import summary
        from structmat.compression.report_html import write_html

        kinds: dict[str, Any] = {"parameters": sm.Parameters, "flops": sm.Flops, "latency": sm.Latency}
        if unit not in kinds:
            raise fail(f"--unit {unit} is none of {', '.join(kinds)}.")
        with only_data_on_stdout():
            network = _weights(file) if file is not None else find(str(model), "--model")()
            limit = kinds[unit](budget)
            overrides: dict[str, Any] = {}
            if plan is not None:
                limit, overrides = _following(sm.Plan.read(plan), network, include or (), exclude or ())
            loader = find(calibration, "--calibration")() if calibration is not None else None
            result = sm.compress_(
                network,
                budget=limit,
                overrides=overrides,
                calibration=loader,
                include=tuple(include or ()),
                exclude=tuple(exclude or ()),
                structures=family or None,
                recover=sm.Distill(steps=recover) if recover else None,
                evaluate=find(evaluate, "--evaluate") if evaluate is not None else None,
                folder=out / "work",
                seed=seed,
                progress=True,
            )
        sm.save(result.model, out / "model")
        result.plan.write(out / "plan.json")
        result.report.write(out / "report.json")
        page = write_html(result.report, out / "report.html")
        if as_json:
            show_json(result.report.to_json())
        else:
            show(summary(result.report))
        words().print(f"model   {out / 'model'}\nplan    {out / 'plan.json'}\nreport  {page.resolve()}", soft_wrap=True)


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


def _following(plan: Any, network: Any, include: Sequence[str], exclude: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The budget and the overrides under which every layer becomes what the plan says, and all others stay."""
    import structmat as sm
    from structmat.errors import ModelError

    present = dict(network.named_modules())
    sites = {s.name: s for s in sm.scan(network, include, exclude, [n for n in plan.layers if n in present]).sites}
    for name, shape in plan.shapes.items():
        if name not in sites:
            raise ModelError(f"The plan names the layer {name}, which is none that can be compressed in this model.")
        if sites[name].shape != shape:
            raise ModelError(f"The plan's layer {name} has the shape {shape}; the model's has {sites[name].shape}.")
    dense = sum(site.shape[0] * site.shape[1] for site in sites.values())
    return sm.Parameters(dense), {name: sm.Dense() for name in sites} | dict(plan.layers)
