"""The slot table: everything that a rank owns of all banks, one expert per row.

A row holds an expert's matrices one after the other, so that moving an expert is moving a row, and an elementwise
optimizer sees one tensor. Outside, nobody sees rows: weights, gradients and optimizer state have logical names and
shapes, those of whole banks (`banks.<name>.w1`, (E, G, F, D)), of which a rank holds some experts.

Dims: S slots, L length of a row, E experts of a bank, M experts of it that a rank owns, G input matrices, F hidden
width, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.moe.experts import Bank
from moesaic.parallel.placement import OwnerMap, Topology

if TYPE_CHECKING:
    # slow to import, and not needed by a run's first step
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

    from moesaic.parallel.banks import Copying, OwnedBank  # they build on tables


class ExpertRows(torch.Tensor):
    """A tensor of a whole bank, (E, ...), of which this rank holds some experts; `local` is a view of the slot table.

    It knows how to be saved and loaded by `torch.distributed.checkpoint`, and nothing else.
    """

    local: Tensor
    """(M, ...), ascending by expert."""
    experts: tuple[int, ...]

    @staticmethod
    def __new__(cls, local: Tensor, experts: Sequence[int], num_experts: int) -> "ExpertRows":
        shape = (num_experts, *local.shape[1:])
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=False
        )
        made.local, made.experts = local.detach(), tuple(experts)
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"ExpertRows({tuple(self.shape)}, experts {self.experts})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} on the experts of one rank; use `local`")

    def whole(self, group: dist.ProcessGroup) -> Tensor:
        """The whole tensor, on every rank of the owners' group; collective."""
        found = self.local.new_zeros(self.shape)
        found[list(self.experts)] = self.local
        dist.all_reduce(found, group=group)
        return found

    def runs(self) -> Iterator[tuple[int, Tensor]]:
        """Consecutive experts: the first one's number, and their part of `local`."""
        for begin, first, count in runs(self.experts):
            yield first, self.local[begin : begin + count]

    def __create_write_items__(self, name: str, _: object) -> list["WriteItem"]:
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
        )
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(name, self._offsets(first)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(self._offsets(first), part.shape),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for first, part in self.runs()
        ]

    def __create_chunk_list__(self) -> list["ChunkStorageMetadata"]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(self._offsets(first), part.shape) for first, part in self.runs()]

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        assert index.offset is not None
        return next(part for first, part in self.runs() if first == index.offset[0])

    def _offsets(self, expert: int) -> torch.Size:
        return torch.Size((expert, *(0 for _ in self.shape[1:])))


@dataclass(frozen=True)
class Owned:
    """What a rank owns of one bank, and where in the table."""

    bank: str
    num_experts: int
    experts: tuple[int, ...]
    """Ascending."""
    first: int
    """Slot of the first; the others follow."""


