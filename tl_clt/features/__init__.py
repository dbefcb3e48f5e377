"""What a feature means."""

from tl_clt.features.logits import direct_logits, promoted_tokens

__all__ = ["direct_logits", "promoted_tokens"]
