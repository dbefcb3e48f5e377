"""A run over several processes: each layer's features split among ranks, times copies that share the batch's tokens.

The ranks form a grid [n_data_parallel, n_feature_shards] (a `DeviceMesh` of torch.distributed). The ranks of a row
see the same tokens, and each holds an equal, contiguous share of every layer's features; what they write is added up
in one all-reduce of [batch, n_layers, d_model] a step. The ranks of a column hold the same features and see different
tokens; their gradients are averaged. So a step's result is that of a single process that holds all features and sees
all tokens, up to the order of addition.

Every rank computes the whole reconstruction and the same loss of its row's tokens. The gradient of a sum over a row
with respect to one rank's part of it is therefore the gradient of the sum, and needs no communication. What is left to
do about gradients, their mean over tokens and their norm over features, `run.trainer` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tl_clt.arguments import require_device
from tl_clt.errors import ConfigError, TlCltError

Value = TypeVar("Value")

SHARED_WEIGHTS = ("W_far", "W_skip", "b_dec", "score_threshold")
"""Weights that belong to no feature: every rank has the whole of them. Of all others, dimension 0 is features."""


def is_shared(name: str) -> bool:
    """Whether every rank has the whole of a weight ("b_dec", "W_far.0")."""
    return name.split(".")[0] in SHARED_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class ProcessGrid:
    """This process's place among those of a run, and its collectives. On a single process they do nothing."""

    n_feature_shards: int = 1
    """Ranks that a layer's features are split among."""

    feature_index: int = 0
    """Which of them this rank is."""

    n_data_parallel: int = 1
    """Parts that a batch's tokens are split into."""

    data_index: int = 0
    """Which of them this rank sees."""

    feature_group: Any = None
    """The ranks that see the same tokens, in the order of their features."""

    data_group: Any = None
    """The ranks that hold the same features, in the order of their tokens."""

    @property
    def n_processes(self) -> int:
        """All ranks of the run."""
        return self.n_feature_shards * self.n_data_parallel

    @property
    def index(self) -> int:
        """This rank among all, row by row."""
        return self.data_index * self.n_feature_shards + self.feature_index

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.index == 0

    def n_own(self, d_transcoder: int) -> int:
        """Features per layer that this rank holds.

        Raises:
            ConfigError: the shares would not be equal.
        """
        if d_transcoder % self.n_feature_shards:
            raise ConfigError(
                f"d_transcoder is {d_transcoder}, which {self.n_feature_shards} processes cannot share equally:"
                f" give a multiple of {self.n_feature_shards}, or raise n_data_parallel (now {self.n_data_parallel})."
            )
        return d_transcoder // self.n_feature_shards

    def own(self, d_transcoder: int) -> slice:
        """Which of a layer's features this rank holds."""
        n = self.n_own(d_transcoder)
        return slice(self.feature_index * n, (self.feature_index + 1) * n)

    # -- over the ranks that see the same tokens

    def add_over_features(self, value: Tensor) -> Tensor:
        """A sum over features, from each rank's part of it; changed in place, without gradients."""
        if self.n_feature_shards > 1:
            dist.all_reduce(value, group=self.feature_group)
        return value

    def sum_over_features(self, value: Tensor) -> Tensor:
        """The same with gradients, and not in place."""
        return value if self.n_feature_shards == 1 else _SumOverFeatures.apply(value, self)

    def each_feature_share(self, value: Tensor) -> list[Tensor]:
        """Every rank's value, in the order of their features. All must have the same shape."""
        return _all_gather(value, self.n_feature_shards, self.feature_group)

    def all_features(self, own: Tensor, dim: int) -> Tensor:
        """The values of all features of a layer, from each rank's own, side by side along `dim`."""
        return torch.cat(self.each_feature_share(own), dim=dim)

    # -- over the ranks that hold the same features

    def add_over_data(self, value: Tensor) -> Tensor:
        """A sum over tokens, from each rank's part of it; changed in place, without gradients."""
        if self.n_data_parallel > 1:
            dist.all_reduce(value, group=self.data_group)
        return value

    def mean_over_data(self, values: Sequence[Tensor]) -> None:
        """Each value's mean over the ranks, in place: what is a mean over tokens, from the ranks' own means."""
        if self.n_data_parallel == 1:
            return
        pending = [dist.all_reduce(value, group=self.data_group, async_op=True) for value in values]
        for value, work in zip(values, pending, strict=True):
            assert work is not None
            work.wait()
            value.div_(self.n_data_parallel)

    def all_tokens(self, own: Tensor) -> Tensor:
        """A tensor with tokens first, of the whole batch."""
        return torch.cat(_all_gather(own, self.n_data_parallel, self.data_group))

    # -- over all ranks

    def all_of_any_length(self, own: Tensor) -> Tensor:
        """Every rank's values, of which each may have another number, one after another."""
        if self.n_processes == 1:
            return own
        lengths = _all_gather(torch.tensor([len(own)], device=own.device), self.n_processes, None)
        padded = own.new_empty(int(torch.cat(lengths).max()))
        padded[: len(own)] = own
        everyones = _all_gather(padded, self.n_processes, None)
        return torch.cat([values[: int(n)] for values, n in zip(everyones, lengths, strict=True)])

    def everywhere(self, work: Callable[[], Value]) -> list[Value]:
        """What `work` gives on each rank, plain values only. One of our errors on any rank is raised on all."""
        if self.n_processes == 1:
            return [work()]
        try:
            outcome: Value | TlCltError = work()
        except TlCltError as error:
            outcome = error
        outcomes: list[Any] = [None] * self.n_processes
        dist.all_gather_object(outcomes, outcome)
        for one in outcomes:
            if isinstance(one, TlCltError):
                raise one
        return outcomes

    def anywhere(self, holds: bool, device: torch.device) -> bool:
        """Whether something holds on any rank; known to all."""
        if self.n_processes == 1:
            return holds
        flag = torch.tensor(int(holds), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def on_main(self, work: Callable[[], Value]) -> Value:
        """What `work` gives on the main rank, on every rank. It is not called on others; errors are raised on all."""
        return self.everywhere(work if self.is_main else lambda: None)[0]  # type: ignore[return-value]


SINGLE = ProcessGrid()
"""One process that holds all features and sees all tokens."""


class _SumOverFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: ProcessGrid) -> Tensor:
        return grid.add_over_features(value.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _all_gather(value: Tensor, n: int, group: Any) -> list[Tensor]:
    if n == 1:
        return [value]
    value = value.contiguous()
    gathered = [torch.empty_like(value) for _ in range(n)]
    dist.all_gather(gathered, value, group=group)
    return gathered


def own_device(device: str) -> str:
    """The device of this process: under torchrun, "cuda" is the GPU of its local rank.

    Raises:
        ConfigError: one GPU is named for several processes, or the device is not here.
    """
    if not under_torchrun() or not device.startswith("cuda"):
        require_device("device", device)
        return device
    own = f"cuda:{os.environ['LOCAL_RANK']}"
    if device not in ("cuda", own):
        raise ConfigError(f"device is '{device}' for every process that torchrun started: give 'cuda', one GPU each.")
    require_device("device", own)
    return own


def under_torchrun() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


@contextmanager
def process_grid(n_data_parallel: int, device: str) -> Iterator[ProcessGrid]:
    """The grid of the processes that torchrun started, or that torch.distributed was set up with by the caller.

    Args:
        n_data_parallel: parts that a batch's tokens are split into; the features are split among the ranks of each.
        device: NCCL connects GPUs, gloo anything else.

    Raises:
        ConfigError: the number of processes is no multiple of n_data_parallel.
    """
    starts_group = under_torchrun() and not _connected()
    if starts_group:
        kind = torch.device(device).type
        if kind == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield _grid(n_data_parallel, torch.device(device).type)
    finally:
        if starts_group:
            dist.destroy_process_group()


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def _grid(n_data_parallel: int, device_type: str) -> ProcessGrid:
    n = dist.get_world_size() if _connected() else 1
    if n % n_data_parallel:
        raise ConfigError(
            f"n_data_parallel is {n_data_parallel}, and the number of processes {n}: start a multiple of"
            f" {n_data_parallel} with torchrun --nproc-per-node, or give another n_data_parallel."
        )
    if n == 1:
        return SINGLE
    shape = (n_data_parallel, n // n_data_parallel)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "features"))
    return ProcessGrid(
        n_feature_shards=shape[1],
        feature_index=mesh.get_local_rank("features"),
        n_data_parallel=shape[0],
        data_index=mesh.get_local_rank("data"),
        feature_group=mesh.get_group("features"),
        data_group=mesh.get_group("data"),
    )


@contextmanager
def only_main_shows(grid: ProcessGrid) -> Iterator[None]:
    """Within the block, progress bars of ranks other than the main one go nowhere."""
    if grid.is_main:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield
