"""Encoding, latency and training: ours beside the ways in which it is done today, same texts, same run."""

from mtllm_fast.bench.options import BenchOptions
from mtllm_fast.bench.runner import run

__all__ = ["BenchOptions", "run"]
