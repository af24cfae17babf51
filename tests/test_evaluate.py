"""Figures against their definitions: likelihood, distance, error bars, bits, and lm-eval's own tasks, all without a network."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

import laconic as lc
from laconic.data.text import Windows, evaluation_windows
from laconic.disk.load import open_source
from laconic.measure.quality import Quality, evaluate_source, perplexity, run_tasks, similarity
from tests.needs import extra

LENGTH, TOKENS = 32, 1024


@pytest.fixture(scope="module")
def made(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "model"
    lc.compress(tiny, "GPTQ(rate=3.0)", data=str(text), out=out, samples=8, length=LENGTH, evaluate=False)
    return out


@pytest.fixture(scope="module")
def windows(tiny: Path, text: Path) -> Windows:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    return evaluation_windows(text.read_text(), tokenizer, LENGTH, TOKENS, "text")


def quality(source: Path, windows: Windows, reference: Path | None = None) -> Quality:
    return perplexity(open_source(source), windows, reference=open_source(reference) if reference else None)


@torch.no_grad()
def by_definition(made: Path, tiny: Path, text: Path) -> dict[str, float]:
    """Every figure with plain loops over windows and positions, from the two models as transformers loads them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:TOKENS]
    p_model, q_model = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (made, tiny)
    )
    nll, reference, kl, same, count = 0.0, 0.0, 0.0, 0, 0
    for start in range(0, len(ids) - LENGTH + 1, LENGTH):
        window = torch.tensor([ids[start : start + LENGTH]])
        p, q = (model(window).logits[0].double().log_softmax(-1) for model in (p_model, q_model))
        for position in range(LENGTH - 1):
            nll -= float(p[position, window[0, position + 1]])
            reference -= float(q[position, window[0, position + 1]])
            kl += float((q[position].exp() * (q[position] - p[position])).sum())
            same += int(p[position].argmax() == q[position].argmax())
            count += 1
    return {
        "tokens": count,
        "nats_per_token": nll / count,
        "reference": reference / count,
        "kl": kl / count,
        "top1": same / count,
    }


def test_every_figure_is_what_its_definition_says(made: Path, tiny: Path, text: Path, windows: Windows) -> None:
    expected, found = by_definition(made, tiny, text), quality(made, windows, tiny)
    assert found.tokens == expected["tokens"] == TOKENS // LENGTH * (LENGTH - 1)
    assert found.nats_per_token == pytest.approx(expected["nats_per_token"], rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected["nats_per_token"]), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(expected["reference"]), rel=1e-5)
    assert found.excess == pytest.approx(expected["nats_per_token"] - expected["reference"], abs=1e-6)
    assert found.kl == pytest.approx(expected["kl"], rel=1e-4)
    assert found.top1 == pytest.approx(expected["top1"], abs=1e-6), "a mean in float32"


def test_a_model_is_at_no_distance_from_itself(made: Path, tiny: Path, windows: Windows) -> None:
    for path in (made, tiny):
        found = quality(path, windows, path)
        assert (found.kl, found.top1, found.kl_interval) == (0, 1, (0, 0))
        assert [found.excess, *found.excess_interval] == pytest.approx([0, 0, 0], abs=1e-12)  # type: ignore[misc]
        assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-12)


def test_distance_has_a_direction(made: Path, tiny: Path, windows: Windows) -> None:
    """KL(reference || model): turned round it is another number, the excess its own negative, the agreement the same."""
    there, back = quality(made, windows, tiny), quality(tiny, windows, made)
    assert there.excess == pytest.approx(-back.excess, abs=1e-12)  # type: ignore[operator]
    assert there.top1 == back.top1
    assert there.kl != back.kl
    assert min(there.kl, back.kl) > 0  # type: ignore[type-var]


def test_the_reference_does_not_change_the_likelihood(made: Path, tiny: Path, windows: Windows) -> None:
    """The logits are the same; their means are summed in tables of other widths, so in another order."""
    alone, compared = quality(made, windows), quality(made, windows, tiny)
    assert alone.nats_per_token == pytest.approx(compared.nats_per_token, rel=1e-12)
    assert alone.perplexity_interval == pytest.approx(compared.perplexity_interval, rel=1e-12)
    assert alone.kl is alone.top1 is alone.excess is None


def test_error_bars_hold_the_figure_and_are_the_same_each_time(made: Path, tiny: Path, windows: Windows) -> None:
    state = torch.get_rng_state()
    first, second = quality(made, windows, tiny), quality(made, windows, tiny)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    for value, (low, high) in (
        (first.perplexity, first.perplexity_interval), (first.kl, first.kl_interval), (first.excess, first.excess_interval),
    ):  # fmt: skip
        assert low < value < high  # type: ignore[operator]


