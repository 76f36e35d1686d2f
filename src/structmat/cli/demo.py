"""structmat demo"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structmat.cli.common import fail, only_data_on_stdout, refusing_bad_input, show, show_json, words

if TYPE_CHECKING:
    from rich.console import Console

QUICK = ("BlockDiagonal", "BlockTensorTrain", "Kronecker", "LowRank", "Monarch", "PivotedLowRank")
"""Families that fit quickly, so that the demo is a matter of a minute; ``compress`` tries all by default."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("build/demo"),
    budget: Annotated[float, typer.Option(help="Share of the compressible parameters to keep.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of the training and of every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a small transformer on handwritten digits, compress it, and open the books.

    Real data that comes with scikit-learn; no download; under two minutes on two cores.
    """
    with refusing_bad_input():
        import torch

        try:
            import sklearn  # noqa: F401
        except ImportError as error:
            raise fail("The demo needs scikit-learn: pip install structmat[demo].") from error

        if not 0 < budget < 1:
            raise fail(f"--budget {budget} lies not strictly between 0 and 1.")
        console = words()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # matrices of 96 x 96: threads would wait for each other more than they work
        try:
            _run(console, out, budget, seed, as_json)
        finally:
            torch.set_num_threads(threads)


def _run(console: Console, out: Path, budget: float, seed: int, as_json: bool) -> None:
    import structmat as sm
    from structmat.cli.digits import accuracy, digits, trained
    from structmat.cli.summary import summary
    from structmat.compression.report_html import write_html

    console.print("Training a transformer on scikit-learn's handwritten digits (the rows are the tokens) ...")
    train, test = digits(seed)
    model = trained(train, seed)
    console.print(f"Trained: {accuracy(model, test):.2%} of the test digits. Compressing to {budget:.0%} ...")
    with only_data_on_stdout():
        result = sm.compress(
            model,
            budget=sm.Parameters(budget),
            calibration=train.batches(64),
            structures=[name for name in QUICK if name in sm.families()],
            recover=sm.Distill(steps=300, own_loss=0.1),
            evaluate=lambda m: {"accuracy": accuracy(m, test)},
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
    console.print(f"model   {out / 'model'}\nplan    {out / 'plan.json'}\nreport  {page.resolve()}", soft_wrap=True)
