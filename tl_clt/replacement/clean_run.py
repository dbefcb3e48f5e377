"""Key-value caches of the clean run that goes beside a hooked one while text is generated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

CACHE_ARGUMENTS = ("past_kv_cache", "past_key_values")
"""HookedTransformer's and TransformerBridge's name."""


class CleanCaches:
    """For each key-value cache of the user's, one that holds what a run without user hooks put there.

    Errors at a new token are those of the clean run, so its attention must look at clean keys and values:
    generation with and without a cache then gives the same tokens.
    """

    def __init__(self) -> None:
        self.clean: dict[int, tuple[Any, Any]] = {}

    def swap_in(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a forward call with the clean cache in place of the user's."""
        swapped = dict(kwargs)
        for name in CACHE_ARGUMENTS:
            theirs = swapped.get(name)
            if theirs is not None:
                if id(theirs) not in self.clean:
                    self.clean[id(theirs)] = (theirs, copy.deepcopy(theirs))
                swapped[name] = self.clean[id(theirs)][1]
        return swapped
