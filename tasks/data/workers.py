"""Processes that work through media files: counted clip by clip, gone when the process that started them goes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from models.family import InputError

T = TypeVar("T")
_done: Any = None  # in a worker: the number of clips that all workers are through with


def work(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int, clips: int, stage: str) -> list[T]:
    """function(*job) of every job, in the order of jobs, by `workers` processes; the bar counts `advance` calls."""
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    alive, mine = os.pipe()
    pool = ProcessPoolExecutor(workers, context, _begin, (done, alive, mine))
    with tqdm(total=clips, desc=stage, unit="clip") as bar:
        try:
            futures = [pool.submit(function, *job) for job in jobs]
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(done.value - bar.n)
                for future in finished:
                    future.result()
            pool.shutdown()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise InputError(
                f"{stage}: a worker process was killed, by lack of memory or by a file that crashes the decoder; "
                "run again with fewer workers, finished parts are kept"
            ) from None
        finally:
            os.close(mine)  # ends workers that are still busy, when an error or Ctrl-C brought us here
            pool.shutdown(cancel_futures=True)
            os.close(alive)


def advance() -> None:
    """One more clip is through; outside a worker nobody counts."""
    if _done is not None:
        with _done.get_lock():
            _done.value += 1


def _begin(done: Any, alive: int, parents: int) -> None:
    """Set a worker up: it dies with Ctrl-C, and as soon as nobody holds the parent's end of the pipe."""
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.close(parents)

    def watch() -> None:
        os.read(alive, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
