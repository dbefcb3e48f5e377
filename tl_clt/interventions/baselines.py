"""CLTs of chance, to hold beside a given one: what they score says nothing about features."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_clt.errors import MemoryLimit
from tl_clt.lens import HookedModel, block_hook, run_with_cache, user_hooks_aside
from tl_clt.machine import GIB, free_memory
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.decoders import DenseDecoders

Baseline = Literal["random", "shuffled"]
BASELINES: tuple[Baseline, ...] = ("random", "shuffled")
Inputs = Float[Tensor, "n_inputs n_layers d_model"]
Draw = Callable[..., Tensor]
"""Normal random numbers of a shape, in the CLT's dtype and on its device."""


@torch.no_grad()
def baseline_clt(
    which: Baseline, model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens, seed: int
) -> CrossLayerTranscoder:
    """A CLT of chance, of the given one's shape, activation, hooks, b_dec and W_skip, which it shares.

    random: of no learned direction at all. W_enc's columns point anywhere, with norms as the given ones' times one
    factor a layer; b_enc takes each feature's mean over the prompt away, so that features fire where their input is
    unlike the rest of the prompt; one threshold a layer (or k) lets as many through on this prompt as fire in the given
    CLT there, and the factor makes their mean activation the same. Decoder vectors point anywhere, each with the norm
    of the given one. Position 0 is left out of all these counts.

    shuffled: the given encoder, thus the same activations, and decoder vectors that point where those of another
    feature of the same layer do (none keeps its own), each with the norm that it had: what activations and norms
    alone make of it.

    Each prompt has a draw of its own.

    Raises:
        MemoryLimit: the decoders, which either needs once more in memory, do not fit.
    """
    _require_room(clt)
    # Over several prompts, several CLTs are drawn: one may be lucky.
    key = f"{seed} {which} {tokens.tolist()}"
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    # Tensors are shared: the memo says that they are copied already.
    made = copy.deepcopy(clt, {id(tensor): tensor for tensor in (*clt.parameters(), *clt.buffers())})
    if which == "shuffled":
        made.W_dec = DenseDecoders(list(_shuffled_decoders(clt, generator)))
    else:
        dtype = torch.float64 if clt.W_enc.dtype == torch.float64 else torch.float32

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype).to(clt.W_enc)

        _randomise_encoder(made, clt, _inputs(model, clt, tokens), draw)
        norms = (clt.W_dec[source].norm(dim=-1, keepdim=True) for source in clt.layers)
        made.W_dec = DenseDecoders([_pointing(draw(*norm.shape[:2], clt.cfg.d_model)) * norm for norm in norms])
    return made.requires_grad_(False)


def _require_room(clt: CrossLayerTranscoder) -> None:
    writes = sum(len(clt.cfg.targets(source)) for source in clt.layers)
    needed = (writes + clt.cfg.n_layers) * clt.cfg.d_transcoder * clt.cfg.d_model * clt.W_enc.element_size()
    free = free_memory(clt.W_enc.device)
    if free is not None and needed > free:
        raise MemoryLimit(
            f"A baseline of this CLT takes {needed / GIB:.2f} GiB and {free / GIB:.2f} are free: give baselines=() and"
            " say that none was taken, or free some memory."
        )


def _shuffled_decoders(clt: CrossLayerTranscoder, generator: torch.Generator) -> Iterator[Tensor]:
    for source in clt.layers:
        W_dec = clt.W_dec[source].detach()
        order = torch.randperm(len(W_dec), generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        yield _pointing(W_dec[other.to(W_dec.device)]) * W_dec.norm(dim=-1, keepdim=True)


def _pointing(vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Unit vectors; where there is nothing, still nothing."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def _inputs(model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens) -> Inputs:
    """What features read on the prompt, without position 0 if there are others."""
    names = [block_hook(layer, clt.cfg.input_hook) for layer in clt.layers]
    with user_hooks_aside(model):
        _, cache = run_with_cache(model, tokens[None], lambda name: name in names)
    return torch.stack([cache[name][0, min(1, len(tokens) - 1) :] for name in names], dim=1).to(clt.W_enc)


def _randomise_encoder(made: CrossLayerTranscoder, clt: CrossLayerTranscoder, inputs: Inputs, draw: Draw) -> None:
    _, d_model, d_transcoder = clt.W_enc.shape
    made.W_enc = nn.Parameter(torch.empty_like(clt.W_enc))
    made.b_enc = nn.Parameter(torch.empty_like(clt.b_enc))
    made.threshold = None if clt.threshold is None else nn.Parameter(torch.zeros_like(clt.threshold))
    for layer in clt.layers:
        x = inputs[:, layer]
        given = clt.encode_layer(x, layer).feature_acts
        W_enc = _pointing(draw(d_transcoder, d_model)).T * clt.W_enc[layer].norm(dim=0)
        hidden_pre = x @ W_enc
        mean = hidden_pre.mean(dim=0) if len(x) > 1 else torch.zeros_like(hidden_pre[0])
        limit = _limit(hidden_pre - mean, int(given.count_nonzero())) if clt.cfg.activation != "topk" else 0.0
        made.b_enc[layer] = -mean - limit if clt.cfg.activation == "relu" else -mean
        if made.threshold is not None:
            made.threshold[layer] = limit
        made.W_enc[layer] = W_enc
        found = made.encode_layer(x, layer).feature_acts
        factor = _mean_active(given) / _mean_active(found) if bool(given.any()) and bool(found.any()) else 1.0
        for weight in (made.W_enc, made.b_enc, made.threshold):
            if weight is not None:
                weight[layer] *= factor


def _limit(hidden_pre: Float[Tensor, "n_inputs d_transcoder"], count: int) -> float:
    """A threshold, not below 0, that so many pre-activations are above: half-way to the next, so that rounding decides
    nothing."""
    falling = hidden_pre.flatten().sort(descending=True).values
    around = falling[max(0, count - 1) : count + 1]
    return max(0.0, float(around.mean() if count else around[0]))


def _mean_active(feature_acts: Float[Tensor, "n_inputs d_transcoder"]) -> Float[Tensor, ""]:
    return feature_acts[feature_acts != 0].mean()
