"""Swaps: features' activations taken from another prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.arguments import as_several, as_whole, is_whole, plain, shown
from tl_clt.errors import InterventionError
from tl_clt.interventions.intervention import Intervention
from tl_clt.lens import HookedModel, Prompt, block_hook, run_with_cache, to_tokens, user_hooks_aside
from tl_clt.replacement import check_fit
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder


@torch.no_grad()
def swap_interventions(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    tokens: Prompt,
    source: Prompt,
    positions: Mapping[int, int],
    features: Iterable[tuple[int, int]] | None = None,
) -> list[Intervention]:
    """Interventions that give features the activations they have on another prompt (Texas -> California).

    Args:
        model, clt: a model and a CLT of it.
        tokens: the prompt to intervene on.
        source: the prompt to take activations from; of any length.
        positions: position in `source` -> position in `tokens`, negative ones counted from the end.
        features: (layer, feature) pairs to swap, those of either prompt; None for all that are active on either
            at these positions.

    Returns:
        One `Intervention` for each layer and position with something to swap.

    Raises:
        InterventionError: a position, layer or feature that is not there, or nothing to swap.
        CLTMismatch, HookNotFound, PromptError, TokenizerMissing: as for `intervene`.
    """
    check_fit(model, clt)
    to, of = (to_tokens(model, prompt) for prompt in (tokens, source))
    positions = _as_positions(positions, len(of), len(to))
    named = None if features is None else _by_layer(features, clt)
    here, there = (_feature_acts(model, clt, prompt) for prompt in (to, of))
    swaps = []
    for source_pos, pos in positions.items():
        for layer in clt.layers:
            given = there[source_pos, layer]
            if named is None:
                chosen = torch.nonzero((given != 0) | (here[pos, layer] != 0)).flatten().tolist()
            else:
                chosen = named.get(layer, [])
            if chosen:
                value = given[chosen].tolist()
                swaps.append(Intervention(layer=layer, pos=pos, feature=chosen, value=value))
    if not swaps:
        raise InterventionError("There is nothing to swap: no feature is named, or active at these positions.")
    return swaps


def _as_positions(positions: Mapping[int, int], n_source: int, n_tokens: int) -> dict[int, int]:
    if not isinstance(positions, Mapping):
        raise InterventionError(f"positions is {shown(positions)}: give a dict, position in source -> in the prompt.")
    found = {
        _as_position(source, n_source, "the source"): _as_position(pos, n_tokens, "the prompt")
        for source, pos in positions.items()
    }
    if len({p % n_tokens for p in found.values()}) < len(positions):
        raise InterventionError(f"Two positions of the source go to one of the prompt: {dict(positions)}.")
    return found


def _as_position(given: object, length: int, which: str) -> int:
    pos = as_whole(f"A position in {which}", given, error=InterventionError)
    if not -length <= pos < length:
        raise InterventionError(f"There is no position {pos} in {which}: it has positions 0 to {length - 1}.")
    return pos


def _by_layer(features: Iterable[tuple[int, int]], clt: CrossLayerTranscoder) -> dict[int, list[int]]:
    """The features named, each once, by layer."""
    wanted = "(layer, feature) pairs"
    pairs = as_several("features", list(features) if isinstance(features, Set) else features, wanted, InterventionError)
    named: dict[int, list[int]] = {}
    for i, pair in enumerate([pairs] if len(pairs) == 2 and all(is_whole(plain(n)) for n in pairs) else pairs):
        numbers = as_several(f"features[{i}]", pair, wanted, InterventionError)
        if len(numbers) != 2:
            raise InterventionError(f"features[{i}] is {shown(pair)}: give {wanted}.")
        layer, feature = (as_whole(f"features[{i}]", number, error=InterventionError) for number in numbers)
        if not (0 <= layer < clt.cfg.n_layers and 0 <= feature < clt.cfg.d_transcoder):
            raise InterventionError(
                f"There is no feature {feature} in layer {layer}: the CLT has layers 0 to {clt.cfg.n_layers - 1} with"
                f" features 0 to {clt.cfg.d_transcoder - 1}."
            )
        if feature not in named.setdefault(layer, []):
            named[layer].append(feature)
    return named


def _feature_acts(
    model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens
) -> Float[Tensor, "pos n_layers d_transcoder"]:
    names = [block_hook(t, clt.cfg.input_hook) for t in clt.layers]
    with user_hooks_aside(model):
        _, cache = run_with_cache(model, tokens[None], lambda name: name in names)
    return clt.encode(torch.stack([cache[name][0] for name in names], dim=-2).to(clt.W_enc.dtype))
