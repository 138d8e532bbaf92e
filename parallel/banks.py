"""The banks of a rank that owns some of their experts: copies are sent for here, and their gradients given back.

A layer uses a bank's experts through `materialize.Materialized`. Rows of its own experts come from the slot table and
their gradients go there; copies come by SparseAllGather, and their gradients go to the owners by SparseReduceScatter,
which other work goes on beside. FSSDP: Qing et al., arXiv:2502.02581, section 3.

Dims: P ranks, E experts of the bank, L length of a row.
"""

import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from moesaic.parallel.collectives import Arrived, Collectives, Rows, Transfer, Wanted, uploaded
from moesaic.parallel.placement import Counts, Present, no_copies
from moesaic.parallel.slots import SlotTable, runs

if TYPE_CHECKING:
    from moesaic.parallel.materialize import Materialized  # it builds on banks
    from moesaic.parallel.plans import Planner


@dataclass
class Copying:
    """How copies travel: what all banks of a model share. Settings, and what is under way."""

    copies: Collectives
    gradients: Collectives
    rematerialize: bool = False
    """Free a layer's copies after its forward pass, and gather them again for the backward pass."""
    accumulate: Literal["each", "last"] = "each"
    """When gradients of copies travel: in every micro-batch's backward pass, or in the last one's."""
    wire: torch.dtype | None = None
    """Type in which gradients of copies travel. None: their own."""
    prefetch: int = 1
    """Layers ahead whose copies are sent for in a backward pass."""
    poison: bool = False
    """Fill freed copies, and own experts that were converted, with NaN: nothing may read them."""
    last: bool = True
    """Whether the next backward pass is the step's last one."""
    outgoing: deque["tuple[OwnedBank, Transfer, Tensor | None]"] = field(default_factory=deque)
    """Gradients of copies under way, and the gradient of the owner's table that they belong to."""
    order: list["Materialized"] = field(default_factory=list)
    """Uses that will gather again in the backward pass, in order of the forward pass."""
    seconds_waited: float = 0.0
    changes: int = 0
    """Of weights, where tensors do not count them: steps of optimizers (fused kernels leave no trace), and moves."""

    def reset(self) -> None:
        """Forget what was sent and waited for."""
        self.seconds_waited = 0.0
        self.copies.bytes = self.gradients.bytes = 0

    def count_steps(self) -> None:
        """Count the steps of all optimizers from now on, as one of them has these weights."""
        here = weakref.ref(self)

        def stepped(*_: object) -> None:
            copying = here()
            if copying is not None:
                copying.changes += 1

        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def again(self, use: "Materialized") -> None:
        """The backward pass has come to this use: gather for it, and for those that come next."""
        if use.freed:
            self.finish()  # to save memory: no gradients of two layers at once
        if use not in self.order:  # of a forward pass whose stack was cleared
            use.regather()
            return
        del self.order[self.order.index(use) + 1 :]
        for coming in reversed(self.order[-1 - self.prefetch :]):
            coming.regather()
        self.order.pop()

    def finish(self, most: int = 0) -> None:
        """Add gradients that have arrived to the owners' rows, until at most so many are under way."""
        while len(self.outgoing) > most:
            bank, transfer, grad = self.outgoing.popleft()
            with self.waiting():
                arrived = transfer.finish()
            bank.check(grad)
            bank.add(arrived)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it, the host waits for copies or their gradients."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_waited += time.perf_counter() - began


