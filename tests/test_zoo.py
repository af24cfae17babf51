"""The default scheme on tiny models of many architectures: compressed, and exactly the same model when it is read back, whichever way."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import laconic as lc
from laconic.disk.load import CompressedCheckpoint
from laconic.measure.quality import outputs
from laconic.model.batches import tensors_in
from laconic.model.blocks import InMemory, find_chain, open_chain
from laconic.model.calling import call
from tests.zoo import LANGUAGE, ZOO, Row

SCHEME = "GPTQ(rate=3.25)"


def answers(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


@torch.no_grad()
def answer(model: nn.Module, row: Row) -> list[Tensor]:
    return answers(call(model.eval(), row.batches()[0]))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The relative distance of two answers' first tensors."""
    return float((found[0] - expected[0]).norm() / expected[0].norm())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors under the same names, bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal weights give equal answers, but for the order of sums, which may depend on where tensors lie in memory."""
    assert len(found) == len(expected)
    for y, z in zip(found, expected, strict=True):
        assert torch.allclose(y, z, rtol=1e-4, atol=1e-5 * float(z.abs().max()))


@pytest.mark.parametrize("name", ZOO)
def test_in_memory(name: str, tmp_path: Path) -> None:
    """The chain is the one expected, or the notes say that there is none; saved and read into another copy, the model is the same bit for bit."""
    row = ZOO[name]
    model = row.build()
    blocks, why = open_chain(InMemory(model), find_chain(model), row.batches()[0])
    assert (blocks.path if blocks is not None else None) == row.chain, why
    before = answer(model, row)
    model, report = lc.compress(model, SCHEME, row.batches())
    after = answer(model, row)
    assert any("do not form a chain" in note for note in report.notes) == bool(why)
    assert report.sites
    assert all(site["bits_per_weight"] <= 16 for site in report.sites if site["shape"][0] * site["shape"][1] >= 1024)
    assert 0 < error(after, before) < 1
    lc.save(model, tmp_path)
    other = row.build()
    for parameter in other.parameters():
        parameter.data.zero_()
    lc.load_into(other, tmp_path)
    assert_same(other.state_dict(), model.state_dict())
    assert_close(answer(other, row), after)


@pytest.mark.parametrize("name", LANGUAGE)
def test_as_a_directory(name: str, tmp_path: Path) -> None:
    """Compressed with text of its own, without a tokenizer; the same model by `lc.load`, by transformers, and block by block."""
    row = LANGUAGE[name]
    model = row.build()
    before = answer(model, row)
    model.save_pretrained(tmp_path / "original")  # type: ignore[operator]
    report = lc.compress(
        str(tmp_path / "original"), SCHEME, out=str(tmp_path / "out"), samples=4, length=16, evaluate=False
    )
    assert report.sites
    loaded = lc.load(tmp_path / "out")
    theirs = getattr(transformers, row.model).from_pretrained(tmp_path / "out")
    assert_same(
        dict(loaded.named_parameters()) | dict(loaded.named_buffers()),
        dict(theirs.named_parameters()) | dict(theirs.named_buffers()),
    )
    after = answer(loaded, row)
    assert 0 < error(after, before) < 1
    assert_close(answer(theirs, row), after)
    apart = next(
        iter(outputs(CompressedCheckpoint(tmp_path / "out"), row.batches()[:1], torch.float32, torch.device("cpu")))
    )
    assert_close(answers(apart)[:1], after[:1])
