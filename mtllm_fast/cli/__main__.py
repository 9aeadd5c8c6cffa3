"""``python -m mtllm_fast.cli``: the command line where the ``mtllm-fast`` script is not on the path."""

from mtllm_fast.cli.app import main

main()
