"""The command line of the programs that train for docs/results.md. What is wrong with it is said before a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _page import Page
from _runs import Failure
from tables import ROOT, has_marks

STEPS = 1_000_000
"""Of a run in the paper's figures, and of what docs/results.md shows."""


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1, also written 1_000_000 or 1e6."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number.is_integer() or number < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be an integer of at least 1")
    return int(number)


def seeds(text: str) -> range:
    """An argparse type: a seed, or the first and the last of several, "1-10"."""
    first, dash, last = text.partition("-")
    try:
        found = range(positive(first), positive(last if dash else first) + 1)
    except argparse.ArgumentTypeError:
        found = range(0)
    if not found:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a seed of at least 1, or some as in 1-10")
    return found


class _Join(argparse.Action):
    """Several ranges as one list, each number once, in their order."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(number for numbers in values for number in numbers)))


def add_seeds(parser: argparse.ArgumentParser, default: Sequence[int] | None, said: str, name: str = "--seeds") -> None:
    """An option that takes seeds, "1 2 3" or "1-10"; a list, or `default` as it is.

    Args:
        said: what the default is, in words.
    """
    parser.add_argument(
        name, type=seeds, nargs="+", action=_Join, default=default, metavar="SEED", help=f"as in 1-10 (default: {said})"
    )


def add_arguments(parser: argparse.ArgumentParser, results: str) -> None:
    """What all of them have.

    Args:
        results: the results file's name in bench/results.
    """
    parser.add_argument("--parallel", type=positive, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results" / results, metavar="FILE")
    docs = "of results.md and images/ (default: docs, or the screen for runs of another length)"
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help=docs)


def add_length(parser: argparse.ArgumentParser) -> None:
    """`--steps`, of the programs that make the paper's figures."""
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"of each run (default: {STEPS})")


def page_of(given: argparse.Namespace, marks: Iterable[str], *, full: bool) -> Page:
    """Where the report goes; to the screen if `--docs` is not given and the runs are of another length than the page's.

    Args:
        marks: the sections that will be filled. full: whether the runs are of full length.

    Raises:
        SystemExit: the page is not there or lacks a section, or `--results` is a folder.
    """
    if given.results.is_dir():
        raise SystemExit(f"--results is {given.results}, a folder; it must be a file")
    docs: Path | None = given.docs or (ROOT / "docs" if full else None)
    if docs is None:
        return Page(None)
    page = docs / "results.md"
    if not page.is_file():
        raise SystemExit(f"--docs is {docs}; it must be a folder with results.md")
    if missing := [name for name in marks if not has_marks(page, name)]:
        raise SystemExit(f"{page} has no section {missing[0]!r}; it must have <!-- {missing[0]} --> and its end, once")
    return Page(docs)


def finish(failures: Sequence[Failure]) -> None:
    """End with an error if runs failed."""
    if failures:
        raise SystemExit(f"{len(failures)} of the runs failed; the same command tries them again")