class Gather:
    """Copies under way to the ranks that want them."""

    def __init__(self, bank: "OwnedBank", dtype: torch.dtype, wanted: Wanted) -> None:
        self.bank, self.dtype, self.wanted = bank, dtype, wanted
        self.version = bank.version
        self.rows: Arrived | None = None
        self.transfer: Transfer | None = None
        if wanted.any():
            self.transfer = bank.copying.copies.all_gather(
                lambda experts: bank.rows(experts, dtype), wanted, bank.owners
            )

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether what comes are the present weights in this type."""
        return self.dtype == dtype and self.version == self.bank.version

    def finish(self) -> Arrived | None:
        """What arrived here, once all has. None where nobody wanted anything."""
        if self.transfer is not None:
            with self.bank.copying.waiting():
                self.rows = self.transfer.finish()
            self.transfer = None
        return self.rows


class OwnedBank:
    """A bank whose experts have owners. Layers that share the bank share this."""

    def __init__(
        self,
        name: str,
        table: SlotTable,
        owners: tuple[int, ...],
        rank: int,
        ranks: int,
        copying: Copying,
    ) -> None:
        self.name, self.table, self.rank, self.copying = name, table, rank, copying
        self.planner: Planner | None = None
        """Asked within a layer, where it wants to see the layer's own counts."""
        self.compared = False
        """Whether ranks then compare what it planned."""
        self.history: list[Counts] = []
        """Counts of the last steps, oldest first."""
        self.loads: Counts = np.zeros((ranks, len(owners)), np.int64)
        """Counts of this step, so far: original forward pass of training tokens."""
        self.uses = 0
        """Forward passes whose backward pass is to come."""
        self.held: dict[int, Tensor]
        """Gradients of copies that wait for the last micro-batch: rows by expert."""
        self.held_wanted: Wanted
        """Which of them ranks have."""
        self.held_grad: Tensor | None
        """The gradient of the table to which their owners will add them."""
        self.kept: Gather | None = None
        """Copies that serve all micro-batches of a step."""
        self.own(owners)

    def own(self, owners: tuple[int, ...]) -> None:
        """Set the owners; no expert has copies then."""
        self.owners = owners
        self.copying.changes += 1
        self.kept = None
        self.alone: Present = no_copies(owners, len(self.loads))
        self.present: Present = self.alone
        """The materialisation plan of this step."""
        self.drop_held()

    @property
    def version(self) -> tuple[int, int]:
        """Changes with the weights."""
        return self.copying.changes, self.table.master._version

    def gather(self, dtype: torch.dtype, wanted: Wanted | None = None) -> Gather:
        """Send for copies; None: the plan's. Where they serve a whole step, they are sent for once."""
        if self.kept is not None and self.kept.serves(dtype):
            return self.kept
        self.kept = None
        found = Gather(self, dtype, self.present & ~self.alone if wanted is None else wanted)
        keeps = self.copying.accumulate == "last" and not self.copying.rematerialize
        if keeps and torch.is_grad_enabled():  # what an evaluation sends for serves no step
            self.kept = found
        return found

    def rows(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Rows (n, L) of experts that this rank owns."""
        part = self.table.owned[self.name]
        # as they lie in the table: they have left before an optimizer writes there
        return rows_of(experts, self.table.rows_of(part), part.experts).to(dtype)

    def give_back(self, copied: Sequence[int], gradients: Tensor, wanted: Wanted) -> None:
        """Gradients (n, L) of the n experts copied here, to who owns them; `wanted`: the copies of all ranks."""
        self.uses = max(0, self.uses - 1)

        def rows(experts: Sequence[int]) -> Tensor:
            return rows_of(experts, gradients, copied)

        if self.copying.accumulate == "each":
            self.send(rows, wanted)
            return
        more = bool(self.held_wanted.any())
        if more:
            self.check(self.held_grad)
        self.held_grad = self.table.master.grad
        for expert, row in zip(copied, rows(copied), strict=True):
            held = self.held.get(expert)
            wide = torch.promote_types(row.dtype, self.table.master.dtype)
            # the first rows wait as they are; of later ones, only those that are new
            self.held[expert] = row.to(wide, copy=more) if held is None else held.add_(row)
        self.held_wanted = self.held_wanted | wanted
        if self.copying.last and self.uses == 0:
            self.send_held()

    def drop_held(self) -> None:
        """Forget what waited."""
        self.held, self.held_wanted, self.held_grad = {}, np.zeros_like(self.alone), None

    def send_held(self) -> None:
        """Send what waited for the last micro-batch."""
        held, wanted = self.held, self.held_wanted
        if wanted.any():
            self.check(self.held_grad)
        self.drop_held()
        self.uses = 0
        none = self.table.master.detach()[:0]
        self.send(
            lambda experts: torch.stack([held[expert] for expert in experts]) if experts else none, wanted
        )

    def send(self, rows: Rows, wanted: Wanted) -> None:
        """Gradients of copies, `wanted` here, to who owns them; `finish` adds them there."""
        if not wanted.any():
            return
        wire = self.copying.wire
        transfer = self.copying.gradients.reduce_scatter(
            lambda experts: rows(experts) if wire is None else rows(experts).to(wire), wanted, self.owners
        )
        self.copying.outgoing.append((self, transfer, self.table.master.grad))
        self.copying.finish(most=1)

    def check(self, grad: Tensor | None) -> None:
        """Raise RuntimeError unless this is still the table's gradient: another one belongs to another step."""
        if self.table.master.grad is not grad:
            raise RuntimeError(
                f"bank {self.name!r}: gradients were cleared before those of copies had been added; after the last "
                "backward pass of a step call `sum_replicated`, then the optimizer, then `zero_grad`"
            )

    def add(self, arrived: Arrived) -> None:
        """Add gradients of copies to the rows of their experts, in the order in which they come."""
        self.table.add_rows(self.table.owned[self.name], arrived.experts, arrived.rows)


def rows_of(experts: Sequence[int], rows: Tensor, lying: Sequence[int]) -> Tensor:
    """The rows of some of the experts that lie there, in this order: as they lie, where they are consecutive."""
    number = {expert: number for number, expert in enumerate(lying)}
    places = [number[expert] for expert in experts]
    consecutive = [*runs(places)]
    if len(consecutive) == 1:
        _, first, count = consecutive[0]
        return rows[first : first + count]
    return rows.index_select(0, *uploaded([np.array(places, np.int64)], rows.device))
