"""The transformer against plain code in float64, and the promises that training and generation rest on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from references import largest_error, moe_by_tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels.rotary import rotate
from moesaic.models import attention
from moesaic.models.accounting import account
from moesaic.models.names import logical_tensors
from moesaic.models.rope import rotations
from moesaic.models.transformer import Transformer
from moesaic.moe import BalanceLoss, MoE, RouterInput, TopKRouter, ZLoss, aux_loss
from moesaic.moe.feedforward import FeedForward
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize

EXACT = 1e-12
SPARSE = MoE.Config(
    num_experts=4,
    hidden=6,
    shared_experts=1,
    router=TopKRouter.Config(k=2, score="sigmoid", bias_rate=0.01, jitter=0.1),
    aux=(BalanceLoss(coef=0.1), ZLoss(coef=0.01)),
)
DENSE = FeedForward.Config(hidden=12)
TINY = Transformer.Config(dim=8, layers=2, heads=4, kv_heads=2, ffn=SPARSE, ffn_at={"0": DENSE})
VARIANTS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "dense": {"ffn": DENSE},
    "untied_peri": {"tied": False, "norm": "peri"},
    "plain_attention": {"kv_heads": None, "qk_norm": False, "head_dim": 6},
    "shared_bank": {"ffn": replace(SPARSE, bank="all"), "ffn_at": {}},
}
VOCAB = 11


def model(**changes: Any) -> Transformer:
    return Transformer(replace(TINY, **changes), VOCAB, seed=3).double()


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Rotate neighbouring channels of one vector, pair by pair."""
    parts = []
    for pair in range(x.shape[0] // 2):
        angle = torch.tensor(position * theta ** (-2 * pair / x.shape[0]), dtype=torch.float64)
        a, b = x[2 * pair], x[2 * pair + 1]
        parts += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(parts)


def sequence_by_hand(net: Transformer, ids: Tensor) -> Tensor:
    """Logits of one sequence: loops over layers, heads and positions; no cache, no kernels."""
    config, count = net.config, len(ids)
    heads, groups, channels = config.heads, config.key_heads, config.channels
    x = net.embedding[ids]
    for index, block in enumerate(net.blocks):
        normed = rms(x, block.attention_norm.weight)
        q, k, v = (normed @ block.attention.qkv.T).split([n * channels for n in (heads, groups, groups)], -1)
        rows = []
        for t in range(count):
            outs = []
            for head in range(heads):
                group = head // (heads // groups)
                span = slice(head * channels, (head + 1) * channels)
                key_span = slice(group * channels, (group + 1) * channels)
                query, scores = q[t, span], []
                if block.attention.q_norm is not None:
                    query = rms(query, block.attention.q_norm.weight)
                for s in range(t + 1):
                    key = k[s, key_span]
                    if block.attention.k_norm is not None:
                        key = rms(key, block.attention.k_norm.weight)
                    scores.append(turned(query, t) @ turned(key, s) / channels**0.5)
                outs.append(torch.stack(scores).softmax(0) @ v[: t + 1, key_span])
            rows.append(block.attention.out @ torch.cat(outs))
        y = torch.stack(rows)
        x = x + (y if block.attention_out_norm is None else rms(y, block.attention_out_norm.weight))
        normed = rms(x, block.ffn_norm.weight)
        if isinstance(block.ffn, MoE):
            routing = block.ffn.route(RouterInput(tokens=normed, mode="eval", layer=index))
            bank = block.ffn.experts.source
            holder = block.ffn if block.ffn.bank is not None else replace_bank(block.ffn, bank)
            y = moe_by_tokens(holder, normed, routing)
        else:
            gate, up = normed @ block.ffn.w1[0].T, normed @ block.ffn.w1[1].T
            y = (F.silu(gate) * up) @ block.ffn.w2.T
        x = x + (y if block.ffn_out_norm is None else rms(y, block.ffn_out_norm.weight))
    return rms(x, net.norm.weight) @ (net.embedding if net.head is None else net.head).T


def replace_bank(moe: MoE, bank: Any) -> Any:
    """The layer as the reference wants it: with the shared bank as its own."""

    class View:
        config, shared = moe.config, moe.shared

    View.bank = bank  # type: ignore[attr-defined]
    return View


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_plain_code(variant: str) -> None:
    net, ids = model(**VARIANTS[variant]), tokens()
    targets = tokens().roll(-1, 1)
    targets[0, 4] = -1
    output = net(ids, targets, mode="eval", dtype=torch.float64)
    logits = torch.stack([sequence_by_hand(net, row) for row in ids])
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    parameters = [p for _, p in sorted(net.named_parameters())]
    assert largest_error(output.loss, want) < EXACT
    assert largest_error(net(ids, mode="eval", dtype=torch.float64).logits, logits) < EXACT
    ours = torch.autograd.grad(output.loss, parameters)
    for got, exact in zip(ours, torch.autograd.grad(want, parameters), strict=True):
        assert largest_error(got, exact) < EXACT


def test_a_document_is_computed_as_if_alone() -> None:
    net, ids = model(), tokens(1, 9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    together = net(ids, mode="eval", documents=documents, dtype=torch.float64).logits
    alone = [net(ids[:, a:b], mode="eval", dtype=torch.float64).logits for a, b in ((0, 3), (3, 7), (7, 9))]
    assert largest_error(together, torch.cat(alone, 1)) < EXACT
    assert largest_error(net(ids, mode="eval", dtype=torch.float64).logits, together) > 1e-3


def test_the_past_does_not_see_the_future() -> None:
    net, ids = model(), tokens(1, 9)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCAB
    before, after = (net(x, mode="eval", dtype=torch.float64).logits for x in (ids, changed))
    assert largest_error(after[:, :6], before[:, :6]) < EXACT
    assert largest_error(after[:, 6:], before[:, 6:]) > 1e-3


@pytest.mark.parametrize("variant", ["mixed", "plain_attention"])
def test_cache_gives_the_logits_of_the_whole(variant: str) -> None:
    net, ids = model(**VARIANTS[variant]), tokens(2, 9)
    whole = net(ids, mode="eval", dtype=torch.float64).logits
    cache = net.new_cache(2, 9, dtype=torch.float64)
    pieces = [
        net(ids[:, a:b], mode="eval", dtype=torch.float64, cache=cache).logits for a, b in ((0, 4), (4, 7))
    ]
    pieces += [net(ids[:, t : t + 1], mode="eval", dtype=torch.float64, cache=cache).logits for t in (7, 8)]
    assert largest_error(torch.cat(pieces, 1), whole) < EXACT


@pytest.mark.parametrize("cached", [False, True])
def test_keys_of_a_group_may_be_repeated(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, whose fused kernels for masks know no groups."""
    net, ids = model(), tokens(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])

    def logits() -> Tensor:
        cache = net.new_cache(2, 9, dtype=torch.float64) if cached else None
        known = {} if cached else {"documents": documents}
        return net(ids, mode="eval", dtype=torch.float64, cache=cache, **known).logits

    want = logits()
    monkeypatch.setattr(attention, "fused_with_groups", lambda *_: False)
    assert largest_error(logits(), want) < EXACT


def run(net: Transformer, ids: Tensor) -> list[Tensor]:
    """Loss, counts and every gradient of a training pass with jitter and auxiliary terms."""
    net.zero_grad()
    output = net(ids, ids.roll(-1, 1), mode="train", step=5, seed=2, dtype=net.embedding.dtype)
    assert output.loss is not None
    loss = output.loss + aux_loss(output.layers)
    loss.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return [loss.detach(), *(layer.counts for layer in output.layers), *grads]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recomputation_changes_no_bit(dtype: torch.dtype) -> None:
    net, ids = model().to(dtype), tokens(3, 33)
    plain = run(net, ids)
    parallelize(net, ParallelConfig(recompute="block"))
    calls = []
    assert isinstance(net.blocks[1].ffn, MoE)
    route = net.blocks[1].ffn.route
    net.blocks[1].ffn.route = lambda inputs: calls.append(inputs.mode) or route(inputs)  # type: ignore[method-assign]
    assert all(torch.equal(a, b) for a, b in zip(run(net, ids), plain, strict=True))
    assert calls == ["train"]  # routing is never run again


@pytest.mark.slow
def test_compiled_regions_agree() -> None:
    net, ids = model().float(), tokens(3, 33)
    plain = run(net, ids)
    compiled = run(parallelize(net, ParallelConfig(compile=True)), ids)
    for got, want in zip(compiled, plain, strict=True):
        assert largest_error(got.double(), want.double()) < 1e-4


def test_bf16_compute_keeps_fp32_masters() -> None:
    net, ids = model().float(), tokens(3, 33)
    wide = net(ids, ids.roll(-1, 1), mode="eval").loss
    narrow = net(ids, ids.roll(-1, 1), mode="eval", dtype=torch.bfloat16).loss
    assert narrow.dtype == torch.float32
    assert abs(narrow.item() / wide.item() - 1) < 1e-2
    narrow.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_rotation_is_relative_and_keeps_length() -> None:
    q, k = torch.randn(2, 1, 12, 1, 8, dtype=torch.float64)
    early = rotations(0, 12, 8, 100.0, dtype=torch.float64, device=q.device)
    late = rotations(50, 12, 8, 100.0, dtype=torch.float64, device=q.device)
    scores = [torch.einsum("bshc,bthc->st", rotate(q, turns), rotate(k, turns)) for turns in (early, late)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(rotate(q, late).norm(dim=-1), q.norm(dim=-1))


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    small, large = Transformer(TINY, VOCAB, seed=3), Transformer(replace(TINY, ffn_at={}), VOCAB, seed=3)
    ours, theirs = logical_tensors(small), logical_tensors(large)
    same = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert len(same) > 15
    assert all(torch.equal(ours[name], theirs[name]) for name in same)
    other = logical_tensors(Transformer(TINY, VOCAB, seed=4))
    assert not torch.equal(ours["banks.layer1.w1"], other["banks.layer1.w1"])
    fewer = Transformer(replace(TINY, ffn=replace(SPARSE, num_experts=3)), VOCAB, seed=3)
    assert torch.equal(logical_tensors(fewer)["banks.layer1.w1"], ours["banks.layer1.w1"][:3])


def test_initial_spread() -> None:
    config = replace(TINY, dim=64, heads=4, layers=8, ffn=replace(SPARSE, hidden=96))
    named = logical_tensors(Transformer(config, 500))
    depth = (2 * 8) ** -0.5
    for name, std in {
        "embedding": 1 / 8,
        "blocks.3.attention.qkv": 1 / 8,
        "blocks.3.attention.out": depth / 8,
        "banks.layer3.w1": 1 / 8,
        "banks.layer3.w2": depth * 96**-0.5,
        "blocks.3.ffn.router.gate": 1 / 8,
    }.items():
        assert named[name].std().item() == pytest.approx(std, rel=0.1), name
    assert torch.equal(named["blocks.3.ffn_norm.weight"], torch.ones(64))


def test_logical_names() -> None:
    names = set(logical_tensors(model()))
    assert {"banks.layer1.w1", "banks.layer1.w2", "blocks.1.ffn.router.bias", "blocks.0.ffn.w1"} <= names
    shared = logical_tensors(model(**VARIANTS["shared_bank"]))
    assert [name for name in shared if name.startswith("banks.")] == ["banks.all.w1", "banks.all.w2"]
    assert sum(t.numel() for t in shared.values()) == sum(
        t.numel() for t in model(**VARIANTS["shared_bank"]).state_dict().values()
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_accounting_counts_real_parameters(variant: str) -> None:
    net = model(**VARIANTS[variant])
    counted = account(net.config, VOCAB, seq_len=9)
    assert counted.parameters == sum(p.numel() for p in net.parameters())
    net.zero_grad()
    # the parameters that one token's loss moves are the active ones, but for unused rows of the embedding
    net(torch.tensor([[4]]), torch.tensor([[5]]), mode="eval", dtype=torch.float64).loss.backward()
    touched = 0
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        if ".bank." in name or name.startswith("banks."):
            touched += sum(
                expert.numel() for expert, g in zip(parameter, parameter.grad, strict=True) if g.any()
            )
        else:
            touched += parameter.numel()
    in_banks = [p for name, p in net.named_parameters() if ".bank." in name or name.startswith("banks.")]
    assert counted.expert_parameters == sum(p.numel() for p in in_banks)
    assert touched <= counted.active_parameters
    if variant != "shared_bank":  # two layers may happen to choose the same expert of a shared bank
        assert touched == counted.active_parameters


def test_flops_equal_a_count_of_matrix_products() -> None:
    config = replace(TINY, dim=32, ffn=FeedForward.Config(hidden=48), ffn_at={}, kv_heads=2)
    net = Transformer(config, 100)
    ids = torch.zeros(4, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        net(ids, mode="eval")
    measured = counter.get_total_flops() / ids.numel()
    average = 2 * config.layers * 2 * config.dim * (16 + 1) // 2
    without_attention = account(config, 100, seq_len=16).flops_per_token - average
    full = (
        2 * config.layers * 2 * config.dim * 16
    )  # where a build counts attention, it counts masked positions too
    assert measured in (without_attention, without_attention + full)


def test_sparse_flops_are_those_of_the_active_experts() -> None:
    dense = account(replace(TINY, ffn=FeedForward.Config(hidden=18), ffn_at={}), VOCAB, seq_len=9)
    sparse = account(replace(TINY, ffn_at={}), VOCAB, seq_len=9)  # 2 of 4 experts of 6, one shared of 6
    router = 2 * TINY.layers * TINY.dim * SPARSE.num_experts
    assert sparse.flops_per_token == dense.flops_per_token + router
    assert sparse.train_flops_per_token == 3 * sparse.flops_per_token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads: 3 does not divide dim = 8"),
        ({"kv_heads": 3}, "kv_heads: 3 does not divide heads = 4"),
        ({"head_dim": 3}, "head_dim: 3 is odd"),
        ({"layers": 0}, "layers: 0 is not positive"),
        ({"ffn_at": {"2": DENSE}}, "ffn_at: '2' is outside layers 0 to 1"),
        ({"ffn_at": {"first": DENSE}}, "ffn_at: 'first' is not a layer"),
        (
            {"ffn": replace(SPARSE, bank="b"), "ffn_at": {"1": replace(SPARSE, bank="b", hidden=7)}},
            "shares bank 'b'",
        ),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
