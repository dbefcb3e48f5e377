"""Damaged files: seeded mutations of every file that this package reads, and what became of them.

A load of damaged files may succeed, where what it read is in order, or raise an error of `tl_clt.errors`; anything
else is a fault. `python -m tests.mutations --n 10000` mutates the files of each loader as often and prints a table;
each loader has a process of its own, which may not grow by more than `ROOM`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import resource
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from tests.models import tiny_clt
from tests.training.conftest import D_MODEL, D_VOCAB, N_CTX, N_LAYERS, tiny_model
from tests.training.conftest import config as training_config
from tests.transcoder.layouts import LAYOUTS as PUBLIC_LAYOUTS
from tl_clt.attribution.edges import CSR, NodeKind, Nodes, from_csr
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.targets import DirectionTarget, TokenTarget
from tl_clt.errors import TlCltError
from tl_clt.evaluation import EvaluationReport, GraphNumbers
from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig
from tl_clt.training.clt import TrainingCLT
from tl_clt.training.data import cache as cache_files
from tl_clt.training.data.cache import ActivationCache
from tl_clt.training.parallel import SINGLE
from tl_clt.training.run import checkpoints
from tl_clt.training.run.checkpoints import position_of, restore, scale_of
from tl_clt.training.run.runner import Start
from tl_clt.training.run.trainer import CLTTrainer
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.viewer import load_neuronpedia, save_neuronpedia
from tl_clt.viewer.tables import evaluation_table, layer_table

ROOM = 2**30
"""Bytes of address space that a process may take on top of what it has after its imports. The files hold a few KiB."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
OTHER_DTYPES = (*ITEM_BYTES, "U64", "U32", "U16", "F8_E4M3", "F8_E5M2", "C64", "F4", "X9", 3, None)
NUMBERS = (0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 2**100, 10**400)
STRANGE = (None, True, False, "", "x", "\x00", "\ud800", "é" * 5000, [], {}, [[]], [None] * 3, {"a": 1}, 0.5, -1e308)
STRANGE_TEXT = (
    "[" * 100_000,
    '{"a":' * 100_000,
    "- " * 20_000,
    "a: &a [*a]\n",
    "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)},' * 9}]\n" for i in range(20)),
    "n_layers: 0x" + "f" * 10_000 + "\n",
    "n_layers: 1:" + "59:" * 3000 + "0\n",
    "tl_clt: {1: 2, null: 3}\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "a: 2001-99-99\n",
    "a: !!binary x\n",
    "a: !!python/name:os.system\n",
    "--- a\n--- b\n",
    '{"n_layers": ' + "9" * 10_000 + "}",
    '{"n_layers": 1e999, "d_model": NaN}',
    "null",
    "3",
    "[]",
    "",
)


class Loader(NamedTuple):
    """Something that reads files."""

    make: Callable[[Path], None]
    """Write good files into a folder."""
    load: Callable[[Path, random.Random], None]
    """Read them, in one of the ways that there are, and use what was read."""
    sign: Callable[[Path], None] | None = None
    """Make checksums right again after a mutation, so that what stands behind them is read."""


class Outcome(NamedTuple):
    """What became of some mutations of one loader's files."""

    loads: int
    refusals: Counter[str]
    """By the error's name."""
    faults: list[str]
    """Each with its mutation and its traceback."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Within, this process may grow by `ROOM` and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- mutations of bytes --------------------------------------------------------------------------------------


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    # Half of them near the start or the end, where headers and directories are.
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        near = rng.choice((len(data), len(data), 64, 512))
        at = rng.randrange(max(1, min(near, len(data))))
        if data:
            changed[at if rng.random() < 0.7 else -1 - at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), min(len(data), rng.randrange(16)), max(0, len(data) - 1)))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 8, 100))) + data[at:]


def zero_range(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 8, 64, 4096)))
    return data[:start] + bytes(end - start) + data[end:]


def copy_range(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a part with another one of the same file."""
    n = min(len(data), rng.choice((1, 4, 30, 200)))
    source, target = rng.randrange(len(data) - n + 1), rng.randrange(len(data) - n + 1)
    return data[:target] + data[source : source + n] + data[target + n :]


