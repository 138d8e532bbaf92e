"""Copies of experts in unusual lives: nothing that happens between passes, and no timing, changes a bit of a later one.

Real numbers here, SwiGLU in float32 and bf16: the same plan must give the same bits, whatever comes between.
"""

import gc
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.moe.layer import MoE
from moesaic.moe.routing import Routing
from moesaic.moe.topk import TopKRouter
from moesaic.parallel import all_to_all
from moesaic.parallel.collectives import Arrived, Transfer
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.materialize import Materialized
from moesaic.parallel.own import own_experts
from moesaic.parallel.placement import Present
from moesaic.parallel.ranks import ranks_of
from moesaic.parallel.slots import Slots, slots_of
from moesaic.parallel.spawn import run_ranks

DIM, EXPERTS, RANKS = 12, 6, 2
Values = dict[str, Tensor]


class Stack(torch.nn.Module):
    """Two layers, one after the other, with experts of their own or the same."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        config = MoE.Config(num_experts=EXPERTS, hidden=16, router=TopKRouter.Config(k=2))
        first = MoE(config, DIM, name="layer0")
        second = MoE(config, DIM, name="layer1", bank=first.bank if shared else None)
        self.layers = torch.nn.ModuleList([first, second])

    def forward(self, x: Tensor, routings: Sequence[Routing], recompute: bool = False) -> Tensor:
        for layer, routing in zip(self.layers, routings, strict=True):
            layer.dispatcher.recomputed = recompute  # type: ignore[union-attr]
            found = (
                checkpoint(layer, x, routing, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else layer(x, routing)
            )
            x = x + found  # type: ignore[operator]
        return x


class Lives:
    """A model on ranks, which can be brought back to its first state."""

    def __init__(self, shared: bool = False) -> None:
        self.model = Stack(shared)
        ranks = ranks_of(ParallelConfig(), "cpu")
        own_experts(self.model, ParallelConfig(experts=OwnedExperts(compare_plans=True)), ranks)
        slots = slots_of(self.model)
        assert slots is not None
        self.slots: Slots = slots
        self.rank = ranks.rank
        self.plans = [plan(0.5, seed) for seed in range(3)]
        (self.master,) = [table.master for table in slots]

    def begin(self, *, rematerialize: bool = False, accumulate: str = "each", which: int = 0) -> None:
        """First weights, no gradients, a plan."""
        copying = self.slots.copying
        copying.rematerialize, copying.accumulate, copying.poison = rematerialize, accumulate, True  # type: ignore[assignment]
        with torch.no_grad():
            self.master.copy_(torch.randn(self.master.shape, generator=seeded(self.rank)) / 4)
        self.optimizer = torch.optim.AdamW([self.master], lr=0.1, fused=True)
        self.slots[0].clear()  # type: ignore[operator]
        self.plan(which)

    def plan(self, which: int) -> None:
        for bank in self.slots.banks.values():
            bank.present = bank.alone | self.plans[which]

    def prefetch(self, dtype: torch.dtype = torch.float32) -> None:
        for layer in self.model.layers:
            layer.dispatcher.prefetch(dtype)  # type: ignore[union-attr]

    def limit(self, max_rows: int | None) -> None:
        for layer in self.model.layers:
            layer.dispatcher.max_rows = max_rows  # type: ignore[union-attr]

    def abandon(self) -> None:
        """Forget gradients that were on their way in a step that failed."""
        for bank in self.slots.banks.values():
            bank.drop_held()
        self.slots.copying.outgoing.clear()

    def output(self, dtype: torch.dtype = torch.float32, recompute: bool = False) -> tuple[Tensor, Values]:
        """A forward pass; the output, and leaves whose gradients its backward pass makes."""
        x = torch.randn(7 + self.rank, DIM, generator=seeded(10 + self.rank)).to(dtype).requires_grad_()
        routings = [routing(len(x), seed) for seed in (20, 30)]
        y = self.model(x, routings, recompute)
        return y, {"x": x, "gates 0": routings[0].weights, "gates 1": routings[1].weights}

    def backward(self, y: Tensor, *, again: bool = False) -> None:
        y.backward(torch.randn(y.shape, generator=seeded(40 + self.rank)).to(y.dtype), retain_graph=again)

    def step(self, dtype: torch.dtype = torch.float32, recompute: bool = False) -> Values:
        """A whole step but for the optimizer's; everything that it computes."""
        self.slots.begin(last=True)
        y, leaves = self.output(dtype, recompute)
        for leaf in leaves.values():
            leaf.retain_grad()
        self.backward(y)
        self.slots.settle()
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        assert self.master.grad is not None
        found = {"y": y.detach(), "experts": self.master.grad.clone(), **grads}
        self.slots[0].clear()  # type: ignore[operator]
        assert all(value is not None and value.isfinite().all() for value in found.values())
        return found  # type: ignore[return-value]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plan(density: float, seed: int) -> Present:
    return np.random.default_rng(seed).random((RANKS, EXPERTS)) < density


