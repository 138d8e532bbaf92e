"""Experts across ranks: tokens travel to where their experts are, owners or copies, and the experts' outputs back.

A layer exchanges counts first, the one moment at which the host waits; every rank then finds the same plan, and rows
travel in one round, or in several where a rank would receive more than it has room for. What arrives is sorted by
expert, and of an expert by source, so results do not depend on timing. Copies of experts travel ahead (`materialize`).

Dims: T tokens of this rank, R rows of theirs, N rows that arrive, P ranks, E experts, M experts that are here, D width.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.kernels.combine import combine_rows, gather_rows
from moesaic.kernels.expert_rows import ExpertPieces
from moesaic.moe.experts import Experts
from moesaic.moe.routing import Plan
from moesaic.parallel.agree import made_alike
from moesaic.parallel.banks import Gather, OwnedBank
from moesaic.parallel.collectives import Wanted, uploaded
from moesaic.parallel.materialize import Materialized, OnGradient
from moesaic.parallel.placement import Counts, Present, Round, Topology, digest, rounds, token_plan
from moesaic.parallel.plans import PlanError, check_form
from moesaic.parallel.ranks import waiting_for


@dataclass
class Traffic:
    """What a dispatcher has moved since it was last asked."""

    rows: int = 0
    """Rows that came to this rank's experts, its own included; each once, also where its layer is computed again."""
    rows_alone: int = 0
    """Rows that would have come, had there been no copies."""
    copies: int = 0
    """Experts of others that were here for a forward pass."""
    bytes_tokens: int = 0
    """Rows and their gradients, to other ranks; what is computed again is sent again."""
    bytes_counts: int = 0
    """Counts, to other ranks. Plans that are compared do not count."""
    seconds_waited: float = 0.0
    """By the host, until counts or rows were there. On a GPU only counts let it wait, which includes the GPU's own work
    up to them."""


