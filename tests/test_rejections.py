"""Bad calls: each is refused with a ValueError or TypeError that names the argument at fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from good_calls import FUNCTIONS, GOOD, LOSSES, expect, flags, floats
from torch.autograd import forward_ad

from pyppo import library, ops

NAN, INF = math.nan, math.inf
Change = Callable[[Any], Any]


# ---- what can be wrong with any tensor ---------------------------------------------------------------------------


WRONG_TENSORS: dict[str, tuple[type[Exception] | tuple[type[Exception], ...], Change]] = {
    "a list": (TypeError, lambda x: x.tolist()),
    "a string": (TypeError, lambda x: "x"),
    "complex": (TypeError, lambda x: x.to(torch.complex64)),
    "sparse": (TypeError, lambda x: x.to_sparse()),
    "on meta": ((TypeError, ValueError), lambda x: x.to("meta")),
    "one dimension more": (ValueError, lambda x: x.unsqueeze(0)),
    "one row less": (ValueError, lambda x: x[1:]),
    "one row more": (ValueError, lambda x: torch.cat([x, x[:1]])),
}
WRONG_FLOATS = {
    "float16": (TypeError, lambda x: x.half()),
    "another float dtype": (TypeError, lambda x: x.double()),
    "integers": (TypeError, lambda x: x.int()),
}
CONSTANT = {"requiring grad": (ValueError, lambda x: x.requires_grad_())}
WRONG_FLAGS = {
    "floats": (TypeError, lambda x: x.float()),
    "int64": (TypeError, lambda x: x.long()),
}
WRONG_OUTPUTS = {
    "not contiguous": (ValueError, lambda x: torch.stack([x, x], -1)[..., 0]),
    "expanded": (ValueError, lambda x: x[:1].expand(x.shape)),
}

# (a good call, its arguments, what may be wrong with each)
TENSORS: list[tuple[str, tuple[str, ...], tuple[dict[str, Any], ...]]] = [
    ("gae", ("rewards", "values", "final_values"), (WRONG_TENSORS, WRONG_FLOATS, CONSTANT)),
    ("gae", ("terminated", "truncated", "valid"), (WRONG_TENSORS, WRONG_FLAGS)),
    ("categorical", ("logits", "values"), (WRONG_TENSORS, WRONG_FLOATS)),
    ("categorical", ("old_logp", "advantages", "old_values", "returns"), (WRONG_TENSORS, WRONG_FLOATS, CONSTANT)),
    ("categorical", ("weights",), (WRONG_TENSORS, WRONG_FLOATS, CONSTANT)),
    ("categorical", ("action_mask",), (WRONG_TENSORS, WRONG_FLAGS)),
    ("normal", ("mean", "log_std"), (WRONG_TENSORS, WRONG_FLOATS)),
    ("normal", ("actions",), (WRONG_TENSORS, WRONG_FLOATS, CONSTANT)),
    ("surrogate", ("logp", "entropy", "kl", "values"), (WRONG_TENSORS, WRONG_FLOATS)),
    ("surrogate", ("old_logp", "advantages", "weights"), (WRONG_TENSORS, WRONG_FLOATS, CONSTANT)),
    ("sample", ("logits",), (WRONG_TENSORS,)),
    ("sample", ("action_mask",), (WRONG_TENSORS, WRONG_FLAGS)),
    ("sample_normal", ("log_std",), (WRONG_TENSORS, WRONG_FLOATS)),
    ("adam", ("params", "exp_avg", "exp_avg_sq"), (WRONG_TENSORS, WRONG_FLOATS, CONSTANT, WRONG_OUTPUTS)),
    ("adam", ("grads",), (WRONG_TENSORS, WRONG_FLOATS, CONSTANT)),
]
# Two tensors whose shapes must agree disagree: either may be the one that is named.
PARTNERS = {
    "rewards": ("values", "terminated"), "values": ("rewards",), "logits": ("actions", "action_mask", "old_logp"),
    "mean": ("log_std", "actions"), "log_std": ("mean",), "logp": ("entropy", "old_logp"), "params": ("grads",),
}  # fmt: skip


def tensor_rows() -> Iterator[Any]:
    for call, names, tables in TENSORS:
        for name in names:
            for table in tables:
                for problem, (error, change) in table.items():
                    yield pytest.param(call, name, error, change, id=f"{call}-{name}-{problem}")


@pytest.mark.parametrize("call", GOOD)
def test_the_good_calls_are_good(call: str) -> None:
    FUNCTIONS[call](**GOOD[call]())
    if call in LOSSES:
        ops.ppo_loss_grad(**GOOD[call]())


@pytest.mark.parametrize(("call", "name", "error", "change"), list(tensor_rows()))
def test_wrong_tensor(call: str, name: str, error: Any, change: Change) -> None:
    arguments = GOOD[call]()
    arguments[name] = change(arguments[name])
    shape_or_dtype = isinstance(arguments[name], torch.Tensor) and arguments[name].layout == torch.strided
    expect(call, arguments, error, (name, *(PARTNERS.get(name, ()) if shape_or_dtype else ())))


# ---- everything else: (good call, named argument, error, changes) -------------------------------------------------

MISSING = [
    ("gae", "rewards", TypeError, {"rewards": None}),
    ("gae", "values", TypeError, {"values": None}),
    ("gae", "terminated", TypeError, {"terminated": None}),
    ("categorical", "logits", ValueError, {"logits": None}),
    ("categorical", "actions", TypeError, {"actions": None}),
    ("categorical", "old_logp", TypeError, {"old_logp": None}),
    ("categorical", "advantages", TypeError, {"advantages": None}),
    ("categorical", "returns", ValueError, {"returns": None}),
    ("categorical", "values", ValueError, {"values": None}),
    ("categorical", "old_values", ValueError, {"old_values": None}),
    ("categorical", "old_logits", ValueError, {"objective": "kl", "kl_coef": 1.0}),
    ("normal", "log_std", ValueError, {"log_std": None}),
    ("normal", "mean", ValueError, {"mean": None, "distribution": "normal"}),
    ("normal", "old_mean", ValueError, {"objective": "kl", "kl_coef": 1.0}),
    ("normal", "old_log_std", ValueError, {"objective": "kl", "kl_coef": 1.0, "old_mean": floats(4, 3)}),
    ("normal", "old_mean", ValueError, {"old_log_std": floats(3)}),
    ("multi", "nvec", ValueError, {"nvec": None, "distribution": "multi_categorical"}),
    ("surrogate", "entropy", ValueError, {"entropy": None, "ent_coef": 0.1}),
    ("surrogate", "kl", ValueError, {"kl": None, "objective": "kl", "kl_coef": 1.0}),
    ("surrogate", "returns", ValueError, {"returns": None}),
    ("sample", "logits", ValueError, {"logits": None, "action_mask": None}),
    ("sample_normal", "log_std", ValueError, {"log_std": None}),
    ("adam", "learning_rate", TypeError, {"learning_rate": None}),
    ("adam", "step", TypeError, {"step": None}),
]
CONTRADICTING = [
    ("categorical", "mean", ValueError, {"mean": floats(4, 3), "distribution": "categorical"}),
    ("categorical", "log_std", ValueError, {"log_std": floats(3)}),
    ("categorical", "logits", ValueError, {"mean": floats(4, 3), "log_std": floats(3)}),
    ("categorical", "nvec", ValueError, {"nvec": (3,), "distribution": "categorical"}),
    ("categorical", "old_mean", ValueError, {"old_mean": floats(4, 3)}),
    ("normal", "action_mask", ValueError, {"action_mask": ~flags(4, 3)}),
    ("normal", "nvec", ValueError, {"nvec": (3,)}),
    ("normal", "old_logits", ValueError, {"old_logits": floats(4, 3)}),
    ("categorical", "dual_clip", ValueError, {"dual_clip": 2.0, "objective": "unclipped"}),
    ("sample_normal", "logits", ValueError, {"logits": floats(4, 3)}),
    ("sample_normal", "action_mask", ValueError, {"action_mask": ~flags(4, 3)}),
]
NUMBERS = [
    *[("gae", name, ValueError, {name: x}) for name in ("gamma", "gae_lambda") for x in (-0.1, 1.1, NAN, INF)],
    *[("gae", name, TypeError, {name: x}) for name in ("gamma", "gae_lambda") for x in ("0.9", None, floats(2))],
    *[
        (call, name, ValueError, {name: x})
        for call in ("categorical", "surrogate")
        for name, values in {
            "clip_coef": (-0.1, NAN, INF), "clip_coef_high": (-0.1, NAN), "dual_clip": (1.0, 0.5, NAN, -2.0),
            "value_clip_coef": (-0.2, NAN), "kl_coef": (-1.0, NAN, INF), "ent_coef": (NAN, INF),
            "vf_coef": (-0.5, NAN, INF), "denominator": (NAN, INF, 10**400),
        }.items()
        for x in values
    ],
    *[
        (call, name, TypeError, {name: "0.2"})
        for call in ("categorical", "surrogate")
        for name in ("clip_coef", "clip_coef_high", "dual_clip", "value_clip_coef", "kl_coef", "ent_coef", "vf_coef",
                     "denominator")
    ],
    *[("categorical", name, TypeError, {name: None}) for name in ("kl_coef", "ent_coef", "vf_coef")],
    *[("categorical", "objective", ValueError, {"objective": x}) for x in ("ppo", "", None, 3)],
    *[("categorical", "distribution", ValueError, {"distribution": x}) for x in ("gaussian", "", 3)],
    ("categorical", "denominator", ValueError, {"denominator": -1.0}),
    *[("categorical", "denominator", ValueError, {"denominator": torch.tensor(x)}) for x in (-1.0, NAN, INF)],
    ("categorical", "denominator", ValueError, {"denominator": floats(2)}),
    ("categorical", "denominator", TypeError, {"denominator": torch.tensor(4)}),
    ("categorical", "denominator", ValueError, {"denominator": torch.tensor(4.0, requires_grad=True)}),
    *[("adam", "learning_rate", ValueError, {"learning_rate": x}) for x in (-0.1, NAN, INF, 10**400, floats(2))],
    ("adam", "learning_rate", TypeError, {"learning_rate": "0.1"}),
    ("adam", "learning_rate", TypeError, {"learning_rate": torch.tensor(1)}),
    *[("adam", "betas", ValueError, {"betas": x}) for x in ((-0.1, 0.9), (0.9, 1.0), (NAN, 0.9), (0.9, INF))],
    *[("adam", "betas", (TypeError, ValueError), {"betas": x})
      for x in ((0.9,), 0.9, None, ("a", "b"), (0.9, 0.9, 0.9))],
    *[("adam", "eps", ValueError, {"eps": x}) for x in (-1e-8, NAN, INF)],
    *[("adam", "weight_decay", ValueError, {"weight_decay": x}) for x in (-0.1, NAN, INF)],
    *[("adam", "max_grad_norm", ValueError, {"max_grad_norm": x}) for x in (-1.0, 0.0, NAN)],
    *[("adam", name, TypeError, {name: "1"}) for name in ("eps", "weight_decay", "max_grad_norm")],
    *[("sample", "seed", (TypeError, ValueError), {"seed": x}) for x in (-1, 2**64, 1.5, "1", None)],
    *[("sample", "step", (TypeError, ValueError), {"step": x}) for x in (-1, 2**64, 1.5, "1", None)],
    *[("sample", "row_offset", (TypeError, ValueError), {"row_offset": x}) for x in (-1, 2**32, 2**63 - 1, 2**64, 0.5)],
    *[("permutation", "n", (TypeError, ValueError), {"n": x}) for x in (-1, 1.5, "5", None, 2**80)],
    *[("permutation", "seed", (TypeError, ValueError), {"seed": x}) for x in (-1, 2**64, 1.5, None)],
    *[("permutation", name, (TypeError, ValueError), {name: x}) for name in ("iteration", "epoch")
      for x in (-1, 2**32, 2**64, 1.5, "1", None)],
    *[("set_num_threads", "n", (TypeError, ValueError), {"n": x}) for x in (0, -1, 1.5, "2", None, 2**70)],
]  # fmt: skip
OUTPUTS = [
    ("permutation", "out", ValueError, {"out": torch.zeros(4, dtype=torch.int64)}),
    ("permutation", "out", ValueError, {"out": torch.zeros(5, 1, dtype=torch.int64)}),
    ("permutation", "out", ValueError, {"out": torch.zeros(10, dtype=torch.int64)[::2]}),
    ("permutation", "out", TypeError, {"out": torch.zeros(5, dtype=torch.int32)}),
    ("permutation", "out", TypeError, {"out": [0] * 5}),
    ("gae", "moments", ValueError, {"moments": torch.zeros(6, dtype=torch.float64)}),
    ("gae", "moments", ValueError, {"moments": torch.zeros(2, 4, dtype=torch.float64)}),
    ("gae", "moments", ValueError, {"moments": torch.zeros(3, 2, dtype=torch.float64).t()}),
    ("gae", "moments", TypeError, {"moments": torch.zeros(2, 3)}),
    ("gae", "moments", TypeError, {"moments": 3}),
    ("normalize", "out", ValueError, {"out": floats(4, 2)}),
    ("normalize", "out", TypeError, {"out": floats(4, 3).double()}),
    ("normalize", "out", ValueError, {"out": floats(3, 4).t()}),
    ("normalize", "mean", ValueError, {"mean": floats(4).double()}),
    ("normalize", "mean", TypeError, {"mean": floats(3)}),
    ("normalize", "var", ValueError, {"var": floats(1, 3).double()}),
    ("normalize", "var", TypeError, {"var": None}),
    ("normalize", "x", TypeError, {"x": floats(4, 3).half()}),
    ("normalize", "x", ValueError, {"x": torch.tensor(1.0)}),
    ("normalize", "x", ValueError, {"x": floats(4, 3).requires_grad_()}),
    *[("normalize", "clip", ValueError, {"clip": x}) for x in (0.0, -1.0, NAN)],
    *[("normalize", "eps", ValueError, {"eps": x}) for x in (-1e-8, NAN, INF)],
    *[("normalize", name, TypeError, {name: "1"}) for name in ("clip", "eps")],
    ("gae", "out", ValueError, {"out": (floats(2, 2), floats(3, 2))}),
    ("gae", "out", ValueError, {"out": (floats(3, 2), floats(3, 2, 1))}),
    ("gae", "out", TypeError, {"out": (floats(3, 2).double(), floats(3, 2))}),
    ("gae", "out", (TypeError, ValueError), {"out": (floats(3, 2),)}),
    ("gae", "out", (TypeError, ValueError), {"out": (floats(3, 2), floats(3, 2), floats(3, 2))}),
    ("gae", "out", (TypeError, ValueError), {"out": 3}),
    ("gae", "out", ValueError, {"out": (floats(2, 3).t(), floats(3, 2))}),
    ("gae", "out", ValueError, {"out": (floats(3, 2), floats(1, 2).expand(3, 2))}),
    ("gae", "out", ValueError, {"out": (floats(3, 2), floats(3, 2).requires_grad_())}),
    ("gae", "out", (TypeError, ValueError), {"out": (floats(3, 2), None)}),
]
ACTIONS = [
    *[("categorical", "actions", ValueError, {"actions": torch.tensor(x)})
      for x in ([0, 1, 2, 3], [-1, 0, 0, 0], [2**40, 0, 0, 0], [0, 0, 2**32, 0])],
    ("categorical", "actions", ValueError, {"actions": torch.tensor([0, 1, 2, -1], dtype=torch.int32)}),
    *[("categorical", "actions", TypeError, {"actions": torch.zeros(4, dtype=x)})
      for x in (torch.float32, torch.bool, torch.int8, torch.uint8, torch.int16)],
    ("categorical", "actions", ValueError, {"actions": torch.zeros(4, 1, dtype=torch.int64)}),
    ("categorical", "actions", ValueError, {"actions": torch.zeros(3, dtype=torch.int64)}),
    ("multi", "actions", ValueError, {"actions": torch.tensor([[0, 0], [2, 0], [0, 0], [0, 0]])}),
    ("multi", "actions", ValueError, {"actions": torch.tensor([[0, 0], [0, 3], [0, 0], [0, 0]])}),
    ("multi", "actions", ValueError, {"actions": torch.zeros(4, 3, dtype=torch.int64)}),
    ("multi", "actions", ValueError, {"actions": torch.zeros(4, dtype=torch.int64)}),
    ("bernoulli", "actions", ValueError, {"actions": torch.full((4, 3), 2)}),
    ("bernoulli", "actions", ValueError, {"actions": torch.full((4, 3), -1)}),
    ("bernoulli", "actions", TypeError, {"actions": torch.ones(4, 3)}),
    ("bernoulli", "actions", ValueError, {"action_mask": flags(4, 3)}),  # a 1 where only 0 is possible
    ("categorical", "actions", ValueError, {"action_mask": torch.tensor([[1, 1, 0]] * 4).bool()}),
    ("categorical", "action_mask", ValueError, {"action_mask": torch.tensor([[1, 1, 1]] * 3 + [[0, 0, 0]]).bool()}),
    ("categorical", "logits", ValueError, {"logits": torch.full((4, 3), -INF)}),
    ("multi", "logits", ValueError, {"logits": torch.tensor([[-INF, -INF, 0.0, 0.0, 0.0]] * 4)}),
    ("multi", "action_mask", ValueError, {"action_mask": torch.tensor([[1, 1, 0, 0, 0]] * 4).bool()}),
    ("sample", "action_mask", ValueError, {"action_mask": flags(4, 3)}),
    ("sample", "logits", ValueError, {"logits": torch.full((4, 3), -INF)}),
    ("sample", "logits", ValueError, {"logits": torch.full((4, 3), NAN)}),
    ("sample", "logits", ValueError, {"logits": torch.full((4, 3), INF)}),
    ("sample_normal", "mean", ValueError, {"mean": torch.full((4, 3), NAN)}),
    ("sample_normal", "mean", ValueError, {"mean": torch.full((4, 3), -INF)}),
    ("sample_normal", "log_std", ValueError, {"log_std": torch.full((4, 3), NAN)}),
    ("sample", "logits", ValueError, {"logits": torch.zeros(4, 0), "action_mask": None}),
    *[("multi", "nvec", ValueError, {"nvec": x}) for x in ((2, 2), (2, 4), (5, 0), (), (6, -1), (0, 5))],
    *[("multi", "nvec", TypeError, {"nvec": x}) for x in (5, "ab", (2.0, 3.0), (2, None))],
    *[("sample_multi", "nvec", ValueError, {"nvec": x}) for x in ((2, 2), ())],
    ("sample_multi", "step", ValueError, {"step": torch.arange(3)}),
    ("sample_multi", "step", ValueError, {"step": torch.arange(4) - 1}),
    ("sample_multi", "step", TypeError, {"step": torch.arange(4).float()}),
    ("sample_multi", "step", TypeError, {"step": torch.arange(4).int()}),
]  # fmt: skip
SCALARS = [
    ("adam", "step", ValueError, {"step": torch.zeros(2, dtype=torch.int64)}),
    ("adam", "step", TypeError, {"step": torch.zeros(1)}),
    ("adam", "step", TypeError, {"step": torch.zeros(1, dtype=torch.int32)}),
    ("adam", "step", TypeError, {"step": 3}),
    ("adam", "learning_rate", ValueError, {"learning_rate": torch.tensor(-0.1)}),
    ("adam", "skip", ValueError, {"skip": flags(2)}),
    ("adam", "skip", TypeError, {"skip": torch.zeros(1)}),
    ("adam", "params", ValueError, {"params": floats(2, 3), "grads": floats(2, 3), "exp_avg": floats(2, 3),
                                    "exp_avg_sq": floats(2, 3)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "name", "error", "changes"),
    [pytest.param(*row, id=f"{row[0]}-{row[1]}-{i}") for i, row in enumerate(
        [*MISSING, *CONTRADICTING, *NUMBERS, *OUTPUTS, *ACTIONS, *SCALARS])],
)  # fmt: skip
def test_refused(call: str, name: str, error: Any, changes: dict[str, Any]) -> None:
    expect(call, {**GOOD[call](), **changes}, error, (name, "count") if call == "set_num_threads" else (name,))


def overlap_rows() -> Iterator[Any]:
    for name in ("rewards", "final_values", "values", "terminated"):
        for position in (0, 1):
            yield "gae", name, position
    for output in ("params", "exp_avg", "exp_avg_sq"):
        for other in ("params", "grads", "exp_avg", "exp_avg_sq"):
            if output != other:
                yield "adam", output, other


@pytest.mark.parametrize(("call", "first", "second"), list(overlap_rows()))
def test_outputs_must_have_their_own_memory(call: str, first: str, second: Any) -> None:
    arguments = GOOD[call]()
    if call == "gae":
        memory = torch.zeros(64)
        out = list(arguments["out"])
        out[second] = memory[:6].view(3, 2)
        shared = memory[2:10].view(4, 2)[: arguments[first].shape[0]]
        arguments[first] = shared if first != "terminated" else memory.view(torch.bool)[5:11].view(3, 2)
        expect(call, arguments | {"out": tuple(out)}, ValueError, ("out",))
        return
    memory = torch.ones(11)
    arguments[first], arguments[second] = memory[:6], memory[5:]
    expect(call, arguments, ValueError, (first, second))


def test_both_outputs_of_gae_are_one() -> None:
    arguments, out = GOOD["gae"](), floats(3, 2)
    expect("gae", arguments | {"out": (out, out)}, ValueError, ("out",))


def negative_view(x: torch.Tensor) -> torch.Tensor:
    """x, but stored as -x with torch's lazy negation bit."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    assert torch.equal(view, x)
    return view


