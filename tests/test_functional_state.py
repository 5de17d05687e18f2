"""`functional`: whatever a module keeps beside its registered parameters, the function has none of it, or says so."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel import BilevelProblem, functional, hypergradient
from bilevel._flat import FlatProblem
from bilevel._tree import ravel

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0, 1, 1], [2, 1, 0]])


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


class Base(nn.Module):
    """A linear layer, and what a subclass keeps beside it."""

    fc: Any
    calls: Any
    cache: Any
    mean: Any
    log: Any
    state: Any
    generator: Any
    last: Any
    shapes: Any
    teacher: Any
    hidden: Any
    both: Any
    ws: Any
    held: Any

    def __init__(self, **kept: Any) -> None:
        nn.Module.__init__(self)
        self.fc = nn.Linear(4, 4)
        for name, value in kept.items():
            setattr(self, name, value)


def gradient_of(net: Any, params: dict[str, Tensor], *inputs: Any) -> dict[str, Tensor]:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    found = torch.autograd.grad(net(leaves, *inputs).square().sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def demand_right_products(net: Any, inputs: Any, tol: float = 1e-6) -> None:
    """Exact Hessian products are those of finite differences, and gradients are those of values."""
    y, structure = ravel(net.params)
    y = y + 0.1
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))

    def loss(x: Tensor, y: Any) -> Tensor:
        output: Tensor = net(y, inputs)
        return output.square().sum() + output.sum() + x

    flat = FlatProblem(BilevelProblem(loss, loss), ravel(torch.tensor(0.0))[1], structure)

    def at(y: Tensor) -> Any:
        return bilevel.Exact().linearize(flat, torch.zeros(1), y)

    t = 1e-6
    differences = (at(y + t * u).gradient - at(y - t * u).gradient) / (2 * t)
    torch.testing.assert_close(at(y).operator.mv(u), differences, rtol=tol, atol=tol)
    slope = (flat.g(torch.zeros(1), y + t * u) - flat.g(torch.zeros(1), y - t * u)) / (2 * t)
    torch.testing.assert_close(at(y).gradient @ u, slope, rtol=tol, atol=tol)


# Parameters reached outside of the registry


class Plain:
    def __init__(self, weight: Any) -> None:
        self.weight = weight


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


def weight() -> nn.Parameter:
    return nn.Parameter(torch.linspace(1, 2, 4))


GLOBAL = weight()


def reading(read: Callable[[Any], Tensor], **kept: Any) -> Callable[[], nn.Module]:
    class Reads(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * read(self)  # type: ignore[no-any-return]

    return lambda: Reads(**copy.deepcopy(kept))


def closed_over() -> nn.Module:
    hidden = weight()

    class Closes(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * hidden  # type: ignore[no-any-return]

    return Closes()


def hooked() -> nn.Module:
    hidden, module = weight(), nn.Sequential(nn.Linear(4, 4))
    module[0].register_forward_hook(lambda _module, _inputs, output: cast(Tensor, output) * hidden)
    return module


def alias() -> nn.Module:
    class Twice(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) @ cast(Tensor, self.both[0]).T  # type: ignore[no-any-return]

    module = Twice()
    module.both = (module.fc.weight, module.fc.bias)
    return module


class CustomOp(Base):
    def forward(self, x: Tensor) -> Tensor:
        return Scale.apply(self.fc(x), self.hidden[0])  # type: ignore[no-any-return, no-untyped-call]


OUTSIDE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "list": (reading(lambda m: m.ws[0], ws=[weight()]), r"attribute `ws\[0\]` of layer '\(root\)' \(Reads\)"),
    "dict": (reading(lambda m: m.ws["a"], ws={"a": weight()}), r"attribute `ws\['a'\]`"),
    "tuple": (reading(lambda m: m.ws[0], ws=(weight(),)), r"attribute `ws\[0\]`"),
    "nested": (reading(lambda m: m.o["k"][0].weight, o={"k": [Plain(weight())]}), r"attribute `o\['k'\]\[0\].weight`"),
    "module in a list": (reading(lambda m: m.ls[0].weight[0], ls=[nn.Linear(4, 4)]), r"attribute `ls\[0\].weight`"),
    "partial": (reading(lambda m: m.p(), p=partial(torch.sin, weight())), r"attribute `p.args\[0\]`"),
    "plain tensor": (reading(lambda m: m.w, w=torch.ones(4).double().requires_grad_()), "attribute `w`"),
    "global variable": (reading(lambda m: GLOBAL), r"GLOBAL \(a global variable that"),
    "closure": (closed_over, r"hidden \(closed over by .*forward\)` in layer '\(root\)' \(Closes\)"),
    "hook": (hooked, r"hidden \(closed over by .*lambda.*\)` in layer '0' \(Linear\)"),
    "custom function": (lambda: CustomOp(hidden=[weight()]), r"attribute `hidden\[0\]`"),
    "registered, by another path": (alias, r"parameter 'fc.weight', which it reads by attribute `both\[0\]`"),
}


@pytest.mark.parametrize(("build", "where"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_a_parameter_reached_outside_of_the_registry_is_refused_by_its_place(
    build: Callable[[], nn.Module], where: str
) -> None:
    net = functional(seeded(build))
    for _ in range(2):
        with pytest.raises(ValueError, match=where) as caught, torch.no_grad():
            net(net.params, X)
        assert caught.match("Register it|Read it as the attribute")


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name != "custom function"])  # which is not for vmap
def test_it_is_refused_under_vmap_too(name: str) -> None:
    net = functional(seeded(OUTSIDE[name][0]))
    with pytest.raises(ValueError, match="which requires a gradient"):
        torch.vmap(lambda x: net(net.params, x), randomness="same")(torch.stack([X, X + 1]))


def test_a_module_all_of_whose_parameters_are_in_a_list_is_told_so() -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.layers = [nn.Linear(2, 2)]

    with pytest.raises(ValueError, match=r"attribute `layers\[0\].weight` of layer.*not registered.*nn.ModuleList"):
        functional(Hides())


@dataclass
class Batch:
    points: Tensor


class Energy(Base):
    """The derivative of a network in its input, which it makes a leaf of."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.fc(at).sin().sum(), at, create_graph=True)
            return found