BYTES = (flip_bits, truncate, insert, zero_range, copy_range)


# -- mutations of values ----------------------------------------------------------------------------------------


def strange_value(value: Any, rng: random.Random) -> Any:
    """Another value in the place of one: of another type, huge, negative, or a little off."""
    if isinstance(value, str) and rng.random() < 0.4:
        return rng.choice((value + "x", value[:-1], value.upper(), value * 300, "../" + value, "/" + value))
    if isinstance(value, list) and value and rng.random() < 0.5:
        return rng.choice((value[:-1], value + value, value[::-1], [value], value * 300))
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-2, -1, 1, 2))
    return rng.choice((*NUMBERS, *STRANGE))


def edit(value: Any, rng: random.Random) -> Any:
    """A tree of dicts and lists with one thing renamed, dropped, added or replaced somewhere in it."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.3:
            return {(f"{k}x" if k == key else k): v for k, v in value.items()}
        if how < 0.4:
            return value | {rng.choice(("extra", "", "k", "dtype", "transcoders", "tl_clt")): rng.choice(STRANGE)}
        return value | {key: edit(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], edit(value[at], rng), *value[at + 1 :]]
    return strange_value(value, rng)


def edit_config(name: str, data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return rng.choice(STRANGE_TEXT).encode()
    is_json = name.endswith(".json")
    edited = edit(json.loads(data) if is_json else yaml.safe_load(data), rng)
    written = json.dumps(edited) if is_json else yaml.safe_dump(edited, sort_keys=False)
    return written.encode("utf-8", "surrogatepass")


# -- mutations of safetensors -----------------------------------------------------------------------------------


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join_safetensors(header: Any, body: bytes, n: int | None = None) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if n is None else n) + text + body


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Its length, its JSON, or a tensor's dtype, shape or place in the file, whatever follows from it."""
    header, body = split_safetensors(data)
    how = rng.random()
    if how < 0.15:
        return join_safetensors(header, body, rng.choice((0, 1, 2**20, 10**8, 2**31, 2**40, 2**63 - 1, 2**64 - 1)))
    if how < 0.2:
        text = rng.choice((b"[" * 10_000, b'{"a":' * 10_000, b"\xff" * 9, b"{}", b'{"":' + b" " * 10_000))
        return struct.pack("<Q", len(text)) + text + body
    if how < 0.4:
        return join_safetensors(edit(header, rng), body)
    name = rng.choice([key for key in header if key != "__metadata__"])
    about = header[name]
    if how < 0.55:
        about["dtype"] = rng.choice(OTHER_DTYPES)
    elif how < 0.8:
        about["shape"] = strange_shape(about["shape"], rng)
    else:
        about["data_offsets"][rng.randrange(2)] = rng.choice((0, 1, len(body), len(body) + 8, -1, 2**40, 2**63))
    return join_safetensors(header, body)


def strange_shape(shape: list[int], rng: random.Random) -> Any:
    choices: list[Any] = [[], [*shape, 1], [1, *shape], shape[::-1], [math.prod(shape)], [0, *shape], [-1, *shape]]
    if shape:
        at = rng.randrange(len(shape))
        choices += [[*shape[:at], n, *shape[at + 1 :]] for n in (0, 1, shape[at] + 1, 2**20, 2**62, 2**64)]
    return rng.choice(choices)


