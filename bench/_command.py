"""The command line of the programs that train for docs/results.md. What is wrong with it is said before a run."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _page import Page
from _runs import Failure
from tables import ROOT, has_marks

STEPS = 1_000_000
"""Of a run in the paper's figures, and of what docs/results.md shows."""


# --- argparse's types -----------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """An integer of at least 0, also written 1_000_000 or 1e6."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number.is_integer() or number < 0:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be an integer of at least 0")
    return int(number)


def positive(text: str) -> int:
    """An integer of at least 1, likewise."""
    try:
        number = count(text)
    except argparse.ArgumentTypeError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be an integer of at least 1")
    return number


def seeds(text: str) -> range:
    """A seed, or the first and the last of several, "1-10"."""
    first, dash, last = text.partition("-")
    try:
        found = range(positive(first), positive(last if dash else first) + 1)
    except argparse.ArgumentTypeError:
        found = range(0)
    if not found:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a seed of at least 1, or some as in 1-10")
    return found


# --- options --------------------------------------------------------------------------------------------------------


class _Once(argparse.Action):
    """Several values as a list, each once, in their order; of ranges, their numbers."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        parts = [value if isinstance(value, range) else [value] for value in values]
        setattr(namespace, self.dest, list(dict.fromkeys(one for part in parts for one in part)))


def add_seeds(parser: argparse.ArgumentParser, default: Sequence[int] | None, said: str, name: str = "--seeds") -> None:
    """An option that takes seeds, "1 2 3" or "1-10"; a list, or `default` as it is.

    Args:
        said: what the default is, in words.
    """
    text = f"as in 1 2 3, or 1-10 (default: {said})"
    parser.add_argument(name, type=seeds, nargs="+", action=_Once, default=default, metavar="SEED", help=text)


def add_choice(parser: argparse.ArgumentParser, name: str, choices: Iterable[str], metavar: str) -> None:
    """An option that takes some of `choices`; a list, by default of all of them."""
    names = list(choices)
    text = f"only these of {', '.join(names)}"
    parser.add_argument(name, nargs="+", action=_Once, choices=names, default=names, metavar=metavar, help=text)


def add_file(parser: argparse.ArgumentParser, name: str, file: str, said: str) -> None:
    """An option that names a file of bench/results, by default the one that docs/results.md is made from."""
    path = ROOT / "bench/results" / file
    standard = {**(parser.get_default("standard") or {}), name.removeprefix("--"): path}
    parser.set_defaults(standard=standard)
    parser.add_argument(name, type=Path, default=path, metavar="FILE", help=f"{said} (default: bench/results/{file})")


def add_arguments(parser: argparse.ArgumentParser, results: str) -> None:
    """What all of them have.

    Args:
        results: the results file's name in bench/results.
    """
    parser.add_argument("--parallel", type=positive, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="run nothing: write the report of what there is")
    add_file(parser, "--results", results, "where runs are kept, and looked for")
    docs = "where results.md and images/ are (default: docs; other steps or files are reported to the screen)"
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help=docs)


def add_length(parser: argparse.ArgumentParser) -> None:
    """`--steps`, of the programs that make the paper's figures."""
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"of each run (default: {STEPS})")


# --- before a run, and after it -------------------------------------------------------------------------------------


def page_of(given: argparse.Namespace, marks: Iterable[str], *, full: bool) -> Page:
    """Where the report goes: to the screen if `--docs` is not given and the page is not of these runs.

    Args:
        marks: the sections that will be filled. full: whether the runs are of the page's length.

    Raises:
        SystemExit: the page is not there or lacks a section; results cannot be written, or are asked for and not there.
    """
    if given.report and not given.results.is_file():
        raise SystemExit(f"--results is {given.results}; it must be a file of runs, or --report has nothing to tell")
    check_writable("--results", given.results)
    standard = all(getattr(given, name) == path for name, path in given.standard.items())
    docs: Path | None = given.docs or (ROOT / "docs" if full and standard else None)
    if docs is None:
        return Page(None)
    page = docs / "results.md"
    if not page.is_file():
        raise SystemExit(f"--docs is {docs}; it must be a folder with results.md")
    if missing := [name for name in marks if not has_marks(page, name)]:
        raise SystemExit(f"{page} has no section {missing[0]!r}; it must have <!-- {missing[0]} --> and its end, once")
    return Page(docs)


def check_writable(option: str, path: Path | None) -> None:
    """End with an error, naming the option, if a file cannot be written, before hours of runs go into it."""
    if path is None:
        return
    if path.is_dir():
        raise SystemExit(f"{option} is {path}, a folder; it must be a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("a").close()
        else:  # the file itself is left to the runs: another call may be about to make it
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SystemExit(f"{option} is {path}; it must be a file that can be written: {error}") from error


def finish(failures: Sequence[Failure]) -> None:
    """End with an error if runs failed."""
    if failures:
        raise SystemExit(f"{len(failures)} of the runs failed; the same command tries them again")
