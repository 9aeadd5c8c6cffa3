"""The command line ``mtllm-fast``: thin commands over the library."""