def edit_tensor(data: bytes, rng: random.Random) -> bytes:
    """One tensor of another shape, dtype, name or value, in a file that is in order."""
    header, body = split_safetensors(data)
    tensors = {k: (v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items() if "dtype" in v}
    name = rng.choice(list(tensors))
    dtype, shape, values = tensors[name]
    match rng.randrange(8):
        case 0:
            tensors[name + "x"] = tensors.pop(name)
        case 1:
            del tensors[name]
        case 2:
            other = rng.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case 3:
            shape = [n if isinstance(n, int) and 0 <= n < 64 else 3 for n in strange_shape(shape, rng)]
            tensors[name] = (dtype, shape, rng.randbytes(math.prod(shape) * ITEM_BYTES[dtype]))
        case 4:
            dtype = rng.choice(list(ITEM_BYTES))
            tensors[name] = (dtype, shape, bytes(math.prod(shape) * ITEM_BYTES[dtype]))
        case 5:
            huge = {"F32": (math.nan, math.inf, 3e38), "F64": (math.nan, -math.inf, 1e308), "I64": (-1, 2**62, 99)}
            if dtype in huge and values:
                new = struct.pack({"F32": "<f", "F64": "<d", "I64": "<q"}[dtype], rng.choice(huge[dtype]))
                at = rng.randrange(len(values) // len(new)) * len(new)
                tensors[name] = (dtype, shape, values[:at] + new + values[at + len(new) :])
        case 6:
            # Wide and empty: 0 bytes in the file, whatever stands beside the 0.
            tensors[name] = (dtype, rng.choice(([0], [0, 2**40], [2**31, 0], [2**62, 2**62, 0])), b"")
        case 7:
            tensors[rng.choice(("extra", "W_skip", "threshold_0", "dropped", "adjacency"))] = tensors[name]
    place, entries = 0, {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    for key, (dtype, shape, values) in tensors.items():
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(values)]}
        place += len(values)
    return join_safetensors(entries, b"".join(values for *_, values in tensors.values()))


def edit_about(data: bytes, rng: random.Random) -> bytes:
    """What a metadata entry that holds JSON says."""
    header, body = split_safetensors(data)
    metadata = header.get("__metadata__", {})
    as_json = [key for key, text in metadata.items() if text[:1] in "{["]
    if not as_json:
        return edit_header(data, rng)
    key = rng.choice(as_json)
    if rng.random() < 0.15:
        metadata[key] = rng.choice(STRANGE_TEXT)
    else:
        metadata[key] = json.dumps(edit(json.loads(metadata[key]), rng))
    return join_safetensors(header, body)


# -- mutations of .npz ------------------------------------------------------------------------------------------


def edit_npz(data: bytes, rng: random.Random) -> bytes:
    """An array of another shape, dtype or name; an array's header; a bomb; something in the archive's directory."""
    with np.load(io.BytesIO(data)) as opened:
        arrays = dict(opened)
    name = rng.choice(list(arrays))
    out = io.BytesIO()
    how = rng.choices(range(7), (10, 10, 10, 10, 1, 10, 5))[0]  # Bombs take long to make.
    if how == 0:
        arrays[rng.choice(("other", name + "x", "W_enc", "w_enc"))] = arrays.pop(name)
    elif how == 1:
        new: list[Any] = [
            *(np.zeros((), "f4"), np.zeros((0, 3), "f4"), arrays[name][..., None], arrays[name][1:]),
            *(arrays[name].astype(t) for t in ("f8", "f2", "i4", "?", "c8", "U5", ">f4", "f4,i4", "M8[s]")),
            *(np.full_like(arrays[name], math.nan), np.asfortranarray(arrays[name]), np.array([{}], dtype=object)),
        ]
        arrays[name] = rng.choice(new)
    elif how == 2:
        return edit_zip_directory(data, rng)
    if how in (0, 1):
        rng.choice((np.savez, np.savez_compressed))(out, **arrays)
        return out.getvalue()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            content = member.getvalue()
            if key == name and how == 3:
                content = rng.choice(BYTES)(content[: len(content) - array.nbytes], rng) + array.tobytes()
            if key == name and how == 4:
                bomb = np.lib.format.header_data_from_array_1_0(array) | {"shape": (2**24,)}
                member = io.BytesIO()
                np.lib.format.write_array_header_1_0(member, bomb)
                content = member.getvalue() + bytes(2**26)
            if key == name and how == 5:
                content = npy_header(rng, array) + array.tobytes()
            extra = rng.choice(("", "", "/", ".txt", "\x00")) if how == 6 else ""
            archive.writestr(key + (".npy" if key != name or not extra else extra), content)
    return out.getvalue()


def npy_header(rng: random.Random, array: np.ndarray) -> bytes:
    """The start of an array's file, with a header of another make."""
    shape = rng.choice(("()", "(-1,)", "(0,)", str(2**40), f"({2**40},)", f"({2**62}, {2**62})", "(True, 2)", "'x'"))
    text = rng.choice(
        (
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}",
            f"{{'descr': {rng.choice(('3', 'None', '()', '[(1,2)]', repr('O'), repr('|V0'), repr('<f4,')))},"
            f" 'fortran_order': False, 'shape': {array.shape}, }}",
            f"{{'descr': '<f4', 'fortran_order': 3, 'shape': {array.shape}, }}",
            "{1: 2, 'x': 3}",
            "[" * 9000,
            "-" * 9000 + "1",
            "{" + " " * 70_000 + "}",
            "(",
            "'",
            "\\",
            "0777",
        )
    ).encode()
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    length = struct.pack("<H", min(len(text), 65535)) if version == (1, 0) else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes(version) + rng.choice((length, b"\xff" * len(length))) + text


