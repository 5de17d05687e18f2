"""Settings of the whole suite: float64, one thread, reproducible."""

import torch
from hypothesis import settings

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
settings.register_profile("bilevel", deadline=None, max_examples=30, derandomize=True, print_blob=True)
settings.load_profile("bilevel")
