"""Imports run one way: commands -> ladder, transfer -> engine -> data, tasks, models -> augment -> harness."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

ORDER = [  # a module may import those of the groups below its own
    {"train_pretext", "train_transfer", "debug_overfit", "inspect_data", "unmix"},
    {"ladder", "transfer"},
    {"engine"},
    {"data", "tasks", "models"},
    {"augment", "checks"},  # checks know nothing of what is below the ladder, either
    {"own"},
    {"harness"},
]
MODULES = sorted(path for place in (ROOT, ROOT / "harness") for path in place.glob("*.py"))


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports; those of harness/ count as one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & set.union(*ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    name = "harness" if path.parent.name == "harness" else path.stem
    group = next(number for number, names in enumerate(ORDER) if name in names)
    allowed = {"harness"} if name == "harness" else set.union(*ORDER[group + 1 :])
    assert imported(path) <= allowed
