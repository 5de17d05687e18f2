"""Estimates and outer steps as one compiled program each: what `compile=True` runs."""

from bilevel.compiled.estimator import Compiled as Compiled
from bilevel.compiled.refused import NotCompilableError as NotCompilableError
