"""lm-eval's tasks scored on a model; a task's file that brings code is refused unless its code is trusted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from laconic.errors import SchemeError

_SUFFIXES = (".yaml", ".yml")


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: list[str], limit: int | None = None, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Scores of lm-eval tasks (names of its registry, or YAML files) by task and metric. Needs the 'eval' extra.

    Raises: SchemeError for a task that lm-eval does not know, a file that is none or runs code that is not trusted, or
    when lm-eval is not installed.
    """
    files, names = _files_and_names(tasks)
    folders = sorted({str(file.parent) for file in files})
    if not trust_remote_code:
        refuse_code(tasks)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SchemeError("lm-eval tasks need the 'eval' extra: pip install 'laconic[eval]'") from error
    # its own are thousands of files to read
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))
    for name in names:
        if name not in manager.all_tasks:
            raise SchemeError(
                f"{name}: lm-eval has no task of that name; a task of your own is given as a file that ends in .yaml"
            )
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=names, limit=limit, task_manager=manager
    )
    return {
        name: {k: v for k, v in scores.items() if isinstance(v, int | float)}
        for name, scores in results["results"].items()
    }


def _files_and_names(tasks: list[str]) -> tuple[list[Path], list[str]]:
    """The YAML files among some tasks, and what each task is called."""
    files = {task: Path(task) for task in tasks if task.endswith(_SUFFIXES)}
    return list(files.values()), [_task_name(files[task]) if task in files else task for task in tasks]


class _Code:
    """Stands for a tagged value of a YAML file, which lm-eval would make a Python function of."""


def _read(file: Path) -> dict[Any, Any]:
    """A task's YAML file as plain values, tagged ones as `_Code`. Raises: SchemeError when it is none."""
    import yaml

    Reader: Any = type("Reader", (yaml.SafeLoader,), {})  # a loader of its own: constructors belong to a class
    Reader.add_multi_constructor("!", lambda loader, suffix, node: _Code())
    Reader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: _Code())
    try:
        found = yaml.load(file.read_bytes(), Reader)
    except (OSError, yaml.YAMLError, UnicodeError, ValueError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SchemeError(f"{file}: expected the YAML file of an lm-eval task: {reason}") from error
    if not isinstance(found, dict):
        raise SchemeError(f"{file}: expected the YAML file of an lm-eval task, with a line 'task: name'")
    return found


def _task_name(file: Path) -> str:
    """What a task's YAML file calls the task."""
    if not file.is_file():
        raise SchemeError(f"{file}: no such file; expected the YAML file of an lm-eval task, with a line 'task: name'")
    found = _read(file)
    name = found.get("task") if isinstance(found.get("task"), str) else found.get("group")
    if not isinstance(name, str):
        raise SchemeError(f"{file}: expected the YAML file of an lm-eval task, with a line 'task: name'")
    return name


def refuse_code(tasks: list[str]) -> None:
    """Raises SchemeError if a task's file, one it includes, or one beside it that holds a task it names, would run
    code.

    Code is a tagged value (`!function`), a data set that runs its own (`trust_remote_code`), and a template that
    reaches for a Python attribute with two underscores, since lm-eval's templates are not confined.
    """
    files, names = _files_and_names(tasks)
    beside = {
        name: file
        for folder in {file.parent for file in files}
        for file in _yaml_files(folder)
        for name in _names(file)
    }
    todo = [*files, *(beside[name] for name in names if name in beside)]
    seen: set[Path] = set()
    while todo:
        file = todo.pop()
        if file.resolve() in seen:
            continue
        seen.add(file.resolve())
        values = _read(file)
        where = next((path for path, value in _leaves(values) if _is_code(path, value)), None)
        if where is not None:
            raise SchemeError(
                f"{file}: {where} would run code that came with the file; pass --trust-remote-code to allow that"
            )
        included = values.get("include")
        for name in included if isinstance(included, list) else [included]:
            if isinstance(name, str):
                todo.append(file.parent / name)
        todo += [beside[name] for _, name in _leaves(values) if isinstance(name, str) and name in beside]


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES and file.is_file())


def _names(file: Path) -> list[str]:
    """What a file beside a task's is known by; one that cannot be read is known by nothing, and lm-eval does not load
    it.
    """
    try:
        found = _read(file)
    except SchemeError:
        return []
    names = [
        found.get("task"),
        found.get("group"),
        *(found["tag"] if isinstance(found.get("tag"), list) else [found.get("tag")]),
    ]
    return [name for name in names if isinstance(name, str)]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value inside dicts and lists, with where it is."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, value


def _is_code(path: str, value: Any) -> bool:
    if isinstance(value, _Code):
        return True
    if path.endswith("trust_remote_code"):
        return bool(value)
    templated = isinstance(value, str) and ("{{" in value or "{%" in value)
    return templated and ("__" in value or "attr(" in value or "|attr" in value.replace(" ", ""))
