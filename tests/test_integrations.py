"""Recipes that need several processes do on two ranks what they do on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "integrations" / "distributed.md"

pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="an installed package comes without its documentation"),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
    ),
]


@pytest.mark.slow  # `make test-integrations`; in one process they run with the other pages
@pytest.mark.parametrize("name", ["ddp.py", "fsdp.py"])
def test_a_distributed_recipe_says_the_same_on_one_rank_and_on_two(name: str, tmp_path: Path) -> None:
    (program,) = [block.text for block in blocks(PAGE.read_text(encoding="utf-8")) if block.title == name]
    (tmp_path / name).write_text(program)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", name]
    said = []
    for words in ([name], torchrun):
        run = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr[-2000:]
        said += [line for line in run.stdout.splitlines() if line.startswith("AUC")]
    assert len(said) == 2 and said[0] == said[1], said