@pytest.mark.parametrize("name", ["logits", "values", "old_logp", "advantages", "old_values", "returns", "weights"])
@pytest.mark.parametrize("rows", [1, 4])
def test_negative_views_are_read_right_or_refused(name: str, rows: int) -> None:
    """DLPack shows the memory and not the bit; believing it would flip the sign."""
    good = {k: v[:rows] if isinstance(v, torch.Tensor) else v for k, v in GOOD["categorical"]().items()}
    good["logits"], good["action_mask"] = good["logits"][:, :1], None
    good["actions"] = torch.zeros(rows, dtype=torch.int64)
    negated = good | {name: negative_view(good[name])}
    if rows == 1:  # one element is contiguous, and would be read as it lies
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            ops.ppo_loss(**negated)
    else:
        assert torch.equal(ops.ppo_loss(**negated)[0], ops.ppo_loss(**good)[0])


def test_neighbouring_memory_is_no_overlap() -> None:
    memory = torch.ones(24)
    names = ("params", "grads", "exp_avg", "exp_avg_sq")
    ops.adam(**GOOD["adam"]() | {name: memory[6 * i : 6 * i + 6] for i, name in enumerate(names)})


def test_read_only_numpy_output() -> None:
    arguments = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in GOOD["gae"]().items()}
    out = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32)
    ops.gae(**arguments | {"out": out})
    out[1].flags.writeable = False
    expect("gae", arguments | {"out": out}, ValueError, ("out",))