def routing(tokens: int, seed: int) -> Routing:
    """Nobody chooses the last expert: its copies are not needed."""
    seed += dist.get_rank()
    scores = torch.rand(tokens, EXPERTS, generator=seeded(seed))
    scores[:, -1] = 0
    weights, picks = scores.topk(2, -1)
    return Routing.token_choice(picks, weights.requires_grad_(), probabilities=scores, logits=scores)


def same(found: Values, want: Values, what: object = "") -> None:
    assert found.keys() == want.keys()
    for name, value in found.items():
        assert torch.equal(value, want[name]), f"{what}: {name}"


def on_ranks(work: Callable[[Lives], object], *, shared: bool = False) -> None:
    run_ranks(lambda: work(Lives(shared)), RANKS)


def test_how_copies_come_and_go_changes_no_bit() -> None:
    """Freed and gathered again, kept, sent for ahead, computed again: the plan is the same, so the bits are."""

    def work(lives: Lives) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            lives.begin()
            want = lives.step(dtype)
            for rematerialize in (False, True):
                for accumulate, recompute, ahead in (
                    ("each", False, True),
                    ("last", False, False),
                    ("each", True, False),
                    ("last", True, True),
                ):
                    lives.begin(rematerialize=rematerialize, accumulate=accumulate)
                    if ahead:
                        lives.prefetch(dtype)
                    same(lives.step(dtype, recompute), want, (dtype, rematerialize, accumulate, recompute))

    on_ranks(work)


def test_delays_and_copies_that_nobody_uses_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    finish, wait, plan_of = Transfer.finish, all_to_all.Travel.wait, all_to_all.AllToAll.plan

    def late(self: Transfer) -> Arrived:
        time.sleep(chance.random() / 100)
        return finish(self)

    def later(self: all_to_all.Travel) -> None:
        time.sleep(chance.random() / 100)
        wait(self)

    def unpruned(self: all_to_all.AllToAll, plan: object) -> object:
        needed, (turn,) = plan_of(self, plan)  # type: ignore[arg-type]
        here = np.flatnonzero(self.bank.present[self.bank.rank])
        counts = np.zeros(EXPERTS, np.int64)
        pruned = np.flatnonzero(needed[self.bank.rank])
        counts[pruned] = turn.counts
        assert self.bank.rank == 1 or len(here) > len(pruned)  # it owns the one that nobody chooses
        return self.bank.present, [type(turn)(turn.send, turn.receive, turn.taken, turn.sorted, counts[here])]

    chance = random.Random()

    def work(lives: Lives) -> None:
        chance.seed(lives.rank)
        lives.plans[0][:] = True
        lives.begin(rematerialize=True)
        want = lives.step()
        with monkeypatch.context() as patched:
            patched.setattr(Transfer, "finish", late)
            patched.setattr(all_to_all.Travel, "wait", later)
            for _ in range(3):
                lives.begin(rematerialize=True)
                same(lives.step(), want, "delays")
        with monkeypatch.context() as patched:
            patched.setattr(all_to_all.AllToAll, "plan", unpruned)
            lives.begin(rematerialize=True)
            same(lives.step(), want, "unused copies")

    on_ranks(work)