def edit_zip_directory(data: bytes, rng: random.Random) -> bytes:
    """A field of an entry in the central directory, or of the record at its end."""
    changed = bytearray(data)
    entry, end = data.find(b"PK\x01\x02"), data.rfind(b"PK\x05\x06")
    for _ in range(rng.randrange(5)):
        entry = max(entry, data.find(b"PK\x01\x02", entry + 1))
    if rng.random() < 0.7:
        # version, flags, method, crc, compressed size, size, name's length, extra's, comment's, ..., local header
        at, size = rng.choice(((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)))
        at += entry
    else:
        at, size = rng.choice(((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))
        at += end
    values = (0, 1, 8, 12, 14, 99, 2**16 - 1, 2**31, 2**32 - 1, rng.randrange(2**32))
    changed[at : at + size] = (rng.choice(values) % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(changed)


# -- which mutation ---------------------------------------------------------------------------------------------


def mutate(name: str, data: bytes, rng: random.Random) -> tuple[str, bytes | None]:
    """What was done to a file, and what it holds now; None where it is gone."""
    if rng.random() < 0.01:
        return "removed", None
    if rng.random() < 0.35:
        how = rng.choice(BYTES)
        return how.__name__, how(data, rng)
    if name.endswith(".npz"):
        return "edit_npz", edit_npz(data, rng)
    if name.endswith(".safetensors"):
        how = rng.choice((edit_header, edit_tensor, edit_tensor, edit_about))
        return how.__name__, how(data, rng)
    return "edit_config", edit_config(name, data, rng)


def run(name: str, n: int, seed: int) -> Outcome:
    """Mutate one file, sometimes two, of a loader's `n` times."""
    loader, rng = LOADERS[name], random.Random(f"{name} {seed}")
    loads, refusals, faults = 0, Counter[str](), []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "files"
        folder.mkdir()
        torch.manual_seed(0)
        np.random.seed(0)
        loader.make(folder)
        good = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        loader.load(folder, rng)
        for number in range(n):
            touched = rng.sample(sorted(good), rng.choice((1, 1, 1, min(2, len(good)))))
            done = []
            for path in touched:
                how, data = mutate(path.name, good[path], rng)
                done.append(f"{path}: {how}")
                if data is None:
                    (folder / path).unlink()
                else:
                    (folder / path).write_bytes(data)
            if loader.sign is not None and rng.random() < 0.7:
                loader.sign(folder)
                touched = list(good)
            try:
                loader.load(folder, rng)
                loads += 1
            except TlCltError as error:
                refusals[type(error).__name__] += 1
            except Exception:
                faults.append(f"{name} {number} ({'; '.join(done)})\n{traceback.format_exc()}")
            for path in touched:
                (folder / path).write_bytes(good[path])
    return Outcome(loads, refusals, faults)


# -- loaders ----------------------------------------------------------------------------------------------------


def use_clt(folder: Path, rng: random.Random) -> None:
    clt = CrossLayerTranscoder.from_pretrained(folder, lazy_decoder=rng.random() < 0.5)
    cfg = clt.cfg
    assert clt.W_enc.shape == (cfg.n_layers, cfg.d_model, cfg.d_transcoder)
    for source in clt.layers:
        rows = clt.decoder_rows(source, torch.tensor([0, cfg.d_transcoder - 1]))
        assert rows.shape == (2, len(cfg.targets(source)), cfg.d_model) and rows.dtype == clt.W_enc.dtype
    clt(torch.ones(2, cfg.n_layers, cfg.d_model, dtype=clt.W_enc.dtype))


def from_public(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        folder.rmdir()
        make(folder)

    return into


def of_own_layout(layout: str, **kinds: Any) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        tiny_clt((3, 6), d_transcoder=8, dtype=torch.float32, **kinds).save_pretrained(folder, layout)  # type: ignore[arg-type]

    return into


def a_graph(*, sparse: bool, few: bool = False) -> AttributionGraph:
    """4 features of 2 layers, errors, tokens, a bias and 2 logits; edges from all below."""
    kind = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 4, 5, 5])
    layer = torch.tensor([0, 0, 1, 1, 0, 1, -1, -1, -1, 0, 2, 2])
    pos = torch.tensor([1, 2, 1, 2, 1, 2, 0, 1, 2, -1, 2, 2])
    index = torch.tensor([3, 5, 2, 2, 0, 0, 7, 8, 9, 0, 4, 6])
    leaf = ~torch.isin(kind, torch.tensor([int(NodeKind.FEATURE), int(NodeKind.LOGIT)]))
    rank = torch.where(leaf, -1, layer)
    adjacency = torch.randn(12, 12) * (rank[:, None] > rank[None, :])
    expanded = ~leaf
    if few:
        expanded[:4] = False
        adjacency[:4] = 0
    if sparse:
        row, col = torch.nonzero(adjacency, as_tuple=True)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(row, minlength=12).cumsum(0)])
        values = adjacency[row, col]
        adjacency = from_csr(CSR(starts.int(), col.int(), values))
    return AttributionGraph(
        nodes=Nodes(kind, layer, pos, index, torch.rand(12)),
        adjacency=adjacency,
        expanded=expanded,
        tokens=torch.tensor([7, 8, 9]),
        prompt_tokens=["a", "b", "c"],
        logit_probs=torch.tensor([0.6, 0.3]),
        logit_tokens=["d", "e"],
        dropped=torch.rand(12) * expanded if sparse else None,
        contrast_activation=torch.rand(12) if few else None,
        targets=[TokenTarget(4), DirectionTarget(torch.ones(6), "blocks.1.hook_resid_post")] if few else None,
        info={"prompt": "abc", "model": "m", "settings": {"k": 1, "list": [1, 2]}},
    )


