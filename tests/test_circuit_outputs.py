"""What a circuit becomes: text, pictures, C functions, PyTorch modules."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from circuits import fft, hadamard, random_linear, random_polynomial

from structmat.circuit import Builder, Circuit, equal, trace
from structmat.circuit.module import CircuitModule
from structmat.errors import CircuitError

SVG = "{http://www.w3.org/2000/svg}"

# --------------------------------------------------------------------------------------------------- text, pictures


def test_the_summary_states_both_conventions() -> None:
    builder = Builder(4)
    w = builder.parameter("w", [3.0])
    total = builder.sum([0, 1, 2, 3], [1, 2, 1, 1], parameters=[w[0], -1, -1, -1])
    circuit = builder.build([builder.sum([total, builder.constant(1)])])
    assert str(circuit).splitlines() == [
        "General circuit of 4 inputs and 1 output",
        "                              binary    unbounded fan-in",
        "  gates                            4                   2",
        "  size, with inputs                8                   6",
        "  depth                            3                   2",
        "  multiplications                  2",
        "  additions                        4",
        "  constants                        1",
        "  parameters                       1  w (1,)",
        "  level widths: 5 1 1",
    ]
    assert repr(circuit) == "<Circuit: 4 inputs, 7 nodes, 1 outputs>"
    long = trace(lambda x: np.cumsum(x), 40)
    assert "1 1 ... (28 more) 1 1" in str(long)
    ratio = builder.build([builder.quotient(0, 1)])
    assert "divisions                        1" in str(ratio)


@pytest.mark.parametrize("seed", range(6))
def test_small_circuits_are_drawn_node_by_node(seed: int, tmp_path: Path) -> None:
    circuit = random_polynomial(seed, parameters=2, divisions=True)
    text = circuit.draw(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8") == text
    root = ET.fromstring(text)
    panels = root.findall(f"{SVG}g")
    assert len(panels) == 1
    assert len(panels[0].findall(f"{SVG}circle")) == circuit.nodes
    ticks = len(set(circuit.outputs.tolist()))
    assert len(panels[0].findall(f"{SVG}line")) == circuit.edges + ticks
    inside(root)


def test_linear_circuits_are_drawn_beside_their_transpose() -> None:
    root = ET.fromstring(fft(3).draw())
    left, right = root.findall(f"{SVG}g")
    assert len(left.findall(f"{SVG}circle")) == len(right.findall(f"{SVG}circle")) == 32
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert "transposed: every edge reversed" in words
    assert words.count("24 gates, depth 3, 10 mult., 24 add.") == 2
    assert len(ET.fromstring(fft(3).draw(transposed=False)).findall(f"{SVG}g")) == 1
    assert fft(2)._repr_svg_() == fft(2).draw()
    with pytest.raises(CircuitError, match="transpose needs a linear circuit"):
        random_polynomial(3, divisions=True).draw(transposed=True)
    inside(root)


def inside(root: ET.Element) -> None:
    """All coordinates are within the picture."""
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for group in root.findall(f"{SVG}g"):
        left, top = (float(v) for v in group.attrib["transform"][10:-1].split())
        for shape in group.iter():
            for name, limit, offset in (
                ("cx", width, left),
                ("x2", width, left),
                ("cy", height, top),
                ("y", height, top),
            ):
                if name in shape.attrib:
                    assert 0 <= float(shape.attrib[name]) + offset <= limit


@pytest.mark.parametrize("circuit", [hadamard(8), trace(lambda x: np.cumsum(x), 1000)], ids=["wide", "deep"])
def test_large_circuits_are_drawn_as_profiles(circuit: Circuit) -> None:
    text = circuit.draw()
    assert len(text) < 60_000
    root = ET.fromstring(text)
    assert not list(root.iter(f"{SVG}circle"))
    bars = root.find(f"{SVG}g").findall(f"{SVG}rect")  # type: ignore[union-attr]
    assert len(bars) == min(circuit.levels.count, -(-circuit.levels.count // -(-circuit.levels.count // 160)))
    assert sum(1 for _ in root.iter(f"{SVG}polyline")) == 2
    inside(root)


# --------------------------------------------------------------------------------------------------------- C function


def compiled(circuit: Circuit, folder: Path, name: str = "circuit") -> Any:
    """The circuit's C function, compiled with warnings as errors."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source, library = folder / f"{name}.c", folder / f"{name}.so"
    source.write_text(circuit.to_c(name), encoding="utf-8")
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True, capture_output=True)
    function = getattr(ctypes.CDLL(str(library)), name)

    def call(x: np.ndarray, theta: np.ndarray | None = None) -> np.ndarray:
        is_complex = circuit.weight.dtype.kind == "c"
        arrays = [np.ascontiguousarray(a, complex if is_complex else float) for a in (x, theta) if a is not None]
        y = np.empty(circuit.out_features, dtype=complex if is_complex else float)
        assert function(*(a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, y))) == 0
        return y

    return call


