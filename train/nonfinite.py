"""After a NaN: which step, which layer, and the batch that reproduces it."""

from pathlib import Path

import torch

from moesaic.data.loader import Batch
from moesaic.models.names import logical_tensors
from moesaic.models.transformer import Transformer
from moesaic.parallel.ranks import ALONE, Ranks
from moesaic.parallel.shard import local
from moesaic.train.step import Compute


def explain(
    model: Transformer, batch: Batch, compute: Compute, *, micro_batches: int, step: int, ranks: Ranks = ALONE
) -> str:
    """Name the first tensor that is not finite: a weight, a layer's output, or a gradient.

    All ranks call it together, and get what the first rank with a finding found.
    """
    # every rank looks at everything: forward passes communicate
    weights = bad_weight(model)
    layer = first_bad_layer(model, batch, compute, micro_batches=micro_batches, step=step)
    for kind in (weights, layer, bad_gradient(model)):
        for rank, found in enumerate(ranks.gather(kind)):
            if found is not None:
                return found if ranks.size == 1 else f"{found} (rank {rank})"
    return "forward pass and gradients are finite one by one; their sum overflows"


def bad_weight(model: Transformer) -> str | None:
    """The first weight that is not finite."""
    for name, tensor in logical_tensors(model).items():
        if tensor.is_floating_point() and not local(tensor.detach()).isfinite().all():
            return f"weight {name} is not finite before the step"
    return None


def bad_gradient(model: Transformer) -> str | None:
    """The first gradient that is not finite."""
    for name, grad in logical_tensors(model, lambda tensor: tensor.grad).items():
        if not local(grad).isfinite().all():
            return f"the forward pass is finite; the gradient of {name} is not"
    return None


@torch.no_grad()
def first_bad_layer(
    model: Transformer, batch: Batch, compute: Compute, *, micro_batches: int, step: int
) -> str | None:
    """Run the forward pass again and watch every block's output."""
    seen: list[int] = []
    found: str | None = None

    def watch(index: int):
        def hook(module: object, inputs: object, output: tuple[torch.Tensor, object]) -> None:
            if not output[0].isfinite().all():
                seen.append(index)

        return hook

    handles = [block.register_forward_hook(watch(index)) for index, block in enumerate(model.blocks)]
    try:
        for number, part in enumerate(batch.split(micro_batches)):
            output = compute.forward(model, part, mode="train", step=step)
            if found is not None:
                continue
            if seen:
                found = f"the output of layer {seen[0]} is not finite (micro-batch {number})"
            elif output.loss is not None and not output.loss.isfinite():
                found = f"every layer is finite, the loss of the output head is not (micro-batch {number})"
    finally:
        for handle in handles:
            handle.remove()
    return found


def save_batch(batch: Batch, path: Path, *, step: int) -> None:
    """Write the global batch of a step as safetensors."""
    from safetensors.torch import save_file

    tensors = {
        name: getattr(batch, name).contiguous()
        for name in ("tokens", "targets", "documents", "rows", "samples")
    }
    save_file(tensors, path, metadata={"step": str(step)})
