"""The study's jobs in processes of their own, and which backends of the library served them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from benchmarks.transfer.study import Study
from mtllm_fast.core.backends import Backends

logger = logging.getLogger("mtllm_fast")


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """How often each backend of each op was chosen within."""
    chosen: Counter[str] = Counter()
    choose = Backends.choose

    def counted(self: Backends, *args: Any, **kwargs: Any) -> str:
        name = choose(self, *args, **kwargs)
        chosen[f"{self.op}: {name}"] += 1
        return name

    Backends.choose = counted  # type: ignore[method-assign]
    try:
        yield chosen
    finally:
        Backends.choose = choose  # type: ignore[method-assign]


def end_with_parent() -> None:
    """Of a worker: end when the study is killed, or its job would go on writing into the folder of the next one."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker(threads: int) -> None:
    """Before a worker's first job."""
    end_with_parent()
    quiet(threads)


def quiet(threads: int) -> None:
    """Of a process that works: its share of the cores; small models are slower on two threads than on one."""
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def job(study: Study, method: str, *args: Any) -> Any:
    """What a method of the study returns; the study notes how long it took, and the backends that served it."""
    start = time.perf_counter()
    with counting() as chosen:
        result = getattr(study, method)(*args)
    seconds, name = time.perf_counter() - start, "-".join(map(str, (method, *args)))
    logger.info("%s: %.0f s", name, seconds)
    study.account(name, seconds, chosen)
    return result


def run(study: Study, workers: int) -> list[dict[str, Any]]:
    """Every phase, ``workers`` jobs at a time; the records of all."""
    records: list[dict[str, Any]] = []
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(threads,)) as pool:
        for jobs in study.phases():
            for future in [pool.submit(job, study, *one) for one in jobs]:
                records += future.result() or []
    return records
