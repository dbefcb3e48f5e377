"""Holding what is not linear: attention patterns and the scales of norms (Methods, "The Local Replacement Model")."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from tl_clt.arguments import as_switch, shown
from tl_clt.errors import ConfigError, HookNotFound, ModelUnsupported, PromptError
from tl_clt.lens.hooks import FwdHook, HookDict, HookedModel, HookPoint, block_hook, model_name, user_hooks_aside
from tl_clt.lens.running import run_with_cache, run_with_hooks, tap_unembedding
from tl_clt.shapes import TokenBatch

FROZEN_HOOKS = ("attn.hook_pattern", "hook_scale")
NOT_LINEAR = 1e-3
"""From this ratio of second to first differences on, a model counts as not linear. With patterns and scales held,
rounding alone gives about 1e-6; where they move, the ratio is 0.3 or more."""


def is_frozen_hook(name: str) -> bool:
    """Whether a hook holds an attention pattern or a norm's scale."""
    return name.endswith(FROZEN_HOOKS)


def frozen_hooks(
    cache: ActivationCache | dict[str, Tensor], *, patterns: bool = True, scales: bool = True
) -> list[FwdHook]:
    """Hooks that hold attention patterns and every norm's scale at a cache's values.

    With them the model is linear between its MLPs: what moves in the residual stream moves everything
    after it in proportion. That is tested on the model that the cache came from: on some bridges (GPT-J, GPT-Neo,
    OPT) a hook on a pattern changes nothing.

    Args:
        cache: activations of the prompt to hold, from `model.run_with_cache`.
        patterns: hold `attn.hook_pattern`.
        scales: hold every `hook_scale`, that of `ln_final` included.

    Returns:
        Plain (name, function) pairs for `run_with_hooks` or `model.hooks`.

    Raises:
        ConfigError: this is no cache.
        HookNotFound: the cache has neither patterns nor scales (a names_filter left them out).
        ModelUnsupported: hooks at this model's patterns and scales do not hold them.
    """
    patterns, scales = as_switch("patterns", patterns), as_switch("scales", scales)
    named = isinstance(cache, (ActivationCache, Mapping)) and all(isinstance(name, str) for name in cache.keys())
    if not named or not all(isinstance(cache[name], Tensor) for name in cache.keys() if is_frozen_hook(name)):
        raise ConfigError(f"The cache is {shown(cache)}: give what model.run_with_cache returns as its second value.")
    model = getattr(cache, "model", None)
    if model is not None:
        n_pos = next((cache[name].shape[-1] for name in cache.keys() if name.endswith(FROZEN_HOOKS[0])), 4)
        require_held(model, torch.arange(n_pos)[None] % model.cfg.d_vocab)
    names = [
        name
        for name in cache.keys()
        if (patterns and name.endswith(FROZEN_HOOKS[0])) or (scales and name.endswith(FROZEN_HOOKS[1]))
    ]
    if not names:
        raise HookNotFound(
            "The cache has no attn.hook_pattern and no hook_scale to hold. Run run_with_cache without a"
            " names_filter, or with one that lets them through."
        )
    return [(name, hold(cache[name])) for name in names]


def hold(value: Tensor) -> Callable:
    """A hook that puts a fixed tensor in place of what passes, detached and of the same shape.

    A plain function: TransformerLens prints each hook that it adds, and a printed partial prints its tensors.
    """
    fixed = value.detach()

    def put_in_place(tensor: Tensor, hook: HookPoint) -> Tensor:
        value = for_each_head(fixed, tensor)
        if tensor.shape != value.shape:
            raise PromptError(
                f"{hook.name} has shape {list(tensor.shape)}, but the values to hold have {list(fixed.shape)}."
                " Hold values of the same prompt, or of as many prompts of the same length."
            )
        # A copy: a bridge takes the same object, returned, for a hook that changed nothing.
        return value.to(tensor.dtype).clone()

    return put_in_place


def for_each_head(scale: Tensor, like: Tensor) -> Tensor:
    """A norm's scale for as many heads as pass: with `use_split_qkv_input` and grouped heads the norm runs once for
    queries and once for each of keys and values, with the same scale but for other numbers of heads."""
    a_head = scale.ndim == like.ndim == 4 and scale.shape[-1] == like.shape[-1] == 1
    return scale[:, :, :1].expand_as(like) if a_head and scale.shape[:2] == like.shape[:2] else scale


