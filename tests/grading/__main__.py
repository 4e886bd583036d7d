"""Grade notebooks or scripts against the homework's specification, as they are.

Each runs on synthetic digits, in a kernel, a temporary folder and a process group of
its own, which is ended with it. This keeps nothing safe: strangers' code runs as you
do, unless a container holds it. What was trained is graded, not what is written.
"""

import argparse
import csv
import itertools
import sys
import time
from pathlib import Path

import nbformat
import torch

sys.path.append(str(Path(__file__).parent.parent))  # of the digits

import running
from verdicts import LINES, Judge, needs_real_sizes, outer, plainly

SKIPPED = {"venv", "env", "__MACOSX", "__pycache__", "node_modules", "site-packages"}
MARKS = {"met": "+", "NOT MET": "-", "cannot tell": "?"}


def verdict_of(sentence):
    return next(verdict for verdict in MARKS if sentence.startswith(verdict))


def merged(first, second):
    """The second run's sentences; where it cannot tell, what the first one found."""
    sized = "S1.2", "S2.2", "S5.3", "S6.1", "S6.2"
    found = dict(second)
    for line, said in first.items():
        decided = said == "met" or (said.startswith("NOT") and line not in sized)
        if decided and second[line].startswith("cannot"):
            found[line] = said
    return found


def grade(path, seconds=300, saved=None):
    """Grade a submission: what happened, and for each line a sentence.

    saved: where the executed notebook goes, with its pictures.
    """
    path = Path(path).resolve()
    try:
        notebook = running.read(path)
        run = running.run(path, notebook, "few", seconds, outer)
        judge = Judge(run, path)
        sheet, what = judge.sheet(), judge.happened()
        if needs_real_sizes(judge, sheet):
            again = running.read(path)
            run = running.run(path, again, "real", 3 * seconds, outer)
            judge = Judge(run, path)
            if judge.details or not sheet["S4.0"].startswith("met"):
                notebook, what = again, judge.happened()
            sheet = merged(sheet, judge.sheet())
        if saved:
            saved.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, saved)
            what += f" Executed: {saved}."
    except running.Unreadable as why:
        what, sheet = f"Not graded: {why}.", dict.fromkeys(LINES, f"cannot tell: {why}")
    except Exception as error:  # noqa: BLE001, it is told, and the next are graded
        why = f"the grader itself failed, {type(error).__name__}: {error}"
        what, sheet = f"Not graded: {why}.", dict.fromkeys(LINES, f"cannot tell: {why}")
    return plainly(what), {line: plainly(said) for line, said in sheet.items()}


def submissions(paths):
    """Files to grade: of a folder, those that no other file in it imports."""
    found = []
    for top in paths:
        if not top.is_dir():
            found.append(top)
            continue
        files = [
            p for p in sorted(top.rglob("*")) if p.suffix.lower() in (".ipynb", ".py")
        ]
        files = [p for p in files if p.is_file() and not skipped(p.relative_to(top))]
        helpers = {(p.parent, name) for p in files for name in running.imported_by(p)}
        notebooks = [p for p in files if p.suffix.lower() == ".ipynb"]
        scripts = [p for p in files if p not in notebooks]
        found += notebooks + [p for p in scripts if (p.parent, p.stem) not in helpers]
    return sorted(dict.fromkeys(found))


def skipped(path):
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or not SKIPPED.isdisjoint(path.parts)


def shown(sheet):
    """The sheet's lines; neighbours that say the same are one."""
    rows = []
    for said, lines in itertools.groupby(LINES, sheet.get):
        first, *others = lines
        if others and said != "met":
            rows.append(f"{first} to {others[-1]}  {said}")
        else:
            rows += [f"{line}  {said}" for line in (first, *others)]
    return rows


def positive(text):
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return number


def main(arguments=None):
    """Grade what the command line names; 2 if there is nothing to grade."""
    parser = argparse.ArgumentParser("grading", description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="path")
    parser.add_argument(
        "--timeout",
        type=positive,
        default=300,
        help="seconds a run (default: 300), thrice that on 60,000 images",
    )
    parser.add_argument("--csv", type=Path, help="a file for a table of all verdicts")
    parser.add_argument("--out", type=Path, default="graded", help="for sheets")
    options = parser.parse_args(arguments)
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")
    torch.set_num_threads(1)
    missing = [path for path in options.paths if not path.exists()]
    files = submissions([p for p in options.paths if p not in missing])
    for path in missing:
        print(f"{path}: there is no such file or folder", file=sys.stderr)
    if not files:
        print("There is no notebook or script to grade.", file=sys.stderr)
    if missing or not files:
        return 2
    sheets = {}
    try:
        for n, path in enumerate(files):
            print(f"{path} ({len(files) - n} left) ...", file=sys.stderr, flush=True)
            start, name = time.monotonic(), "-".join(path.with_suffix("").parts[-3:])
            saved = options.out / f"{name.strip('/.-')}.ipynb"
            what, sheet = grade(path, options.timeout, saved)
            text = "\n".join([str(path), what, *shown(sheet), ""])
            print(text, flush=True)
            print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            sheets[path] = sheet
    except KeyboardInterrupt:
        print(f"Stopped: {len(sheets)} of {len(files)} are graded.", file=sys.stderr)
    if len(files) > 1 and sheets:
        print(*LINES, "(+ met, - NOT MET, ? cannot tell)")
        for path, sheet in sheets.items():
            print(*(f"{MARKS[verdict_of(said)]:4}" for said in sheet.values()), path)
    if options.csv:
        with options.csv.open("w", newline="", errors="backslashreplace") as file:
            table = csv.writer(file)
            table.writerow(["file", "line", "verdict", "sentence"])
            for path, sheet in sheets.items():
                for line, said in sheet.items():
                    table.writerow([path, line, verdict_of(said), said])
    return 0 if len(sheets) == len(files) else 130


if __name__ == "__main__":
    sys.exit(main())
