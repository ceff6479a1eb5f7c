"""How exact: a kernel's float32 error is at most about twice plain torch's, and scalar.h keeps its word."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from cases import (
    FAMILIES,
    PLAIN,
    cast,
    coin,
    family_parameters,
    generator,
    loss_case,
    normal,
    surrogate_case,
    with_gradients,
)

from pyppo import ops, reference

SEEDS = range(20)
OPTIONS = {**PLAIN, "value_clip_coef": 0.2, "kl_coef": 0.5, "norm_adv": True}
Outputs = dict[str, torch.Tensor]


def check_at_most_twice(kernel: Callable[[int, torch.dtype], Outputs], plain: Callable[..., Outputs]) -> None:
    """Root mean square errors over all inputs, against float64, for each output; half an ulp is forgiven."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    scale: dict[str, float] = {}
    for seed in SEEDS:
        exact = plain(seed, torch.float64)
        found, torchs = kernel(seed, torch.float32), plain(seed, torch.float32)
        for name, x in exact.items():
            scale[name] = scale.get(name, 0.0) + float(x.square().mean())
            ours[name] = ours.get(name, 0.0) + float((found[name].double() - x).square().mean())
            theirs[name] = theirs.get(name, 0.0) + float((torchs[name].double() - x).square().mean())
    for name, squares in scale.items():
        a, b, size = (math.sqrt(x / len(SEEDS)) for x in (ours[name], theirs[name], squares))
        assert a <= 2 * b + 6e-8 * size, f"{name}: error {a:.3g}, plain torch {b:.3g}, of {size:.3g}"


