"""Sites: what is one and what is not, what nobody measured, what is not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.errors import DataError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(build: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


class Partly(nn.Module):
    """A network one layer of which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


CALIBRATED = [
    "GPTQ(rate=3.25)", "GPTQ(bits=4)", "GPTQ(rate=3.0, over='matrix')", "SparseGPT(0.5)", "SpQR()", "GPTVQ()", "AWQ(bits=4)", "Wanda(0.5)",
    "SmoothQuant()", "RTN(4) + EoRA(rank=4)", "Hadamard(GPTQ(bits=4))", "Hadamard(GPTQ(rate=3.0))", "SparseGPT(0.5) >> GPTQ(bits=3)",
    "KMeans(bits=3, weights='fisher')", "KMeans(bits=3, weights='hessian')", "DKM(bits=3, weights='fisher')", "LowRank(8, weighted=True)",
    "Magnitude(0.5, criterion='taylor', scope='model')", "BlockPrune(0.5, 4, criterion='hessian')",
]  # fmt: skip
FISHER = "KMeans(3, weights='fisher')"
SUMMARY = "of the parameters were rounded without statistics, since the calibration data did not reach them:"


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_a_layer_the_data_never_reach_is_rounded_and_named(scheme: str) -> None:
    net = seeded(Partly)
    _, report = lc.compress(net, scheme, [torch.randn(64, 64, generator=generator())])
    records = {record["name"]: record for record in report.sites}
    assert records["unused"]["unmeasured"] == 1.0
    assert [n for n in records["unused"]["notes"] if n.startswith("unused: no ")] == records["unused"]["notes"][:1]
    assert "unmeasured" not in records["first"]
    assert 0 <= records["unused"]["error"] < 1
    assert report.values["notes"] == [
        "32.8% of the parameters were rounded without statistics, since the calibration data did not reach them: unused"
    ]
    bits = {name: record["bits"] for name, record in records.items()}
    assert bits["unused"] <= 1.3 * max(bits["first"], bits["last"])


def test_a_rate_over_the_model_is_the_rate_of_what_nobody_measured() -> None:
    net = seeded(Partly)
    _, report = lc.compress(net, "GPTQ(rate=3.25)", [torch.randn(64, 64, generator=generator())])
    rates = {record["name"]: record["bits_per_weight"] for record in report.sites}
    assert 3.2 < rates["unused"] <= 3.25
    assert (rates["first"] + rates["last"]) / 2 <= 3.25


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize(
    "scheme", ["GPTQ(bits=4)", "SmoothQuant()", "Wanda(0.5)", "GPTVQ()", "GPTQ(rate=3)", "RTN(4)+EoRA(rank=4)", "KMeans(3, weights='fisher')"]
)
def test_inputs_that_are_not_finite_are_refused_before_anything_changes(scheme: str, value: float) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    data = [torch.randn(8, 64, generator=generator(i)) for i in range(3)]
    data[1][0, 0] = value
    if value < float("inf") and scheme in ("SmoothQuant()", FISHER):
        return  # a peak of 3e38 is one, and no gradient comes through a saturated softmax
    with pytest.raises(DataError, match="not finite|NaN or infinity|the loss of the model's output is") as caught:
        lc.compress(net, scheme, data)
    assert value == 3e38 or "batch 1 of the calibration data" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_value_that_its_type_cannot_hold_is_refused() -> None:
    net = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        net[0].weight[0, 0] = 1e5
    with pytest.raises(lc.LaconicError, match="0: "):
        lc.compress(net, "Cast('float16')")


def test_a_score_that_is_not_a_number_is_said() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(16, 16)))
    _, report = lc.compress(net, "RTN(4, 'channel')", score=lambda model: float("nan"))
    assert report.values["notes"] == ["the score before compression is nan", "the score after compression is nan"]
