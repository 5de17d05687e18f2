"""What the inner and the outer minimizers of scipy share: methods, limits, arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

# The methods, each with the status by which scipy says that the iterations (for TNC evaluations) were used up.
_EXHAUSTED = {"L-BFGS-B": 1, "BFGS": 1, "CG": 1, "SLSQP": 9, "TNC": 3, "trust-constr": 0}
BOUNDED = ("L-BFGS-B", "SLSQP", "TNC", "trust-constr")


def demand_method(call: str, method: str) -> None:
    """Refuse a method that is not among those that are known to work.

    Raises:
        ValueError: naming them.
    """
    if method not in _EXHAUSTED:
        raise ValueError(f"`{call}(method=...)` must be one of {', '.join(_EXHAUSTED)}. Got {str(method)[:100]!r}.")


def options_of(method: str, tol: float | None, max_steps: int) -> dict[str, Any]:
    """How the methods of scipy call their limits; with a tolerance on the gradient, no other test ends them early."""
    options: dict[str, Any] = {"maxfun" if method == "TNC" else "maxiter": max_steps}
    if method == "L-BFGS-B":
        options["maxfun"] = 20 * max_steps + 20
    if tol is None:
        return options
    options.update({"ftol": tol * tol} if method == "SLSQP" else {"gtol": tol})
    if method in ("L-BFGS-B", "TNC"):
        options["ftol"] = 0.0
    if method in ("TNC", "trust-constr"):
        options["xtol"] = 0.0
    return options


def exhausted(method: str, found: Any, max_steps: int) -> bool:
    """Whether scipy stopped because it had taken all its steps."""
    return int(found.status) == _EXHAUSTED[method] or int(found.nit) >= max_steps


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The entries in float64 on the CPU: `(n,)`."""
    array: np.ndarray[Any, Any] = tensor.detach().reshape(-1).double().cpu().numpy()
    return array.copy()


def scipy_optimize(user: str) -> Any:
    """The module scipy.optimize.

    Raises:
        ImportError: naming the extra.
    """
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError(f'`{user}` needs scipy: pip install "bilevel[scipy]"') from error
    return optimize
