"""Named tensors from safetensors files, checked one by one before any of them reaches a module.

Every complaint names the tensor and the file: missing, extra, of another shape, not floating point, not finite,
or a file that is truncated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..engines.package import InputError, inside

# our parameter's name -> names of the tensors it is made of, to be concatenated along the first axis
Naming = Callable[[str], list[str]]


class Checkpoint:
    """The tensors of one safetensors file, or of all shards that an index lists; read when asked for."""

    def __init__(self, folder: Path, stem: str = "model"):
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.exists():
            try:
                shards = json.loads(index.read_text())["weight_map"]
                self.files = {name: inside(folder, file) for name, file in shards.items()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(f"{index}: not an index of safetensors shards ({error}); fetch it again") from None
            self.source = index
        elif single.exists():
            self.source, self.files = single, {}
        else:
            raise InputError(f"{folder}: no {single.name} or {index.name}; expected the weights there")
        self._open = {}
        for path in sorted(set(self.files.values()) or {single}):
            try:
                self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise InputError(f"{path}: this shard, listed in {index.name}, is missing; fetch it again") from None
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: truncated or not a safetensors file ({error}); fetch it again") from None
        held = {name: path for path, file in self._open.items() for name in file.keys()}  # noqa: SIM118
        for name, path in self.files.items():
            if held.get(name) != path:
                raise InputError(f"{path}: tensor {name} is missing, although {index.name} lists it there")
        self.files = held

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterable[str]:
        return iter(self.files)

    def stored(self, name: str) -> Tensor:
        """One tensor in the type it is stored in. Raises InputError when it is missing."""
        if name not in self.files:
            raise InputError(f"{self.source}: tensor {name} is missing; is this the checkpoint the config describes?")
        return self._open[self.files[name]].get_tensor(name)

    def read(self, name: str) -> Tensor:
        """One tensor in float32.

        Raises:
            InputError: it is missing, holds integers, or holds NaN or infinity.
        """
        tensor = self.stored(name)
        path = self.files[name]
        if not tensor.is_floating_point():
            raise InputError(
                f"{path}: tensor {name} holds {tensor.dtype}, expected floating point, not quantised, weights"
            )
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor

    def refuse_extra(self, used: set[str], ignorable: Callable[[str], bool]) -> None:
        """Raises InputError when the files hold a tensor that nothing used."""
        for name in sorted(set(self.files) - used):
            if not ignorable(name):
                raise InputError(
                    f"{self.files[name]}: tensor {name} has no place in the model that config.json describes; "
                    "correct the config or the checkpoint"
                )


def load_parameters(
    module: nn.Module,
    checkpoint: Checkpoint,
    naming: Naming,
    adjust: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> set[str]:
    """Fills a module from a checkpoint and returns the names of the tensors it used.

    Args:
        naming: where each parameter comes from.
        adjust: changes a tensor after reading, by parameter name (a position embedding resampled to another grid).

    Raises:
        InputError: a tensor is missing or has another shape than the module's parameter.
    """
    used: set[str] = set()
    state = module.state_dict(keep_vars=True)
    for name, parameter in state.items():
        sources = naming(name)
        parts = [checkpoint.read(source) for source in sources]
        wanted = list(parameter.shape)
        if len(parts) > 1:
            _check_shapes(checkpoint, sources, parts, [wanted[0] // len(parts), *wanted[1:]])
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        while tensor.ndim > len(wanted) and tensor.shape[0] == 1:  # published embeddings carry batch axes
            tensor = tensor[0]
        if adjust and name in adjust:
            tensor = adjust[name](tensor)
        _check_shapes(checkpoint, sources[:1], [tensor], wanted)
        with torch.no_grad():
            parameter.copy_(tensor)
        used.update(sources)
    return used


def _check_shapes(checkpoint: Checkpoint, names: Iterable[str], tensors: Iterable[Tensor], wanted: list[int]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if list(tensor.shape) != wanted:
            raise InputError(
                f"{checkpoint.files[name]}: tensor {name} has shape {list(tensor.shape)}, "
                f"expected {wanted} by config.json"
            )
