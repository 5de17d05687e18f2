"""Parametrized problems of cvxpy as inner problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel._numerics.cones import Cone, ConeKind
from bilevel._numerics.nesting import flatten
from bilevel._tree import Structure, Tree
from bilevel.arguments.words import got
from bilevel.inner_problems.cone_form import AffineMap, ConeForm, Pattern
from bilevel.inner_problems.cone_parameters import Parameter
from bilevel.inner_problems.cone_program import ConicProgram

_DOMAINS = ("nonneg", "pos", "nonpos", "neg", "PSD", "NSD", "symmetric", "diag")
_SYMMETRIC = frozenset({"PSD", "NSD", "symmetric"})
_REFUSED = ("boolean", "integer", "complex", "imag", "hermitian", "sparsity")


def from_cvxpy(
    problem: Any, parameters: Tree, variables: Tree, values: Callable[..., Tree] | None = None
) -> ConicProgram:
    """A parametrized cvxpy problem as the inner problem: y*(x) are values of its variables, x values of parameters.

    The problem is brought into standard form once, here: z'Pz / 2 + c'z, A z + s = b, s in a product of cones, whose
    numbers are affine functions of the parameters (disciplined parametrized programming). `Clarabel` solves it at each
    x, and `KKT` differentiates its optimality conditions; see `ConicProgram` for the formulas, and for what is reported
    where y* has no derivative. Nothing of the given problem is kept, and it is not changed.

    The derivative is our own, of the program with its quadratic term: `diffcp` differentiates the homogeneous embedding
    of a program with linear objective, in which a quadratic is a cone, by an iterative solver on a matrix that is not
    symmetric.

    Args:
        problem: a `cvxpy.Problem`, convex and DPP. Linear, quadratic, second-order, exponential and semidefinite ones.
        parameters: a `cvxpy.Parameter`, or a nested dict, list or tuple of some; x has the same nesting, tensors of
            their shapes as leaves. What is left out stays at its value.
        variables: a `cvxpy.Variable`, or a nested structure of some; y, and so y0, has the same nesting.
        values: `values(x) -> parameters`, or `values(x, data)`: then x is anything, and the values of the parameters
            are computed from it in torch.

    Raises:
        ImportError: without cvxpy.
        TypeError: if an argument is of another type.
        ValueError: if the problem is not convex or not DPP, needs integers or other cones, if a parameter or variable
            is not the problem's, if one is given twice, or if one that is left out has no value.

    Example:
        ::

            a, y = cp.Parameter(2), cp.Variable(2)
            ball = cp.Problem(cp.Minimize(cp.sum_squares(y - a)), [cp.norm(y) <= 1])
            inner = from_cvxpy(ball, a, y)
            problem = BilevelProblem(lambda x, y: y[0], inner=inner)  # y* = x / |x| where |x| > 1
            hypergradient(problem, torch.tensor([3.0, 4.0]), inner.start(torch.zeros(()))).grad
    """
    cvxpy = _cvxpy()
    if not isinstance(problem, cvxpy.Problem):
        raise TypeError(f"`from_cvxpy(problem=...)` must be a cvxpy.Problem. Got {got(problem)}.")
    if values is not None and not callable(values):
        raise TypeError(f"`from_cvxpy(values=...)` must be a function. Got {got(values)}.")
    _demand_convex(problem)
    given, tree = _leaves("parameters", parameters, cvxpy.Parameter, problem.parameters())
    wanted, own = _leaves("variables", variables, cvxpy.Variable, problem.variables())
    data, chain, program = _canonical(cvxpy, problem, given)
    return ConicProgram(
        _form(data, program, _recovery(chain, program, wanted)),
        _placing(chain, program, problem.parameters(), given),
        _parameters(given),
        tree,
        own,
        values,
    )


def _demand_convex(problem: Any) -> None:
    if problem.is_mixed_integer():
        raise ValueError("`from_cvxpy(problem=...)` must have continuous variables. Got integer ones, which jump.")
    if not problem.is_dcp():
        raise ValueError(
            "`from_cvxpy(problem=...)` must be convex by the rules of disciplined convex programming. Got one that is"
            " not. See `problem.is_dcp()` and https://dcp.stanford.edu."
        )
    if not problem.is_dcp(dpp=True):
        raise ValueError(
            "`from_cvxpy(problem=...)` must be DPP: affine in its parameters where they multiply variables. Got a"
            " problem that is convex, but not DPP. Rewrite it: a parameter for each product of parameters, computed by"
            " `values=`; `cp.sum_squares(F @ y)` with F'F = P for `cp.quad_form(y, P)`."
        )
    for leaf in (*problem.variables(), *problem.parameters()):
        refused = [name for name in _REFUSED if _declared(leaf, name)]
        if refused:
            raise ValueError(
                f"`from_cvxpy(problem=...)` must have real variables and parameters without a pattern of zeros. Got"
                f" {leaf.name()}, declared {refused[0]!r}."
            )


def _leaves(argument: str, tree: Tree, kind: Any, known: Sequence[Any]) -> tuple[list[Any], Structure]:
    """The leaves of what was given, and the structure of their values."""
    leaves: list[Any] = []
    spec = flatten(tree, leaves, f"`from_cvxpy({argument}=...)`")
    name = kind.__name__
    leaf: Any
    for leaf in leaves:
        if not isinstance(leaf, kind):
            raise TypeError(
                f"`from_cvxpy({argument}=...)` must be a cvxpy.{name}, or a nested dict, list or tuple of some. Got"
                f" {got(leaf)}."
            )
        if all(leaf.id != other.id for other in known):
            raise ValueError(
                f"`from_cvxpy({argument}=...)` must be of the problem. Got {leaf.name()}, which does not occur in it."
            )
    ids = [leaf.id for leaf in leaves]
    if not leaves or len(set(ids)) < len(ids):
        raise ValueError(f"`from_cvxpy({argument}=...)` must name at least one, and each once. Got {len(ids)} leaves.")
    shapes = tuple(torch.Size(leaf.shape) for leaf in leaves)
    return leaves, Structure(spec, shapes, torch.float64, torch.device("cpu"))


def _canonical(cvxpy: Any, problem: Any, given: list[Any]) -> tuple[Any, Any, Any]:
    """The data of the standard form, the reductions that lead to it, and the same as a function of parameters."""
    free: set[int] = {leaf.id for leaf in given}
    before: dict[int, tuple[Any, Any]] = {}
    known: list[Any] = list(problem.parameters())
    for leaf in known:
        if leaf.id not in free and leaf.value is None:
            raise ValueError(
                f"`from_cvxpy(parameters=...)` must name all parameters without a value. Got none for {leaf.name()}:"
                f" name it, or set `.value`."
            )
    try:
        for leaf in given:  # any value in the domain: the standard form does not depend on it
            before[leaf.id] = leaf, leaf.value
            leaf.value = leaf.project(_ones(leaf))
        data, chain, _ = problem.get_problem_data(cvxpy.CLARABEL)
    finally:
        for leaf, value in before.values():
            leaf.value = value
    return data, chain, data["param_prob"]


def _ones(leaf: Any) -> Any:
    import numpy as np

    return np.eye(leaf.shape[0]) if len(leaf.shape) == 2 and leaf.shape[0] == leaf.shape[1] else np.ones(leaf.shape)


def _form(data: Any, program: Any, y: AffineMap) -> ConeForm:
    dims = data["dims"]
    if getattr(dims, "p3d", None) or getattr(dims, "pnd", None):
        raise ValueError(
            "`from_cvxpy(problem=...)` must be of linear, quadratic, second-order, exponential and semidefinite cones."
            " Got power cones. Most atoms that need them are written with second-order cones: `approx=True`."
        )
    cones = (
        Cone("zero", int(dims.zero), 1),
        Cone("nonnegative", int(dims.nonneg), 1),
        *_grouped("second-order", dims.soc),
        *_grouped("psd", dims.psd),
        *_grouped("exponential", [3] * int(dims.exp)),
    )
    n, m, width = int(program.x.size), int(data["b"].size), int(program.total_param_size)
    A, b = _pattern(program.A, m, n, width, sign=-1.0)  # the rows of the tensor are b - A z
    cost = _pattern(program.q, 1, n, width)[0]
    none = torch.zeros(0, dtype=torch.long)
    quadratic = Pattern(none, none, (n, n), AffineMap(none, none, torch.zeros(0).double(), torch.zeros(0).double()))
    if program.P is not None:
        quadratic = _pattern(program.P, n, n, width)[0]
    c = AffineMap(
        cost.j[cost.numbers.i],
        cost.numbers.j,
        cost.numbers.values,
        torch.zeros(n, dtype=torch.float64).index_add(0, cost.j, cost.numbers.offset),
    )
    return ConeForm(quadratic, A, c, b, tuple(cone for cone in cones if cone.count), y, width)


def _grouped(kind: ConeKind, orders: Sequence[Any]) -> list[Cone]:
    """Neighbouring cones of one order as one."""
    found: list[Cone] = []
    for order in map(int, orders):
        if found and found[-1].order == order:
            found[-1] = Cone(kind, found[-1].count + 1, order)
        else:
            found.append(Cone(kind, 1, order))
    return found


def _pattern(tensor: Any, rows: int, n: int, width: int, sign: float = 1.0) -> tuple[Pattern, AffineMap]:
    """A matrix and a vector as functions of parameters, from a tensor of cvxpy.

    Its rows are the entries of (matrix, vector), column by column, its columns the parameters, and last what does not
    depend on them; without a vector, that is zero.
    """
    coo = tensor.tocoo()
    coo.sum_duplicates()
    entry, column = (torch.as_tensor(part.astype("int64")) for part in (coo.row, coo.col))
    value = torch.as_tensor(coo.data, dtype=torch.float64)
    in_vector = entry >= rows * n
    vector = _affine(entry[in_vector] - rows * n, column[in_vector], value[in_vector], rows, width)
    entry, column, value = (part[~in_vector] for part in (entry, column, sign * value))
    present, place = torch.unique(entry, return_inverse=True)
    numbers = _affine(place, column, value, len(present), width)
    return Pattern(present % rows, torch.div(present, rows, rounding_mode="floor"), (rows, n), numbers), vector


def _affine(i: Tensor, column: Tensor, value: Tensor, size: int, width: int) -> AffineMap:
    """From entries of a matrix whose last column is the offset."""
    last = column == width
    offset = torch.zeros(size, dtype=torch.float64).index_add(0, i[last], value[last])
    return AffineMap(i[~last], column[~last], value[~last], offset)


def _declared(leaf: Any, name: str) -> bool:
    value = leaf.attributes.get(name)
    return value is not None and value is not False


def _renamed(chain: Any, leaf: Any, kind: str) -> int:
    """The number by which the reductions know a leaf in the end."""
    number = leaf.id
    for reduction in chain.reductions:
        renames = reduction.var_id_map if kind == "variable" else reduction.param_id_map
        number = renames.get(number, [number])[0]
    return int(number)


def _entries(leaf: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries of a leaf, row by row, are entries of what cvxpy keeps of it, and with what weight.

    What it keeps is the upper triangle of a symmetric matrix, row by row, the diagonal of a diagonal one, and else all,
    column by column. A symmetric matrix gives the mean of both triangles, so that it is taken as it is.
    """
    shape = tuple(leaf.shape)
    places = torch.arange(int(leaf.size)).reshape(shape)
    if len(shape) == 2 and any(_declared(leaf, name) for name in _SYMMETRIC):
        row, column = torch.triu_indices(*shape)
        kept = torch.arange(len(row))
        whole = torch.cat([places[row, column], places[column, row]])
        return whole, torch.cat([kept, kept]), torch.full((len(whole),), 0.5, dtype=torch.float64)
    if _declared(leaf, "diag"):
        whole = places.diagonal()
        return whole, torch.arange(len(whole)), torch.ones(len(whole), dtype=torch.float64)
    whole = places.permute(tuple(reversed(range(len(shape))))).reshape(-1)
    return whole, torch.arange(len(whole)), torch.ones(len(whole), dtype=torch.float64)


