"""Memory of a run by class, found by tracing one micro-batch on tensors without storage."""

import torch
from torch import Tensor

from moesaic.data.loader import Batch
from moesaic.models.accounting import meta_model
from moesaic.moe.balance import aux_loss
from moesaic.parallel.parallelize import parallelize
from moesaic.train.config import RunConfig
from moesaic.train.step import Compute

LOGITS_CHUNK = 1024


def estimate(run: RunConfig, vocab: int, *, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes by class: weights, gradients, optimizer, activations kept for the backward pass, a chunk of logits.

    Nothing is allocated. Working memory of single operations comes on top.
    """
    model = parallelize(meta_model(run.model, vocab), run.parallel)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    width = torch.finfo(torch.promote_types(dtype, torch.float32)).bits // 8
    tokens = run.train.batch_tokens // run.train.micro_batches
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": saved_bytes(model, run, dtype),
        "logits": min(LOGITS_CHUNK, tokens) * vocab * width,
    }


def saved_bytes(model: torch.nn.Module, run: RunConfig, dtype: torch.dtype) -> int:
    """Bytes that one micro-batch's forward pass keeps for its backward pass, parameters left out."""
    own = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(tensor) not in own and (tensor._base is None or id(tensor._base) not in own):
            kept[storage._cdata] = (
                tensor,
                storage.nbytes(),
            )  # holding the tensor keeps the key from being reused
        return tensor

    rows = run.train.batch_tokens // run.train.micro_batches // run.data.seq_len
    shape = (rows, run.data.seq_len)
    numbers = torch.zeros(shape, dtype=torch.int64, device="meta")
    index = torch.zeros(rows, dtype=torch.int64, device="meta")
    batch = Batch(numbers, numbers, numbers, index, index)
    compute = Compute(torch.device("meta"), dtype, mask_documents=run.data.mask_documents)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute.forward(model, batch, mode="train")  # type: ignore[arg-type]
        aux_loss(output.layers)
    return sum(size for _, size in kept.values())
