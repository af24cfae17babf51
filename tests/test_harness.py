"""Task files of lm-eval that would run code are refused before anything is loaded."""

from pathlib import Path

import pytest

import laconic as lc
from laconic.measure.harness import refuse_code
from laconic.measure.quality import evaluate_source

PLAIN = "task: {name}\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
CODE = {
    "a function": "doc_to_text: !function utils.text\n",
    "a Python object": "doc_to_text: !!python/object/apply:os.system ['true']\n",
    "a metric of its own": "metric_list:\n  - metric: !function utils.metric\n",
    "a data set's code": "dataset_kwargs:\n  trust_remote_code: true\n",
    "a template that leaves its confines": "doc_to_target: \"{{ ''.__class__.__mro__ }}\"\n",
    "a template by attribute": "doc_to_target: \"{{ x | attr('a') }}\"\n",
}


@pytest.mark.parametrize("kind", CODE)
def test_code_is_refused_unless_trusted(kind: str, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(PLAIN.format(name="mine") + CODE[kind])
    with pytest.raises(lc.SchemeError, match=r"mine\.yaml: .* would run code .*--trust-remote-code"):
        evaluate_source(tiny, tasks=[str(file)])


def test_code_is_found_where_a_task_leads(tmp_path: Path) -> None:
    """In what a file includes, in the tasks of a group beside it, and under a name that a file beside it takes from lm-eval."""
    bad = PLAIN.format(name="inner") + CODE["a function"]
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "inner.yaml").write_text(bad)
    (tmp_path / "included.yaml").write_text("include: below/inner.yaml\ntask: outer\n")
    (tmp_path / "group.yaml").write_text("group: several\ntask:\n  - inner\n")
    (tmp_path / "plain.yaml").write_text(PLAIN.format(name="plain"))
    refuse_code([str(tmp_path / "plain.yaml")])
    for tasks in (["included.yaml"], ["group.yaml"], ["plain.yaml", "inner"]):
        with pytest.raises(lc.SchemeError, match=r"inner\.yaml: doc_to_text would run code"):
            refuse_code([str(tmp_path / task) if task.endswith(".yaml") else task for task in tasks])
    (tmp_path / "included.yaml").write_text("include: nowhere.yaml\ntask: outer\n")
    with pytest.raises(lc.SchemeError, match=r"nowhere\.yaml: expected the YAML file"):
        refuse_code([str(tmp_path / "included.yaml")])


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    for name, content, words in (
        ("broken.yaml", b"task: [", "expected the YAML file"),
        ("list.yaml", b"- a\n", "task: name"),
        ("nameless.yml", b"dataset_path: json\n", "task: name"),
        ("binary.yaml", b"\xff\xfe\x00\x81", "expected the YAML file"),
        ("deep.yaml", b"task: " + b"[" * 20_000, "expected the YAML file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(lc.SchemeError, match=words):
            refuse_code([str(tmp_path / name)])
    (tmp_path / "folder.yaml").mkdir()
    for name in ("folder.yaml", "missing.yaml"):
        with pytest.raises(lc.SchemeError, match="no such file"):
            refuse_code([str(tmp_path / name)])
