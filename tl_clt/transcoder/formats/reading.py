"""What every layout's reader shares: configs, numbered files and decoders, with errors that tell the mend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from yaml.composer import ComposerError

from tl_clt.errors import FormatError
from tl_clt.transcoder.decoders import Decoders, DecoderSource, DenseDecoders, LazyDecoders
from tl_clt.transcoder.tensor_files import READING_ERRORS, open_tensors


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML mapping, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        values = read_json(text) if path.suffix == ".json" else yaml.load(text, PlainLoader)
    except (yaml.YAMLError, *READING_ERRORS) as error:
        raise FormatError(f"'{path}' cannot be read ({error}). Copy or download it again.") from error
    if not isinstance(values, dict):
        raise FormatError(f"'{path}' holds no mapping of names to values. It is not a CLT's config.")
    return values


def read_json(text: str) -> Any:
    """JSON without whole numbers of more than 64 bits, which no part of a file here has a use for.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return json.loads(text, parse_int=lambda digits: _require_64_bits(int(digits)))


class PlainLoader(yaml.SafeLoader):
    """YAML without code, without numbers of more than 64 bits, and with aliases of single values alone: aliases of
    lists and mappings can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise ComposerError(None, None, "an alias of a list or a mapping: write it out", None)
        return node

    def whole_number(self, node: Any) -> int:
        return _require_64_bits(self.construct_yaml_int(node))


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.whole_number)


def _require_64_bits(number: int) -> int:
    if abs(number) >= 2**64:
        raise ValueError("a whole number of more than 64 bits")
    return number


def numbered_files(folder: Path, prefix: str) -> list[Path]:
    """`{prefix}{i}.safetensors` for i = 0, 1, ... without a gap."""
    names = (path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.safetensors"))
    found = sorted({int(name) for name in names if name.isdecimal()})
    files = [folder / f"{prefix}{i}.safetensors" for i in range(len(found))]
    missing = next((files[i] for i, number in enumerate(found) if i != number), None)
    if missing is not None or not files:
        lacks = (missing or folder / f"{prefix}0.safetensors").name
        raise FormatError(f"'{folder}' lacks {lacks}. Copy or download the CLT again, whole.")
    return files


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
