"""Measuring what copies cost: the same prices on every rank, and a model that is as it was."""

from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from moesaic.moe import MoE, TopKRouter
from moesaic.parallel.all_to_all import AllToAll, Traffic
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.measure import measure_costs
from moesaic.parallel.own import layers_of, own_experts
from moesaic.parallel.placement import OwnerMap
from moesaic.parallel.ranks import Ranks, ranks_of
from moesaic.parallel.slots import Slots, slots_of
from moesaic.parallel.spawn import run_ranks

RANKS = 3
OWNERS = {"even": (0, 0, 1, 1, 2, 2), "few": (1, 2), "one": (0, 0, 0)}
"""The second bank has fewer experts than there are ranks, and of the third two ranks own nothing."""


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MoE(
                MoE.Config(
                    num_experts=len(owners), hidden=16, router=TopKRouter.Config(k=1, normalize="before")
                ),
                8,
                name=name,
            )
            for name, owners in OWNERS.items()
        )


def laid_out(ranks: Ranks, recompute: bool, owned: OwnedExperts) -> tuple[Layers, Slots]:
    model = Layers()
    config = ParallelConfig(experts=owned, recompute="block" if recompute else "none")
    own_experts(model, config, ranks, OwnerMap(RANKS, OWNERS))
    slots = slots_of(model)
    assert slots is not None
    with torch.no_grad():
        for table in slots:
            table.master.normal_()
    return model, slots


def on_a_rank(recompute: bool, owned: OwnedExperts) -> dict[str, dict[str, int]]:
    ranks = ranks_of(ParallelConfig(), "cpu")
    model, slots = laid_out(ranks, recompute, owned)
    for bank in slots.banks.values():
        bank.present = bank.alone | (np.arange(len(bank.owners)) == 0)
    plans = {name: bank.present.copy() for name, bank in slots.banks.items()}
    weights = [table.master.detach().clone() for table in slots]
    costs = measure_costs(model, ranks, micro_batches=2, dtype=torch.float32)

    assert all(parameter.grad is None for parameter in model.parameters())
    for table, before in zip(slots, weights, strict=True):
        assert torch.equal(table.master, before)
    for name, bank in slots.banks.items():
        assert np.array_equal(bank.present, plans[name])
        assert not bank.loads.any()
        assert (bank.uses, bank.kept, bank.planner, bank.history) == (0, None, None, [])
    for _, layer in layers_of(model):
        assert isinstance(layer.dispatcher, AllToAll)
        assert layer.dispatcher.traffic == Traffic()
        assert layer.dispatcher.coming is None
    copying = slots.copying
    assert (copying.accumulate, copying.rematerialize) == (owned.accumulate, owned.rematerialize)
    assert (copying.copies.bytes, copying.gradients.bytes, copying.seconds_waited) == (0, 0, 0.0)
    assert not copying.outgoing
    assert not copying.order
    return {name: asdict(of_bank) for name, of_bank in costs.items()}


def check(recompute: bool, owned: OwnedExperts, times: tuple[int, int, int]) -> None:
    """`times` in a step of two micro-batches: copies forward and backward, and their gradients."""
    first, *others = run_ranks(lambda: on_a_rank(recompute, owned), RANKS)
    assert first.keys() == OWNERS.keys()
    for other in others:
        assert other == first
    for costs in first.values():
        assert costs["row"] > 0
        assert costs["copy_near"] > 0
        assert (costs["gathers_forward"], costs["gathers_backward"], costs["reductions"]) == times
        assert costs["micro_batches"] == 2


def test_every_rank_finds_the_same_and_the_model_stays() -> None:
    check(False, OwnedExperts(), (2, 0, 2))


def test_layers_that_are_computed_again() -> None:
    check(True, OwnedExperts(accumulate="last", rematerialize=True), (2, 2, 1))
