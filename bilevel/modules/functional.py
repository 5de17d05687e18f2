"""A module as a function of its parameters: deterministic, stateless, and never silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from bilevel._tree import tree_leaves
from bilevel.modules.module_call import Slots

BatchNormPolicy = Literal["batch", "frozen", "refuse"]
DropoutPolicy = Literal["fixed", "off", "refuse"]


def functional(
    module: nn.Module, *, batch_norm: BatchNormPolicy = "batch", dropout: DropoutPolicy = "fixed", seed: int = 0
) -> Functional:
    """net(params, *inputs) = module(*inputs) with its parameters replaced: a function in the sense of mathematics.

    Estimators evaluate g many times at one point and differentiate it twice, so that what they are given must
    return the same value for the same arguments. A module in train mode does not: dropout draws a new mask at
    each call, and batch normalization writes to its running statistics. Here both are settled beforehand. The
    module is copied and never touched; a layer in eval mode is used as it is.

    Cost: that of the module's forward, one copy of its buffers, and some 10 microseconds a call.

    Works under `torch.vmap(..., randomness="same")`, and then equals a loop over the rows. Take gradients outside
    of the vmap, by `torch.autograd.grad`, as this library does: a gradient taken *inside* a vmap is silently wrong
    through batch normalization with affine parameters.

    Operations without a second derivative (fused attention, `ctc_loss`, `embedding_bag`, `cdist`, compiled
    functions, functions marked `once_differentiable`) are refused by name where an estimator needs one. What
    cannot be noticed is a custom `torch.autograd.Function` whose backward detaches what depends on its inputs:
    torch then drops the term without a trace; `torch.autograd.gradgradcheck` finds such a function.

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
        TypeError: if the module is not an `nn.Module`, or the seed not an integer.
        ValueError: if a policy is unknown or refuses a layer, or the module has no parameters to be optimized.

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
    lazy = [name for name, p in module.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"`functional(module)` needs parameters that have a shape. Got lazy ones: {', '.join(lazy)}."
            f" Call the module once on an example before."
        )
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            "`functional(module)` needs a parameter that requires a gradient, and this module has none."
            " Call `module.requires_grad_()`; what does not require a gradient is taken as constant."
        )
    original = copy.deepcopy(module)
    shared: dict[int, Any] = {id(t): t for t in (*original.parameters(), *original.buffers())}
    working = copy.deepcopy(original, shared)
    _settle_normalization(working, batch_norm)
    _settle_dropout(working, dropout)
    return Functional(params, original, Slots(working), seed, dropout == "refuse")


@final
@dataclass(frozen=True, eq=False)
class Functional:
    """A module as a function of its parameters; made by `functional`.

    Attributes:
        params: the parameters as the module had them, by name: those that require a gradient, detached copies,
            tied ones once (their gradient is the sum over their uses). The others are constants, as buffers are.
        seed: of every random number drawn inside.
    """

    params: dict[str, Tensor] = field(repr=False)
    _original: nn.Module = field(repr=False)
    _slots: Slots = field(repr=False)
    seed: int
    _refuse_random: bool = field(repr=False)

    def __call__(self, params: Mapping[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        """The module's output at these parameters; `inputs` and `keywords` are those of its `forward`.

        Raises:
            TypeError: if `params` is not a mapping of names to tensors.
            ValueError: if names are missing or unexpected, or shapes differ; or random numbers are drawn and
                `dropout="refuse"`.
        """
        self._check(params)
        if self._slots.is_deterministic:
            return self._slots.call(params, inputs, keywords)
        leaves = tree_leaves((dict(params), inputs, keywords))
        devices = sorted({t.device.index for t in leaves if isinstance(t, Tensor) and t.device.type == "cuda"})
        with _fixed_random_state(self.seed, devices) as has_drawn:
            output = self._slots.call(params, inputs, keywords)
            if self._refuse_random and has_drawn():
                raise ValueError(
                    '`functional(dropout="refuse")`: the module drew random numbers in its forward. Write'
                    ' `functional(module, dropout="fixed")` to have the same ones at each call, or call'
                    " `module.eval()` before."
                )
        return output

    def load(self, params: Mapping[str, Tensor]) -> nn.Module:
        """A new module with these parameters: for exporting a solution, or a learned initialization.

        It is a copy of the module as it was given, in the mode and with the buffers that it had then. Running
        statistics of batch normalization are old ones too: renew them by `torch.optim.swa_utils.update_bn`.

        Raises:
            TypeError: if `params` is not a mapping of names to tensors.
            ValueError: if names are missing or unexpected, or shapes differ.
        """
        self._check(params)
        module = copy.deepcopy(self._original)
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


@contextmanager
def _fixed_random_state(seed: int, devices: list[int]) -> Iterator[Callable[[], bool]]:
    """Seed the generators of the CPU and of these CUDA devices; restore them. Yields whether they were used."""
    generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)]
    # Generator by generator: `torch.manual_seed` would also reset devices that are not restored.
    with torch.random.fork_rng(devices, device_type="cuda"):
        for generator in generators:
            generator.manual_seed(seed)
        states = [generator.get_state() for generator in generators]
        yield lambda: any(not torch.equal(s, g.get_state()) for s, g in zip(states, generators, strict=True))


def _settle_normalization(working: nn.Module, policy: BatchNormPolicy) -> None:
    for name, layer in working.named_modules():
        if not isinstance(layer, _NormBase) or not layer.training:
            continue
        if not isinstance(layer, _BatchNorm) and not layer.track_running_stats:
            continue  # instance normalization: stateless
        where = f"layer {name or '(root)'!r} ({type(layer).__name__})"
        if policy == "refuse":
            raise ValueError(
                f'`functional(batch_norm="refuse")`: {where} is in train mode. Call `.eval()` on it, or choose'
                f' "batch" (statistics of the batch) or "frozen" (running statistics as constants).'
            )
        if policy == "frozen":
            if layer.running_mean is None:
                raise ValueError(f'`functional(batch_norm="frozen")`: {where} has no running statistics. Use "batch".')
            layer.eval()
        else:
            layer.track_running_stats = False
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                layer.register_buffer(buffer, None)


def _settle_dropout(working: nn.Module, policy: DropoutPolicy) -> None:
    if policy == "fixed":
        return
    for name, layer in working.named_modules():
        if not layer.training:
            continue
        inside = isinstance(layer, nn.MultiheadAttention | nn.RNNBase)
        draws = inside and layer.dropout > 0
        draws = draws or (isinstance(layer, _DropoutNd) and layer.p > 0) or isinstance(layer, nn.RReLU)
        if draws and policy == "refuse":
            raise ValueError(
                f'`functional(dropout="refuse")`: layer {name or "(root)"!r} ({type(layer).__name__}) is in train'
                f' mode and draws random numbers. Call `.eval()` on it, or choose "fixed" (the same ones at each call)'
                f' or "off".'
            )
        if draws and inside:
            layer.dropout = 0.0
        elif draws:
            layer.eval()
