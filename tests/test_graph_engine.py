"""CudaGraphEngine's steps against TorchEngine's. There is no GPU here: the same steps run on the same static tensors,
uncaptured. `tests/cuda/test_cuda_graph_engine.py` runs them captured."""

import logging
from contextlib import contextmanager

import numpy as np
import probes
import pytest
import torch
from engine_cases import (
    DOUBLE,
    FAMILY,
    MASKABLE,
    SPACES,
    N,
    Rehearsing,
    T,
    act_in,
    assert_same_metrics,
    assert_same_state,
    box_obs,
    engine_on,
    filled,
    masked_obs,
    new_rollout,
    on_graphs,
    schedule,
    settings,
    some_valid,
    state_of,
)
from gymnasium import spaces
from torch import nn

from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.engines import make_engine
from pyppo.engines.captured import CaptureError, Graphs
from pyppo.engines.cuda_graph_engine import CudaGraphEngine, why_not
from pyppo.engines.torch_engine import TorchEngine
from pyppo.engines.update_buffers import UpdateBuffers
from pyppo.policy import ActorCriticPolicy, MLPPolicy, RecurrentPolicy
from pyppo.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
IMAGES = spaces.Dict(obs=spaces.Box(0, 255, (3, 10, 12), np.uint8))


class Failing(Graphs):
    """Breaks in the middle of a step's first call, as a policy does that reads from the device."""

    def __init__(self, device, which=0):
        super().__init__(device)
        self.left = which

    def capture(self, step, start):
        if self.left == 0:
            start()
            step()
            raise CaptureError("RuntimeError: called a synchronizing CUDA operation")
        self.left -= 1
        return step


def pair(space, config, **how):
    """A CudaGraphEngine and a TorchEngine on equal policies."""
    return on_graphs(engine_on("torch", space, config, **how)), engine_on("torch", space, config, **how)


def closeness(double):
    return {"rtol": 1e-9, "atol": 1e-11} if double else {"rtol": 1e-4, "atol": 1e-5}


def assert_updates_alike(space, config, *, valid=None, double=True, drift=0.3, iterations=2, obs_space=None, **how):
    """Both engines act and update, twice; the metrics of the last update."""
    ours, theirs = engines = pair(space, config, double=double, obs_space=obs_space, **how)
    shape = {"valid": valid, "drift": drift, "obs_space": obs_space}
    rollouts = [filled(engine, space, **shape) for engine in engines]
    for iteration in range(iterations):
        results = [
            engine.update(rollout, schedule(config), iteration)
            for engine, rollout in zip(engines, rollouts, strict=True)
        ]
        assert_same_metrics(*results, **closeness(double))
        assert_same_state(ours, theirs, **closeness(double))
        for engine, rollout in zip(engines, rollouts, strict=True):
            act_in(engine, rollout)
    assert ours.name == "cuda_graph"
    return results[0]


# --- acting -----------------------------------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("parts", [[N], [4, N - 4], [1] * N], ids=["whole", "two", "rows"])
def test_acts_alike(name, parts):
    space = SPACES[name]
    config = settings(objective="kl")
    ours, theirs = pair(space, config, norm_obs=True, double=True)
    rollouts = [new_rollout(engine, space) for engine in (ours, theirs)]
    for _ in range(2):  # the second time, the steps are there
        sent = [act_in(engine, rollout, parts) for engine, rollout in zip((ours, theirs), rollouts, strict=True)]
        np.testing.assert_array_equal(*sent)
        for key in ("actions", "logp", "values", "steps"):
            assert torch.equal(getattr(rollouts[0], key), getattr(rollouts[1], key)), key
        for key, x in rollouts[0].dist_params.items():
            assert torch.equal(x, rollouts[1].dist_params[key])


@pytest.mark.parametrize("name", MASKABLE)
def test_masks_are_kept(name):
    space = SPACES[name]
    ours, theirs = pair(space, settings(), obs_space=masked_obs(space))
    rollouts = [new_rollout(engine, space, obs_space=masked_obs(space)) for engine in (ours, theirs)]
    sent = [act_in(engine, rollout) for engine, rollout in zip((ours, theirs), rollouts, strict=True)]
    np.testing.assert_array_equal(*sent)