def test_what_comes_between_passes_changes_no_bit() -> None:
    def work(lives: Lives, rematerialize: bool, accumulate: str) -> None:
        def begin(which: int = 0) -> None:
            lives.begin(rematerialize=rematerialize, accumulate=accumulate, which=which)

        def moved() -> None:
            """An optimizer's step."""
            lives.master.grad = torch.ones_like(lives.master)
            lives.optimizer.step()
            lives.slots[0].clear()  # type: ignore[operator]

        begin()
        want = lives.step()
        begin(which=1)
        other = lives.step()
        begin()
        moved()
        after = lives.step()
        assert not torch.equal(after["y"], want["y"])

        begin()
        lives.slots.begin(last=True)
        y, _ = lives.output()
        with torch.no_grad():
            assert torch.equal(lives.output()[0], y)
        lives.backward(y)
        lives.slots.settle()
        assert torch.equal(lives.master.grad, want["experts"]), "an evaluation between the passes"  # type: ignore[arg-type]

        begin()
        lives.output()
        lives.slots.settle()
        assert not lives.slots.copying.order, "a use whose backward pass does not come"
        lives.slots[0].clear()  # type: ignore[operator]
        lives.output()
        same(lives.step(), want, "a forward pass without a backward pass")

        begin()
        y, leaves = lives.output()
        lives.backward(y, again=True)
        lives.backward(y)
        lives.slots.settle()
        torch.testing.assert_close(lives.master.grad, 2 * want["experts"])  # added up in another order
        assert torch.equal(leaves["x"].grad, 2 * want["x"])  # type: ignore[arg-type]

        begin()
        lives.prefetch()
        lives.plan(1)
        same(lives.step(), other, "a plan that changes while copies of another are under way")

        begin()
        lives.prefetch()
        moved()
        same(lives.step(), after, "an optimizer's step while copies are under way")

        begin()
        with torch.no_grad():
            lives.output()
        moved()
        same(lives.step(), after, "an optimizer's step after an evaluation")

    settings = [(False, "each"), (False, "last"), (True, "each"), (True, "last")]
    on_ranks(lambda lives: [work(lives, *setting) for setting in settings])


def test_freeing_changes_no_bit_where_layers_share_experts_and_batches_add_up() -> None:
    """An expert's gradient is then a sum of many parts, which must have one order."""

    def work(lives: Lives) -> None:
        for accumulate in ("each", "last"):
            found = []
            for rematerialize in (False, True):
                lives.begin(rematerialize=rematerialize, accumulate=accumulate)
                for micro in range(3):
                    lives.slots.begin(last=micro == 2)
                    lives.backward(lives.output()[0])
                lives.slots.settle()
                assert lives.master.grad is not None
                found.append(lives.master.grad)
                lives.slots[0].clear()  # type: ignore[operator]
            assert torch.equal(*found), accumulate

    on_ranks(work, shared=True)


def test_nothing_of_a_step_stays_in_memory() -> None:
    """Not even until the garbage collector comes."""

    def work(lives: Lives) -> None:
        for rematerialize in (False, True):
            for recompute in (False, True):
                for max_rows in (None, 5):
                    lives.begin(rematerialize=rematerialize)
                    lives.limit(max_rows)
                    gc.collect()
                    gc.disable()
                    lives.step(recompute=recompute)
                    alive = [use for use in gc.get_objects() if isinstance(use, Materialized)]
                    gc.enable()
                    assert not alive, (rematerialize, recompute, max_rows)

    on_ranks(work)


def test_weights_that_change_between_the_passes_are_an_error() -> None:
    def work(lives: Lives) -> None:
        for rematerialize in (False, True):
            for max_rows in (None, 5):
                lives.begin(rematerialize=rematerialize)
                lives.limit(max_rows)
                lives.slots.begin(last=True)
                y, _ = lives.output()
                with torch.no_grad():
                    lives.master.add_(1)
                with pytest.raises(
                    RuntimeError, match=r"written to between|modified by an inplace operation"
                ):
                    lives.backward(y)
                lives.abandon()

    on_ranks(work)


def test_gradients_that_are_cleared_too_early_are_an_error() -> None:
    """Copies' gradients are still to be added to them, and must not be added to those of a later step."""

    def work(lives: Lives) -> None:
        for accumulate in ("each", "last"):
            lives.begin(accumulate=accumulate)
            lives.slots.begin(last=False)
            lives.backward(lives.output()[0])
            lives.master.grad = None
            lives.slots.begin(last=True)
            y, _ = lives.output()
            with pytest.raises(
                RuntimeError, match="cleared before those of copies had been added; after the last"
            ):
                lives.backward(y)
            lives.slots.copying.outgoing.clear()

    on_ranks(work)
