"""What a window begins with: the tokenizer's own start tokens, in every text that a model reads or writes."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import laconic as lc
from laconic.data.sampled import Vocabulary, sample_windows, vocabulary_of
from laconic.data.text import calibration_windows, evaluation_windows, start_tokens
from laconic.disk.load import open_source
from laconic.measure.quality import evaluate_source, perplexity
from laconic.recover.text import text_task
from tests.needs import extra

LENGTH = 16
BOS = 293  # the first id after those of the tests' tokenizer


def beginning(tokenizer: Any, template: str, **special: str) -> Any:
    """The tests' tokenizer with more tokens of its own around a text."""
    changed = transformers.PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), eos_token="<end>", **special
    )
    names = [word for word in template.split() if not word.startswith("$")]
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, changed.convert_tokens_to_ids(name)) for name in names]
    )
    return changed


@pytest.fixture(scope="module")
def with_bos(tokenizer: Any) -> Any:
    return beginning(tokenizer, "<bos> $A", bos_token="<bos>")


@pytest.fixture(scope="module")
def folder(with_bos: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that was trained with <bos>, id 293, before every text."""
    path = tmp_path_factory.mktemp("bos") / "model"
    sizes = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **sizes, max_position_embeddings=64, bos_token_id=BOS, eos_token_id=[0, BOS + 1], initializer_range=0.3
        )
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    with_bos.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", []),
        ("<bos> $A", ["<bos>"]),
        ("$A <end>", []),
        ("<bos> $A <end>", ["<bos>"]),
        ("<x> <bos> $A", ["<x>", "<bos>"]),
    ],
)
def test_the_tokenizer_says_how_a_text_begins(template: str, expected: list[str], tokenizer: Any) -> None:
    changed = beginning(tokenizer, template, bos_token="<bos>", unk_token="<x>")
    assert list(start_tokens(changed)) == changed.convert_tokens_to_ids(expected)


def test_a_bos_of_the_config_alone_begins_nothing(tiny: Path, tokenizer: Any) -> None:
    """GPT-2 and Qwen have one, and their tokenizers do not put it there."""
    assert transformers.AutoConfig.from_pretrained(tiny).bos_token_id == 0
    assert start_tokens(tokenizer) == ()


def test_every_window_begins_so_and_no_token_is_lost(with_bos: Any, text: Path) -> None:
    body = text.read_text()
    ids = with_bos(body, add_special_tokens=False)["input_ids"]
    windows = evaluation_windows(body, with_bos, LENGTH, None, "t")
    assert windows.start == (BOS,)
    assert set(windows.tokens[:, 0].tolist()) == {BOS}
    count = len(ids) // (LENGTH - 1)
    assert windows.tokens[:, 1:].flatten().tolist() == ids[: count * (LENGTH - 1)]
    assert BOS not in windows.tokens[:, 1:]
    assert evaluation_windows(body, with_bos, LENGTH, 100, "t").tokens.shape == (6, LENGTH), (
        "100 positions, start tokens included"
    )
    for samples, text_given in ((4, body), (4, body * 100)):  # tokenised whole, and at line starts
        drawn = calibration_windows(text_given, with_bos, samples, LENGTH, 0, "t")
        assert drawn.tokens.shape == (samples, LENGTH)
        assert drawn.start == (BOS,)
        assert set(drawn.tokens[:, 0].tolist()) == {BOS}


def test_what_ends_a_text_does_not_end_a_window(tokenizer: Any, text: Path) -> None:
    ending = beginning(tokenizer, "$A <end>")
    assert 0 not in evaluation_windows(text.read_text(), ending, LENGTH, 400, "t").tokens


def test_a_window_too_short_for_the_start_tokens_is_refused(with_bos: Any, text: Path) -> None:
    with pytest.raises(lc.DataError, match="ask for a larger --length"):
        evaluation_windows(text.read_text(), with_bos, 1, None, "t")


@torch.no_grad()
def test_figures_are_those_of_lm_eval_on_a_text_of_one_window(folder: Path, with_bos: Any, text: Path) -> None:
    """Its rolling log-likelihood: every token of the text predicted, the first one from the start token alone.

    It puts the start token there itself; told nothing, it lets the tokenizer put another one behind it and scores that, too.
    """
    extra("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    body = with_bos.decode(with_bos(text.read_text(), add_special_tokens=False)["input_ids"][:40])
    tokens = len(with_bos(body, add_special_tokens=False)["input_ids"])
    theirs = HFLM(pretrained=model, tokenizer=with_bos, max_length=64, add_bos_token=False).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (body,), 0)], disable_tqdm=True
    )
    ours = perplexity(open_source(folder), evaluation_windows(body, with_bos, tokens + 1, None, "t"))
    assert ours.tokens == tokens
    assert ours.start == (BOS,)
    assert ours.nats_per_token == pytest.approx(-theirs[0] / tokens, rel=1e-5)


@torch.no_grad()
def test_start_tokens_are_not_predicted(folder: Path, tokenizer: Any, text: Path) -> None:
    """Of two start tokens the second is no more a part of the text than the first."""
    two = beginning(tokenizer, "<bos> <x> $A", bos_token="<bos>", unk_token="<x>")
    windows = evaluation_windows(text.read_text(), two, LENGTH, 10 * LENGTH, "t")
    found = perplexity(open_source(folder), windows)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(windows.tokens).logits[:, 1:-1].log_softmax(-1)
    assert found.tokens == 10 * (LENGTH - 2)
    assert found.nats_per_token == pytest.approx(
        -float(logits.gather(-1, windows.tokens[:, 2:, None]).double().mean()), rel=1e-5
    )


def test_the_report_says_which(folder: Path, text: Path, tmp_path: Path) -> None:
    report = lc.compress(
        folder, "GPTQ(4, 16)", data=str(text), out=tmp_path / "out", samples=4, length=LENGTH, test_tokens=128
    )
    assert report["data"]["start"] == [BOS]
    assert list(report.metrics["start"]) == [BOS]
    assert report.metrics["tokens"] == 8 * (LENGTH - 1)
    found = evaluate_source(tmp_path / "out", data=str(text), length=LENGTH, tokens=128)
    assert list(found["start"]) == [BOS]
    assert "each begun with the ids 293" in (tmp_path / "out" / "report.html").read_text()


def test_own_text_begins_so_and_stays_inside_the_vocabulary(folder: Path, with_bos: Any) -> None:
    """300 rows, 294 tokens: rows that no token has are never sampled, nor tokens that end a text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = vocabulary_of(model, with_bos)
    assert words == Vocabulary((BOS,), BOS + 1, frozenset({0, BOS}))
    with torch.no_grad():
        model.lm_head.weight[[0, BOS, BOS + 1, BOS + 5]] *= 50  # which it would write all the time
    windows = sample_windows(model, 40, LENGTH, 0, batch=16, vocabulary=words)
    assert windows.start == (BOS,)
    assert set(windows.tokens[:, 0].tolist()) == {BOS}
    assert len({tuple(row) for row in windows.tokens[:, 1:5].tolist()}) > 30, (
        "the first tokens are sampled, not the same every time"
    )
    rest = windows.tokens[:, 1:]
    assert int(rest.max()) < BOS
    assert 0 not in rest
    bare = sample_windows(model, 40, LENGTH, 0, vocabulary=replace(words, start=()))
    assert int(bare.tokens.max()) < BOS
    assert 0 not in bare.tokens


def test_without_a_tokenizer_the_config_says(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert vocabulary_of(model) == Vocabulary((BOS,), 300, frozenset({0, BOS, BOS + 1}))
    model.config.bos_token_id = 50256  # the default of GPT-2's config, beyond a small vocabulary
    assert vocabulary_of(model).start == ()


def test_a_directory_that_calibrates_itself_does_so_from_the_start_token(folder: Path, tmp_path: Path) -> None:
    report = lc.compress(folder, "GPTQ(4, 16)", out=tmp_path / "out", samples=4, length=LENGTH, test_tokens=64)
    assert report["data"]["start"] == [BOS]
    assert list(report.metrics["start"]) == [BOS]


def test_recovery_trains_on_windows_that_begin_so(folder: Path, text: Path, tmp_path: Path) -> None:
    for data in (str(text), "self"):
        _, task = text_task(folder, data, train_tokens=256, check_tokens=64, length=LENGTH, batch=2, out=tmp_path)
        for split in (task.train, task.validation, task.test):
            assert split is not None
            assert all((batch["input_ids"][:, 0] == BOS).all() for batch in split)


def test_perplexity_differs_as_the_model_does(folder: Path, tokenizer: Any, with_bos: Any, text: Path) -> None:
    body = text.read_text()
    source = open_source(folder)
    bare, begun = (perplexity(source, evaluation_windows(body, t, LENGTH, 512, "t")) for t in (tokenizer, with_bos))
    assert bare.start == ()
    assert bare.tokens == begun.tokens
    assert not math.isclose(bare.perplexity, begun.perplexity, rel_tol=1e-3)
