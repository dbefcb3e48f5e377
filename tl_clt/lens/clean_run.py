"""The clean run that goes beside a hooked one, started by a hook, so that plain hooks can compare with it."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tl_clt.errors import ModelUnsupported, PromptError
from tl_clt.lens.freezing import FROZEN_HOOKS, PinnedNorms, for_each_head, hold, is_frozen_hook, norm_outputs
from tl_clt.lens.hooks import (
    FwdHook,
    HookDict,
    HookedModel,
    HookedTransformer,
    HookPoint,
    block_hook,
    find_hook,
    mlp_hook_points,
    model_name,
    require_hooks,
    user_hooks_aside,
)
from tl_clt.lens.prompts import padding_before
from tl_clt.lens.running import run_with_cache, run_with_hooks

Freeze = Literal["attention", "all", "none"]
START = block_hook(0, "hook_resid_pre")
FIRST_PATTERN = block_hook(0, "attn.hook_pattern")


class CleanRun:
    """A run of the model alone on the tokens of the forward pass in which these hooks act.

    `begin` goes first in a list of hooks. As the pass enters block 0, it runs the model once more from the same
    residual stream with all users' hooks aside, and keeps what later hooks of the list ask for. A pass over one
    new token (generation with a key-value cache) goes on with the text of the pass before it; the clean run then
    reads the whole text again, so that no second cache has to be kept in step.

    Args:
        model: what runs; a CLT that is attached to it stays in place.
        names: hooks whose values to keep, besides patterns and scales.
        freeze: what the hooks of `frozen` hold: "attention" the patterns, "all" also the scales of norms, or "none".
        hook_dict: the model's hooks. They are read again in each pass: a CLT may have been attached since.

    Raises:
        HookNotFound: the model lacks one of the hooks.
    """

    def __init__(self, model: HookedModel, names: Collection[str], freeze: Freeze, hook_dict: HookDict) -> None:
        with mlp_hook_points(model):
            require_hooks(model, [START, FIRST_PATTERN, *names], hook_dict)
        patterns = [n for n in hook_dict if n.endswith(FROZEN_HOOKS[0])]
        # Norms of queries and keys act on patterns only, which are held themselves.
        scales = [n for n in hook_dict if is_frozen_hook(n) and n not in patterns and ".attn." not in n]
        self.model = model
        self.patterns = patterns if freeze != "none" else []
        self.scales = scales if freeze == "all" else []
        self.norm_outs = norm_outputs(hook_dict, self.scales)
        self.wanted = {*names, *self.patterns, *self.scales, *self.norm_outs}
        self.logits = torch.empty(0)
        """Of the whole text so far, [batch, pos, d_vocab]."""
        self.first = 0
        """Position of the first token of the present pass."""
        self.offsets: list[int] = []
        """Columns of padding before each prompt of the present pass."""
        self._call = _Call(model)
        weakref.finalize(self, self._call.handle.remove)
        self._mask: Tensor | None = None
        self._position_ids: Tensor | None = None
        self._text: Tensor | None = None
        self._kept: dict[str, Tensor] = {}
        self._norms = PinnedNorms({})

    @property
    def begin(self) -> list[FwdHook]:
        """Hooks that start the clean run; they go before all others that use it."""
        return [(START, self._begin), (FIRST_PATTERN, self._check_cache)]

    @property
    def frozen(self) -> list[FwdHook]:
        """Hooks that hold attention patterns, or also norms' scales, at the clean run's values."""
        hooks = [(name, partial(self._hold, name=name)) for name in (*self.patterns, *self.scales)]
        return [*hooks, *((name, partial(self._pin, name=name)) for name in self.norm_outs)]

    def at(self, name: str) -> Tensor:
        """What passed a hook in the clean run, at the positions of the present pass."""
        return self._kept[name][:, self.first :]

    def _begin(self, residual: Tensor, hook: HookPoint) -> None:
        text = residual.detach()
        self.first = 0
        if residual.shape[1] == 1:
            before = self._text
            if before is None or before.shape[0] != text.shape[0]:
                raise PromptError(
                    "One token came by itself, but these hooks have not seen the text before it. Let them see the"
                    " prompt first: generate within model.hooks(fwd_hooks=...)."
                )
            self.first = before.shape[1]
            text = torch.cat([before, text], dim=1)
        self._text = text
        self._note_call(text)
        self._run(text)

    def _note_call(self, text: Tensor) -> None:
        """Take over the attention mask and positions that the pass was called with."""
        batch, n_pos = text.shape[:2]
        mask, position_ids = self._call.mask, self._call.position_ids
        if mask is not None and mask.shape[-1] != n_pos:
            raise ModelUnsupported(
                f"The pass has an attention mask of shape {list(mask.shape)}, but the text so far has {n_pos} tokens:"
                " give masks over the whole text, [batch, pos]."
            )
        self._mask = mask
        self.offsets = padding_before(mask if mask is not None and mask.ndim == 2 else None, batch)
        if self.first and self._position_ids is not None and position_ids is not None:
            position_ids = torch.cat([self._position_ids, position_ids], dim=1)
        covers_text = position_ids is not None and position_ids.shape[-1] == n_pos
        self._position_ids = position_ids if covers_text else None

    def close(self) -> None:
        """Remove the forward pre-hook that notes the model's calls. It also goes with the last hook of the list."""
        self._call.handle.remove()

    @torch.no_grad()
    def _run(self, text: Tensor) -> None:
        tokens = torch.full(text.shape[:2], _plain_token(self.model), device=text.device)
        call = {"attention_mask": self._mask, "position_ids": self._position_ids}
        call = {name: value for name, value in call.items() if value is not None}
        with user_hooks_aside(self.model) as hook_dict, _reading(hook_dict, self.model, text):
            self.logits, cache = run_with_cache(self.model, tokens, lambda name: name in self.wanted, **call)
            self._kept = {name: cache[name] for name in cache.keys()}
            if self.norm_outs:
                frozen = [(name, hold(self._kept[name])) for name in (*self.patterns, *self.scales)]
                self._norms = PinnedNorms({name: self._kept[name] for name in self.norm_outs})
                run_with_hooks(self.model, tokens, [*frozen, *self._norms.note()], hook_dict, **call)

    def _check_cache(self, pattern: Tensor, hook: HookPoint) -> None:
        """Compare what the attention sees with the text that these hooks have seen."""
        new, attended = pattern.shape[-2:]
        # A sliding window sees less than the whole text.
        if (attended > new) != (self.first > 0) or attended > self.first + new:
            raise ModelUnsupported(
                f"The pass attends to {attended} tokens of which {new} are new, but these hooks have seen {self.first}"
                " before. Give a whole prompt, of at least 2 tokens, and then one new token at a time."
            )

    def _hold(self, tensor: Tensor, hook: HookPoint, name: str) -> Tensor:
        whole = self._kept[name]
        pattern = name in self.patterns
        value = whole[:, :, self.first :, -tensor.shape[-1] :] if pattern else whole[:, self.first :]
        value = for_each_head(value, tensor)
        if tensor.shape != value.shape:
            raise PromptError(f"{name} has shape {list(tensor.shape)}, but in the clean run {list(value.shape)}.")
        # A copy: a bridge takes the same object, returned, for a hook that changed nothing.
        return value.to(tensor.dtype).clone()

    def _pin(self, out: Tensor, hook: HookPoint, name: str) -> Tensor:
        return self._norms.pin(out, name, self.first)


