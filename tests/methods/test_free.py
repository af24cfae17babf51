"""Hyper-parameters left open: named, written, read back, given values; and nothing is computed before they have them."""

import pytest

import laconic as lc
from laconic.engine.resolve import resolve
from laconic.errors import SchemeError
from laconic.methods.base import Then
from laconic.methods.blockprune import BlockPrune
from laconic.methods.free import Free
from laconic.methods.gptq import GPTQ
from laconic.methods.hadamard import Hadamard
from laconic.methods.kmeans import KMeans
from laconic.methods.magnitude import Magnitude
from laconic.methods.rtn import RTN
from laconic.model.sites import Slot
from laconic.scheme.filling import fix, free_of
from laconic.scheme.keep import Keep
from laconic.scheme.text import describe, parse
from laconic.weights import View
from tests.conftest import make_site

SLOTS = [Slot(name, ((name, "weight"),), View(shape)) for name, shape in (("a", (8, 4)), ("b", (4, 8)), ("c", (8, 4)))]


def test_a_free_value_is_found_and_filled_in() -> None:
    scheme = Magnitude(Free(0, 1), scope="model") >> RTN(bits=Free(2, 8, integer=True), group="channel")
    assert free_of(scheme, SLOTS) == {"sparsity": Free(0, 1), "bits": Free(2, 8, integer=True)}
    assert fix(scheme, {"sparsity": 0.25, "bits": 3.0}) == Magnitude(0.25, scope="model") >> RTN(
        bits=3, group="channel"
    )
    assert free_of(fix(scheme, {"sparsity": 0.25, "bits": 3}), SLOTS) == {}
    assert lc.Free is Free


def test_it_is_found_however_deep() -> None:
    scheme = Hadamard(GPTQ(bits=Free(2, 4, integer=True))) + (
        Magnitude(Free(0.5, 0.9, name="s")) >> KMeans(Free(choices=(3, 4)))
    )  # type: ignore[arg-type]
    assert list(free_of(scheme, [])) == ["bits", "s", "bits_2"]
    fixed = fix(scheme, {"bits": 2, "s": 0.75, "bits_2": 4})
    assert fixed == Hadamard(GPTQ(bits=2)) + (Magnitude(0.75) >> KMeans(4))


def test_equal_ones_are_one_variable_and_different_ones_are_numbered() -> None:
    plan = [("a", Magnitude(Free(0, 1))), ("b", Magnitude(Free(0, 0.5))), ("c", Magnitude(Free(0, 1)))]
    assert free_of(plan, SLOTS) == {"sparsity": Free(0, 1), "sparsity_2": Free(0, 0.5)}
    assert fix(plan, {"sparsity": 0.75, "sparsity_2": 0.25}) == [
        ("a", Magnitude(0.75)),
        ("b", Magnitude(0.25)),
        ("c", Magnitude(0.75)),
    ]
    named = [("a", Magnitude(Free(0, 1, name="first"))), ("*", Magnitude(Free(0, 1, name="rest")))]
    assert list(free_of(named, SLOTS)) == ["first", "rest"]
    other = Magnitude(Free(0, 1, name="s")) >> BlockPrune(Free(0, 1, name="s"))
    assert fix(other, {"s": 0.5}) == Magnitude(0.5) >> BlockPrune(0.5)


def test_a_function_is_fixed_where_it_is_called() -> None:
    scheme = parse("Magnitude(Free(0, 1)) if rows > 4 else Magnitude(Free(0, 0.5))")
    assert free_of(scheme, SLOTS) == {"sparsity": Free(0, 1), "sparsity_2": Free(0, 0.5)}
    fixed = fix(scheme, {"sparsity": 0.75, "sparsity_2": 0.25}, SLOTS)
    assert describe(fixed) == describe(scheme)
    assert [method.sparsity for method in resolve(fixed, SLOTS).methods.values()] == [0.75, 0.25, 0.75]  # type: ignore[attr-defined]
    assert fixed(SLOTS[1]) == Magnitude(0.25), "in any order, since the slots settled the names"  # type: ignore[operator]

    def chosen(slot: Slot) -> lc.Method | Keep:
        return Keep() if slot.name == "b" else Magnitude(Free(0, 1))  # type: ignore[arg-type]

    assert [repr(fix(chosen, {"sparsity": 0.5})(slot)) for slot in SLOTS] == [
        "Magnitude(sparsity=0.5)",
        "Keep()",
        "Magnitude(sparsity=0.5)",
    ]  # type: ignore[operator]
    assert describe(fix(chosen, {"sparsity": 0.5})) == "function chosen"


