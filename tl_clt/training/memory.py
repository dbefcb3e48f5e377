"""What a run will need, told before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from tl_clt.errors import NotEnoughMemory
from tl_clt.training.config import CLTTrainingRunnerConfig
from tl_clt.training.training_clt import TrainingCLT

GIB = 2**30
GROUP_LIMIT = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


class MemoryEstimate(NamedTuple):
    """Bytes on this process's training device. The model itself is loaded already and not counted."""

    weights: int
    """The CLT."""

    gradients: int
    """As large as the weights."""

    moments: int
    """Adam's two, in float32 at least."""

    activations: int
    """Of a training step."""

    buffer: int
    """The shuffling buffer, which is copied to shuffle, and what fills it, on the main process; and the batches that
    scales are set on."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in self._asdict().items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


def estimate_memory(clt: TrainingCLT, cfg: CLTTrainingRunnerConfig) -> MemoryEstimate:
    """About what a run needs.

    Args:
        clt: of the run's shape and grid; on the "meta" device it takes no memory.
        cfg: the run.
    """
    n_weights = sum(p.numel() for p in clt.parameters())
    weight, number = clt.dtype.itemsize, clt.sum_dtype.itemsize
    per_token = 2 * clt.cfg.n_layers * clt.cfg.d_in
    n_layers, batch = clt.cfg.n_layers, cfg.train_batch_size_tokens // clt.grid.n_data_parallel
    # Pre-activations and activations of every layer, the gradients of one layer at a time, and about four of the
    # batch: raw, scaled, reconstructed, and the gradient.
    step = batch * ((2 * n_layers + 4) * clt.n_own_features + 4 * per_token) * number
    positions = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    held = cfg.n_batches_for_scale * cfg.train_batch_size_tokens
    if clt.grid.is_main:
        held += int((3 - cfg.activations_mixing_fraction) * cfg.n_batches_in_buffer * positions)
    return MemoryEstimate(
        weights=n_weights * weight,
        gradients=n_weights * weight,
        moments=2 * n_weights * number,
        activations=step,
        buffer=held * per_token * weight,
    )


def require_memory(estimate: MemoryEstimate, device: torch.device) -> None:
    """Raise where an estimate is more than the device has free. Where that is unknown, nothing is refused.

    Raises:
        NotEnoughMemory: with the parts and what to lower.
    """
    free = free_memory(device)
    if free is not None and estimate.total > free:
        raise NotEnoughMemory(
            f"Training needs about {estimate} on {device}, but {free / GIB:.2f} GiB are free."
            " Lower d_transcoder, span, train_batch_size_tokens or n_batches_in_buffer, or set dtype='bfloat16'."
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where the system does not say."""
    if device.type == "cuda":
        unused_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused_by_torch
    if device.type != "cpu":
        return None
    known = [value for value in (_free_of_system(), _free_of_group()) if value is not None]
    return min(known, default=None)


def _free_of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_group() -> int | None:
    """What a container's limit leaves."""
    try:
        limit, used = (path.read_text().strip() for path in GROUP_LIMIT)
    except OSError:
        return None
    return int(limit) - int(used) if limit.isdigit() else None
