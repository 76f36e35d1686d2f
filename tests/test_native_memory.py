"""No memory grows over ten thousand calls, whatever is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from structmat.kernels import native

STATE = Path("/proc/self/statm")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native().available, reason=f"no native library: {native().reason}"),
    pytest.mark.skipif(not STATE.exists(), reason=f"the memory of a process is read from {STATE}, which is not there"),
]

CALLS = 10_000

LIMIT = 1024
"""KB: a hundred bytes a call."""

START = """
import resource, torch, structmat as sm
torch.set_num_threads(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024

def layer(structure=sm.Monarch(8), dtype=torch.float32):
    return sm.nn.StructuredLinear(64, 64, structure=structure, dtype=dtype)

def inference(function):
    def call(number):
        with torch.inference_mode():
            function(number)
    return call
"""

END = """
with sm.backend(BACKEND):
    for number in range(1000):
        call(number)
    before = resident()
    for number in range(CALLS):
        call(number)
    print(resident() - before)
"""

CASES = {
    "forward": """
net, x = layer(), torch.randn(64, 64)
call = inference(lambda number: net(x))
""",
    "half precision": """
net, x = layer(dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16)
call = inference(lambda number: net(x))
""",
    "few rows": """
net, x = layer(), torch.randn(3, 64)
call = inference(lambda number: net(x))
""",
    "frozen": """
net, x = layer(sm.Butterfly()).freeze(), torch.randn(64, 64)
call = inference(lambda number: net(x))
""",
    "sparse": """
net, x = layer(sm.Sparse(density=0.2)), torch.randn(64, 64)
call = inference(lambda number: net(x))
""",
    "forward and backward": """
net, x = layer(sm.Butterfly()), torch.randn(64, 64, requires_grad=True)
def call(number):
    net.zero_grad()
    net(x).sum().backward()
""",
    "sparse, forward and backward": """
net, x = layer(sm.Sparse(density=0.2)), torch.randn(64, 64, requires_grad=True)
def call(number):
    net.zero_grad()
    net(x).sum().backward()
""",
    "some gradients": """
net = layer()
inputs = [torch.randn(16, 64, requires_grad=needed) for needed in (True, False)]
def call(number):
    first, second = list(net.parameters())[:2]
    first.requires_grad_(number % 3 != 0)
    second.requires_grad_(number % 3 != 1)
    net.zero_grad()
    net(inputs[number % 2]).sum().backward()
""",
    "matmul": """
S = sm.StructuredMatrix.random(sm.Monarch(8), (64, 64))
x = torch.randn(64, 50)
call = inference(lambda number: sm.matmul(S, x))
""",
    "matmul with out": """
S = sm.StructuredMatrix.random(sm.Monarch(8), (64, 64))
x, y = torch.randn(50, 64).T, torch.empty(50, 64).T
call = inference(lambda number: sm.matmul(S, x, out=y))
""",
    "transposes": """
S = sm.StructuredMatrix.random(sm.BLAST(4, rank=4), (64, 48))
x = torch.randn(64, 20)
call = inference(lambda number: S.T @ x)
""",
    "many shapes and numbers of rows": """
structures = [sm.Monarch(4), sm.Butterfly(), sm.LowRank(3), sm.Sparse(density=0.1), sm.BLAST(2, rank=2)]
nets = [
    sm.nn.StructuredLinear(width, 7 * height + 9, structure=structure)
    for structure in structures for width in (16, 24, 40) for height in range(1, 5)
]
inputs = [[torch.randn(rows, net.in_features) for rows in (1, 5, 16, 70)] for net in nets]
call = inference(lambda number: nets[number % 60](inputs[number % 60][number // 60 % 4]))
""",
}


def growth(case: str, backend: str = "native") -> int:
    """KB by which a process is larger after the calls."""
    code = "".join([START, case, f"BACKEND, CALLS = {backend!r}, {CALLS}\n", END])
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_no_memory_grows_over_ten_thousand_calls(name: str) -> None:
    assert growth(CASES[name]) < LIMIT


def test_nor_does_it_where_the_backend_is_chosen() -> None:
    assert growth(CASES["many shapes and numbers of rows"], "auto") < LIMIT


def test_a_small_leak_is_noticed() -> None:
    leak = CASES["forward"] + "kept = []\ncall = lambda number: kept.append(bytes(200))\n"
    assert growth(leak) >= LIMIT
