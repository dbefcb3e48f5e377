"""Processes that work together over gloo, started once for all tests."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = ["tests.training.distributed.cases"]
"""Imported once, in the process that the others are forked from."""

TIMEOUT = 300
"""Seconds after which a rank that does not answer fails its test."""


class Processes:
    """`run(n, work, ...)` calls `work(...)` on n ranks and gives back what each of them returned."""

    def __init__(self, n: int, folder: Path) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder, self._n_runs = folder, 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(n):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, n: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        self._n_runs += 1
        meeting_point = self._folder / f"run-{self._n_runs}"
        for pipe in self._pipes[:n]:
            pipe.send((n, str(meeting_point), work, args))
        answers = []
        for rank, pipe in enumerate(self._pipes[:n]):
            assert pipe.poll(TIMEOUT), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        # All are heard first: what one has left unheard, the next run would take for its own.
        for rank, (ok, value) in enumerate(answers):
            assert ok, f"rank {rank}:\n{value}"
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        n, meeting_point, work, args = pipe.recv()
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=n)
        # A rank that is done at once would otherwise be gone before the others have connected to it.
        dist.barrier()
        try:
            torch.manual_seed(0)
            pipe.send((True, work(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        finally:
            dist.destroy_process_group()
