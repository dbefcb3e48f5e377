"""Dead features begun anew, as detectors of tokens that the CLT reconstructs badly.

AuxK alone leaves features dead whose score never reaches that of the weakest chosen one: what they learn together, each
has too small a part of. Here each feature is given one token's error alone (after Bricken et al. 2023, "Towards
Monosemanticity", "Neuron resampling").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_clt.training.clt import SMALLEST_NORM, TrainingCLT, discriminants

UNTIL = 2 / 3
"""Share of a run after which features are left as they are: new ones need time to find their place."""

SIZE = 0.7
"""Length of what a feature writes at most at first, as a share of its token's error; less where many begin at once."""

FIRING = 1 / 32
"""Share of tokens at which a new feature's hidden_pre is above its threshold, at least."""

TOKENS_PER_FEATURE = 4
"""Features of a layer that begin anew at one time are as many as a fourth of the batch's tokens at most."""


@torch.no_grad()
def resample(
    clt: TrainingCLT,
    moments: Mapping[Tensor, dict[str, Any]],
    dead: Bool[Tensor, " d_sae"],
    inputs: Float[Tensor, "batch n_layers d_model"],
    errors: Float[Tensor, "batch n_layers d_model"],
    seed: int,
) -> Bool[Tensor, " d_sae"]:
    """Begin dead features anew, each from a token n drawn with the probability that its squared error has:

        W_enc,i  proportional to C^-1 (x_n - mean x), as in `init_from_tokens`
        b_enc,i  such that hidden_pre is above theta_i (0 but for jumprelu) for the 1 in 32 tokens that are most like n,
                 or for those at least half as far from the mean as n, whichever are more
        W_dec,i  along n's error, such that where the feature fires most SIZE / sqrt(max(1, A_t)) of its length is
                 written to layer t

    Errors are those of all layers that the features write to. A_t is how many new features, of any layer, are active at
    a token and write to layer t: FIRING of their number. What they write together is then no longer than the error
    there, however many begin at once; several hundred in each of many layers would write a multiple of it, and take the
    places of features that have learned. Adam's means of these weights become 0, and its mean squares those of the
    layer's other features.

    Args:
        clt: changed in place; on a grid, one rank's share of it.
        moments: the optimiser's state of each weight, changed in place.
        dead: of all features, on whatever rank.
        inputs: scaled inputs of a batch, on a grid the same for every rank.
        errors: scaled outputs less their reconstruction.
        seed: of the tokens that are drawn.

    Returns:
        those that began anew, of all features.
    """
    n_features, own, begun = clt.cfg.d_transcoder, clt.grid.own(clt.cfg.d_transcoder), torch.zeros_like(dead)
    generator = torch.Generator().manual_seed(seed)
    active, writes = torch.zeros(len(clt.targets)), [ts if clt.cfg.far_rank is None else ts[:1] for ts in clt.targets]
    squares = errors.double().square().sum(dim=-1).cpu()
    for layer, written in enumerate(writes):
        of_layer = slice(layer * n_features, (layer + 1) * n_features)
        numbers = dead[of_layer].nonzero().flatten()[: len(inputs) // TOKENS_PER_FEATURE]
        if int((squares[:, list(written)].sum(dim=1) > 0).sum()) >= len(numbers):
            begun[of_layer][numbers] = True
            active[list(written)] += FIRING * len(numbers)
    size = (SIZE / active.clamp(min=1.0).sqrt()).to(inputs.device)
    for layer, written in enumerate(writes):
        numbers = begun[layer * n_features : (layer + 1) * n_features].nonzero().flatten()
        if len(numbers) == 0:
            continue
        error = torch.cat([size[target] * errors[:, target] for target in written], dim=1)
        chances = squares[:, list(written)].sum(dim=1)
        drawn = torch.multinomial(chances, len(numbers), generator=generator).to(inputs.device)
        here = (numbers >= own.start) & (numbers < own.stop)
        rows, drawn = numbers[here] - own.start, drawn[here]
        if len(rows) == 0:
            continue
        x = inputs[:, layer].double()
        W_enc = discriminants(x, drawn)
        h = x @ W_enc.T
        peak, middle = h[drawn, torch.arange(len(rows), device=h.device)], h.mean(dim=0)
        lowest = torch.minimum(h.quantile(1 - FIRING, dim=0), (peak + middle) / 2)
        # A threshold of scores is none of hidden_pre: chosen by rank, features need only be above 0 in training.
        theta = torch.zeros_like(lowest) if clt.log_threshold is None else clt.log_threshold[layer][rows].double().exp()
        # Not at n, whose own hidden_pre may be small: the feature would write many times its error elsewhere.
        highest = (h.max(dim=0).values - lowest + theta).clamp(min=SMALLEST_NORM)
        W_dec = clt.W_dec[layer]
        clt.W_enc[layer][rows] = W_enc.to(clt.dtype)
        clt.b_enc[layer][rows] = (theta - lowest).to(clt.dtype)
        columns = slice(0, error.shape[1])
        W_dec[rows, columns] = (error[drawn].double() / highest[:, None]).to(clt.dtype)
        weights = [clt.W_enc[layer], clt.b_enc[layer], W_dec]
        if clt.log_threshold is not None:
            weights.append(clt.log_threshold[layer])
        for weight in weights:
            _forget(moments.get(weight, {}), rows)
    return begun


def _forget(moments: dict[str, Any], rows: Tensor) -> None:
    """Adam's moments of some features: a mean of 0, and the mean square of the others'."""
    if moments:
        moments["exp_avg"][rows] = 0.0
        others = torch.ones(len(moments["exp_avg"]), dtype=torch.bool, device=rows.device)
        others[rows] = False
        if others.any():
            moments["exp_avg_sq"][rows] = moments["exp_avg_sq"][others].mean(dim=0)
