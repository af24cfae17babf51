"""Weights that are defined here, and nowhere known: they obey the laws, are saved, read, verified, inspected and counted."""

import json
import struct
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.disk.store import MANIFEST, read_manifest
from laconic.errors import CheckpointError, SchemeError
from laconic.measure.objectives import nonzero_bytes_of
from laconic.show.inspect import inspect_directory
from laconic.weights import Dense, Inputs, Scaled, Sparse, Sum, Uniform, View, Weight, install, installed
from laconic.weights.base import Packed, class_of
from laconic.weights.spec import Spec
from tests.weights.laws_weights import SHAPE, W, WeightLaws, factor, solved


class Kronecker(Weight):
    """W = left (x) right, two small weights: parts, and nothing beside them."""

    kind = "kronecker"
    part_names = ("left", "right")

    def __init__(self, left: Weight, right: Weight) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.shape = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])

    def forward(self) -> Tensor:
        return torch.kron(self.left.forward(), self.right.forward())

    def right_inverse(self, W: Tensor) -> tuple[()]:
        """The nearest product (Van Loan and Pitsianis 1993): rank one of the blocks, each a row."""
        (m, n), (p, q) = self.left.shape, self.right.shape
        blocks = W.detach().reshape(m, p, n, q).permute(0, 2, 1, 3).reshape(m * n, p * q)
        U, S, Vh = torch.linalg.svd(blocks, full_matrices=False)
        root = S[0].sqrt()
        self.left.right_inverse((root * U[:, 0]).reshape(m, n))
        self.right.right_inverse((root * Vh[0]).reshape(p, q))
        return ()


class Blended(Weight):
    """W = diag(1 - share) one + diag(share) other, with a bias: parts of all sorts, a field and a tensor of its own."""

    kind = "blended"
    part_names = ("one", "other", "bias")

    def __init__(self, one: Weight, other: Weight, share: Tensor, bias: Weight | None = None, note: str = "") -> None:
        super().__init__()
        self.one, self.other, self.bias, self.note, self.shape = one, other, bias, note, one.shape
        self.register_buffer("share", share)

    share: Tensor

    def forward(self) -> Tensor:
        share = self.share[:, None]
        return (1 - share) * self.one.forward() + share * self.other.forward()

    def right_inverse(self, W: Tensor) -> tuple[()]:
        self.one.right_inverse(W)
        self.other.right_inverse(W)
        return ()

    def own(self) -> tuple[Spec, dict[str, Tensor]]:
        return {"note": self.note}, {"share": self.share.half().cpu()}

    @classmethod
    def tensors_in(cls, spec: Spec) -> tuple[str, ...]:
        if spec.get("note") not in ("", "half and half"):
            raise CheckpointError("blended: an unknown note")
        return ("share",)

    @classmethod
    def read(cls, packed: Packed) -> Self:
        share = packed.tensor("share", torch.float16, (packed.shape[0],)).float()
        return cls(packed.part("one"), packed.part("other"), share, packed.optional("bias"), packed.spec["note"])


def kronecker(left: Weight, right: Weight) -> Weight:
    for part in (left, right):
        if isinstance(part, Uniform):
            part.fit(torch.linspace(-0.3, 0.5, part.shape[0] * part.shape[1]).reshape(part.shape))
    return solved(Kronecker(left, right))


def blended(bias: Weight | None = None) -> Weight:
    coarse = Uniform(SHAPE, bits=3, group=8)
    coarse.fit(W)
    return solved(Blended(coarse, Sparse(Dense(SHAPE)), torch.full((SHAPE[0],), 0.5), bias, "half and half"))


MADE: dict[str, tuple[Weight, bool]] = {
    "kronecker": (kronecker(Dense((4, 8), dtype="float32"), Dense((6, 4), dtype="float32")), True),
    "kronecker-codes": (kronecker(Uniform((4, 8), bits=4, group=4), Uniform((6, 4), bits=8)), False),
    "blended": (blended(), False),
    "inside": (Sum(kronecker(Dense((4, 8)), Dense((6, 4))), Scaled(blended(), row_scale=factor(SHAPE[0]))), False),
    "outside": (Blended(kronecker(Dense((4, 8)), Dense((6, 4))), Dense(SHAPE), torch.full((SHAPE[0],), 0.25)), False),
}


class TestOwn(WeightLaws):
    examples = MADE


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]), nn.ReLU(), nn.Linear(SHAPE[0], 5))


def with_weight(weight: Weight) -> nn.Sequential:
    model = net()
    install(model[0], "weight", weight, View(SHAPE))
    return model


