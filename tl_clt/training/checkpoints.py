"""Checkpoints on disk: all or nothing, with a checksum of every file.

    FOLDER/step_00001000/
        checkpoint.json           the run's config, and size and sha256 of every other file
        weights.safetensors       by parameter name, as are Adam's moments in
        exp_avg.safetensors, exp_avg_sq.safetensors
        feature_counts.safetensors, random.safetensors, data.safetensors
        state.json                counters, schedules, data position

The data's position is a list of the tokens that wait in the shuffling buffer; their activations are made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_clt.errors import CheckpointError, NotWritten
from tl_clt.files import READING_ERRORS, read_json
from tl_clt.training.gathering import own_share
from tl_clt.training.sharding import SINGLE, ProcessGrid
from tl_clt.training.state import TrainingState, readable

MANIFEST = "checkpoint.json"
VALUES = "state.json"
SUFFIX = ".safetensors"
PREFIX = "step_"
UNFINISHED = f".{PREFIX}"
FORMAT = 1
READ_AT_A_TIME = 2**24
PER_WEIGHT = ("weights", "exp_avg", "exp_avg_sq")
ON_CPU = ("random", "data")


class Checkpoint(NamedTuple):
    """A checkpoint whose files are whole."""

    folder: Path
    """Where it is."""

    step: int
    """Steps done."""

    about: dict[str, Any]
    """What `write` was given: the run's config and whatever else must be the same on resuming."""


def write(folder: Path, step: int, state: TrainingState, about: dict[str, Any], keep: int) -> None:
    """Write `folder/step_{step}` and remove all but the newest `keep` up to this step.

    It is made under another name, flushed to the disk and renamed: a run that is killed, or a full disk, leaves the
    earlier checkpoints as they were.

    Raises:
        NotWritten: the disk is full, for example.
    """
    final = folder / f"{PREFIX}{step:08d}"
    unfinished = folder / f"{UNFINISHED}{step:08d}.{secrets.token_hex(8)}"
    try:
        unfinished.mkdir(parents=True)
        _write_files(unfinished, state)
        files = {path.name: _size_and_sha256(path) for path in sorted(unfinished.iterdir())}
        manifest = {"format": FORMAT, "step": step, **about, "files": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*unfinished.iterdir(), unfinished):
            _flush(path)
        _remove(final)
        unfinished.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        raise NotWritten(
            f"'{final}' could not be written ({error}). Earlier checkpoints stay good: make room, or give a"
            " checkpoint_path on another disk, and resume from the newest."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in [path for path in _steps(folder) if _step(path) <= step][:-keep]:
        _remove(old)


def find(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or the newest in a folder of checkpoints, with every file checked.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names the newest good one beside it.
    """
    if path.name.startswith(PREFIX) and path.is_dir():
        folder, chosen = path.parent, path
    else:
        folder, chosen = path, next(reversed(_steps(path)), None)
    if chosen is None:
        raise CheckpointError(
            f"'{path}' holds no checkpoint (a folder {PREFIX}... with {MANIFEST}). Give the run's checkpoint_path,"
            " or start without resume."
        )
    fault = _fault(chosen)
    if fault is None:
        manifest = read_json((chosen / MANIFEST).read_text())
        about = {k: v for k, v in manifest.items() if k not in ("format", "step", "files")}
        return Checkpoint(chosen, manifest["step"], about)
    good = next((other for other in reversed(_steps(folder)) if other != chosen and _fault(other) is None), None)
    mend = f"The newest good one is '{good}': resume from that." if good else "There is no other good one: start anew."
    raise CheckpointError(f"Checkpoint '{chosen}' is damaged: {fault}. {mend}")


def read(checkpoint: Checkpoint, device: str | torch.device, grid: ProcessGrid = SINGLE) -> TrainingState:
    """Its state; random numbers and data position stay on the CPU. Of a CLT that is split among the ranks of a grid,
    each reads its own features: a checkpoint is of the whole CLT, whatever the number of ranks that made it.

    Raises:
        CheckpointError: a file is of another kind than its name says, though its checksum is right.
    """
    with readable(checkpoint.folder):
        tensors = {}
        for path in sorted(checkpoint.folder.glob("*" + SUFFIX)):
            if path.stem in PER_WEIGHT and grid.n_feature_shards > 1:
                tensors[path.stem] = _own_rows(path, device, grid)
            else:
                tensors[path.stem] = load_file(path, device="cpu" if path.stem in ON_CPU else str(device))
        return TrainingState(tensors, read_json((checkpoint.folder / VALUES).read_text()), checkpoint.folder)


def _own_rows(path: Path, device: str | torch.device, grid: ProcessGrid) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {name: own_share(name, file.get_slice(name), grid) for name in file.keys()}


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left half-written. Only one run at a time may write to a folder."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write_files(folder: Path, state: TrainingState) -> None:
    for group, tensors in state.tensors.items():
        on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(on_cpu, folder / f"{group}{SUFFIX}")
    (folder / VALUES).write_text(json.dumps(state.values, indent=2) + "\n")


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        manifest = read_json((folder / MANIFEST).read_text())
        if type(manifest["step"]) is not int or manifest["format"] != FORMAT:
            return f"{MANIFEST} is of format {manifest['format']}, and this version of tl_clt reads {FORMAT}"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes of {expected['size']}"
            if _size_and_sha256(path) != expected:
                return f"{name} does not have the checksum that {MANIFEST} states"
        unknown = {path.name for path in folder.iterdir()} - {MANIFEST, *manifest["files"]}
        if unknown:
            return f"{min(unknown)} is not among the files that {MANIFEST} names"
    except READING_ERRORS as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def _size_and_sha256(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_AT_A_TIME):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _steps(folder: Path) -> list[Path]:
    """Checkpoints of a folder, good or not, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _remove(folder: Path) -> None:
    """Remove a checkpoint, which is none any more as soon as this begins."""
    if folder.is_dir():
        gone = folder.rename(folder.with_name(f"{UNFINISHED}removed.{folder.name}"))
        shutil.rmtree(gone)


def _flush(path: Path) -> None:
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows has no such thing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