def test_read_only_numpy_input_is_fine() -> None:
    arguments = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in GOOD["gae"]().items()}
    del arguments["out"]
    for x in arguments.values():
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    assert np.isfinite(ops.gae(**arguments)[0]).all()


@pytest.mark.parametrize("dtype", [">f4", "f2", "c8", "i4", "O", "U3", "M8[s]"])
def test_wrong_numpy_dtypes(dtype: str) -> None:
    arguments = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in GOOD["gae"]().items()}
    del arguments["out"]
    arguments["rewards"] = np.zeros((3, 2), dtype)
    expect("gae", arguments, (TypeError, ValueError), ("rewards",))


@pytest.mark.parametrize("name", ["logits", "mean", "log_std", "values"])
def test_loss_gradients_at_once_take_no_graph(name: str) -> None:
    call = "categorical" if name in ("logits", "values") else "normal"
    arguments = GOOD[call]()
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        ops.ppo_loss_grad(**arguments)


def test_error_names_the_first_bad_row() -> None:
    arguments = GOOD["categorical"]()
    arguments["actions"] = torch.tensor([0, 2, 7, 9])
    with pytest.raises(ValueError, match=r"actions.*row 2\b"):
        ops.ppo_loss(**arguments)
    arguments = GOOD["categorical"]()
    arguments["action_mask"][3] = False
    arguments["actions"][3] = 0
    with pytest.raises(ValueError, match=r"row 3\b"):
        ops.ppo_loss(**arguments)