def _recovery(chain: Any, program: Any, wanted: list[Any]) -> AffineMap:
    """Z -> the variables, each row by row, one after the other."""
    i, j, start = [], [], 0
    for leaf in wanted:
        number = _renamed(chain, leaf, "variable")
        whole, kept, weight = _entries(leaf)
        if number in program.var_id_to_col:
            symmetric = bool((weight < 1).any())
            once = torch.unique(torch.stack([whole, kept]), dim=1) if symmetric else torch.stack([whole, kept])
            i.append(once[0] + start)
            j.append(once[1] + int(program.var_id_to_col[number]))
        start += int(leaf.size)
    rows, columns = (torch.cat(part) if part else torch.zeros(0, dtype=torch.long) for part in (i, j))
    return AffineMap(rows, columns, torch.ones(len(rows)).double(), torch.zeros(start).double())


def _placing(chain: Any, program: Any, known: Sequence[Any], given: list[Any]) -> AffineMap:
    """The given parameters, each row by row, one after the other, -> all that cvxpy keeps."""
    offset = torch.zeros(int(program.total_param_size), dtype=torch.float64)
    free, i, j, values, start = {leaf.id for leaf in given}, [], [], [], 0
    for leaf in (*given, *(leaf for leaf in known if leaf.id not in free)):
        number = _renamed(chain, leaf, "parameter")
        whole, kept, weight = _entries(leaf)
        column = program.param_id_to_col.get(number)
        if leaf.id in free:
            if column is not None:
                i.append(kept + int(column))
                j.append(whole + start)
                values.append(weight)
            start += int(leaf.size)
        elif column is not None:
            value = torch.as_tensor(leaf.value, dtype=torch.float64).reshape(-1)
            offset.index_add_(0, kept + int(column), weight * value[whole])
    none = torch.zeros(0, dtype=torch.long)
    rows, columns = (torch.cat(part) if part else none for part in (i, j))
    return AffineMap(rows, columns, torch.cat(values) if values else torch.zeros(0).double(), offset)


def _parameters(given: list[Any]) -> tuple[Parameter, ...]:
    found, start = [], 0
    for leaf in given:
        domain = frozenset(name for name in _DOMAINS if _declared(leaf, name))
        found.append(Parameter(leaf.name(), tuple(leaf.shape), start, domain))
        start += int(leaf.size)
    return tuple(found)


def _cvxpy() -> Any:
    try:
        import cvxpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('`from_cvxpy` needs cvxpy: pip install "bilevel[convex]"') from error
    return cvxpy
