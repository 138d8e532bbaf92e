"""Bytes of experts on one rank: everything that has an expert's shape, from master weights to rows that travel."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.parallel.slots import Slots


class ExpertMemory(TorchDispatchMode):
    """Within it, watches tensors that are made. Counted are those of the shape of an expert's matrices, or of rows that
    hold an expert each, and gradients and optimizer state of the tables; a freed storage counts nothing."""

    def __init__(self, slots: Slots, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.shapes = {tuple(shape) for table in slots for shape in (table.shape, table.out)}
        self.lengths = {table.master.shape[1] for table in slots}
        self.alive: dict[int, StorageWeakRef] = {}
        self.peak = 0
        for table in slots:
            self._watch([table.master.detach(), *optimizer.state.get(table.master, {}).values()])

    def _watch(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and self._of_experts(tensor):
                held = StorageWeakRef(tensor.untyped_storage())
                self.alive[held.cdata] = held
        total = 0
        for key, held in list(self.alive.items()):
            if held.expired():
                del self.alive[key]
                continue
            storage = torch.UntypedStorage._new_with_weak_ptr(held.cdata)
            total += 0 if storage is None else storage.nbytes()
        self.peak = max(self.peak, total)

    def _of_experts(self, tensor: Tensor) -> bool:
        shape = tuple(tensor.shape)
        of_matrices = any(shape[-len(wanted) :] == wanted for wanted in self.shapes)
        return (of_matrices and len(shape) > 2) or (bool(shape) and shape[-1] in self.lengths)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._watch(tree_leaves(out))
        return out
