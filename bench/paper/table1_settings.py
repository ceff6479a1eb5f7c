"""What is run for Table 1 of Schulman et al. 2017: environments, surrogates, settings; and the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENVIRONMENTS = (
    "HalfCheetah-v4", "Hopper-v4", "InvertedDoublePendulum-v4", "InvertedPendulum-v4", "Reacher-v4", "Swimmer-v4",
    "Walker2d-v4",
)  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "no clipping": {"objective": "unclipped"},
    "clip 0.1": {"clip_coef": 0.1},
    "clip 0.2": {"clip_coef": 0.2},
    "clip 0.3": {"clip_coef": 0.3},
    "adaptive KL 0.003": {"objective": "kl", "kl_coef": 1.0, "kl_target": 0.003},
    "adaptive KL 0.01": {"objective": "kl", "kl_coef": 1.0, "kl_target": 0.01},
    "adaptive KL 0.03": {"objective": "kl", "kl_coef": 1.0, "kl_target": 0.03},
    "fixed KL 0.3": {"objective": "kl", "kl_coef": 0.3},
    "fixed KL 1": {"objective": "kl", "kl_coef": 1.0},
    "fixed KL 3": {"objective": "kl", "kl_coef": 3.0},
    "fixed KL 10": {"objective": "kl", "kl_coef": 10.0},
}
PAPER = dict(zip(VARIANTS, (-0.39, 0.76, 0.82, 0.70, 0.68, 0.74, 0.71, 0.62, 0.71, 0.72, 0.69), strict=True))
CLIPS = ("clip 0.1", "clip 0.2", "clip 0.3")

# Alike in all runs. Config's defaults, to which they were left before they were written out.
WRITTEN_OUT_LATER: dict[str, Any] = {
    "objective": "clip", "clip_coef_high": None, "dual_clip": None, "target_kl": None, "kl_coef": 1.0,
    "kl_target": None, "adaptive_lr_kl": None, "warmup_rows": 2048, "network": "auto", "recurrent": "none",
    "precision": "fp32", "torch_threads": 1, "env_options": {}, "adam_eps": 1e-5,
}  # fmt: skip
# The paper's, one set for all environments: tanh 64-64, separate networks, no entropy bonus, 2,048 steps a rollout
# (here of 8 environments), minibatches of 64, 10 epochs, Adam at 3e-4. Written out, so that no preset moves it.
SHARED: dict[str, Any] = {
    "num_envs": 8, "num_steps": 256, "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4,
    "anneal_lr": True, "gamma": 0.99, "gae_lambda": 0.95, "ent_coef": 0.0, "vf_coef": 0.5,
    "clip_coef": 0.2, "norm_obs": True, "clip_obs": 10.0, "hidden_sizes": (64, 64), "activation": "tanh",
    "shared_trunk": False, "log_std_init": 0.0, "state_dependent_std": False, "action_bounds": "clip",
    "engine": "native", "run_dir": None, **WRITTEN_OUT_LATER,
}  # fmt: skip
# What else holds an update back decides how badly the surrogate without clipping fails, hence two settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "X": {**SHARED, "norm_reward": True, "clip_reward": 10.0, "max_grad_norm": 0.5, "clip_vloss": True,
          "norm_adv": "minibatch"},
    "Y": {**SHARED, "norm_reward": False, "max_grad_norm": None, "clip_vloss": False, "norm_adv": "batch"},
}  # fmt: skip
SETTING_TITLES = {
    "X": "CleanRL's settings: rewards normalised, gradients and value loss clipped, advantages normalised by minibatch",
    "Y": "no reward normalisation, no gradient or value clipping, advantages normalised by batch",
}


def upgraded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An older run's arguments, with what was not written out then."""
    return {**arguments, "fields": {**WRITTEN_OUT_LATER, **arguments["fields"]}}
