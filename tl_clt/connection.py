"""Whether the Hugging Face hub can be reached, found out at once: its own libraries try again for half a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session

REMEMBERED_S = 30.0
"""One call asks for several files; each of them would ask anew whether there is a connection."""
_found: dict[str, tuple[float, str]] = {}
"""By address, when it was asked and what kept it from answering."""


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Within, the hub's libraries ask the hub; where it cannot be reached, they look at what is cached and at nothing
    else, as with HF_HUB_OFFLINE=1. Gives a sentence that says so, for errors; empty where the hub can be reached."""
    if constants.HF_HUB_OFFLINE:
        yield " HF_HUB_OFFLINE is set, so that only what is cached is looked at."
        return
    reason = _what_is_wrong(constants.ENDPOINT)
    if not reason:
        yield ""
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield f" {constants.ENDPOINT} cannot be reached ({reason}), so that only what is cached is looked at."
    finally:
        constants.HF_HUB_OFFLINE = False


def _what_is_wrong(endpoint: str) -> str:
    asked, reason = _found.get(endpoint, (0.0, ""))
    if endpoint not in _found or time.monotonic() - asked > REMEMBERED_S:
        try:
            get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            reason = ""
        except Exception as error:
            # Of whichever library the hub's own one asks with: any answer, a refusal too, is none of these.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _found[endpoint] = time.monotonic(), reason
    return reason
