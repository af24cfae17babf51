"""Scheme texts are parsed, never evaluated; plans match or say what does not."""

import random
import re
from pathlib import Path

import pytest
import transformers

from laconic.disk.skeletons import build_skeleton
from laconic.engine.resolve import resolve
from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.methods.gptq import GPTQ
from laconic.methods.rtn import RTN
from laconic.model.sites import Slot, find_slots
from laconic.scheme.keep import Keep
from laconic.scheme.text import describe, known_methods, load_plan, parse, vocabulary
from laconic.weights import View

SLOTS = [
    Slot(
        "model.embed_tokens",
        (("model.embed_tokens", "weight"), ("lm_head", "weight")),
        View((320, 64)),
        role="embedding",
    ),
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
    plan = resolve(RTN(4, group=32), SLOTS)
    assert list(plan.kept) == SLOTS[:1]
    assert list(plan.methods) == SLOTS[1:]


def test_the_first_rule_that_matches_wins_and_any_name_of_a_tie_counts() -> None:
    rules = parse("[('lm_head', RTN(8, 32)), (block == 0, RTN(4, 32)), ('*.down_proj', RTN(3, 32)), ('*', Keep())]")
    plan = resolve(rules, SLOTS)
    chosen = {slot.name: method for slot, method in plan.methods.items()}
    assert chosen["model.embed_tokens"] == RTN(8, 32)
    assert chosen["model.layers.0.mlp.down_proj"] == RTN(4, 32)
    assert chosen["model.layers.1.mlp.down_proj"] == RTN(3, 32)
    assert "model.layers.2.mlp.up_proj" in {slot.name for slot in plan.kept}


def test_functions_decide_by_what_a_site_is() -> None:
    plan = resolve(lambda slot: RTN(4, 32) if slot.columns > 64 else Keep(), SLOTS)
    assert list(plan.methods.values()) == [RTN(4, 32)] * 3
    with pytest.raises(SchemeError, match="should return a method"):
        resolve(lambda slot: 4, SLOTS)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            "[('*.dwn_proj', RTN(4, 32)), ('*', Keep())]",
            r"rule 1 \('\*.dwn_proj'\) matches no site; did you mean '\*.down_proj'",
        ),
        ("[(columns > 5000, RTN(4, 32)), ('*', Keep())]", r"rule 1 \('columns > 5000'\) matches no site"),
        ("[('*.down_proj', RTN(4, 32))]", "model.embed_tokens: no rule of the plan matches it"),
        ("[('*', RTN(4, group=0))]", "model.embed_tokens: Uniform: group must be a number of columns"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"import nonesuch\nscheme = 3\n", "line 1: ModuleNotFoundError: No module named 'nonesuch'"),
        (b"x = 1\n\nraise KeyError('lost')\n", "line 3: KeyError: 'lost'"),
        (b"def f():\n    return 1 / 0\n\nscheme = f()\n", "line 2: ZeroDivisionError"),
        (b"scheme = (\n", "line 1: SyntaxError: '\\(' was never closed"),
        (b"import sys\nsys.exit(0)\n", r"line 2: it ended the program: sys.exit\(0\)"),
        (b"scheme = 'caf\xe9'\n", "plan.py, line 1: SyntaxError.*utf-8"),
        (b"scheme = 1\0\n", "plan.py: .*null bytes"),
        (b"scheme = 4\n", "a method, a list of rules or a function.*, got a int"),
        (b"from laconic import GPTQ\nscheme = GPTQ(rate=99)\n", "GPTQ: rate is in bits per weight"),
    ],
)
def test_plan_files_with_errors_name_the_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.py"
    file.write_bytes(content)
    with pytest.raises(SchemeError, match=message):
        load_plan(file)


def test_a_function_or_predicate_that_raises_is_named_with_its_line() -> None:
    with pytest.raises(SchemeError, match=r"model.embed_tokens: .*test_scheme.py, line \d+: KeyError: 'model"):
        resolve(lambda slot: {}[slot.name], SLOTS)
    with pytest.raises(SchemeError, match="ZeroDivisionError"):
        resolve([(lambda slot: slot.rows / 0 > 1, RTN(4)), ("*", Keep())], SLOTS)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("W4A16", "GPTQ(bits=4, group=128)"), ("w8a8", "SmoothQuant(bits=8, activations=8)"), ("gptq", "GPTQ(bits=4, group=64)"),
        ("int4", "GPTQ(bits=4, group=64)"), ("INT8", "RTN(bits=8)"), ("nf4", "KMeans(bits=4)"), ("Awq", "AWQ(bits=4, group=64)"),
        ("2:4", "SparseGPT(pattern='2:4')"), ("q4_k_m", "GPTQ(rate=4.25)"), ("3.5bpw", "GPTQ(rate=3.5)"), ("4-bit", "GPTQ(bits=4, group=64)"),
        ("bf16", "Cast('bfloat16')"), ("afm", "AFM(rank=0.5)"), ("squeezellm", "KMeans(bits=4, weights='fisher')"), ("gptq(bits=3)", "GPTQ(bits=3)"),
    ],
)  # fmt: skip
def test_names_of_elsewhere_are_answered_with_the_nearest_scheme(text: str, meant: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(f"did you mean {meant}?")):
        parse(text)
    assert isinstance(parse(meant), Method), "what is proposed is a scheme"


