"""The experts of a bank on one rank: its own, and copies of others' for as long as a layer needs them.

A layer asks for a bank's experts, computes with them and gives their gradients back. Rows of its own experts come from
the slot table and their gradients go there; copies come by SparseAllGather, and their gradients go to the owners by
SparseReduceScatter, which other work goes on beside. FSSDP: Qing et al., arXiv:2502.02581, section 3.

Dims: P ranks, E experts of the bank, M experts that are here, L length of a row.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from moesaic.kernels.expert_rows import ExpertPieces
from moesaic.parallel.collectives import Arrived, Collectives, Rows, Transfer, Wanted
from moesaic.parallel.placement import Counts, Present, no_copies
from moesaic.parallel.slots import SlotTable, runs

if TYPE_CHECKING:
    from moesaic.parallel.plans import Planner


@dataclass
class Copying:
    """How copies travel: what all banks of a model share. Settings, and what is under way."""

    copies: Collectives
    gradients: Collectives
    rematerialize: bool = False
    """Free a layer's matrices after its forward pass, and gather them again for the backward pass."""
    accumulate: Literal["each", "last"] = "each"
    """When gradients of copies travel: in every micro-batch's backward pass, or in the last one's."""
    wire: torch.dtype | None = None
    """Type in which gradients of copies travel. None: their own."""
    prefetch: int = 1
    """Layers ahead whose copies are sent for in a backward pass."""
    poison: bool = False
    """Fill freed copies, and experts in another type than the master weights', with NaN: nothing may read them."""
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
    """A bank whose experts have owners. Layers that share the bank share this; it is their weight source."""

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

    def weights(self, dtype: torch.dtype) -> ExpertPieces:
        """All experts that the plan has here, in the compute type."""
        use = Materialized(self, dtype, self.present, self.gather(dtype))
        use.fill()
        return use.weights()

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

    def give_back(self, use: "Materialized") -> None:
        """Gradients of copies, to who owns them; those of own experts are where they belong."""
        self.uses = max(0, self.uses - 1)
        found, use.copied_gradients = use.copied_gradients, None
        assert found is not None, "the experts' op has made them, on a rank without copies too"

        def rows(experts: Sequence[int]) -> Tensor:
            return rows_of(experts, found, use.copied)

        if self.copying.accumulate == "each":
            self.send(rows, use.wanted)
            return
        more = bool(self.held_wanted.any())
        if more:
            self.check(self.held_grad)
        self.held_grad = self.table.master.grad
        for expert, row in zip(use.copied, rows(use.copied), strict=True):
            held = self.held.get(expert)
            wide = torch.promote_types(row.dtype, self.table.master.dtype)
            # the first rows wait as they are; of later ones, only those that are new
            self.held[expert] = row.to(wide, copy=more) if held is None else held.add_(row)
        self.held_wanted = self.held_wanted | use.wanted
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


