"""Tokens per second of a whole training step, against the same architecture in plain transformers code.

Both sides start from the same weights and must give the same loss before anything is timed. Then the share of a
quickstart step that is spent outside forward, backward and optimizer. Results: bench/results/train_step.md.

    python bench/train_step.py [--threads 2] [--rounds 15]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peers import Architecture, PlainTrainer, Recipe, plain_transformers_trainer
from timing import comparison, interleave, table, write_result
from torch import Tensor

from moesaic.data.loader import Batch
from moesaic.data.prepare import prepare
from moesaic.launch.config import read_run, run_to_yaml
from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.train import loop, session
from moesaic.train.assemble import Trainee, build_trainee
from moesaic.train.config import RunConfig
from moesaic.train.device import choose_device, tune_host
from moesaic.train.step import accumulate, update

PLAIN_ROUTER = [
    "model.ffn.router.score=softmax",  # what transformers computes
    "model.ffn.router.bias_rate=0",
    "model.ffn.aux=[]",
    "data.mask_documents=false",
]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    peers = against_peers(options.threads, options.rounds)
    overhead = outside_of_compute() if not options.quick else ""
    command = f"python bench/train_step.py --threads {options.threads} --rounds {options.rounds}"
    path = write_result("train_step", "A whole training step", command, options.threads, [peers, overhead])
    print(path.read_text())


def against_peers(threads: int, rounds: int) -> str:
    """Time ours and theirs in turns; ValueError where their losses differ."""
    run = read_run("quickstart", [*PLAIN_ROUTER, f"train.threads={threads}"])
    prepared = prepare(run.data)
    loader = session.loader_of(run, prepared)
    trainee = build_trainee(run, prepared.tokenizer.vocab, choose_device(run.train))
    batch = loader.batch(0)
    theirs = {
        "transformers, grouped_mm, fused AdamW": Recipe(lr=1e-4),
        "transformers, grouped_mm, default AdamW": Recipe(lr=1e-4, fused=False),
        "transformers, eager experts, default AdamW": Recipe(lr=1e-4, fused=False, experts="eager"),
    }
    architecture = architecture_of(run, prepared.tokenizer.vocab)
    peers = {name: plain_transformers_trainer(architecture, recipe) for name, recipe in theirs.items()}
    for name, peer in peers.items():
        copy_weights(trainee.model, peer)
        check_losses(trainee, peer, batch, name)
    calls: dict[str, Callable[[], object]] = {
        name: lambda peer=peer: peer.step(batch.tokens, batch.targets) for name, peer in peers.items()
    }
    # the settings of the process are ours to choose; the peers enjoy them too
    tune_host()
    calls["moesaic"] = lambda: our_step(run, trainee, batch)
    timings = interleave(calls, rounds=rounds, threads=threads)
    shape = f"{run.train.batch_tokens} tokens a step, {architecture}"
    best = min(timings.time(name).median for name in theirs)
    summary = f"moesaic is {best / timings.time('moesaic').median:.2f}x as fast as the fastest of them."
    times = comparison(timings, "moesaic", amount=run.train.batch_tokens)
    return f"## Against transformers\n\n{shape}\n\n{times}\n\n{summary}"


def our_step(run: RunConfig, trainee: Trainee, batch: Batch) -> None:
    """One optimizer step as the loop does it."""
    sums = accumulate(trainee.model, batch, trainee.compute, micro_batches=1, step=0)
    update(trainee.model, trainee.optimizer, sums, config=run.optim, step=0, steps=1000, rules=trainee.rules)


def architecture_of(run: RunConfig, vocab: int) -> Architecture:
    """The run's model as the peers describe it."""
    model, ffn = run.model, run.model.ffn
    assert isinstance(ffn, MoE.Config)
    return Architecture(
        vocab=vocab,
        dim=model.dim,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.key_heads,
        experts=ffn.num_experts,
        k=ffn.router.k,
        hidden=ffn.hidden,
        seq_len=run.data.seq_len,
        tied_embeddings=model.tied,
        qk_norm=model.qk_norm,
    )


