"""The paper's claim in a world small enough to check: MT-LLM against translate-test and zero-shot transfer.

``python -m benchmarks.transfer --preset micro`` makes a world, its languages, an MT model and an LLM from nothing, runs
the project's own commands on them, and reports accuracy by language. See ``docs/transfer.md``.
"""
