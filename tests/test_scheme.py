"""Scheme texts are parsed, never evaluated; plans match or say what does not."""

from pathlib import Path

import pytest
import transformers

from laconic.errors import SchemeError
from laconic.load import build_skeleton
from laconic.methods.base import Keep
from laconic.methods.gptq import GPTQ
from laconic.methods.rtn import RTN
from laconic.scheme import describe, known_methods, load_plan, parse, resolve
from laconic.sites import Slot, find_slots
from laconic.weights import View

SLOTS = [
    Slot("model.embed_tokens", (("model.embed_tokens", "weight"), ("lm_head", "weight")), View((320, 64)), role="embedding"),
    *(
        Slot(f"model.layers.{i}.mlp.{kind}_proj", ((f"model.layers.{i}.mlp.{kind}_proj", "weight"),), View(shape))
        for i in range(3)
        for kind, shape in (("up", (96, 64)), ("down", (64, 96)))
    ),
]


@pytest.mark.parametrize(
    "text",
    [
        "GPTQ(bits=3) + EoRA(rank=16)", "Magnitude(sparsity=0.5) >> KMeans(bits=4)", "GPTQ(rate=2.25)", "Hadamard(method=GPTQ(bits=2))",
        "(Magnitude(sparsity=0.5) >> RTN(bits=4)) + LowRank(rank=4)", "Magnitude(sparsity=0.5, pattern=(4, 4))", "SpQR(bits=3, outliers=inf)",
        "[('lm_head', Keep()), (columns > 64, GPTQ(bits=4)), ('*', GPTQ(bits=3))]",
        "GPTQ(bits=4) if 'up_proj' in name or block < 1 else GPTQ(bits=3)",
    ],
)  # fmt: skip
def test_text_is_read_back_as_it_is_written(text: str) -> None:
    assert describe(parse(text)) == text


def test_composition_binds_as_in_python() -> None:
    assert parse("RTN(2) + LowRank(2) >> RTN(4)") == (RTN(2) + parse("LowRank(2)")) >> RTN(4)  # type: ignore[operator]
    assert parse("GPTQ") == GPTQ()
    assert parse("RTN(4, 32, True)") == RTN(bits=4, group=32, symmetric=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GPTG(bits=3)", "unknown method 'GPTG'.*did you mean 'GPTQ'"),
        ("GPTQ(bit=3)", "no argument 'bit'.*did you mean 'bits'"),
        ("GPTQ(bits=3", "not a Python expression"),
        ("", "not a Python expression"),
        ("__import__('os').system('echo')", "only methods can be called"),
        ("GPTQ(bits=open('/etc/passwd').read())", "only methods can be called"),
        ("GPTQ(bits=print(1))", "unknown method 'print'"),
        ("(lambda: GPTQ())()", "only methods can be called"),
        ("GPTQ(bits=3).__class__", "expected a method"),
        ("GPTQ(bits=[x for x in range(9)])", "expected a literal"),
        ("GPTQ(**{'bits': 3})", "no argument None"),
        ("GPTQ(3, bits=4)", "'bits' twice"),
        ("RTN(1, 2, 3, 4, 5, 6, 7)", "takes 6 arguments"),
        ("RTN(bits=4) - RTN(bits=2)", "expected a method"),
        ("[('*', 4)]", "expected a method"),
        ("[GPTQ()]", "pair"),
        ("[(columns ** 2 > 4, GPTQ())]", "a condition compares"),
        ("GPTQ() if len(name) > 3 else RTN()", "a condition compares"),
        ("GPTQ() if name.__class__ else RTN()", "a condition compares"),
        ("Hadamard()", "method"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        parse(text)


def test_a_bare_method_is_for_the_body() -> None:
    chosen = resolve(RTN(4, group=32), SLOTS)
    assert [isinstance(m, Keep) for m in chosen.values()] == [True] + [False] * 6


def test_the_first_rule_that_matches_wins_and_any_name_of_a_tie_counts() -> None:
    plan = parse("[('lm_head', RTN(8, 32)), (block == 0, RTN(4, 32)), ('*.down_proj', RTN(3, 32)), ('*', Keep())]")
    chosen = {slot.name: method for slot, method in resolve(plan, SLOTS).items()}
    assert chosen["model.embed_tokens"] == RTN(8, 32)
    assert chosen["model.layers.0.mlp.down_proj"] == RTN(4, 32)
    assert chosen["model.layers.1.mlp.down_proj"] == RTN(3, 32)
    assert chosen["model.layers.2.mlp.up_proj"] == Keep()


def test_functions_decide_by_what_a_site_is() -> None:
    chosen = resolve(lambda slot: RTN(4, 32) if slot.columns > 64 else Keep(), SLOTS)
    assert sum(isinstance(method, RTN) for method in chosen.values()) == 3
    with pytest.raises(SchemeError, match="should return a method"):
        resolve(lambda slot: 4, SLOTS)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("[('*.dwn_proj', RTN(4, 32)), ('*', Keep())]", r"rule 1 \('\*.dwn_proj'\) matches no site; did you mean '\*.down_proj'"),
        ("[(columns > 5000, RTN(4, 32)), ('*', Keep())]", r"rule 1 \('columns > 5000'\) matches no site"),
        ("[('*.down_proj', RTN(4, 32))]", "model.embed_tokens: no rule of the plan matches it"),
        ("[('*', RTN(4, group=48))]", "model.embed_tokens: group 48 does not divide 64 columns"),
        ("[(name > 3, RTN(4, 32)), ('*', Keep())]", "do not compare"),
    ],
)
def test_plans_that_cannot_be_carried_out_say_why(plan: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        resolve(parse(plan), SLOTS)


def test_a_model_without_matrices_is_refused() -> None:
    with pytest.raises(SchemeError, match="no linear, convolution or embedding layer"):
        resolve(RTN(4), [])
    with pytest.raises(SchemeError, match="embeddings or an output head only"):
        resolve(RTN(4), SLOTS[:1])


def test_plan_files(tmp_path: Path) -> None:
    file = tmp_path / "plan.py"
    file.write_text("from laconic import GPTQ, Keep\nscheme = [('lm_head', Keep()), ('*', GPTQ(bits=3, group=32))]\n")
    assert describe(load_plan(file)) == "[('lm_head', Keep()), ('*', GPTQ(bits=3, group=32))]"
    file.write_text("plan = 3\n")
    with pytest.raises(SchemeError, match="variable named 'scheme'"):
        load_plan(file)
    with pytest.raises(SchemeError, match="no such plan file"):
        load_plan(tmp_path / "none.py")


def test_methods_are_found_where_they_are() -> None:
    assert {
        "RTN",
        "GPTQ",
        "SparseGPT",
        "GPTVQ",
        "Magnitude",
        "Wanda",
        "KMeans",
        "LowRank",
        "EoRA",
        "SpQR",
        "Hadamard",
        "Cast",
        "Keep",
    } <= known_methods().keys()


def test_expected_bits_are_known_before_anything_is_loaded() -> None:
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2)
    config.architectures = ["LlamaForCausalLM"]
    slots = find_slots(build_skeleton(config))
    chosen = resolve(GPTQ(bits=4, group=128), slots)
    bits = sum(method.expected_bits(slot.shape) for slot, method in chosen.items() if not isinstance(method, Keep))
    entries = sum(slot.entries for slot, method in chosen.items() if not isinstance(method, Keep))
    assert bits / entries == pytest.approx(4 + 20 / 128, rel=1e-4)
