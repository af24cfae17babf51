"""The default scheme on tiny models of many architectures: compressed, and exactly the same model when it is read back, whichever way."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import laconic as lc
from laconic.blocks import InMemory, call, find_chain, open_chain, tensors_in
from laconic.evaluate import outputs
from laconic.load import CompressedCheckpoint
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
    assert all(site["bits_per_weight"] <= 16 for site in report.sites)
    assert 0 < error(after, before) < 1
    lc.save(model, tmp_path)
    other = row.build()
    for parameter in other.parameters():
        parameter.data.zero_()
    read = answer(lc.load_into(other, tmp_path), row)
    assert len(read) == len(after)
    assert all(torch.equal(y, z) for y, z in zip(read, after, strict=True))


@pytest.mark.parametrize("name", LANGUAGE)
def test_as_a_directory(name: str, tmp_path: Path) -> None:
    """Compressed with text of its own, without a tokenizer; the same model by `lc.load`, by transformers, and block by block."""
    row = LANGUAGE[name]
    model = row.build()
    before = answer(model, row)
    model.save_pretrained(tmp_path / "original")  # type: ignore[operator]
    report = lc.compress(str(tmp_path / "original"), SCHEME, out=str(tmp_path / "out"), samples=4, length=16, evaluate=False)
    assert report.sites
    loaded = answer(lc.load(tmp_path / "out"), row)
    assert 0 < error(loaded, before) < 1
    theirs = answer(getattr(transformers, row.model).from_pretrained(tmp_path / "out"), row)
    apart = next(iter(outputs(CompressedCheckpoint(tmp_path / "out"), row.batches()[:1], torch.float32, torch.device("cpu"))))
    for y, z, w in zip(loaded, theirs, answers(apart), strict=False):
        assert torch.equal(y, z)
        assert torch.allclose(y, w, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
