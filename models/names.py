"""Names that do not depend on the module that happens to hold a tensor: experts are `banks.<name>.w1`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from moesaic.moe.experts import Bank


@runtime_checkable
class Table(Protocol):
    """A module whose parameter `master` holds experts of several banks, in rows."""

    master: nn.Parameter

    def logical(self, tensor: Tensor) -> dict[str, Tensor]:
        """The master, or something that goes with it, by logical name."""
        ...

    def each(self) -> Iterator[tuple[str, int, Tensor]]:
        """Every matrix of every expert that is here: logical name of its tensor, number of the expert, values."""
        ...

    def matrices(self, tensor: Tensor) -> Sequence[Tensor]:
        """The master, or a tensor of its shape, as stacks of matrices that share its memory."""
        ...


def logical_tensors(
    model: nn.Module, of: Callable[[Tensor], Tensor | None] = lambda tensor: tensor
) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under its logical name. Raises ValueError where two share a name.

    `of` maps each to what is wanted of it, such as its gradient; None leaves it out.
    """
    tables = {f"{path}.master": module for path, module in model.named_modules() if isinstance(module, Table)}
    named: dict[str, Tensor] = {}
    for path, name, tensor in _paths(model):
        value = of(tensor)
        if value is None:
            continue
        found = tables[path].logical(value) if path in tables else {name: value}
        for each in found:
            if each in named:
                raise ValueError(f"two tensors of the model are called {each}")
        named |= found
    return named


def logical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameter that holds the values of each logical name; one that holds a table has many."""
    tables = {f"{path}.master": module for path, module in model.named_modules() if isinstance(module, Table)}
    named: dict[str, nn.Parameter] = {}
    for path, name, tensor in _paths(model):
        if isinstance(tensor, nn.Parameter):
            names = tables[path].logical(tensor) if path in tables else [name]
            named |= dict.fromkeys(names, tensor)
    return named


def expert_matrices(model: nn.Module) -> dict[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """Every parameter that holds experts, and how it, or a tensor of its shape, is viewed as stacks of matrices."""
    found: dict[Tensor, Callable[[Tensor], Sequence[Tensor]]] = {}
    for module in model.modules():
        if isinstance(module, Table):
            found[module.master] = module.matrices
        elif isinstance(module, Bank):
            found |= dict.fromkeys(module.parameters(), lambda tensor: [tensor])
    return found


def _paths(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Path, logical name and tensor of every parameter and persistent buffer."""
    prefixes = {
        f"{path}.": f"banks.{module.name}."
        for path, module in model.named_modules()
        if isinstance(module, Bank)
    }
    for path, tensor in model.state_dict(keep_vars=True).items():
        owner = path.rpartition(".")[0] + "."
        yield path, prefixes[owner] + path.removeprefix(owner) if owner in prefixes else path, tensor