class Materialized:
    """One use of a bank by a layer: all experts that are here, own and copied, where they lie.

    Own ones are rows of the slot table, in the type of the master weights, or else made from them; copies are rows as
    they arrived. They are here from `fill` on, so that copies may arrive in between, and may be freed and filled again.
    Gradients of own experts go into the table; those of copies into rows that are sent as they are.
    """

    def __init__(
        self, bank: OwnedBank, dtype: torch.dtype, here: Present, coming: Gather, *, freed: bool = False
    ) -> None:
        """`here`: what each rank needs, its own experts included. `coming`: what is already under way. `freed`: whether
        rows are freed after the forward pass, and come again for the backward pass."""
        self.bank, self.dtype, self.freed = bank, dtype, freed
        self.wanted: Wanted = here & ~bank.alone
        """Copies that ranks need."""
        self.experts: list[int] = np.flatnonzero(here[bank.rank]).tolist()
        """Ascending."""
        self.copied = sorted(
            np.flatnonzero(self.wanted[bank.rank]).tolist(), key=lambda expert: (bank.owners[expert], expert)
        )
        """Experts of others that are here, in the order in which their gradients leave."""
        self.copied_gradients: Tensor | None = None
        """Rows, in that order."""
        own = len(bank.table.owned[bank.name].experts)
        assert own + len(self.copied) == len(self.experts), "a rank has all experts that it owns"
        self.filled, self._rows, self._spare = False, [], []
        self.version = bank.table.master._version
        """Of the weights with which the layer computes."""
        self.gathers = [coming] if coming.serves(dtype) else []
        missing = self.wanted & ~coming.wanted if self.gathers else self.wanted
        if missing.any():
            self.gathers.append(Gather(bank, dtype, missing))
        self.stale = None if self.gathers and self.gathers[0] is coming else coming
        self.prefetch: Callable[[], None] | None = None
        """Where the layer is computed again: sends for the copies that it will need."""

    def weights(self) -> ExpertPieces:
        """For the experts' op."""
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self.bank.uses += 1  # else a backward pass is computing the layer again
        return ExpertPieces(self, _Materialize.apply(self.bank.table.master, self))  # type: ignore[arg-type]

    def rows(self) -> list[Tensor]:
        """All experts, once `fill` has been called: rows (n, L), which together are `experts` in order."""
        assert self.filled, "experts are read before they are here"
        if self.bank.table.master._version != self.version:
            raise RuntimeError(
                f"bank {self.bank.name!r}: weights were written to between a forward pass and its backward pass, which "
                "needs them as they were; step the optimizer after the last backward pass"
            )
        return self._rows

    def gradients(self) -> tuple[list[Tensor], list[bool]]:
        """Where the gradients of all experts belong, likewise, and whether to add to what is there."""
        bank, table = self.bank, self.bank.table
        part = table.owned[bank.name]
        if any(other is bank for other, _, _ in bank.copying.outgoing):
            bank.copying.finish()  # sums have one order, whenever gradients arrive
        own, add = table.gradient_of(part)
        add_copies = self.copied_gradients is not None
        if self.copied_gradients is None:
            self.copied_gradients = own.new_empty(len(self.copied), own.shape[1], dtype=self.dtype)
        lie = _lie(own, part.experts) | _lie(self.copied_gradients, self.copied)
        found = self._joined(lie)
        return [rows for rows, _ in found], [add if mine else add_copies for _, mine in found]

    def fill(self) -> None:
        """Have all experts here, once copies have come; nothing where they are."""
        if self.filled:
            return
        table = self.bank.table
        part = table.owned[self.bank.name]
        own = table.rows_of(part).to(self.dtype)
        lie = _lie(own, part.experts)
        self._spare = [own] if own.dtype != table.master.dtype else []
        if self.stale is not None:
            self.stale.finish()
        for gather in self.gathers:
            arrived = gather.finish()
            if arrived is not None:
                lie |= _lie(arrived.rows, arrived.experts)
                self._spare += [] if gather is self.bank.kept else [arrived.rows]
        self._rows = [rows for rows, _ in self._joined(lie)]
        self.gathers, self.stale, self.filled = [], None, True

    def _joined(self, lie: dict[int, tuple[Tensor, int]]) -> list[tuple[Tensor, bool]]:
        """The rows of all experts, and whether they are own ones. These are joined where they are next to each other;
        copies come alone, however they arrived: a layer that is computed again must find as many pieces."""
        bank, found = self.bank, []
        for owned, group in groupby(self.experts, key=lambda expert: bank.owners[expert] == bank.rank):
            places = [lie[expert] for expert in group]
            (table, first), many = places[0], len(places)
            found += (
                [(table[first : first + many], True)]
                if owned
                else [(rows[number : number + 1], False) for rows, number in places]
            )
        return found

    def release(self) -> None:
        """Free the rows. `regather` and `fill` bring them back."""
        if self.bank.copying.poison:
            for rows in self._spare:
                rows.fill_(torch.nan)
        self._rows, self._spare, self.filled = [], [], False

    def regather(self) -> None:
        """Send for the copies again, for the backward pass."""
        if self.prefetch is not None:
            self.prefetch()
        elif not self.filled and not self.gathers:
            self.gathers = [Gather(self.bank, self.dtype, self.wanted)]

    def forget(self) -> None:
        """Let go of the rows; autograd keeps them where it needs them."""
        self._rows, self._spare = [], []


def rows_of(experts: Sequence[int], rows: Tensor, lying: Sequence[int]) -> Tensor:
    """The rows of some of the experts that lie there, in this order: as they lie, where they are consecutive."""
    number = {expert: number for number, expert in enumerate(lying)}
    places = [number[expert] for expert in experts]
    consecutive = [*runs(places)]
    if len(consecutive) == 1:
        _, first, count = consecutive[0]
        return rows[first : first + count]
    return rows[places]


def _lie(rows: Tensor, experts: Sequence[int]) -> dict[int, tuple[Tensor, int]]:
    """By expert, the tensor in which it lies, and the row."""
    return {expert: (rows, number) for number, expert in enumerate(experts)}


class _Materialize(torch.autograd.Function):
    """An empty tensor that stands for all experts of a use: when its gradient comes, theirs have been computed."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, use: Materialized) -> Tensor:
        ctx.use = use
        ctx.set_materialize_grads(False)
        return master.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        use: Materialized = ctx.use
        if use.freed or not torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            use.release()
        use.bank.give_back(use)
        return None, None


class BackwardBegins(torch.autograd.Function):
    """A layer's output as it is; its gradient's arrival lets copies be gathered again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, use: Materialized) -> Tensor:
        ctx.use = use
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.use.bank.copying.again(ctx.use)
        return grads[0], None


class BackwardNeeds(torch.autograd.Function):
    """The experts' output as it is; its gradient waits until the matrices are there again."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, use: Materialized) -> Tensor:
        ctx.use = use
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.use.regather()
        ctx.use.fill()
        return grads[0], None
