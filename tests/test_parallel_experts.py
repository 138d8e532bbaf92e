"""Owned experts against one process: outputs and every gradient, bit for bit where all numbers are small integers."""

import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.models.names import logical_tensors
from moesaic.moe.layer import MoE
from moesaic.moe.routing import RouterInput, Routing
from moesaic.moe.topk import TopKRouter
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.own import own_experts
from moesaic.parallel.placement import OwnerMap
from moesaic.parallel.ranks import Ranks, ranks_of
from moesaic.parallel.reshard import reshard
from moesaic.parallel.shard import slot_tables
from moesaic.parallel.slots import ExpertRows
from moesaic.parallel.spawn import run_ranks

DIM, HIDDEN = 4, 6


@dataclass(frozen=True)
class Case:
    """A layer's experts, who owns them, and which tokens go where on which rank."""

    owners: tuple[int, ...]
    tokens: tuple[int, ...]
    """Tokens of each rank."""
    choose: str = "random"
    """`random`, `one` (all to expert 1) or `skip` (expert 0 gets none)."""
    max_rows: int | None = None
    shared: int = 0

    @property
    def ranks(self) -> int:
        return len(self.tokens)


CASES = {
    "even": Case((0, 0, 1, 1), (5, 5)),
    "experts do not divide": Case((0, 0, 1, 1, 1), (4, 7)),
    "interleaved owners": Case((1, 0, 1, 0, 1), (6, 3)),
    "a rank owns nothing": Case((0, 0, 2, 2), (3, 4, 5)),
    "a rank without tokens": Case((0, 1, 2, 1), (3, 0, 5)),
    "nobody has tokens": Case((0, 1, 1), (0, 0)),
    "all to one": Case((0, 1, 1), (6, 9), "one"),
    "an expert without tokens": Case((0, 0, 1), (6, 5), "skip"),
    "rounds": Case((0, 0, 1, 1), (7, 9), max_rows=3),
    "rounds, all to one": Case((0, 1, 1), (6, 9), "one", max_rows=4),
    "rounds, a rank owns nothing": Case((0, 0, 2, 2), (3, 0, 9), max_rows=1),
    "shared experts": Case((0, 1, 1), (6, 9), shared=1),
    "rounds and shared experts": Case((0, 1, 1), (6, 9), max_rows=5, shared=1),
    "four ranks": Case((3, 2, 1, 0, 0, 1), (2, 3, 4, 5), max_rows=6),
}


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def layer_of(case: Case) -> MoE:
    """Squared ReLU, integers for weights: every product and sum is exact, in any order."""
    experts = len(case.owners)
    router = TopKRouter.Config(k=2)
    config = MoE.Config(
        num_experts=experts, hidden=HIDDEN, router=router, expert="relu2", shared_experts=case.shared
    )
    layer = MoE(config, DIM).double()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=number))
    return layer


def routing_of(case: Case, rank: int) -> Routing:
    """Two experts per token, gates in quarters."""
    tokens, experts = case.tokens[rank], len(case.owners)
    generator = torch.Generator().manual_seed(100 + rank)
    chosen = torch.rand(tokens, experts, generator=generator)
    if case.choose == "skip":
        chosen[:, 0] = -1
    picks = chosen.topk(2, -1).indices
    if case.choose == "one":
        picks = torch.ones_like(picks)
    gates = integers(tokens, 2, seed=200 + rank) / 4
    some = torch.full((tokens, experts), 1 / experts, dtype=torch.float64)
    return Routing.token_choice(picks, gates.requires_grad_(), probabilities=some, logits=some)


