"""How good is the ladder for people's own networks? Real bugs, each broken and mended, through its checks.

    pip install -r benchmarks/requirements.txt
    python benchmarks/diagnose.py                   all of benchmarks/bugs/, and the table of docs/debugging.md
    python benchmarks/diagnose.py o16 o20           some of them, in full; nothing is written

benchmarks/results/diagnose.json keeps what was found first, before the checks had ever seen these programs, and last.
There, `named` says whether the cause is the real one. A person judged it, so it holds only for the same words.
"""

import contextlib
import functools
import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checks import FAILED, diagnose
from harness import command
from harness.errors import UsageError
from harness.files import write_json

ROOT = Path(__file__).resolve().parent.parent
FOUND = ROOT / "benchmarks" / "results" / "diagnose.json"


def main() -> None:
    """Run the programs, and write the table."""
    parser = command.Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of the programs' names (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(ROOT.glob("benchmarks/bugs/o*.py"))
    chosen = [file for file in files if not args.names or file.name.startswith(tuple(args.names))]
    if not chosen:
        raise UsageError(f"{' '.join(args.names)}: no program in benchmarks/bugs/ begins so")
    judged = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    last = {}
    for file in chosen:
        last[file.stem] = run(file, bool(args.names))
        print(
            file.stem,
            *(f"{state}: {last[file.stem][state]['check'] or 'no check fails'}" for state in ("broken", "mended")),
        )
    if args.names:
        return
    for name, found in last.items():
        for before in (judged.get("last", {}).get(name), judged.get("first", {}).get(name)):
            if before and before["broken"]["why"] == found["broken"]["why"]:
                found["named"] = before["named"]
                break
    judged = {"first": judged.get("first", last), "last": last}
    write_json(judged, FOUND)
    file = ROOT / "docs" / "debugging.md"
    text = file.read_text("utf-8")
    start, end = "<!-- bugs -->\n", "<!-- /bugs -->"
    text = text[: text.index(start) + len(start)] + table(judged) + "\n" + text[text.index(end) :]
    file.write_text(text, "utf-8")
    print(summary(judged["last"]))


def run(file: Path, loud: bool) -> dict:
    """A program, broken and mended: the first check that fails, what it says, and the seconds."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    found = {"cause": program.CAUSE, "named": None}
    for state in ("broken", "mended"):
        clock, said = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(sys.stdout if loud else said):
            results = diagnose(functools.partial(program.setup, state == "broken"))
        failed = {name: result for name, result in results.items() if result.status == FAILED}
        check, result = next(iter(failed.items()), ("", None))
        why = f"{result.figure}. {result.why}" if result else ""
        found[state] = {"check": check, "why": why, "seconds": round(time.perf_counter() - clock, 1)}
    return found


def summary(found: dict) -> str:
    """How many of the broken programs have a failing check, how many have their cause named, and false alarms."""
    rows = [(one["broken"]["check"], one["named"], one["mended"]["check"]) for one in found.values()]
    caught, named, alarms = (sum(map(bool, column)) for column in zip(*rows, strict=True))
    return f"a check fails {caught} of {len(found)}, the cause is named {named}, false alarms on mended ones {alarms}"


def table(judged: dict) -> str:
    """Markdown: a row for each program."""
    lines = [
        "| bug | check that fails | it says | cause named? first, last | seconds | mended: first, last |",
        "|---" * 6 + "|",
    ]
    words = {True: "yes", False: "no", None: "not judged"}
    for name, last in judged["last"].items():
        first = judged["first"].get(name, last)
        mended = ", ".join(one["mended"]["check"] or "–" for one in (first, last))
        named = ", ".join(words[one["named"]] for one in (first, last))
        why = last["broken"]["why"].replace("|", "\\|").replace("\n", " ")
        cells = [
            f"{name}: {last['cause']}",
            last["broken"]["check"] or "none",
            why,
            named,
            last["broken"]["seconds"],
            mended,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"First: {summary(judged['first'])}. Last: {summary(judged['last'])}."])


if __name__ == "__main__":
    command.run(main)
