"""Every exception class of the package; all are ``ValueError`` or ``RuntimeError``, which callers may catch instead."""


class UnsupportedBackendError(ValueError):
    """A named backend cannot serve this call; the message says which op, why, and what would work."""


class CudaKernelError(RuntimeError):
    """A CUDA kernel launch returned an error status (``op: cudaGetErrorString``)."""


class CpuKernelError(RuntimeError):
    """The CPU extension is missing, or lacks the instruction set that was asked for."""


class UnknownLanguageError(ValueError):
    """A language code that NLLB does not know; the message names the nearest codes."""


class TokenizerNotFoundError(ValueError):
    """No tokenizer lies beside the checkpoint and the configured id cannot be loaded."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded faithfully: missing, extra or mis-shaped keys, or a corrupt file."""


class NotBidirectionalError(RuntimeError):
    """The load-time probe found that the LLM ignores later tokens, or reacts to padding."""


class WrongResultError(RuntimeError):
    """A benchmarked path computed something else than the reference, so its speed is not reported."""


class BatchTooLargeError(RuntimeError):
    """A training step ran out of memory; the message says how large its batch was and what to lower."""
