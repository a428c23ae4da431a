"""The work of workers.py by Dask: processes of this machine, or of all machines that a scheduler knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from tqdm import tqdm

from models.family import InputError

T = TypeVar("T")


def work(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int, scheduler: str, stage: str) -> list[T]:
    """function(*job) of every job, in the order of jobs. The jobs of a worker that dies are done by another one.

    scheduler: `dask` for `workers` processes here; else the address of a scheduler whose workers have this version of
    the code and see the project under the path that it has here.
    """
    from distributed import Client, KilledWorker, LocalCluster, as_completed  # takes a second, and few runs need it

    with ExitStack() as stack:
        place: Any = scheduler
        if scheduler == "dask":
            # Dask's own limit of memory kills workers where the machine still has some.
            limits: Any = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
            place = stack.enter_context(LocalCluster(workers, host="127.0.0.1", **limits))
        try:
            client = stack.enter_context(Client(place))
        except (OSError, ValueError) as error:
            raise InputError(f"{stage}: no Dask scheduler at {scheduler}: {error}") from None
        try:
            futures = [client.submit(function, *job, pure=False) for job in jobs]
            for future in tqdm(as_completed(futures), total=len(jobs), desc=stage, unit="shard"):
                future.result()
            return [future.result() for future in futures]
        except KilledWorker:
            raise InputError(
                f"{stage}: the same part ended several workers, by lack of memory or by a file that crashes the "
                "decoder; run again with fewer workers, finished parts are kept"
            ) from None