def test_losses_take_keywords_only() -> None:
    for function in (ops.ppo_loss, ops.ppo_loss_grad, ops.surrogate_loss, ops.sample):
        with pytest.raises(TypeError, match="positional"):
            function(floats(4, 3))


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="clip_epsilon"):
        ops.ppo_loss(**GOOD["categorical"](), clip_epsilon=0.1)


def test_a_refused_call_changes_nothing() -> None:
    arguments = GOOD["adam"]()
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(ValueError, match="eps"):
        ops.adam(**arguments, eps=-1.0)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


def test_inside_vmap() -> None:
    arguments = GOOD["gae"]()
    del arguments["out"], arguments["rewards"]
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.vmap(lambda x: ops.gae(x, **arguments))(floats(5, 3, 2))


def test_there_are_enough_rows() -> None:
    rows = [*MISSING, *CONTRADICTING, *NUMBERS, *OUTPUTS, *ACTIONS, *SCALARS, *tensor_rows(), *overlap_rows()]
    assert len(rows) >= 100


def test_out_is_of_the_inputs_kind() -> None:
    rewards, values, flags = torch.randn(5, 2), torch.randn(6, 2), torch.zeros(5, 2, dtype=torch.bool)
    out = (np.zeros((5, 2), np.float32), np.zeros((5, 2), np.float32))
    with pytest.raises(TypeError, match="out"):
        ops.gae(rewards, values, flags, flags, out=out)
    assert not out[0].any()
    with pytest.raises(TypeError, match="out"):
        ops.gae(rewards.numpy(), values.numpy(), flags.numpy(), flags.numpy(), out=(rewards, rewards.clone()))


