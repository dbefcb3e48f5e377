"""What is written down about a run: how well the CLT reconstructs, and how sparse it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from tl_clt.training.chunks import DataCounts
from tl_clt.training.scaling import Batch
from tl_clt.training.step import Workspace
from tl_clt.training.training_clt import TrainingCLT
from tl_clt.transcoder import explained_variance


class Metrics(NamedTuple):
    """Measured on batches that training has not seen (repeats of the dataset aside), on scaled activations."""

    explained_variance: float
    """Mean over layers of 1 - squared error / variance about the mean, as in `EvaluationReport`."""

    explained_variance_per_layer: list[float]
    """That of each layer."""

    l0_sum_over_layers: float
    """Features that fire at a token, of all layers together."""

    l0_mean_per_layer: float
    """l0_sum_over_layers / n_layers."""

    l0_per_layer: list[float]
    """Features that fire at a token, of each layer."""

    dead_share: float
    """Share of features whose density, over the last `dead_window_steps` training steps, is below
    `dead_feature_density`; such as fired at no token of them always count."""

    dead_window_steps: int
    """`dead_feature_window`, or the last quarter of a run shorter than four times that: at the start every feature
    fires, so a longer window would find none dead."""

    n_tokens: int
    """Tokens on which all but `dead_share` was measured."""


@torch.no_grad()
def measure(
    clt: TrainingCLT,
    batches: Iterable[Batch],
    dead: Bool[Tensor, " d_sae"],
    dead_window_steps: int,
    workspace: Workspace,
) -> Metrics:
    """The final metrics.

    Args:
        clt: the trained CLT.
        batches: scaled inputs and outputs; on a grid, of this rank's tokens.
        dead: for each feature of all layers, whether it is dead.
        dead_window_steps: the training steps by which that was told.
        workspace: that of the training.
    """
    outputs, errors, fired = [], [], []
    without_penalties = dict.fromkeys(clt.get_coefficients(), 0.0)
    clt.eval()
    for batch in batches:
        step = clt.step(TrainStepInput(batch, without_penalties, None, 0, False), workspace)
        y = clt.grid.all_tokens(batch[:, 1]).double()
        outputs.append(y)
        errors.append((clt.grid.all_tokens(step.recons) - y).square().sum(dim=(0, 2)))
        fired.append(clt.count_firing(step).unflatten(0, (clt.cfg.n_layers, -1)).sum(dim=1).double())
    y = torch.cat(outputs)
    variance = (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    out_squared = y.square().sum(dim=(0, 2))
    error, l0 = torch.stack(errors).sum(dim=0), torch.stack(fired).sum(dim=0) / len(y)
    explained = explained_variance(error, variance, out_squared)
    return Metrics(
        explained_variance=explained.mean,
        explained_variance_per_layer=explained.per_layer,
        l0_sum_over_layers=float(l0.sum()),
        l0_mean_per_layer=float(l0.mean()),
        l0_per_layer=l0.tolist(),
        dead_share=float(dead.double().mean()),
        dead_window_steps=dead_window_steps,
        n_tokens=len(y),
    )


class TrainingRecord(NamedTuple):
    """What `training.json` holds."""

    config: dict[str, Any]
    """The run's config."""

    tokens_seen: int
    """Tokens trained on."""

    data: DataCounts
    """What was read, and what of it was left out; more than `tokens_seen`, for the shuffling buffer and the metrics."""

    seconds: float
    """Wall time of the run, loading and measuring included; of a resumed one, with what it took before."""

    sae_lens_version: str
    """Version of SAELens that trained it."""

    coefficients: dict[str, float]
    """Weights of the loss terms at the last step; "sparsity" is the lambda that `target_l0` came to."""

    metrics: Metrics
    """After training."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self._asdict() | {"metrics": self.metrics._asdict(), "data": asdict(self.data)}
