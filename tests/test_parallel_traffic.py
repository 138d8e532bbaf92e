"""What ranks that own experts count of their traffic, against numbers found by hand."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.moe.layer import MoE
from moesaic.moe.routing import Routing
from moesaic.moe.topk import TopKRouter
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.own import own_experts
from moesaic.parallel.placement import OwnerMap
from moesaic.parallel.ranks import ALONE, ranks_of
from moesaic.parallel.shard import slot_tables
from moesaic.parallel.spawn import run_ranks
from moesaic.parallel.traffic import Meter, StepTraffic

DIM, HIDDEN = 4, 6
ROW = DIM * 8
OWNERS = (0, 1, 1)
PICKS = {0: [[0, 1], [1, 2], [0, 2]], 1: [[0, 1], [0, 1]]}
ROWS = [4, 6]  # expert 0: two of either rank; experts 1 and 2: four of rank 0, two of rank 1
CROSS = 4 + 2  # rows whose expert is on the other rank
COUNTS = 2 * len(OWNERS) * 8


def measure(max_rows: int | None, passes: str) -> StepTraffic:
    """One pass of a layer on this rank of two."""
    config = MoE.Config(num_experts=len(OWNERS), hidden=HIDDEN, router=TopKRouter.Config(k=2))
    layer, ranks = MoE(config, DIM).double(), ranks_of(ParallelConfig(), "cpu")
    layout = ParallelConfig(experts=OwnedExperts(max_rows=max_rows))
    own_experts(layer, layout, ranks, OwnerMap(2, {"experts": OWNERS}))
    for table in slot_tables(layer):
        torch.nn.init.ones_(table.master)
    picks = torch.tensor(PICKS[ranks.rank])
    some = torch.full((len(picks), len(OWNERS)), 1 / 3, dtype=torch.float64)
    gates = torch.ones(picks.shape, dtype=torch.float64, requires_grad=True)
    routing = Routing.token_choice(picks, gates, probabilities=some, logits=some)
    x = torch.ones(len(picks), DIM, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return layer(x, routing)

    meter = Meter(layer, ranks, micro_batches=1, dtype=torch.float64)
    run(x).sum().backward()  # what happened before is forgotten
    meter.reset()
    if passes == "forward":
        with torch.no_grad():
            run(x)
    elif passes == "forward, backward":
        run(x).sum().backward()
    else:
        again = checkpoint(run, x, use_reentrant=False)
        assert isinstance(again, Tensor)
        again.sum().backward()
    found = meter.collect()
    assert found is not None
    return found


def test_rows_and_bytes_of_a_layer() -> None:
    cases = [
        (None, "forward, backward"),
        (None, "forward"),
        (None, "forward, forward, backward"),
        (2, "forward, backward"),
    ]
    found, same = run_ranks(lambda: [measure(*case) for case in cases], 2)
    assert found == same  # all ranks know the same
    both, forward, again, rounds = found
    once = 2 * CROSS * ROW  # there and back

    assert both.rows == ROWS
    assert both.max_over_mean == 1.2
    assert (both.sent["tokens"], both.sent["counts"]) == (2 * once, COUNTS)
    assert all(seconds > 0 for seconds in both.waited)
    record = both.record()
    assert record["traffic/rows"] == ROWS
    assert [name for name in record if name.startswith("time/")] == [
        "time/waited",
        "time/waited_for_copies",
    ]

    assert (forward.rows, forward.sent["tokens"], forward.sent["counts"]) == (ROWS, once, COUNTS)
    # what is computed again counts as sent; the way back may be left out, since no gradient needs what it brings
    assert (again.rows, again.sent["counts"]) == (ROWS, 2 * COUNTS)
    assert 2.5 * once <= again.sent["tokens"] <= 3 * once
    assert (rounds.rows, rounds.sent["counts"]) == (ROWS, COUNTS)
    assert 2.5 * once <= rounds.sent["tokens"] <= 3 * once


def test_a_model_without_owned_experts_has_no_traffic() -> None:
    layer = MoE(MoE.Config(num_experts=3, hidden=HIDDEN, router=TopKRouter.Config(k=2)), DIM)
    meter = Meter(layer, ALONE, micro_batches=1, dtype=torch.float32)
    meter.reset()
    assert meter.collect() is None
