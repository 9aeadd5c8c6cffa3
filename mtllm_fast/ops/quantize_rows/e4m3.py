"""The number format of ``quantize_rows``, as all its parts use it."""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST = 2.0**-100  # what a row's largest value is taken for if it is less: 448 / SMALLEST is finite in float32
