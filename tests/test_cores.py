"""One core for all groups of environments, or one for each, served at the same time: kept, given back, and errors."""

import importlib.util
import os
import subprocess
import sys
import threading
import time

import pytest

from pyppo import Config, Trainer, cores
from pyppo.cores import Cores, at_once, thread_ids
from pyppo.stepping import Way, make_groups

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed"),
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to cores here"),
]
needs_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
AT_ONCE = {"num_groups": 2, "env_threads": 1, "one_core": True}


def config_for(**fields):
    return Config.for_env("CartPole-v1", **{"num_envs": 4, "num_steps": 16, "run_dir": None, **fields})


def allowed(thread=0):
    return os.sched_getaffinity(thread)


@needs_cores
@pytest.mark.parametrize("fails", [False, True])
def test_one_core_is_kept_and_given_back(fails):
    before, others = allowed(), {thread: allowed(thread) for thread in thread_ids()}
    groups = make_groups(config_for(), Way(2, 1, False))
    block = Cores([group.env for group in groups])
    pool_threads = [thread for group in groups for thread in group.env.threads]
    assert len(pool_threads) >= 2
    stop, started = threading.Event(), threading.Thread(target=lambda: stop.wait())
    for _ in range(2):
        try:
            with block:
                assert len(core := allowed()) == 1
                alive = [thread for thread in pool_threads if thread in thread_ids()]  # not all were the pools' own
                assert len(alive) >= 2
                assert all(allowed(thread) == core for thread in alive)
                assert all(group.env.one_core for group in groups)
                untouched = {t: allowed(t) for t in others if t != threading.get_native_id()}
                assert untouched == {t: others[t] for t in untouched}
                if not started.is_alive():
                    started.start()  # inherits the one core
                    assert allowed(started.native_id) == core
                if fails:
                    raise ValueError("what a collect may raise")
        except ValueError:
            assert fails
        assert allowed() == before
        assert allowed(started.native_id) == before
        assert not any(group.env.one_core for group in groups)
    stop.set()
    started.join()


@needs_cores
def test_training_gives_the_core_back():
    before = allowed()
    with Trainer(config_for(num_groups=1, env_threads=1, one_core=True), quiet=True) as trainer:
        seen, act = [], trainer.engine.act

        def acting(*arguments):
            seen.append(allowed())
            if len(seen) > 20:
                raise RuntimeError("from the middle of a rollout")
            return act(*arguments)

        trainer.engine.act = acting
        trainer.step()
        assert all(len(cores) == 1 for cores in seen)
        assert allowed() == before
        with pytest.raises(RuntimeError, match="middle"):
            trainer.step()
        assert allowed() == before


def test_the_core_is_one_that_the_caller_may_use():
    assert cores._current_core({4095}) == 4095
    assert cores._current_core(allowed()) in allowed()


# --- a core each, at once ---------------------------------------------------------------------------------------------


@pytest.fixture
def two_cores():
    """The block of two groups on a core each."""
    groups = make_groups(config_for(), Way(2, 1, True, at_once=True))
    with Cores([group.env for group in groups], each=True) as block:
        yield groups, block
    for group in groups:
        group.close()


@needs_cores
def test_each_group_has_a_core_of_its_own():
    before, groups = allowed(), make_groups(config_for(), Way(2, 1, True, at_once=True))
    block, seen = Cores([group.env for group in groups], each=True), {}

    def serve(index):
        def task(given_up):
            seen[index] = allowed()
            assert not given_up()

        return task

    with block:
        mine = [{core for t in group.env.threads if t in thread_ids() for core in allowed(t)} for group in groups]
        at_once([serve(0), serve(1)], block)
    for group in groups:
        group.close()
    assert [len(x) for x in mine] == [1, 1]
    assert mine[0] != mine[1]
    assert [seen[0], seen[1]] == mine
    assert allowed() == before


@pytest.mark.parametrize(
    ("allowed", "current", "pools", "expected"),
    [(range(2), 0, 2, [0, 1]), (range(2), 1, 2, [1, 0]), (range(16), 3, 2, [3, 11]), (range(16), 11, 2, [11, 3]),
     (range(16), 14, 4, [14, 2, 6, 10]), ([1, 4, 5], 4, 2, [4, 5]), ([7], 7, 3, [7, 7, 7]),
     (range(2), 1, 3, [1, 0, 1])],
)  # fmt: skip
def test_cores_go_on_from_the_callers(monkeypatch, allowed, current, pools, expected):
    monkeypatch.setattr(cores, "_current_core", lambda _: current)
    for each, wanted in ((True, expected), (False, [current] * pools)):
        block = Cores([None] * pools, each)
        block._before = set(allowed)
        assert block._choose() == wanted


