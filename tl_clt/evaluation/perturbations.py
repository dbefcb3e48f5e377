"""Vectors to move the residual stream by, drawn for one prompt."""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.lens import HookedModel, block_hook, run_with_cache, user_hooks_aside
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

Kind = Literal["feature", "encoder", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ROUNDING = 1000
"""A vector must be so many rounding errors of the stream long for changes that follow it to be told from rounding."""


class CleanActivations(NamedTuple):
    """What the model does by itself with one prompt."""

    feature_acts: Float[Tensor, "pos n_layers d_transcoder"]
    stream: Float[Tensor, "n_layers pos d_model"]
    """The residual stream after each block."""


class Perturbation(NamedTuple):
    """A vector to add to the residual stream at one position."""

    kind: Kind
    position: int
    source_layer: int
    """Layer of the feature whose direction it is; -1 where there is none."""
    feature: int
    vector: Float[Tensor, " d_model"]


@torch.no_grad()
def clean_activations(model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens) -> CleanActivations:
    """Run one prompt without users' hooks."""
    reads = [block_hook(t, clt.cfg.input_hook) for t in clt.layers]
    posts = [block_hook(t, "hook_resid_post") for t in clt.layers]
    with user_hooks_aside(model):
        _, cache = run_with_cache(model, tokens[None], lambda name: name in {*reads, *posts})
    inputs = torch.stack([cache[name][0] for name in reads], dim=-2).to(clt.W_enc.dtype)
    return CleanActivations(clt.encode(inputs), torch.stack([cache[name][0] for name in posts]))


def draw_perturbations(
    clt: CrossLayerTranscoder, clean: CleanActivations, layer: int, kind: Kind, n: int, size: float, seed: str
) -> list[Perturbation]:
    """Draw perturbations of one kind after one block, at positions after 0.

    Features are drawn from those that are active, without repeats, so there may be fewer than n; those that write
    nothing to that layer, or no more than rounding, are passed over. Random ones do not depend on the CLT.

    Args:
        clt, clean: a CLT and one prompt.
        layer: after whose block, not the last.
        kind: "feature": `feature_acts[s] W_dec[s -> layer]`, all that a feature of a layer s <= layer writes there;
            "encoder": along `W_enc[layer + 1]` of a feature; "random": uniform on the sphere.
        n: how many.
        size: norm of encoder and random directions, as a share of the stream's norm at their place.
        seed: text from which all that is drawn follows.
    """
    # crc32: torch's generator on the CPU takes 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer} {kind}".encode()))
    stream = clean.stream[layer]
    # Position 0 means nothing, and a CLT need not have been trained on it.
    if kind == "random":
        positions = torch.randint(1, len(stream), (n,), generator=generator).tolist()
        directions = torch.randn(n, stream.shape[-1], generator=generator, dtype=torch.float64).to(stream)
        pairs = zip(positions, directions, strict=True)
        return [Perturbation(kind, p, -1, -1, _of_size(v, stream[p], size)) for p, v in pairs]
    sources = [layer + 1] if kind == "encoder" else list(clt.cfg.sources(layer))
    active = torch.nonzero(clean.feature_acts[1:, sources]).cpu()
    drawn: list[Perturbation] = []
    for before, place, feature in active[torch.randperm(len(active), generator=generator)].tolist():
        if len(drawn) == n:
            break
        position, source = before + 1, sources[place]
        if kind == "encoder":
            vector = _of_size(clt.W_enc[source, :, feature].to(stream), stream[position], size)
        else:
            rows = clt.decoder_rows(source, torch.tensor([feature], device=stream.device))
            vector = (clean.feature_acts[position, source, feature] * rows[0, layer - source]).to(stream)
        if float(vector.norm()) > ROUNDING * float(stream[position].norm()) * torch.finfo(stream.dtype).eps:
            drawn.append(Perturbation(kind, position, source, feature, vector))
    return drawn


def _of_size(
    direction: Float[Tensor, " d_model"], stream: Float[Tensor, " d_model"], size: float
) -> Float[Tensor, " d_model"]:
    return size * stream.norm() * direction / direction.norm()
