"""`bilevel info`: what a report of a problem has to say of the machine and of what is installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from typing import Any

import torch

from bilevel import __version__

# what the extras need, by the names that pip knows
_PACKAGES = (
    *("numpy", "scipy", "scikit-learn", "matplotlib", "rich", "cvxpy", "pandas", "pillow", "safetensors"),
    *("tensorboard", "mlflow-skinny", "mlflow", "wandb", "gymnasium", "curvlinops-for-pytorch", "transformers", "peft"),
    "accelerate",
)
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "BILEVEL_CACHE_DIR")


def info(*, as_json: bool) -> None:
    """Print versions, threads, BLAS and devices."""
    found = collected()
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for kind, entries in found.items():
        print(kind)
        width = max((len(name) for name in entries), default=0)
        for name, value in entries.items():
            print(f"  {name:<{width}}  {value}")


def collected() -> dict[str, dict[str, Any]]:
    """The same as data, by kind."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": {
            "bilevel": __version__,
            "torch": torch.__version__,
            "python": f"{platform.python_version()} ({sys.implementation.name})",
            "platform": platform.platform(),
        },
        "optional packages": packages,
        "threads": {
            "of torch": torch.get_num_threads(),
            "between operations": torch.get_num_interop_threads(),
            "processors": os.cpu_count(),
            **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
        },
        "BLAS": _blas(),
        "devices": _devices(),
    }


def _blas() -> dict[str, str]:
    """What torch says of the libraries that it was built with."""
    text = torch.__config__.show()
    found = re.search(r"BLAS_INFO=(\w+)", text)
    lapack = re.search(r"LAPACK_INFO=(\w+)", text)
    capability = re.search(r"CPU capability usage: (\S+)", text)
    named = {"BLAS": found, "LAPACK": lapack, "instructions": capability}
    return {name: match[1] for name, match in named.items() if match is not None}


def _devices() -> dict[str, str]:
    found = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found
