"""The laws every method obeys. Methods are found by walking the folder; a new one needs an example here only if it cannot be made bare."""

import dataclasses
from typing import Any

import pytest
import torch

from laconic.engine.plan import Plan
from laconic.errors import DataError, SchemeError
from laconic.methods.base import Method
from laconic.methods.gptq import GPTQ
from laconic.methods.rtn import RTN
from laconic.model.sites import MEASURED, Site, Slot, Stats
from laconic.model.unmeasured import completed
from laconic.scheme.text import known_methods, parse
from laconic.solvers.output_error import output_error
from laconic.weights import View, Weight
from tests.conftest import make_site, output_loss

NEEDED: dict[str, dict[str, Any]] = {
    "Hadamard": {"method": GPTQ(bits=3, group=16)}, "RoundInputs": {"method": RTN(bits=3, group=16)},
}  # fmt: skip
"""Arguments without a default."""
VARIANTS = [
    GPTQ(bits=3, group=16, act_order=False), GPTQ(rate=2.5, over="matrix"), GPTQ(bits=2, group="channel", symmetric=True), RTN(bits=2, clip="mse"),
    parse("KMeans(bits=3, weights='fisher')"), parse("KMeans(bits=6, dimension=4, weights='hessian')"), parse("GPTVQ(bits=4, dimension=1, rows=8)"),
    parse("Wanda(pattern='2:4')"), parse("SparseGPT(pattern='2:4')"), parse("Magnitude(0.5, pattern=(4, 4))"), parse("LowRank(8, weighted=True)"),
    parse("LowRank(8, factors=RTN(8, group='channel'))"), parse("SpQR(bits=3, outliers=float('inf'))"),
    parse("GPTQ(bits=2) + EoRA(rank=4)"), parse("Magnitude(0.5) >> KMeans(bits=3)"), parse("SparseGPT(0.5) >> GPTQ(bits=3)"),
    parse("Hadamard(RTN(bits=3), outputs=False)"), parse("Magnitude(0.5, (4, 4), criterion='linf', scope='model', scale='layer')"),
    parse("Magnitude(0.5, criterion='hessian')"), parse("NeuronPrune(0.25, criterion='taylor', align=8) >> Cast('float16')"),
    parse("StructurePrune(0.5, 'mean') >> RTN(4, 'channel')"), parse("BlockPrune(0.4, block=(8, 16), criterion='taylor')"),
    parse("BlockPrune(0.6, 7, scope='layer') >> KMeans(bits=4) >> Cast('bfloat16')"), parse("Cut(rows=(3, 5), columns=(0, 63), dtype='bfloat16')"),
    parse("Cut(columns=(1, 2, 3)) >> GPTQ(bits=4, group=16)"), parse("Hadamard(BlockPrune(0.5, (3, 3)))"),
    parse("AWQ(bits=3, group=16, clip=False)"), parse("AWQ(bits=3, group='channel', symmetric=True)"), parse("AWQ(2, 'tensor') + EoRA(rank=4)"),
    parse("SmoothQuant(bits=4, activations=None, alpha=0.75, group=16)"), parse("RTN(8) >> SmoothQuant(activations=None)"),
    parse("RoundInputs(GPTQ(rate=2.5), bits=4, granularity='tensor', symmetric=False, range='mse')"), parse("RoundInputs(AWQ(3), range='dynamic')"),
    parse("RoundInputs(AFM(8), granularity='tensor', range='minmax')"), parse("RoundInputs(Magnitude(0.5) >> KMeans(bits=3), bits=6)"),
    parse("SparseGPT(0.5) >> RoundInputs(GPTQ(bits=3), granularity='tensor')"), parse("SmoothQuant(granularity='tensor', range='mse')"),
    parse("AFM(8)"), parse("AFM(0.7, factors=RTN(8, group='channel'))"),
]  # fmt: skip


def examples() -> list[Method]:
    bare = [cls(**NEEDED.get(name, {})) for name, cls in known_methods().items()]
    return bare + VARIANTS  # type: ignore[return-value]


@pytest.fixture(params=examples(), ids=repr)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def run(method: Method, site: Site) -> Weight:
    with torch.no_grad():
        return method(site)


def only(site: Site, wanted: Stats) -> Site:
    """The site with the statistics a method asked for, and no others."""
    return site.having(
        hessian=site.hessian if wanted & Stats.HESSIAN else None,
        squares=site.squares if wanted & Stats.SQUARES else None,
        magnitude=site.magnitude if wanted & Stats.MEAN else None,
        peak=site.peak if wanted & Stats.MAX else None,
        centre=site.centre if wanted & Stats.CENTRE else None,
        low=site.low if wanted & Stats.RANGE else None,
        high=site.high if wanted & Stats.RANGE else None,
        sample=site.sample if wanted & Stats.SAMPLE else None,
        uses=site.uses if wanted & Stats.USES else None,
        fisher=site.fisher if wanted & Stats.FISHER else None,
        output_fisher=site.output_fisher if wanted & Stats.OUTPUT_FISHER else None,
        channels=site.channels if wanted & Stats.CHANNELS else None,
    )


def test_what_it_asks_for_is_all_it_reads(method: Method) -> None:
    weight = run(method, only(make_site(), method.wants))
    assert weight.shape == (48, 64)
    assert torch.isfinite(weight()).all()


def test_it_leaves_its_input_alone(method: Method) -> None:
    site = make_site()
    before = {
        f.name: getattr(site, f.name).clone()
        for f in dataclasses.fields(site)
        if isinstance(getattr(site, f.name), torch.Tensor)
    }
    state = torch.random.get_rng_state()
    run(method, site)
    assert all(torch.equal(getattr(site, name), tensor) for name, tensor in before.items())
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random state was touched"


