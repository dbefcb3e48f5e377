"""Edits of feature activations as people write them by hand, and the interventions that mean the same."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_clt import Intervention

Edit = Callable[[Tensor], Tensor]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def by_hand(layer: int, edit: Edit) -> list[tuple[str, Callable]]:
    """A hook on feature activations, as people write them."""
    return [(f"blocks.{layer}.clt.hook_acts_post", lambda acts, hook: edit(acts.clone()))]


def set_all(acts: Tensor) -> Tensor:
    acts[..., 3] = 20.0
    return acts


def scale_one(acts: Tensor) -> Tensor:
    acts[:, [1, 2, 3, 4], 2:12] *= -3.0
    return acts


def add_some(acts: Tensor) -> Tensor:
    acts[:, 2:6:2, 7] += 9.0
    return acts


def set_list(acts: Tensor) -> Tensor:
    acts[:, [1, -1], 11] = 15.0
    acts[:, [1, -1], 4] = -5.0
    return acts


CASES: dict[str, tuple[int, Edit, Intervention]] = {
    "value everywhere": (0, set_all, Intervention(layer=0, feature=3, value=20.0)),
    "scale a supernode": (1, scale_one, Intervention(layer=1, pos=[1, 2, 3, 4], feature=range(2, 12), scale=-3)),
    "add on a slice": (0, add_some, Intervention(layer=0, pos=slice(2, 6, 2), feature=7, add=9)),
    "values on a list": (1, set_list, Intervention(layer=1, pos=[1, -1], feature=[11, 4], value=[15, -5.0])),
}