def go(layer: MoE, x: Tensor, routing: Routing, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of inputs."""
    x = x.requires_grad_()
    y = layer(x, routing)
    grads = torch.autograd.grad(y, [x, routing.weights], grad, retain_graph=True)
    y.backward(grad)
    return {"y": y.detach(), "x": grads[0], "gates": grads[1]}


def on_one_process(case: Case) -> dict[str, Tensor]:
    """All ranks' tokens through one layer: per rank what it should see, and the weights' gradients."""
    layer = layer_of(case)
    found: dict[str, Tensor] = {}
    for rank, tokens in enumerate(case.tokens):
        x, grad = integers(tokens, DIM, seed=300 + rank), integers(tokens, DIM, seed=400 + rank)
        seen = go(layer, x, routing_of(case, rank), grad)
        found |= {f"{name} {rank}": value for name, value in seen.items()}
    return found | {f"grad {n}": t for n, t in logical_tensors(layer, lambda t: t.grad).items()}


def place(layer: MoE, case: Case, owners: tuple[int, ...]) -> Ranks:
    """Own the layer's experts, with the values that they had."""
    ranks = ranks_of(ParallelConfig(), "cpu")
    values = {name: tensor.detach().clone() for name, tensor in logical_tensors(layer).items()}
    config = ParallelConfig(experts=OwnedExperts(max_rows=case.max_rows, compare_plans=True))
    own_experts(layer, config, ranks, OwnerMap(case.ranks, {"experts": owners}))
    with torch.no_grad():
        for table in slot_tables(layer):
            for name, expert, matrix in table.each():
                matrix.copy_(values[name][expert])
    return ranks


def on_a_rank(case: Case, *, then: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """The same with owned experts; `then` are owners to move to before anything is computed."""
    layer = layer_of(case)
    ranks = place(layer, case, case.owners)
    assert ranks.mesh is not None
    group = ranks.mesh.get_group("dp_shard")
    if then is not None:
        reshard(layer, None, OwnerMap(case.ranks, {"experts": then}), slab=1)
    rank, tokens = ranks.rank, case.tokens[ranks.rank]
    x, grad = integers(tokens, DIM, seed=300 + rank), integers(tokens, DIM, seed=400 + rank)
    seen = go(layer, x, routing_of(case, rank), grad)
    found = {f"{name} {rank}": value for name, value in seen.items()}
    for table in slot_tables(layer):
        table.master.grad = torch.zeros_like(table.master) if table.master.grad is None else table.master.grad
    for name, value in logical_tensors(layer, lambda t: t.grad).items():
        if isinstance(value, ExpertRows):
            found[f"grad {name}"] = value.whole(group)
        else:
            dist.all_reduce(value)
            found[f"grad {name}"] = value
    return found


def compare(case: Case, results: list[dict[str, Tensor]]) -> None:
    want = on_one_process(case)
    for rank, found in enumerate(results):
        mine = {f"{name} {rank}" for name in ("y", "x", "gates")}
        assert found.keys() == mine | {name for name in want if name.startswith("grad")}
        for name, value in found.items():
            assert torch.equal(value, want[name]), f"rank {rank}: {name}"


def test_owned_experts_are_one_process_bit_for_bit() -> None:
    for ranks in (2, 3, 4):  # one start for all cases of so many ranks
        cases = {name: case for name, case in CASES.items() if case.ranks == ranks}
        results = run_ranks(lambda cases=cases: [on_a_rank(case) for case in cases.values()], ranks)
        for index, case in enumerate(cases.values()):
            compare(case, [of_rank[index] for of_rank in results])


def test_moved_experts_compute_the_same() -> None:
    moves = [
        (Case((0, 0, 1, 1), (5, 5)), (1, 0, 1, 0)),
        (Case((0, 0, 1, 1, 1), (4, 7)), (0, 0, 0, 0, 0)),
        (Case((1, 1, 1), (4, 7)), (0, 1, 0)),
    ]
    results = run_ranks(lambda: [on_a_rank(case, then=then) for case, then in moves], 2)
    for index, (case, _) in enumerate(moves):
        compare(case, [of_rank[index] for of_rank in results])


@pytest.mark.gpu
def test_the_host_waits_once_per_layer() -> None:
    """For the counts. A group of one rank sends as many do."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        ranks = ranks_of(ParallelConfig(), "cuda")
        layer = MoE(MoE.Config(num_experts=4, hidden=32, router=TopKRouter.Config(k=2)), 32).cuda()
        own_experts(layer, ParallelConfig(experts=OwnedExperts()), ranks)
        torch.nn.init.normal_(slot_tables(layer)[0].master)
        x = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)

        def go() -> None:
            layer(x, layer.route(RouterInput(tokens=x, mode="train"))).sum().backward()

        go()  # groups and kernels are made
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            go()
            torch.cuda.set_sync_debug_mode("default")
        assert len([found for found in caught if "called a synchronizing" in str(found.message)]) == 1
    finally:
        dist.destroy_process_group()
