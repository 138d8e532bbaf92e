"""Experts of a bank on one rank for as long as a layer needs them: own ones and copies.

The experts' op reads them where they lie, and writes their gradients where those belong. Two functions mark the places
in the graph where copies are sent for or waited for, and where their gradients are given back. FSSDP: Qing et al.,
arXiv:2502.02581, section 3.

Dims: L length of a row, M experts that are here.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels.expert_rows import ExpertPieces
from moesaic.parallel.banks import Gather, OwnedBank
from moesaic.parallel.collectives import Wanted
from moesaic.parallel.placement import Present


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

    def bring_back(self) -> None:
        """Have all experts here again, sent for by now or earlier."""
        self.regather()
        self.fill()

    def forget(self) -> None:
        """Let go of the rows; autograd keeps them where it needs them."""
        self._rows, self._spare = [], []


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
        gradients, use.copied_gradients = use.copied_gradients, None
        assert gradients is not None, "the experts' op has made them, on a rank without copies too"
        use.bank.give_back(use.copied, gradients, use.wanted)
        return None, None


class OnGradient(torch.autograd.Function):
    """A tensor as it is; when its gradient comes, `act` is called before the gradient goes on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.act()
        return grads[0], None