class Distilled(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            told = self.teacher[0](x)
        return self.fc(x) - told  # type: ignore[no-any-return]


class Typed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).type_as(self.ws[0]).view_as(self.ws[1])  # type: ignore[no-any-return]


class Listed(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.scales = nn.ParameterList([weight()])
        self.named = nn.ParameterDict({"a": weight()})
        self.order, self.also = [self.layers[1], self.layers[0]], {"first": self.layers[0]}
        self.optimizer = Plain(list(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.order, self.also["first"]):
            x = layer(x).tanh()
        found: Tensor = x * self.scales[0] + self.named["a"]
        return found


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "lists of registered layers": Listed,
    "a teacher without gradients": lambda: Distilled(teacher=[nn.Linear(4, 4).double()]),
    "a frozen parameter": reading(lambda m: m.ws[0], ws=[weight().requires_grad_(False).double()]),
    "a detached parameter": reading(lambda m: m.ws[0].detach(), ws=[weight()]),
    "the data of a parameter": reading(lambda m: m.ws[0].data, ws=[weight()]),
    "the shape of a parameter": reading(lambda m: float(m.ws[0].numel()), ws=[weight()]),  # type: ignore[arg-type, return-value]
    "the type and the shape of parameters": lambda: Typed(ws=[weight(), nn.Parameter(torch.zeros(6, 4))]),
    "a constant tensor": reading(lambda m: m.w, w=torch.ones(4).double()),
    "a leaf made in the forward": Energy,
    "a buffer that requires a gradient": lambda: _with_buffer(),
}


def _with_buffer() -> nn.Module:
    module = reading(lambda m: m.scale)()
    module.register_buffer("scale", torch.ones(4).requires_grad_())
    return module


@pytest.mark.parametrize("build", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_keeps_its_value_rightly_passes_and_equals_the_module(build: Callable[[], nn.Module]) -> None:
    module = seeded(build)
    net = functional(module)
    expected = torch.autograd.grad(module(X).square().sum(), list(module.parameters()))
    for found, known in zip(gradient_of(net, net.params, X).values(), expected, strict=True):
        torch.testing.assert_close(found, known)
    torch.testing.assert_close(net(net.params, X), module(X), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in HARMLESS if name != "a leaf made in the forward"])  # not for vmap
def test_it_passes_under_vmap_too(name: str) -> None:
    module = seeded(HARMLESS[name])
    net = functional(module)
    found = torch.vmap(lambda x: net(net.params, x), randomness="same")(torch.stack([X, X + 1]))
    torch.testing.assert_close(found, torch.stack([module(X), module(X + 1)]))


def test_inputs_that_require_a_gradient_are_no_parameters_of_the_module() -> None:
    class Points(Base):
        def forward(self, batch: Batch | Tensor) -> Tensor:
            return self.fc(batch.points if isinstance(batch, Batch) else batch)  # type: ignore[no-any-return]

    net, leaf = functional(seeded(Points)), X.clone().requires_grad_()
    for batch in (leaf, Batch(leaf), leaf * 2, Batch(leaf * 2)):
        assert torch.autograd.grad(net(net.params, batch).sum(), leaf)[0].abs().sum() > 0


# State in plain attributes


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls  # type: ignore[no-any-return]


class Caches(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.fc.weight.sin()
        return self.fc(x) @ self.cache  # type: ignore[no-any-return]


class CachesInADict(Base):
    def forward(self, x: Tensor) -> Tensor:
        if "w" not in self.cache:
            self.cache["w"] = self.fc.weight.sin()
        return self.fc(x) @ self.cache["w"]  # type: ignore[no-any-return]


class Averages(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.fc(x) - self.mean  # type: ignore[no-any-return]


class AveragesInPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.fc(x) - self.mean  # type: ignore[no-any-return]


class Remembers(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.log["lengths"].append(len(x))
        return self.fc(x) / len(self.log["lengths"])  # type: ignore[no-any-return]


class CountsElsewhere(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.state.weight += 1
        return self.fc(x) * self.state.weight  # type: ignore[no-any-return]


class Draws(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.rand(4, generator=self.generator)  # type: ignore[no-any-return]


KEEPING: dict[str, Callable[[], nn.Module]] = {
    "a counter": lambda: Counts(calls=0),
    "a cached tensor": lambda: Caches(cache=None),
    "a cached tensor in a dict": lambda: CachesInADict(cache={}),
    "running statistics": lambda: Averages(mean=torch.zeros(4).double()),
    "running statistics in place": lambda: AveragesInPlace(mean=torch.zeros(4).double()),
    "a list in a dict": lambda: Remembers(log={"lengths": []}),
    "a counter in an object": lambda: CountsElsewhere(state=Plain(0)),
    "a generator": lambda: Draws(generator=torch.Generator().manual_seed(0)),
    "a counter in a layer": lambda: nn.Sequential(nn.Linear(4, 4), Counts(calls=0)),
}


@pytest.mark.parametrize("build", KEEPING.values(), ids=KEEPING.keys())
def test_every_call_finds_the_state_that_the_module_had_when_it_was_given(build: Callable[[], nn.Module]) -> None:
    module = seeded(build)
    net = functional(module)
    for shift in (0.0, 0.5, 0.0):
        params = {name: p + shift for name, p in net.params.items()}
        fresh = copy.deepcopy(module)
        with torch.no_grad():
            for name, p in fresh.named_parameters():
                p.copy_(params[name])
        torch.testing.assert_close(net(params, X), fresh(X), rtol=1e-14, atol=1e-14)
    demand_right_products(net, X)


@pytest.mark.parametrize("name", ["a cached tensor", "a cached tensor in a dict", "a list in a dict"])
def test_no_call_leaves_anything_behind(name: str) -> None:
    net = functional(seeded(KEEPING[name]))
    params = {name: p.clone().requires_grad_() for name, p in net.params.items()}
    alive = weakref.ref(params["fc.weight"])
    net(params, X)
    del params
    assert alive() is None


class OfTheClass(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.fc(x) * type(self).calls  # type: ignore[no-any-return]


class OfPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random()  # type: ignore[no-any-return]


def counting() -> nn.Module:
    calls: list[int] = []

    class Closes(Base):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(0)
            return self.fc(x) * len(calls)  # type: ignore[no-any-return]

    return Closes()


@pytest.mark.parametrize("build", [OfTheClass, OfPython, counting], ids=["class", "random", "closure"])
def test_state_outside_of_the_module_is_refused(build: Callable[[], nn.Module]) -> None:
    net = functional(seeded(build))
    with pytest.raises(ValueError, match="two calls with the same arguments return different values"):
        net(net.params, X)


def test_what_is_written_and_never_read_does_no_harm() -> None:
    class Logs(Base):
        seen = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).seen += 1
            self.last, self.shapes = x, [*self.shapes, x.shape]
            return self.fc(x)  # type: ignore[no-any-return]

    module = seeded(lambda: Logs(shapes=[]))
    net = functional(module)
    torch.testing.assert_close(net(net.params, X), cast(Any, module).fc(X))
    demand_right_products(net, X)


# What a forward writes to


def test_an_input_that_is_written_to_is_a_copy() -> None:
    net = functional(seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))))
    kept = X.clone()
    expected = F.linear(X.relu(), net.params["1.weight"], net.params["1.bias"])
    for _ in range(2):
        torch.testing.assert_close(net(net.params, X), expected)
        assert torch.equal(X, kept)
    demand_right_products(functional(seeded(lambda: nn.Sequential(nn.Linear(4, 2), nn.ELU(inplace=True)))), X)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_renormalizes_its_weights_is_refused(layer: Any) -> None:
    with pytest.raises(ValueError, match=r"layer '0'.*max_norm=1.0.*Set `max_norm` to None"):
        functional(seeded(lambda: nn.Sequential(layer(3, 4, max_norm=1.0))))
    functional(seeded(lambda: nn.Sequential(layer(3, 4))))


def test_a_forward_that_writes_to_its_parameters_is_refused_before_it_does() -> None:
    class Renormalizes(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.table = nn.Parameter(torch.ones(3, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.table, max_norm=0.1)

    net = functional(seeded(Renormalizes))
    kept = net.params["table"].clone()
    with pytest.raises(ValueError, match="writes to parameter 'table'"):
        net(net.params, IDS)
    assert torch.equal(net.params["table"], kept)


# Layers whose derivatives in torch are not those of their values


@pytest.mark.parametrize("flag", ["sparse", "scale_grad_by_freq"])
def test_an_embedding_has_the_derivatives_of_its_values(flag: str) -> None:
    module = seeded(lambda: nn.Sequential(nn.Embedding(3, 4, **cast(Any, {flag: True})), nn.Tanh(), nn.Linear(4, 2)))
    net = functional(module)
    torch.testing.assert_close(net(net.params, IDS), module(IDS), rtol=1e-14, atol=1e-14)
    demand_right_products(net, IDS)
    assert getattr(net.load(net.params)[0], flag)  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "new"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normalization_has_the_second_derivative_of_its_values(norm: Any, dim: int | None, called: bool) -> None:
    module = seeded(lambda: nn.Sequential(norm(nn.Linear(4, 3), dim=dim), nn.Tanh()))
    if called:
        module(X)
    net = functional(module)
    torch.testing.assert_close(net(net.params, X), module(X))
    demand_right_products(net, X)
    torch.testing.assert_close(
        net.load({k: 2 * p for k, p in net.params.items()})(X), net({k: 2 * p for k, p in net.params.items()}, X)
    )


NORMS = {"hook": nn.utils.spectral_norm, "new": nn.utils.parametrizations.spectral_norm}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_spectral_normalization_is_refused_in_train_mode_and_right_in_eval_mode(norm: Any) -> None:
    module = seeded(lambda: nn.Sequential(norm(nn.Linear(4, 3)), nn.Tanh()))
    module(X)
    with pytest.raises(ValueError, match=r"layer '0' \(\w*Linear\) is spectrally normalized in train mode.*\.eval\(\)"):
        functional(module)
    module[0].eval()  # type: ignore[index]
    net = functional(module)
    torch.testing.assert_close(net(net.params, X), module(X))
    demand_right_products(net, X)


def test_a_pruned_layer_takes_other_parameters() -> None:
    from torch.nn.utils import prune

    module = seeded(lambda: cast(Any, prune).l1_unstructured(nn.Linear(4, 3), "weight", 0.5))
    net = functional(module)
    mask = module.get_buffer("weight_mask")
    torch.testing.assert_close(
        net({name: 2 * p for name, p in net.params.items()}, X),
        2 * F.linear(X, net.params["weight_orig"] * mask, net.params["bias"]),
    )
    demand_right_products(net, X)


# Copies


class Held(nn.Module):
    def __init__(self, held: Any) -> None:
        nn.Module.__init__(self)
        self.inner = Base(held=held)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.fc(x) * (self.inner.held if isinstance(self.inner.held, Tensor) else 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("held", [threading.Lock(), (i for i in range(3)), {"a": [threading.Lock()]}])
def test_an_attribute_that_cannot_be_copied_is_named(held: Any) -> None:
    with pytest.raises(TypeError, match=r"attribute `held` of layer 'inner' \(Base\) of type \w+ cannot be copied"):
        functional(Held(held))


def test_what_an_earlier_call_left_is_refused_where_it_is_read_and_passes_where_it_is_not() -> None:
    stale = torch.ones(4).double().requires_grad_() * 2
    net = functional(seeded(lambda: Held(stale)))
    with pytest.raises(RuntimeError, match=r"attribute `held` of layer 'inner'.*holds a tensor that an earlier call"):
        net(net.params, X)
    net = functional(seeded(lambda: Held([stale])))
    torch.testing.assert_close(
        net(net.params, X), F.linear(X, net.params["inner.fc.weight"], net.params["inner.fc.bias"])
    )


# TorchScript, threads, calls inside of calls, recomputation


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused_by_name_and_a_scripted_function_is_right() -> None:
    scripted = torch.jit.script(nn.Linear(4, 3))
    for module in (scripted, nn.Sequential(nn.Linear(4, 4), scripted)):
        with pytest.raises(ValueError, match=r"is a TorchScript module.*that was given to `torch.jit.script`"):
            functional(module)
    sine = cast(Any, torch.jit).trace(lambda t: t.sin() * t, torch.ones(3))

    class Sine(Base):
        def forward(self, x: Tensor) -> Tensor:
            return sine(self.fc(x))  # type: ignore[no-any-return]

    demand_right_products(functional(seeded(Sine)), X)


@pytest.mark.parametrize(
    "extra", [(), (nn.Dropout(0.5),), (nn.BatchNorm1d(4), Base)], ids=["plain", "random", "buffers"]
)
def test_threads_share_one_function(extra: Any) -> None:
    layers = [layer if isinstance(layer, nn.Module) else nn.Linear(4, 4) for layer in extra]
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 2)))
    net = functional(module)
    several = [{name: p * (k + 1) for name, p in net.params.items()} for k in range(4)]
    expected = [net(params, X) for params in several]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(30):
            if not torch.equal(net(several[k], X), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("between", [nn.Tanh(), nn.Dropout(0.5)], ids=["that meet", "of which one waits"])
def test_threads_inside_of_a_call_have_their_own_parameters_and_random_numbers(between: nn.Module) -> None:
    barrier = threading.Barrier(2)

    class Meets(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if threading.current_thread() is not threading.main_thread():
                with contextlib.suppress(threading.BrokenBarrierError):
                    barrier.wait(
                        20 if isinstance(between, nn.Tanh) else 0.2
                    )  # for the other thread, inside of a call too
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
                return found.as_subclass(Meets) if type(found) is Tensor else found

    net = functional(seeded(lambda: nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 2))))
    several = [{name: p * (k + 1) for name, p in net.params.items()} for k in range(2)]
    expected = [net(params, X) for params in several]
    meeting = X.as_subclass(Meets)
    found: dict[int, Tensor] = {}

    def work(k: int) -> None:
        found[k] = net(several[k], meeting)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], expected[k]) for k in range(2))