def graph_file(**kinds: bool) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        a_graph(**kinds).save(folder / "graph.safetensors")

    return into


def graph_of_viewers(*, own: bool) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        path = save_neuronpedia(a_graph(sparse=own), folder / "graph.json", scan="m")
        if not own:
            path.write_text(json.dumps(as_others_write_it(json.loads(path.read_text()))))

    return into


def as_others_write_it(values: dict[str, Any]) -> dict[str, Any]:
    """A graph for other viewers without what this package alone writes and reads."""
    metadata = {name: value for name, value in values["metadata"].items() if name != "tl_clt"}
    nodes = [{name: value for name, value in node.items() if name != "tl_clt"} for node in values["nodes"]]
    return {**values, "metadata": metadata, "nodes": nodes}


def use_graph_of_viewers(folder: Path, rng: random.Random) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not tell what was pruned away")
        graph = load_neuronpedia(folder / "graph.json")
    graph.save(folder / "graph.safetensors")
    try:
        assert AttributionGraph.load(folder / "graph.safetensors") == graph
        use_graph(folder, rng)
    finally:
        (folder / "graph.safetensors").unlink()


def use_graph(folder: Path, _: random.Random) -> None:
    graph = AttributionGraph.load(folder / "graph.safetensors")
    results = (graph.influence(), *graph.scores(), *graph.scores("circuit-tracer"), *graph.shares())
    graph.path_length()
    # Shares of nothing are no numbers, nor are quotients of the shortest floats.
    if graph.logit_probs.sum() > 0 and graph.adjacency.dtype in (torch.float32, torch.float64):
        assert not any(torch.as_tensor(values).isnan().any() for values in results)
    repr(graph.prune())
    repr(graph)


