"""`laconic search` and `laconic recover`: task files and language models, what they write and print, resuming, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.needs import extra

extra("optuna")
extra("torch_pruning")
extra("sklearn")

import laconic as lc
from laconic.disk.ours import RECOVERY as RESULT
from laconic.disk.store import MANIFEST, read_manifest, stored_bytes
from laconic.recover.recipes import recipe
from laconic.recover.text import text_task
from laconic.weights import installed
from tests.conftest import tiny_config
from tests.recover.nets import bytes_of, mlp, task
from tests.test_cli import laconic, only_json

TASK = """
import torch
from tests.recover.nets import mlp, task, trained

made = task()
train, validation, test = made.train, made.validation, made.test
model = trained(mlp(), train, 60)
"""
SHORT = "LC(3, 4, mu=0.5, learn=Steps(lr=0.05, lr_end=0.01))"
SEARCH = ["--scheme", "Magnitude(Free(0.2, 0.95))", "--recovery", SHORT, "--keep", 0.1, "--trials", 3]
RECOVER = ["--scheme", "Magnitude(0.5) >> Cast('float16')", "--recovery", SHORT]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take as long as searches of this size; `test_run.py` has a search with its pictures."""
    monkeypatch.setattr("laconic.show.search_page.render_search", lambda result: "<html></html>")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A task file: four classes of points and a small network that knows them."""
    made = tmp_path / "task.py"
    made.write_text(TASK)
    return made


def words(text: Path, *more: object) -> list[object]:
    return ["--data", text, "--length", 32, "--batch", 8, "--train-tokens", 2048, *more]


def test_search_of_a_task_file(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = laconic("search", "--task", file, *SEARCH, "--out", out, "--objective", "nonzero_bytes", "--json")
    assert done.exit_code == 0, done.stderr
    result = only_json(done.stdout)
    assert result == json.loads((out / "search.json").read_text())
    assert result["objective"] == {"name": "nonzero_bytes", "direction": "minimize"}
    assert result["best"]["score"] >= result["floor"] == pytest.approx(result["reference"]["score"] - 0.1)
    assert result["command"].startswith("laconic")
    assert "trial 1: sparsity 0.575: score" in done.stderr
    read = lc.load_into(mlp(), out / "model").eval()
    problem = task()
    assert problem.judge(read, problem.test or []).score == result["best"]["test_score"]
    again = laconic("search", "--task", file, *SEARCH, "--out", out, "--objective", "nonzero_bytes", "--json")
    assert again.exit_code == 8
    assert "resume it, overwrite it, or give another name" in again.stderr
    resumed = laconic("search", "--task", file, *SEARCH, "--out", out, "--objective", "nonzero_bytes", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "chosen" in resumed.stdout
    assert "nonzero_bytes" in resumed.stdout
    assert f"model: {out / 'model'}, report: {out / 'search.html'}" in resumed.stderr.replace("\n", "")
    assert json.loads((out / "search.json").read_text())["trials"] == result["trials"]


def test_search_for_two_objectives_with_a_plan(file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.py"
    plan.write_text(
        "import laconic as lc\n\nscheme = [('0', lc.Keep()), ('*', lc.RTN(bits=lc.Free(choices=(3, 8)), group='channel'))]\n"
    )
    given = [
        "--objective",
        "stored_bytes",
        "--objective",
        "max parameters",
        "--sampler",
        "tpe",
        "--cold",
        "--no-early-stop",
        "--name",
        "two",
    ]
    done = laconic(
        "search",
        "--task",
        file,
        "--plan",
        plan,
        "--recovery",
        "Direct()",
        "--keep",
        1,
        "--trials",
        3,
        "--out",
        tmp_path / "o",
        *given,
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads((tmp_path / "o" / "search.json").read_text())
    assert [goal["direction"] for goal in result["objective"]] == ["minimize", "maximize"]
    assert result["pareto"]
    assert all(row["warm_from"] is None for row in result["trials"])


def test_an_interrupted_search_says_how_to_go_on(file: Path, tmp_path: Path) -> None:
    count = "\ncalls = 0\n\n\ndef score(output, batch):\n    global calls\n    calls += 1\n    if calls == 5:\n        raise KeyboardInterrupt\n"
    usual = "    return (output.argmax(1) == batch[1]).float()\n"
    file.write_text(TASK + count + usual)
    stopped = laconic("search", "--task", file, *SEARCH, "--out", tmp_path / "out")
    assert stopped.exit_code == 130
    assert "interrupted; finished trials are kept: run the same command with --resume" in stopped.stderr
    assert not (tmp_path / "out" / "search.json").exists()
    file.write_text(TASK)
    assert laconic("search", "--task", file, *SEARCH, "--out", tmp_path / "out", "--resume").exit_code == 0
    whole = laconic("search", "--task", file, *SEARCH, "--out", tmp_path / "whole", "--json")
    rows = json.loads((tmp_path / "out" / "search.json").read_text())["trials"]
    kept = [(row["values"], row["score"]) for row in rows if row["state"] == "complete"]
    assert kept == [(row["values"], row["score"]) for row in only_json(whole.stdout)["trials"]]


def test_search_of_a_language_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The folder loads by itself, in laconic and in transformers, and holds the scores that were reported."""
    out = tmp_path / "out"
    scheme = "[('model.embed_tokens', Cast('bfloat16')), ('*', Magnitude(Free(0.1, 0.6), scope='model') >> RTN(bits=8, group=32))]"
    given = [
        "--scheme",
        scheme,
        "--recovery",
        "LC(2, 2, mu=0.5, then=FineTune(2, checks=1))",
        "--keep",
        2,
        "--trials",
        2,
    ]
    done = laconic("search", tiny, *words(text), *given, "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    result = only_json(done.stdout)
    _, problem = text_task(tiny, text, length=32, batch=8, train_tokens=2048)
    for read in (lc.load, transformers.AutoModelForCausalLM.from_pretrained):
        assert problem.judge(
            read(out / "model", dtype=torch.float32).eval(), problem.validation
        ).score == pytest.approx(result["best"]["score"], abs=1e-5)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (out / "model", tiny)]
    assert tokenizers[0]("The old fox").input_ids == tokenizers[1]("The old fox").input_ids
    assert result["reference"]["stored_bytes"] == sum(
        t.nbytes for t in transformers.AutoModelForCausalLM.from_pretrained(tiny).parameters()
    )
    assert result["best"]["ratio"] == pytest.approx(result["reference"]["stored_bytes"] / stored_bytes(out / "model"))
    assert (
        result["reference"]["nonzero_bytes"] == result["reference"]["stored_bytes"]
    )  # no zeros; two bytes each, as in the file
    assert result["reference"]["objective"] == pytest.approx(
        result["reference"]["stored_bytes"], rel=0.05
    )  # the headers
    assert result["best"]["ratio"] > 1.4


