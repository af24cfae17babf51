"""The task a language model and a text make."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic as lc
from laconic.errors import CheckpointError, DataError, SchemeError
from laconic.host.progress import Log
from laconic.recover import LC, Direct, FineTune, Steps, recover_task
from laconic.recover.batches import stream
from laconic.recover.text import Shuffled, text_task
from laconic.weights import installed
from tests.needs import extra
from tests.recover.nets import untouched


def windows(data: Any) -> set[bytes]:
    return {row.numpy().tobytes() for batch in data for row in batch["input_ids"]}


def test_three_parts_of_one_text(tiny: Path, text: Path) -> None:
    model, task = text_task(tiny, text, length=32, batch=4, train_tokens=4096, check_tokens=1024)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    task.checked()
    assert len(windows(task.train)) == 128
    assert len(windows(task.validation)) == len(windows(task.test)) == 32
    reference = task.judge(model, task.validation)
    logits = [model(**batch).logits.detach() for batch in task.validation]
    losses = [
        torch.nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), b["input_ids"][:, 1:].flatten(), reduction="sum")
        for y, b in zip(logits, task.validation, strict=True)
    ]
    assert reference.loss == pytest.approx(float(sum(losses)) / (32 * 31), rel=1e-5)
    assert reference.score == -reference.loss  # minus the log-perplexity, nats per token
    assert math.exp(reference.loss) > 320 * 0.5  # random weights


def test_recovered_on_text(tiny: Path, text: Path) -> None:
    model, task = text_task(tiny, text, length=32, batch=8, train_tokens=8192, check_tokens=1024)
    plan = [("lm_head", lc.Keep()), ("*", lc.Magnitude(0.5) >> lc.RTN(4, 32))]
    _, found = recover_task(model, plan, LC(4, 12, mu=0.5, learn=Steps("adam", 2e-3, 5e-4)), task)
    assert found.score > found.direct + 0.5


GRADIENTS = {  # schemes whose statistics are gradients, and what they would be without
    "KMeans(bits=3, weights='fisher')": "KMeans(bits=3)", "Magnitude(0.5, criterion='taylor', scope='model')": "Magnitude(0.5, scope='model')",
    "Magnitude(0.5, criterion='hessian') >> RTN(4, 32)": "Magnitude(0.5) >> RTN(4, 32)",
    "GPTQ(rate=4.0)": "GPTQ(rate=4.0, over='matrix')", "DKM(bits=3, weights='fisher')": "DKM(bits=3)",
}  # fmt: skip


@pytest.mark.parametrize("scheme", GRADIENTS)
@pytest.mark.parametrize("how", [Direct(), FineTune(3, Steps("adam", 1e-3, 1e-3), checks=1)], ids=["direct", "trained"])
def test_methods_that_read_gradients_recover_a_language_model(scheme: str, how: Any, tiny: Path, text: Path) -> None:
    """Its batches are dicts with more in them than tensors, of which none asks for a gradient."""
    model, task = text_task(tiny, text, length=32, batch=8, train_tokens=2048, check_tokens=512)
    keep = "('lm_head', Keep())"
    with untouched(model):
        small, found = recover_task(model, f"[{keep}, ('*', {scheme})]", how, task)
    assert found.loss < 1.5 * task.judge(model, task.validation).loss
    if isinstance(how, Direct):
        blind, _ = recover_task(model, f"[{keep}, ('*', {GRADIENTS[scheme]})]", how, task)
        assert any(not torch.equal(w(), installed(blind)[name]()) for name, w in installed(small).items()), (
            "they are read"
        )


def test_a_search_reads_gradients_of_a_language_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    extra("optuna")
    from laconic.measure.objectives import stored_bytes
    from laconic.search import SearchOptions, search_task

    model, task = text_task(tiny, text, length=32, batch=8, train_tokens=2048, check_tokens=512)
    scheme = "[('lm_head', Keep()), ('*', Magnitude(Free(0.01, 0.1), criterion='taylor', scope='model') >> RTN(8, 32))]"
    goal = lc.Minimize(stored_bytes)
    found = search_task(
        model, scheme, task, (goal,), lc.within(2.0), Direct(), tmp_path / "out", SearchOptions(trials=2), Log()
    )
    assert [row["state"] for row in found.result["trials"]] == ["complete", "complete"]
    assert found.result["best"]["score"] >= found.result["floor"]


def test_what_is_not_compressed_is_judged_and_stored_in_its_own_type(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Norms and embedding of a bfloat16 model are trained in float32 and rounded before a model is judged: the score is that of the file."""
    model, task = text_task(tiny, text, length=32, batch=8, train_tokens=2048, check_tokens=512, dtype="auto")
    small, found = recover_task(model, "RTN(4, 32)", FineTune(4, Steps("adam", 1e-2, 1e-2), checks=1), task)
    assert found.curve[-1]["score"] == found.score > found.direct, "something was trained"
    before = model.model.embed_tokens.weight.float()
    after = small.model.embed_tokens.weight
    assert after.dtype == torch.float32
    assert not torch.equal(after, before)
    assert torch.equal(after, after.bfloat16().float())
    size = lc.save(small, tmp_path / "a", types=found.types)
    kept = sum(t.numel() for name, t in model.named_parameters() if t.dim() == 1) + before.numel()
    assert lc.save(small, tmp_path / "b") == pytest.approx(size + 2 * kept, abs=64)
    read = lc.load_into(copy.deepcopy(model).float(), tmp_path / "a").eval()
    assert task.judge(read, task.validation).score == found.score
    with torch.no_grad():
        small.model.norm.weight[3] = 1.001
    with pytest.raises(
        SchemeError, match=r"model.norm.weight: has torch.float32 values that torch.bfloat16 does not hold exactly"
    ):
        lc.save(small, tmp_path / "c", types=found.types)
    assert not (tmp_path / "c" / "model.safetensors").exists()


