"""A single loop whose whole step is one program: the directions from a batch, and the steps along them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel._calculus import Exact, grad, total
from bilevel._estimate import FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel._result import BilevelError, Report, Status, Tally
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import Coupled
from bilevel.algorithms.engine.each_run import EachRun
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.reduction import Averaged, MovingAverage, Plain
from bilevel.algorithms.engine.single_loop import SingleLoop
from bilevel.algorithms.engine.steps import LoopState, lengths
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.compiled.code import Code, tensors_of
from bilevel.compiled.norms import row_norm
from bilevel.compiled.outer import outer
from bilevel.compiled.plain import demand_optimizer, demand_smooth
from bilevel.compiled.programs import Program, program
from bilevel.compiled.reading import Backend, unlike
from bilevel.compiled.refused import refused
from bilevel.compiled.tracing import Traced, Tracing
from bilevel.requirements.properties import START_ONLY, DoesNotApply, Property


def compiled_loop(algorithm: AbstractAlgorithm[Any], backend: Backend = "inductor") -> CompiledLoop:
    """An algorithm whose steps are programs.

    Raises:
        NotCompilableError: if it is no single loop along the coupled direction, with the reason.
    """
    if isinstance(algorithm, CompiledLoop):
        return algorithm
    loop = algorithm.loop if isinstance(algorithm, AbstractPreset) else algorithm
    name = f"algorithm={type(algorithm).__name__}(...)"
    if not isinstance(loop, SingleLoop):
        raise refused(name, "only single loops such as `SOBA`, and estimates with `outer=`, are written as programs")
    if not isinstance(loop.direction, Coupled) or not isinstance(loop.direction.products, Exact):
        raise refused(name, "its direction is not `Coupled()` with exact products")
    if not isinstance(loop.reduction, Plain | MovingAverage):
        raise refused(name, f"the memory of `{type(loop.reduction).__name__}` is no fixed set of vectors of one point")
    if isinstance(loop.inner_step, EachRun) or isinstance(loop.outer_step, EachRun):
        raise refused("sweep=...", "an optimizer for each of several runs side by side is no step of tensors alone",
                      "Sweep over steps that are numbers")  # fmt: skip
    return CompiledLoop(loop, backend)


@final
@dataclass(frozen=True, eq=False)
class CompiledLoop(AbstractAlgorithm[LoopState]):
    """The same loop: each evaluation is one program, which gives the next state as well.

    Several runs side by side, as a sweep has them, are one program too: steps are then tensors `(runs,)`, and the state
    has an axis of runs in front.

    Args:
        loop: whose steps they are.
        backend: of programs.
    """

    loop: SingleLoop
    backend: Backend = "inductor"
    _programs: dict[Any, Program] = field(init=False, repr=False, default_factory=dict)

    @property
    def requires(self) -> frozenset[Property]:
        return self.loop.requires

    @property
    def draws(self) -> Draws:
        return self.loop.draws

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> LoopState:
        for name, step in (("outer_step", self.loop.outer_step), ("inner_step", self.loop.inner_step)):
            if isinstance(step, AbstractOptimizer):
                demand_optimizer(f"{name}=...", step, x)
        return self.loop.init(oracle, x, y)

    def evaluate(self, oracle: Oracle, state: LoopState) -> Evaluated:
        loop, problem, v = self.loop, oracle.problem(), state.v
        assert v is not None
        averages, memory = isinstance(loop.reduction, MovingAverage), state.memory
        h = torch.zeros_like(state.x) if averages and memory.x is None else memory.x if averages else None
        vectors = [
            state.x,
            state.y,
            v,
            *(() if h is None else (h,)),
            *self._values(state),
            self._numbers(oracle, state),
        ]
        data = tensors_of(problem.data)
        sizes = tuple((each.shape, each.stride()) for each in data)
        known = self._programs.get(sizes)
        if known is None:
            known = self._programs[sizes] = self._made(problem, vectors, oracle)
        made = known.run(vectors, data)
        *values, norm, of_y, of_v = made[-1].tolist()
        value = torch.tensor(values if state.x.dim() > 1 else values[0], dtype=state.x.dtype)
        rows, tally = state.y.shape[:-1].numel(), problem.tally
        tally.gradients += rows
        tally.hvps += rows
        tally.cross_products += rows
        tally.outer_gradients += rows
        reports = (_report("inner iterate", of_y), _report("linear iterate", of_v))
        found = FlatEstimate(made[-2], value, state.y, reports, v)
        if not oracle.step:
            own = loop.evaluate(oracle.about(oracle.like.with_tally(Tally()), oracle.data), state).estimate
            apart = unlike(own, found)
            if apart and state.x.dim() > 1:  # of a sweep nobody reads the reports
                raise BilevelError(f"`minimize(sweep=..., compile=True)`: {apart[0]}", apart[0].status)
            found = FlatEstimate(made[-2], value, state.y, (*reports, *apart), v)
        return Evaluated(found, (made, norm))

    def step(self, oracle: Oracle, state: LoopState, found: Evaluated) -> LoopState:
        made, _ = found.kept
        x, y, v, *rest = made[:-2]
        memory = Averaged(rest.pop(0)) if isinstance(self.loop.reduction, MovingAverage) else None
        states: list[OptimizerState | None] = []
        for old in (state.outer, state.inner):
            states.append(None if old is None else {key: rest.pop(0) for key in old})
        return LoopState(x, y, v, memory, *states)

    def stationarity(self, oracle: Oracle, state: LoopState, found: Evaluated) -> Tensor:
        return torch.tensor(found.kept[1], dtype=torch.float64)

    def point(self, state: LoopState) -> tuple[Tensor, Tensor]:
        return state.x, state.y

    @staticmethod
    def _values(state: LoopState) -> list[Tensor]:
        return [*(state.outer or {}).values(), *(state.inner or {}).values()]

    def _numbers(self, oracle: Oracle, state: LoopState) -> Tensor:
        """Everything that changes from step to step and is no vector."""
        loop, k = self.loop, oracle.step
        rho = 1.0 if loop.schedule is None else loop.schedule(k)
        gamma = rho if loop.outer_schedule is None else loop.outer_schedule(k)
        linear = lengths(loop.inner_step, loop.linear_step)
        theta = 1.0
        if isinstance(loop.reduction, MovingAverage) and state.memory.x is not None:
            theta = loop.reduction.theta(k)
        inner = rho * (1.0 if isinstance(loop.inner_step, AbstractOptimizer) else loop.inner_step)
        outer_step = gamma * (1.0 if isinstance(loop.outer_step, AbstractOptimizer) else loop.outer_step)
        of_f, of_g = oracle.block("f").scale, oracle.block("g").scale
        numbers = [inner, rho * linear, outer_step, theta, of_f, of_g]
        if state.x.dim() == 1:
            return torch.tensor(numbers, dtype=state.x.dtype)
        runs = [torch.as_tensor(each, dtype=state.x.dtype).expand(len(state.x)) for each in numbers]
        return torch.stack(runs)

    def _made(self, problem: FlatProblem, vectors: list[Tensor], oracle: Oracle) -> Program:
        code, x = Code.of(problem), vectors[0]
        key = ("loop", code.key(self.loop, oracle.region), tuple(tuple(v.shape) for v in vectors), str(x.dtype))
        what = f"a step of a single loop ({x.numel()} outer, {vectors[1].numel()} inner variables)"
        trace: Callable[[], tuple[Traced, None]] = lambda: (self._traced(code, vectors, oracle), None)  # noqa: E731
        return program(key, self.backend, trace, [*vectors, *code.data.tensors], what)

    def _traced(self, code: Code, vectors: list[Tensor], oracle: Oracle) -> Traced:
        demand_smooth(code.problem)
        loop, region, tracing = self.loop, oracle.region, Tracing(code)
        averages = isinstance(loop.reduction, MovingAverage)
        keys = [list(step.init(at)) if isinstance(step, AbstractOptimizer) else None
                for step, at in ((loop.outer_step, vectors[0]), (loop.inner_step, vectors[1]))]  # fmt: skip

        def of_g(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            gradient = grad(total(problem.g(x, y)), y, create_graph=True)
            hv: Tensor | None = None
            gv: Tensor | None = None
            if gradient.requires_grad:
                hv, gv = torch.autograd.grad(gradient, (y, x), v, allow_unused=True)
            if gv is None and problem.problem.init is not None:
                raise DoesNotApply(START_ONLY)
            zero = torch.zeros_like
            return gradient.detach().clone(), zero(v) if hv is None else hv, zero(x) if gv is None else gv

        def moved(step: Any, own: list[str] | None, factor: Tensor, d: Tensor, at: Tensor, state: list[Tensor]) -> Any:
            if own is None:
                return at - _of_rows(factor, at) * d, []
            there, after = step.step(d, at, dict(zip(own, (state.pop(0) for _ in own), strict=True)))
            return torch.lerp(at, there, _of_rows(factor, at)), [after[key] for key in own]

        def projected(x: Tensor) -> Tensor:
            assert region is not None
            return region.project(x) if x.dim() == 1 else torch.stack([region.project(row) for row in x.unbind()])

        def steps(_: FlatProblem, x: Tensor, y: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            """The next state, d_x, |(d_x, d_y, d_v)|, and its parts of y and v."""
            (gy, hv, gv, fx, fy, numbers), rest = others[-6:], list(others[:-6])
            inner, linear, outer_step, theta, w_f, w_g = numbers.unbind()
            dx = _of_rows(w_f, x) * fx - _of_rows(w_g, x) * gv
            dy, dv = _of_rows(w_g, y) * gy, _of_rows(w_g, y) * hv - _of_rows(w_f, y) * fy
            h = []
            if averages:
                dx = torch.lerp(rest.pop(0), dx, _of_rows(theta, x))
                h = [dx]
            there, of_x = moved(loop.outer_step, keys[0], outer_step, dx, x, rest)
            y_new, of_y = moved(loop.inner_step, keys[1], inner, dy, y, rest)
            v = v - _of_rows(linear, v) * dv
            if loop.linear_radius is not None:
                v = v * (loop.linear_radius / row_norm(v).unsqueeze(-1)).clamp(max=1.0)
            left = dx if region is None else x - projected(x - dx)
            there = there if region is None else projected(there)
            sizes = [row_norm(each.reshape(-1)) for each in (left, dy, dv)]
            norm = row_norm(torch.stack(sizes))
            return there, y_new, v, *h, *of_x, *of_y, dx, norm, sizes[1], sizes[2]

        x, y, v, *others, numbers = vectors
        g, f = tracing.piece(of_g, x, y, v), tracing.piece(outer, x, y)
        step = tracing.piece(steps, x, y, v, *others, y, v, x, x, y, numbers)

        def whole(x: Tensor, y: Tensor, v: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            (value, fx, fy), (gy, hv, gv) = f(x, y), g(x, y, v)
            *state, norm, of_y, of_v = step(x, y, v, *given[:-1], gy, hv, gv, fx, fy, given[-1])
            row = torch.cat([each.reshape(-1).double() for each in (value, norm, of_y, of_v)])
            return *state, row

        return tracing.whole(whole, *vectors)


def _of_rows(number: Tensor, at: Tensor) -> Tensor:
    """A number, or one for each of several runs side by side, as a factor of what stands there."""
    return number.reshape(-1, *(1 for _ in at.shape[1:])) if number.dim() else number


def _report(part: str, residual: float) -> Report:
    return Report(part, Status.successful if math.isfinite(residual) else Status.nonfinite, residual, 0)