def test_search_that_thins_a_language_model(text: Path, tiny: Path, tmp_path: Path) -> None:
    """One block of one width can be said in a configuration; blocks that differ cannot, which is said."""
    one = tmp_path / "one"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=1)).save_pretrained(one)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(one)
    scheme = "[('*.mlp.*', NeuronPrune(Free(0.2, 0.6))), ('*', Keep())]"
    given = [
        *words(text),
        "--scheme",
        scheme,
        "--recovery",
        "Direct()",
        "--keep",
        9,
        "--trials",
        1,
        "--objective",
        "flops",
    ]
    done = laconic("search", one, *given, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    assert f"ordinary transformers checkpoint: {tmp_path / 'a' / 'transformers'}" in done.stderr.replace("\n", "")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "transformers")
    assert stock.config.intermediate_size < 96
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "a" / "transformers")("The old fox").input_ids
    done = laconic("search", tiny, *given, "--out", tmp_path / "b", "--json")
    assert done.exit_code == 0, done.stderr
    assert only_json(done.stdout)["best"]["parameters"] < only_json(done.stdout)["reference"]["parameters"]
    assert "stock transformers cannot load the thinned model" in done.stderr
    assert "laconic.load_into(original" in done.stderr.replace("\n", "")
    assert not (tmp_path / "b" / "transformers").exists()
    lc.load_into(transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path / "b" / "model")


