"""Names that do not depend on the module that happens to hold a tensor: experts are `banks.<name>.w1`."""

from torch import Tensor, nn

from moesaic.moe.experts import Bank


def logical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under its logical name. Raises ValueError where two share a name."""
    prefixes = {
        f"{path}.": f"banks.{module.name}."
        for path, module in model.named_modules()
        if isinstance(module, Bank)
    }
    named: dict[str, Tensor] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        owner = path.rpartition(".")[0] + "."
        name = prefixes[owner] + path.removeprefix(owner) if owner in prefixes else path
        if name in named:
            raise ValueError(f"two tensors of the model are called {name}")
        named[name] = tensor
    return named
