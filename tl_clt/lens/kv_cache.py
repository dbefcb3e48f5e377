"""Key-value caches of the clean run that goes beside a hooked one while text is generated."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

from tl_clt.lens.types import HookedModel

CACHE_ARGUMENTS = ("past_kv_cache", "past_key_values")
"""HookedTransformer's and TransformerBridge's name for the cache that a forward call takes."""


class CleanCaches:
    """For each key-value cache of the user's, one that holds what a run without user hooks put there.

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
            theirs = swapped.get(name)
            if theirs is not None:
                if id(theirs) not in self.clean:
                    self.pair(theirs, copy.deepcopy(theirs))
                swapped[name] = self.clean[id(theirs)][1]
        return swapped

    def pair(self, theirs: Any, clean: Any) -> None:
        """Remember the clean cache that belongs to one of the user's."""
        if theirs is not None and clean is not None:
            key = id(theirs)
            self.clean[key] = (weakref.ref(theirs, lambda _: self.clean.pop(key, None)), clean)


def last_kv_cache(model: HookedModel) -> Any:
    """The cache that a bridge's last forward made and keeps for `generate`, or None."""
    return model.__dict__.get("_last_hf_cache")