def test_error_bars_are_those_of_a_mean_over_windows(made: Path, tiny: Path, text: Path) -> None:
    """Four times the windows, about half the width; and the width is near 2 x 1.96 standard errors of the windows' means."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    widths = {}
    for count in (32, 128):
        windows = evaluation_windows(text.read_text(), tokenizer, LENGTH, count * LENGTH, "text")
        low, high = quality(made, windows, tiny).kl_interval  # type: ignore[misc]
        widths[count] = high - low
    opened = open_source(made), open_source(tiny)
    each = torch.tensor(
        [perplexity(opened[0], Windows(w[None], ""), reference=opened[1]).kl for w in windows.tokens[:32]]
    )
    assert 0.35 < widths[128] / widths[32] < 0.7
    assert widths[32] == pytest.approx(2 * 1.96 * float(each.std()) / 32**0.5, rel=0.15)


def test_a_difference_of_two_models_is_measured_more_closely_than_either(
    made: Path, tiny: Path, windows: Windows
) -> None:
    """The error bar of the excess is of paired windows: what makes a text hard for both cancels."""
    found = quality(made, windows, tiny)
    low, high = (math.log(x) for x in found.perplexity_interval)
    assert found.excess_interval[1] - found.excess_interval[0] < 0.7 * (high - low)  # type: ignore[index]


def test_bits_per_weight_are_of_the_files(made: Path, tiny: Path, text: Path) -> None:
    for path in (made, tiny):
        found = evaluate_source(path, data=str(text), length=LENGTH, tokens=TOKENS)
        size = sum(
            file.stat().st_size
            for file in path.iterdir()
            if file.suffix == ".safetensors" or file.name == "laconic.json"
        )
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(path).parameters())
        assert found["stored_bytes"] == size
        assert found["bits_per_weight"] == 8 * size / count


def test_the_command_and_the_function_agree(made: Path, tiny: Path, text: Path, windows: Windows) -> None:
    found = evaluate_source(made, reference=tiny, data=str(text), length=LENGTH, tokens=TOKENS)
    expected = quality(made, windows, tiny).as_dict()
    assert {name: found[name] for name in expected if name != "data"} == {
        name: value for name, value in expected.items() if name != "data"
    }


def test_models_without_a_head_are_compared_by_their_outputs(
    tokenizer: Any, text: Path, windows: Windows, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
        )
        transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    lc.compress(tmp_path / "bert", "RTN(4, 32)", data=str(text), out=tmp_path / "out", length=LENGTH, test_tokens=512)
    compressed, original = open_source(tmp_path / "out"), open_source(tmp_path / "bert")
    found = similarity(compressed, original, windows, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        y, z = (
            transformers.AutoModel.from_pretrained(tmp_path / name, dtype=torch.float32).eval()(windows.tokens)[0]
            for name in ("out", "bert")
        )
    assert found["relative_error"] == pytest.approx(float((y - z).square().sum() / z.square().sum()), rel=1e-4)
    assert found["cosine"] == pytest.approx(float(F.cosine_similarity(y, z, dim=-1).mean()), rel=1e-6)
    same = similarity(original, original, windows, torch.float32, torch.device("cpu"))
    assert same == {"cosine": pytest.approx(1, abs=1e-12), "relative_error": 0}
    with pytest.raises(lc.DataError, match="--reference"):
        evaluate_source(tmp_path / "out", data=str(text), length=LENGTH, tokens=TOKENS)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = [
    ("The old fox sees the", ["cat", "hen"]),
    ("The new dog", ["eats", "finds", "sees"]),
    ("The red", ["fox", "dog"]),
] * 2


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and no cache but the test's own."""
    extra("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("file", ["choice.yaml", "another-name.yaml"])
def test_tasks_of_lm_eval_are_scored_on_the_stored_model(
    file: str, made: Path, tmp_path: Path, offline: None, capsys: Any
) -> None:
    """Accuracy by lm-eval is the share of questions whose own answer has the greatest log-likelihood, computed here from the definition."""
    model = lc.load(made, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)

    def likelihood(start: str, end: str) -> float:
        first, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, f"{start} {end}"))
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logits[i - 1, whole[i]]) for i in range(len(first), len(whole)))

    data = tmp_path / "questions.jsonl"
    best = [max(range(len(choices)), key=lambda i: likelihood(start, choices[i])) for start, choices in QUESTIONS]
    answers = [
        right if number % 3 else (right + 1) % 2 for number, right in enumerate(best)
    ]  # every third one the model gets wrong
    rows = [{"start": s, "choices": c, "answer": a} for (s, c), a in zip(QUESTIONS, answers, strict=True)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    task = tmp_path / file
    task.write_text(TASK.format(name="choice", data=data))
    found = evaluate_source(made, tasks=[str(task)])["tasks"]
    assert set(found) == {"choice"}
    assert found["choice"]["acc,none"] == pytest.approx(
        sum(a == b for a, b in zip(answers, best, strict=True)) / len(best)
    )
    assert run_tasks(model, tokenizer, [str(task)], limit=1)["choice"]["acc,none"] == float(answers[0] == best[0])
    task.write_text("tag: choice\n")
    with pytest.raises(lc.SchemeError, match="with a line 'task: name'"):
        run_tasks(model, tokenizer, [str(task)])
    assert capsys.readouterr().out == "", "stdout belongs to the result"
