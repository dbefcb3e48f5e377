"""Two prompts of the same length, position by position: what makes the difference (Methods, "inactive features").

Through the first prompt's held patterns and scales, x - x' is what the differences of all that is written carry to
it: features active on either prompt write `(act - act') W_dec`, errors and embeddings their differences. What the
other prompt's own attention patterns and norm scales gave beyond that is a constant, and stands in the bias nodes.
The in-edges of a node then sum to the difference of its pre-activations, or logits, on the two prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.local import LocalReplacementModel
from tl_clt.attribution.streams import ActiveFeatures, Biases, Writes
from tl_clt.attribution.targets import Targets, read_values


class Contrast(NamedTuple):
    """The differences of two prompts."""

    writes: Writes
    targets: Targets
    other_activations: Float[Tensor, " n_active"]
    """Of each feature, on the other prompt."""


@torch.no_grad()
def contrast(
    local: LocalReplacementModel, other: LocalReplacementModel, targets: Targets, bias_nodes: bool
) -> Contrast:
    """What a prompt's nodes write beyond another prompt's of the same length."""
    ours, theirs, d_transcoder = local.features, other.features, local.clt.cfg.d_transcoder
    keys = torch.cat([_keys(ours, len(local.tokens), d_transcoder), _keys(theirs, len(local.tokens), d_transcoder)])
    either, place = torch.unique(keys, return_inverse=True)
    here = local.sites.embed.new_zeros(len(either))
    there = here.clone()
    here[place[: len(ours.layer)]] = ours.activation
    there[place[len(ours.layer) :]] = theirs.activation
    at = either // d_transcoder
    n_pos = len(local.tokens)
    features = ActiveFeatures(at // n_pos, at % n_pos, either % d_transcoder, here)
    pos_embed = local.sites.pos_embed if bias_nodes else None
    writes = Writes(
        features=features,
        strengths=here - there,
        errors=local.errors - other.errors,
        embed=local.sites.embed - other.sites.embed,
        pos_embed=None if pos_embed is None else torch.zeros_like(pos_embed),
        biases=_beyond(local, other) if bias_nodes else None,
    )
    readouts = targets.readouts._replace(constants=torch.zeros_like(targets.readouts.constants))
    heights = read_values(local, readouts) - read_values(other, readouts)
    return Contrast(writes, targets._replace(readouts=readouts, heights=heights), there)


def _beyond(local: LocalReplacementModel, other: LocalReplacementModel) -> Biases:
    """Less of what the other prompt has is more of this one's difference."""
    attn, mlp, reads = local.follow(other)
    return Biases(-attn, -mlp, [-read for read in reads])


def _keys(features: ActiveFeatures, n_pos: int, d_transcoder: int) -> Int[Tensor, " n_active"]:
    """A number that orders features by (layer, pos, feature)."""
    return (features.layer * n_pos + features.pos) * d_transcoder + features.feature
