"""`ops.ppo_loss` on cases of one or two samples, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import with_gradients

from pyppo import ops


def test_hand_worked_categorical() -> None:
    """Two samples, two actions; p is (1/2, 1/2) and (3/4, 1/4).

    Sample 0: action 0, old p 1/2, so ratio 1; A = 3: policy -3. V = 1, R = 3: value 2. Entropy log 2.
    Sample 1: action 1, old p 1/8, so ratio 2; A = 1: clipped at 1.2, policy -1.2. V = 2, R = 1: value 1/2.
              Entropy h = log 4 - 3/4 log 3.
    Mean of policy + 0.5 value: (-3 + 1 - 1.2 + 0.25) / 2.
    d / d logits of sample 0: -3 / 2 * (1 - 1/2, -1/2); of sample 1: 0, it is clipped.
    d / d V: 0.5 * (1 - 3) / 2 and 0.5 * (2 - 1) / 2. k3: (0 + (2 - 1) - log 2) / 2.
    """
    case = {
        "logits": torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64),
        "actions": torch.tensor([0, 1]),
        "old_logp": torch.tensor([0.5, 0.125], dtype=torch.float64).log(),
        "advantages": torch.tensor([3.0, 1.0], dtype=torch.float64),
        "values": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "returns": torch.tensor([3.0, 1.0], dtype=torch.float64),
    }
    loss, metrics, grads = with_gradients(ops.ppo_loss, case)
    assert float(loss) == pytest.approx(-1.475, abs=1e-14)
    assert metrics == pytest.approx(
        {
            "loss": -1.475,
            "policy_loss": -2.1,
            "value_loss": 1.25,
            "entropy": (math.log(2) + math.log(4) - 0.75 * math.log(3)) / 2,
            "approx_kl": (1 - math.log(2)) / 2,
            "clip_fraction": 0.5,
            "kl": 0.0,
            "denominator": 2.0,
        },
        abs=1e-14,
    )
    torch.testing.assert_close(grads["logits"], torch.tensor([[-0.75, 0.75], [0.0, 0.0]]).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(grads["values"], torch.tensor([-0.5, 0.25]).double(), rtol=0, atol=1e-14)
    # With ent_coef 1 sample 1's logits get p_j (log p_j + h) / 2 = 3/32 log 3 * (1, -1); sample 0 is at the maximum.
    entropy_only = with_gradients(ops.ppo_loss, {**case, "advantages": torch.zeros(2).double(), "ent_coef": 1.0})
    push = 3 / 32 * math.log(3.0)
    expected = torch.tensor([[0.0, 0.0], [push, -push]], dtype=torch.float64)
    torch.testing.assert_close(entropy_only[2]["logits"], expected, rtol=0, atol=1e-14)


def test_hand_worked_normal() -> None:
    """mean 1, std 2, action 5: z = 2. logp = -2 - log 2 - c with c = 0.5 log 2 pi; ratio 1, A = -1: policy 1.

    d logp / d mean = z / std = 1, d logp / d log std = z^2 - 1 = 3; times -A = 1.
    KL(old || new) with old mean 3, old std 2: (2 / 2)^2 / 2 = 0.5, d / d mean = (1 - 3) / 4, d / d log std = 1 - 2.
    """
    c = 0.5 * math.log(2 * math.pi)
    case = {
        "mean": torch.tensor([[1.0]], dtype=torch.float64),
        "log_std": torch.tensor([math.log(2.0)], dtype=torch.float64),
        "actions": torch.tensor([[5.0]], dtype=torch.float64),
        "old_logp": torch.tensor([-2 - math.log(2.0) - c], dtype=torch.float64),
        "advantages": torch.tensor([-1.0], dtype=torch.float64),
    }
    loss, metrics, grads = with_gradients(ops.ppo_loss, case)
    assert float(loss) == pytest.approx(1.0, abs=1e-14)
    assert metrics["entropy"] == pytest.approx(math.log(2.0) + 0.5 + c, abs=1e-14)
    assert grads["mean"].tolist() == [[pytest.approx(1.0, abs=1e-14)]]
    assert grads["log_std"].tolist() == [pytest.approx(3.0, abs=1e-13)]
    old = {"old_mean": torch.tensor([[3.0]], dtype=torch.float64), "old_log_std": case["log_std"]}
    penalised = with_gradients(ops.ppo_loss, {**case, **old, "objective": "kl", "kl_coef": 10.0})
    assert penalised[1]["kl"] == pytest.approx(0.5, abs=1e-14)
    assert float(penalised[0]) == pytest.approx(1.0 + 5.0, abs=1e-13)
    assert penalised[2]["mean"].item() == pytest.approx(1.0 - 5.0, abs=1e-13)
    # d KL / d log std = 1 - (1 + 1)
    assert penalised[2]["log_std"].item() == pytest.approx(3.0 - 10.0, abs=1e-13)


def test_hand_worked_bernoulli_and_multi_categorical() -> None:
    """Bits with p(1) = 3/4 and 1/2, action (1, 0): p = 3/8. Components (1/2, 1/2) and (1/4, 3/4), action (1, 1): 3/8.

    Old p 3/8 too: ratio 1. A = 2: d loss / d logit = -2 (bit - p) or -2 (chosen - p).
    """
    log3 = math.log(3.0)
    common = {
        "old_logp": torch.tensor([3 / 8], dtype=torch.float64).log(),
        "advantages": torch.tensor([2.0], dtype=torch.float64),
    }
    h34 = math.log(4.0) - 0.75 * log3
    for inputs, expected in (
        ({"logits": [[log3, 0.0]], "actions": [[1, 0]], "distribution": "bernoulli"}, [[-0.5, 1.0]]),
        ({"logits": [[5.0, 5.0, 0.0, log3]], "actions": [[1, 1]], "nvec": (2, 2)}, [[1.0, -1.0, 0.5, -0.5]]),
    ):
        tensors = {
            "logits": torch.tensor(inputs["logits"], dtype=torch.float64),
            "actions": torch.tensor(inputs["actions"]),
        }
        loss, metrics, grads = with_gradients(ops.ppo_loss, {**inputs, **tensors, **common})
        assert float(loss) == pytest.approx(-2.0, abs=1e-14)
        assert metrics["entropy"] == pytest.approx(h34 + math.log(2.0), abs=1e-14)
        assert metrics["clip_fraction"] == 0.0
        torch.testing.assert_close(grads["logits"], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


# Policy objective of one sample, by hand: (ratio, A, options) -> (policy, d policy / d logp).
SURROGATES = [
    (1.1, 2.0, {}, -2.2, -2.2),
    (1.3, 2.0, {}, -2.4, 0.0),  # clipped at 1.2
    (1.3, -2.0, {}, 2.6, 2.6),  # the pessimistic side is the ratio itself
    (0.5, 2.0, {}, -1.0, -1.0),
    (0.5, -2.0, {}, 1.6, 0.0),  # clipped at 0.8
    (1.3, 2.0, {"clip_coef_high": 0.4}, -2.6, -2.6),
    (1.5, 2.0, {"clip_coef_high": 0.4}, -2.8, 0.0),
    (0.5, -2.0, {"clip_coef_high": 0.4}, 1.6, 0.0),  # the lower bound stays 0.8
    (4.0, -2.0, {}, 8.0, 8.0),
    (4.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),
    (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0),
    (4.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0),  # only where A < 0
    (4.0, 2.0, {"objective": "unclipped"}, -8.0, -8.0),
    (0.25, -2.0, {"objective": "unclipped"}, 0.5, 0.5),
]


@pytest.mark.parametrize(("ratio", "advantage", "options", "policy", "slope"), SURROGATES)
def test_hand_worked_objectives(
    ratio: float, advantage: float, options: dict[str, Any], policy: float, slope: float
) -> None:
    logits = torch.zeros(1, 2, dtype=torch.float64)
    case = {
        "logits": logits,
        "actions": torch.tensor([0]),
        "old_logp": torch.tensor([math.log(0.5 / ratio)], dtype=torch.float64),
        "advantages": torch.tensor([advantage], dtype=torch.float64),
    }
    loss, metrics, grads = with_gradients(ops.ppo_loss, {**case, **options})
    assert float(loss) == pytest.approx(policy, abs=1e-13)
    # d logp / d logits = (1, 0) - (1/2, 1/2)
    assert grads["logits"][0].tolist() == pytest.approx([slope / 2, -slope / 2], abs=1e-13)
    assert metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-13)


# (V, V_old, R, e) -> (loss, d loss / d V)
VALUE_LOSSES = [
    (2.0, 0.0, 1.0, None, 0.5, 1.0),
    (2.0, 1.9, 1.0, 0.2, 0.5, 1.0),  # near V_old: not clipped
    (2.0, 0.0, 3.0, 0.5, 3.125, 0.0),  # clipped to 0.5: 0.5 * 2.5^2 is larger than 0.5 * 1
    (2.0, 0.0, 0.0, 0.5, 2.0, 2.0),  # clipped to 0.5: 0.125 is smaller
    (-2.0, 0.0, -3.0, 0.5, 3.125, 0.0),
]


@pytest.mark.parametrize(("value", "old", "target", "clip", "expected", "slope"), VALUE_LOSSES)
def test_hand_worked_value_loss(
    value: float, old: float, target: float, clip: float | None, expected: float, slope: float
) -> None:
    case = {
        "logits": torch.zeros(1, 1, dtype=torch.float64),
        "actions": torch.tensor([0]),
        "old_logp": torch.zeros(1, dtype=torch.float64),
        "advantages": torch.zeros(1, dtype=torch.float64),
        "values": torch.tensor([value], dtype=torch.float64),
        "old_values": torch.tensor([old], dtype=torch.float64),
        "returns": torch.tensor([target], dtype=torch.float64),
    }
    loss, metrics, grads = with_gradients(ops.ppo_loss, {**case, "value_clip_coef": clip, "vf_coef": 0.25})
    assert metrics["value_loss"] == pytest.approx(expected, abs=1e-14)
    assert float(loss) == pytest.approx(0.25 * expected, abs=1e-14)
    assert grads["values"].item() == pytest.approx(0.25 * slope, abs=1e-14)
