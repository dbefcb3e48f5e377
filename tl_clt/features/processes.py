"""The processes that share the reading of a text, or the labelling of features: those that torchrun started, or that
torch.distributed was set up with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work."""

    rank: int = 0
    n: int = 1
    grid: Any = None

    def everywhere(self, work: Any) -> Any:
        """What `work` gives on each; an error of ours on any is raised on all. Nobody goes on before all are done."""
        return [work()] if self.grid is None else self.grid.everywhere(work)

    def on_main(self, work: Any) -> Any:
        """What `work` gives on the first process, where alone it is called."""
        return work() if self.grid is None else self.grid.on_main(work)

    def share_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every n-th of some items, from this process's own."""
        return items[self.rank :: self.n]


@contextmanager
def sharing(device: torch.device | str) -> Iterator[Processes]:
    """All processes, connected; one that is alone works alone. Where they are connected already, they stay so."""
    connected = torch.distributed.is_available() and torch.distributed.is_initialized()
    n = torch.distributed.get_world_size() if connected else int(os.environ.get("WORLD_SIZE", "1"))
    if n == 1:
        yield Processes()
        return
    # Only here, since it loads sae_lens.
    from tl_clt.training.parallel import process_grid

    with process_grid(n, str(device)) as grid:
        yield Processes(grid.index, grid.n_processes, grid)