@needs_cores
def test_tasks_run_at_the_same_time(two_cores):
    meeting = threading.Barrier(2, timeout=60)  # broken, with an error, if one waits alone
    at_once([lambda given_up: meeting.wait(), lambda given_up: meeting.wait()], two_cores[1])


def raises(error):
    def task(given_up):
        raise error

    return task


def waits(until):
    """A task that ends when another has failed."""

    def task(given_up):
        end = time.monotonic() + 60
        while not given_up():
            assert time.monotonic() < end, "was not told that another failed"
            time.sleep(0.001)
        until.append("ended")

    return task


@needs_cores
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_one_error_ends_the_others_and_is_raised(two_cores, failing, error):
    ended, count = [], threading.active_count()
    tasks = [waits(ended), raises(error)] if failing else [raises(error), waits(ended)]
    with pytest.raises(type(error)) as raised:
        at_once(tasks, two_cores[1])
    assert raised.value is error
    assert ended == ["ended"]
    assert threading.active_count() == count


@needs_cores
def test_of_two_errors_the_callers_is_raised(two_cores):
    with pytest.raises(ValueError, match="first"):
        at_once([raises(ValueError("first")), raises(ValueError("second"))], two_cores[1])


@needs_cores
@pytest.mark.parametrize("first", [0, 2], ids=["the caller's group", "the other group"])
def test_a_rollout_that_fails_in_one_group_can_be_begun_anew(first):
    before, count = allowed(), threading.active_count()
    with Trainer(config_for(**AT_ONCE), quiet=True) as trainer:
        assert trainer.stepping.way == Way(2, 1, True, at_once=True)
        act, broken = trainer.engine.act, [True]

        def acting(rollout, t, rows):
            if broken and t == 5 and rows.start == first:
                raise RuntimeError(f"in row {rows.start}")
            return act(rollout, t, rows)

        trainer.engine.act = acting
        with pytest.raises(RuntimeError, match=f"in row {first}"):
            trainer.step()
        assert not trainer.collector.ready
        assert allowed() == before
        assert threading.active_count() == count
        assert trainer.rollout.steps[first] == 5
        broken.clear()
        assert trainer.step()["step"] > 0
        assert trainer.rollout.steps[first] == 5 + 16  # those before the error too: noise is not drawn twice


INTERRUPTED = """
import os, signal, threading, time
from pyppo import Config, Trainer

signal.signal(signal.SIGINT, signal.default_int_handler)  # a program started in the background does not hear it
at_once = {"num_groups": 2, "env_threads": 1, "one_core": True}
config = Config.for_env("CartPole-v1", num_envs=4, num_steps=16, run_dir=None, **at_once)
with Trainer(config, quiet=True) as trainer:
    act, running = trainer.engine.act, []

    def acting(rollout, t, rows):
        if t == 8 and rows.start:  # the caller is done long before
            running.append("other")
            for _ in range({signals}):
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            running.clear()
        return act(rollout, t, rows)

    trainer.step()
    trainer.engine.act = acting
    try:
        trainer.step()
    except KeyboardInterrupt:
        assert not running, "the other group still acts"
        assert threading.active_count() == 1
        assert len(os.sched_getaffinity(0)) > 1
        assert not trainer.collector.ready
        trainer.engine.act = act
        assert trainer.step()["step"] > 0
        print("whole")
"""


@needs_cores
@pytest.mark.parametrize("signals", [1, 3])
def test_ctrl_c_while_the_other_group_is_waited_for(signals):
    code = INTERRUPTED.replace("{signals}", str(signals))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "whole"), done.stderr


@needs_cores
def test_phases_add_up_to_the_time():
    with Trainer(config_for(**AT_ONCE), quiet=True) as trainer:
        act = trainer.engine.act

        def slow(rollout, t, rows):
            time.sleep(0.002)
            return act(rollout, t, rows)

        trainer.step()
        trainer.engine.act = slow
        start = time.perf_counter()
        row = trainer.step()
        elapsed = time.perf_counter() - start
    phases = sum(row[f"time_{name}"] for name in ("act", "env", "gae", "update", "other"))
    assert 16 * 0.002 <= row["time_act"] <= phases <= elapsed + 0.001  # of one group: both would be twice that


ALONE = """
import os, torch
from pyppo import ops

def threads():
    return len(os.listdir("/proc/self/task"))

def work():
    return ops.sample(logits=torch.zeros(200_000, 8), seed=1)

ops.set_num_threads(3)
torch.set_num_threads(1)
before = threads()
ops.set_alone(True)
one = work()
assert threads() == before, "woke others"
ops.set_alone(False)
several = work()
assert threads() == before + 2, "did not go back to all threads"
assert all(torch.equal(a, b) for a, b in zip(one, several))
"""


def test_kernels_keep_to_a_thread_that_wants_to_be_alone():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
