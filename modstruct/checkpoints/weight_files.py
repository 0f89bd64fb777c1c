"""Published weight files: safetensors, or torch's own format read with weights_only, so that nothing is unpickled."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from modstruct.errors import refuse, require

WRAPPERS = ("model", "state_dict")
"""Keys under which published files keep the weights beside other things (DeiT's and ALBEF's `model`)."""


def read_weight_file(path: str | Path, option: str) -> dict[str, Tensor]:
    """Weights by name. option: the field that named the file, for the error (ValueError)."""
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader has a type of error for each kind of damage
        refuse(
            option, str(path), f"cannot be read as safetensors or weights alone: {' '.join(str(error).split())[:300]}"
        )
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    fits = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    require(fits, option, str(path), "holds more than tensors by name; give a file of weights")
    return content
