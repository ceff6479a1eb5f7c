"""The kernels as functions on torch tensors: CPU and CUDA, float32 and float64.

Tensors are C-contiguous or copied; all of one call are on one device and, where floating, of one dtype (on CUDA the
network's outputs may be float16 or bfloat16; everything else is float32 then). A wrong dtype, shape, device or value
raises a ``TypeError`` or ``ValueError`` that names the argument. Under ``torch.compile`` the same functions trace to
registered operators (see ``library.py``), without a graph break.

CUDA calls do not synchronise: an action or index out of range is clamped there and noted on the device;
``check_errors`` reads the note and raises.
"""

from __future__ import annotations

from pyppo import _C
from pyppo._C import build_info, cpu_capability, get_num_threads, set_num_threads
from pyppo._C import set_alone as set_alone  # for pyppo.cores; no public name
from pyppo.ops.advantages import gae
from pyppo.ops.errors import check_errors
from pyppo.ops.losses import ppo_loss, ppo_loss_grad, surrogate_loss
from pyppo.ops.observations import normalize
from pyppo.ops.sampling import sample
from pyppo.ops.updating import adam, gather_minibatch, permutation
from pyppo.results import LossGrads, LossMetrics, Sample

__all__ = [
    "LossGrads",
    "LossMetrics",
    "MlpEngine",
    "PoolReader",
    "PoolSender",
    "Sample",
    "adam",
    "build_info",
    "check_errors",
    "cpu_capability",
    "gae",
    "gather_minibatch",
    "get_num_threads",
    "normalize",
    "permutation",
    "ppo_loss",
    "ppo_loss_grad",
    "sample",
    "set_num_threads",
    "surrogate_loss",
]

MlpEngine = _C.MlpEngine
"""An MLP policy's forward pass, sampling and whole update on the CPU; `pyppo.engines.native_engine` drives it."""

PoolReader = _C.PoolReader
"""EnvPool's answers written to where a rollout keeps them; `pyppo.envpool_envs` drives it."""

PoolSender = _C.PoolSender
"""Actions checked, copied and sent to EnvPool; `pyppo.envpool_envs` drives it."""