def test_a_text_of_its_own_for_the_test(tiny: Path, text: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("The cat finds the red hen.\n" * 100)
    _, task = text_task(tiny, text, held, length=32, batch=4, train_tokens=2048, check_tokens=256)
    _, whole = text_task(tiny, text, length=32, batch=4, train_tokens=2048, check_tokens=256)
    assert not windows(task.test) & windows(whole.test)
    assert not windows(task.validation) & windows(whole.validation)  # the last tenth is not held back


def test_a_short_text_is_used_whole(tiny: Path, text: Path) -> None:
    _, task = text_task(tiny, text, length=32, batch=4, check_tokens=256)  # far less than a million tokens
    _, again = text_task(tiny, text, length=32, batch=4, check_tokens=256)
    assert len(windows(task.train)) > 100
    assert torch.equal(task.train.tokens, again.train.tokens)  # type: ignore[attr-defined]


class Heard(Log):
    """Counts what a run tells of its progress."""

    def __init__(self) -> None:
        self.total, self.done = 0.0, 0.0

    def start(self, task: str, total: float) -> None:
        self.total += total

    def advance(self, units: float, note: str = "") -> None:
        self.done += units


def test_text_the_model_writes_itself(tiny: Path, text: Path) -> None:
    heard = Heard()
    _, task = text_task(tiny, "self", length=16, batch=4, train_tokens=40 * 16, check_tokens=48, progress=heard)
    assert [len(windows(part)) for part in (task.train, task.validation, task.test)] == [40, 3, 3]
    assert heard.done == heard.total == 46
    task.checked()
    _, again = text_task(tiny, "self", text, length=16, batch=4, train_tokens=40 * 16, check_tokens=48)
    assert torch.equal(task.train.tokens, again.train.tokens)  # type: ignore[attr-defined]
    assert windows(task.validation) == windows(again.validation)
    assert not windows(task.test) & windows(again.test), "a text was given for the test"


def test_windows_come_in_a_new_order_at_every_pass() -> None:
    data = Shuffled(torch.arange(22).view(11, 2), 3)
    assert len(data) == len(list(data)) == 3
    first, second = (
        torch.cat([b["input_ids"][:, 0] for _, b in zip(range(3), part, strict=False)])
        for part in (stream(data, 0), stream(data, 1))
    )
    assert not torch.equal(first, second)
    passes = torch.cat([b["input_ids"][:, 0] for _, b in zip(range(6), stream(data, 0), strict=False)])
    assert torch.equal(passes[:9], first)
    assert not torch.equal(passes[9:], first)
    assert list(Shuffled(torch.arange(4).view(2, 2), 3)) == []


def test_text_that_is_too_short(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("The old fox sees the cat.\n" * 40)
    with pytest.raises(DataError, match="do not fill a minibatch of 16"):
        text_task(tiny, file, length=24)
    with pytest.raises(DataError, match=r"part of .*short\.txt: at least 512 tokens"):
        text_task(tiny, file, length=512)


def test_models_that_will_not_do(tiny: Path, text: Path, tmp_path: Path) -> None:
    lc.compress(str(tiny), "RTN(4, 32)", out=str(tmp_path / "small"), evaluate=False)
    with pytest.raises(CheckpointError, match="compressed already"):
        text_task(tmp_path / "small", text)


def test_code_of_the_model_runs_only_if_it_is_trusted(tiny: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "mine.Mine", "AutoConfig": "mine.Config"}})
    )
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="mine.Mine.*--trust-remote-code|mine.Config.*--trust-remote-code"):
        text_task(folder, text, length=32, batch=4)
    assert not (tmp_path / "ran").exists()
