"""What `pyppo envs` says of EnvPool's environments."""

import importlib.util

import pytest

from pyppo import cli
from pyppo.catalog import describe, find
from pyppo.envpool_envs import env_spaces, list_envs, make_envs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed")


def test_find_by_part_pattern_and_family():
    assert "CartPole-v1" in find("cartpole")
    assert find("CartPole-v?") == ["CartPole-v0", "CartPole-v1"]
    assert find("MiniGrid-DoorKey-*") == [name for name in list_envs() if name.startswith("MiniGrid-DoorKey-")]
    assert {"CheetahRun-v1", "WalkerWalk-v1"} <= set(find("mujoco.dmc"))
    assert find() == list_envs()
    assert find("no such thing") == []


def test_descriptions():
    known = {env.name: env for env in describe(["CartPole-v1", "Maze-v0", "Pong-v5", "BinPack-v2", "RubiksCube-v0"])}
    cartpole, maze = known["CartPole-v1"], known["Maze-v0"]
    assert (cartpole.family, cartpole.observations, cartpole.actions) == (
        "classic_control",
        "float32[4]",
        "Discrete(2)",
    )
    assert "agent_position/col Discrete(10)" in maze.observations
    assert maze.actions == "Discrete(4), masked"
    assert known["Pong-v5"].observations == "uint8[4, 84, 84]"
    assert known["BinPack-v2"].actions == "Discrete(800), masked"  # combinations
    assert known["RubiksCube-v0"].actions == "int32[3]"
    assert not any(env.why_not for env in known.values())


def test_what_cannot_be_trained_says_why():
    for env in describe(["TicTacToe-v1", "IntersectionMultiAgent-v0"]):
        assert "has up to 2 players an environment; pyppo trains environments of one player" in env.why_not
        for use in (env_spaces, lambda name: make_envs(name, 2, seed=1)):
            with pytest.raises(
                ValueError, match="has up to 2 players an environment; pyppo trains environments of one"
            ):
                use(env.name)


@pytest.mark.parametrize("name", ["Cig-v1", "MultiDuel-v1"])
def test_what_ends_the_process_is_refused(name):
    assert describe([name])[0].why_not.startswith("it is a game of several players")
    with pytest.raises(ValueError, match=f"{name} cannot be trained: it is a game of several players, and EnvPool"):
        make_envs(name, 1, seed=1)


def test_a_file_that_the_installation_lacks_is_why_not(tmp_path):
    """Whatever this installation has, what is listed and what can be made agree."""
    for name in ("Sudoku-v0", "Sudoku-very-easy-v0", "Maze-v0"):
        (env,) = describe([name])
        if env.why_not:
            assert env.why_not.startswith("its installation lacks")
            with pytest.raises(OSError, match=f"EnvPool cannot make {name} here"):
                make_envs(name, 1, seed=1)
        else:
            make_envs(name, 1, seed=1).close()
    with pytest.raises(OSError, match=rf"installation lacks {tmp_path}/jumanji/assets/sudoku/10000_mixed_puzzles.npy"):
        env_spaces("Sudoku-v0", {"base_path": str(tmp_path)})


def test_the_command(capsys):
    assert cli.main(["envs", "pgx"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in lines}
    assert "-> Discrete(4), masked" in said["Play2048-v1"]
    assert "not here: it has up to 2 players" in said["Chess-v1"]
    assert cli.main(["envs", "pgx", "--families"]) == 0
    assert capsys.readouterr().out.split() == f"pgx 1 of {len(lines)} can be trained".split()
    assert cli.main(["envs", "no such thing"]) == 2
    assert "no environment fits 'no such thing'" in capsys.readouterr().err
