"""The weights that a run begins with: the same on every process, of which none need make or hash them all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.distributed import hosts
from modstruct.models.deferred import Deferred
from modstruct.models.protocol import TrainableModel


class FirstWeights:
    """A model's, by name, made when they are asked for. Collective.

    deferred: the context that the model was made in; None where its weights are there. saved: a checkpoint's, by name.
    """

    def __init__(self, model: TrainableModel, deferred: Deferred | None, saved: Mapping[str, Tensor] | None):
        self.model, self.deferred, self.saved = model, deferred, saved
        # As they were made: the model's own are cast to half precision before they are asked for.
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._mine = set(hosts.share_of_host(sorted(model.state_dict())))
        self._checksums: dict[str, str] = {}
        if deferred:
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    # DeepSpeed, which moves a whole model, leaves one alone whose weights are sharded already.
                    module._buffers[name] = deferred.value(buffer).to(distributed.device())

    def __call__(self, name: str) -> Tensor:
        """A parameter, whole, on the main process and where its checksum is taken; elsewhere its place in memory."""
        parameter = self._parameters[name]
        compared = self.saved is None and name in self._mine
        if not compared and not distributed.is_main():
            return torch.empty(parameter.shape)
        if self.saved is not None:
            return self.saved[name]
        made = self.deferred.value(parameter) if self.deferred else parameter
        if compared:
            self._checksums[name] = _checksum(made)
        return made

    def require_same(self) -> None:
        """Refuse, by its name, a weight that is not the same on every host. Of what the hosts made, not of what the
        main process sends: of deferred weights, which are called one by one, after that, else before."""
        left = {name: value for name, value in self.model.state_dict().items() if name in self._mine}
        found = {f"the first {name}": self._checksums.get(name) or _checksum(value) for name, value in left.items()}
        hosts.require_same(found, "hosts must read the same weight files", shared_out=True)


def _checksum(values: Tensor) -> str:
    content = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(content, digest_size=16).hexdigest()
