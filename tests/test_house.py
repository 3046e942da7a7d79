"""Imports run one way: commands -> ladder, transfer -> engine -> data, tasks, models -> augment -> harness. What the
pages name is there."""

import ast
import re
import subprocess
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


PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_in_the_repository(page):
    """A picture was there, and git ignored it."""
    words = ["git", "-C", ROOT, "check-ignore", "-q"]
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link
        assert subprocess.run([*words, page.parent / link]).returncode != 0, f"git ignores {link}"


def test_the_tests_and_options_that_pages_name_are_there():
    tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests").glob("*.py"))
    code = "".join(file.read_text("utf-8") for file in (*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")))
    foreign = ("help", "check", "logdir", "nproc", "nnodes", "rdzv")  # of other programs
    for page in PAGES:
        text = page.read_text("utf-8")
        for name in re.findall(r"\btest_\w+(?![\w.])", text):
            assert f"def {name}" in tests or (ROOT / "tests" / f"{name}.py").exists(), f"{page.name}: {name}"
        for option in set(re.findall(r"--([a-z][a-z-]+)", text)):
            known = f'"--{option}"' in code or f'"--{option.removeprefix("no-")}"' in code
            assert known or option.startswith(foreign), f"{page.name}: --{option}"
