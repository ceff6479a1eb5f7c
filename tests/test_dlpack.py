"""How the extension takes and gives tensors: the DLPack ABI against torch's header, what is refused, what is owned."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
CXX = [os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("probe") / "dlpack_probe.so"
    source = ROOT / "tests" / "dlpack_probe.cpp"
    include = sysconfig.get_path("include")
    sanitizers = os.environ.get("PYPPO_SANITIZE")
    extra = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []
    subprocess.run([*CXX, *extra, "-O1", "-shared", "-fPIC", f"-I{include}", source, "-o", path], check=True)
    spec = importlib.util.spec_from_file_location("dlpack_probe", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIELDS = {  # ours: theirs, {our field: their field}
    "DLDevice": ("DLDevice", {"type": "device_type", "id": "device_id"}),
    "DLDataType": ("DLDataType", {f: f for f in ("code", "bits", "lanes")}),
    "DLVersion": ("DLPackVersion", {"major": "major", "minor": "minor"}),
    "DLTensor": ("DLTensor", {f: f for f in ("data", "device", "ndim", "dtype", "shape", "strides", "byte_offset")}),
    "DLManagedTensor": (
        "DLManagedTensor",
        {"tensor": "dl_tensor", "context": "manager_ctx", "deleter": "deleter"},
    ),
    "DLManagedTensorVersioned": (
        "DLManagedTensorVersioned",
        {"version": "version", "context": "manager_ctx", "deleter": "deleter", "flags": "flags", "tensor": "dl_tensor"},
    ),
    "DLExchangeAPI": (
        "DLPackExchangeAPI",
        {
            "version": "header.version",
            "previous": "header.prev_api",
            "allocate": "managed_tensor_allocator",
            "managed_from_object": "managed_tensor_from_py_object_no_sync",
            "managed_to_object": "managed_tensor_to_py_object_no_sync",
            "tensor_from_object": "dltensor_from_py_object_no_sync",
            "current_work_stream": "current_work_stream",
        },
    ),
}
CONSTANTS = ["kDLCPU", "kDLCUDA", "kDLCUDAHost", "kDLInt", "kDLUInt", "kDLFloat", "kDLBfloat", "kDLBool"]


def test_abi_is_that_of_torchs_header(tmp_path: Path) -> None:
    lines = ["#include <cstddef>", "#include <ATen/dlpack.h>", '#include "dlpack_abi.h"']
    for ours, (theirs, fields) in FIELDS.items():
        lines.append(f"static_assert(sizeof(pyppo::{ours}) == sizeof(::{theirs}));")
        for a, b in fields.items():
            lines.append(f"static_assert(offsetof(pyppo::{ours}, {a}) == offsetof(::{theirs}, {b}));")
            lines.append(f"static_assert(sizeof(pyppo::{ours}::{a}) == sizeof(((::{theirs}*)0)->{b}));")
    lines += [f"static_assert(int(pyppo::{name}) == int(::{name}));" for name in CONSTANTS]
    lines += [
        "static_assert(pyppo::kDLReadOnly == DLPACK_FLAG_BITMASK_READ_ONLY);",
        "static_assert(DLPACK_MAJOR_VERSION == 1);",
    ]
    source = tmp_path / "abi.cpp"
    source.write_text("\n".join(lines))
    include = Path(torch.__file__).parent / "include"
    subprocess.run([*CXX, "-Wno-invalid-offsetof", f"-I{include}", "-fsyntax-only", source], check=True)


# ---- what is taken -------------------------------------------------------------------------------------------------

SIX = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def six() -> torch.Tensor:
    return torch.arange(6, dtype=torch.float64).reshape(2, 3)


@pytest.mark.parametrize(
    "make",
    [
        six,
        lambda: torch.nn.Parameter(six(), requires_grad=False),
        lambda: torch.cat([torch.zeros(3).double(), six().flatten()])[3:].reshape(2, 3),  # an offset into its storage
        lambda: six().t().contiguous().t(),  # strided: copied
        lambda: torch.stack([six(), six()], -1)[..., 0],
        lambda: six().numpy(),
        lambda: six().t().contiguous().t().numpy(),
        lambda: np.repeat(six().numpy(), 2, axis=1)[:, ::2],
        lambda: np.flip(np.flip(six().numpy()).copy()),  # negative strides
        lambda: misaligned(six().numpy()),
    ],
)
def test_memory_is_read_in_c_order(probe: ModuleType, make: Callable[[], Any]) -> None:
    assert probe.read(make()) == ("float64", 2, 6, SIX)


def test_gradients_are_not_lost_in_silence(probe: ModuleType) -> None:
    parameter = torch.nn.Parameter(six())
    assert probe.read_attached(parameter)[3] == SIX
    for take in (probe.read, probe.write):
        with pytest.raises(ValueError, match="requires grad; it must not"):
            take(parameter)


def test_lazily_negated_tensors_are_read_right_or_refused(probe: ModuleType) -> None:
    negated = torch.tensor([1 + 2j, 3 + 4j], dtype=torch.complex128).conj().imag
    assert negated.is_neg()
    assert probe.read(negated)[3] == [-2.0, -4.0]
    with pytest.raises(ValueError, match="rewards is a lazily negated view; it must be materialised"):
        probe.read(negated[:1])


def misaligned(array: np.ndarray) -> np.ndarray:
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def test_read_only_arrays_are_read(probe: ModuleType) -> None:
    array = six().numpy()
    array.flags.writeable = False
    assert probe.read(array)[3] == SIX


def test_expanded_scalars_and_empty_tensors_are_read(probe: ModuleType) -> None:
    assert probe.read(torch.ones(1).double().expand(2, 2))[3] == [1.0] * 4
    assert probe.read(torch.tensor(7.0, dtype=torch.float64)) == ("float64", 0, 1, [7.0])
    assert probe.read(torch.empty(0, 5, dtype=torch.float64)) == ("float64", 2, 0, [])
    assert probe.read(np.array(7.0)) == ("float64", 0, 1, [7.0])


def test_none_is_an_absent_tensor_where_that_is_allowed(probe: ModuleType) -> None:
    assert probe.read_optional(None) is None
    with pytest.raises(TypeError, match="rewards is None; it must be a tensor"):
        probe.read(None)


class OldProducer:
    """An array library from before DLPack 1: no `max_version`, an unversioned capsule."""

    def __dlpack__(self, stream: object = None) -> object:
        return six().numpy().__dlpack__()


def test_unversioned_capsules_are_taken(probe: ModuleType) -> None:
    assert probe.read(OldProducer())[3] == SIX


def test_many_types_pass_the_type_cache(probe: ModuleType) -> None:
    for i in range(20):
        kind = type(f"Sub{i}", (torch.Tensor,), {})
        assert probe.read(six().as_subclass(kind))[3] == SIX
        assert probe.read(six().numpy())[3] == SIX
        del kind
        gc.collect()


def test_nothing_is_leaked_or_freed_early(probe: ModuleType) -> None:
    strided, array = six().t().contiguous().t(), np.repeat(six().numpy(), 2, axis=1)[:, ::2]
    before = sys.getrefcount(strided), sys.getrefcount(array)
    for _ in range(100):
        probe.read(strided)
        probe.read(array)
        with pytest.raises(ValueError, match="out has shape"):
            probe.write(array)
    assert (sys.getrefcount(strided), sys.getrefcount(array)) == before


# ---- what is refused -----------------------------------------------------------------------------------------------


def fake() -> torch.Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(2, 3)


def freed() -> torch.Tensor:
    tensor = torch.zeros(2, 3)
    tensor.untyped_storage().resize_(0)
    return tensor


def frozen() -> np.ndarray:
    array = np.zeros((2, 3))
    array.flags.writeable = False
    return array


class Interrupted:
    def __dlpack__(self, **_: object) -> object:
        raise KeyboardInterrupt


class NoCapsule:
    def __dlpack__(self, **_: object) -> object:
        return 3


READS = {
    "int": (lambda: 3, TypeError, "has type int; it must be a tensor or an array"),
    "list": (lambda: [1.0], TypeError, "has type list"),
    "no capsule": (NoCapsule, TypeError, "gives no DLPack capsule"),
    "sparse": (lambda: six().to_sparse(), TypeError, "layout torch.sparse_coo.* must be a dense tensor"),
    "meta": (lambda: torch.zeros(2, 3, device="meta"), TypeError, "device meta.* must be a dense tensor"),
    "fake": (fake, ValueError, "has elements but no memory"),
    "zero": (lambda: torch._efficientzerotensor((2, 3)), ValueError, "has elements but no memory"),
    "freed": (freed, ValueError, "has elements but no memory"),
    "object array": (lambda: np.zeros((2, 3), object), TypeError, "dtype object.* must be a dense tensor"),
    "byte order": (lambda: np.zeros((2, 3), ">f8"), TypeError, "dtype >f8.* must be a dense tensor"),
}


@pytest.mark.parametrize("case", READS)
@pytest.mark.filterwarnings("ignore")
def test_unreadable_objects_are_refused_by_name(probe: ModuleType, case: str) -> None:
    make, error, message = READS[case]
    with pytest.raises(error, match=f"^rewards .*{message}") as caught:
        probe.read(make())
    assert "\n" not in str(caught.value)


def test_vmap_and_functorch_tensors_are_refused_by_name(probe: ModuleType) -> None:
    with pytest.raises(TypeError, match="^rewards has type Tensor"):
        torch.vmap(probe.read)(torch.zeros(4, 2, 3))


def test_interrupts_are_not_turned_into_errors(probe: ModuleType) -> None:
    with pytest.raises(KeyboardInterrupt):
        probe.read(Interrupted())


WRITES = {
    "strided torch": (lambda: torch.zeros(2, 6)[:, ::2], r"has shape \[2, 3\] and strides \[6, 2\]"),
    "expanded": (lambda: torch.zeros(1).expand(2, 3), r"strides \[0, 0\]"),
    "strided numpy": (lambda: np.zeros((2, 6))[:, ::2], r"strides \[6, 2\]"),
    "read-only": (frozen, "is read-only; it must be writable"),
    "misaligned": (lambda: misaligned(np.zeros((2, 3))), "is not aligned"),
}


@pytest.mark.parametrize("case", WRITES)
def test_outputs_are_never_copied(probe: ModuleType, case: str) -> None:
    make, message = WRITES[case]
    with pytest.raises(ValueError, match=f"^out .*{message}"):
        probe.write(make())


CHECKS = {
    "dtype": ((torch.zeros(2, 3).half(),), TypeError, "rewards has dtype float16; it must be float32 or float64"),
    "dtype int": ((torch.zeros(2, 3).long(),), TypeError, "rewards has dtype int64; it must be float32 or float64"),
    "dtype bool": ((np.zeros((2, 3), bool),), TypeError, "rewards has dtype bool; it must be float32 or float64"),
    "dtype complex": ((np.zeros((2, 3), complex),), TypeError, "rewards has dtype complex128"),
    "rank": ((torch.zeros(6),), ValueError, r"rewards has shape \[6\]; it must have the shape \[T, N\]"),
    "shape": ((torch.zeros(3, 2),), ValueError, r"rewards has shape \[3, 2\]; it must be \[T, N\] = \[2, 3\]"),
    "same dtype": ((torch.zeros(2, 3), six()), TypeError, "values has dtype float64; it must have rewards's float32"),
    "same shape": (
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        ValueError,
        r"values has shape \[3, 2\]; it must have rewards's \[2, 3\]",
    ),
    "overlap": (lambda x: (x[:2], x[1:]), ValueError, "values shares memory with rewards; it must have its own"),
}


@pytest.mark.parametrize("case", CHECKS)
def test_named_checks(probe: ModuleType, case: str) -> None:
    args, error, message = CHECKS[case]
    with pytest.raises(error, match=f"^{message}"):
        probe.check(*(args(torch.zeros(3, 3)) if callable(args) else args))


def test_named_checks_pass_what_is_right(probe: ModuleType) -> None:
    block = torch.zeros(4, 3)
    probe.check(block[:2], block[2:])  # neighbours do not overlap
    probe.check(block[:2])


# ---- what is given -------------------------------------------------------------------------------------------------


def test_new_tensors_are_torchs_own_and_outlive_each_other(probe: ModuleType) -> None:
    sizes = [3, 1, 0, 5, 5000, 7, 1]  # odd indices are dropped unused; 5,000 is too large to share
    made = probe.make(torch.zeros(1), sizes)
    for i, tensor in zip(range(0, len(sizes), 2), made, strict=True):
        assert type(tensor) is torch.Tensor
        assert tensor.shape == (sizes[i], 1)
        assert tensor.dtype == torch.float64
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
    kept = made[-1]
    del made, tensor
    gc.collect()
    kept += 1
    assert kept.item() == 7.0


def test_new_tensors_are_usable_in_autograd_and_in_place(probe: ModuleType) -> None:
    (tensor,) = probe.make(torch.zeros(1), [4])
    tensor.requires_grad_().sum().backward()
    assert torch.equal(tensor.grad, torch.ones(4, 1).double())


def test_memory_comes_back(probe: ModuleType) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists() or os.environ.get("PYPPO_SANITIZE"):
        pytest.skip("needs /proc, and an allocator that gives memory back at once")
    like = torch.zeros(1)
    probe.make(like, [500, 3])
    before = resident()
    for _ in range(20_000):  # 80 MB if nothing came back
        probe.make(like, [500, 3])
    assert resident() - before < 10 << 20


def test_arrays_cannot_make_tensors(probe: ModuleType) -> None:
    with pytest.raises(TypeError, match="like is an array without an allocator"):
        probe.make(np.zeros(1), [1])