class SlotTable(nn.Module):
    """Master weights of the experts that this rank owns, of all banks whose experts have one shape."""

    def __init__(self, shape: torch.Size, out: torch.Size, owned: Sequence[Owned], like: Tensor) -> None:
        """`shape` and `out` are those of one expert's w1, (G, F, D), and w2, (D, F)."""
        super().__init__()
        self.shape, self.out = shape, out
        self.owned = {part.bank: part for part in owned}
        self._written: set[str] = set()
        """Banks whose rows of the gradient hold values; the others hold what memory held."""
        slots = sum(len(part.experts) for part in owned)
        self.master = nn.Parameter(like.new_empty(slots, shape.numel() + out.numel()))

    def logical(self, tensor: Tensor) -> dict[str, Tensor]:
        """The master, or a tensor that goes with it, by logical name. A single number goes with every name."""
        named: dict[str, Tensor] = {}
        for part in self.owned.values():
            for name, begin, shape in (("w1", 0, self.shape), ("w2", self.shape.numel(), self.out)):
                rows = tensor
                if tensor.ndim:
                    here = slice(part.first, part.first + len(part.experts))
                    rows = tensor.detach()[here, begin : begin + shape.numel()].unflatten(1, shape)
                    rows = ExpertRows(rows, part.experts, part.num_experts)
                named[f"banks.{part.bank}.{name}"] = rows
        return named

    def each(self) -> Iterator[tuple[str, int, Tensor]]:
        """Every matrix of every expert that is here: logical name of its tensor, number of the expert, values."""
        for name, rows in self.logical(self.master).items():
            assert isinstance(rows, ExpertRows)
            for expert, matrix in zip(rows.experts, rows.local.unbind(), strict=True):
                yield name, expert, matrix

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """All that is here of a tensor with the master's shape, as views: (S, G, F, D) and (S, D, F)."""
        cut = self.shape.numel()
        return [tensor[:, :cut].unflatten(1, self.shape), tensor[:, cut:].unflatten(1, self.out)]

    def rows_of(self, part: Owned) -> Tensor:
        """Weights of a bank's experts that are here, a row each, as a view."""
        return self.master.detach()[part.first : part.first + len(part.experts)]

    def gradient_of(self, part: Owned) -> tuple[Tensor, bool]:
        """Where their gradients belong, as a view, and whether there are some already, to add to; if not, they are to
        be written. See `settle`."""
        if self.master.grad is None:
            self.master.grad, self._written = torch.empty_like(self.master), set()
        before = part.bank in self._written
        self._written.add(part.bank)
        return self.master.grad[part.first : part.first + len(part.experts)], before

    def add_rows(self, part: Owned, experts: Sequence[int], rows: Tensor) -> None:
        """Add whole rows (n, L) to those of a bank's experts, one after the other; the bank's own come before."""
        assert self.master.grad is not None
        assert part.bank in self._written
        slot = {expert: part.first + number for number, expert in enumerate(part.experts)}
        for expert, row in zip(experts, rows, strict=True):
            self.master.grad[slot[expert]] += row

    def clear(self) -> None:
        """Drop the gradient."""
        self.master.grad, self._written = None, set()

    def settle(self) -> None:
        """Zero the gradient of banks that got none."""
        for part in self.owned.values():
            rows, written = self.gradient_of(part)
            if not written:
                rows.zero_()


class Slots(nn.ModuleList):
    """The slot tables of a model, its banks, and who owns which expert now."""

    def __init__(
        self,
        tables: Sequence[SlotTable],
        banks: Sequence["OwnedBank"],
        owners: OwnerMap,
        group: dist.ProcessGroup,
        topology: Topology,
        copying: "Copying",
    ) -> None:
        """`group` holds the owners of a replica of the model; `owners` numbers them from 0. `copying`: see `banks`."""
        super().__init__(tables)
        self.banks = {bank.name: bank for bank in banks}
        self.owners, self.group, self.topology, self.copying = owners, group, topology, copying

    def __iter__(self) -> Iterator[SlotTable]:
        return super().__iter__()  # type: ignore[return-value]

    def begin(self, *, last: bool) -> None:
        """A forward and a backward pass come, the step's last one or not."""
        for bank in self.banks.values():
            bank.uses = 0
        self.copying.last = last
        self.copying.order.clear()

    def settle(self) -> None:
        """Have all gradients where they belong: to be called when the last backward pass of a step is done."""
        for bank in self.banks.values():
            bank.send_held()
            bank.kept = None
        self.copying.order.clear()  # of forward passes without a backward pass
        self.copying.finish()
        for table in self:
            table.settle()


def slots_of(model: nn.Module) -> Slots | None:
    """The slot tables of a model; None where experts are not owned."""
    return next((module for module in model.modules() if isinstance(module, Slots)), None)


def runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Consecutive places: index of the first, the first, how many."""
    begin = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            yield begin, places[begin], end - begin
            begin = end


def take_banks(banks: Sequence[Bank], experts_of: Callable[[str], tuple[int, ...]]) -> list[SlotTable]:
    """Slot tables in place of these banks' own parameters: one table per shape of an expert.

    The banks keep their names and lose their weights. Values are not copied: tables are to be initialised or loaded.
    """
    groups: dict[tuple[torch.Size, torch.Size], list[Bank]] = {}
    for bank in banks:
        groups.setdefault((bank.w1.shape[1:], bank.w2.shape[1:]), []).append(bank)
    tables = []
    for (shape, out), members in groups.items():
        owned, first = [], 0
        for bank in members:
            experts = experts_of(bank.name)
            owned.append(Owned(bank.name, bank.num_experts, experts, first))
            first += len(experts)
        tables.append(SlotTable(shape, out, owned, members[0].w1.detach()))
        for bank in members:
            bank.register_parameter("w1", None)
            bank.register_parameter("w2", None)
    return tables
