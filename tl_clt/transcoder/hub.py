"""Files of a hub repository: only those asked for, cached, taken up again where a download broke off.

A place on the hub is written `owner/repo`, `owner/repo/sub/folder`, either with `@revision`, or as a URI
`hf://owner/repo/sub/file.safetensors?revision=main`, as lists of transcoders do.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tl_clt.errors import FormatError

URI = "hf://"


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
    owner, _, rest = text.strip("/").partition("/")
    name, _, path = rest.partition("/")
    if not owner or not name or "?" in text or ".." in path.split("/"):
        raise FormatError(
            f"'{where}' is neither a folder here nor a hub repository that can be reached: those are written"
            f" owner/repo, owner/repo/folder or {URI}owner/repo/file, with @revision behind it where one is meant."
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


def _unreachable(where: HubPath, error: Exception) -> FormatError:
    place = f"{where.repo}/{where.path}".rstrip("/") + (f"@{where.revision}" if where.revision else "")
    return FormatError(
        f"'{place}' is neither a folder here nor a hub repository that can be reached"
        f" ({type(error).__name__}). Check the path or name, the revision and the connection; a gated repository"
        " also needs `hf auth login`."
    )
