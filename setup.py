"""Builds the extension modstruct._C; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

OPENMP = "-fopenmp"


class BuildExtension(build_ext):
    """Leaves OpenMP out where the compiler cannot compile and link it; modstruct._C.features() then says so."""

    def build_extensions(self) -> None:
        if self.compiler_has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append(OPENMP)
                extension.extra_link_args.append(OPENMP)
        else:
            self.warn(f"the C++ compiler does not take {OPENMP}: modstruct._C will run on one thread")
        super().build_extensions()

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


setup(
    ext_modules=[
        Pybind11Extension(
            "modstruct._C",
            sources=sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")]),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
