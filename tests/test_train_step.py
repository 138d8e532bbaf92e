"""The exactness of a step: how a batch is cut, recomputed or padded changes nothing; evaluation counts nothing."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from references import bias_of, largest_error
from torch import Tensor

from moesaic.data.loader import Batch, Loader
from moesaic.models.names import logical_tensors
from moesaic.models.transformer import Transformer
from moesaic.moe import BalanceLoss, MoE, TopKRouter, ZLoss
from moesaic.moe.feedforward import FeedForward
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.ranks import ALONE
from moesaic.parallel.shard import gradient_norm
from moesaic.train.evaluate import bits_per_byte, evaluate, target_bytes
from moesaic.train.generate import generate, sample
from moesaic.train.nonfinite import explain
from moesaic.train.optim import (
    AdamWConfig,
    Cosine,
    GroupRule,
    Wsd,
    build_optimizer,
    clip_gradients,
    optimizer_tensors,
)
from moesaic.train.rules import StepState, balance_bias, rules_of
from moesaic.train.step import Compute, NonFiniteError, accumulate, update

EXACT = 1e-12
ROUTER = TopKRouter.Config(k=2, score="sigmoid", bias_rate=0.01, jitter=0.1)
SPARSE = MoE.Config(
    num_experts=6, hidden=6, shared_experts=1, router=ROUTER, aux=(BalanceLoss(coef=0.1), ZLoss(coef=0.01))
)
CONFIG = Transformer.Config(
    dim=8, layers=3, heads=2, kv_heads=1, ffn=SPARSE, ffn_at={"0": FeedForward.Config(hidden=12)}
)
WIDE = Compute(torch.device("cpu"), torch.float64, seed=4)
OPTIM = AdamWConfig(lr=0.01, schedule=Cosine(warmup=2))


def model(dtype: torch.dtype = torch.float64, config: Transformer.Config = CONFIG) -> Transformer:
    return Transformer(config, 32, seed=1).to(dtype)


def batch(rows: int = 8, *, padded: bool = True, step: int = 0) -> Batch:
    """A global batch of uneven documents; some rows are padded, one of them entirely."""
    stream = np.random.default_rng(0).integers(1, 32, 4000).astype(np.uint16)
    stream[np.random.default_rng(1).random(4000) < 0.15] = 0
    made = Loader(stream, mark=0, seq_len=16, sequences=rows, seed=0).batch(step)
    if padded:
        made.targets[1, 5:] = -1
        made.targets[4] = -1
        made.targets[6, :9] = -1
    return made


def gradients(net: Transformer) -> dict[str, Tensor]:
    return {n: t.grad for n, t in logical_tensors(net).items() if t.grad is not None}


def step_gradients(micro_batches: int, *, recompute: str = "none", dtype: torch.dtype = torch.float64) -> Any:
    net = parallelize(model(dtype), ParallelConfig(recompute=recompute))  # type: ignore[arg-type]
    compute = replace(WIDE, dtype=dtype)
    sums = accumulate(net, batch(), compute, micro_batches=micro_batches, step=3)
    return sums, gradients(net)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_changes_no_gradient(parts: int, recompute: str) -> None:
    """Rows of very different lengths, one without any counted token, with auxiliary losses and jitter."""
    whole, want = step_gradients(1)
    cut, got = step_gradients(parts, recompute=recompute)
    assert cut.tokens == whole.tokens
    assert largest_error(cut.loss, whole.loss) < 1e-6
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert exact.abs().max() > 0, name
        assert largest_error(got[name], exact) < EXACT, name
    for layer, sums in whole.layers.items():
        assert torch.equal(cut.layers[layer].counts, sums.counts)
        for kind, value in sums.aux.items():
            assert largest_error(cut.layers[layer].aux[kind], value) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recomputation_changes_no_bit_of_a_step(dtype: torch.dtype) -> None:
    plain, want = step_gradients(2, dtype=dtype)
    again, got = step_gradients(2, recompute="block", dtype=dtype)
    assert torch.equal(plain.loss, again.loss)
    assert all(torch.equal(got[name], exact) for name, exact in want.items())
    assert all(torch.equal(plain.layers[n].counts, again.layers[n].counts) for n in plain.layers)


def test_loss_is_the_mean_over_counted_tokens() -> None:
    net, data = model(), batch()
    sums = accumulate(net, data, WIDE, micro_batches=2, step=0)
    assert sums.tokens == int((data.targets >= 0).sum())
    documents = data.documents
    logits = net(
        data.tokens, mode="train", documents=documents, rows=data.rows, seed=4, dtype=torch.float64
    ).logits
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.targets.flatten(), ignore_index=-1)
    assert sums.loss.item() / sums.tokens == pytest.approx(want.item(), rel=1e-6)


def test_counts_are_of_counted_training_tokens_only() -> None:
    net, data = model(), batch()
    sums = accumulate(net, data, WIDE, micro_batches=4, step=0)
    assert all(int(layer.counts.sum()) == 2 * sums.tokens for layer in sums.layers.values())
    before = {name: t.clone() for name, t in logical_tensors(net).items()}
    evaluate(net, [batch(padded=False)], WIDE, np.ones(32, dtype=np.int64))
    assert all(torch.equal(before[name], t) for name, t in logical_tensors(net).items())


def steps(count: int, **changes: Any) -> tuple[Transformer, list[dict[str, float]]]:
    net = model()
    optimizer = build_optimizer(net, OPTIM)
    parallelize(net, ParallelConfig(recompute=changes.get("recompute", "none")))
    logged = []
    for step in range(count):
        sums = accumulate(net, batch(step=step), WIDE, micro_batches=changes.get("parts", 1), step=step)
        logged.append(update(net, optimizer, sums, config=OPTIM, step=step, steps=count, rules=rules_of(net)))
    return net, logged


def test_bias_moves_once_per_step_however_the_step_is_computed() -> None:
    plain, logged = steps(5)
    for changes in ({"parts": 4}, {"recompute": "block"}, {"parts": 2, "recompute": "block"}):
        other, others = steps(5, **changes)
        for block, twin in zip(plain.blocks, other.blocks, strict=True):
            if isinstance(block.ffn, MoE) and isinstance(twin.ffn, MoE):
                assert torch.equal(bias_of(block.ffn), bias_of(twin.ffn))
                assert 0 < bias_of(block.ffn).abs().max() <= 0.05 + 1e-9
        assert [m["loss"] for m in others] == pytest.approx([m["loss"] for m in logged], rel=1e-6)


def test_two_runs_of_one_seed_are_equal_bit_for_bit() -> None:
    first, second = steps(4), steps(4)
    assert first[1] == second[1]
    tensors = logical_tensors(second[0])
    assert all(torch.equal(t, tensors[name]) for name, t in logical_tensors(first[0]).items())


def test_rules_only_where_asked_for() -> None:
    quiet = replace(SPARSE, router=replace(ROUTER, bias_rate=0.0))
    assert rules_of(model(config=replace(CONFIG, ffn=quiet))) == []
    net = model()
    assert rules_of(net) == [balance_bias]
    counts = torch.tensor([5, 0, 1, 2, 2, 2])
    assert balance_bias(net, StepState(0, {1: counts})) == {"router/largest_bias": pytest.approx(0.01)}
    assert isinstance(net.blocks[1].ffn, MoE)
    assert bias_of(net.blocks[1].ffn).tolist() == pytest.approx([-0.01, 0.01, 0.01, 0, 0, 0])


def test_optimizer_equals_plain_adamw() -> None:
    net, twin = model(), model()
    config = replace(OPTIM, clip=0.01, weight_decay=0.3)
    optimizer = build_optimizer(net, config)
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0,
        betas=config.betas,
        eps=config.eps,
        foreach=False,
    )
    for step in range(3):
        accumulate(twin, batch(step=step), WIDE, micro_batches=1, step=step)
        norm = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm()
        for parameter in twin.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.01 / norm.item())
        for group in plain.param_groups:
            group["lr"] = 0.01 * config.schedule.factor(step, 10)
        plain.step()
        plain.zero_grad()
        sums = accumulate(net, batch(step=step), WIDE, micro_batches=1, step=step)
        metrics = update(net, optimizer, sums, config=config, step=step, steps=10, rules=[])
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
        assert metrics["lr"] == plain.param_groups[0]["lr"]
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert largest_error(ours, theirs) < 1e-10


def test_group_rules() -> None:
    rules = (GroupRule(match="*.router.gate", lr=0.1, weight_decay=0.0), GroupRule(match="banks.*", lr=2.0))
    net = model()
    optimizer = build_optimizer(net, replace(OPTIM, groups=rules))
    named = {id(t): name for name, t in logical_tensors(net).items()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[named[id(parameter)]] = (group["factor"], group["weight_decay"])
    assert found["blocks.1.ffn.router.gate"] == (0.1, 0.0)
    assert found["banks.layer2.w1"] == (2.0, 0.1)
    assert found["blocks.1.ffn_norm.weight"] == (1.0, 0.0)
    assert found["embedding"] == (1.0, 0.1)
    assert len(found) == len(list(net.parameters()))
    with pytest.raises(ValueError, match=r"optim\.groups: \['bank\.\*'\] match no parameter"):
        build_optimizer(net, replace(OPTIM, groups=(GroupRule(match="bank.*"),)))


def test_optimizer_state_has_logical_names_from_the_start() -> None:
    net = model()
    optimizer = build_optimizer(net, OPTIM)
    before = set(optimizer_tensors(net, optimizer))
    assert {"optim.exp_avg.banks.layer1.w1", "optim.step.embedding"} <= before
    sums = accumulate(net, batch(), WIDE, micro_batches=1, step=0)
    update(net, optimizer, sums, config=OPTIM, step=0, steps=4, rules=[])
    after = optimizer_tensors(net, optimizer)
    assert set(after) == before
    assert after["optim.exp_avg.banks.layer1.w1"].any()


def test_clipping() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2)), torch.zeros(1)]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 3.0), torch.full((2, 2), 4.0)
    norm = gradient_norm(parameters, ALONE)
    assert norm == pytest.approx(math.sqrt(27 + 64))
    clip_gradients(parameters, norm, 100.0)
    assert parameters[0].grad.tolist() == [3.0] * 3
    clip_gradients(parameters, norm, 1.0)
    assert gradient_norm(parameters, ALONE) == pytest.approx(1.0)


def test_schedules() -> None:
    cosine = [Cosine(warmup=4, final=0.1).factor(step, 12) for step in range(12)]
    assert cosine[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert cosine[7] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[3:] == sorted(cosine[3:], reverse=True)
    wsd = [Wsd(warmup=2, decay=0.5, final=0.0).factor(step, 12) for step in range(12)]
    assert wsd[:2] == pytest.approx([0.5, 1.0])
    assert wsd[2:6] == [1.0] * 4
    assert wsd[6:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    with pytest.raises(ValueError, match=r"optim\.schedule\.warmup: 12"):
        Cosine(warmup=12).check(12)
    with pytest.raises(ValueError, match=r"optim\.schedule\.warmup: 8 and the decay of 6 steps"):
        Wsd(warmup=8, decay=0.5).check(12)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("weight", "weight banks.layer1.w2 is not finite"),
        ("layer", "the output of layer 1 is not finite"),
        ("head", "every layer is finite, the loss of the output head is not"),
    ],
)
def test_a_nan_leaves_the_weights_alone_and_names_its_place(broken: str, message: str) -> None:
    net = model(torch.float32)
    optimizer = build_optimizer(net, OPTIM)
    with torch.no_grad():
        if broken == "weight":
            net.blocks[1].ffn.bank.w2[3, 0, 0] = math.nan  # type: ignore[union-attr]
        elif broken == "layer":
            net.blocks[1].ffn_norm.weight.fill_(1e30)
        else:
            net.norm.weight.fill_(1e38)
    before = {name: t.clone() for name, t in logical_tensors(net).items()}
    compute = replace(WIDE, dtype=torch.float32)
    sums = accumulate(net, batch(), compute, micro_batches=2, step=0)
    with pytest.raises(NonFiniteError):
        update(net, optimizer, sums, config=OPTIM, step=0, steps=4, rules=rules_of(net))
    assert all(
        torch.equal(
            before[n],
            t,
        )
        or broken == "weight"
        for n, t in logical_tensors(net).items()
    )
    assert message in explain(net, batch(), compute, micro_batches=2, step=0)


def test_evaluation_is_a_mean_over_tokens_and_bytes() -> None:
    net = model()
    sizes = np.arange(32, dtype=np.int64)
    data = batch()
    parts = data.split(4)
    whole, cut = evaluate(net, [data], WIDE, sizes), evaluate(net, parts, WIDE, sizes)
    assert whole.loss == pytest.approx(cut.loss, rel=1e-12)
    counted = data.targets[data.targets >= 0]
    assert (whole.tokens, whole.bytes) == (len(counted), int(sizes[counted].sum()))
    assert target_bytes(data, sizes) == whole.bytes
    assert whole.bytes is not None
    assert whole.bits_per_byte == pytest.approx(whole.loss * whole.tokens / math.log(2) / whole.bytes)
    assert (bits_per_byte(1.0, 0) or 0) > 0


def test_sampling() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -5.0])

    def draw(count: int, **settings: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = [sample(logits, generator=generator, **settings) for _ in range(count)]  # type: ignore[arg-type]
        return torch.bincount(torch.tensor(drawn), minlength=4) / count

    assert sample(logits, temperature=0, top_p=1, generator=torch.Generator()) == 0
    torch.testing.assert_close(draw(4000, temperature=1, top_p=1), logits.softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(
        draw(4000, temperature=0.5, top_p=1), (logits * 2).softmax(0), atol=0.03, rtol=0
    )
    nucleus = draw(4000, temperature=1, top_p=0.7)  # the first holds 0.66, so the second belongs to it too
    torch.testing.assert_close(nucleus[:2], logits[:2].softmax(0), atol=0.03, rtol=0)
    assert nucleus[2:].sum() == 0
    assert draw(50, temperature=1, top_p=0.01)[0] == 1


class Letters:
    """A tokenizer of letters for a vocabulary of 32; 0 is the mark."""

    mark, vocab = 0, 32

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) - 96 for c in text], dtype=np.int64)

    def decode(self, ids: Any) -> str:
        return "".join(chr(96 + int(i)) for i in ids)


def test_greedy_text_is_the_argmax_of_whole_passes() -> None:
    net = model()
    text = generate(net, Letters(), "abc", max_tokens=6, temperature=0, dtype=torch.float64)  # type: ignore[arg-type]
    ids = [0, 1, 2, 3]
    while len(ids) < 10:
        logits = net(torch.tensor([ids]), mode="eval", dtype=torch.float64).logits
        following = int(logits[0, -1].argmax())
        if following == 0:
            break
        ids.append(following)
    assert text == Letters().decode(ids[4:])
    again = [generate(net, Letters(), "abc", max_tokens=6, seed=s, dtype=torch.float64) for s in (1, 1, 2)]  # type: ignore[arg-type]
    assert again[0] == again[1]
