"""A module as a function of its parameters: deterministic, stateless, and never silently wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final, get_args

import torch
from torch import Tensor, nn

from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED
from bilevel.arguments.uncompiled import uncompiled
from bilevel.modules.attributes import attributes, place, reached
from bilevel.modules.calls import Calls
from bilevel.modules.copies import left_by_calls, whole_copy
from bilevel.modules.layers import BatchNormPolicy, DropoutPolicy, refuse_layers
from bilevel.portable.pickling import AbstractPortable


@checked(seed=SEED)
def functional(
    module: nn.Module, *, batch_norm: BatchNormPolicy = "batch", dropout: DropoutPolicy = "fixed", seed: int = 0
) -> Functional:
    """net(params, *inputs) = module(*inputs) with its parameters replaced: a function in the sense of mathematics.

    Estimators evaluate g many times at one point and differentiate it twice, so that what they are given must
    return the same value for the same arguments. A module in train mode does not: dropout draws a new mask at
    each call, and batch normalization writes to its running statistics. Here both are settled beforehand. The
    module is copied and never touched; a layer in eval mode is used as it is.

    A module that went through `torch.compile` is taken as it was before.

    Every call finds the module as it was given: attributes, buffers and generators that a forward writes to are as
    before at the next call, in any thread. A parameter that is reached otherwise than through the registry (a list, a
    closure) would keep its value, and is refused at the first call, by its place.

    Cost: that of the module's forward, one copy of its buffers, and some 10 microseconds a call. The first call of a
    module that is not made of torch's plain layers alone takes two forwards more, to see what it reads and writes.

    Works under `torch.vmap(..., randomness="same")`, and then equals a loop over the rows. Take gradients outside
    of the vmap, by `torch.autograd.grad`, as this library does: a gradient taken *inside* a vmap is silently wrong
    through batch normalization with affine parameters.

    Operations without a second derivative (fused attention, `ctc_loss`, `embedding_bag`, `cdist`, compiled
    functions, functions marked `once_differentiable`), or with a wrong one, are refused by name where an estimator
    needs one. What is noticed by `check` only is a custom `torch.autograd.Function` whose backward detaches what
    depends on its inputs: torch then drops the term without a trace.

    Args:
        module: what to copy; its mode (train or eval) and its buffers are those of this moment.
        batch_norm: for batch normalization in train mode (and instance normalization that tracks statistics):
            "batch": the statistics of the batch at hand; running ones are neither read nor updated;
            "frozen": the running statistics of this moment, as constants; "refuse": a ValueError.
        dropout: for every random operation in train mode: "fixed": the same numbers at every call, whatever draws
            them (dropout layers, dropout inside attention and recurrent layers, `F.dropout`): the random state is
            forked and set to `seed`; "off": layers with dropout do not drop (what else draws is fixed);
            "refuse": a ValueError, here if a layer is known to draw, else at the first call that does.
        seed: of the fixed numbers; another seed is another objective. (Recurrent layers run by cuDNN keep a random
            state of their own; cuDNN has no second derivative for them either and is to be disabled.)

    Returns:
        The function; its `params` are a copy of the module's parameters, to start from.

    Raises:
        TypeError: if the module is not an `nn.Module`, or the seed not an integer, or an attribute of the module cannot
            be copied.
        ValueError: if a policy is unknown or refuses a layer, or the module has no parameters to be optimized; if a
            layer writes to its weights (`max_norm`), is spectrally normalized in train mode, or is TorchScript.

    Example:
        >>> net = functional(nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5)))
        >>> sorted(net.params)
        ['0.bias', '0.weight']
        >>> x = torch.ones(3, 2)
        >>> bool((net(net.params, x) == net(net.params, x)).all())
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`functional(module)` must be given a torch.nn.Module. Got {type(module).__name__}.")
    for name, value, allowed in (
        ("batch_norm", batch_norm, get_args(BatchNormPolicy)),
        ("dropout", dropout, get_args(DropoutPolicy)),
    ):
        if value not in allowed:
            raise ValueError(f"`functional({name}=...)` must be one of {', '.join(allowed)}. Got {value!r}.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"`functional(seed=...)` must be an integer. Got {type(seed).__name__}.")
    module = uncompiled(module)
    lazy = [name for name, p in module.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"`functional(module)` needs parameters that have a shape. Got lazy ones: {', '.join(lazy)}."
            f" Call the module once on an example before."
        )
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(_without_parameters(module))
    refuse_layers(module)
    left = left_by_calls(module)
    original = whole_copy(module, left.values())
    calls = Calls(original, tuple(left), frozenset(params), batch_norm, dropout, seed)
    return Functional(params, seed, calls)


def _without_parameters(module: nn.Module) -> str:
    registered = [id(part) for part in module.modules()]
    for name, part in module.named_modules():
        for attribute, value in attributes(part).items():
            for where, found in reached(value, attribute, registered):
                if isinstance(found, nn.Parameter) and found.requires_grad:
                    return (
                        "`functional(module)` needs a registered parameter that requires a gradient, and this module"
                        f" has none: {place(name, part, where)} is not registered. Keep it in an `nn.ParameterList` or"
                        " `nn.ModuleList`, or as an attribute of its own."
                    )
    return (
        "`functional(module)` needs a parameter that requires a gradient, and this module has none."
        " Call `module.requires_grad_()`; what does not require a gradient is taken as constant."
    )


@final
@dataclass(frozen=True, eq=False)
class Functional(AbstractPortable):
    """A module as a function of its parameters; made by `functional`.

    Attributes:
        params: the parameters as the module had them, by name: those that require a gradient, detached copies,
            tied ones once (their gradient is the sum over their uses). The others are constants, as buffers are.
        seed: of every random number drawn inside.
    """

    params: dict[str, Tensor] = field(repr=False)
    seed: int
    _calls: Calls = field(repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    def __call__(self, params: Mapping[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        """The module's output at these parameters; `inputs` and `keywords` are those of its `forward`.

        Raises:
            TypeError: if `params` is not a mapping of names to tensors.
            ValueError: if names are missing or unexpected, or shapes differ; or random numbers are drawn and
                `dropout="refuse"`. From the first call: if the forward uses a parameter that is not among `params`,
                writes to one that is, or returns another value at the second evaluation.
            RuntimeError: if parameters are read when no call is under way: by a recomputation inside of the module.
        """
        self._check(params)
        return self._calls.call(params, inputs, keywords)

    @checked()
    def load(self, params: Mapping[str, Tensor]) -> nn.Module:
        """A new module with these parameters: for exporting a solution, or a learned initialization.

        It is a copy of the module as it was given, in the mode and with the buffers that it had then. Running
        statistics of batch normalization are old ones too: renew them by `torch.optim.swa_utils.update_bn`.

        Raises:
            TypeError: if `params` is not a mapping of names to tensors.
            ValueError: if names are missing or unexpected, or shapes differ.
        """
        self._check(params)
        module = self._calls.exported()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in params:
                    parameter.copy_(params[name])
        return module

    def _check(self, params: Mapping[str, Tensor]) -> None:
        if not isinstance(params, Mapping):
            raise TypeError(
                f"`net(params, *inputs)` needs a dict of tensors as `net.params` is. Got {type(params).__name__}."
            )
        if params.keys() != self.params.keys():
            missing, unexpected = self.params.keys() - params.keys(), params.keys() - self.params.keys()
            raise ValueError(
                f"`net(params, *inputs)` needs the names of `net.params`."
                f" Missing: {sorted(missing) or 'none'}. Unexpected: {sorted(map(str, unexpected)) or 'none'}."
            )
        for name, own in self.params.items():
            given = params[name]
            if not isinstance(given, Tensor):
                raise TypeError(f"`net(params, *inputs)` needs tensors. Got {type(given).__name__} at {name!r}.")
            if given.shape != own.shape:
                raise ValueError(
                    f"`net(params, *inputs)` needs shape {tuple(own.shape)} at {name!r}. Got {tuple(given.shape)}."
                )
