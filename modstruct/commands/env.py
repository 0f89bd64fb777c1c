"""What a bug report needs: versions, what the extension holds, processors, GPUs, room on the disks, what is missing.

modstruct env
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modstruct import __version__
from modstruct.config import DataConfig
from modstruct.files import commit_of

PACKAGES = [
    *("torch", "torchvision", "deepspeed", "open_clip_torch", "timm", "transformers", "webdataset", "sentencepiece"),
    *("faiss-gpu", "faiss-cpu", "numpy", "scipy", "safetensors", "jsonargparse", "tensorboard", "matplotlib"),
]
EITHER = {"faiss-gpu", "faiss-cpu"}
"""One of them is enough."""
PROGRAMS = {
    "g++": "installing, and DeepSpeed's operators, need it (apt-get install g++)",
    "ninja": "DeepSpeed's operators need it (pip install ninja)",
    "nvcc": "without it the CUDA kernels are not built",
    "tectonic": "without it or pdflatex the paper's tables are written as LaTeX, not as PDF",
    "pdflatex": "",
}
VARIABLES = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "MODSTRUCT_", "TORCH_", "HF_HOME", "XDG_CACHE_HOME", "SLURM_JOB_ID")
"""How the names of variables begin that change what a run does, and that hold no secret."""


def main() -> None:
    if sys.argv[1:] not in ([], ["env"]):
        print(f"error: {' '.join(sys.argv[1:])!r}: the one command is `modstruct env`; launch_scripts/ trains and "
              "measures", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    for title, lines in described().items():
        print(f"{title}\n" + "".join(f"  {line}\n" for line in lines))


def described() -> dict[str, list[str]]:
    """Lines by title."""
    missing: list[str] = []
    return {
        "modstruct": [f"{__version__} in {Path(__file__).parents[1]}{commit_of()}", *_extension(missing)],
        "system": _system(missing),
        "packages": _packages(missing),
        "GPUs": _gpus(),
        "variables": [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)],
        "missing": missing or ["nothing"],
    }


def _extension(missing: list[str]) -> list[str]:
    try:
        from modstruct import _C
    except ImportError as error:
        missing.append(f"modstruct._C ({error}): pip install -e . builds it; without it nothing trains")
        return []
    return [f"_C: {', '.join(f'{name} {value}' for name, value in _C.features().items())}"]


def _system(missing: list[str]) -> list[str]:
    models = [line.partition(": ")[2] for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    memory = _read("/proc/meminfo").split()
    lines = [
        f"Python {platform.python_version()}, {platform.platform()}",
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} processors: {models[0] if models else platform.machine()}",
        *([f"memory {int(memory[1]) / 2**20:.1f} GiB"] if memory[1:] else []),
    ]
    cache = Path(DataConfig().cache).expanduser()
    for what, path in (("data.cache", cache), ("/dev/shm", Path("/dev/shm")), ("here", Path.cwd())):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        lines.append(f"{what}: {path}, {shutil.disk_usage(there).free / 2**30:.1f} GiB free")
    found = {name: shutil.which(name) for name in PROGRAMS}
    lines += [f"{name}: {place}" for name, place in found.items() if place]
    if found["pdflatex"]:
        found["tectonic"] = found["pdflatex"]
    missing += [f"{name}: {PROGRAMS[name]}" for name, place in found.items() if place is None and PROGRAMS[name]]
    return lines


def _packages(missing: list[str]) -> list[str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    missing += [f"{name}: pip install -e ." for name in PACKAGES if name not in found and name not in EITHER]
    if not EITHER & found.keys():
        missing.append("faiss-gpu or faiss-cpu: pip install -e .")
    return [f"{name} {number}" for name, number in found.items()]


def _gpus() -> list[str]:
    try:
        import torch
    except ImportError:
        return ["torch is missing"]
    if not torch.cuda.is_available():
        return [f"none that torch {torch.__version__} (CUDA {torch.version.cuda}) can use"]
    about = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [f"CUDA {torch.version.cuda}, NCCL {nccl}"] + [
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in about
    ]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
