"""The two kinds of model that TransformerLens gives its users; both are first class here."""

from __future__ import annotations

from typing import TypeAlias

from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

HookedModel: TypeAlias = HookedTransformer | TransformerBridge

__all__ = ["ActivationCache", "HookPoint", "HookedModel", "HookedTransformer", "TransformerBridge"]
