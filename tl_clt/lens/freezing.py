"""Holding what is not linear: attention patterns and the scales of norms (Methods, "The Local Replacement Model")."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_clt.errors import HookNotFound, PromptError
from tl_clt.lens.hooks import FwdHook
from tl_clt.lens.types import ActivationCache, HookPoint

FROZEN_HOOKS = ("attn.hook_pattern", "hook_scale")


def is_frozen_hook(name: str) -> bool:
    """Whether a hook holds an attention pattern or a norm's scale."""
    return name.endswith(FROZEN_HOOKS)


def frozen_hooks(
    cache: ActivationCache | dict[str, Tensor], *, patterns: bool = True, scales: bool = True
) -> list[FwdHook]:
    """Hooks that hold attention patterns and every norm's scale at a cache's values.

    With them the model is linear between its MLPs: what moves in the residual stream moves everything
    after it in proportion.

    Args:
        cache: activations of the prompt to hold, from `model.run_with_cache`.
        patterns: hold `attn.hook_pattern`.
        scales: hold every `hook_scale`, that of `ln_final` included.

    Returns:
        Plain (name, function) pairs for `run_with_hooks` or `model.hooks`.

    Raises:
        HookNotFound: the cache has neither patterns nor scales (a names_filter left them out).
    """
    held = [
        name
        for name in cache.keys()
        if (patterns and name.endswith(FROZEN_HOOKS[0])) or (scales and name.endswith(FROZEN_HOOKS[1]))
    ]
    if not held:
        raise HookNotFound(
            "The cache has no attn.hook_pattern and no hook_scale to hold. Run run_with_cache without a"
            " names_filter, or with one that lets them through."
        )
    return [(name, hold(cache[name])) for name in held]


def hold(value: Tensor) -> Callable:
    """A hook that puts a fixed tensor in place of what passes, detached and of the same shape.

    A plain function: TransformerLens prints each hook that it adds, and a printed partial prints its tensors.
    """
    held = value.detach()

    def put_in_place(tensor: Tensor, hook: HookPoint) -> Tensor:
        if tensor.shape != held.shape:
            raise PromptError(
                f"{hook.name} has shape {list(tensor.shape)}, but the values to hold have {list(held.shape)}."
                " Hold values of the same prompt, or of as many prompts of the same length."
            )
        # A copy: a bridge takes the same object, returned, for a hook that changed nothing.
        return held.to(tensor.dtype).clone()

    return put_in_place