class _Call:
    """Notes the attention mask and positions of each call of a model, which no hook point is given.

    By a hook of torch's own: on the Hugging Face model within a bridge, on the first block of a HookedTransformer
    (which calls itself without torch's hooks while it generates, and has made its mask by then).
    """

    def __init__(self, model: HookedModel) -> None:
        self.mask: Tensor | None = None
        """[batch, pos] over the text so far, or as the caller gave it to a bridge."""
        self.position_ids: Tensor | None = None
        """[batch, pos] of the tokens of this pass; None where the model counts them itself."""
        self.model = weakref.ref(model)
        called = model.blocks[0] if isinstance(model, HookedTransformer) else model.original_model
        self.handle = called.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call's mask and positions, unless a clean run, of these hooks or of others, makes the call."""
        if id(self.model()) in _CLEAN:
            return
        self.mask = kwargs.get("attention_mask")
        self.position_ids = kwargs.get("position_ids")


_CLEAN: set[int] = set()
"""Models, by id, that are within a clean run."""


def _plain_token(model: HookedModel) -> int:
    """A token id that is no special token, so that no mask leaves it out. Its embedding is not used."""
    special = set(getattr(getattr(model, "tokenizer", None), "all_special_ids", None) or [])
    plain = next((i for i in range(model.cfg.d_vocab) if i not in special), None)
    if plain is None:
        raise ModelUnsupported(f"Every token of {model_name(model)} is a special one.")
    return plain


@contextmanager
def _reading(hook_dict: HookDict, model: HookedModel, text: Tensor) -> Iterator[None]:
    """Within the block, every pass has this residual stream before block 0, whatever tokens it is given.

    By a hook of torch's own, which stays where users' hooks are set aside (as an attached CLT does by itself).
    """
    handle = find_hook(model, START, hook_dict).register_forward_hook(lambda *_: text.clone(), prepend=True)
    outermost = id(model) not in _CLEAN
    _CLEAN.add(id(model))
    try:
        yield
    finally:
        handle.remove()
        if outermost:
            _CLEAN.discard(id(model))
