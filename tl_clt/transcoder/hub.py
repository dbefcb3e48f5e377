"""Files of a hub repository: only those asked for, cached, taken up again where a download broke off.

A place on the hub is written `owner/repo`, `owner/repo/sub/folder`, either with `@revision`, or as a URI
`hf://owner/repo/sub/file.safetensors?revision=main`, as lists of transcoders do.
"""

from __future__ import annotations

import errno
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tl_clt.errors import FormatError, NotWritten
from tl_clt.transcoder.catalogue import CATALOGUE

URI = "hf://"
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says where a download cannot be kept."""


class HubPath(NamedTuple):
    """A place on the hub."""

    repo: str
    """`owner/repo`."""
    path: str
    """Folder or file within it, with forward slashes; empty for the repository itself."""
    revision: str | None
    """Branch, tag or commit."""

    def file(self, name: str) -> str:
        """Path within the repository of a file in this folder."""
        return f"{self.path}/{name}" if self.path else name


def parse(where: str) -> HubPath:
    """Take the name of a place on the hub apart.

    Raises:
        FormatError: it is none.
    """
    text = where.removeprefix(URI)
    text, _, revision = text.partition("?revision=") if "?" in text else text.partition("@")
    owner, _, rest = text.rstrip("/").partition("/")
    name, _, path = rest.partition("/")
    if not owner or not name or "?" in text or ".." in path.split("/"):
        alike = get_close_matches(where.lower(), [entry.name for entry in CATALOGUE], n=2, cutoff=0.5)
        raise FormatError(
            f"'{where}' is neither a folder here nor a hub repository that can be reached, nor a name that `tl-clt"
            f" list` gives: repositories are written owner/repo, owner/repo/folder or {URI}owner/repo/file, with"
            " @revision behind it where one is meant." + (f" Nearest names: {', '.join(alike)}." if alike else "")
        )
    return HubPath(f"{owner}/{name}", path, revision or None)


def fetch_file(where: HubPath) -> Path:
    """One file, downloaded unless it is cached."""
    try:
        return Path(hf_hub_download(where.repo, where.path, revision=where.revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(where, error) from error


def fetch_folder(where: HubPath, patterns: list[str]) -> Path:
    """The files of a folder (and its sub-folders) that match one of the patterns."""
    wanted = [where.file(pattern) for pattern in patterns]
    try:
        whole = Path(snapshot_download(where.repo, revision=where.revision, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(where, error) from error
    return whole / where.path


def _unreachable(where: HubPath, error: Exception) -> FormatError | NotWritten:
    place = f"{where.repo}/{where.path}".rstrip("/") + (f"@{where.revision}" if where.revision else "")
    if isinstance(error, OSError) and error.errno in NO_PLACE:
        return NotWritten(
            f"'{place}' could not be downloaded: the cache '{constants.HF_HUB_CACHE}' takes nothing"
            f" ({error.strerror}). Make room there, or set HF_HOME to a folder on another disk; what was downloaded"
            " is taken up again."
        )
    offline = " HF_HUB_OFFLINE is set, so that only what is cached is looked at." if constants.HF_HUB_OFFLINE else ""
    return FormatError(
        f"'{place}' is neither a folder here nor a hub repository that can be reached"
        f" ({type(error).__name__}).{offline} Check the path or name, the revision and the connection; a gated"
        " repository also needs `hf auth login`. `tl-clt list` names public transcoders."
    )
