"""Builds the extension modstruct._C; everything else about the package is in pyproject.toml.

The CUDA half is built where nvcc is found: on the PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin. MODSTRUCT_CUDA=0 in
the environment leaves it out, MODSTRUCT_CUDA=1 makes a missing nvcc an error. Files are compiled side by side, MAX_JOBS
at once or one a core.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

OPENMP = "-fopenmp"
CXX_FLAGS = ["-O3", "-Wall", "-Wextra"]
CUDA_ARCHITECTURES = {  # name: what nvcc is told
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "compute_80": "arch=compute_80,code=compute_80",  # the driver compiles it for all later ones
}
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
CUDA_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler", "-Wall,-Wextra,-fPIC", "-Icsrc/cuda", "-Icsrc/cuda/gpu"]
HEADERS = sorted(path for kind in ("h", "cuh", "inc") for path in glob(f"csrc/**/*.{kind}", recursive=True))


class BuildExtension(build_ext):
    """Leaves out OpenMP and CUDA where there is no compiler for them; modstruct._C.features() then says so."""

    def build_extensions(self) -> None:
        if self.compiler_has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append(OPENMP)
                extension.extra_link_args.append(OPENMP)
        else:
            self.warn(f"the C++ compiler does not take {OPENMP}: modstruct._C will run on one thread")
        nvcc = find_nvcc()
        architectures = [name for name in CUDA_ARCHITECTURES if nvcc and self.compiles(nvcc, name)]
        if nvcc and not architectures:
            raise SystemExit(
                f"{nvcc} compiles for none of {', '.join(CUDA_ARCHITECTURES)}: MODSTRUCT_CUDA=0 does without"
            )
        if nvcc:
            self.add_cuda(nvcc, architectures)
        # The same sources give another extension with CUDA than without, which their dates do not tell.
        stamp, content = Path(self.build_temp, "cuda_architectures"), " ".join(architectures)
        self.force = self.force or not stamp.exists() or stamp.read_text() != content
        super().build_extensions()
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(content)

    def compiler_has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[OPENMP])
                self.compiler.link_executable(objects, str(Path(folder, "openmp")), extra_postargs=[OPENMP])
            except Exception:  # every compiler class has its own error; any of them means no
                return False
        return True

    def compiles(self, nvcc: str, architecture: str) -> bool:
        """Whether this nvcc knows the architecture: one may be too old for it or too new."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cu")
            source.write_text("__global__ void empty() {}\n")
            command = [
                nvcc,
                f"-gencode={CUDA_ARCHITECTURES[architecture]}",
                "-c",
                source,
                "-o",
                Path(folder, "empty.o"),
            ]
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            self.warn(f"CUDA kernels are built without {architecture}: {reason}")
        return result.returncode == 0

    def add_cuda(self, nvcc: str, architectures: list[str]) -> None:
        """Compile what is newer than its object, and let the extension take the objects and the static runtime."""
        self.announce(f"building CUDA kernels for {', '.join(architectures)} with {nvcc}", level=logging.INFO)
        folder = Path(self.build_temp, "cuda-" + "-".join(architectures))
        folder.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode={CUDA_ARCHITECTURES[name]}" for name in architectures]
        (extension,) = self.extensions
        commands = []
        for source in CUDA_SOURCES:
            target = str(folder / f"{Path(source).stem}.o")
            if self.force or newer_group([source, *HEADERS, "setup.py"], target):
                commands.append([nvcc, *CUDA_FLAGS, *targets, "-c", source, "-o", target])
            extension.extra_objects.append(target)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
            list(pool.map(self.spawn, commands))
        extension.sources += sorted(glob("csrc/cuda/*.cpp"))
        extension.define_macros += [
            ("MODSTRUCT_WITH_CUDA", None),
            ("MODSTRUCT_CUDA_ARCHITECTURES", f'"{" ".join(architectures)}"'),
        ]
        extension.library_dirs += cuda_libraries(nvcc)
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]


def find_nvcc() -> str | None:
    wanted = os.environ.get("MODSTRUCT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MODSTRUCT_CUDA = {wanted!r}: must be 0, 1 or not set")
    if wanted == "0":
        print("MODSTRUCT_CUDA=0: modstruct._C is built without CUDA kernels")
        return None
    places = [None, *(Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home)]
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if found is None:
        remedy = "put nvcc on the PATH or set CUDA_HOME"
        if wanted == "1":
            raise SystemExit(f"MODSTRUCT_CUDA=1, but there is no nvcc: {remedy}")
        print(f"no nvcc: modstruct._C is built without CUDA kernels ({remedy} to have them)")
    return found


def cuda_libraries(nvcc: str) -> list[str]:
    """Where nvcc itself links libcudart_static from: nvcc on the PATH may be a script or a link to elsewhere."""
    plan = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    line = next((line for line in plan.splitlines() if "LIBRARIES=" in line), "")
    return [folder for folder in re.findall(r'-L([^"\s]+)', line) if Path(folder, "libcudart_static.a").exists()]


ParallelCompile("MAX_JOBS").install()
setup(
    ext_modules=[
        Pybind11Extension(
            "modstruct._C",
            sources=sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            depends=[*HEADERS, *CUDA_SOURCES, *sorted(glob("csrc/cuda/*.cpp")), "setup.py"],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=CXX_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