def test_a_call_inside_of_a_call_has_its_own_parameters() -> None:
    class Nested(Base):
        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            deeper = net(doubled, x, 0) if depth else x
            return self.fc(x) + deeper  # type: ignore[no-any-return]

    net = functional(seeded(Nested))
    doubled = {name: 2 * p for name, p in net.params.items()}
    inner = F.linear(X, *doubled.values())
    torch.testing.assert_close(net(net.params, X), F.linear(X, *net.params.values()) + inner + X)


class Recomputes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda t: self.fc(t).tanh(), x, use_reentrant=False)  # type: ignore[no-any-return]


def test_recomputation_inside_of_a_module_is_refused_and_outside_it_is_right() -> None:
    net = functional(seeded(Recomputes))
    leaves = {name: p.clone().requires_grad_() for name, p in net.params.items()}
    with pytest.raises(
        RuntimeError, match=r"parameter 'fc.weight' was read when no call was under way.*checkpoint\(net,"
    ):
        torch.autograd.grad(net(leaves, X).sum(), list(leaves.values()))
    plain = functional(seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())))
    y = {name: p.clone().requires_grad_() for name, p in plain.params.items()}
    whole = checkpoint(plain, y, X, use_reentrant=False).square().sum()
    found = torch.autograd.grad(whole, list(y.values()))
    for a, b in zip(found, gradient_of(plain, plain.params, X).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_first_call_that_takes_another_form_is_examined_too() -> None:
    class Branches(Base):
        def forward(self, x: Tensor, scaled: bool = False) -> Tensor:
            return self.fc(x) * self.ws[0] if scaled else self.fc(x)  # type: ignore[no-any-return]

    net = functional(seeded(lambda: Branches(ws=[weight()])))
    net(net.params, X)
    with pytest.raises(ValueError, match=r"attribute `ws\[0\]`"):
        net(net.params, X, scaled=True)


def test_an_estimate_through_a_stateful_module_is_that_of_the_function() -> None:
    def estimate(build: Callable[[], nn.Module]) -> Tensor:
        net = functional(seeded(build))
        problem = BilevelProblem(
            lambda x, y: (net(y, X) - 1).square().mean(),
            lambda x, y: (net(y, X) - X).square().mean() + x.exp() * sum(p.square().sum() for p in y.values()),
        )
        return hypergradient(problem, torch.tensor(-2.0), net.params, estimator="aid-cg").grad  # type: ignore[no-any-return]

    class Ones(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)  # type: ignore[no-any-return]

    torch.testing.assert_close(estimate(lambda: Counts(calls=0)), estimate(Ones), rtol=1e-9, atol=1e-12)
