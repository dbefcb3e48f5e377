"""What every layout's reader shares: configs, numbered files and decoders, with errors that tell the mend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from tl_clt.errors import FormatError
from tl_clt.transcoder.decoders import Decoders, DecoderSource, DenseDecoders, LazyDecoders
from tl_clt.transcoder.tensor_files import open_tensors


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML mapping, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise FormatError(f"'{path}' cannot be read ({error}). Copy or download it again.") from error
    if not isinstance(values, dict):
        raise FormatError(f"'{path}' holds no mapping of names to values. It is not a CLT's config.")
    return values


def numbered_files(folder: Path, prefix: str) -> list[Path]:
    """`{prefix}{i}.safetensors` for i = 0, 1, ... without a gap."""
    found = sorted(
        int(p.stem.removeprefix(prefix))
        for p in folder.glob(f"{prefix}*.safetensors")
        if p.stem.removeprefix(prefix).isdigit()
    )
    if found != list(range(len(found))):
        missing = sorted(set(range(found[-1])) - set(found))
        raise FormatError(f"'{folder}' lacks {prefix}{missing[0]}.safetensors. Copy or download the CLT again, whole.")
    return [folder / f"{prefix}{i}.safetensors" for i in found]


def read_decoders(
    sources: Sequence[DecoderSource],
    n_writes: Sequence[int],
    d_transcoder: int,
    d_model: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    lazy: bool,
) -> Decoders:
    """Check that every file holds the decoder it should; read all of them, or leave them on disk."""
    for source, slots in zip(sources, n_writes, strict=True):
        with open_tensors(source.path) as tensors:
            source.check(tensors, d_transcoder, slots, d_model)
    on_disk = LazyDecoders(sources, n_writes, d_transcoder, dtype, device)
    return on_disk if lazy else DenseDecoders([on_disk[s] for s in range(len(sources))])
