"""How ``norm_pool`` is cut into pieces of work, for every backend that launches kernels.

Each sentence is cut into chunks of ``chunk`` tokens, so that one long sentence fills a GPU too, and every piece of work
lies within one sentence. Nobody knows the lengths without asking the GPU, so pieces are numbered by *slots*: sentence b
owns the slots from ``cu_seqlens[b] // chunk + b`` on. These never overlap, since

    ceil(L_b / chunk) <= floor(cu_seqlens[b+1] / chunk) - floor(cu_seqlens[b] / chunk) + 1

and there are at most ``T // chunk + B + 1`` of them (the last ones cover the tail after the last sentence), whatever
the lengths. A program finds its sentence by counting how many sentences start at or before its slot; slots beyond the
chunks of their sentence are idle. A sentence's result depends on its own tokens and on T and B, but neither on its
neighbours nor on its place among them.
"""

from __future__ import annotations

_WANTED_PROGRAMS = 512  # about four per multiprocessor of a large GPU


def chunk_tokens(num_tokens: int, num_sentences: int) -> int:
    """Tokens per chunk: a power of two from 8 to 64, the larger the better as long as enough programs remain."""
    per_program = num_tokens // max(1, _WANTED_PROGRAMS - num_sentences)
    return max(8, min(64, 1 << (per_program.bit_length() - 1 if per_program else 0)))


def num_slots(num_tokens: int, num_sentences: int, chunk: int) -> int:
    return num_tokens // chunk + num_sentences + 1