def test_recover_of_a_task_file(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = laconic("recover", "--task", file, *RECOVER, "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    result = only_json(done.stdout)
    assert result == json.loads((out / RESULT).read_text())
    assert {file.name for file in out.iterdir()} == {RESULT, MANIFEST, "model.safetensors"}
    assert result["stored_bytes"] == stored_bytes(out)
    assert result["score"] > 0.8
    read, problem = lc.load_into(mlp(), out).eval(), task()
    assert problem.judge(read, problem.validation).score == result["score"]
    assert problem.judge(read, problem.test or []).score == result["test_score"]
    assert all(float((w() == 0).float().mean()) == pytest.approx(0.5, abs=0.01) for w in installed(read).values())
    assert read_manifest(out)["recovery"] == result["recovery"]


def test_recover_prints_a_table(file: Path, tmp_path: Path) -> None:
    done = laconic(
        "recover",
        "--task",
        file,
        "--scheme",
        "RTN(2, 'channel')",
        "--recovery",
        "FineTune(6)",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.stderr
    for row in ("reference score", "direct score", "test score", "stored bytes", "minibatches"):
        assert row in done.stdout
    assert f"model: {tmp_path / 'out'}, figures: {tmp_path / 'out' / RESULT}" in done.stderr.replace("\n", "")


def test_recover_of_a_language_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    done = laconic(
        "recover",
        tiny,
        *words(text),
        "--scheme",
        "RTN(3, 32)",
        "--recovery",
        "Direct()",
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    result = only_json(done.stdout)
    _, problem = text_task(tiny, text, length=32, batch=8, train_tokens=2048)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert problem.judge(model.eval(), problem.validation).score == pytest.approx(result["score"], abs=1e-5)
    assert result["original_bytes"] == sum(
        t.nbytes for t in transformers.AutoModelForCausalLM.from_pretrained(tiny).parameters()
    )
    kept = {
        name: t
        for name, t in load_file(tmp_path / "out" / "model.safetensors").items()
        if name in dict(model.named_parameters())
    }
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}, (
        "what is not compressed is stored as wide as in the original"
    )
    assert "model.embed_tokens.weight" in kept
    again = laconic(
        "recover",
        tiny,
        *words(text),
        "--scheme",
        "RTN(4, 32)",
        "--recovery",
        "Direct()",
        "--out",
        tmp_path / "out",
        "--overwrite",
    )
    assert again.exit_code == 0, again.stderr
    assert read_manifest(tmp_path / "out")["scheme"] == "RTN(bits=4, group=32)"


@pytest.mark.parametrize("method", ["dkm", "llm-qat"])
def test_recipes(method: str, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme and the steps are the recipe's; llm-qat needs no text: the model writes its own."""
    monkeypatch.setitem(text_task.__kwdefaults__ or {}, "check_tokens", 512)  # writing takes its time
    given = words(text) if method == "dkm" else ["--length", 16, "--batch", 4, "--train-tokens", 256]
    done = laconic("recover", tiny, *given, "--method", method, "--bits", 2, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    result = only_json(done.stdout)
    assert result["minibatches"] == (16 if method == "dkm" else 4)  # 64 windows by 8, twice; 16 windows by 4, once
    made = recipe(method, 2)
    assert result["recovery"].startswith("FineTune(")
    assert read_manifest(tmp_path / "out")["scheme"] == made.scheme
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    if method == "dkm":
        assert model.model.layers[0].mlp.up_proj.weight.unique().numel() <= 4
        assert model.get_input_embeddings().weight.unique().numel() > 4


def test_recover_says_which_statistics_it_reads(file: Path, tmp_path: Path) -> None:
    """Behind what is compressed before, or of the model as it is: other weights, and another run for who repeats one."""
    given = ["recover", "--task", file, "--scheme", "GPTQ(bits=2, group='channel')", "--recovery", "Direct()", "--json"]
    stored = {}
    for statistics in ("original", "compressed"):
        done = laconic(*given, "--statistics", statistics, "--out", tmp_path / statistics)
        assert done.exit_code == 0, done.stderr
        assert only_json(done.stdout)["statistics"] == statistics
        stored[statistics] = (tmp_path / statistics / "model.safetensors").read_bytes()
    assert stored["original"] != stored["compressed"]
    again = laconic(*given, "--resume", "--out", tmp_path / "compressed")
    assert again.exit_code == 5
    assert "statistics: 'compressed' then, None now" in again.stderr
    unknown = laconic(*given, "--statistics", "both", "--out", tmp_path / "unknown")
    assert unknown.exit_code == 2
    assert "expected 'compressed' or 'original', got 'both'" in unknown.stderr


def test_recover_goes_on_where_it_was_interrupted(file: Path, tmp_path: Path) -> None:
    """Killed in the second L-step by its own score; the weights come out as from a run that was not."""
    out = tmp_path / "out"
    file.write_text(
        TASK
        + "\nclock = iter([0, 0, 0, 0, 1])\n\n\ndef score(output, batch):\n    if next(clock):\n        raise KeyboardInterrupt\n"
    )
    file.write_text(file.read_text() + "    return (output.argmax(1) == batch[1]).float()\n")
    stopped = laconic("recover", "--task", file, *RECOVER, "--out", out)
    assert stopped.exit_code == 130
    assert "what is finished is kept: run the same command with --resume" in stopped.stderr
    file.write_text(TASK)
    refused = laconic("recover", "--task", file, *RECOVER, "--out", out)
    assert refused.exit_code == 5
    assert "--resume to go on with it or --overwrite to replace it" in refused.stderr
    resumed = laconic("recover", "--task", file, *RECOVER, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    whole = laconic("recover", "--task", file, *RECOVER, "--out", tmp_path / "whole")
    assert whole.exit_code == 0
    assert bytes_of(lc.load_into(mlp(), out)) == bytes_of(lc.load_into(mlp(), tmp_path / "whole"))


def test_what_recover_replaces(file: Path, tmp_path: Path) -> None:
    """A result with --overwrite, and only when everything else is in order; nobody else's files."""
    out = tmp_path / "out"
    direct = ["--task", file, "--recovery", "Direct()", "--out", out]
    assert laconic("recover", *direct, "--scheme", "Cast('float16')").exit_code == 0
    before = (out / MANIFEST).read_bytes()
    refused = laconic("recover", *direct, "--scheme", "Cast('bfloat16')", "--resume")
    assert refused.exit_code == 5
    assert "pass --overwrite to replace it" in refused.stderr
    for bad in ("RTN(4, group=-48)", "Magnitude(Free(0, 1))", "Magnitud(0.5)"):
        assert laconic("recover", *direct, "--scheme", bad, "--overwrite").exit_code == 2
    assert (out / MANIFEST).read_bytes() == before
    (out / "thesis.tex").write_text("years of work")
    refused = laconic("recover", *direct, "--scheme", "Cast('bfloat16')", "--overwrite")
    assert refused.exit_code == 5
    assert "files that no recovery wrote (thesis.tex)" in refused.stderr
    (out / "thesis.tex").unlink()
    assert laconic("recover", *direct, "--scheme", "Cast('bfloat16')", "--overwrite").exit_code == 0
    assert read_manifest(out)["scheme"] == "Cast(dtype='bfloat16')"


def test_overwriting_what_is_not_there_is_an_ordinary_run(file: Path, tmp_path: Path) -> None:
    """In a folder that does not exist, and in an empty one."""
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        done = laconic(
            "recover", "--task", file, "--scheme", "Cast('float16')", "--recovery", "Direct()", "--out", tmp_path / name, "--overwrite",
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        assert read_manifest(tmp_path / name)["scheme"] == "Cast(dtype='float16')"
    assert bytes_of(lc.load_into(mlp(), tmp_path / "new")) == bytes_of(lc.load_into(mlp(), tmp_path / "empty"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected a JSON object"), ("{", "damaged, not JSON"), ('{"run": {}, "run": {}}', "comes twice"),
        ('{"run": 3}', "how the model was made"),
    ],
)  # fmt: skip
def test_figures_that_are_damaged_are_not_taken_for_a_complete_recovery(
    text: str, said: str, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["recover", "--task", file, "--scheme", "Cast('float16')", "--recovery", "Direct()", "--out", out]
    assert laconic(*words).exit_code == 0
    (out / "recovery.json").write_text(text)
    refused = laconic(*words, "--resume")
    assert refused.exit_code == 5
    assert said in refused.stderr
    assert "--overwrite to replace" in refused.stderr
    assert (out / "recovery.json").read_text() == text


def test_search_and_recover_say_before_work_what_cannot_be_trained(file: Path, tmp_path: Path) -> None:
    how = "FineTune(2, Steps(Optimizer('Muon')))"
    for command, scheme in (("recover", "RTN(3, 'channel')"), ("search", "Magnitude(Free(0, 1))")):
        refused = laconic(
            command, "--task", file, "--scheme", scheme, "--recovery", how, "--out", tmp_path / command
        )  # fmt: skip
        assert refused.exit_code == 2
        assert "Muon only supports 2D" in refused.stderr


def test_what_search_replaces(file: Path, tmp_path: Path) -> None:
    """An earlier search with --overwrite, and only when everything else is in order; nobody else's files."""
    out = tmp_path / "out"
    direct = ["--task", file, "--recovery", "Direct()", "--out", out, "--trials", 2, "--keep", 0.5]
    scheme = ["--scheme", "Magnitude(Free(0.1, 0.5))"]
    assert laconic("search", *direct, *scheme).exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused = laconic("search", *direct, *scheme)
    assert (refused.exit_code, "overwrite it" in refused.stderr.replace("\n", " ")) == (8, True)
    for bad in (
        ["--scheme", "Magnitude(0.5)"], ["--scheme", "Magnitude(Free(1, 0))"], [*scheme, "--sampler", "bayes"], [*scheme, "--resume"],
        [*scheme, "--storage", tmp_path / "other.db"], [*scheme, "--objective", "flop"],
    ):  # fmt: skip
        assert laconic("search", *direct, *bad, "--overwrite").exit_code in (2, 8), bad
    (out / "thesis.tex").write_text("years of work")
    refused = laconic("search", *direct, *scheme, "--overwrite")
    assert refused.exit_code == 5
    assert "files that no search wrote (thesis.tex)" in refused.stderr
    (out / "thesis.tex").unlink()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert laconic("search", *direct, "--scheme", "Magnitude(Free(0.5, 0.6))", "--overwrite").exit_code == 0
    assert json.loads((out / "search.json").read_text())["scheme"] == "Magnitude(sparsity=Free(0.5, 0.6))"


REFUSED: dict[str, tuple[int, str, list[Any]]] = {
    "no scheme": (2, "give --scheme or --plan", ["search", "--task", "{file}"]),
    "two schemes": (2, "give --scheme or --plan", ["recover", "--task", "{file}", "--scheme", "RTN(4)", "--plan", "{file}"]),
    "nothing to work on": (2, "give a language model and --data, or --task FILE.py", ["search", "--scheme", "Magnitude(Free(0, 1))"]),
    "a task and a text": (2, "a task file names its own data", ["recover", "--task", "{file}", "--data", "{text}", "--scheme", "RTN(4)"]),
    "no text": (2, "needs --data, a text to learn from", ["recover", "{tiny}", "--scheme", "RTN(4, 32)"]),
    "an unknown recovery": (2, "unknown 'LD' in 'LD()' (column 1); did you mean 'LC'?", ["recover", "--task", "{file}", "--scheme", "RTN(4)", "--recovery", "LD()"]),
    "an unknown recipe": (2, "known: dkm, llm-qat", ["recover", "{tiny}", "--data", "{text}", "--method", "awq"]),
    "a recipe and a scheme": (2, "brings its own scheme", ["recover", "{tiny}", "--data", "{text}", "--method", "dkm", "--scheme", "RTN(4, 32)"]),
    "bits of nothing": (2, "--bits belongs to --method", ["recover", "{tiny}", "--data", "{text}", "--bits", "3", "--scheme", "RTN(4, 32)"]),
    "a free value": (2, "search for it with lc.search", ["recover", "--task", "{file}", "--scheme", "Magnitude(Free(0, 1))"]),
    "reversed bounds": (2, "the lower one first", ["search", "--task", "{file}", "--scheme", "Magnitude(Free(1, 0))"]),
    "no model": (3, "expected a model directory or a hub id", ["recover", "{tiny}/none/model", "--data", "{text}", "--scheme", "RTN(4, 32)"]),
    "no task file": (4, "no such task file", ["search", "--task", "{tiny}/none.py", "--scheme", "Magnitude(Free(0, 1))"]),
    "an empty task file": (4, "no variable 'model'", ["recover", "--task", "{empty}", "--scheme", "RTN(4)"]),
    "no such text": (4, "no such file", ["search", "{tiny}", "--data", "{tiny}.txt", "--scheme", "Magnitude(Free(0, 1))"]),
    "nothing free": (8, "nothing to search", ["search", "--task", "{file}", "--scheme", "Magnitude(0.5)"]),
    "an unknown objective": (8, "did you mean 'flops'?", ["search", "--task", "{file}", "--scheme", "Magnitude(Free(0, 1))", "--objective", "flop"]),
    "an unknown sampler": (8, "'bayes'", ["search", "--task", "{file}", "--scheme", "Magnitude(Free(0, 1))", "--sampler", "bayes"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused(case: str, file: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    code, message, given = REFUSED[case]
    (tmp_path / "empty.py").write_text("")
    names = {"file": file, "tiny": tiny, "text": text, "empty": tmp_path / "empty.py"}
    result = laconic(
        *(word.format(**names) if word.startswith("{") else word for word in given), "--out", tmp_path / "out", "--json"
    )
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert result.stderr.count("error ") == 1
    assert "Traceback" not in result.stderr
    assert only_json(result.stdout)["error"]["exit_code"] == code
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_file_in_the_place_of_the_folder(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a letter")
    for given in (["search", *SEARCH], ["recover", *RECOVER], ["recover", *RECOVER, "--overwrite"]):
        done = laconic(*given, "--task", file, "--out", tmp_path / "out")
        assert done.exit_code == 5
        assert "expected a directory, found a file" in done.stderr
    assert (tmp_path / "out").read_text() == "a letter"


def test_training_that_diverges(file: Path, tmp_path: Path) -> None:
    file.write_text(TASK + "\n\ndef loss(output, batch):\n    return output.sum() * float('nan')\n")
    done = laconic("recover", "--task", file, *RECOVER, "--out", tmp_path / "out")
    assert done.exit_code == 9
    assert "lower lr" in done.stderr or "not finite" in done.stderr or "nan" in done.stderr


def test_a_network_that_cannot_be_traced(file: Path, tmp_path: Path) -> None:
    """Without --no-thin exit code 7 and the way out; with it, masks."""
    file.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 4)\n\n"
        "    def forward(self, x):\n        x = torch.relu(self.a(x))\n        return self.b(x if x.sum() > 0 else -x)\n\n\n"
        "from tests.recover.nets import task\nmade = task()\ntrain, validation, model = made.train, made.validation, Net()\n"
    )
    given = [
        "--task",
        file,
        "--scheme",
        "NeuronPrune(Free(0.2, 0.6))",
        "--recovery",
        "Direct()",
        "--keep",
        1,
        "--trials",
        1,
        "--out",
        tmp_path / "o",
    ]
    refused = laconic("search", *given)
    assert refused.exit_code == 7
    assert "Net: Tensor.__bool__" in refused.stderr
    assert "--no-thin on the command line" in refused.stderr.replace("\n", " ")
    done = laconic("search", *given, "--no-thin", "--json")
    assert done.exit_code == 0, done.stderr
    assert "rows are only set to zero, each for itself" in only_json(done.stdout)["notes"][0]
