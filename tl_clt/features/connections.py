"""Which features a feature is most connected with, by weights alone: virtual weights, as of one token onto itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.transcoder import CrossLayerTranscoder

WEIGHTS_AT_ONCE = 2**24
"""Virtual weights held at a time: 64 MiB in float32."""


class Connections(NamedTuple):
    """For each feature of a CLT the strongest virtual weights onto features of later layers, and from earlier ones."""

    partner: Int[Tensor, "n_layers d_transcoder k"]
    """The other feature, as layer * d_transcoder + number; -1 where there is none."""

    weight: Float[Tensor, "n_layers d_transcoder k"]
    """The virtual weight, the largest magnitude first."""


@torch.no_grad()
def strongest_connections(
    clt: CrossLayerTranscoder, k: int, among: Bool[Tensor, "n_layers d_transcoder"] | None = None
) -> Connections:
    """The k strongest connections of every feature, in both directions (a partner's layer tells which).

        V[(s, i) -> (t, j)] = sum_{s <= l < t} W_dec[s -> l, i] . W_enc[t, j]

    This is the residual-direct path at one position: what feature i writes in front of layer t, read by j's encoder.
    Norms (their gain included, where a CLT reads behind one) and attention are left out, so weights are a guide to
    which features hang together, and not the edges of a graph (Methods, "Global weights").

    Args:
        k: partners of each feature.
        among: the features to look at, both as sources and as targets; all where left out.
    """
    cfg, device = clt.cfg, clt.W_enc.device
    n, d = cfg.n_layers, cfg.d_transcoder
    among = torch.ones(n, d, dtype=torch.bool) if among is None else among.cpu()
    best = Connections(torch.full((n, d, k), -1, dtype=torch.long, device=device), torch.zeros(n, d, k, device=device))
    alive = [torch.nonzero(layer).flatten().to(device) for layer in among]
    at_once = max(1, WEIGHTS_AT_ONCE // max(1, *(len(features) for features in alive)))
    for s in range(n):
        for sources in alive[s].split(at_once):
            written = clt.decoder_rows(s, sources).float()
            for t in range(s + 1, n):
                if not len(alive[t]) or not len(sources):
                    continue
                slots = min(t - s, written.shape[1])
                read = clt.W_enc[t][:, alive[t]].float()
                weights = written[:, :slots].sum(dim=1) @ read
                _keep(best, s, sources, weights, t * d + alive[t])
                _keep(best, t, alive[t], weights.T, s * d + sources)
    return best


def _keep(
    best: Connections,
    layer: int,
    features: Int[Tensor, " n"],
    weights: Float[Tensor, "n m"],
    partners: Int[Tensor, " m"],
) -> None:
    """Take the strongest of new weights and of those kept for some features of a layer."""
    k = best.weight.shape[-1]
    top = weights.abs().topk(min(k, weights.shape[1]), dim=1).indices
    all_weights = torch.cat([best.weight[layer, features], weights.gather(1, top)], dim=1)
    all_partners = torch.cat([best.partner[layer, features], partners[top]], dim=1)
    order = all_weights.abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    best.weight[layer, features] = all_weights.gather(1, order)
    best.partner[layer, features] = all_partners.gather(1, order)
