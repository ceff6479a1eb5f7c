"""The build: no torch needed, the right instruction set and CUDA decision, only system libraries linked."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pyppo import _C

ROOT = Path(__file__).parents[1]
EXTENSION = Path(_C.__file__)
ISAS = _C.build_info()["cpu_isas"].split(",")

# Loads the extension by its path, without the package, in an interpreter where torch cannot be imported.
LOAD = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("pyppo._C", {str(EXTENSION)!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env={**os.environ, **env})


def test_the_extension_loads_without_torch() -> None:
    done = python(LOAD + "print(_C.build_info()['version'])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == _C.build_info()["version"]


@pytest.mark.parametrize("isa", ISAS)
def test_the_instruction_set_can_be_chosen(isa: str) -> None:
    done = python(LOAD + "print(_C.cpu_capability())", PYPPO_CPU=isa)
    if "which this CPU lacks" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.stdout.strip() == isa, done.stderr


def test_an_unknown_instruction_set_is_an_error_that_names_the_known_ones() -> None:
    done = python(LOAD + "print(_C.cpu_capability())", PYPPO_CPU="sse9")
    assert done.returncode == 1
    assert re.search("PYPPO_CPU is 'sse9'; it must be avx512, avx2 or portable", done.stderr)


def test_the_build_describes_itself() -> None:
    info = _C.build_info()
    assert {"version", "compiler", "cpu_isas", "cuda_status", "cuda_version", "cuda_archs"} <= set(info)
    assert bool(info["cuda_version"]) == bool(info["cuda_archs"])
    if platform.machine() == "x86_64":
        assert info["cpu_isas"] == "avx512,avx2,portable"


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_only_the_systems_libraries_are_linked() -> None:
    if _C.build_info()["sanitizers"]:
        pytest.skip("a sanitizer build links its runtime")
    out = subprocess.run(["readelf", "-d", EXTENSION], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", out)
    system = re.compile(r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux[-\w]*)\.so(\.\d+)?")
    assert not [name for name in needed if not system.fullmatch(name)]


def test_the_extension_is_small() -> None:
    assert EXTENSION.stat().st_size < 20 << 20


# ---- slow: these configure or build --------------------------------------------------------------------------------


def configure(folder: Path, **env: str) -> tuple[int, str]:
    """Exit status and output, in one line, of CMake's configuration, which decides about CUDA. It needs no Ninja."""
    pybind11 = pytest.importorskip("pybind11")
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    options.append(f"-DPYPPO_CUDA={env['PYPPO_CUDA']}")
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, *options], capture_output=True, text=True, env={**os.environ, **env}
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> str:
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\necho 'nvcc fatal: no host compiler' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_required_cuda_without_nvcc_is_a_clear_error(tmp_path: Path) -> None:
    status, output = configure(tmp_path / "build", PYPPO_CUDA="1", CUDACXX="/nonexistent/nvcc")
    assert status != 0
    assert "PYPPO_CUDA=1, but there is no nvcc at /nonexistent/nvcc" in output


@pytest.mark.slow
def test_no_nvcc_is_a_build_without_cuda(tmp_path: Path) -> None:
    status, output = configure(tmp_path / "build", PYPPO_CUDA="auto", CUDACXX="/nonexistent/nvcc")
    assert status == 0, output
    assert "CUDA: left out (no nvcc" in output


@pytest.mark.slow
def test_required_cuda_with_a_broken_nvcc_is_a_clear_error(tmp_path: Path, broken_nvcc: str) -> None:
    status, output = configure(tmp_path / "build", PYPPO_CUDA="1", CUDACXX=broken_nvcc)
    assert status != 0
    assert re.search("PYPPO_CUDA=1, but .* cannot compile for sm_80 and sm_90: nvcc fatal: no host compiler", output)


@pytest.mark.slow
def test_a_broken_nvcc_is_a_warning_and_a_build_without_cuda(tmp_path: Path, broken_nvcc: str) -> None:
    status, output = configure(tmp_path / "build", PYPPO_CUDA="auto", CUDACXX=broken_nvcc)
    assert status == 0, output
    assert re.search("CMake Warning .* cannot compile .* building without CUDA", output)
    assert "CUDA: left out (nvcc was found but does not work)" in output


@pytest.mark.slow
def test_cuda_can_be_left_out(tmp_path: Path) -> None:
    status, output = configure(tmp_path / "build", PYPPO_CUDA="0")
    assert status == 0, output
    assert "CUDA: left out (PYPPO_CUDA=0)" in output


@pytest.mark.slow
def test_another_value_of_pyppo_cuda_is_refused(tmp_path: Path) -> None:
    status, output = configure(tmp_path / "build", PYPPO_CUDA="yes")
    assert status != 0
    assert "PYPPO_CUDA is 'yes'; it must be 0" in output


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel as a user's pip builds it: isolated, from the build requirements alone."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, ROOT], check=True)
    return next(folder.glob("pyppo-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_typed_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"pyppo/__init__.py", "pyppo/py.typed", "pyppo/_C.pyi", "pyppo/engines/torch_engine.py"} <= names
    assert sum(name.startswith("pyppo/_C.") and name.endswith(".so") for name in names) == 1
    assert not [name for name in names if name.startswith(("tests", "csrc", "bench"))]
    assert wheel.stat().st_size < 20 << 20


@pytest.mark.slow
def test_the_wheels_extension_works_with_numpy_alone(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    alone = [tmp_path / "env" / "bin" / "python", "-I"]
    subprocess.run([*alone, "-m", "pip", "install", "-q", "numpy"], check=True)
    subprocess.run([*alone, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    code = """
import sys
import numpy as np
from pyppo import _C

rewards, values = np.ones((2, 1), np.float32), np.zeros((3, 1), np.float32)
flags = np.array([[0], [1]], np.uint8)
advantages, returns = np.empty_like(rewards), np.empty_like(rewards)
_C.gae(rewards, values, flags, np.zeros_like(flags), None, None, advantages, returns, 0.5, 1.0, None)
assert advantages.tolist() == [[1.5], [1.0]], advantages  # 1 + 0.5 * 1, then 1
assert returns.tolist() == advantages.tolist()
assert "torch" not in sys.modules
print(_C.cpu_capability())
"""
    done = subprocess.run([*alone, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ISAS


@pytest.mark.slow
def test_auditwheel_finds_only_system_libraries(wheel: Path) -> None:
    pytest.importorskip("auditwheel")
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True
    )
    text = " ".join(shown.stdout.split())
    assert 'is consistent with the following platform tag: "manylinux_' in text
    assert "external shared libraries are required" not in text
