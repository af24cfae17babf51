"""Directories damaged at random: none loads to another model, none ends in a traceback (`tools/fuzz.py`, which makes more of them)."""

from pathlib import Path

import pytest

from tools.fuzz import DAMAGES, cases, run


@pytest.mark.parametrize(("verify", "count", "seed"), [(True, 200, 0), (False, 100, 1)])
def test_damage_is_refused_or_does_no_harm(verify: bool, count: int, seed: int, tmp_path: Path) -> None:
    """Without checksums, as earlier versions wrote, another model may come of it, but no traceback and no hang."""
    results = run(count, seed, tmp_path, verify=verify)
    assert not [row for row in results if row[2].isupper()]
    assert len({damage for damage, *_ in results}) == len(DAMAGES)
    assert sum(row[2] == "refused" for row in results) > count / 2


def test_the_readers_see_what_is_changed(tmp_path: Path) -> None:
    """The judge can tell: another model of the same kind is not the same."""
    known = {case.name: case for case in cases(tmp_path)}
    for one, other in (("uniform", "codebook"), ("sparse", "2:4")):
        assert not known[one].expected["output"].equal(known[other].expected["output"])