@dataclass
class AllToAll:
    """Brings rows to where their experts are, owners or copies, and back."""

    group: dist.ProcessGroup
    """Those who share the experts; only rows travel in it, and between steps experts that move."""
    bank: OwnedBank
    """The layer's experts."""
    topology: Topology
    max_rows: int | None = None
    """Most rows that a rank receives at once. More come in several rounds, which backward computes again."""
    compare_plans: bool = False
    """Have all ranks compare what they planned, at every layer."""
    recomputed: bool = False
    """Whether the layer is computed again for its backward pass."""
    name: str = "a layer"
    """In errors."""
    coming: Gather | None = None
    """Copies that were sent for before the layer began."""
    traffic: Traffic = field(default_factory=Traffic)

    def run(
        self,
        x: Float[Tensor, "T D"],
        gates: Float[Tensor, " R"],
        plan: Plan,
        experts: Experts,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "T D"]:
        """See `moe.dispatch.Dispatcher`. All ranks call it together, those without tokens too."""
        coming = self.coming or self.bank.gather(x.dtype)
        self.coming = None
        here, turns = self.plan(plan)
        places, *indices = uploaded(
            [
                np.concatenate([turn.taken.places() for turn in turns]),
                *(turn.sorted.places() for turn in turns),
                *(turn.counts for turn in turns),
            ],
            x.device,
        )
        # `inverse`: of a row of the plan, its place among what is sent
        where, tokens = inverse(places)[plan.where], plan.tokens[places]
        one_round = len(turns) == 1
        per_token, backend = plan.per_token, experts.backend
        sent = gather_rows(
            x, tokens, where, plan.offsets, per_token=per_token, backend=backend
        )  # (R, D), in order of rounds
        freed = self.bank.copying.rematerialize and torch.is_grad_enabled() and not self.recomputed
        use = Materialized(self.bank, x.dtype, here, coming, freed=freed)
        weights = use.weights()
        came_back, aside = [], None
        parts = sent.split([int(turn.send.sum()) for turn in turns])
        for number, (turn, part) in enumerate(zip(turns, parts, strict=True)):
            order, counts = indices[number], indices[len(turns) + number]
            meanwhile = (lambda: shared(x)) if shared is not None and number == 0 else None
            if one_round or not torch.is_grad_enabled():
                rows, aside_now = self._round(part, use, weights, turn, order, counts, experts, meanwhile)
            else:
                rows, aside_now = checkpoint(  # type: ignore[misc]
                    self._round,
                    part,
                    use,
                    weights,
                    turn,
                    order,
                    counts,
                    experts,
                    meanwhile,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            came_back.append(rows)
            aside = aside_now if aside_now is not None else aside
        back = came_back[0] if one_round else torch.cat(came_back)
        y = combine_rows(back, gates, tokens, where, plan.offsets, per_token=per_token, backend=backend)
        if use.freed:
            use.release()
        elif one_round:  # else each round is computed again
            use.forget()
        y = self._after(y, use)
        return y if aside is None else y + aside

    def prefetch(self, dtype: torch.dtype, wanted: Wanted | None = None) -> None:
        """Send for copies now, for when the layer is computed next. None: the plan's."""
        if self.coming is None or not self.coming.serves(dtype):
            if self.coming is not None:
                self.coming.finish()
            self.coming = self.bank.gather(dtype, wanted)

    def plan(self, plan: Plan) -> tuple[Present, list[Round]]:
        """Which experts each rank needs, and this rank's rounds, from everybody's counts.

        The host waits here, and nowhere else. A copy that no row goes to is not needed.
        """
        ranks = self.topology.ranks
        with self.waiting():
            mine = plan.counts.repeat(ranks)
            gathered = torch.empty_like(mine)
            # from each rank to each: when one is gone, all notice
            with waiting_for(f"counts of {self.name}", self.group):
                dist.all_to_all_single(gathered, mine, group=self.group)
            counts = gathered.view(ranks, -1).cpu().numpy()
        self.traffic.bytes_counts += (ranks - 1) * plan.counts.nbytes
        present, bank = self.bank.present, self.bank
        if bank.planner is not None and bank.planner.exact:
            present = present | self._exact(counts)
        tokens = token_plan(counts, present, self.topology)
        here = bank.alone | (tokens.sum(0).T > 0)
        if self.compare_plans:
            self._compare(digest(counts, present, tokens))
        rank = dist.get_rank(self.group)
        if torch._C._current_graph_task_id() == -1:  # else a backward pass is computing the layer again
            self.traffic.rows += int(tokens[:, :, rank].sum())
            self.traffic.rows_alone += int(counts[:, bank.alone[rank]].sum())
            self.traffic.copies += int((here & ~bank.alone)[rank].sum())
            if torch.is_grad_enabled():
                bank.loads += counts
        return here, rounds(tokens, here, rank, self.max_rows)

    def _round(
        self,
        sent: Tensor,
        use: Materialized,
        weights: ExpertPieces,
        turn: Round,
        order: Tensor,
        counts: Tensor,
        experts: Experts,
        meanwhile: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows to their experts and back, in the order in which they were sent; `meanwhile` runs while they travel."""
        there = Travel(self, "rows to their experts", turn.send.tolist(), turn.receive.tolist())
        arriving = there.start(sent)
        aside = None if meanwhile is None else meanwhile()
        use.fill()
        arrived = there.finish(arriving)
        undone = inverse(order)
        out = experts.run(weights, _Reorder.apply(arrived, order, undone), counts)
        if use.freed:
            out = OnGradient.apply(out, use.bring_back)
        out = _Reorder.apply(out, undone, order)
        back = Travel(self, "rows from their experts", turn.receive.tolist(), turn.send.tolist())
        return back.finish(back.start(out)), aside

    def _after(self, y: Tensor, use: Materialized) -> Tensor:
        """The layer's output; where its experts must come again, its backward pass sends for them."""
        again = torch._C._current_graph_task_id() != -1  # a backward pass is computing the layer again
        if again or not (use.freed or (self.recomputed and torch.is_grad_enabled())):
            return y
        if self.recomputed:
            use.prefetch = partial(
                self.prefetch, use.dtype, use.wanted
            )  # a lambda would hold the use that holds it
        self.bank.copying.order.append(use)
        return OnGradient.apply(y, partial(self.bank.copying.again, use))  # type: ignore[no-any-return]

    def _exact(self, counts: Counts) -> Present:
        """What the planner wants, now that counts are known."""
        bank = self.bank
        assert bank.planner is not None
        planner = bank.planner

        def ask(name: str) -> Present:
            found = planner.plan(bank.history, counts, bank.owners, self.topology)
            check_form(name, found, bank.owners, self.topology)
            return found

        return (
            made_alike(ask, [bank.name], digest, self.group)[bank.name] if bank.compared else ask(bank.name)
        )

    def _compare(self, mine: int) -> None:
        found: list[Any] = [None] * self.topology.ranks
        with waiting_for(f"plans of {self.name}", self.group):
            dist.all_gather_object(found, mine, group=self.group)
        if len(set(found)) > 1:
            raise PlanError(f"ranks planned differently for one layer: {found}; this is a bug in moesaic")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it, the host waits for others."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.traffic.seconds_waited += time.perf_counter() - began


class Travel:
    """One exchange of rows, which other work can go on beside; its gradient travels the other way, likewise."""

    def __init__(self, dispatcher: AllToAll, what: str, send: list[int], receive: list[int]) -> None:
        self.dispatcher, self.what, self.send, self.receive = dispatcher, what, send, receive
        self.returning: Tensor | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Begin to send; what is returned must not be read before `finish`."""
        return _Depart.apply(rows, self)  # type: ignore[no-any-return]

    def finish(self, arriving: Tensor) -> Tensor:
        """What arrived."""
        return _Arrive.apply(arriving, self)  # type: ignore[no-any-return]

    def exchange(self, what: str, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        group, traffic = self.dispatcher.group, self.dispatcher.traffic
        own = dist.get_rank(group)
        rows = rows.contiguous()
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        self.rows = rows  # kept until it has left
        self.what_travels = f"{what} of {self.dispatcher.name}"
        with waiting_for(self.what_travels, group):
            self.work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)
        traffic.bytes_tokens += (sum(send) - send[own]) * rows.shape[1] * rows.element_size()
        return out

    def returned(self) -> Tensor:
        """The gradient of what was sent."""
        rows, self.returning = self.returning, None
        assert rows is not None
        return rows

    def wait(self) -> None:
        assert self.work is not None
        with self.dispatcher.waiting(), waiting_for(self.what_travels, self.dispatcher.group):
            self.work.wait()
        del self.work, self.rows


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        return travel.exchange(travel.what, rows, travel.send, travel.receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.travel.wait()
        return ctx.travel.returned(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        travel.wait()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        travel = ctx.travel
        travel.returning = travel.exchange(
            f"gradients of {travel.what}", grads[0], travel.receive, travel.send
        )
        return grads[0], None  # of the shape that autograd expects; what returns has another


class _Reorder(torch.autograd.Function):
    """`rows[order]` for a permutation, given the one that undoes it: its gradient is that, so nothing is added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, undone: Tensor) -> Tensor:
        ctx.save_for_backward(undone)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (undone,) = ctx.saved_tensors
        return grads[0].index_select(0, undone), None, None


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes one."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back
