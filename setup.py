"""Hands the build of pyppo._C over to CMake. Everything else about the package is in pyproject.toml.

PYPPO_CUDA=0 leaves CUDA out, PYPPO_CUDA=1 makes its absence an error. PYPPO_WERROR=1, PYPPO_SANITIZE=address,undefined,
PYPPO_ISAS="avx2;portable" and PYPPO_CUDA_PROFILE=1 are for development.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja, in one folder of `build/` for each kind of build."""

    def run(self) -> None:
        self.kind = "develop" if self.inplace else "wheel"
        super().run()
        if self.kind == "develop":
            shutil.copyfile(self.folder() / "compile_commands.json", ROOT / "compile_commands.json")

    def folder(self) -> Path:
        kind = "sanitize" if os.environ.get("PYPPO_SANITIZE") else self.kind
        return ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement, which `python setup.py --help` can do without

        folder = self.folder()
        options = {
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",  # an isolated build's is gone by the next one
            "PYPPO_CUDA": os.environ.get("PYPPO_CUDA") or "auto",
            "PYPPO_OUTPUT_DIR": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "PYPPO_CUDA_PROFILE": os.environ.get("PYPPO_CUDA_PROFILE", "0"),
            "PYPPO_ISAS": os.environ.get("PYPPO_ISAS", ""),
            "PYPPO_SANITIZE": os.environ.get("PYPPO_SANITIZE", ""),
            "PYPPO_VERSION": self.distribution.get_version(),
            "PYPPO_WERROR": os.environ.get("PYPPO_WERROR", "0"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions], check=True)
        subprocess.run(["cmake", "--build", folder], check=True)


setup(ext_modules=[Extension("pyppo._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