def test_the_same_seed_gives_the_same_bytes(method: Method) -> None:
    first, second = (run(method, make_site()).pack() for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


def test_bits_are_the_stored_bytes_and_about_what_was_expected(method: Method) -> None:
    weight = run(method, make_site(rows=64, columns=128))
    stored = 8 * sum(t.nbytes for t in weight.pack()[1].values())
    assert weight.bits() == stored
    assert stored == pytest.approx(method.expected_bits((64, 128)), rel=0.12)


def test_statistics_help(method: Method) -> None:
    """With the true Hessian the output error is no larger than what the same method finds knowing nothing of the inputs."""
    if not method.wants & Stats.HESSIAN:
        pytest.skip("uses no Hessian")
    site = make_site(rows=64, columns=128)
    identity = torch.eye(128).unsqueeze(0)
    blind = run(method, site.having(hessian=identity, squares=torch.ones(1, 128)))
    assert output_loss(site, run(method, site)()) <= output_loss(site, blind()) * 1.0001


def test_a_bit_more_quarters_the_error(method: Method) -> None:
    """High-resolution theory: of vectors of d columns, 4^(-1 / d) of the error is left; up to 1.4 times that with scales and small sizes."""
    if not isinstance(getattr(method, "bits", None), int) or method.bits >= 8:  # type: ignore[attr-defined]
        pytest.skip("has no bits to raise")
    site = make_site()
    more = dataclasses.replace(method, bits=method.bits + 1)  # type: ignore[type-var, attr-defined]
    if more.expected_bits((48, 64)) == method.expected_bits((48, 64)):
        pytest.skip("its bits are not those of the weight")
    least = 0.25 ** (1 / getattr(method, "dimension", 1))
    assert output_error(site, run(more, site)) <= 1.4 * least * output_error(site, run(method, site))


def test_its_text_is_parsed_back_to_it(method: Method) -> None:
    again = parse(repr(method))
    assert again == method
    assert repr(again) == repr(method)


def test_it_is_a_frozen_value_with_a_docstring(method: Method) -> None:
    assert hash(method) is not None
    if dataclasses.is_dataclass(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, dataclasses.fields(method)[0].name, None)
    assert type(method).__doc__
    assert "Source" in (type(method).__doc__ or ""), "the paper, section or equation it carries out"


WHOLE = ("AFM(", "EoRA(", "weighted=True")
"""Methods whose factors are those of a whole matrix under one second moment, by a part of their text."""


def test_row_groups_with_inputs_of_their_own(method: Method) -> None:
    """Grouped convolutions and packed experts: a Hessian per group; or, of methods that look at the whole, a clear refusal."""
    site = make_site(groups=4)
    if any(part in repr(method) for part in WHOLE):
        with pytest.raises(
            SchemeError, match=r"block\.0\.layer: .* needs one (covariance|Hessian) for the whole matrix \(groups: 4\)"
        ):
            run(method, site)
        return
    weight = run(method, site)
    assert torch.isfinite(weight()).all()
    assert weight.shape == (48, 64)


def test_sites_of_one_input_come_back_in_their_order(method: Method) -> None:
    if not method.joint:
        pytest.skip("treats each site for itself")
    sites = [make_site(), make_site().having(W=make_site(seed=1).W[:24])]
    assert [weight.shape for weight in method.together(sites)] == [(48, 64), (24, 64)]
    assert torch.equal(method.together(sites[:1])[0](), run(method, sites[0])())


STATISTICS = (
    "hessian", "squares", "magnitude", "peak", "centre", "low", "high", "sample", "uses", "tokens", "input", "fisher", "output_fisher",
)  # fmt: skip


def test_a_site_that_nothing_reached_is_compressed_and_says_so(method: Method) -> None:
    """The one rule for unmeasured sites: a weight of the bits expected, one note with the site's name, and the same bytes as any other time."""
    site = make_site().having(**dict.fromkeys(STATISTICS))
    given = completed(site, method.wants)
    weight = run(method, given)
    assert torch.isfinite(weight()).all()
    assert weight.bits() <= run(method, only(make_site(), method.wants)).bits() * 1.05
    if method.wants & MEASURED:
        assert given.unmeasured == 1.0
        assert [note for note in site.notes if note.startswith("block.0.layer: no ")] == site.notes[:1]
    else:
        assert given.unmeasured == 0.0
        assert not site.notes
    slot = Slot("block.0.layer", (("block.0.layer", "weight"),), View((48, 64)))
    allocation = Plan.of({slot: method}).allocations().get(method)
    if allocation is not None:
        allocation.observe(site)
        assert torch.isfinite(run(allocation.resolve()["block.0.layer"], given)()).all()


def test_statistics_that_are_not_finite_are_refused(method: Method) -> None:
    site = only(make_site(), method.wants)
    for broken in (
        "hessian",
        "squares",
        "magnitude",
        "peak",
        "centre",
        "low",
        "high",
        "sample",
        "fisher",
        "output_fisher",
    ):
        values = getattr(site, broken)
        if values is None:
            continue
        values = values.clone()
        values.view(-1)[0] = torch.nan
        with pytest.raises(DataError, match="block.0.layer: its (inputs|gradients) are not finite"):
            completed(site.having(**{broken: values}), method.wants)


def test_an_all_zero_matrix_stays_zero(method: Method) -> None:
    site = make_site().having(W=torch.zeros(48, 64))
    assert run(method, site)().abs().max() < 1e-6
