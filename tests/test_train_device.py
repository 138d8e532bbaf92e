"""Choice of device and compute type, and the estimate of memory against what a real pass keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moesaic.data.config import ByteTokenizer, TextData
from moesaic.models.transformer import Transformer
from moesaic.moe import BalanceLoss, MoE, TopKRouter
from moesaic.parallel.config import ParallelConfig
from moesaic.train import device, memory
from moesaic.train.config import RunConfig, TrainConfig
from moesaic.train.optim import AdamWConfig

MODEL = Transformer.Config(
    dim=16,
    layers=2,
    heads=2,
    ffn=MoE.Config(
        num_experts=4,
        hidden=8,
        router=TopKRouter.Config(k=2),
        aux=(BalanceLoss(coef=0.01),),
        shared_experts=1,
    ),
)
RUN = RunConfig(
    name="run",
    model=MODEL,
    data=TextData(path="text", seq_len=32, tokenizer=ByteTokenizer()),
    train=TrainConfig(steps=200, batch_tokens=512, micro_batch_tokens=256, threads=1),
    optim=AdamWConfig(lr=0.01),
)


@pytest.mark.parametrize(
    ("bf16_seconds", "chosen"), [(0.5, torch.bfloat16), (0.9, torch.float32), (4.0, torch.float32)]
)
def test_auto_takes_bf16_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bf16_seconds: float, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        device, "product_seconds", lambda dtype: bf16_seconds if dtype == torch.bfloat16 else 1.0
    )
    found = device.choose_device(RUN.train)
    assert (found.device.type, found.dtype, found.threads) == ("cpu", chosen, 1)
    assert f"{1 / bf16_seconds:.1f}x" in found.why_dtype
    assert device.peak_flops(found) is None


def test_a_given_or_stored_precision_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "product_seconds", lambda dtype: 1.0)
    assert device.choose_device(replace(RUN.train, precision="bf16")).dtype == torch.bfloat16
    assert device.choose_device(RUN.train, stored_precision="bf16").dtype == torch.bfloat16
    given = device.choose_device(replace(RUN.train, precision="fp32"), stored_precision="bf16")
    assert given.dtype == torch.float32
    assert [device.precision_name(d) for d in (torch.float32, torch.bfloat16)] == ["fp32", "bf16"]


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_estimated_activations_are_what_a_real_pass_keeps(recompute: Any) -> None:
    run = replace(RUN, parallel=ParallelConfig(recompute=recompute))
    estimated = memory.estimate(run, 257)
    model = memory.parallelize(Transformer(MODEL, 257), run.parallel)
    compute = memory.Compute(torch.device("cpu"), torch.float32)
    assert estimated["activations"] == memory.kept_bytes(model, run, compute, 8)
    assert estimated["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    assert estimated["optimizer"] == 2 * estimated["gradients"]
    assert estimated["logits"] == 256 * 257 * 4


def test_a_compiled_run_is_estimated_too() -> None:
    compiled = replace(RUN, parallel=ParallelConfig(compile=True))
    assert memory.estimate(compiled, 257) == memory.estimate(RUN, 257)


def test_recomputation_keeps_less() -> None:
    plain, less = (
        memory.estimate(replace(RUN, parallel=ParallelConfig(recompute=mode)), 257)["activations"]
        for mode in ("none", "block")
    )
    assert less < plain / 2
