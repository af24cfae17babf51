"""The reference network of the searches, trained once per session."""

import pytest

from laconic.recover import Task
from tests.recover.nets import digits, seeded, trained
from tests.search.digits import Problem, conv


@pytest.fixture(scope="session")
def problem() -> Problem:
    """The network, and the digits it was trained on; 97% of the validation images."""
    data, validation, test = digits()
    train = list(zip(data.dataset.tensors[0].split(50), data.dataset.tensors[1].split(50), strict=True))  # type: ignore[attr-defined]
    net = trained(seeded(conv), train, 100)
    return net, Task(train, validation, test)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's pictures take as long as a search of this size; one fixture has them, and `test_report.py` is about them."""
    monkeypatch.setattr("laconic.show.search_page.render_search", lambda result: "<html></html>")
