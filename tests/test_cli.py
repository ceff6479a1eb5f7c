"""The command line, run in this process; each command for real."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from pyppo import cli
from pyppo.config import Config

envpool = pytest.importorskip("envpool")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run that the command line made."""
    root = tmp_path_factory.mktemp("runs")
    flags = [
        "--total-timesteps",
        "1_500",
        "--seed",
        "3",
        "--run-dir",
        str(root),
        "--env-option",
        "max_episode_steps=100",
    ]
    assert cli.main(["train", "CartPole-v1", *flags, "--quiet"]) == 0
    (path,) = root.iterdir()
    return path


def test_train_writes_what_was_asked(run):
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    assert (config.total_timesteps, config.seed, config.env_options) == (1500, 3, {"max_episode_steps": 100})
    assert config.num_envs == Config.for_env("CartPole-v1").num_envs
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] >= 1500


def test_eval(run, capsys):
    assert cli.main(["eval", str(run), "--episodes", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert len(figures["returns"]) == 3
    assert max(figures["lengths"]) <= 100  # the saved option
    assert cli.main(["eval", str(run), "--episodes", "2", "--stochastic"]) == 0
    assert "over 2 episodes" in capsys.readouterr().out


def test_resume(run, capsys):
    assert cli.main(["resume", str(run), "--quiet"]) == 2
    assert "is complete" in capsys.readouterr().err
    assert cli.main(["resume", str(run), "--total-timesteps", "2.5e3", "--tensorboard"]) == 0
    said = capsys.readouterr()
    assert "mean of the last 100 training episodes" in said.out
    assert "done 100%" in said.err
    assert list((run / "tensorboard").iterdir())


def test_plot(run, tmp_path, capsys):
    assert cli.main(["plot", str(run), str(run), "--out", str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "curve.png" in capsys.readouterr().out


def test_envs(capsys):
    assert cli.main(["envs", "cartpole-v"]) == 0
    assert "CartPole-v1" in capsys.readouterr().out.split()
    assert cli.main(["envs", "no such thing"]) == 2


def test_info(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    for what in ("pyppo", "torch", "envpool", "CPU path", "build: ", "GPUs", "tensorboard"):
        assert what in said
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["python"].startswith("3.")


def test_bench(capsys):
    assert cli.main(["bench", "CartPole-v1", "--seconds", "0.2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["sps"] > 0
    assert sum(figures["shares"].values()) == pytest.approx(1.0)
    assert cli.main(["bench", "--seconds", "0"]) == 2


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--help"])
    assert exit_info.value.code == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        if field.name != "env_options":
            assert f"--{field.name.replace('_', '-')}" in said
    assert "Adam's step size" in said
    assert "NAME=VALUE" in said


REFUSED = {
    "no command": ([], "usage"),
    "unknown command": (["trian"], "no command 'trian'"),
    "no environment": (["train", "--seed", "1"], "ENV is missing"),
    "unknown environment": (["train", "CartPol-v1"], "CartPole-v1"),
    "environment twice": (["train", "CartPole-v1", "--env-id", "Acrobot-v1"], "--env-id is 'Acrobot-v1'"),
    "unknown option": (["train", "CartPole-v1", "--env-option", "foo=2"], "CartPole-v1 does not take"),
    "no such GPU": (["train", "CartPole-v1", "--device", "cuda:99"], "device is 'cuda:99'"),
    "no episodes": (["eval", "nowhere", "--episodes", "0"], "--episodes is 0"),
    "bad option": (["train", "CartPole-v1", "--env-option", "max_episode_steps"], "NAME=VALUE"),
    "no run": (["eval", "nowhere"], "nowhere is not a folder"),
    "no run to resume": (["resume", "nowhere"], "nowhere is not a folder"),
    "no run to plot": (["plot", "nowhere"], "nowhere is not a usable run folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_user_must_put_right_is_one_line_and_status_2(name, capsys):
    arguments, message = REFUSED[name]
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err + said.out
    assert "Traceback" not in said.err


@pytest.mark.parametrize("flags", [["--learning-rate", "-1"], ["--learning-rte", "1"], ["--num-envs", "many"]])
def test_flags_that_break_a_rule_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "CartPole-v1", *flags])
    assert exit_info.value.code == 2
    assert flags[0].removeprefix("--").split("-")[0] in capsys.readouterr().err


SHORT = ["--num-envs", "2", "--num-steps", "2", "--num-minibatches", "1", "--run-dir", "None"]


def test_steps_may_be_written_1e6_and_no_episode_is_said(capsys):
    assert cli.main(["train", "CartPole-v1", "--total-timesteps", "0.4e1", *SHORT]) == 0
    said = capsys.readouterr()
    assert "no episode finished yet after" in said.out
    assert "steps 4 " in said.err
    assert (cli.integer("1_000"), cli.integer("1e6")) == (1000, 1_000_000)
    with pytest.raises(SystemExit):
        cli.main(["train", "CartPole-v1", "--total-timesteps", "1.5"])


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_bug_keeps_its_traceback(command, run, monkeypatch):
    def broken(*arguments, **settings):
        raise ValueError("a bug")

    target = "pyppo.trainer.settle_policy" if command == "train" else "pyppo.evaluation._run"
    monkeypatch.setattr(target, broken)
    arguments = ["train", "CartPole-v1", *SHORT] if command == "train" else ["eval", str(run)]
    with pytest.raises(ValueError, match="a bug"):
        cli.main(arguments)


@pytest.mark.parametrize("command", ["eval", "resume"])
def test_a_module_of_ones_own_is_for_python(command, run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    for path in copy.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        state["policy"] = {"class": "mine.Policy"}
        path.write_text(json.dumps(state))
    assert cli.main([command, str(copy)]) == 2
    assert "mine.Policy, a module of your own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-symbols", "5"], "image_symbols is 5; it must be None"),
        (["--network", "combined"], "network is 'combined'; it must be 'mlp' or 'auto'"),
        (["--recurrent", "gru", "--num-minibatches", "8"], "num_minibatches is 8; it must be at most num_envs = 4"),
        (["--recurrent", "gru", "--engine", "native"], "native"),
    ],
)
def test_settings_that_do_not_fit_the_environment_are_one_line(flags, message, capsys):
    assert cli.main(["train", "CartPole-v1", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pyppo: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "minibatches"),
    [(["--recurrent", "gru"], 2), (["--recurrent", "gru", "--num-minibatches", "4"], 4), ([], 4)],
)
def test_minibatches_fit_a_memory_unless_they_are_given(flags, minibatches, monkeypatch):
    made = []
    monkeypatch.setattr(cli, "_make_trainer", lambda config, quiet: made.append(config))
    monkeypatch.setattr(cli, "_run", lambda trainer, options: 0)
    assert cli.main(["train", "CartPole-v1", *flags]) == 0
    assert made[0].num_minibatches == minibatches


def test_values_of_environment_options():
    pairs = [cli._name_and_value(text) for text in ("a=1", "b=true", "c=word", "d=x=y", 'e="3"')]
    assert dict(pairs) == {"a": 1, "b": True, "c": "word", "d": "x=y", "e": "3"}


def test_the_module_runs():
    for module in ("pyppo", "pyppo.cli"):
        out = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
        assert "pyppo train ENV" in out.stdout


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+.*|not installed", capsys.readouterr().out.strip())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_told_to_end_saves_first(tmp_path, number):
    """As a scheduler does when a job's time is over."""
    flags = ["--total-timesteps", "1e9", "--save-interval", "0", "--run-dir", str(tmp_path), "--quiet"]
    command = [sys.executable, "-m", "pyppo", "train", "CartPole-v1", *flags]
    default = partial(signal.signal, number, signal.SIG_DFL)  # nohup's children ignore SIGHUP
    training = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    end = time.monotonic() + 120
    while not (lines := list(tmp_path.glob("*/metrics.jsonl"))) and time.monotonic() < end:
        time.sleep(0.05)
    assert lines
    training.send_signal(number)
    try:
        _, said = training.communicate(timeout=120)
    finally:
        training.kill()
    assert training.returncode == 128 + number, said
    (saved,) = tmp_path.glob("*/checkpoints/step-*/state.json")
    assert f"saved {saved.parent}; go on with `pyppo resume " in said
    assert "Traceback" not in said
    steps = [json.loads(line)["step"] for line in lines[0].read_text().splitlines()]
    assert json.loads(saved.read_text())["step"] in steps[-2:]


def test_signals_that_are_ignored_stay_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli._told_to_end():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
