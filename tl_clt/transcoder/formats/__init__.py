"""File layouts of a CLT, one module a layout. safetensors and JSON/YAML only: loading runs no code."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from tl_clt.bundled import bundled_folder
from tl_clt.errors import FormatError
from tl_clt.files import new_folder, read_config
from tl_clt.transcoder import hub
from tl_clt.transcoder.decoders import Weights, require_finite
from tl_clt.transcoder.formats import (
    circuit_tracer_clt,
    circuit_tracer_plt,
    gemma_scope,
    llamascopium,
    native,
    sparsify,
)

LAYOUTS: tuple[ModuleType, ...] = (
    native,
    circuit_tracer_clt,
    circuit_tracer_plt,
    gemma_scope,
    sparsify,
    llamascopium,
)
SAVE_LAYOUTS = ("native", "circuit-tracer")


def load(
    folder_or_hub_repo: str | Path,
    *,
    device: torch.device,
    dtype: str | torch.dtype | None,
    lazy_decoder: bool,
) -> Weights:
    """Load a CLT from a folder in any known layout, an organism's, or from a hub repository that holds one."""
    folder = _local_folder(folder_or_hub_repo)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    for layout in LAYOUTS:
        if layout.recognises(folder):
            weights = layout.load(folder, device=device, dtype=name, lazy_decoder=lazy_decoder)
            for of in weights.cfg.weight_shapes:
                require_finite(getattr(weights, of), of, folder)
            return weights
    raise FormatError(
        f"'{folder}' holds no CLT in a known layout: native (cfg.json and clt.safetensors), circuit-tracer CLT"
        " (W_enc_0.safetensors, W_dec_0.safetensors), circuit-tracer PLT set (layer_0.safetensors, or a config.yaml"
        " that lists transcoders), Gemma Scope 2 CLT (params_layer_0.safetensors), sparsify"
        " (layers.0.mlp/sae.safetensors) or llamascopium (config.json of sae_type clt). Gemma Scope 1 and 2 publish"
        " several transcoders of each layer: write a config.yaml that lists one a layer, in order, as files here or as"
        f" hf://owner/repo/path@revision under `transcoders:`.{_unverified(folder)} Check the path."
    )


def save(weights: Weights, folder: Path, layout: str) -> Path:
    """Write a CLT to a new or empty folder in the layout named, all or nothing."""
    if not isinstance(layout, str) or layout not in SAVE_LAYOUTS:
        raise FormatError(f"'{layout}' is no layout to save in: give one of {', '.join(SAVE_LAYOUTS)}.")
    writer = native
    if layout == "circuit-tracer":
        is_plt = weights.cfg.span == 1 and weights.cfg.n_layers > 1
        writer = circuit_tracer_plt if is_plt else circuit_tracer_clt
        writer.check_can_express(weights)
    with new_folder(folder) as unfinished:
        writer.save(weights, unfinished)
    return folder


def _local_folder(folder_or_hub_repo: str | Path) -> Path:
    folder = Path(folder_or_hub_repo).expanduser()
    if folder.is_dir() and str(folder_or_hub_repo).strip():
        return folder
    bundled = bundled_folder(folder_or_hub_repo, "clt")
    if bundled is not None:
        return bundled
    if folder.is_file():
        raise FormatError(f"'{folder}' is a file: give the folder that holds the CLT's files.")
    entry_of_catalogue = hub.find(str(folder_or_hub_repo))
    if entry_of_catalogue is None and _names_a_folder(folder_or_hub_repo):
        raise FormatError(
            f"'{folder_or_hub_repo}' is neither a folder here nor a hub repository that can be reached: there is no"
            " folder of this path. Check it."
        )
    revision = str(folder_or_hub_repo).partition("@")[2]
    hub_path = hub.parse(str(folder_or_hub_repo) if entry_of_catalogue is None else entry_of_catalogue.repo)
    hub_path = hub_path._replace(revision=hub_path.revision or revision or None)
    folder = hub.fetch_folder(hub_path, ["config.yaml", "config.json", "cfg.json"])
    listed = read_config(folder / "config.yaml").get("transcoders")
    if isinstance(listed, list):
        inside = [str(entry) for entry in listed if not str(entry).startswith(hub.URI)]
        return hub.fetch_folder(hub_path, [*inside, *(f"{entry}/*" for entry in inside)]) if inside else folder
    return hub.fetch_folder(hub_path, ["*.safetensors", "*.json", "*.yaml"])


def _names_a_folder(folder_or_hub_repo: str | Path) -> bool:
    """Whether this can only be meant as a folder here, and not as a place on the hub."""
    return (
        isinstance(folder_or_hub_repo, Path)
        or folder_or_hub_repo.startswith(("/", "./", "../", "~"))
        or "\\" in folder_or_hub_repo
    )


UNVERIFIED = {
    "model_config.json": "a single-file CLT with model_config.json",
    "manifest.json": "a CLT with a manifest.json",
}
"""Layouts that are said to be in use, but whose tensors' names no public loader states: refused, not guessed."""


def _unverified(folder: Path) -> str:
    for name, layout in UNVERIFIED.items():
        if (folder / name).is_file():
            return f" It looks like {layout}, whose names and orientations this package could not verify: convert it."
    return ""
