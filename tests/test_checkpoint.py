"""Run folders and checkpoints: whole or not there, and nothing foreign taken for one's own."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from gymnasium import spaces
from torch import nn

from pyppo import checkpoint
from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.policy import MLPPolicy

CONFIG = Config("Toy-v0", run_dir=None)


@pytest.fixture
def policy():
    box = spaces.Box(-1.0, 1.0, (3,), float)
    return MLPPolicy(spaces.Dict({"obs": box}), Distribution.from_space(spaces.Discrete(2)), norm_obs=True)


@pytest.fixture
def run(tmp_path):
    return checkpoint.new_run_dir(tmp_path, CONFIG)


def save(run, policy, step):
    state = {"step": step, "policy": checkpoint.policy_recipe(policy)}
    return checkpoint.save_checkpoint(run, policy.state_dict(), {"rollout.steps": torch.tensor([step])}, state)


def test_run_folders_never_collide(tmp_path):
    config = Config("ALE/Pong v5", seed=7)
    paths = [checkpoint.new_run_dir(tmp_path / "deep" / "er", config) for _ in range(5)]
    assert len(set(paths)) == 5
    assert all(re.fullmatch(r"ALE_Pong_v5-\d{8}-\d{6}-s7(-\d+)?", path.name) for path in paths)
    assert checkpoint.read_config(paths[-1]) == config


def test_where_there_can_be_no_run_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run_dir is '.*file/runs'; it must be a folder that can be made"):
        checkpoint.new_run_dir(tmp_path / "file/runs", CONFIG)
    with pytest.raises(FileExistsError, match=r"run_dir is '.*file'; it must be a folder"):
        checkpoint.new_run_dir(tmp_path / "file", CONFIG)
    with pytest.raises(ValueError, match=r"run_dir is 'a\\x00b'; it must be a folder"):
        checkpoint.new_run_dir("a\0b", CONFIG)


def test_a_long_name_makes_a_folder_too(tmp_path):
    path = checkpoint.new_run_dir(tmp_path, CONFIG.replace(env_id="x" * 400))
    assert checkpoint.read_config(path).env_id == "x" * 400


def test_what_is_saved_is_loaded(run, policy):
    policy.normalizer.update({"obs": torch.randn(10, 3)})
    path = save(run, policy, 128)
    for where in (run, run / "checkpoints", path):
        loaded = checkpoint.load(where)
        assert checkpoint.parameter_sha256(loaded) == checkpoint.parameter_sha256(policy)
    found = checkpoint.load_checkpoint(run)
    assert found.run == run
    assert found.state["step"] == 128
    assert found.state["sha256"] == checkpoint.parameter_sha256(policy)
    assert found.optimizer["rollout.steps"].item() == 128


def test_the_newest_few_are_kept(run, policy):
    for step in range(1, 7):
        save(run, policy, step)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["latest", *(f"step-{step:012d}" for step in (4, 5, 6))]
    assert checkpoint.load_checkpoint(run).state["step"] == 6


def test_the_same_step_again_replaces(run, policy):
    save(run, policy, 5)
    with torch.no_grad():
        policy.critic[0].weight.zero_()
    save(run, policy, 5)
    assert (checkpoint.load_checkpoint(run).model["critic.0.weight"] == 0).all()
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000000000005"]


@pytest.mark.parametrize("moment", ["save_file", "_flush", "write_aside"])
def test_a_crash_while_saving_leaves_the_earlier_one(run, policy, monkeypatch, moment):
    save(run, policy, 1)

    def crash(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, moment, crash)
    with pytest.raises(OSError, match="disk full"):
        save(run, policy, 2)
    monkeypatch.undo()
    step = checkpoint.load_checkpoint(run).state["step"]
    assert step == 1
    save(run, policy, 3)
    assert checkpoint.load_checkpoint(run).state["step"] == 3


def test_leftovers_of_dead_processes_are_removed(run, policy):
    save(run, policy, 1)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    folder = run / "checkpoints"
    names = {f".writing-step-000000000002-{pid}": pid for pid in (process.pid, os.getpid(), os.getppid())}
    for name in names:
        (folder / name).mkdir()
    save(run, policy, 3)
    left = [path.name for path in folder.glob(".writing-*")]
    assert left == [name for name, pid in names.items() if pid == os.getppid()]  # which may be writing yet


def test_a_lost_pointer_is_no_loss(run, policy):
    save(run, policy, 1)
    save(run, policy, 2)
    for text in (None, b"step-000000000099\n", b"", b"\xff\x00"):
        (run / "checkpoints" / "latest").unlink(missing_ok=True)
        if text is not None:
            (run / "checkpoints" / "latest").write_bytes(text)
        assert checkpoint.load_checkpoint(run).state["step"] == 2


def damage_bytes(path, name="model"):
    file = path / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 0xFF
    file.write_bytes(data)


def edit_state(path, without):
    state = json.loads((path / "state.json").read_text())
    del state[without]
    (path / "state.json").write_text(json.dumps(state))


DAMAGE = {
    "a changed bit": (damage_bytes, r"model\.safetensors does not have the SHA-256"),
    "a changed moment": (lambda p: damage_bytes(p, "optimizer"), r"optimizer\.safetensors does not have the SHA-256"),
    "a lost key": (lambda p: edit_state(p, "policy"), "state.json lacks policy"),
    "a lost hash": (lambda p: edit_state(p, "optimizer_sha256"), "state.json lacks optimizer_sha256"),
    "a cut file": (lambda p: os.truncate(p / "model.safetensors", 50), "not a usable checkpoint"),
    "a lost file": (lambda p: (p / "optimizer.safetensors").unlink(), r"optimizer\.safetensors"),
    "broken JSON": (lambda p: (p / "state.json").write_text("{"), "not a usable checkpoint"),
    "other JSON": (lambda p: (p / "state.json").write_text("[1]"), "format 'list'"),
    "another format": (lambda p: (p / "state.json").write_text(json.dumps({"format": "sb3"})), "format 'sb3'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_others_are_named(run, policy, name):
    save(run, policy, 1)
    path = save(run, policy, 2)
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(path)
    assert "step-000000000001" in str(caught.value)


def test_a_folder_of_run_folders_names_one(run, policy):
    save(run, policy, 1)
    with pytest.raises(ValueError, match=f"no run folder.*, as {re.escape(str(run))} does"):
        checkpoint.load(run.parent)


def test_foreign_folders_are_refused(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no run folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="without a checkpoint"):
        checkpoint.load(run)
    (run / "config.json").write_text('{"env_id": "x", "learning_rte": 1}')
    with pytest.raises(ValueError, match="learning_rte"):
        checkpoint.read_config(run)


class Own(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.again = self.layer  # tied: two names, one storage


def test_a_module_of_ones_own_is_filled(run):
    own = Own()
    save(run, own, 1)
    with pytest.raises(ValueError, match=r"test_checkpoint\.Own; pass policy="):
        checkpoint.load(run)
    filled = checkpoint.load(run, Own())
    assert torch.equal(filled.layer.weight, own.layer.weight)
    with pytest.raises(ValueError, match="policy does not fit"):
        checkpoint.load(run, Own(3))


def test_what_cannot_be_loaded_is_named(run, policy):
    save(run, policy, 1)
    for path in (None, 3, b"runs"):
        with pytest.raises(TypeError, match=f"path is {path!r}; it must be the path of a run folder"):
            checkpoint.load(path)
    with pytest.raises(TypeError, match="policy is the class Own; it must be a torch.nn.Module, an object"):
        checkpoint.load(run, Own)
    with pytest.raises(ValueError, match="device is 'foo'; torch cannot use it here"):
        checkpoint.load(run, device="foo")


def test_the_hash_sees_names_shapes_dtypes_and_bits():
    base = {"a": torch.zeros(2, 3)}
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3, dtype=torch.int32)},
              {"a": -torch.zeros(2, 3)}]  # fmt: skip
    hashes = {checkpoint.tensors_sha256(tensors) for tensors in (base, *others)}
    assert len(hashes) == 5
    assert checkpoint.tensors_sha256({"a": torch.zeros(3, 2).T}) == checkpoint.tensors_sha256(base)
