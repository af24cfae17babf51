"""docs/architecture.md says what is true: the paths it names are there, and the types are where it says."""

import re
from pathlib import Path

import pytest

from tests.test_rooms import ROOMS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "laconic"
TEXT = (ROOT / "docs" / "architecture.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", TEXT)
PATHS = sorted({word for word in CODE if re.fullmatch(r"[\w/.-]+\.(py|md|j2)", word)})
SECTION = TEXT.split("## Types")[1].split("\n## ")[0]
TYPES = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`[\w/.]+`(?:, )?)+) \|", SECTION, re.M)


@pytest.mark.parametrize("path", PATHS)
def test_every_file_it_names_is_there(path: str) -> None:
    assert any((folder / path).is_file() for folder in (PACKAGE, ROOT))


def test_there_are_types_and_paths_to_look_at() -> None:
    assert len(TYPES) > 30
    assert len(PATHS) > 60


def test_every_link_to_a_file_leads_there() -> None:
    links = re.findall(r"\]\(([\w/.-]+\.md)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


@pytest.mark.parametrize(("names", "files"), TYPES)
def test_every_type_is_defined_where_it_says(names: str, files: str) -> None:
    text = "".join((PACKAGE / file).read_text() for file in re.findall(r"`([^`]+)`", files))
    missing = [
        name for name in re.findall(r"`(\w+)`", names) if not re.search(rf"^(class {name}\b|{name} = )", text, re.M)
    ]
    assert missing == []


def test_the_picture_and_the_order_name_every_room() -> None:
    picture, order = TEXT.split("## Where something new goes")[0].split("A room imports from those below it")
    rooms = [room for room in ROOMS if (PACKAGE / room).is_dir()]
    assert [room for room in rooms if room != "host" and not re.search(rf"\b{room}\b", picture)] == []
    listed = re.findall(r"\w+", order.split("- `tests")[0].split(":\n", 1)[1])
    assert [name for name in reversed(listed) if name in rooms] == rooms
