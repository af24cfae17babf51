"""Other people's training loops on a prepared model: accelerate, and the Trainer of transformers, with their own checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import laconic as lc
from laconic.weights import installed
from tests.conftest import tiny_config
from tests.needs import extra
from tests.recover.nets import same, seeded

extra("accelerate")

SCHEMES = ["[('*', DKM(bits=2, tau=0.2, tau_end=0.02))]", "[('*', RTN(4, 'channel'))]"]  # the tied embedding too
_TOKENS = torch.randint(320, (32, 16), generator=torch.Generator().manual_seed(0))


def llama(seed: int = 0) -> Any:
    return seeded(
        lambda: transformers.LlamaForCausalLM(tiny_config(hidden_size=32, num_hidden_layers=2, dtype="float32")), seed
    )


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(_TOKENS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": _TOKENS[i], "labels": _TOKENS[i]}


class Progress(transformers.TrainerCallback):
    """What tells temperatures to fall."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        lc.advance(model, state.global_step / state.max_steps)


def trainer(model: Any, folder: Path, **more: Any) -> transformers.Trainer:
    how = transformers.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, gradient_checkpointing=True,
        learning_rate=5e-3, report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", **more,
    )  # fmt: skip
    return transformers.Trainer(model, how, train_dataset=Windows(), callbacks=[Progress()])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_trainer_trains_saves_and_resumes(scheme: str, tmp_path: Path) -> None:
    model, untrained = lc.prepare(llama(), scheme), lc.prepare(llama(), scheme)
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    assert not same(model, untrained)
    resumed = lc.prepare(llama(), scheme)
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(model, resumed)

    whole.save_model(str(tmp_path / "saved"))
    loaded = lc.prepare(llama(1), scheme)
    missing, unexpected = loaded.load_state_dict(_tensors(tmp_path / "saved"), strict=False)
    assert missing == ["lm_head.parametrizations.weight.original"]  # the tie, which is stored once
    assert not unexpected
    assert same(model, loaded)

    with torch.no_grad():
        shown = model.eval()(_TOKENS).logits
        converted = lc.convert(model)
        assert torch.equal(converted(_TOKENS).logits, shown)
        lc.save(converted, tmp_path / "small")
        assert torch.equal(lc.load_into(llama(1), tmp_path / "small").eval()(_TOKENS).logits, shown)
    assert installed(model)["lm_head.weight"] is installed(model)["model.embed_tokens.weight"]


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_of_accelerate_is_a_step_by_hand(scheme: str) -> None:
    """Two gradients of four examples, accumulated, are one of eight. One step, since the next one would round other values: from there on
    a difference in the last bit may grow to a level of the grid."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain, own = lc.prepare(llama().train(), scheme), lc.prepare(llama().train(), scheme)
    before = copy.deepcopy(own)
    plain(input_ids=_TOKENS[:8], labels=_TOKENS[:8], use_cache=False).loss.backward()
    torch.optim.SGD(plain.parameters(), 0.5).step()
    model, optimizer = accelerator.prepare(own, torch.optim.SGD(own.parameters(), 0.5))
    for tokens in _TOKENS[:8].split(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
    for start, one, other in zip(
        before.parameters(), accelerator.unwrap_model(model).parameters(), plain.parameters(), strict=True
    ):
        step = other - start
        assert step.any()
        assert (one - other).norm() <= 1e-4 * step.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accelerate_trains_saves_and_resumes(scheme: str, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

    def epoch(model: Any, optimizer: Any) -> None:
        for tokens in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
                optimizer.step()
                optimizer.zero_grad()

    own = lc.prepare(llama().train(), scheme)
    before = copy.deepcopy(own)
    model, optimizer, loader = accelerator.prepare(
        own, torch.optim.SGD(own.parameters(), 0.5), torch.utils.data.DataLoader(_TOKENS, 4)
    )
    epoch(model, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    half = copy.deepcopy(accelerator.unwrap_model(model))
    epoch(model, optimizer)
    finished = copy.deepcopy(accelerator.unwrap_model(model))
    assert not same(finished, before)
    accelerator.load_state(str(tmp_path / "state"))
    assert same(accelerator.unwrap_model(model), half)
    epoch(model, optimizer)
    assert same(accelerator.unwrap_model(model), finished)
    lc.convert(accelerator.unwrap_model(model))
    assert set(installed(finished)) == set()
    assert len(installed(accelerator.unwrap_model(model))) == 2 * 7 + 2
