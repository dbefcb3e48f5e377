"""The start of the biases: every feature fires at the same, known rate, and the CLT writes the mean output."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.training.training_clt import TrainingCLT

FIRING_BUDGET = 10_000
"""Features that fire at one token at the start, over all layers, where the dictionary is large."""

CHUNK_ELEMENTS = 2**24
"""Pre-activations held at a time."""


def initial_firing_rate(n_features: int) -> float:
    """min(0.5, 10000 / features of all layers): the share of tokens at which a feature fires at first."""
    return min(0.5, FIRING_BUDGET / n_features)


@torch.no_grad()
def init_encoder_biases(clt: TrainingCLT, inputs: Float[Tensor, "batch n_layers d_model"]) -> None:
    """Set b_enc to theta minus a quantile of `x @ W_enc.T`, so that each feature fires at `initial_firing_rate`.

    Args:
        clt: changed in place.
        inputs: scaled inputs of some tokens, on a grid the same for every rank. The fewer there are, the coarser
            the rate.
    """
    n_tokens = len(inputs)
    n_firing = round(initial_firing_rate(clt.cfg.d_sae) * n_tokens)
    rank = min(max(n_tokens - n_firing, 1), n_tokens)
    width = max(1, CHUNK_ELEMENTS // n_tokens)
    for layer, threshold in enumerate(clt.thresholds()):
        x = inputs[:, layer]
        for start in range(0, clt.n_own_features, width):
            part = slice(start, start + width)
            quantile = (x @ clt.W_enc[layer][part].T).kthvalue(rank, dim=0).values
            clt.b_enc[layer][part] = threshold[part] - quantile


@torch.no_grad()
def init_decoder_biases(clt: TrainingCLT, outputs: Float[Tensor, "batch n_layers d_model"]) -> None:
    """Set b_dec to the mean of scaled outputs, which is the best that a CLT without features can write."""
    clt.b_dec.copy_(outputs.double().mean(dim=0))
