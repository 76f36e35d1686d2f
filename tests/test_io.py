"""Saving and loading: round trips, atomic replacement, and files that must be refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import structmat as sm
from structmat.errors import DataError, FormatError, ModelError
from structmat.file_format import HEADER
from structmat.places import pack, packed_shape, unpack


class Small(nn.Module):
    """Two linear layers that can be replaced, a norm, a tied head, a computed buffer."""

    computed: torch.Tensor
    running: torch.Tensor

    def __init__(self, width: int = 12, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.first = nn.Linear(width, 24)
        self.second = nn.Linear(24, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("computed", torch.arange(width) / width, persistent=False)
        self.register_buffer("running", torch.ones(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.computed
        return self.head(self.norm(x + self.second(torch.relu(self.first(x)))) * self.running)


def structured(*, tied: bool = True) -> Small:
    torch.manual_seed(0)
    model = Small(tied=tied)
    model.first = sm.nn.StructuredLinear.from_linear(model.first, sm.LowRank(rank=4))
    model.second = sm.nn.StructuredLinear.from_linear(model.second, sm.BlockDiagonal(blocks=5))
    model.running.mul_(1.5)
    return model


TOKENS = torch.arange(7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sm.save(structured(), tmp_path / "model")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip(folder: Path, device: str) -> None:
    with torch.device(device):
        fresh = Small()
    loaded = sm.load(folder, fresh)
    assert loaded is fresh
    assert torch.equal(loaded(TOKENS), structured()(TOKENS))
    assert loaded.first.structure == sm.LowRank(rank=4)
    assert loaded.head.weight is loaded.embed.weight
    assert all(p.requires_grad for p in loaded.parameters())
    loaded(TOKENS).sum().backward()
    assert loaded.first.left.grad is not None


def test_only_the_structured_tensors_are_stored(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    names = set(load_file(path))
    assert {"first.left", "first.right", "first.bias", "second.weight"} <= names
    assert "first.weight" not in names
    assert "head.weight" not in names  # tied with the embedding
    assert not list(folder.glob(".*"))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(("nonzeros", "bits"), [(5, False), (40, True)])
def test_a_support_is_stored_as_bits_or_as_a_list(tmp_path: Path, nonzeros: int, bits: bool) -> None:
    model = nn.Sequential(nn.Linear(13, 21))
    model[0] = sm.nn.StructuredLinear.from_linear(model[0], sm.Sum(sm.LowRank(2), sm.Sparse(nonzeros=nonzeros)))
    folder = sm.save(model, tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    stored = load_file(path)["0.term1_places"]
    assert (stored.dtype, len(stored)) == ((torch.uint8, 35) if bits else (torch.int64, nonzeros))
    loaded = sm.load(folder, nn.Sequential(nn.Linear(13, 21)))
    assert torch.equal(loaded[0].term1_places, model[0].term1_places)
    x = torch.randn(3, 13)
    assert torch.equal(loaded(x), model(x))
    matrix = sm.StructuredMatrix.random(sm.Sparse(nonzeros=nonzeros), (21, 13), dtype=torch.complex64)
    assert torch.equal(sm.load(sm.save(matrix.T, tmp_path / "matrix")).to_dense(), matrix.T.to_dense())


@given(st.integers(1, 200), st.data())
def test_places_survive_packing(size: int, data: st.DataObject) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, size - 1))))
    packed = pack(torch.tensor(places, dtype=torch.int64), size)
    assert packed.shape == packed_shape(size)
    assert unpack(packed, len(places), size, "support").tolist() == places
    with pytest.raises(FormatError, match=f"must set {len(places) + 1} of {size}"):
        unpack(packed, len(places) + 1, size, "support")
    if size % 8:
        packed[-1] |= 128
        with pytest.raises(FormatError, match="up to place"):
            unpack(packed, len(places) + 1, size, "support")


def test_loading_makes_no_dense_copy(tmp_path: Path) -> None:
    layer = sm.nn.StructuredLinear(4096, 4096, False, structure=sm.LowRank(rank=1))
    sm.save(nn.Sequential(layer), tmp_path)
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    largest = max(largest, tensor.nbytes)
            return result

    with Watch():
        sm.load(tmp_path, fresh)
    assert 0 < largest <= 4 * 4096


def test_the_model_may_have_the_ties_that_the_file_lacks(tmp_path: Path) -> None:
    model = structured(tied=False)
    sm.save(model, tmp_path)
    with pytest.raises(FormatError, match=r"embed\.weight.*head\.weight.*one tensor in the model"):
        sm.load(tmp_path, Small())
    with torch.no_grad():
        model.head.weight.copy_(model.embed.weight)
    sm.save(model, tmp_path)
    assert torch.equal(sm.load(tmp_path, Small())(TOKENS), model(TOKENS))


def test_the_file_may_have_ties_that_the_model_lacks(folder: Path) -> None:
    loaded = sm.load(folder, Small(tied=False))
    assert loaded.head.weight is loaded.embed.weight


def test_a_layer_in_two_places(tmp_path: Path) -> None:
    layer = sm.nn.StructuredLinear(6, 6, structure=sm.LowRank(rank=2))
    sm.save(nn.Sequential(layer, nn.ReLU(), layer), tmp_path)
    dense = nn.Linear(6, 6)
    loaded = sm.load(tmp_path, nn.Sequential(dense, nn.ReLU(), dense))
    assert loaded[0] is loaded[2]
    assert torch.equal(loaded[0].left, layer.left)
    apart = sm.load(tmp_path, nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    assert torch.equal(apart[2].right, layer.right)


def test_a_single_layer_is_returned(tmp_path: Path) -> None:
    layer = sm.nn.StructuredLinear(5, 3, structure=sm.LowRank(rank=2))
    sm.save(layer, tmp_path)
    loaded = sm.load(tmp_path, nn.Linear(5, 3))
    assert isinstance(loaded, sm.nn.StructuredLinear)
    assert torch.equal(loaded.left, layer.left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_round_trip(tmp_path: Path, dtype: torch.dtype, transposed: bool) -> None:
    matrix = sm.StructuredMatrix.random(sm.LowRank(rank=2), (5, 7), dtype=dtype)
    matrix = matrix.T if transposed else matrix
    sm.save(matrix, tmp_path)
    loaded = sm.load(tmp_path)
    assert (loaded.structure, loaded.shape, loaded.dtype) == (matrix.structure, matrix.shape, dtype)
    assert torch.equal(loaded.to_dense(), matrix.to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_layers_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = sm.nn.StructuredLinear(6, 9, structure=sm.LowRank(rank=2), dtype=dtype)
    sm.save(nn.Sequential(layer), tmp_path)
    loaded = sm.load(tmp_path, nn.Sequential(nn.Linear(6, 9)))
    x = torch.randn(4, 6, dtype=dtype)
    assert torch.equal(loaded(x), layer(x))


def test_every_family_round_trips(tmp_path: Path) -> None:
    for name, family in sm.families().items():
        for structure in list(family.configurations((16, 24), 16 * 24))[:1]:
            model = nn.Sequential(sm.nn.StructuredLinear(24, 16, structure=structure))
            sm.save(model, tmp_path / name)
            loaded = sm.load(tmp_path / name, nn.Sequential(nn.Linear(24, 16)))
            x = torch.randn(3, 24)
            assert torch.equal(loaded(x), model(x)), structure


def test_views_of_one_memory(tmp_path: Path) -> None:
    model = nn.Module()
    memory = torch.arange(12.0)
    model.register_buffer("flat", memory)
    model.register_buffer("square", memory.view(3, 4))
    model.register_buffer("part", memory[2:5])
    model.register_buffer("turned", memory.view(3, 4).T)
    sm.save(model, tmp_path)
    fresh = nn.Module()
    for name, shape in {"flat": (12,), "square": (3, 4), "part": (3,), "turned": (4, 3)}.items():
        fresh.register_buffer(name, torch.zeros(shape))
    loaded = sm.load(tmp_path, fresh)
    assert torch.equal(loaded.part, memory[2:5])
    assert torch.equal(loaded.turned, memory.view(3, 4).T)


def test_saving_again_replaces_and_a_killed_save_does_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = structured()
    with torch.no_grad():
        model.norm.weight.mul_(3)
    from structmat import files

    real = files.os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == HEADER:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        sm.save(model, folder)
    monkeypatch.undo()
    assert torch.equal(sm.load(folder, Small())(TOKENS), structured()(TOKENS))  # the old one, whole
    sm.save(model, folder)
    assert torch.equal(sm.load(folder, Small())(TOKENS), model(TOKENS))
    assert len(list(folder.iterdir())) == 2


def test_saving_is_deterministic(folder: Path, tmp_path: Path) -> None:
    again = sm.save(structured(), tmp_path / "again")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    model = structured()
    with torch.no_grad():
        model.first.left[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"first\.left.*1 entries"):
        sm.save(model, tmp_path / "a")
    with torch.device("meta"), pytest.raises(ModelError, match="meta device"):
        sm.save(Small(), tmp_path / "a")
    frozen = structured()
    frozen.first = frozen.first.freeze()
    with pytest.raises(ModelError, match="'first' is frozen"):
        sm.save(frozen, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="is a file"):
        sm.save(structured(), tmp_path / "file")


# ------------------------------------------------------------------------------------------- a model that differs


def test_architectures_that_differ_are_named_and_left_alone(folder: Path) -> None:
    for model, message in [
        (Small(width=10), r"'first'.*\(24, 10\).*\(24, 12\)"),
        (nn.Sequential(nn.Linear(12, 24)), "no layer 'first'"),
        (_changed(lambda m: setattr(m, "norm", nn.Identity())), r"not in the model: norm\.bias, norm\.weight"),
        (_changed(lambda m: setattr(m, "extra", nn.Linear(2, 2))), r"missing in the file: extra\.bias, extra\.weight"),
        (_changed(lambda m: setattr(m, "norm", nn.LayerNorm(5))), r"other shape: norm\.bias \(5,\) in the model"),
        (_changed(lambda m: setattr(m, "first", nn.Conv1d(12, 24, 1))), "details|Conv1d"),
        (_changed(lambda m: setattr(m, "first", nn.Linear(12, 24, bias=False))), "bias=False"),
    ]:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(FormatError, match=message):
            sm.load(folder, model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _changed(change: Any) -> Small:
    model = Small()
    change(model)
    return model


def test_matrix_and_model_are_told_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"Build its architecture and call load\(folder, model\)"):
        sm.load(folder)
    matrix = sm.save(sm.StructuredMatrix.random(sm.LowRank(rank=1), (3, 3)), tmp_path / "matrix")
    with pytest.raises(FormatError, match="holds one matrix"):
        sm.load(matrix, Small())


# ------------------------------------------------------------------------------------- files that must be refused


def edit(folder: Path, change: Any) -> None:
    data = json.loads((folder / HEADER).read_text())
    change(data)
    (folder / HEADER).write_text(json.dumps(data))


def rewrite(folder: Path, content: bytes) -> None:
    """Put in another tensor file, with size and digest that agree: an attack, not an accident."""
    for old in folder.glob("*.safetensors"):
        old.unlink()
    digest = hashlib.sha256(content).hexdigest()
    name = f"model-{digest[:16]}.safetensors"
    (folder / name).write_bytes(content)
    edit(folder, lambda d: d.update(tensors={"file": name, "bytes": len(content), "sha256": digest}))


def tensor_bytes(folder: Path) -> bytes:
    (path,) = folder.glob("*.safetensors")
    return path.read_bytes()


HEADERS = {
    "foreign": (lambda d: d.update(format="other"), "was not written by structmat"),
    "newer": (lambda d: d.update(version=3, library="9.0"), r"version 3 .*9\.0.*Update structmat"),
    "version of another kind": (lambda d: d.update(version="1"), "versions are integers"),
    "version true": (lambda d: d.update(version=True), "versions are integers"),
    "unknown field": (lambda d: d.update(extra=1), "unknown: .'extra'"),
    "missing field": (lambda d: d.pop("shared"), "missing: .'shared'"),
    "unknown kind": (lambda d: d.update(kind="thing"), "'thing'"),
    "unknown family": (lambda d: d["layers"]["first"]["structure"].update(family="Magic"), "Unknown family 'Magic'"),
    "unknown option": (lambda d: d["layers"]["first"]["structure"].update(size=1), "no field size"),
    "illegal rank": (lambda d: d["layers"]["first"]["structure"].update(rank=0), "rank is at least 1"),
    "huge rank": (lambda d: d["layers"]["first"]["structure"].update(rank=10**30), "at most 12"),
    "fraction": (lambda d: d["layers"]["first"]["structure"].update(rank=0.5), "not resolved"),
    "other rank": (lambda d: d["layers"]["first"]["structure"].update(rank=3), "the file has"),
    "huge shape": (lambda d: d["layers"]["first"].update(shape=[10**12, 10**12]), "the file has"),
    "negative shape": (lambda d: d["layers"]["first"].update(shape=[-24, 12]), "at least 1"),
    "one axis": (lambda d: d["layers"]["first"].update(shape=[24]), "two integers"),
    "dtype": (lambda d: d["layers"]["first"].update(dtype="float99"), "unknown dtype"),
    "dtype that is none": (lambda d: d["layers"]["first"].update(dtype="nn"), "unknown dtype"),
    "other dtype": (lambda d: d["layers"]["first"].update(dtype="float64"), r"must be torch\.float64"),
    "path": (lambda d: d["tensors"].update(file="../../secret.safetensors"), "no tensor file of this folder"),
    "size": (lambda d: d["tensors"].update(bytes=-1), "too long"),
    "digest": (lambda d: d["tensors"].update(sha256="0" * 64), "damaged"),
    "shared with nothing": (lambda d: d["shared"].update({"head.weight": "nothing"}), "said to be shared"),
    "shared twice": (lambda d: d["shared"].update({"norm.bias": "norm.weight"}), "said to be shared"),
    "computed nothing": (lambda d: d["computed"].append("nothing"), "lacks nothing"),
    "layers a list": (lambda d: d.update(layers=[]), "damaged"),
    "layer a number": (lambda d: d["layers"].update(first=3), "damaged"),
    "structure a text": (lambda d: d["layers"]["first"].update(structure="LowRank"), "A structure is an object"),
    "layer that is not there": (lambda d: d["layers"].update(third=d["layers"]["first"]), "the file has {}"),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_headers_that_are_refused(folder: Path, attack: str) -> None:
    change, message = HEADERS[attack]
    edit(folder, change)
    with pytest.raises(FormatError, match=message):
        sm.load(folder, Small())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"format": "structmat", "format": "structmat"}', "twice"),
        (b"3", "was not written by structmat"),
        (b"{}", "was not written by structmat"),
        (b'{"format": "structmat", "version": 1' + b" " * 100, "not valid JSON"),
        (b'{"format": "structmat", "version": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_header_text_that_is_refused(folder: Path, text: bytes, message: str) -> None:
    (folder / HEADER).write_bytes(text)
    with pytest.raises(FormatError, match=message):
        sm.load(folder, Small())


def test_oversized_header_is_not_read(folder: Path) -> None:
    with (folder / HEADER).open("r+b") as file:
        file.truncate(2**29)  # sparse: takes no disk
    with pytest.raises(FormatError, match="no header is that long"):
        sm.load(folder, Small())


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nothing was saved there"):
        sm.load(tmp_path / "nowhere", Small())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FormatError, match="is missing"):
        sm.load(folder, Small())


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_tensors(folder: Path, length: int) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FormatError, match="truncated"):
        sm.load(folder, Small())


def test_one_flipped_bit(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(FormatError, match="damaged"):
        sm.load(folder, Small())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 50) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 66) + b'{"first.left":{"dtype":"F32","shape":[24,4],"data_offsets":[0,9]}}',
        b"PK\x03\x04" + b"\x80\x04." * 40,
    ],
)
def test_lying_safetensors(folder: Path, content: bytes) -> None:
    rewrite(folder, content)
    with pytest.raises(FormatError):
        sm.load(folder, Small())


def test_tensors_that_do_not_fit_the_structure(folder: Path, tmp_path: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name, value, message in [
        ("first.left", torch.zeros(24, 5), "the file has"),
        ("first.weight", torch.zeros(24, 12), "the file has"),
        ("first.left", torch.full((24, 4), float("inf")), "NaN or infinite"),
        ("norm.weight", torch.full((12,), float("nan")), "NaN or infinite"),
        ("first.left", torch.zeros(24, 4, dtype=torch.int32), "must be"),
    ]:
        save_file({**tensors, name: value}, tmp_path / "other")
        rewrite(folder, (tmp_path / "other").read_bytes())
        model = Small()
        before = model(TOKENS)
        with pytest.raises(FormatError, match=message):
            sm.load(folder, model)
        assert torch.equal(model(TOKENS), before)


@pytest.mark.slow
def test_fuzz(folder: Path, tmp_path: Path) -> None:
    """Random damage with agreeing digests: refused with FormatError or loaded whole, never another exception."""
    header, content, rng = (folder / HEADER).read_bytes(), tensor_bytes(folder), random.Random(0)
    refused = 0
    for _ in range(3000):
        where = tmp_path / "fuzz"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        text, data = bytearray(header), bytearray(content)
        if rng.random() < 0.5:
            _damage(text, rng, len(text))
            (where / HEADER).write_bytes(text)
            (where / next(folder.glob("*.safetensors")).name).write_bytes(data)
        else:
            (where / HEADER).write_bytes(text)
            _damage(data, rng, 700)  # mostly its header
            rewrite(where, bytes(data))
        try:
            sm.load(where, Small())
        except FormatError:
            refused += 1
    assert refused > 1000


def _damage(data: bytearray, rng: random.Random, reach: int) -> None:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(reach, len(data)))
        match rng.randrange(3):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randint(1, 9)]
            case _:
                data[place:place] = rng.choice([b"0", b"-", b"9999999", b"{", b'"', b"null", b"1e400", b"NaN"])