def test_rows_may_be_acted_in_any_order():
    """The counter on the device is set where a row does not follow on; no other row is touched."""
    space = SPACES["box"]
    ours, theirs = pair(space, settings())
    rollouts = [new_rollout(engine, space) for engine in (ours, theirs)]
    for t in (3, 4, 2, 5, 0, 0):
        for engine, rollout in zip((ours, theirs), rollouts, strict=True):
            engine.act(rollout, t, slice(2, 7))
    assert torch.equal(rollouts[0].actions, rollouts[1].actions)
    assert not rollouts[0].actions[1].any()
    assert not rollouts[0].actions[:, 7:].any()


def test_one_step_rollouts():
    space = SPACES["discrete"]
    ours, theirs = pair(space, settings(num_steps=1))
    rollouts = [new_rollout(engine, space, steps=1) for engine in (ours, theirs)]
    for _ in range(3):
        sent = [act_in(engine, rollout) for engine, rollout in zip((ours, theirs), rollouts, strict=True)]
        np.testing.assert_array_equal(*sent)


@FAMILY
def test_what_is_sent_is_not_overwritten(name):
    space = SPACES[name]
    engine = on_graphs(engine_on("torch", space, settings()))
    rollout = new_rollout(engine, space)
    first = engine.act(rollout, 0, slice(0, N))
    kept = first.copy()
    engine.act(rollout, 1, slice(0, N))
    np.testing.assert_array_equal(first, kept)


# --- updating ---------------------------------------------------------------------------------------------------------


@FAMILY
@DOUBLE
def test_updates_alike(name, double):
    assert_updates_alike(SPACES[name], settings(norm_obs=True), valid=some_valid(), double=double, norm_obs=True)


