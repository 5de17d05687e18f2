"""SAGA: the latest terms of every block in tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.algorithms.engine.direction import AbstractDirection, Coupled, Joint, Pieces, summed
from bilevel.algorithms.engine.reduction import AbstractReduction, Reduced
from bilevel.algorithms.engine.rows import AbstractRows
from bilevel.algorithms.oracle import Block, Oracle
from bilevel.ranks.ranks import Ranks
from bilevel.requirements.properties import DoesNotApply


@final
@dataclass(frozen=True, eq=False)
class Table(AbstractRows):
    """The terms of one function, g or f: those of every block, their mean, and a row that is to be written yet.

    Attributes:
        rows: `(N, *several, width)`; modified in place, by `write`.
        mean: A = sum_k w_k rows_k.
        number: of the row to write; -1: none. Of several runs side by side that each see a block of their own, one for
            each `(runs,)`.
        row: it.
    """

    rows: Tensor
    mean: Tensor
    number: int | Tensor
    row: Tensor

    @staticmethod
    def zeros(blocks: int, like: Tensor) -> Table:
        """All terms zero."""
        zero = torch.zeros_like(like)
        return Table(like.new_zeros(blocks, *like.shape), zero, -1, zero)

    def of_run(self, k: int) -> Table:
        number = int(self.number[k]) if isinstance(self.number, Tensor) else self.number
        return Table(self.rows[:, k].clone(), self.mean[k], number, self.row[k])

    def write(self) -> None:
        """Put the row where it belongs; writing it again changes nothing, as a step that is taken again does."""
        if isinstance(self.number, Tensor) or self.number >= 0:
            self.rows[_place(self.number)] = self.row

    def see(self, new: Tensor, block: Block) -> tuple[Tensor, Table]:
        """A + (w N) (new - rows_k), unbiased whatever the rows are, and the table with the new row."""
        self.write()
        number = block.number if block.numbers is None else block.numbers
        assert number is not None
        change = new - self.rows[_place(number)]
        reduced = self.mean + block.scale * change
        return reduced, Table(self.rows, self.mean + block.weights * change, number, new)


def _place(number: int | Tensor) -> Any:
    """Where the rows of a block are in a table: of block k, or of block k_r for each run r."""
    return (number, torch.arange(len(number), device="cpu")) if isinstance(number, Tensor) else number


@final
@dataclass(frozen=True, eq=False)
class Tables:
    """The table of g, of (grad_y g, H v, G v), and that of f, of (grad_y f, grad_x f)."""

    g: Table
    f: Table


@final
@dataclass(frozen=True)
class Saga(AbstractReduction):
    """Each term t of (D_y, D_v, D_x) at block k: D = A + (w_k N) (t - T_k), A <- A + w_k (t - T_k), T_k <- t.

    The weights of blocks make it unbiased for a ragged last block too. Its noise vanishes where the iterates come to
    rest, so that constant steps converge. Tables begin at zero.

    Memory: N_g (2q + p) + N_f (q + p) numbers.

    Source: Defazio, Bach, Lacoste-Julien, NeurIPS 2014; for bilevel problems Dagreou et al., NeurIPS 2022, (11a-c).

    Raises:
        DoesNotApply: if batches have no identity, or the direction is not `Coupled`.
    """

    @property
    def keeps_direction(self) -> bool:
        return True

    def of_seeds(self, seeds: tuple[int, ...]) -> Saga:
        return self

    def init(self, oracle: Oracle, direction: AbstractDirection, at: Joint) -> Tables:
        of_g, of_f = oracle.block("g"), oracle.block("f")
        if _without(of_g) or _without(of_f) or not isinstance(direction, Coupled):
            raise DoesNotApply(
                "it keeps a table of what every block of the data said, and the data have batches of no identity. Pass"
                " `data=FiniteSum(tensors, batch_size)`, or a `Split` of two, or use an algorithm without tables such"
                " as 'soba' or 'ma-soba'."
            )
        assert at.v is not None
        g, f = _apart(Pieces(at.y, at.v, at.x, at.y, at.x))
        return Tables(Table.zeros(of_g.count, g), Table.zeros(of_f.count, f))

    def reduce(self, oracle: Oracle, direction: AbstractDirection, at: Joint, memory: Tables) -> Reduced:
        assert isinstance(direction, Coupled)
        problem = oracle.problem()
        pieces, value = direction.pieces(problem.by_itself(), at, checked=oracle.step > 0)
        of_g, of_f = _apart(pieces)
        g, table_g = memory.g.see(of_g, oracle.block("g"))
        f, table_f = memory.f.see(of_f, oracle.block("f"))
        joint, value = summed(problem, _together(g, f, pieces).joint(), value)
        return Reduced(joint, value, Tables(table_g, table_f))

    def is_apart(self, memory: Any) -> bool:
        return True

    def gathered(self, memory: Tables, ranks: Ranks) -> Tables:
        """The terms of all ranks: what each has of a term are its samples' parts, which are summed."""
        memory.g.write()
        memory.f.write()
        rows_g, mean_g, row_g, rows_f, mean_f, row_f = ranks.total(
            memory.g.rows, memory.g.mean, memory.g.row, memory.f.rows, memory.f.mean, memory.f.row
        )
        return Tables(Table(rows_g, mean_g, memory.g.number, row_g), Table(rows_f, mean_f, memory.f.number, row_f))

    def of_rank(self, memory: Tables, ranks: Ranks) -> Tables:
        """Rank 0 takes over all terms, and the others begin at zero: directions depend on the sums alone."""
        if ranks.rank == 0:
            return memory
        g, f = (Table(0 * t.rows, 0 * t.mean, t.number, 0 * t.row) for t in (memory.g, memory.f))
        return Tables(g, f)


def _without(block: Block) -> bool:
    """Whether a batch has no identity."""
    return block.number is None and block.numbers is None


def _apart(pieces: Pieces) -> tuple[Tensor, Tensor]:
    """The terms of g in one vector, and those of f in another; for several x side by side, in one each."""
    lead = pieces.fx.dim() - 1
    g, f = ([piece.flatten(lead) for piece in parts] for parts in (pieces[:3], pieces[3:]))
    return torch.cat(g, -1), torch.cat(f, -1)


def _together(g: Tensor, f: Tensor, like: Pieces) -> Pieces:
    lead = like.fx.dim() - 1
    sizes = [piece.flatten(lead).shape[-1] for piece in like]
    parts = (*torch.split(g, sizes[:3], -1), *torch.split(f, sizes[3:], -1))
    return Pieces(*(part.reshape(piece.shape) for part, piece in zip(parts, like, strict=True)))