@pytest.fixture(params=["statements", "tables"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tables":
        monkeypatch.setattr("structmat.circuit.export_c.MOST_STATEMENTS", -1)
    return str(request.param)


def test_c_functions_compute_what_the_circuit_does(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(4):
        circuit = random_polynomial(seed, parameters=2, divisions=True)
        x, theta = rng.uniform(0.5, 1.5, circuit.in_features), rng.uniform(0.5, 1.5, 2)
        function = compiled(circuit, tmp_path, f"f{seed}_{form}")
        assert function(x, theta) == pytest.approx(circuit.evaluate(x, parameters=theta), rel=1e-12)
    linear = random_linear(3, integers=False)
    x = rng.standard_normal(linear.in_features)
    assert compiled(linear, tmp_path, f"l_{form}")(x) == pytest.approx(linear.evaluate(x), rel=1e-12, abs=1e-12)


def test_complex_c_functions(form: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal(16) + 1j
    assert np.abs(compiled(fft(4), tmp_path, f"fft_{form}")(x) - np.fft.fft(x)).max() < 1e-13


def test_odd_circuits_in_c(form: str, tmp_path: Path) -> None:
    builder = Builder(2)
    circuit = builder.build([builder.sum([]), builder.constant(2), 0, 0, builder.product([1])])
    assert compiled(circuit, tmp_path, f"odd_{form}")([3, 4]).tolist() == [0, 2, 3, 3, 4]
    unread = builder.build([builder.constant(0.1)])
    assert compiled(unread, tmp_path, f"unread_{form}")([3, 4]).tolist() == [0.1]


def test_large_circuits_become_tables(tmp_path: Path) -> None:
    circuit = hadamard(11)
    assert "static const int operand[]" in circuit.to_c()
    x = np.random.default_rng(0).standard_normal(2048)
    assert compiled(circuit, tmp_path)(x) == pytest.approx(circuit.evaluate(x), abs=1e-10)


@pytest.mark.parametrize("name", ["", "2x", "a b", "double", "x", "é"])
def test_names_that_are_none_in_c(name: str) -> None:
    with pytest.raises(CircuitError, match="no name of a C function"):
        hadamard(1).to_c(name)


# ------------------------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("seed", range(20))
def test_modules_compute_what_the_circuit_does(seed: int) -> None:
    circuit = random_polynomial(seed, parameters=seed % 3, divisions=seed % 2 == 0)
    x = np.random.default_rng(seed).standard_normal((2, 3, circuit.in_features))
    module = circuit.module(torch.float64)
    expected = circuit.evaluate(x.reshape(6, -1)).reshape(2, 3, -1)
    y = module(torch.from_numpy(x))
    assert y.detach().numpy() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert module(torch.from_numpy(x[0, 0])).shape == (circuit.out_features,)
    assert module(torch.zeros(0, circuit.in_features)).shape == (0, circuit.out_features)


@pytest.mark.parametrize("seed", range(10))
def test_gradients_of_modules_are_the_gradient_circuit(seed: int) -> None:
    circuit = random_polynomial(seed, outputs=1, parameters=3)
    module = circuit.module(torch.float64)
    point = np.random.default_rng(seed).uniform(0.5, 1.0, circuit.in_features)
    x = torch.tensor(point, requires_grad=True)
    value = module(x)[0]
    if not value.requires_grad:
        pytest.skip("a constant")
    grads = torch.autograd.grad(value, [x, module.theta], allow_unused=True)
    expected = circuit.gradient(parameters=True).evaluate(point)
    actual = [np.zeros(n) if g is None else g.numpy() for g, n in zip(grads, (circuit.in_features, 3), strict=True)]
    assert np.concatenate(actual) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("inputs", [0, 1, 3])
def test_modules_of_circuits_without_gates(inputs: int, outputs: int) -> None:
    builder = Builder(inputs)
    layer = builder.build([builder.sum([])] * outputs).module()
    for batch in ((), (2,), (0,), (2, 0)):
        assert layer(torch.ones(*batch, inputs)).shape == (*batch, outputs)


def test_modules_keep_names_shapes_and_types() -> None:
    builder = Builder(2)
    w = builder.parameter("0.w", [[1.0, 2.0]])
    b = builder.parameter("b", 3.0)
    circuit = builder.build([builder.sum([0, 1, builder.one], parameters=[*w[0], b])])
    module = circuit.module()
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"0_w": (1, 2), "b": ()}
    assert list(module.state_dict()) == ["0_w", "b"]
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert repr(module) == "CircuitModule(2 -> 1, 2 gates, depth 2)"
    with torch.no_grad():
        module.get_parameter("b").fill_(5)
    assert equal(module.circuit(), circuit.with_values({"b": 5.0}))
    assert module.circuit().values.tolist() == [1, 2, 5]
    other = circuit.module()
    other.load_state_dict(module.state_dict())
    assert other(torch.ones(2)).item() == 8
    with pytest.raises(CircuitError, match=r"2 inputs; got values of shape \(3,\)"):
        module(torch.ones(3))
    clash = Builder(1)
    clash.parameter("a.b", 1.0)
    clash.parameter("a_b", 1.0)
    with pytest.raises(CircuitError, match="the same name once dots are underscores"):
        clash.build([0]).module()


def test_constants_become_trainable() -> None:
    circuit = fft(3)
    trained = circuit.trainable()
    assert trained.parameters == circuit.multiplications == trained.multiplications
    assert circuit.trainable(tied=True).parameters == len(np.unique(circuit.weight[np.abs(circuit.weight.imag) > 1e-9]))
    assert circuit.trainable(units=True).parameters == circuit.edges
    for version in (trained, circuit.trainable(tied=True), circuit.trainable(units=True, name="all")):
        assert np.allclose(version.to_dense(), circuit.to_dense())
    assert hadamard(2).trainable() is not None
    with pytest.raises(CircuitError, match="already has parameters named 'weight'"):
        trained.trainable()
    mixed = trained.trainable(units=True, name="units")
    assert mixed.parameters == circuit.edges
    assert hadamard(2).trainable().parameters == 0


def test_a_perturbed_algorithm_is_trained_back() -> None:
    """The Hadamard transform's constants, disturbed by a tenth: its matrix is found again."""
    circuit = hadamard(3).trainable(units=True)
    noise = 0.1 * np.random.default_rng(0).standard_normal(circuit.parameters)
    module = circuit.with_values(circuit.values + noise).module(torch.float64)
    target = torch.from_numpy(hadamard(3).to_dense()).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (module(torch.eye(8, dtype=torch.float64)).T - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert np.abs(module.circuit().to_dense() - target.numpy()).max() < 1e-2


def test_modules_are_one_graph_for_the_compiler() -> None:
    module = fft(3).trainable().module()
    assert isinstance(module, CircuitModule)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(5, 8)
    compiled_module = torch.compile(module, backend=backend, fullgraph=True)
    assert torch.allclose(compiled_module(x), module(x))
    assert len(graphs) == 1
    assert torch.allclose(module(x), torch.fft.fft(x), atol=1e-5)
    assert module(x).dtype == torch.complex64