def test_a_contiguous_negative_view_is_refused() -> None:
    z = torch.randn(8, dtype=torch.complex64)
    rewards = z.conj().imag.as_strided((4, 2), (2, 1))
    assert rewards.is_neg()
    assert rewards.is_contiguous()
    with pytest.raises(ValueError, match="rewards"):
        ops.gae(rewards, torch.zeros(5, 2), torch.zeros(4, 2).bool(), torch.zeros(4, 2).bool())


TANGENTS = [
    ("gae", "rewards"), ("gae", "final_values"), ("categorical", "logits"), ("categorical", "advantages"),
    ("surrogate", "logp"), ("sample", "logits"), ("adam", "grads"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name"), TANGENTS)
def test_forward_mode_derivatives_are_refused(call: str, name: str) -> None:
    arguments = GOOD[call]()
    with forward_ad.dual_level():
        FUNCTIONS[call](**arguments)  # nothing to lose
        arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        with pytest.raises(ValueError, match=f"{name} has a tangent"):
            FUNCTIONS[call](**arguments)


def test_numpy_scalars_are_numbers() -> None:
    logits = torch.zeros(3, 2)
    drawn = ops.sample(logits=logits, seed=int(np.int64(1)), step=np.int64(3))
    assert torch.equal(drawn.actions, ops.sample(logits=logits, seed=1, step=3).actions)


def test_flags_first_asked_for_in_inference_mode_can_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a trainer's first call does, which samples; the flags are on the CPU for this test."""
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *size, device, **given: full(*size, **given))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(library, "error_flags", {})
    with torch.inference_mode():
        library.device_errors(3)[0] = 7
    with pytest.raises(ValueError, match="actions has an impossible action in row 7"):
        ops.check_errors("cuda:3")
    ops.check_errors("cuda:3")


def test_check_errors_knows_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note on cuda:0 is found under "cuda"; the flags themselves may be anywhere for this test."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setitem(library.error_flags, torch.device("cuda", 0), torch.tensor([7, -1, -1]))
    with pytest.raises(ValueError, match="actions has an impossible action in row 7"):
        ops.check_errors()
    ops.check_errors()  # read once
    library.error_flags[torch.device("cuda", 0)][2] = 5
    with pytest.raises(ValueError, match="out of range for slot 5 of a minibatch"):
        ops.check_errors()