_HOSTILE = [
    "(" * 5000, "[" * 90 + "]" * 90, "-" * 20000 + "1", "not " * 3000 + "name", "RTN() >> " * 3000 + "RTN()", "RTN() + " * 200 + "RTN()",
    "Hadamard(" * 300 + "RTN()" + ")" * 300, "RTN(bits=" + "9" * 9000 + ")", "RTN(bits=0x" + "f" * 9000 + ")", "RTN(bits=10**9**9)",
    "RTN(bits=1e999)", "RTN(bits=-1e999j)", "RTN\0()", "RTN(group='\0')", "\ud800", "RTN(group='\ud800')", "RTN(group='\\ud800')", "\ufeffRTN()",
    "[('\\ud800', RTN(4))]", "x" * 200_000, " " * 300_000, "RTN(" + "4," * 30_000 + ")", "RTN(bits={'a': 1})", "RTN(bits={1})", "RTN(bits=[4])",
    "RTN(bits=...)", "RTN(bits=b'4')", "RTN(bits=None)", "RTN(second=(3,))", "RTN(second=3)", "RTN(group=-64)", "RTN(group=2.5)",
    "RTN(bits=99)", "KMeans(bits=64)", "KMeans(bits=-1)", "KMeans(dimension=0)", "KMeans(rows=-4)", "GPTQ(rate=-0.0)", "GPTQ(damping='x')",
    "LowRank(rank=10**3)", "LowRank(rank=0)", "LowRank(rank=-1.5)", "LowRank(factors=3)", "Magnitude(2)", "Magnitude(sparsity='x')",
    "Magnitude(pattern='9:4')", "Magnitude(pattern=(0, 0))", "Magnitude(pattern=(4,))", "Magnitude(pattern='')", "Magnitude(pattern='a:b')",
    "Hadamard(RTN)", "Hadamard(None)", "Hadamard(Keep())", "Keep() >> RTN()", "RTN() + Keep()", "Keep(3)", "Cut(rows=(10**6,))", "Cut(rows=3)",
    "Cast('int3')", "Cast(4)", "BlockPrune(0.5, block=())", "BlockPrune(block=(2, 'a'))", "DKM(bits=9)", "AWQ(grid=0)", "SpQR(act_order=1)",
    "Free(0, 1)", "RTN(bits=Free())", "RTN(bits=Free(1, 0))", "RTN(bits=Free('a', 'b'))", "RTN(bits=Free(0, float('inf')))",
    "RTN(bits=Free(choices=()))", "[('*', RTN(bits=Free(0, 1)))]", "[]", "()", "[[]]", "[('*',)]", "[('*', RTN(), 3)]", "[(3, RTN())]",
    "[(name < rows, RTN())]", "[(name in rows, RTN())]", "[(rows in name, RTN())]", "[(block.x, RTN())]", "[(site.rows > 1, RTN())]",
    "RTN() if () < 3 else RTN()", "RTN() if rows else 4", "RTN() if (yield) else RTN()", "lambda: RTN()", "RTN() if x else RTN()", "*RTN()",
    "RTN(*())", "RTN(**{})", "RTN(bits:=4)", "RTN(f'{4}')", "f'{RTN()}'", "RTN.mro()", "RTN()()", "await RTN()", "RTN(bits=4) = 3", "import os",
    "RTN; RTN", "#", "\n", "\t(", "'", "\\", "RTN(bits=4\n)", "RTN(bits=0o9)", "RTN(bits=1_000_000)", "RTN(bits=4)#" + "a" * 1000,
]  # fmt: skip


def _mangled(count: int) -> list[str]:
    """Schemes with characters lost, doubled, exchanged and inserted; the same ones every time."""
    chosen = random.Random(0)
    good = ["GPTQ(bits=3, group=64) + EoRA(rank=16)", "[('lm_head', Keep()), (columns > 64, GPTQ(bits=4)), ('*', RTN(3, symmetric=True))]",
            "Magnitude(sparsity=0.5, pattern=(4, 4)) >> KMeans(bits=4)", "GPTQ(4) if 'up' in name or block < 1 else Hadamard(RTN(2))"]  # fmt: skip
    found = []
    for i in range(count):
        letters = list(good[i % len(good)])
        for _ in range(chosen.randint(1, 6)):
            at = chosen.randrange(len(letters))
            letters[at : at + chosen.randint(0, 3)] = chosen.choices(
                "()[]{}',.=*+>:0123456789eEjx\"\\ \n\0é\u2028\ud83d", k=chosen.randint(0, 3)
            )
        found.append("".join(letters))
    return found


@pytest.mark.parametrize("texts", [_HOSTILE, _mangled(400)], ids=["written", "mangled"])
def test_hostile_texts_are_refused_or_carried_out(texts: list[str]) -> None:
    """Whatever is written as a scheme, from the text to every site's method: a scheme that can be carried out, or SchemeError."""
    refused: list[str] = []
    for text in texts:
        try:
            scheme = parse(text)
            resolve(scheme, SLOTS, whole_file=True)
            assert describe(scheme)
        except SchemeError as error:
            refused.append(str(error))
    assert len(refused) > len(texts) / 2
    assert max(map(len, refused)) < 1000
    "".join(refused).encode()  # can be printed


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
    } <= known_methods().keys()
    assert vocabulary().keys() == {*known_methods(), "Keep"}


def test_expected_bits_are_known_before_anything_is_loaded() -> None:
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2)
    config.architectures = ["LlamaForCausalLM"]
    slots = find_slots(build_skeleton(config))
    methods = resolve(GPTQ(bits=4, group=128), slots).methods
    bits = sum(method.expected_bits(slot.shape) for slot, method in methods.items())
    entries = sum(slot.entries for slot in methods)
    assert bits / entries == pytest.approx(4 + 20 / 128, rel=1e-4)
