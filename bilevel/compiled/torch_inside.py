"""Everything that is used of torch's compiler, and is not promised by torch to stay: the one place to look at.

Traced by `make_fx`, loops by the operator behind `torch.while_loop`, compiled by inductor ahead of time to one shared
library, which is called without a guard. Written for and tested with torch 2.13.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bilevel.compiled.refused import NotCompilableError, refused

Call: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]
OLDEST = (2, 13)
_Operation = type(torch.ops.aten.detach.default)


def demand_compiler() -> None:
    """Refuse to begin where torch is too old, or there is no compiler of C++.

    Raises:
        NotCompilableError: saying which.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        raise NotCompilableError(
            f"`compile=True` needs torch {OLDEST[0]}.{OLDEST[1]} or later. Got {torch.__version__}. Leave it out."
        )
    from torch._inductor import config

    named = config.cpp.cxx
    wanted = [each for each in (named if isinstance(named, tuple | list) else (named,)) if each]
    if not any(shutil.which(each) for each in wanted):
        raise NotCompilableError(
            f"`compile=True` needs a compiler of C++, and there is none: looked for {', '.join(wanted)}. Install g++,"
            f" or name one in the environment variable CXX, or leave it out."
        )


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], *, fake: bool = False) -> GraphModule:
    """A function of tensors as a list of their operations.

    Tensors that were the same object would become one input: so that each input is traced as a tensor of its own.

    Args:
        function: what is traced, derivatives by autograd included.
        inputs: where.
        fake: by shapes alone, for what has no derivative in it.

    Raises:
        NotCompilableError: if what is computed depends on a value of a tensor, or is random.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    plain = [each.detach() for each in inputs]  # others keep their strides, which a program is made for
    apart = [each.clone() if each.is_contiguous() else each for each in plain]
    try:
        with torch.enable_grad():
            traced: GraphModule = make_fx(function, tracing_mode="fake" if fake else "real")(*apart)
    except (RuntimeError, ValueError) as error:  # the latter where it came out of f or g
        if "get value out of a tracing tensor" not in str(error) and "data-dependent" not in str(error).lower():
            raise
        raise refused(
            "f and g",
            "what they compute depends on the value of a tensor (an `if`, `float(...)`, `.item()`, `bool(...)`), and"
            " would be what it was at the first call",
            "Write it with `torch.where`, or leave out `compile=True`",
        ) from error
    for node in traced.graph.nodes:
        if isinstance(node.target, _Operation) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise refused("f and g", f"`{node.target}` draws random numbers, and f and g are to be functions")
    if any(_writes(node) for node in traced.graph.nodes):
        traced = make_fx(torch.func.functionalize(traced, remove="mutations"))(*apart)
        if any(_writes(node) for node in traced.graph.nodes):
            raise refused("f and g", "they write to a tensor that they close over, or to an argument")
    return traced


def _writes(node: Node) -> bool:
    return isinstance(node.target, _Operation) and node.target._schema.is_mutable


def loop(
    going: Callable[..., Tensor],
    body: Callable[..., tuple[Tensor, ...]],
    carried: Sequence[Tensor],
    fixed: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """`while going(*carried, *fixed): carried = body(*carried, *fixed)`, as one operation of a graph."""
    from torch._higher_order_ops.while_loop import while_loop_op

    operator: Any = while_loop_op
    found: tuple[Tensor, ...] = operator(going, body, tuple(carried), tuple(fixed))
    return found


def text_of(traced: GraphModule) -> str:
    """All of a graph in words, numbers included: the same text is the same program."""
    parts = [f"{name}: {module.code}" for name, module in traced.named_modules() if isinstance(module, GraphModule)]
    return "\n".join(parts)


def build(traced: GraphModule, inputs: Sequence[Tensor]) -> Path:
    """Compile a graph to a shared library."""
    import torch._inductor as inductor

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's compiler, about itself
        made: Any = inductor.aot_compile(traced, tuple(inputs))
    return Path(made)


def load(library: Path) -> Call:
    """A library that `build` made, as a function of a list of tensors."""
    inside: Any = torch._C
    runner = inside._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    run: Call = runner.run
    return run