def float32_values(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The numbers of the float32 inputs, in `dtype`: the exact answer is that of the same inputs."""
    return cast(cast(case, torch.float32), dtype)


def flatten(result: tuple[Any, Any, Outputs]) -> Outputs:
    loss, metrics, grads = result
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "kl")
    return {"loss": loss} | {n: torch.tensor(metrics[n]) for n in names} | grads


@pytest.mark.parametrize("shape", [(128, 64), (500, 3), (16, 1000)])
def test_gae_numerics(shape: tuple[int, int]) -> None:
    def inputs(seed: int, dtype: torch.dtype) -> dict[str, Any]:
        g = generator(seed)
        steps, envs = shape
        case = {"rewards": normal(g, steps, envs), "values": 5 + normal(g, steps + 1, envs)}
        case |= {"terminated": coin(g, 0.02, steps, envs), "truncated": coin(g, 0.02, steps, envs)}
        return float32_values(case, dtype)

    def run(function: Any) -> Callable[[int, torch.dtype], Outputs]:
        return lambda seed, dtype: dict(zip("AR", function(**inputs(seed, dtype)), strict=True))

    check_at_most_twice(run(ops.gae), run(reference.gae))


@pytest.mark.parametrize("objective", ["clip", "kl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ppo_loss_numerics(family: str, objective: str) -> None:
    options = {**OPTIONS, "objective": objective}

    def run(function: Any) -> Callable[[int, torch.dtype], Outputs]:
        def outputs(seed: int, dtype: torch.dtype) -> Outputs:
            case = loss_case(seed, family, 2000, 7, options, weights="float")
            return flatten(with_gradients(function, float32_values(case, dtype)))

        return outputs

    check_at_most_twice(run(ops.ppo_loss), run(reference.ppo_loss))


def test_surrogate_loss_numerics() -> None:
    def run(function: Any) -> Callable[[int, torch.dtype], Outputs]:
        def outputs(seed: int, dtype: torch.dtype) -> Outputs:
            case = surrogate_case(seed, (3000,), {**OPTIONS, "objective": "kl"})
            return flatten(with_gradients(function, float32_values(case, dtype), ("logp", "entropy", "values", "kl")))

        return outputs

    check_at_most_twice(run(ops.surrogate_loss), run(reference.surrogate_loss))


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_numerics(family: str) -> None:
    def inputs(seed: int, dtype: torch.dtype) -> dict[str, Any]:
        return float32_values(family_parameters(generator(seed), family, 2000, 7), dtype)

    def kernel(seed: int, dtype: torch.dtype) -> Outputs:
        drawn = ops.sample(**inputs(seed, dtype), seed=seed)
        return {"logp": drawn.logp, "entropy": drawn.entropy}

    def plain(seed: int, dtype: torch.dtype) -> Outputs:
        actions = ops.sample(**inputs(seed, torch.float32), seed=seed).actions
        d = reference.make_distribution(**inputs(seed, dtype))
        return {"logp": d.log_prob(actions.to(dtype) if family == "normal" else actions), "entropy": d.entropy()}

    check_at_most_twice(kernel, plain)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_adam_numerics(max_grad_norm: float | None) -> None:
    def run(function: Any) -> Callable[[int, torch.dtype], Outputs]:
        def outputs(seed: int, dtype: torch.dtype) -> Outputs:
            g = generator(seed)
            state = {"params": 0.1 * normal(g, 5000), "exp_avg": torch.zeros(5000), "exp_avg_sq": torch.zeros(5000)}
            state = float32_values(state, dtype)
            start, step = state["params"].double().clone(), torch.zeros(1, dtype=torch.int64)
            for _ in range(20):
                grads = normal(g, 5000).float().to(dtype)
                norm = function(**state, grads=grads, step=step, learning_rate=1e-3, max_grad_norm=max_grad_norm)
            return {**state, "moved": state["params"].double() - start, "norm": norm}

        return outputs

    check_at_most_twice(run(ops.adam), run(reference.adam))


# ---- scalar.h ----------------------------------------------------------------------------------------------------

HEADERS = Path(__file__).parent.parent / "csrc" / "math"
SOURCE = """
#include "scalar.h"
using namespace pyppo::math;
template <class T> T sine(T turn) { T s, c; sincos_turn(turn, s, c); return s; }
template <class T> T cosine(T turn) { T s, c; sincos_turn(turn, s, c); return c; }
namespace wrapped {
#define FORWARD(name) template <class T> T name(T x) { return pyppo::math::name(x); }
FORWARD(exp) FORWARD(log) FORWARD(log1p) FORWARD(sigmoid) FORWARD(softplus)
}
#define WRAP_AS(symbol, name) \\
  extern "C" void symbol##_f32(const float* x, float* y, long n) { for (long i = 0; i < n; ++i) y[i] = name(x[i]); } \\
  extern "C" void symbol##_f64(const double* x, double* y, long n) { for (long i = 0; i < n; ++i) y[i] = name(x[i]); }
WRAP_AS(k_exp, wrapped::exp) WRAP_AS(k_log, wrapped::log) WRAP_AS(k_log1p, wrapped::log1p)
WRAP_AS(k_sigmoid, wrapped::sigmoid) WRAP_AS(k_softplus, wrapped::softplus)
WRAP_AS(k_sine, sine) WRAP_AS(k_cosine, cosine)
"""


@pytest.fixture(scope="module")
def scalar_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not HEADERS.is_dir():
        pytest.skip("needs a C++ compiler and csrc/ beside tests/")
    folder = tmp_path_factory.mktemp("scalar")
    source, library = folder / "scalar.cpp", folder / "scalar.so"
    source.write_text(SOURCE)
    options = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", f"-I{HEADERS}"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def evaluate(library: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    suffix = "f32" if x.dtype == np.float32 else "f64"
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, y)]
    getattr(library, f"k_{name}_{suffix}")(*pointers, ctypes.c_long(x.size))
    return y


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """The correctly rounded value in long double, from 50 digits."""
    functions: dict[str, Any] = {
        "exp": mpmath.exp,
        "log": mpmath.log,
        "log1p": mpmath.log1p,
        "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)),
        "softplus": lambda v: mpmath.log1p(mpmath.exp(v)),
        "sine": lambda v: mpmath.sin(2 * mpmath.pi * v),
        "cosine": lambda v: mpmath.cos(2 * mpmath.pi * v),
    }
    with mpmath.workdps(50):
        return np.array([np.longdouble(mpmath.nstr(functions[name](mpmath.mpf(float(v))), 25)) for v in x])


def grid(low: float, high: float, dtype: type, count: int = 4000) -> np.ndarray:
    random = np.random.default_rng(1).uniform(low, high, count)
    return np.concatenate([random, np.linspace(low, high, 501)]).astype(dtype)


# Function, range in float and in double, and the error scalar.h promises: in ulp of the value, and in ulp of 1.
ACCURACY = [
    ("exp", (-87.0, 88.0), (-708.0, 709.0), 1.5, 0.0),
    ("exp", (-1.0, 1.0), (-1.0, 1.0), 1.5, 0.0),
    ("log", (1e-30, 1e30), (1e-300, 1e300), 1.5, 0.0),
    ("log", (0.001, 0.5), (0.001, 0.5), 1.5, 0.0),
    ("log", (0.5, 2.0), (0.5, 2.0), 0.0, 1.0),
    ("log1p", (0.0, 1.0), (0.0, 1.0), 2.0, 0.0),
    ("sigmoid", (-80.0, 80.0), (-700.0, 700.0), 4.0, 0.0),
    ("softplus", (-80.0, 80.0), (-700.0, 700.0), 4.0, 0.0),
    ("sine", (0.0, 1.0), (0.0, 1.0), 0.0, 2.0),
    ("cosine", (0.0, 1.0), (0.0, 1.0), 0.0, 2.0),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "single", "double", "relative", "absolute"), ACCURACY)
def test_scalar_accuracy(
    scalar_library: ctypes.CDLL,
    name: str,
    single: tuple[float, float],
    double: tuple[float, float],
    relative: float,
    absolute: float,
    dtype: type,
) -> None:
    x = grid(*(single if dtype == np.float32 else double), dtype, 4000 if dtype == np.float32 else 1500)
    expected = exact(name, x)
    wrong = np.abs(evaluate(scalar_library, name, x).astype(np.longdouble) - expected)
    ulp = np.spacing(np.abs(expected.astype(dtype)))
    worst = int(np.argmax(wrong - relative * ulp))
    assert (wrong <= relative * ulp + absolute * np.finfo(dtype).eps).all(), (
        f"{name}({x[worst]!r}) is off by {float(wrong[worst] / ulp[worst]):.3g} ulp"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalar_limits(scalar_library: ctypes.CDLL, dtype: type) -> None:
    inf, nan = np.inf, np.nan
    cases = {
        "exp": ([0.0, -0.0, -inf, inf, -1e5, 1e5], [1.0, 1.0, 0.0, inf, 0.0, inf]),
        "log": ([1.0, 0.0, inf], [0.0, -inf, inf]),
        "sigmoid": ([0.0, -inf, inf, -1e5, 1e5], [0.5, 0.0, 1.0, 0.0, 1.0]),
        "softplus": ([-inf, inf, -1e5, 1e5], [0.0, inf, 0.0, 1e5]),
        "sine": ([0.0, 0.25, 0.75], [0.0, 1.0, -1.0]),
        "cosine": ([0.0, 0.5], [1.0, -1.0]),
    }
    for name, (inputs, outputs) in cases.items():
        found = evaluate(scalar_library, name, np.array(inputs, dtype))
        np.testing.assert_array_equal(found, np.array(outputs, dtype), err_msg=name)
    largest = np.log(np.finfo(dtype).max)
    around = np.array([np.nextafter(largest, dtype(0)), largest + dtype(1e-3), -largest, dtype(-1.5) * largest], dtype)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(evaluate(scalar_library, "exp", around)[:2], [np.finfo(dtype).max, inf], rtol=1e-4)
    assert (evaluate(scalar_library, "exp", around)[2:] == 0).all()
    for name in ("exp", "log", "sigmoid", "softplus"):
        assert np.isnan(evaluate(scalar_library, name, np.array([nan], dtype))).all(), name
    assert np.isnan(evaluate(scalar_library, "log", np.array([-1.0, -inf], dtype))).all()
    tiny = np.finfo(dtype).smallest_subnormal
    np.testing.assert_allclose(
        evaluate(scalar_library, "log", np.array([tiny], dtype)), np.log(np.array([tiny], dtype)), rtol=1e-6
    )