class Run(NamedTuple):
    """A training run of two steps that wrote a checkpoint after each."""

    cfg: CLTTrainingRunnerConfig
    start: Start
    """What the runner knew of the model."""
    fresh: Callable[[], CLTTrainer]
    """A trainer of the same run before its first step."""


@cache
def a_run(folder: Path) -> Run:
    """Made once for a folder; the checkpoints are in it."""
    cfg = training_config(
        d_transcoder=4,
        k=2,
        training_tokens=48,
        train_batch_size_tokens=16,
        checkpoint_every=1,
        n_eval_prompts=2,
        n_batches_in_buffer=4,
        store_batch_size_prompts=4,
        checkpoint_path=str(folder),
        lr_warm_up_steps=1,
        prefetch=False,
    )
    runner = CLTTrainingRunner(cfg, model=tiny_model(), dataset=torch.arange(60 * N_CTX).reshape(60, N_CTX) % D_VOCAB)
    runner.run()
    start = Start(N_LAYERS, D_MODEL, N_CTX, "tiny", None, "", None)

    def fresh() -> CLTTrainer:
        sae = TrainingCLT(runner._clt_config(start, None), grid=SINGLE)
        return CLTTrainer(cfg=runner._trainer_config(None), sae=sae, data_provider=None)

    return Run(cfg, start, fresh)


def make_checkpoints(folder: Path) -> None:
    a_run(folder)


def use_checkpoint(folder: Path, _: random.Random) -> None:
    run = a_run(folder)
    checkpoint = checkpoints.find_checkpoint(run.cfg, folder)
    checkpoints.require_same_model(checkpoint, checkpoint.about["model_fingerprint"])
    saved = checkpoints.read_checkpoint(checkpoint, "cpu")
    position_of(saved)
    scale_of(saved, N_LAYERS)
    restore(run.fresh(), saved)
    assert math.isfinite(checkpoint.about["seconds"])


def sign_checkpoints(folder: Path) -> None:
    for manifest in folder.glob(f"*/{checkpoints.MANIFEST}"):
        try:
            values = json.loads(manifest.read_bytes())
            for name in values["files"]:
                values["files"][name] = checkpoints._size_and_sha256(manifest.parent / name)
            text = json.dumps(values)
        except Exception:  # the manifest itself is damaged
            continue
        manifest.write_text(text)


TOKENS = torch.arange(12).reshape(3, 4)


def use_cache(folder: Path, _: random.Random | None = None) -> None:
    values = torch.linspace(-1, 1, 12 * 2 * 2 * 5).reshape(12, 2, 2, 5)

    def activations(shift: int) -> torch.Tensor:
        return opened.read(TOKENS + shift, lambda _: values)

    for shift in (0, 1):
        opened = ActivationCache(folder, "m", ["a", "b", "c", "d"], "int8", "tiny")
        activations(shift)
    # A shard that is new makes the index anew.
    opened = ActivationCache(folder, "m", ["a", "b", "c", "d"], "int8", "tiny")
    activations(2)
    (opened.folder / f"{opened._name_of(TOKENS + 2)}.safetensors").unlink()