@pytest.mark.parametrize("name", [*MADE, "bias"])
def test_a_weight_of_ones_own_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    """Saved, read, verified, inspected, counted."""
    weight = blended(factor(SHAPE[0])) if name == "bias" else MADE[name][0]
    model, x = with_weight(weight), torch.randn(4, SHAPE[1], generator=torch.Generator().manual_seed(5))
    expected = model(x).detach()
    lc.save(model, tmp_path)
    found = inspect_directory(tmp_path, verify=True)
    (row,) = found["weights"]
    assert row["kind"] == weight.words()
    assert 8 * row["bytes"] == weight.bits()
    assert sum(row["tensors"].values()) == row["bytes"]
    again = net()
    lc.load_into(again, tmp_path)
    (read,) = installed(again).values()
    assert type(read) is type(weight)
    assert torch.equal(read(), weight())
    assert torch.equal(again(x), expected)
    plain = sum(p.numel() * p.element_size() for p in (model[0].bias, *model[2].parameters()))
    assert nonzero_bytes_of(model) == plain + weight.nonzero_bits() / 8
    assert plain < nonzero_bytes_of(model) <= plain + weight.bits() / 8


def test_what_it_stores_is_accounted_for(tmp_path: Path) -> None:
    lc.save(with_weight(blended()), tmp_path)
    manifest = read_manifest(tmp_path)
    (spec,) = manifest["specs"]
    dense = {"kind": "dense", "shape": list(SHAPE), "dtype": "bfloat16"}
    for damaged, message in (
        (spec | {"note": "other"}, "unknown note"), (spec | {"other": dense}, "tensor .* too many|lacks"), (spec | {"bias": dense}, "lacks"),
        (spec | {"kind": "unheard of"}, "needs a newer laconic"), (spec | {"other": dense | {"shape": [2**20, 2**20]}}, "damaged"),
        (spec | {"one": spec | {"input_bits": 8}}, "input_bits in a part"), (spec | {"one": {"kind": "blended"}}, "shape must be"),
        (spec | {"one": spec | {"bias": dense}}, "bias in a part"), ({k: v for k, v in spec.items() if k != "other"}, "too many"),
    ):  # fmt: skip
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"specs": [damaged]}))
        with pytest.raises(CheckpointError, match=message):
            lc.load_into(net(), tmp_path, verify=False)


def test_a_reader_without_the_class_says_so(tmp_path: Path) -> None:
    """The class is found by its kind, wherever it is defined; where it is not, nothing is read."""
    lc.save(with_weight(MADE["kronecker"][0]), tmp_path)
    manifest = read_manifest(tmp_path)
    text = json.dumps(manifest | {"specs": [spec | {"kind": "of another program"} for spec in manifest["specs"]]})
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(
        CheckpointError, match="unknown kind of weight 'of another program'; this file needs a newer laconic"
    ):
        lc.load_into(net(), tmp_path, verify=False)


def test_a_kind_is_that_of_one_class() -> None:
    """Defined again, as in a notebook, the class is the later one; a kind that is taken is refused where it is defined."""
    with pytest.raises(SchemeError, match="'sparse' is that of Sparse"):
        type("Mine", (Weight,), {"kind": "sparse"})
    assert class_of({"kind": "sparse"}) is Sparse

    def define() -> type[Weight]:
        class Again(Kronecker):
            kind = "defined twice"

        return Again

    earlier, later = define(), define()
    assert class_of({"kind": "defined twice"}) is later is not earlier
    assert class_of({"kind": "kronecker"}) is Kronecker


class Shrunk(Weight):
    """W = weight diag(column_scale): a column scale is known by its name."""

    kind = "shrunk"
    part_names = ("weight", "column_scale")

    def __init__(self, weight: Weight, column_scale: Weight) -> None:
        super().__init__()
        self.weight, self.column_scale, self.shape = weight, column_scale, weight.shape

    def forward(self) -> Tensor:
        return self.weight.forward() * self.column_scale.forward()

    def right_inverse(self, W: Tensor) -> tuple[()]:
        return self.weight.right_inverse(W / self.column_scale.forward())


def test_what_it_asks_of_its_layer_is_what_the_librarys_own_asks(tmp_path: Path) -> None:
    """Inputs are multiplied by the column scale before they are rounded, in memory and from the file."""
    x = torch.randn(4, SHAPE[1], generator=torch.Generator().manual_seed(5))
    outputs = []
    for make in (Shrunk, lambda weight, scale: Scaled(weight, column_scale=scale)):
        weight = make(Uniform(SHAPE, bits=4), factor(SHAPE[1]))
        weight.weight.fit(W / weight.column_scale())
        weight.right_inverse(W)
        weight.inputs = Inputs(4)
        model = with_weight(weight)
        folder = tmp_path / weight.kind
        lc.save(model, folder)
        again = net()
        lc.load_into(again, folder)
        assert torch.equal(again(x), model(x))
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_the_matrix_of_a_weight_of_ones_own_is_checked(tmp_path: Path) -> None:
    """A flipped bit of a tensor of its own is found."""
    lc.save(with_weight(blended()), tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8:start])
    data[start + header["0.weight.share"]["data_offsets"][0]] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="0.weight"):
        lc.load_into(net(), tmp_path)
