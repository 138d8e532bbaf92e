"""Memory of a run by class, found by tracing one micro-batch on tensors without storage."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.data.loader import Batch
from moesaic.kernels import native
from moesaic.kernels.cross_entropy import CHUNK
from moesaic.models.accounting import meta_model
from moesaic.models.transformer import Transformer
from moesaic.moe.balance import aux_loss
from moesaic.moe.experts import Bank
from moesaic.moe.layer import MoE
from moesaic.parallel.config import OwnedExperts
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.placement import even_owners
from moesaic.parallel.shard import replicated_parameters, shard_dim
from moesaic.train.config import RunConfig
from moesaic.train.optim import MuonConfig
from moesaic.train.step import Compute

FEW_ROWS = 4
"""Larger micro-batches are extrapolated from this many rows and twice as many."""


def estimate(
    run: RunConfig, vocab: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", ranks: int = 1
) -> dict[str, int]:
    """Bytes of one rank by class: weights, gradients, optimizer, matrices gathered for a block and the one before it,
    activations kept for the backward pass, a chunk of logits, and the most that copies of others' experts may take.

    Nothing is allocated. Working memory of single operations comes on top.
    """
    model = meta_model(run.model, vocab)
    shards = run.parallel.shards(ranks)
    whole = {id(parameter) for parameter in replicated_parameters(model)}
    owned = (
        {id(p) for p in bank_parameters(model)} if run.parallel.owned is not None and shards > 1 else set()
    )

    def share(tensor: Tensor) -> int:
        """Bytes of this rank's part."""
        if id(tensor) in owned:
            return 0
        size = tensor.numel() * tensor.element_size()
        if id(tensor) in whole or shards == 1:
            return size
        length = tensor.shape[shard_dim(tensor.shape, shards)]
        return size // length * -(-length // shards)

    experts = owned_bytes(model, shards) if owned else sum(map(share, bank_parameters(model)))
    gradients = sum(share(parameter) for parameter in model.parameters()) + (experts if owned else 0)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    width = torch.finfo(torch.promote_types(dtype, torch.float32)).bits // 8
    rows = -(-run.micro_batch_rows // ranks)
    found = {
        "weights": gradients + buffers,
        "gradients": gradients,
        "optimizer": 2 * gradients - (experts if isinstance(run.optim, MuonConfig) else 0),
        "activations": saved_bytes(model, run, rows, dtype, device),
        "logits": min(CHUNK, rows * run.data.seq_len) * vocab * width,
    }
    if ranks > 1:
        found["gathered"] = gathered_bytes(model, whole | owned, dtype)
    if owned and run.parallel.owned is not None:
        again = run.parallel.recompute == "block"
        copies = copied_bytes(model, run.parallel.owned, shards, dtype, recomputed=again)
        found |= {"copies_up_to": copies} if copies else {}
    if owned and run.parallel.recompute == "none":
        found["activations"] += travelling_bytes(model, rows * run.data.seq_len, dtype)
    return found


def bank_parameters(model: Transformer) -> list[nn.Parameter]:
    """The experts' matrices."""
    banks = [module for module in model.modules() if isinstance(module, Bank)]
    return [parameter for bank in banks for parameter in bank.parameters()]


def owned_bytes(model: Transformer, ranks: int) -> int:
    """Experts of the rank that owns most of them."""
    banks = [module for module in model.modules() if isinstance(module, Bank)]
    sizes = {
        bank.name: sum(p.numel() * p.element_size() for p in bank.parameters()) // bank.num_experts
        for bank in banks
    }
    owners = even_owners({bank.name: bank.num_experts for bank in banks}, ranks)
    return max(
        sum(size * len(owners.experts(name, rank)) for name, size in sizes.items()) for rank in range(ranks)
    )


def copied_bytes(
    model: Transformer, owned: OwnedExperts, ranks: int, dtype: torch.dtype, *, recomputed: bool
) -> int:
    """The most that copies and their gradients take on a rank, which plans may stay far below.

    In the compute type: copies of all layers, or where they are freed after use, of one layer and of those that are
    sent for ahead. Gradients of the layer that is computed, and of one whose gradients are under way; in the masters'
    type of all banks, where they wait for the last micro-batch, for which what arrived is kept too.
    """
    if not owned.copies:
        return 0
    width = torch.finfo(dtype).bits // 8
    most = getattr(owned.plan, "most_copies", None)
    of_layers, of_banks, wide = [], {}, 0
    for block in model.blocks:
        if not isinstance(block.ffn, MoE):
            continue
        bank = block.ffn.experts.source
        assert isinstance(bank, Bank)
        spare = bank.num_experts - bank.num_experts // ranks
        copies = spare if most is None else min(most, spare)
        of_layers.append(copies * sum(p.numel() for p in bank.parameters()) // bank.num_experts)
        of_banks[bank.name] = of_layers[-1]
        wide = max(width, *(p.element_size() for p in bank.parameters()))
    freed = owned.rematerialize or recomputed
    in_flight = min(len(of_layers), 1 + owned.prefetch) if freed else len(of_layers)
    weights = max(sum(of_layers[first : first + in_flight]) for first in range(len(of_layers)))
    gradients = min(2, len(of_layers)) * max(of_layers)
    total = (weights + gradients) * width
    if owned.accumulate == "last":
        kept = 0 if owned.rematerialize else width
        total += sum(of_banks.values()) * (wide + kept)
    return total


def travelling_bytes(model: Transformer, tokens: int, dtype: torch.dtype) -> int:
    """Rows that came to this rank's experts, and their outputs as they returned, which backward reads; at balance."""
    sparse = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
    rows = sum(tokens * ffn.router.config.k for ffn in sparse)
    return 2 * rows * model.config.dim * (torch.finfo(dtype).bits // 8)


def gathered_bytes(model: Transformer, whole: set[int], dtype: torch.dtype) -> int:
    """The largest two neighbouring blocks and what belongs to no block, in the compute type, with their gradients."""
    blocks = [sum(p.numel() for p in block.parameters() if id(p) not in whole) for block in model.blocks]
    rest = sum(p.numel() for p in model.parameters() if id(p) not in whole) - sum(blocks)
    pairs = [sum(blocks[index : index + 2]) for index in range(len(blocks))]
    return 2 * (rest + max(pairs)) * (torch.finfo(dtype).bits // 8)


def saved_bytes(model: Transformer, run: RunConfig, rows: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that one micro-batch's forward pass keeps for its backward pass, parameters left out."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        native.simulated(),
    ):  # kernels of the real device, tensors without storage
        # compiled or not, a region keeps the same tensors; compiling without storage is not possible
        model = parallelize(model.to_empty(device=device), replace(run.parallel, compile=False))
        compute = Compute(torch.device(device), dtype, mask_documents=run.data.mask_documents)
        if rows <= 2 * FEW_ROWS:
            return kept_bytes(model, run, compute, rows)
        few, more = (kept_bytes(model, run, compute, n) for n in (FEW_ROWS, 2 * FEW_ROWS))
        # linear in the rows
        return few + (more - few) * (rows - FEW_ROWS) // FEW_ROWS


def kept_bytes(model: Transformer, run: RunConfig, compute: Compute, rows: int) -> int:
    """Sum of the storages, parameters left out, that autograd saves in one forward pass on `rows` of zeros."""
    own = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(tensor) not in own and (tensor._base is None or id(tensor._base) not in own):
            # holding the tensor keeps the key from being reused
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    numbers = torch.zeros((rows, run.data.seq_len), dtype=torch.int64)
    index = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(numbers, numbers, numbers, index, index)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute.forward(model, batch, mode="train")
        aux_loss(output.layers)
    return sum(size for _, size in kept.values())
