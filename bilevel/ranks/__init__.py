"""Past one machine: the processes of a group of `torch.distributed`, and what is theirs of samples and of tasks."""

from bilevel.ranks.ranks import Ranks as Ranks
from bilevel.ranks.rows import Rows as Rows
from bilevel.ranks.shard import Shard as Shard
