"""Throughput of encoding, ours beside the ways in which it is done today, on the same texts in the same run."""

from mtllm_fast.bench.runner import BenchOptions, run

__all__ = ["BenchOptions", "run"]
