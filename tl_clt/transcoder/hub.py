"""Public transcoders by name, and how they are fetched from the hub.

What no page of their makers states is left out of the catalogue (None), not guessed. Of a repository only the files
asked for are fetched; they are cached, and taken up again where a download broke off. A place on the hub is written
`owner/repo`, `owner/repo/sub/folder`, either with `@revision`, or as a URI
`hf://owner/repo/sub/file.safetensors?revision=main`, as lists of transcoders do.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tl_clt.bundled import bundled_organisms
from tl_clt.connection import hub_or_cache
from tl_clt.errors import CLTMismatch, FormatError, NotWritten


@dataclass(frozen=True, kw_only=True)
class PublicTranscoders:
    """A published CLT or set of per-layer transcoders. None: not stated where this was looked up."""

    name: str
    """What `CrossLayerTranscoder.from_pretrained` takes."""
    repo: str
    """Hub repository, with its sub-folder where there is one."""
    model: str
    """Hub name of the model."""
    kind: str
    """CLT (features write to their layer and later ones) or PLT (to their own layer)."""
    n_layers: int
    d_model: int
    d_transcoder: int | None = None
    """Features per layer."""
    activation: str | None = None
    input_hook: str | None = None
    output_hook: str | None = None
    gigabytes: float | None = None
    """Size on disk, 10^9 bytes."""
    licence: str | None = None


GEMMA_2 = {"model": "google/gemma-2-2b", "n_layers": 26, "d_model": 2304}
LLAMA = {"model": "meta-llama/Llama-3.2-1B", "n_layers": 16, "d_model": 2048}


def _qwen3(size: str, repo: str, n_layers: int, d_model: int) -> PublicTranscoders:
    return PublicTranscoders(
        name=f"qwen3-{size.lower()}-plt",
        repo=f"mwhanna/{repo}",
        model=f"Qwen/Qwen3-{size}",
        kind="PLT",
        n_layers=n_layers,
        d_model=d_model,
    )


CATALOGUE = (
    PublicTranscoders(
        name="gemma-2-2b-plt",
        repo="mntss/gemma-scope-transcoders",
        kind="PLT",
        d_transcoder=16384,
        activation="jumprelu",
        input_hook="ln2.hook_normalized",
        output_hook="hook_mlp_out",
        licence="cc-by-4.0",
        **GEMMA_2,
    ),
    PublicTranscoders(
        name="gemma-2-2b-clt-426k", repo="mntss/clt-gemma-2-2b-426k", kind="CLT", d_transcoder=16384, **GEMMA_2
    ),
    PublicTranscoders(
        name="gemma-2-2b-clt-2.5m", repo="mntss/clt-gemma-2-2b-2.5M", kind="CLT", d_transcoder=98304, **GEMMA_2
    ),
    PublicTranscoders(name="llama-3.2-1b-plt", repo="mntss/transcoder-Llama-3.2-1B", kind="PLT", **LLAMA),
    PublicTranscoders(
        name="llama-3.2-1b-clt-524k", repo="mntss/clt-llama-3.2-1b-524k", kind="CLT", d_transcoder=32768, **LLAMA
    ),
    PublicTranscoders(
        name="llama-3.2-1b-skip-plt",
        repo="EleutherAI/Llama-3.2-1B-mntss-skip-transcoder",
        kind="PLT",
        input_hook="mlp.hook_in",
        output_hook="mlp.hook_out",
        **LLAMA,
    ),
    PublicTranscoders(
        name="llama-3.1-8b-instruct-plt",
        repo="facebook/crv-8b-instruct-transcoders",
        model="meta-llama/Llama-3.1-8B-Instruct",
        kind="PLT",
        n_layers=32,
        d_model=4096,
        activation="topk",
    ),
    _qwen3("0.6B", "qwen3-0.6b-transcoders-lowl0", 28, 1024),
    _qwen3("1.7B", "qwen3-1.7b-transcoders-lowl0", 28, 2048),
    _qwen3("4B", "qwen3-4b-transcoders", 36, 2560),
    _qwen3("8B", "qwen3-8b-transcoders", 36, 4096),
    _qwen3("14B", "qwen3-14b-transcoders-lowl0", 40, 5120),
    PublicTranscoders(
        name="gpt-oss-20b-clt", repo="mntss/clt-131k", model="openai/gpt-oss-20b", kind="CLT", n_layers=24, d_model=2880
    ),
    PublicTranscoders(
        name="gemma-3-27b-plt-262k",
        repo="mwhanna/gemma-scope-2-27b-pt/transcoder_all/width_262k_l0_small",
        model="google/gemma-3-27b-pt",
        kind="PLT",
        n_layers=62,
        d_model=5376,
        d_transcoder=262144,
        activation="jumprelu",
    ),
)


def public_transcoders() -> tuple[PublicTranscoders, ...]:
    """Public CLTs and sets of per-layer transcoders that `CrossLayerTranscoder.from_pretrained` knows by name."""
    return CATALOGUE


def find(name: str) -> PublicTranscoders | None:
    """The entry of this name, or of this repository (with or without a revision)."""
    bare = name.partition("@")[0]
    return next((entry for entry in CATALOGUE if bare in (entry.name, entry.repo)), None)


def check_fits(clt: str, model: str, shape: tuple[int, int] | None) -> None:
    """Raise if the catalogue tells, before anything is downloaded, that a CLT is of another model's shape.

    Args:
        clt: what `from_pretrained` is to load.
        model: the model's name, for the message.
        shape: its number of layers and d_model, or None where they are not known.

    Raises:
        CLTMismatch: the shapes differ.
    """
    entry = find(clt)
    if entry is not None and shape is not None and shape != (entry.n_layers, entry.d_model):
        raise CLTMismatch(
            f"'{clt}' was made for {entry.model} ({entry.n_layers} layers of width {entry.d_model}), but '{model}' has"
            f" {shape[0]} layers of width {shape[1]}. Give --model {entry.model}, or a CLT of this model"
            " (`tl-clt list`). Nothing was downloaded."
        )


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


def parse(address: str) -> HubPath:
    """Repository, path and revision of an address on the hub.

    Raises:
        FormatError: the text is no such address.
    """
    text = address.removeprefix(URI)
    text, _, revision = text.partition("?revision=") if "?" in text else text.partition("@")
    owner, _, rest = text.rstrip("/").partition("/")
    name, _, path = rest.partition("/")
    if not owner or not name or "?" in text or ".." in path.split("/"):
        bundled = bundled_organisms()
        names = [*bundled, *(entry.name for entry in CATALOGUE)]
        alike = get_close_matches(address.lower(), names, n=2, cutoff=0.5)
        raise FormatError(
            f"'{address}' is neither a folder here nor a hub repository that can be reached, nor a bundled organism"
            f" ({', '.join(bundled)}), nor a name that `tl-clt list` gives: repositories are written owner/repo,"
            f" owner/repo/folder or {URI}owner/repo/file, with @revision behind it where one is meant."
            + (f" Nearest names: {', '.join(alike)}." if alike else "")
        )
    return HubPath(f"{owner}/{name}", path, revision or None)


def fetch_file(hub_path: HubPath) -> Path:
    """One file, downloaded unless it is cached."""
    with hub_or_cache() as unreached:
        try:
            return Path(hf_hub_download(hub_path.repo, hub_path.path, revision=hub_path.revision))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise _unreachable(hub_path, error, unreached) from error


def fetch_folder(hub_path: HubPath, patterns: list[str]) -> Path:
    """The files of a folder (and its sub-folders) that match one of the patterns."""
    wanted = [hub_path.file(pattern) for pattern in patterns]
    with hub_or_cache() as unreached:
        try:
            whole = Path(snapshot_download(hub_path.repo, revision=hub_path.revision, allow_patterns=wanted))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise _unreachable(hub_path, error, unreached) from error
    return whole / hub_path.path


def _unreachable(hub_path: HubPath, error: Exception, unreached: str) -> FormatError | NotWritten:
    place = f"{hub_path.repo}/{hub_path.path}".rstrip("/") + (f"@{hub_path.revision}" if hub_path.revision else "")
    if isinstance(error, OSError) and error.errno in NO_PLACE:
        return NotWritten(
            f"'{place}' could not be downloaded: the cache '{constants.HF_HUB_CACHE}' takes nothing"
            f" ({error.strerror}). Make room there, or set HF_HOME to a folder on another disk; what was downloaded"
            " is taken up again."
        )
    return FormatError(
        f"'{place}' is neither a folder here nor a hub repository that can be reached"
        f" ({type(error).__name__}).{unreached} Check the path or name, the revision and the connection; a gated"
        " repository also needs `hf auth login`. `tl-clt list` names public transcoders."
    )
