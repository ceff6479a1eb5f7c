"""Which rows of a rollout are valid: known where the collector said so, looked up where anybody wrote since."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from pyppo.rollout import Rollout

KNOWN = torch.tensor([1, 4, 5])  # not what `valid` holds, so that a test sees which of the two is answered


def make_rollout(num_steps=3, num_envs=4):
    return Rollout(num_steps, num_envs, spaces.Box(-1, 1, (2,)), spaces.Discrete(2))


def truth(rollout):
    return np.flatnonzero(rollout.valid.numpy()).tolist()


def assert_looked_up(rollout):
    rows = rollout.valid_rows()
    assert rows.dtype == torch.int64
    assert rows.shape == (rollout.num_valid,)
    assert rows.tolist() == truth(rollout)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**25 - 1))
def test_without_a_word_they_are_looked_up(num_steps, num_envs, bits):
    rollout = make_rollout(num_steps, num_envs)
    written = np.array([bits >> i & 1 for i in range(num_steps * num_envs)], bool).reshape(num_steps, num_envs)
    rollout.valid.numpy()[...] = written  # what no version counts
    assert_looked_up(rollout)
    rollout.valid.numpy()[...] = ~written
    assert_looked_up(rollout)


def test_what_is_known_is_given_as_it_is():
    rollout = make_rollout()
    rollout.know_valid(KNOWN)
    assert rollout.valid_rows() is KNOWN
    assert rollout.num_valid == 3
    rollout.know_valid(None)
    assert_looked_up(rollout)
    assert rollout.num_valid == 0


@torch.inference_mode()
def write_in_inference_mode(rollout):
    rollout.valid[0] = True


def replace(rollout):
    rollout.valid = torch.ones_like(rollout.valid)


WRITES = {
    "one element": lambda rollout: rollout.valid[1].__setitem__(2, True),
    "all": lambda rollout: rollout.valid.fill_(True),
    "a copy": lambda rollout: rollout.valid.copy_(torch.eye(3, 4, dtype=torch.bool)),
    "a view": lambda rollout: rollout.valid.reshape(-1)[4:9].fill_(True),
    "an alias that no gradient flows through": lambda rollout: rollout.valid.detach().fill_(True),
    "what is written already": lambda rollout: rollout.valid.fill_(False),
    "in inference mode": write_in_inference_mode,
    "another tensor": replace,
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_known_ends_with_the_next_write(write):
    rollout = make_rollout()
    rollout.know_valid(KNOWN)
    WRITES[write](rollout)
    assert_looked_up(rollout)
    rollout.know_valid(KNOWN)  # of what was written
    assert rollout.valid_rows() is KNOWN


def test_reading_and_writing_the_rest_changes_nothing():
    rollout = make_rollout()
    rollout.know_valid(KNOWN)
    rollout.valid.sum(), rollout.valid[0].clone()
    rollout.rewards.fill_(1.0)
    rollout.values.zero_()
    rollout.obs["obs"].fill_(2.0)
    assert rollout.valid_rows() is KNOWN


def test_storage_without_a_version_is_always_looked_up():
    with torch.inference_mode():
        rollout = make_rollout()
    rollout.know_valid(KNOWN)
    assert_looked_up(rollout)
