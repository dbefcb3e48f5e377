"""Public transcoders by name. What no page of their makers states is left out (None), not guessed."""

from __future__ import annotations

from dataclasses import dataclass

from tl_clt.errors import CLTMismatch


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