def sign_cache(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata["sha256"] = cache_files._checksum(tensors)
            save_file(tensors, path, metadata)
        except Exception:  # not readable at all
            continue


def a_report(folder: Path) -> None:
    per_layer = [0.25, 0.5]
    report = EvaluationReport(
        model="m",
        clt=tiny_clt((2, 6)).cfg.to_dict(),
        n_prompts=3,
        n_tokens=20,
        **{f"{name}_per_layer": per_layer for name in ("explained_variance", "nmse", "l0", "dead_share")},
        **dict.fromkeys(("explained_variance", "nmse", "dead_share", "top1_agreement", "kl_divergence"), 0.375),
        density_edges=[0.001, 0.1, 1.0],
        density_counts=[[3, 4], [5, 6]],
        n_uncertain=4,
        top1_agreement_uncertain=0.5,
        n_predicted=5,
        cross_entropy=1.0,
        cross_entropy_replaced=2.0,
        cross_entropy_ablated=None,
        decoder_norm_by_distance=per_layer,
        written_share_by_distance=per_layer,
        graphs=[GraphNumbers(**{field.name: 0.5 for field in fields(GraphNumbers)})],
    )
    (folder / "report.json").write_text(report.to_json())


def use_report(folder: Path, rng: random.Random) -> None:
    path = folder / "report.json"
    # Text alone is its reader's: undecodable bytes are the caller's error, as is a file that is gone.
    report = EvaluationReport.from_json(path.read_text(errors="replace") if path.is_file() else "")
    Console(file=io.StringIO()).print(evaluation_table(report), layer_table(report))
    report.to_json()


LOADERS: dict[str, Loader] = {
    **{
        name: Loader(make, use_clt)
        for name, make in {
            "native": of_own_layout("native"),
            "native-topk-skip": of_own_layout("native", activation="topk", skip=True, span=2),
            "circuit-tracer": of_own_layout("circuit-tracer", span=2),
            "circuit-tracer-plt": of_own_layout("circuit-tracer", span=1, skip=True),
            **{name: from_public(make) for name, make in PUBLIC_LAYOUTS.items()},
        }.items()
    },
    "graph": Loader(graph_file(sparse=False), use_graph),
    "graph, sparse": Loader(graph_file(sparse=True), use_graph),
    "graph, few rows": Loader(graph_file(sparse=False, few=True), use_graph),
    "graph of viewers": Loader(graph_of_viewers(own=True), use_graph_of_viewers),
    "graph of other programs": Loader(graph_of_viewers(own=False), use_graph_of_viewers),
    "checkpoint": Loader(make_checkpoints, use_checkpoint, sign_checkpoints),
    "activation cache": Loader(use_cache, use_cache, sign_cache),
    "evaluation report": Loader(a_report, use_report),
}


def main() -> None:
    """One process a loader; a line of the table for each, and the faults if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="mutations of each loader's files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loader", action="append", choices=list(LOADERS), help="only these")
    parser.add_argument("--within", action="store_true", help="in this process; its memory is bounded")
    args = parser.parse_args()
    for name in args.loader or LOADERS:
        if not args.within:
            command = [sys.executable, "-m", "tests.mutations", "--within", "--loader", name]
            subprocess.run([*command, "--n", str(args.n), "--seed", str(args.seed)], check=False)
            continue
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with bounded_memory():
            outcome = run(name, args.n, args.seed)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        refused = ", ".join(f"{count} {error}" for error, count in outcome.refusals.most_common())
        print(f"| {name} | {args.n} | {outcome.loads} | {refused} | {len(outcome.faults)} | {grown:.0f} MiB |")
        kinds = Counter(fault.rstrip().splitlines()[-1][:150] for fault in outcome.faults)
        for kind, count in kinds.most_common():
            example = next(fault for fault in outcome.faults if fault.rstrip().splitlines()[-1].startswith(kind))
            print(f"\n{count} x {kind}\n{example}", flush=True)


if __name__ == "__main__":
    main()
