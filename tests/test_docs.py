"""What README.md and docs/ say is true: their examples run, their commands parse, their links lead somewhere."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyppo import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A source distribution carries the tests and not what they look at here.
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the repository")

SHORTER = {  # what to do less of, and how much instead: the first time, then the second
    r"total_timesteps=[\d_]+": ("total_timesteps=1_500", "total_timesteps=3_000"),
    r"ITERATIONS, T, N = \d+, \d+": ("ITERATIONS, T, N = 10, 32",),
    r"episodes=\d+": ("episodes=2",),
}


def blocks(page: Path) -> list[str]:
    """The page's Python examples."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The page's indented command lines, and those in backticks, one for each part of `a && b`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith(("pyppo ", "python ", "pip ", "pytest"))]


def shortened(code: str) -> str:
    """The example with less to do; where it resumes a run, that asks for more steps than the run had."""
    for pattern, shorter in SHORTER.items():
        texts = itertools.chain(shorter, itertools.repeat(shorter[-1]))
        code = re.sub(pattern, lambda _, texts=texts: next(texts), code)
    return code


def examples() -> list[object]:
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, code in enumerate(blocks(page), start=1)
    ]


@pytest.mark.parametrize("code", examples())
def test_example_runs(code, tmp_path, monkeypatch, capsys):
    if "pyppo.train" in code or "CartPole" in code:
        pytest.importorskip("envpool")
    monkeypatch.chdir(tmp_path)
    exec(compile(shortened(code), "example", "exec"), {"__name__": "__main__"})
    if "curve.png" in code:
        assert (tmp_path / "curve.png").stat().st_size > 1000


def test_worked_example_prints_its_progress(tmp_path, monkeypatch, capsys):
    exec(compile(shortened(blocks(ROOT / "docs/kernels.md")[0]), "example", "exec"), {"__name__": "__main__"})
    assert re.search(r"step 2560: return \d+\.\d, approximate KL -?0\.\d+", capsys.readouterr().out)


@pytest.fixture
def nothing_runs(monkeypatch):
    """What commands would start raises instead, with a message that shows how far they came."""

    def reached(*arguments, **keywords):
        raise ValueError("it would start now")

    monkeypatch.setattr("pyppo.envpool_envs.make_envs", reached)
    monkeypatch.setattr("pyppo.checkpoint.load_checkpoint", reached)
    monkeypatch.setattr("pyppo.evaluation.load_policy", reached)
    monkeypatch.setattr("pyppo.plot.plot_runs", reached)


def documented(start: str) -> list[object]:
    return [
        pytest.param(command, id=f"{page.name}: {command}")
        for page in PAGES
        for command in commands(page)
        if command.startswith(start)
    ]


@pytest.mark.parametrize("command", documented("pyppo "))
def test_pyppo_command_parses(command, nothing_runs, capsys):
    pytest.importorskip("envpool")
    arguments = shlex.split(command)[1:]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
        return
    status = cli.main(arguments)
    said = capsys.readouterr()
    assert status == 0 or (status == 2 and "it would start now" in said.err), said.err


def _is_of_bench(module) -> bool:
    return (getattr(module, "__file__", None) or "").startswith(str(ROOT / "bench"))


@pytest.mark.parametrize("command", documented("python bench/"))
def test_bench_command_parses(command, monkeypatch):
    pytest.importorskip("envpool")
    script, *arguments = shlex.split(command)[1:]
    assert (ROOT / script).is_file()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    module = importlib.import_module(Path(script).stem)
    try:
        module.parse(arguments)
        if "--set" in arguments:
            fields = importlib.import_module("_common").parse_fields(module.parse(arguments).set)
            importlib.import_module("pyppo").Config.for_env("CartPole-v1", **fields)
    finally:
        ours = [name for name in set(sys.modules) - before if _is_of_bench(sys.modules[name])]
        for name in ours:
            del sys.modules[name]


def test_the_two_commands_of_the_readme():
    text = (ROOT / "README.md").read_text()
    assert "    pip install -c constraints.txt . && pyppo train CartPole-v1\n" in text
    assert "    pip install -c constraints.txt '.[test]' && pytest\n" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "test" in project["optional-dependencies"]
    assert project["scripts"]["pyppo"] == "pyppo.cli:main"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert all(link.startswith("http") or (page.parent / link).is_file() for link in links), links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_docs_mention_exist(page):
    import pyppo
    from pyppo import ops

    for name in re.findall(r"`(?:pyppo\.)?ops\.(\w+)", page.read_text()):
        assert hasattr(ops, name), name
    for name in re.findall(r"`pyppo\.(\w+)", page.read_text()):
        assert hasattr(pyppo, name) or name == "ops", name


def test_tables_are_written_between_their_marks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    tables = importlib.import_module("tables")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    tables.fill(page, "x", tables.table(["a", "b"], [["1", "2"]]))
    assert page.read_text() == "before\n<!-- x -->\n| a | b |\n| -- | -- |\n| 1 | 2 |\n<!-- /x -->\nafter\n"
    with pytest.raises(ValueError, match="have them once"):
        tables.fill(page, "y", "")


def test_programs_that_end_together_lose_no_section(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    tables = importlib.import_module("tables")
    page, names = tmp_path / "page.md", [f"section-{i}" for i in range(8)]
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))

    def fill_often(name):
        for i in range(40):
            tables.fill(page, name, f"{name}: {i}")

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(fill_often, names))
    assert page.read_text() == "".join(f"<!-- {n} -->\n{n}: 39\n<!-- /{n} -->\n" for n in names)
    assert list(tmp_path.iterdir()) == [page]
