"""Encoding throughput beside today's ways; without arguments on the embedded tiny stack, with or without a GPU.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --size small --workload documents --dtype bf16 --out result.json

The same as ``mtllm-fast bench``; ``--help`` lists the options, ``mtllm_fast/bench`` holds the implementation.
"""

from mtllm_fast.bench.command import main

if __name__ == "__main__":
    main()
