"""Telling whether two models would give the same activations."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from tl_clt.lens.types import HookedModel

SAYS_NOTHING_OF_VALUES = (
    *("device", "n_devices", "seed", "model_name", "tokenizer_name", "init_weights", "dtype"),
    *("initializer_range", "init_mode", "checkpoint_index", "checkpoint_label_type", "checkpoint_value"),
)
"""Settings that differ between loads of one model: where it is and what it is called. Weights tell their own dtype."""


def model_fingerprint(model: HookedModel) -> str:
    """sha256 of a model's weights and of the settings that its forward pass reads: equal for equal models.

    A folder that moved, another name, or another device change nothing; one changed weight does.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    settings = {name: value for name, value in vars(model.cfg).items() if name not in SAYS_NOTHING_OF_VALUES}
    plain = {name: value for name, value in settings.items() if _is_plain(value)}
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
