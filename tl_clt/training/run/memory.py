"""What a run will need, told before it starts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tl_clt.errors import NotEnoughMemory
from tl_clt.machine import GIB, free_memory
from tl_clt.training.clt import CHUNK_ELEMENTS, TrainingCLT
from tl_clt.training.config import DataSettings


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

    start: int
    """The float64 copies that the first weights are made with (`init_from_tokens`), as far as they are more than the
    gradients, moments and activations, which come later."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in self._asdict().items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


def estimate_memory(clt: TrainingCLT, data: DataSettings) -> MemoryEstimate:
    """About what a run needs.

    Args:
        clt: of the run's shape and grid; on the "meta" device it takes no memory.
        data: of the run.
    """
    n_weights = sum(p.numel() for p in clt.parameters())
    weight, number = clt.dtype.itemsize, clt.sum_dtype.itemsize
    per_token = 2 * clt.cfg.n_layers * clt.cfg.d_in
    n_layers, batch = clt.cfg.n_layers, data.train_batch_size_tokens // clt.grid.n_data_parallel
    # Pre-activations and activations of every layer, the gradients of one layer at a time, and about four of the
    # batch: raw, scaled, reconstructed, and the gradient.
    step = batch * ((2 * n_layers + 4) * clt.n_own_features + 4 * per_token) * number
    positions = data.positions_per_prompt
    tokens_in_memory = data.n_batches_for_scale * data.train_batch_size_tokens
    if clt.grid.is_main:
        tokens_in_memory += int((3 - data.activations_mixing_fraction) * data.n_batches_in_buffer * positions)
    later = n_weights * weight + 2 * n_weights * number + step
    return MemoryEstimate(
        weights=n_weights * weight,
        gradients=n_weights * weight,
        moments=2 * n_weights * number,
        activations=step,
        buffer=tokens_in_memory * per_token * weight,
        start=max(0, _at_start(clt, data.n_batches_for_scale * data.train_batch_size_tokens) - later),
    )


def _at_start(clt: TrainingCLT, n_tokens: int) -> int:
    """About what `init_from_tokens` takes besides the weights, for one layer at a time, and its tokens."""
    n_layers, d_model, n_features = clt.cfg.n_layers, clt.cfg.d_in, clt.n_own_features
    widest = max(len(targets) for targets in clt.targets) * d_model
    # What features write, by target and side by side, and the decoders that they take the place of.
    decoders = 3 * n_features * widest * torch.float64.itemsize
    # What features read, noise and what is solved for; the tokens' inputs and their copy less the mean.
    encoders = (5 * n_features + 2 * n_tokens) * d_model * torch.float64.itemsize
    # The tokens scaled, batch by batch and together.
    tokens = 2 * n_tokens * 2 * n_layers * d_model * clt.dtype.itemsize
    biases = 2 * min(CHUNK_ELEMENTS, n_tokens * n_features) * clt.sum_dtype.itemsize
    return tokens + max(decoders + encoders, biases)


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
