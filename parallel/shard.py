"""Fully sharded data parallelism of a transformer (FSDP2): matrices are sharded, small tensors are replicated.

Vectors and routers stay whole on every rank: they compute in fp32 while the matrices of the same block travel in the
compute type, and one sum over all ranks at the end of a step is cheaper than gathering them in every block. Every
reduction sums; the loss is divided by the global token count before the backward pass.
"""

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moesaic.moe.router import Router
from moesaic.parallel.ranks import Ranks, waiting_for
from moesaic.parallel.slots import ExpertRows, SlotTable, slots_of


def shard(model: nn.Module, units: Iterable[nn.Module], ranks: Ranks, dtype: torch.dtype) -> None:
    """Shard each unit, then what is left, in place. `dtype`: of matrices while they compute and travel.

    A unit is gathered as a whole when its `forward` begins: it must hold every parameter that it uses, but for those of
    the model itself.
    """
    assert ranks.mesh is not None
    whole, shards = set(replicated_parameters(model)), ranks.mesh["dp_shard"].size()
    whole |= {table.master for table in slot_tables(model)}  # never gathered
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    for module in (*units, model):
        fully_shard(
            module,
            mesh=ranks.mesh,
            mp_policy=policy,
            ignored_params=whole,
            shard_placement_fn=lambda parameter: Shard(shard_dim(parameter.shape, shards)),
        )
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The units of sharding; none where the model is whole."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that every rank holds whole, in the order of the model."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    of_routers = {id(parameter) for router in routers for parameter in router.parameters()}
    return [p for p in model.parameters() if p.ndim < 2 or id(p) in of_routers]


def slot_tables(model: nn.Module) -> list[SlotTable]:
    """Where experts are owned: the tables that hold them."""
    return [module for module in model.modules() if isinstance(module, SlotTable)]


def owned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that hold this rank's own experts."""
    return [table.master for table in slot_tables(model)]


def reduce_on_backward(model: nn.Module, *, last: bool) -> None:
    """Sum gradients over ranks in this backward pass, or, where more micro-batches follow, only keep them.

    To be called before the forward pass. Gradients of owned experts always go to their owners; those of copies, as
    their configuration says.
    """
    slots = slots_of(model)
    if slots is not None:
        slots.begin(last=last)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


@torch.no_grad()
def sum_replicated(model: nn.Module, ranks: Ranks) -> None:
    """Sum the gradients of replicated parameters over all ranks, in one message; call after the last backward pass.

    Of experts that are owned, every replica of the model has its own tokens' gradients: they are summed over replicas.
    """
    if ranks.mesh is None:
        return
    slots = slots_of(model)
    if slots is not None:
        slots.settle()  # where no token came an optimizer still decays
    for table in slot_tables(model):
        if ranks.mesh["dp_replicate"].size() > 1:
            group = ranks.mesh.get_group("dp_replicate")
            with waiting_for("the sum of experts' gradients over replicas", group):
                dist.all_reduce(table.master.grad, group=group)
    parameters = replicated_parameters(model)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    with waiting_for("the sum of gradients over ranks"):
        dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).clone()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    if isinstance(tensor, ExpertRows):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_dim(shape: torch.Size, shards: int) -> int:
    """The dim that is cut: the first that divides evenly, so that two gate matrices do not end up on two ranks."""
    return next((dim for dim, size in enumerate(shape) if size % shards == 0), 0)


def window(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a tensor, sharing its memory, and where it begins in every dim."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offsets)


@torch.no_grad()
def gradient_norm(parameters: list[Tensor], ranks: Ranks, owned: Collection[Tensor] = ()) -> float:
    """Joint 2-norm of all gradients, whole and sharded, as if they lay on one rank. `owned` are the slot tables'.

    `parameters` are those of the optimizer: a model's own are whole for a while after a forward pass.
    """
    elsewhere = {id(master) for master in owned}
    whole, parts = [], []
    for parameter in parameters:
        if parameter.grad is not None:
            split = id(parameter) in elsewhere or isinstance(parameter.grad, DTensor)
            (parts if split else whole).append(local(parameter.grad))
    norm = nn.utils.get_total_norm(whole) if whole else torch.zeros(())
    if ranks.mesh is None or not parts:
        return norm.item()
    square = torch.stack([torch.linalg.vector_norm(part).double().square() for part in parts]).sum()
    group = ranks.mesh.get_group("dp_shard")
    with waiting_for("the norm of all gradients", group):
        dist.all_reduce(square, group=group)
    return (norm.double().square() + square).sqrt().item()
