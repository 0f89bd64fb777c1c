"""The CUDA kernels on a CPU: csrc/cuda built against tests/cuda_on_cpu, behind the Python that calls them on a GPU.

CUDA_ON_CPU_FLAGS in the environment adds flags. To have every access to memory checked:
  CUDA_ON_CPU_FLAGS=-fsanitize=address ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" pytest ...
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11

from modstruct.pairwise import cuda_panels

REPOSITORY = Path(__file__).parents[2]
# Strict aliasing is off since shared memory is read as several types; unknown pragmas are CUDA's unrolling.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> ModuleType:
    """Compile into `folder` and import. Raises subprocess.CalledProcessError where it does not compile."""
    extra_flags = os.environ.get("CUDA_ON_CPU_FLAGS", "").split()
    emulator, kernels = REPOSITORY / "tests/cuda_on_cpu", REPOSITORY / "csrc/cuda"
    sources = [*kernels.glob("*.cu"), *kernels.glob("*.cpp"), *emulator.glob("*.cpp")]
    paths = [emulator, kernels, pybind11.get_include(), sysconfig.get_path("include")]
    definitions = ["-DMODSTRUCT_WITH_CUDA", '-DMODSTRUCT_CUDA_ARCHITECTURES=""']
    command = [compiler(), *FLAGS, *definitions, *extra_flags, *(f"-I{path}" for path in paths)]
    objects = []
    for source in sorted(sources):
        objects.append(folder / f"{source.name}.o")
        subprocess.run([*command, "-x", "c++", "-c", source, "-o", objects[-1]], check=True)
    library = folder / f"cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler(), "-shared", *extra_flags, *objects, "-o", library], check=True)
    specification = importlib.util.spec_from_file_location("cuda_on_cpu", library)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def replace_gpu(monkeypatch, module: ModuleType) -> None:
    """Let cuda_kernels run on CPU tensors: the three things of cuda_panels that need a GPU get a stand-in."""

    @contextmanager
    def on_cpu(x):
        yield 0

    from modstruct.pairwise import cuda_kernels

    def add_product(out, a, b, precision):
        out.addmm_(a.float(), b.float())

    for place in (cuda_panels, cuda_kernels):
        monkeypatch.setattr(place, "kernels", lambda: module)
        monkeypatch.setattr(place, "on_device", on_cpu, raising=False)
        monkeypatch.setattr(place, "add_product", add_product)
