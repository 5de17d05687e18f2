"""Each recipe for networks against a loop by hand: memory and time at most 1.15 times, in the same run.

    python benchmarks/networks_recipes.py --out benchmarks/results

One module holds the loops of some recipes, as `PAIRS`; see `_by_hand.py` for what is measured. The exit code is 1 where
a limit is passed.
"""

from __future__ import annotations

from _by_hand import main
from _loops_a import PAIRS as A
from _loops_b import PAIRS as B
from _loops_c import PAIRS as C

PAIRS = (*A, *B, *C)

if __name__ == "__main__":
    raise SystemExit(main(__file__, __doc__ or "", PAIRS))
