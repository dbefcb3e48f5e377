"""Hook names as other libraries write them, in this package's words."""

from __future__ import annotations

import re

from tl_clt.errors import FormatError

HF_HOOKS = {
    "mlp.input": "mlp.hook_in",
    "mlp.output": "mlp.hook_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""A place within a layer of a Hugging Face model, and what TransformerLens calls it. Gemma's norm before the MLP gives
the MLP its input; its norm behind the MLP gives the residual stream what it gets."""


def hook_of_hf(point: str, where: str) -> str:
    """The hook for a place such as `model.layers.3.pre_feedforward_layernorm.output`.

    Raises:
        FormatError: it is none of those known.
    """
    within = re.sub(r"^(model\.)?(language_model\.)?(layers\.(\d+|\{[a-z]*\})\.)?", "", point)
    if within not in HF_HOOKS:
        raise FormatError(
            f"'{where}' names a place '{point}', which is none of {', '.join(HF_HOOKS)} of a layer. This package does"
            " not know what hook it is; convert the CLT with the hook's name in a config.yaml (feature_input_hook)."
        )
    return HF_HOOKS[within]


def hook_within_block(name: str) -> str:
    """`blocks.3.hook_resid_mid` without its block."""
    return re.sub(r"^blocks\.\d+\.", "", name)
