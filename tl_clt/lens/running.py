"""Prompts through a model, keeping what tracing needs, with the key-value caches of text that is generated."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from tl_clt.errors import ModelUnsupported
from tl_clt.lens.hooks import (
    FwdHook,
    HookDict,
    HookedModel,
    HookedTransformer,
    mlp_hook_points,
    model_name,
    names_mlp_points,
)
from tl_clt.shapes import Logits, TokenBatch


class Unembedding(NamedTuple):
    """What went into and came out of the unembedding in one run."""

    final: Float[Tensor, "batch pos d_model"]
    """Output of ln_final."""

    logits: Logits
    """Before any soft-cap."""


class UnembeddingTap:
    """What the unembedding took and gave in a run within `tap_unembedding`."""

    seen: Unembedding | None = None

    def get(self) -> Unembedding:
        """What the run gave."""
        assert self.seen is not None, "no forward pass ran within tap_unembedding"
        return self.seen


@contextmanager
def tap_unembedding(model: HookedModel) -> Iterator[UnembeddingTap]:
    """Within the block, a forward pass leaves the unembedding's input and its output before any soft-cap."""
    tap = UnembeddingTap()

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        tap.seen = Unembedding(args[0], output)

    handle = model.unembed.register_forward_hook(keep)
    try:
        yield tap
    finally:
        handle.remove()


def logit_scale(model: HookedModel, unembedding: Unembedding, logits: Logits) -> float:
    """What the model multiplies its unembedding's output by (Cohere, Granite) before a soft-cap, told from one run.

    Args:
        unembedding: what went into and came out of it in the run.
        logits: the model's output in the same run.

    Raises:
        ModelUnsupported: the output is no multiple of the unembedding's, soft-capped or not.
    """
    u, out = unembedding.logits.detach().double(), logits.detach().double()
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    cap = cap if cap > 0 else None
    # Near the cap its inverse is all rounding.
    at = u.isfinite() & out.isfinite() & (out.abs() < (0.5 * cap if cap else float("inf")))
    uncapped = out if cap is None else cap * torch.atanh((out / cap).clamp(-0.5, 0.5))
    scale = float((uncapped[at] * u[at]).sum() / u[at].square().sum().clamp_min(1e-30)) if bool(at.any()) else 1.0
    eps = torch.finfo(logits.dtype).eps
    # A logit is the sum of many products that round: the root of eps, as for all logits that are computed twice.
    scale = 1.0 if abs(scale - 1) < eps**0.5 else scale
    predicted = scale * u
    predicted = predicted if cap is None else cap * torch.tanh(predicted / cap)
    finite = u.isfinite()
    worst = (predicted - out)[finite].abs().max()
    if not bool(worst <= eps**0.5 * out[finite].abs().max().clamp_min(1)):
        raise ModelUnsupported(
            f"{model_name(model)} does something between its unembedding and its logits that is no scale and no"
            f" soft-cap (off by {float(worst):.2g}): its logits cannot be traced."
        )
    return scale


def run_with_cache(
    model: HookedModel, tokens: TokenBatch, names: Callable[[str], bool], **call: Tensor
) -> tuple[Logits, ActivationCache]:
    """`model.run_with_cache` without gradients, keeping the hooks that `names` lets through, `mlp.hook_in` and
    `mlp.hook_out` of a HookedTransformer among them; `call` goes to the model (`attention_mask`)."""
    with torch.no_grad(), mlp_hook_points(model):
        logits, cache = model.run_with_cache(tokens, names_filter=names, **call)  # type: ignore[arg-type]
    return logits, cache  # type: ignore[return-value]


def run_blocks_with_cache(
    model: HookedModel, tokens: TokenBatch, names: Callable[[str], bool], **call: Tensor
) -> ActivationCache:
    """The cache of `run_with_cache` for hooks within blocks alone: a HookedTransformer stops behind its last block. Of
    a small model with a large vocabulary the unembedding is half of the work."""
    stop: dict[str, Any] = {"stop_at_layer": model.cfg.n_layers} if isinstance(model, HookedTransformer) else {}
    with torch.no_grad(), mlp_hook_points(model):
        _, cache = model.run_with_cache(tokens, names_filter=names, **stop, **call)  # type: ignore[arg-type]
    return cache  # type: ignore[return-value]


def run_with_hooks(
    model: HookedModel, tokens: TokenBatch, hooks: Sequence[FwdHook], hook_dict: HookDict | None = None, **call: Tensor
) -> Logits:
    """As `model.run_with_hooks`, with gradients where the caller has them on; hooks may be at `mlp.hook_in` and
    `mlp.hook_out` of a HookedTransformer too; `call` goes to the model (`attention_mask`).

    A bridge's own method builds its dictionary of hooks anew for each hook in the list, which takes longer than the
    pass; here it is built once, or not at all where it is given as `hook_dict`. A bridge also warns that norms whose
    scales are frozen round otherwise than its own. Callers here know that, and the warning is not shown.
    """
    with mlp_hook_points(model) if names_mlp_points(name for name, _ in hooks) else nullcontext():
        hook_dict = model.hook_dict if hook_dict is None else hook_dict
        points = [hook_dict[name] for name, _ in hooks]
        model.context_level += 1
        try:
            for point, (_, function) in zip(points, hooks, strict=True):
                point.add_hook(function, level=model.context_level)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
                return model(tokens, **call)  # type: ignore[arg-type]
        finally:
            for point in dict.fromkeys(points):
                point.remove_hooks("fwd", level=model.context_level)
            model.context_level -= 1


def run_behind_layer(
    model: HookedModel, tokens: TokenBatch, layer: int, stream: Float[Tensor, "batch pos d_model"]
) -> Logits:
    """Logits where the residual stream behind a layer is this one. A HookedTransformer does not run what lies before;
    hooks of the user's own act in the layers above."""
    if isinstance(model, HookedTransformer):
        return model(stream, start_at_layer=layer + 1)  # type: ignore[return-value]
    return run_with_hooks(model, tokens, [(f"blocks.{layer}.hook_resid_post", lambda x, hook: stream)])


CACHE_ARGUMENTS = ("past_kv_cache", "past_key_values")
"""HookedTransformer's and TransformerBridge's name for the cache that a forward call takes."""


class CleanCaches:
    """For each key-value cache of the user's, a second one that runs without user hooks fill.

    Errors at a new token are those of the clean run, so its attention must look at clean keys and values:
    generation with and without a cache then gives the same tokens.
    """

    def __init__(self) -> None:
        self.clean: dict[int, tuple[weakref.ref, Any]] = {}
        """id of the user's cache -> (the user's cache, the clean one), for as long as the user's lives."""

    def swap_in(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a forward call with the clean cache in place of the user's."""
        swapped = dict(kwargs)
        for name in CACHE_ARGUMENTS:
            users_cache = swapped.get(name)
            if users_cache is not None:
                if id(users_cache) not in self.clean:
                    self.pair(users_cache, copy.deepcopy(users_cache))
                swapped[name] = self.clean[id(users_cache)][1]
        return swapped

    def pair(self, users_cache: Any, clean: Any) -> None:
        """Remember the clean cache that belongs to one of the user's."""
        if users_cache is not None and clean is not None:
            key = id(users_cache)
            self.clean[key] = (weakref.ref(users_cache, lambda _: self.clean.pop(key, None)), clean)


def last_kv_cache(model: HookedModel) -> Any:
    """The cache that a bridge's last forward made and keeps for `generate`, or None."""
    return model.__dict__.get("_last_hf_cache")