@pytest.mark.parametrize(
    "text",
    [
        "Magnitude(sparsity=Free(0, 1))", "Magnitude(sparsity=Free(0.1, 0.9, name='s')) >> KMeans(bits=Free(2, 8, integer=True))",
        "BlockPrune(sparsity=Free(0.001, 1, log=True), block=Free(choices=(2, (4, 4), 8)))", "RTN(bits=4, group=Free(choices=(32, 'channel')))",
        "Hadamard(method=Free(choices=(RTN(bits=4), GPTQ(bits=3))))", "[('a', Magnitude(sparsity=Free(0, 1))), ('*', Keep())]",
    ],
)  # fmt: skip
def test_text_is_read_back_as_it_is_written(text: str) -> None:
    assert describe(parse(text)) == text


def test_checks_wait_for_values_and_nothing_is_computed_before() -> None:
    site, method = make_site(), Magnitude(sparsity=Free(0, 1), scope="model")  # type: ignore[arg-type]
    thirds: list[lc.Method] = [method, method >> RTN(4), Hadamard(method), RTN(2) + method]
    for scheme in thirds:
        for compute in (lambda s: s(site), lambda s: s.expected_bits((8, 8)), lambda s: s.allocation()):
            with pytest.raises(SchemeError, match="sparsity is still free: search for it with lc.search"):
                compute(scheme)
    with pytest.raises(SchemeError, match=r"a: Magnitude.*still free"):
        resolve(method, SLOTS)
    assert isinstance(Magnitude(Free(0, 1)) >> GPTQ(bits=None, rate=Free(1, 3)), Then)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="a rate counts every entry"):
        fix(Magnitude(0.5) >> GPTQ(bits=None, rate=Free(1, 3)), {"rate": 2})  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="share of zeros"):
        fix(Magnitude(Free(0, 2)), {"sparsity": 1.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("1, 0", "lower one first"), ("0.5, 0.5", "lower one first"), ("", "two finite numbers"), ("0", "two finite numbers"),
        ("0, inf", "two finite"), ("True, 3", "two finite"), ("'a', 'b'", "two finite"), ("0, 1, log=True", "above 0"),
        ("0.5, 4, integer=True", "integers as bounds"), ("choices=()", "one or more"), ("choices=(1, 2, 1)", "different"), ("choices=3", "tuple"),
        ("0, 1, choices=(1, 2)", "not both"), ("0, 1, step=3", "no argument 'step'"),
    ],
)  # fmt: skip
def test_what_is_no_range_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        parse(f"Magnitude(Free({arguments}))")


def test_values_are_held_to_the_bounds_and_the_names() -> None:
    scheme = Magnitude(Free(0.2, 0.8)) >> KMeans(
        bits=Free(2, 4, integer=True), weights=Free(choices=("none", "hessian"))
    )  # type: ignore[arg-type]
    good = {"sparsity": 0.8, "bits": 2, "weights": "hessian"}
    assert fix(scheme, good) == Magnitude(0.8) >> KMeans(bits=2, weights="hessian")
    wrong = [
        ("sparsity", 0.9),
        ("sparsity", float("nan")),
        ("sparsity", "0.5"),
        ("bits", None),
        ("bits", 2.5),
        ("bits", 5),
        ("weights", "fisher"),
    ]
    for name, value in wrong:
        with pytest.raises(SchemeError, match="Free"):
            fix(scheme, good | {name: value})
    with pytest.raises(SchemeError, match="'bits' of .* has no value"):
        fix(scheme, {"sparsity": 0.5, "weights": "none"})
    with pytest.raises(SchemeError, match="nothing of the scheme is called 'bit'; free: sparsity, bits, weights"):
        fix(scheme, good | {"bit": 3})
    with pytest.raises(SchemeError, match="a rule is a pair"):
        free_of([Magnitude(Free(0, 1))], SLOTS)  # type: ignore[arg-type, list-item]