FIELDS = [
    {"norm_adv": "none"}, {"clip_vloss": False}, {"max_grad_norm": None}, {"dual_clip": 1.01},
    {"objective": "unclipped"}, {"objective": "kl", "kl_coef": 0.7}, {"clip_coef_high": 0.5}, {"num_minibatches": 1},
    {"num_minibatches": 5}, {"num_minibatches": 66}, {"update_epochs": 1}, {"adaptive_lr_kl": 0.01, "anneal_lr": False},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("name", ["discrete", "box"])
def test_every_setting_is_kept(name, fields):
    assert_updates_alike(SPACES[name], settings(**fields), valid=some_valid())


@pytest.mark.parametrize("name", MASKABLE)
def test_updates_under_masks(name):
    space = SPACES[name]
    assert_updates_alike(space, settings(), valid=some_valid(), obs_space=masked_obs(space), drift=0.1)


POLICIES = [{"shared_trunk": True}, {"state_dependent_std": True}, {"hidden_sizes": ()}]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies(policy):
    assert_updates_alike(SPACES["box"], settings(objective="kl"), valid=some_valid(), **policy)


@pytest.mark.parametrize("valid_rows", [0, 1, 2, 3, 5, T * N - 1])
def test_few_or_no_valid_rows(valid_rows):
    """Parts without a row, and of one row, whose advantages are not normalised."""
    valid = torch.zeros(T * N, dtype=torch.bool)
    valid[:valid_rows] = True
    metrics = assert_updates_alike(SPACES["box"], settings(), valid=valid.view(T, N))
    assert metrics["updates"] == 3 * min(4, valid_rows)


def test_the_number_of_valid_rows_changes():
    """One capture serves every rollout, however many of its rows are valid."""
    space, config = SPACES["discrete"], settings()
    ours, theirs = engines = pair(space, config, double=True)
    rollouts = [filled(engine, space) for engine in engines]
    for iteration, seed in enumerate((3, 4, 5)):
        valid = torch.rand(T, N, generator=torch.Generator().manual_seed(seed)) < 0.2 * seed
        for engine, rollout in zip(engines, rollouts, strict=True):
            rollout.valid.copy_(valid)
            engine.update(rollout, schedule(config), iteration)
        assert_same_state(ours, theirs, **closeness(True))


def test_what_invalid_rows_hold_does_not_matter():
    space, config = SPACES["box"], settings()
    results = []
    for garbage in (0.0, float("nan")):
        engine = on_graphs(engine_on("torch", space, config))
        rollout = filled(engine, space)
        rollout.valid[2:4] = False
        for x in (rollout.obs["obs"], rollout.logp, rollout.advantages, rollout.returns, rollout.values):
            x[2:4] = garbage
        results.append((engine.update(rollout, schedule(config), 0), state_of(engine)))
    assert results[0][0] == pytest.approx(results[1][0], nan_ok=True)
    for name, x in results[0][1].items():
        assert torch.equal(x, results[1][1][name]), name


@pytest.mark.parametrize("target", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("epochs", [1, 2, 8])
def test_target_kl_stops_alike(target, epochs):
    config = settings(learning_rate=0.05, target_kl=target, update_epochs=epochs)
    metrics = assert_updates_alike(SPACES["discrete"], config, valid=some_valid(), drift=0.0, iterations=1)
    assert 1 <= metrics["updates"] <= 4 * epochs


def test_an_update_that_stopped_launches_no_more_than_two_epochs():
    space = SPACES["discrete"]
    config = settings(learning_rate=0.1, target_kl=1e-4, update_epochs=30)
    engine = on_graphs(engine_on("torch", space, config), Graphs)
    metrics = engine.update(filled(engine, space), schedule(config), 0)
    assert metrics["updates"] < config.num_minibatches
    assert int(engine._updating.buffers.place) == 2 * config.num_minibatches


def test_rate_and_coefficients_follow_the_schedule():
    space, config = SPACES["box"], settings(objective="kl", kl_target=0.01)
    ours, theirs = engines = pair(space, config, double=True)
    rollouts = [filled(engine, space, valid=some_valid()) for engine in engines]
    start, steps, buffers = schedule(config), [], set()
    changes = [{}, {"learning_rate": 5e-4}, {"kl_coef": 2.0}, {"kl_coef": 0.25, "ent_coef": 0.3}, {"clip_coef": 0.05}]
    schedules = [start._replace(**change) for change in changes]
    for iteration, now in enumerate(schedules):
        results = [engine.update(rollout, now, iteration) for engine, rollout in zip(engines, rollouts, strict=True)]
        assert_same_metrics(*results, **closeness(True))
        assert_same_state(ours, theirs, **closeness(True))
        steps.append(ours._updating._minibatch)
        buffers.add(ours._updating.buffers)
    assert steps[0] is steps[1]  # another rate is no reason to capture again
    assert len(set(steps)) == 4
    assert len(buffers) == 1


def image_engine(config, channels_last=False):
    distribution = Distribution.from_space(SPACES["discrete"])
    policy = ActorCriticPolicy(IMAGES, distribution, network="small_cnn")
    if channels_last:
        policy.to(memory_format=torch.channels_last)
    return make_engine(config.replace(engine="torch"), policy, distribution)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images(channels_last):
    space, config = SPACES["discrete"], settings(update_epochs=1)
    ours, theirs = engines = on_graphs(image_engine(config, channels_last)), image_engine(config)
    weight = ours.policy.encoder.networks[0].layers[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    rollouts = [filled(engine, space, obs_space=IMAGES, valid=some_valid()) for engine in engines]
    columns = []
    for iteration in range(2):
        results = [
            engine.update(rollout, schedule(config), iteration)
            for engine, rollout in zip(engines, rollouts, strict=True)
        ]
        assert_same_metrics(*results, **closeness(False))
        assert_same_state(ours, theirs, rtol=1e-4, atol=3e-5)
        columns.append(ours._updating.buffers.columns)
    image = columns[0].data.obs["image:obs"]
    assert image.data_ptr() == rollouts[0].obs["obs"].data_ptr()  # bytes are gathered from where they came to


# --- static tensors ---------------------------------------------------------------------------------------------------


def test_an_update_replaces_no_static_tensor():
    space, config = SPACES["box"], settings(target_kl=0.5, objective="kl")
    engine = on_graphs(engine_on("torch", space, config, norm_obs=True))
    rollout = filled(engine, space, valid=some_valid())
    engine.update(rollout, schedule(config), 0)
    update = engine._updating
    before = [(x, x.data_ptr()) for x in update.buffers.tensors()]
    act_in(engine, rollout)
    engine.update(rollout, schedule(config)._replace(learning_rate=1e-4), 1)
    assert engine._updating is update
    assert [x.data_ptr() for x in update.buffers.tensors()] == [place for _, place in before]
    assert all(x is y for (x, _), y in zip(before, update.buffers.tensors(), strict=True))
    assert len(before) >= 20


def test_a_rehearsal_leaves_nothing_behind():
    """Noise, batch-wise buffers and gradients: a policy that is called to be captured is as it was."""

    class Counting(MLPPolicy):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self.register_buffer("calls", torch.zeros(()))

        def heads(self, obs):
            self.calls += 1
            torch.rand(1)
            return super().heads(obs)

    space, config = SPACES["box"], settings()
    policy = Counting(box_obs(), Distribution.from_space(space), hidden_sizes=(8,))
    kind = type("OnTheCpu", (CudaGraphEngine,), {"new_graphs": Rehearsing})
    engine = kind(policy, config, CPU, policy.distribution)
    rollout = filled(engine_on("torch", space, config), space)
    random, before = torch.get_rng_state(), state_of(engine)
    engine.flat.grad.fill_(7.0)
    t, sent = torch.zeros(1, dtype=torch.int64), torch.zeros(N, 2)
    buffers = UpdateBuffers(engine._flatten(rollout), rollout, config)
    engine.capture(lambda: engine.act_step(rollout, slice(0, N), t, sent), t.zero_)
    engine.capture(lambda: engine.minibatch_step(buffers, schedule(config)), buffers.rehearse)
    assert torch.equal(torch.get_rng_state(), random)
    assert policy.calls == 0
    assert (engine.flat.grad == 7.0).all()
    after = state_of(engine)
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize("change", ["parameters", "rollout", "storage", "network", "mode", "clip"])
def test_captured_again_after_a_change(change):
    space, config = SPACES["discrete"], settings()
    ours, theirs = engines = pair(space, config, norm_obs=True)
    rollouts = [filled(engine, space) for engine in engines]
    for engine, rollout in zip(engines, rollouts, strict=True):
        engine.update(rollout, schedule(config), 0)
    update, act = ours._updating, ours._groups[0, N]
    for i, engine in enumerate(engines):
        policy = engine.policy
        if change == "parameters":
            policy.load_state_dict({k: v.clone() for k, v in policy.state_dict().items()}, assign=True)
        elif change == "rollout":
            rollouts[i] = filled(engine, space)
        elif change == "storage":
            rollouts[i].advantages = rollouts[i].advantages.clone()
        elif change == "network":
            policy.actor[1] = nn.ReLU()
        elif change == "mode":
            policy.eval()
        else:
            policy.normalizer.clip = 0.5
    for engine, rollout in zip(engines, rollouts, strict=True):
        act_in(engine, rollout)
        engine.update(rollout, schedule(config), 1)
    assert_same_state(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(rollouts[0].actions, rollouts[1].actions)
    assert ours._updating is not update
    assert ours._groups[0, N] is not act


def test_nothing_is_captured_again_without_a_change():
    space, config = SPACES["discrete"], settings()
    engine = on_graphs(engine_on("torch", space, config, norm_obs=True))
    rollout = filled(engine, space)
    engine.update(rollout, schedule(config), 0)
    update, act = engine._updating, engine._groups[0, N]
    engine.policy.normalizer.update({"obs": torch.randn(20, 3)})
    engine.load_state_dict(engine.state_dict())
    engine.policy.load_state_dict(engine.policy.state_dict())
    act_in(engine, rollout)
    engine.update(rollout, schedule(config), 1)
    assert engine._updating is update
    assert engine._groups[0, N] is act


# --- where it cannot --------------------------------------------------------------------------------------------------


class WithoutHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def evaluate(self, obs, actions, state=None): ...
    def act(self, obs, deterministic=False): ...


class Auxiliary(MLPPolicy):
    def auxiliary_loss(self, minibatch):
        return minibatch.returns.mean()


def policy_with(module=None, hook=None, cls=MLPPolicy):
    policy = cls(box_obs(), Distribution.from_space(SPACES["discrete"]), hidden_sizes=(8,))
    if module is not None:
        policy.actor.insert(1, module)
    if hook is not None:
        hook(policy)
    return policy


UNFIT = {
    "recurrent": (
        lambda: RecurrentPolicy(box_obs(), Distribution.from_space(SPACES["discrete"])), "the policy is recurrent"
    ),
    "no heads": (WithoutHeads, "a WithoutHeads, has no heads(), and its act() is NumPy"),
    "auxiliary": (lambda: policy_with(cls=Auxiliary), "has an auxiliary_loss(), which would see the rows that fill up"),
    "batch norm": (lambda: policy_with(nn.BatchNorm1d(8)), "policy.actor.1 is a BatchNorm1d, which would count"),
    "hook": (
        lambda: policy_with(hook=lambda policy: policy.critic.register_forward_hook(print)), "policy.critic has hooks"
    ),
    "gradient's hook": (
        lambda: policy_with(hook=lambda policy: policy.critic[0].bias.register_hook(abs)),
        "parameter critic.0.bias has hooks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_says_why_it_cannot(name):
    make, reason = UNFIT[name]
    assert reason in why_not(make(), GPU)
    distribution = Distribution.from_space(SPACES["discrete"])
    with pytest.raises(ValueError, match="engine is 'cuda_graph'; it must be 'auto' or 'torch', since") as error:
        CudaGraphEngine(make(), settings(), CPU, distribution)
    assert reason in str(error.value)


def test_it_wants_a_gpu():
    policy = policy_with()
    assert why_not(policy, GPU) is None
    assert why_not(policy, CPU) == "the device is cpu, not a GPU"
    for device in ("cpu", "auto"):
        with pytest.raises(ValueError, match="engine is 'cuda_graph'; .* the device is cpu, not a GPU"):
            make_engine(settings(engine="cuda_graph", device=device), policy, policy.distribution)


@pytest.mark.parametrize("captures", [0, 1, 2])
def test_auto_goes_on_eagerly_where_a_capture_fails(captures, caplog):
    """The first capture acts, the second prepares an update, the third is a minibatch: nothing is lost at any."""
    space, config = SPACES["box"], settings(engine="torch")
    theirs = engine_on("torch", space, config, norm_obs=True)
    failing = lambda device: Failing(device, captures)  # noqa: E731
    ours = on_graphs(engine_on("torch", space, config, norm_obs=True), failing, engine="auto")
    random = torch.get_rng_state()
    results = []
    with caplog.at_level(logging.WARNING, "pyppo"):
        for engine in (ours, theirs):
            rollout = filled(engine, space, valid=some_valid())
            results += [engine.update(rollout, schedule(config), iteration) for iteration in range(2)]
    assert results[:2] == results[2:]
    for name, x in state_of(ours).items():
        assert torch.equal(x, state_of(theirs)[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    why = "RuntimeError: called a synchronizing CUDA operation"
    assert caplog.messages == [f"the engine is torch from here on, since cuda_graph cannot capture the policy: {why}"]
    assert (ours.name, ours.reason) == ("torch", f"cuda_graph cannot: the policy cannot be captured: {why}")


def test_asked_for_it_raises_where_a_capture_fails():
    space, config = SPACES["box"], settings()
    engine = on_graphs(engine_on("torch", space, config), Failing, engine="cuda_graph")
    rollout = new_rollout(engine, space)
    with pytest.raises(ValueError, match="the policy cannot be captured: RuntimeError: called a synchronizing"):
        engine.act(rollout, 0, slice(0, N))
    with pytest.raises(ValueError, match="the policy cannot be captured: RuntimeError: called a synchronizing"):
        engine.update(filled(engine_on("torch", space, config), space), schedule(config), 0)


def test_a_policy_that_replaces_its_buffers_is_not_captured():
    class Replacing(MLPPolicy):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self.register_buffer("calls", torch.zeros(1))

        def heads(self, obs):
            self.calls = self.calls + 1
            return super().heads(obs)

    policy = policy_with(cls=Replacing)
    kind = type("OnTheCpu", (CudaGraphEngine,), {"new_graphs": Rehearsing})
    engine = kind(policy, settings(engine="auto"), CPU, policy.distribution)
    engine.act(new_rollout(engine, SPACES["discrete"]), 0, slice(0, N))
    assert "calling the policy replaces a parameter, buffer or module of it" in engine.reason


def test_a_policy_that_became_unfit_goes_on_eagerly():
    space, config = SPACES["discrete"], settings()
    engine = on_graphs(engine_on("torch", space, config), engine="auto")
    rollout = filled(engine, space)
    engine.policy.actor[0].register_forward_hook(lambda *given: None)
    engine.update(rollout, schedule(config), 0)
    assert engine.name == "torch"
    assert "policy.actor.0 has hooks" in engine.reason


# --- state, and whole runs --------------------------------------------------------------------------------------------


def test_state_is_exchanged_with_the_other_engines():
    space, config = SPACES["box"], settings()
    straight = engine_on("torch", space, config, double=True)
    rollout = filled(straight, space, valid=some_valid())
    for iteration in range(3):
        straight.update(rollout, schedule(config), iteration)
    relay = [engine_on("torch", space, config, double=True) for _ in range(3)]
    relay[1] = on_graphs(relay[1])
    for iteration, engine in enumerate(relay):
        if iteration:
            engine.policy.load_state_dict(relay[iteration - 1].policy.state_dict())
            engine.load_state_dict(relay[iteration - 1].state_dict())
        engine.update(rollout, schedule(config), iteration)
    assert_same_state(relay[-1], straight, **closeness(True))


@contextmanager
def graphs_on_the_cpu(monkeypatch):
    """`make_engine` lets a trainer have a CudaGraphEngine on the CPU."""

    def make(config, policy, distribution):
        kind = type("OnTheCpu", (CudaGraphEngine,), {"new_graphs": Rehearsing})
        return kind(policy, config, CPU, distribution)

    with monkeypatch.context() as patch:
        patch.setattr("pyppo.trainer.make_engine", make)
        yield


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("probe", [probes.ObservationAction, probes.ContinuousAction, probes.TruncationOnly])
def test_a_run_is_torchs(probe, same_step, monkeypatch):
    results = []
    config = Config(
        "probe", total_timesteps=300, num_steps=16, num_minibatches=3, update_epochs=2, run_dir=None, device="cpu",
        norm_obs=True, norm_reward=True, learning_rate=1e-3, engine="torch",
    )  # fmt: skip
    for captured in (True, False):
        distribution = Distribution.from_space(probe().single_action_space)
        obs_space = spaces.Dict(obs=probe().single_observation_space)
        policy = MLPPolicy(obs_space, distribution, hidden_sizes=(8,), norm_obs=True).double()
        with graphs_on_the_cpu(monkeypatch) if captured else monkeypatch.context():
            trainer = Trainer(config, probe(same_step=same_step), policy, quiet=True)
        with trainer:
            assert isinstance(trainer.engine, CudaGraphEngine) == captured
            results.append(trainer.train())
    ours, theirs = (result.policy.state_dict() for result in results)
    for key, x in ours.items():
        torch.testing.assert_close(x, theirs[key], rtol=1e-6, atol=1e-8)


def test_a_run_goes_on(tmp_path, monkeypatch):
    config = Config(
        "probe", total_timesteps=300, num_steps=16, num_minibatches=2, update_epochs=2, device="cpu",
        run_dir=str(tmp_path), norm_obs=True, hidden_sizes=(8,),
    )  # fmt: skip
    with graphs_on_the_cpu(monkeypatch):
        first = Trainer(config, probes.ContinuousAction(), quiet=True)
    with first:
        run = first.train().run_dir
        steps = first.engine.step.item()
    with Trainer.resume(run, probes.ContinuousAction(), quiet=True, total_timesteps=600, engine="torch") as second:
        assert type(second.engine) is TorchEngine
        assert second.engine.step.item() == steps > 0
        second.train()
        steps = second.engine.step.item()
    with graphs_on_the_cpu(monkeypatch):
        third = Trainer.resume(run, probes.ContinuousAction(), quiet=True, total_timesteps=900)
    with third:
        assert third.engine.step.item() == steps
        assert third.train().history["step"][-1] >= 900