@torch.no_grad()
def copy_weights(ours: Transformer, peer: PlainTrainer) -> None:
    """Give the peer our weights. Theirs rotate the halves of a head, ours neighbouring channels: rows are reordered."""
    theirs = dict(peer.model.named_parameters())
    config = ours.config
    theirs["model.embed_tokens.weight"].copy_(ours.embedding)
    theirs["model.norm.weight"].copy_(ours.norm.weight)
    for index, block in enumerate(ours.blocks):
        name = f"model.layers.{index}"
        heads = block.attention.qkv.unflatten(0, (-1, config.channels))
        q, k, v = heads.split((config.heads, config.key_heads, config.key_heads))
        attention = {"q_proj": halves(q), "k_proj": halves(k), "v_proj": v}
        for part, rows in attention.items():
            theirs[f"{name}.self_attn.{part}.weight"].copy_(rows.flatten(0, 1))
        theirs[f"{name}.self_attn.o_proj.weight"].copy_(block.attention.out)
        theirs[f"{name}.input_layernorm.weight"].copy_(block.attention_norm.weight)
        theirs[f"{name}.post_attention_layernorm.weight"].copy_(block.ffn_norm.weight)
        assert isinstance(block.ffn, MoE)
        assert block.ffn.bank is not None
        theirs[f"{name}.mlp.gate.weight"].copy_(block.ffn.router.gate)
        theirs[f"{name}.mlp.experts.gate_up_proj"].copy_(block.ffn.bank.w1.flatten(1, 2))
        theirs[f"{name}.mlp.experts.down_proj"].copy_(block.ffn.bank.w2)


def halves(heads: Tensor) -> Tensor:
    """Channels 0, 2, 4, ... first, then 1, 3, 5, ...: (H, C, D) -> (H, C, D)."""
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1)


@torch.no_grad()
def check_losses(trainee: Trainee, peer: PlainTrainer, batch: Batch, name: str) -> None:
    """ValueError where the same weights give another loss."""
    output = trainee.compute.forward(trainee.model, batch, mode="eval")
    assert output.loss is not None
    logits = peer.model(input_ids=batch.tokens, use_cache=False).logits.flatten(0, 1)
    theirs = torch.nn.functional.cross_entropy(logits, batch.targets.flatten()).item()
    ours = output.loss.item() / batch.num_targets
    if abs(ours - theirs) > 1e-4:
        raise ValueError(f"{name}: loss {theirs} where moesaic has {ours}; no times for different functions")


def outside_of_compute() -> str:
    """Train the quickstart for 80 steps and see what its loop adds to forward, backward and optimizer."""
    inside: dict[str, float] = {"forward and backward": 0.0, "optimizer and rules": 0.0, "not a step": 0.0}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                inside[name] += time.perf_counter() - started

        return call

    loop.accumulate = timed(loop.accumulate, "forward and backward")
    loop.update = timed(loop.update, "optimizer and rules")
    loop.Loop.evaluate = timed(loop.Loop.evaluate, "not a step")  # type: ignore[method-assign]
    loop.Loop.save = timed(loop.Loop.save, "not a step")  # type: ignore[method-assign]
    total = {"loop": 0.0}
    original = loop.Loop.run

    def run_timed(self: loop.Loop, stop: Any) -> str:
        started = time.perf_counter()
        outcome = original(self, stop)
        total["loop"] = time.perf_counter() - started
        return outcome

    session.Loop.run = run_timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"dir={folder}",
            "train.steps=80",
            "optim.schedule.warmup=10",
            "eval.every=0",
            "eval.prompts=[]",
            "checkpoint.every=0",
        ]
        run = read_run("quickstart", settings)
        session.train(run, run_to_yaml(run), resume=False, profile=False, command=["bench"])
    steps = total["loop"] - inside.pop("not a step")
    rows = [[name, f"{seconds / 80 * 1e3:.2f}", f"{seconds / steps:.2%}"] for name, seconds in inside.items()]
    rest = steps - sum(inside.values())
    rows.append(["everything else: batch, records, display", f"{rest / 80 * 1e3:.2f}", f"{rest / steps:.2%}"])
    return "## Where a quickstart step goes\n\n" + table(["", "ms", "share"], rows)


if __name__ == "__main__":
    main()
