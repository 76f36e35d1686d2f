"""The command line: data on stdout, words on stderr, clear refusals, instant help."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import structmat as sm
from structmat.cli import app

COMMANDS = ("demo", "inspect", "compress", "report", "diff", "bench", "info")


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def data(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(24, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    tensors = {"net.first.weight": low, "net.second.weight": torch.randn(32, 24, generator=generator)}
    tensors["net.first.bias"] = torch.zeros(24)
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "userland.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))\n"
        "def load():\n    torch.manual_seed(1)\n"
        "    return [(torch.randn(8, 16), torch.arange(8) % 4) for _ in range(3)]\n"
        "def score(model):\n    return {'mean': float(model(torch.ones(2, 16)).mean().detach())}\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "userland", raising=False)
    return "userland"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str) -> None:
    output = run(command, "--help").stdout
    assert "--json" in output


@pytest.mark.parametrize("arguments", [(), *((c,) for c in COMMANDS)])
def test_help_is_instant(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", "from structmat.cli import main; main()", *arguments, "--help"]
    # Time of the processor, not of the clock: other work on the machine is not ours.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_does_not_import_torch() -> None:
    code = "import sys, structmat.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------------- inspect


def test_inspect_names_the_structure(weights: Path) -> None:
    found = data("inspect", weights, "--family", "LowRank", "--family", "BlockDiagonal")
    assert set(found) == {"net.first.weight", "net.second.weight"}
    assert found["net.first.weight"]["exact"] == [{"family": "LowRank", "rank": 3}]
    assert found["net.second.weight"]["exact"] == []
    result = run("inspect", weights, "--name", "*first*", "--family", "LowRank")
    assert "exactly LowRank(rank=3)" in result.stdout
    assert "second" not in result.stdout


def test_inspect_reads_numpy(tmp_path: Path) -> None:
    matrix = np.outer(np.arange(1.0, 9), np.arange(1.0, 13))
    np.save(tmp_path / "one.npy", matrix.astype(">f8"))  # foreign byte order
    np.savez_compressed(tmp_path / "two.npz", a=matrix, b=np.arange(3))
    assert data("inspect", tmp_path / "one.npy", "--family", "LowRank")["one"]["exact"][0]["rank"] == 1
    assert set(data("inspect", tmp_path / "two.npz", "--family", "LowRank")) == {"a"}


def test_inspect_draws(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib: pip install structmat[plot]")
    run("inspect", weights, "--name", "*first*", "--family", "LowRank", "--plot", tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert "Choose one" in run("inspect", weights, "--plot", tmp_path / "plot.svg", code=2).stderr


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.npy", None, "is not a file"),
        ("other.txt", b"x", "ending .txt"),
        ("plain", b"x", "ending none"),
        ("bad.safetensors", b"x" * 40, "not a readable safetensors"),
        ("bad.npy", b"x" * 40, "not a readable .npy"),
        ("empty.npy", b"", "not a readable .npy"),
        ("bad.npz", b"PK\x03\x04" + b"x" * 40, "bad.npz"),
        ("truncated.npz", None, "truncated.npz"),
        ("objects.npy", None, "not a readable .npy"),
        ("text.npy", None, "which is no number"),
        ("vector.npy", None, "holds no matrix"),
        ("integers.npy", None, "holds no matrix"),
        ("nan.npy", None, "NaN or infinite"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "compress"])
def test_files_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    match name:
        case "truncated.npz":
            np.savez(path, a=np.ones((40, 40)))
            path.write_bytes(path.read_bytes()[:-900])
        case "objects.npy":
            np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)
        case "text.npy":
            np.save(path, np.array([["a", "b"]]))
        case "vector.npy":
            np.save(path, np.ones(3))
        case "integers.npy":
            np.save(path, np.ones((3, 3), dtype=np.int64))
        case "nan.npy":
            np.save(path, np.full((8, 8), np.nan))
        case _ if content is not None:
            path.write_bytes(content)
    result = run(command, path, code=2)
    lines = result.stderr.strip().splitlines()
    message = "no matrix" if message == "holds no matrix" else message
    assert message in lines[-1]
    assert lines[-1].startswith("structmat: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------------------------------ compress


def test_compress_weights_alone(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = data("compress", weights, "--budget", "0.4", "--out", out, "--family", "LowRank")
    assert found["parameters"]["after"] <= 0.4 * found["parameters"]["before"]
    assert [layer["norm"] for layer in found["layers"]] == ["weights", "weights"]
    assert json.loads((out / "report.json").read_text()) == found
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sm.Plan.read(out / "plan.json").layers
    model = nn.Module()
    model.net = nn.Module()
    model.net.first, model.net.second = nn.Linear(32, 24, bias=False), nn.Linear(24, 32, bias=False)
    loaded = sm.load(out / "model", model)
    assert loaded.net.first.structure == sm.LowRank(rank=3)  # an exact one costs nothing


def test_compress_a_model(package: str, tmp_path: Path) -> None:
    result = run(
        *("compress", "--model", f"{package}:make", "--calibration", f"{package}:load"),
        *("--evaluate", f"{package}:score", "--budget", "0.5", "--out", tmp_path / "out"),
        *("--recover", "3", "--exclude", "4", "--family", "LowRank"),
    )
    assert "before and after" in result.stdout
    assert "recovered" in result.stdout
    assert "report.html" in result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["quality"]) == {"before", "after", "recovered"}
    assert [s["name"] for s in report["skipped"]] == ["4"]
    import userland  # type: ignore[import-not-found]

    sm.load(tmp_path / "out" / "model", userland.make())


def test_compress_follows_an_edited_plan(package: str, tmp_path: Path) -> None:
    plan = sm.Plan({"0": sm.LowRank(rank=2)}, {"0": (32, 16)})
    plan.write(tmp_path / "plan.json")
    options = ["--plan", tmp_path / "plan.json", "--calibration", f"{package}:load", "--out", tmp_path / "out"]
    report = data("compress", "--model", f"{package}:make", *options)
    assert [layer["structure"] for layer in report["layers"]] == ["LowRank(rank=2)", "Dense()", "Dense()"]
    assert report["layers"][0]["norm"] == "inputs and outputs"
    sm.Plan({"0": sm.LowRank(rank=2)}, {"0": (32, 17)}).write(tmp_path / "plan.json")
    refused = run("compress", "--model", f"{package}:make", *options, code=2)
    assert "layer 0 has the shape (32, 17); the model's has (32, 16)" in " ".join(refused.stderr.split())
    sm.Plan({"7": sm.LowRank(rank=2)}, {"7": (32, 16)}).write(tmp_path / "plan.json")
    refused = run("compress", "--model", f"{package}:make", *options, code=2)
    assert "names the layer 7, which is none" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give either a file"),
        (("--model", "userland:make", "WEIGHTS"), "Give either a file"),
        (("WEIGHTS", "--recover", "3"), "need --model"),
        (("WEIGHTS", "--unit", "bytes"), "none of parameters, flops, latency"),
        (("WEIGHTS", "--budget", "1.5"), "strictly between 0 and 1"),
        (("WEIGHTS", "--budget", "0.0001"), "can't be met"),
        (("WEIGHTS", "--family", "Magic"), "Unknown family"),
        (("WEIGHTS", "--include", "nothing*"), "matches none"),
        (("WEIGHTS", "--plan", "plan.json", "--family", "LowRank"), "--family has nothing to choose"),
        (("WEIGHTS", "--plan", "nowhere.json"), "nowhere.json: No such file"),
        (("--model", "userland"), "does not name a function"),
        (("--model", "nowhere_at_all:make"), "can't be imported"),
        (("--model", "userland:constant"), "has no function constant"),
    ],
)
def test_compress_refuses(
    package: str, weights: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [str(weights) if a == "WEIGHTS" else a for a in arguments]
    result = run("compress", *given, "--out", tmp_path / "out", code=2)
    last = result.stderr.strip().splitlines()[-1]
    assert message in last
    assert last.startswith("structmat: ")
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------- bench, info and demo


def test_bench_compares_with_a_dense_layer(tmp_path: Path) -> None:
    arguments = ("bench", "--size", "64x48", "--batch", "2", "--threads", "1", "--seconds", "0", "--out", tmp_path)
    found = data(*arguments, "--family", "LowRank")
    assert found["environment"]["processor"]
    (setting,) = found["settings"]
    assert setting["setting"]["shape"] == [64, 48]
    assert setting["environment"]["threads"] == 1
    (layer,) = setting["layers"]
    assert 0 < layer["stored"] <= 64 * 48 / 4
    assert min(*layer["microseconds"].values(), *layer["dense_by"].values(), *layer["floor"].values()) > 0
    assert layer["microseconds"].keys() >= {"dense", "auto", "reference"}
    shown = run(*arguments, "--family", "LowRank").stdout  # not measured again
    assert "faster" in shown  # the head of a column, which may be broken after "times"
    assert f"{layer['microseconds']['auto']:.1f}" in shown
    assert "effic" in shown  # cut short where the terminal is narrow


def test_bench_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "8x8_2_float32_forward_1.json").write_text("{}")
    arguments = ("bench", "--size", "8", "--batch", "2", "--threads", "1", "--family", "LowRank", "--out", tmp_path)
    assert "Remove it" in run(*arguments, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "big"), "OUTxIN"),
        (("--size", "1x2x3"), "two integers"),
        (("--size", "0"), "at least 1"),
        (("--budget", "2"), "strictly between"),
        (("--family", "Magic"), "Unknown family"),
        (("--size", "8", "--budget", "0.001", "--family", "LowRank"), "No family"),
        (("--dtype", "int8"), "none of float32"),
        (("--work", "play"), "none of forward"),
        (("--full", "--size", "77"), "--full has no setting"),
    ],
)
def test_bench_refuses(arguments: tuple[str, ...], message: str) -> None:
    assert message in run("bench", *arguments, code=2).stderr


def test_info_lists_the_families() -> None:
    found = data("info")
    assert [family["family"] for family in found["families"]] == sorted(sm.families())
    assert found["environment"]["torch"] == torch.__version__
    shown = run("info").stdout
    assert "LowRank" in shown
    assert "W[i, i] = weight[i]" in shown, "square brackets are no markup"
    assert ":class:" not in shown


def test_demo_refuses_a_senseless_budget() -> None:
    assert "strictly between" in run("demo", "--budget", "3", code=2).stderr


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn: pip install structmat[demo]")
    threads = torch.get_num_threads()
    start = time.process_time()  # of the processor: other work on the machine is not ours
    found = data("demo", "--out", tmp_path)
    assert time.process_time() - start < 120
    assert torch.get_num_threads() == threads
    quality = found["quality"]
    assert quality["before"]["accuracy"] > 0.95
    assert quality["recovered"]["accuracy"] > quality["before"]["accuracy"] - 0.03
    assert found["parameters"]["after"] <= 0.3 * found["parameters"]["before"]
    assert (tmp_path / "report.html").exists()


def test_what_libraries_print_does_not_mix_with_data(tmp_path: Path) -> None:
    """Not even from C, beneath Python's own stdout."""
    (tmp_path / "noisy.py").write_text(
        "import os, torch\n"
        "def model():\n"
        "    print('from Python')\n"
        "    os.write(1, b'from C\\n')\n"
        "    return torch.nn.Sequential(torch.nn.Linear(12, 10))\n"
    )
    command = [sys.executable, "-m", "structmat", "compress", "--model", "noisy:model", "--budget", "0.5", "--json"]
    done = subprocess.run(
        [*command, "--out", "out", "--family", "LowRank"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["model"] == "Sequential"
    assert "from Python" in done.stderr
    assert "from C" in done.stderr


# ------------------------------------------------------------------------------------------------ config files


def config(folder: Path, text: str) -> Path:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    return folder / "run.toml"


def test_a_config_file_can_set_every_option() -> None:
    import typer.main

    from structmat.cli.compress import OPTIONS, Settings

    command = typer.main.get_command(app).commands["compress"]  # type: ignore[attr-defined]
    names = {max(p.opts, key=len).removeprefix("--") for p in command.params} - {"help"}
    assert set(OPTIONS) == names
    assert set(Settings.__dataclass_fields__) == {p.name for p in command.params} - {"help"}


def test_compress_from_a_config_file(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and functions are found beside the file, wherever the command runs; the command line has the last word."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = config(
        tmp_path,
        f'model = "{package}:make"\ncalibration = "{package}:load"\nout = "small"\nfamily = ["LowRank"]\njson = true\n'
        '[budget]\nparameters = 0.6\nmemory = "100kB"\n[group]\n"0" = {flops = 0.5}\n',
    )
    found = json.loads(run("compress", path).stdout)
    assert [(g["budget"], g["amount"], g["layers"]) for g in found["budget"]["goals"]] == [
        ("Parameters", 0.6, ""),
        ("Memory", 100_000, ""),
        ("Flops", 0.5, "0"),
    ]
    assert all(g["spent"] <= g["limit"] for g in found["budget"]["goals"])
    assert (tmp_path / "small" / "report.html").exists()
    found = json.loads(run("compress", path, "--budget", "0.4", "--out", tmp_path / "other").stdout)
    assert [g["budget"] for g in found["budget"]["goals"]] == ["Parameters", "Flops"]
    assert found["budget"]["amount"] == 0.4
    assert (tmp_path / "other" / "plan.json").exists()


def test_recovery_from_a_config_file(package: str, tmp_path: Path) -> None:
    """Every setting of Distill by its name, loaders and the task's loss as functions."""
    (tmp_path / "lessons.py").write_text(
        "import torch\n"
        "def call(model, batch):\n    return model(batch['pixels'])\n"
        "def loss(output, batch):\n    return torch.nn.functional.cross_entropy(output, batch['digit'])\n"
        "def some(count, seed):\n    torch.manual_seed(seed)\n"
        "    return [{'pixels': torch.randn(8, 16), 'digit': torch.arange(8) % 4} for _ in range(count)]\n"
        "def batches():\n    return some(3, 1)\n"
        "def apart():\n    return some(1, 2)\n"
    )
    path = config(
        tmp_path,
        f'model = "{package}:make"\ncalibration = "lessons:batches"\nforward = "lessons:call"\n'
        'task-loss = "lessons:loss"\nout = "small"\nfamily = ["LowRank"]\nbudget = 0.3\n'
        '[recover]\nsteps = 4\nown-loss = 0.5\nrates = "equal"\noptimizer = "SOAP"\nheld-out = "lessons:apart"\n'
        'data = "lessons:batches"\ncheck-every = 2\n',
    )
    run("compress", path)
    recovery = json.loads((tmp_path / "small" / "report.json").read_text(encoding="utf-8"))["recovery"]
    assert recovery["steps"] == 4
    assert [step for step, _ in recovery["held_out"]] == [0, 2, 4]
    sys.modules.pop("lessons", None)


def test_compress_in_steps(package: str, tmp_path: Path) -> None:
    run(
        *("compress", "--model", f"{package}:make", "--calibration", f"{package}:load", "--family", "LowRank"),
        *("--step", "0.7", "--budget", "0.4", "--recover", "6", "--out", tmp_path / "out"),
    )
    assert {path.name for path in (tmp_path / "out" / "work").iterdir()} >= {"step-0", "step-1"}
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["recovery"]["steps"] == 3
    assert report["parameters"]["after"] <= 0.4 * report["parameters"]["before"]


@pytest.mark.parametrize("rows", ["3", "[8, 8, 8]", "{ rows = [4, 4, 4], groups = 2 }"])
def test_rows_are_split_from_a_config_file(rows: str, package: str, tmp_path: Path) -> None:
    (tmp_path / "fused.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    torch.manual_seed(0)\n    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))\n"
        "    with torch.no_grad():\n        net[0].weight[:8] = torch.randn(8, 1) @ torch.randn(1, 16)\n"
        "        net[0].weight[12:16] = torch.randn(4, 1) @ torch.randn(1, 16)\n    return net\n"
    )
    path = config(
        tmp_path,
        'model = "fused:model"\nout = "small"\nfamily = ["LowRank"]\nbudget = 0.7\njson = true\n'
        f'[split]\n"0" = {rows}\n',
    )
    json.loads(run("compress", path).stdout)
    plan = json.loads((tmp_path / "small" / "plan.json").read_text(encoding="utf-8"))
    structure = plan["layers"]["0"]["structure"]
    assert structure["family"] == "Stacked"
    assert structure["rows"] == ([4, 4, 4] if "groups" in rows else [8, 8, 8])
    assert structure["groups"] == (2 if "groups" in rows else 1)
    text = "0=4,4,4x2" if "groups" in rows else f"0={rows.strip('[]').replace(' ', '')}"
    run("compress", path, "--split", text, "--out", tmp_path / "other")
    assert (tmp_path / "other" / "plan.json").read_text() == (tmp_path / "small" / "plan.json").read_text()
    sys.modules.pop("fused", None)


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config file of the page with a model of its name; report and diff read what it wrote."""
    import re

    text = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text(encoding="utf-8")
    example = re.search(r'```toml title="run.toml"\n(.*?)```', text, re.DOTALL)
    assert example is not None
    (tmp_path / "digits.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))\n"
        "def batches():\n    torch.manual_seed(1)\n    return [torch.randn(64, 32) for _ in range(4)]\n"
        "def accuracy(net):\n"
        "    x, first = torch.cat(batches()), model()\n"
        "    with torch.no_grad():\n"
        "        return {'agreement': float((net(x).argmax(-1) == first(x).argmax(-1)).double().mean())}\n"
    )
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    path = config(tmp_path, example[1].replace("loss = 0.02", "loss = 0.2"))
    found = json.loads(run("compress", path, "--json").stdout)
    assert found["quality"]["after"]["agreement"] >= 0.8
    assert found["budget"]["spent"] < found["budget"]["dense"]
    page = tmp_path / "small" / "report.html"
    whole = page.read_text(encoding="utf-8")
    page.unlink()
    said = run("report", tmp_path / "small").stdout
    assert page.read_text(encoding="utf-8") == whole
    assert "was asked for" in said
    json.loads(run("compress", path, "--loss", "0.5", "--out", tmp_path / "smaller", "--json").stdout)
    table = run("diff", tmp_path / "small", tmp_path / "smaller").stdout
    assert "layers differ" in table
    difference = data("diff", tmp_path / "small" / "model", tmp_path / "smaller" / "model")
    assert (
        difference["totals"]["bytes of the saved model"]["a"] >= difference["totals"]["bytes of the saved model"]["b"]
    )
    monkeypatch.delitem(sys.modules, "digits", raising=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("buget = 0.5", "no option buget. Did you mean budget?"),
        ("at_least = 0.5", "no option at_least. Did you mean at-least?"),
        ("zzz = 1", "no option zzz. Known are"),
        ('seed = "one"', "seed is an integer; got 'one'"),
        ("recover = -1", "recover is a number of steps of at least 0, or a table"),
        ('model = "userland:make"\n[recover]\nstep = 3', "no setting step. Did you mean steps?"),
        ('model = "userland:make"\n[recover]\nzzz = 3', "no setting zzz. Known are anneal"),
        ('model = "userland:make"\n[recover]\noptimizer = "sgd"', "optimizer is one of adam, soap; got 'sgd'"),
        ('model = "userland:make"\n[recover]\nsteps = 0', "steps is an integer of at least 1"),
        ('model = "userland:make"\n[recover]\nclip = "much"', "Distill(clip='much'): clip is a number."),
        ('model = "userland:make"\n[recover]\ndata = "userland:none"', "recover: data userland:none: userland has no"),
        ('model = "userland:make"\nstep = [0.7]\nbudget = 0.5', "Say how with --recover"),
        ('model = "userland:make"\nstep = [0.7]\nloss = 0.5\nrecover = 2', "goes before one --budget"),
        ("relative = 1", "relative is true or false"),
        ("family = [1]", "family is a list of strings"),
        ("model = 3", "model is a string"),
        ("budget = true", "budget is a number"),
        ("budget = ", "is not TOML"),
        ('model = "userland:make"\nbudget = "weight=3"', "weight is none of parameters"),
        ('model = "userland:make"\n[group]\n"0" = "half"', "half is no number"),
        ('model = "userland:make"\nbudget = "memory=20mb"', "Did you mean 20MB?"),
        ('model = "userland:make"\nplan = "plan.json"\nbudget = 0.5', "there is no budget to keep"),
        ('model = "userland:make"\nloss = 0.1\nbetter = "up"', "neither higher nor lower"),
        ('model = "userland:make"\n[split]\n"0" = 2.5', "split is a table such as"),
        ('model = "userland:make"\n[split]\n"0" = "heads"', "--split 0=heads is not PATTERN=PARTS"),
        ('model = "userland:make"\n[split]\n"0" = 7', "outputs, which are not 7 equal parts"),
        ('model = "userland:make"\nplan = "plan.json"\n[split]\n"0" = 2', "--split has nothing to choose"),
    ],
)
def test_config_files_are_read_strictly(text: str, says: str, package: str, tmp_path: Path) -> None:
    refused = run("compress", config(tmp_path, text), code=2)
    assert says in " ".join(refused.stderr.split())


def test_report_and_diff_refuse_what_is_none(tmp_path: Path) -> None:
    assert "holds no report.json" in run("report", tmp_path, code=2).stderr
    assert "holds neither" in run("diff", tmp_path, tmp_path, code=2).stderr