class PinnedNorms:
    """Norms with held scales that give, on the clean run, what the model's own code gave, to the bit.

    A bridge computes norms by Hugging Face's own code, which rounds otherwise than norms with held scales.

    Args:
        clean: by hook name (`norm_outputs`), what norms gave in the clean run.
    """

    def __init__(self, clean: Mapping[str, Tensor]) -> None:
        self.clean = clean
        self.rounding: dict[str, Tensor] = {}

    def note(self) -> list[FwdHook]:
        """Hooks for a run with scales held, which note by how much each norm's output differs from the clean one."""
        return [(name, partial(self._note, name=name)) for name in self.clean]

    def pins(self) -> list[FwdHook]:
        """Hooks for later passes over the same positions, which correct each norm's output by that difference."""

        def pin(out: Tensor, hook: HookPoint, name: str) -> Tensor:
            return self.pin(out, name)

        return [(name, partial(pin, name=name)) for name in self.clean]

    def pin(self, out: Tensor, name: str, first: int = 0) -> Tensor:
        """A norm's output corrected by that difference, in a pass that begins at position `first` of the clean run."""
        return out + self.rounding[name][:, first:]

    def _note(self, out: Tensor, hook: HookPoint, name: str) -> Tensor:
        self.rounding[name] = (self.clean[name] - out).detach()
        return self.clean[name].clone()


def norm_outputs(hook_dict: HookDict, scales: Collection[str]) -> list[str]:
    """The hooks at the outputs of the norms whose scale hooks are named, as far as a model has them (bridges do)."""
    return [out for scale in scales if (out := scale.removesuffix("hook_scale") + "hook_out") in hook_dict]


_HELD: WeakKeyDictionary[HookedModel, set[tuple[bool, ...]]] = WeakKeyDictionary()
"""Models that passed the test of `require_held`, with the values of `FLAGS` for which they did."""
FLAGS = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in")


@torch.no_grad()
def require_held(model: HookedModel, tokens: TokenBatch, *, anew: bool = False) -> None:
    """Raise unless hooks on patterns and scales take effect: with them and the MLPs' outputs held, what goes into
    block 0 must reach every attention layer's output and the unembedding linearly.

    Args:
        tokens: a prompt to test on.
        anew: repeat the test for a model that has passed it before.

    Raises:
        ModelUnsupported: something is not held; the message names the first layer where that shows.
    """
    flags = tuple(bool(getattr(model.cfg, flag, False)) for flag in FLAGS)
    if flags in _HELD.get(model, ()) and not anew:
        return
    blocks = range(model.cfg.n_layers)
    start, attn_outs = block_hook(0, "hook_resid_pre"), [block_hook(t, "hook_attn_out") for t in blocks]
    mlp_outs = [block_hook(t, "hook_mlp_out") for t in blocks]
    hook_dict = model.hook_dict
    missing = [name for name in (start, *attn_outs, *mlp_outs) if name not in hook_dict]
    if missing:
        raise ModelUnsupported(f"{model_name(model)} has no {missing[0]}, without which its MLPs cannot be held.")
    with user_hooks_aside(model, hook_dict):
        wanted = {start, *mlp_outs}
        _, cache = run_with_cache(model, tokens.to(model.W_E.device), lambda n: n in wanted or is_frozen_hook(n))
        hooks = [(name, hold(cache[name])) for name in cache.keys() if name != start]
        outcomes = [_moved(model, hook_dict, tokens, hooks, cache[start], strength, attn_outs) for strength in range(3)]
    for place in (*attn_outs, UNEMBEDDING):
        first, second = (outcomes[k + 1][place] - outcomes[k][place] for k in range(2))
        allowed = max(NOT_LINEAR, 16 * torch.finfo(cache[start].dtype).eps) * first.abs().max()
        if not bool((second - first).abs().max() <= allowed):
            on = [flag for flag, is_on in zip(FLAGS, flags, strict=True) if is_on]
            raise ModelUnsupported(
                f"Hooks on attention patterns and norm scales do not hold them in {model_name(model)}: {place} moves"
                " out of proportion to what goes in, so that nothing frozen would be frozen."
                + (f" Try it without {on[0]}." if on else "")
                + (
                    f" In {str(cache[start].dtype).removeprefix('torch.')} rounding alone may do so: load the model"
                    " with dtype='float32'."
                    if torch.finfo(cache[start].dtype).bits < 32
                    else " Load the model with load_model(..., backend='hooked') where TransformerLens has it that way."
                )
            )
    _HELD.setdefault(model, set()).add(flags)


UNEMBEDDING = "the unembedding's input"


def _moved(
    model: HookedModel,
    hook_dict: HookDict,
    tokens: TokenBatch,
    frozen: list[FwdHook],
    x: Tensor,
    strength: int,
    places: list[str],
) -> dict[str, Tensor]:
    """The values at some hooks when `strength` times a noise as large as the residual stream goes into block 0."""
    # A generator of its own: a caller's random numbers stay as they were.
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    into = x + strength * (noise * float(x.double().square().mean().sqrt())).to(x)
    passed: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint, name: str) -> None:
        passed[name] = value.double()

    record = [(name, partial(keep, name=name)) for name in places]
    with tap_unembedding(model) as tap:
        hooks = [*frozen, (block_hook(0, "hook_resid_pre"), hold(into)), *record]
        run_with_hooks(model, tokens.to(x.device), hooks, hook_dict)
    return {**passed, UNEMBEDDING: tap.get().final.double()}
