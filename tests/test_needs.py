"""A test that is skipped for want of something fails where that has to be there."""

from pathlib import Path

import pytest

from tests import needs


@pytest.fixture(autouse=True)
def _nothing_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LACONIC_REQUIRE", raising=False)


def test_what_is_missing_skips(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="no_such_package"):
        needs.extra("no_such_package")
    with pytest.raises(pytest.skip.Exception, match="models"):
        needs.shared_folder(tmp_path)


def test_what_is_required_and_missing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACONIC_REQUIRE", "extras, shared")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        needs.extra("no_such_package")
    with pytest.raises(pytest.fail.Exception, match="models"):
        needs.shared_folder(tmp_path)


def test_what_is_there_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    for required in ("", "extras,shared"):
        monkeypatch.setenv("LACONIC_REQUIRE", required)
        assert needs.extra("torch").__name__ == "torch"
        assert needs.shared_folder(tmp_path) == tmp_path


def test_a_misspelt_requirement_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACONIC_REQUIRE", "extra")
    with pytest.raises(AssertionError, match="known: extras, shared"):
        needs.is_required("extras")


def test_every_test_asks_here() -> None:
    folder = Path(__file__).parent
    asking = [file for file in folder.rglob("*.py") if "importorskip" in file.read_text()]
    assert sorted(file.name for file in asking) == ["needs.py", "test_needs.py"]
