"""Checkpoints: all that a step depends on, on disk and back, all or nothing, with a checksum of every file.

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
import math
import os
import secrets
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import wandb
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_clt.errors import CheckpointError, NotWritten, TlCltError, TrainingWarning
from tl_clt.files import READING_ERRORS, interrupted_beside, read_json, require_file, require_new
from tl_clt.training.clt import TrainingCLT
from tl_clt.training.config import CLTTrainingRunnerConfig
from tl_clt.training.data.batches import ActivationScale, ChunkPlace, DataCounts, Position
from tl_clt.training.parallel import SINGLE, ProcessGrid, is_shared
from tl_clt.training.run.trainer import CLTTrainer, require_finite_weights

# -- from the shares that several ranks hold to the whole CLT, and back


@torch.no_grad()
def gather(name: str, own: Tensor, grid: ProcessGrid) -> Tensor | None:
    """A weight, or anything of its shape (a gradient, a moment), whole and in main memory; None but on the main rank.

    Every rank of the first row has to call it, in the same order; other rows may.
    """
    if is_shared(name) or grid.n_feature_shards == 1:
        return own.detach().cpu() if grid.is_main else None
    if grid.data_index > 0:
        return None
    # Only the main rank makes room for the shares of others.
    shares = [torch.empty_like(own) for _ in range(grid.n_feature_shards)] if grid.is_main else None
    dist.gather(own.detach().contiguous(), shares, dst=0, group=grid.feature_group)
    return None if shares is None else torch.cat([share.cpu() for share in shares])


def gather_all(values: Mapping[str, Tensor], grid: ProcessGrid) -> dict[str, Tensor]:
    """`gather` of some weights by name; none of them but on the main rank."""
    gathered = {name: gather(name, own, grid) for name, own in values.items()}
    return {name: value for name, value in gathered.items() if value is not None}


def own_share(name: str, whole: Any, grid: ProcessGrid) -> Tensor:
    """What a rank holds of a weight, or of anything of its shape: a tensor, or a slice of a safetensors file."""
    n = whole.shape[0] if isinstance(whole, Tensor) else whole.get_shape()[0]
    return whole[:] if is_shared(name) else whole[grid.own(n)]


@torch.no_grad()
def gather_clt(clt: TrainingCLT) -> TrainingCLT:
    """The whole CLT: itself on a single process; else in main memory on the main rank, and without values elsewhere.

    The copy of other ranks is on torch's "meta" device: it has shapes and a config, and any use of its values raises.
    """
    if clt.grid.n_feature_shards == 1:
        return clt
    whole = TrainingCLT(replace(clt.cfg, device="meta"), grid=SINGLE)
    if clt.grid.is_main:
        whole = whole.to_empty(device="cpu")
        whole.cfg.device, whole.device = "cpu", torch.device("cpu")
    places = whole.state_dict()
    for name, value in gather_all(clt.state_dict(), clt.grid).items():
        places[name].copy_(value)
    return whole


# -- the state of a run, out of a trainer and back into one

COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")
NUMBERS = ("n_training_samples", "n_training_steps", "n_frac_active_samples")


class TrainingState(NamedTuple):
    """A training run between two steps."""

    tensors: dict[str, dict[str, Tensor]]
    """By group: `weights`, and Adam's moments `exp_avg` and `exp_avg_sq`, by the weights' names;
    `feature_counts` [..., d_sae]; `random`; `data`."""

    values: dict[str, Any]
    """The rest, in plain values: counters, schedules, optimiser settings, data position."""

    folder: Path | None = None
    """The checkpoint that it was read from."""


@contextmanager
def readable(folder: Path | None) -> Iterator[None]:
    """Whatever error of damaged content is raised within becomes a CheckpointError: a checksum tells what happened to
    a file, but not what it was to begin with."""
    try:
        yield
    except TlCltError:
        raise
    except READING_ERRORS as error:
        raise CheckpointError(
            f"Checkpoint '{folder}' is damaged: what it holds is no state of this run ({type(error).__name__}:"
            f" {error}). Resume from another one, or start anew."
        ) from error


def capture(trainer: CLTTrainer, position: Position | None) -> TrainingState | None:
    """The state after a step: on a grid of processes that of the whole CLT on the main rank, and None on others.

    Args:
        trainer: its `n_training_steps` must count the step.
        position: of the data after that step's batch; None on other ranks than the main one. Nothing that is
            on one process already is copied: write it before the next step.
    """
    names = [name for name, _ in trainer.sae.named_parameters()]
    optimizer = trainer.optimizer.state_dict()
    moments, steps = _split_moments(optimizer["state"], names)
    grid, density = trainer.sae.grid, trainer.density.state_dict()
    of_weights = {
        "weights": gather_all(trainer.sae.state_dict(), grid),
        **{moment: gather_all(tensors, grid) for moment, tensors in moments.items()},
    }
    if position is None:
        return None
    random = {"cpu": torch.get_rng_state()}
    device = torch.device(trainer.cfg.device)
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return TrainingState(
        tensors={
            **of_weights,
            "feature_counts": {**{name: getattr(trainer, name) for name in COUNTS}, "density": density["fired"]},
            "random": random,
            "data": {"ids": position.ids, "generator": position.generator},
        },
        values={
            **{name: getattr(trainer, name) for name in NUMBERS},
            "scale": {"inputs": trainer.sae.cfg.input_scale, "outputs": trainer.sae.cfg.output_scale},
            "density": {"n_steps": density["n_steps"], "tokens": density["tokens"].tolist()},
            "optimizer_steps": steps,
            "optimizer_groups": [
                {key: value for key, value in group.items() if key != "params"} for group in optimizer["param_groups"]
            ],
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "coefficient_schedulers": {name: s.state_dict() for name, s in trainer.coefficient_schedulers.items()},
            "data": {
                "place": position.place._asdict(),
                "tokens_digest": position.tokens_digest,
                "n_ready": position.n_ready,
                "counts": vars(position.counts),
            },
        },
    )


def restore(trainer: CLTTrainer, state: TrainingState, longer: bool = False) -> None:
    """Bring a new trainer of the same run, and torch's random numbers, to a state.

    Args:
        trainer: with nothing trained.
        state: of a checkpoint.
        longer: this run has more tokens than the one that made the checkpoint. The learning rate is then where a run of
            this length has it at that step, and what was seen of dead features, in a window of another length, is
            forgotten; lambda follows its own new course from the value it had.

    Raises:
        CheckpointError: the weights are of another shape, or something else is not what such a trainer has.
    """
    with readable(state.folder):
        _load_weights(trainer, state.tensors["weights"])
        values = state.values
        for name in NUMBERS:
            setattr(trainer, name, _like(name, values[name], getattr(trainer, name)))
        for name in COUNTS:
            counts = getattr(trainer, name)
            counts.copy_(_of_shape(name, state.tensors["feature_counts"][name], counts))
        fired, density = state.tensors["feature_counts"]["density"], values["density"]
        empty = trainer.density.state_dict()
        _of_shape("density", fired, empty["fired"])
        tokens = _of_shape("density's tokens", torch.tensor(density["tokens"]), empty["tokens"])
        n_steps = _like("density's n_steps", density["n_steps"], empty["n_steps"])
        if longer:
            _advance(trainer.lr_scheduler, trainer.n_training_steps)
        else:
            trainer.density.load_state_dict({"n_steps": n_steps, "fired": fired, "tokens": tokens})
        trainer.optimizer.load_state_dict(_optimizer_state(trainer, state, longer))
        if not longer:
            _load_scheduler("lr_scheduler", trainer.lr_scheduler, values["lr_scheduler"])
        for name, scheduler in trainer.coefficient_schedulers.items():
            _load_scheduler(name, scheduler, values["coefficient_schedulers"][name])
        # After its first step a run's gradients are zeros, not None, and sums then round in another order: `products`.
        for weight in trainer.sae.parameters():
            weight.grad = torch.zeros_like(weight)
        torch.set_rng_state(state.tensors["random"]["cpu"])
        if "cuda" in state.tensors["random"]:
            torch.cuda.set_rng_state(state.tensors["random"]["cuda"], trainer.cfg.device)


def scale_of(state: TrainingState, n_layers: int) -> ActivationScale:
    """The factors that inputs and outputs of each layer had.

    Raises:
        CheckpointError: they are no number a layer.
    """
    with readable(state.folder):
        sides = [tuple(state.values["scale"][side]) for side in ("inputs", "outputs")]
        if any(
            len(side) != n_layers or not all(isinstance(f, float) and 0 < f < math.inf for f in side) for side in sides
        ):
            raise ValueError(f"scale does not have a positive number for each of {n_layers} layers")
        return ActivationScale(*sides)


def n_done(state: TrainingState, name: Literal["n_training_samples", "n_training_steps"]) -> int:
    """Tokens, or steps, that were trained on.

    Raises:
        CheckpointError: it is no number.
    """
    with readable(state.folder):
        return int(_like(name, state.values[name], 0))


def position_of(state: TrainingState) -> Position:
    """Where the data was.

    Raises:
        CheckpointError: it is no position.
    """
    with readable(state.folder):
        data, tensors = state.values["data"], state.tensors["data"]
        ids, generator = tensors["ids"], tensors["generator"]
        if ids.dtype != torch.int64 or ids.dim() != 1 or not isinstance(data["tokens_digest"], str):
            raise ValueError(f"data has ids {list(ids.shape)} of {ids.dtype}")
        torch.Generator().set_state(generator)
        numbers = {**data["place"], **data["counts"], "n_ready": data["n_ready"]}
        for name, number in numbers.items():
            # Before its first chunk a stream is at place -1.
            if type(number) is not int or number < -(name == "index"):
                raise ValueError(f"data's {name} is {number!r}")
        return Position(
            place=ChunkPlace(**data["place"]),
            tokens_digest=data["tokens_digest"],
            ids=ids,
            n_ready=data["n_ready"],
            generator=generator,
            counts=DataCounts(**data["counts"]),
        )


def _like(name: str, value: Any, expected: Any) -> Any:
    """A value of a checkpoint, which must be of the type that a trainer has there. None stands for a number that is not
    known yet."""
    if expected is None:
        return None if value is None else _like(name, value, 0.0)
    is_number = isinstance(expected, int | float) and not isinstance(expected, bool)
    right = (int, float) if is_number else type(expected)
    if not isinstance(value, right) or (is_number and (isinstance(value, bool) or not math.isfinite(value))):
        raise ValueError(f"{name} is {value!r}, where a value such as {expected!r} was expected")
    return value


def _of_shape(name: str, saved: Tensor, expected: Tensor) -> Tensor:
    if saved.shape != expected.shape or saved.is_complex():
        raise ValueError(f"{name} has shape {_shape(saved)} of {saved.dtype}, where {_shape(expected)} was expected")
    return saved


def _load_scheduler(name: str, scheduler: Any, saved: dict[str, Any]) -> None:
    """A scheduler's state, if it has what the scheduler has: values, lists of them, and schedulers within."""
    expected = scheduler.state_dict()
    _require_same_keys(name, saved, expected)
    scheduler.load_state_dict({key: _like_state(f"{name}'s {key}", saved[key], expected[key]) for key in saved})


def _like_state(name: str, saved: Any, expected: Any) -> Any:
    if isinstance(expected, dict):
        _require_same_keys(name, saved, expected)
        return {key: _like_state(f"{name}'s {key}", saved[key], expected[key]) for key in saved}
    if isinstance(expected, list):
        if not isinstance(saved, list) or len(saved) != len(expected):
            raise ValueError(f"{name} is {saved!r}, where a list of {len(expected)} was expected")
        return [_like_state(name, one, like) for one, like in zip(saved, expected, strict=True)]
    return _like(name, saved, expected)


def _require_same_keys(name: str, saved: Any, expected: dict[str, Any]) -> None:
    if not isinstance(saved, dict) or saved.keys() != expected.keys():
        raise ValueError(f"{name} does not have the entries {sorted(map(str, expected))}")


def _split_moments(
    state: dict[int, dict[str, Tensor]], names: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Adam's state by moment and weight, and the steps of each weight."""
    moments: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for index, of_weight in state.items():
        for moment, tensors in moments.items():
            tensors[names[index]] = of_weight[moment]
    return moments, {names[index]: float(of_weight["step"]) for index, of_weight in state.items()}


def _advance(scheduler: Any, n_steps: int) -> None:
    """Bring a new scheduler of a learning rate, and its optimiser, to a step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(n_steps):
            scheduler.step()


def _optimizer_state(trainer: CLTTrainer, state: TrainingState, longer: bool) -> dict[str, Any]:
    weights = list(trainer.sae.named_parameters())
    steps = state.values["optimizer_steps"]
    per_weight = {
        index: {
            "step": torch.tensor(_like(f"steps of {name}", steps[name], 0.0)),
            "exp_avg": _of_shape(f"exp_avg of {name}", state.tensors["exp_avg"][name], weight),
            "exp_avg_sq": _of_shape(f"exp_avg_sq of {name}", state.tensors["exp_avg_sq"][name], weight),
        }
        for index, (name, weight) in enumerate(weights)
        if name in steps
    }
    groups = trainer.optimizer.state_dict()["param_groups"]
    saved = state.values["optimizer_groups"]
    as_they_were = []
    for group, old in zip(groups, saved, strict=True):
        settings = {key: list(v) if isinstance(v, tuple) else v for key, v in group.items() if key != "params"}
        kept = _like_state("optimizer_groups", old, settings)
        as_they_were.append({**group, **{key: tuple(v) if isinstance(v, list) else v for key, v in kept.items()}})
    return {"state": per_weight, "param_groups": groups if longer else as_they_were}


@torch.no_grad()
def _load_weights(trainer: CLTTrainer, weights: dict[str, Tensor]) -> None:
    current = trainer.sae.state_dict()
    for name in sorted(current.keys() | weights.keys()):
        have, saved = current.get(name), weights.get(name)
        if have is None or saved is None or have.shape != saved.shape:
            raise CheckpointError(
                f"The checkpoint's '{name}' has shape {_shape(saved)}, but this run's has {_shape(have)}: it belongs"
                " to another model. Give the model that it was trained on."
            )
    trainer.sae.load_state_dict(weights)


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))


# -- files

MANIFEST = "checkpoint.json"
VALUES = "state.json"
SUFFIX = ".safetensors"
PREFIX = "step_"
UNFINISHED = f".{PREFIX}"
FORMAT = 2
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
    """What `write_checkpoint` was given: the run's config and whatever else must be the same on resuming."""


def write_checkpoint(folder: Path, step: int, state: TrainingState, about: dict[str, Any], keep: int) -> None:
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


def read_checkpoint(checkpoint: Checkpoint, device: str | torch.device, grid: ProcessGrid = SINGLE) -> TrainingState:
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


# -- which runs may go on from which checkpoints, and when checkpoints are made

MAY_DIFFER = (
    *("model_name", "dataset_path", "streaming", "output_path", "device", "prefetch", "cache_path", "n_data_parallel"),
    "init_from",
    *("checkpoint_path", "checkpoint_every", "keep_checkpoints", "log_every"),
    *("log_to_wandb", "wandb_project", "wandb_entity", "run_name", "wandb_log_frequency"),
)
"""Fields that a resumed run may change: none changes a step. Model and data are compared by what they hold."""


def find_checkpoint(cfg: CLTTrainingRunnerConfig, folder: Path) -> Checkpoint:
    """The checkpoint to resume from: `folder`, or the newest in it.

    Raises:
        CheckpointError: it is damaged, or of a run with another config; the message names the first field. More
            training_tokens than it had are no fault, nor is what a config chooses where it is left out.
    """
    checkpoint = find(folder)
    about = checkpoint.about
    with readable(checkpoint.folder):
        if not isinstance(about["model_fingerprint"], str) or not 0 <= about["seconds"] < math.inf:
            raise ValueError(f"{MANIFEST} has no model_fingerprint, or no seconds")
        if not isinstance(about["wandb_run_id"], str | None):
            raise ValueError(f"{MANIFEST} has the wandb_run_id {about['wandb_run_id']!r}")
        before, now = _comparable(about["config"]), _comparable(cfg.to_dict())
        longer = has_more_tokens(cfg, checkpoint)
    for name in sorted((before.keys() | now.keys()) - cfg.chosen.keys()):
        if before.get(name) != now.get(name) and not (longer and name == "training_tokens"):
            more = " or more" if name == "training_tokens" else ""
            raise CheckpointError(
                f"'{checkpoint.folder}' was made with {name}={before.get(name)!r}, but this run has"
                f" {name}={now.get(name)!r}: give the same{more}, or start a new run without resume."
            )
    return checkpoint


def has_more_tokens(cfg: CLTTrainingRunnerConfig, checkpoint: Checkpoint) -> bool:
    """Whether a run is to be longer than the one that made a checkpoint."""
    return cfg.data.training_tokens > checkpoint.about["config"]["training_tokens"]


def require_same_model(checkpoint: Checkpoint, fingerprint: str) -> None:
    """Raise where the model is another than that of the checkpoint.

    Raises:
        CheckpointError: its weights or settings differ.
    """
    if checkpoint.about["model_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"'{checkpoint.folder}' was made with another model: its weights or settings differ from those of this"
            " run's. Give the same model, or start a new run without resume."
        )


def require_same_text(checkpoint: Checkpoint, fingerprint: str) -> None:
    """Raise where the text is another than that of the checkpoint, which tells where in it the run stood and what of it
    was kept out of training. Checkpoints of earlier releases do not tell which text they are of.

    Raises:
        CheckpointError: its first rows, or their number, differ.
    """
    if checkpoint.about.get("text_fingerprint", fingerprint) != fingerprint:
        raise CheckpointError(
            f"'{checkpoint.folder}' was made with another text: its first rows, or how many there are, differ from"
            " those of this run's. Give the same text, or begin a new run with init_from and this text."
        )


def require_checkpoint_folder(cfg: CLTTrainingRunnerConfig, resumed: Checkpoint | None) -> None:
    """Raise unless the folder for new checkpoints is empty or the one resumed from.

    Raises:
        OutputNotEmpty: it holds something else.
        NotWritten: it cannot be written to.
    """
    if cfg.checkpoint_path is not None:
        folder = Path(cfg.checkpoint_path)
        if resumed is None or resumed.folder.parent.resolve() != folder.resolve():
            require_new(folder)
        else:
            require_file(folder / MANIFEST)  # new ones can come beside it
        remove_unfinished(folder)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights, as JSON has it."""
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k not in MAY_DIFFER}
    # Without a cache nothing is rounded, whatever cache_dtype says.
    return kept | {"cache_dtype": None if config["cache_path"] is None else config["cache_dtype"]}


def folder_if_interrupted(cfg: CLTTrainingRunnerConfig) -> Path | None:
    """Where Ctrl-C leaves a checkpoint: `checkpoint_path`, else a new folder beside `output_path`, if there is one."""
    if cfg.checkpoint_path is not None or cfg.output_path is None:
        return None if cfg.checkpoint_path is None else Path(cfg.checkpoint_path)
    return interrupted_beside(Path(cfg.output_path))


SAME_PRESS_SECONDS = 1.0
"""A Ctrl-C so soon after another is taken for the same one: torchrun passes it on to processes that the terminal told
already."""


class CheckpointWriter:
    """Writes a checkpoint every `cfg.checkpoint_every` steps where `cfg.checkpoint_path` is given. Call it after each
    step.

    Within `with writer:`, Ctrl-C waits for the end of the step that it falls into, after which there is one more, in
    `folder_if_interrupted` where no other folder is given; the next Ctrl-C is heeded at once.
    """

    def __init__(
        self,
        cfg: CLTTrainingRunnerConfig,
        about: Callable[[], dict[str, Any]],
        position: Callable[[], Position | None],
        started: float,
        resumed_at: int | None = None,
    ) -> None:
        self._cfg = cfg
        self.folder = folder_if_interrupted(cfg)
        """Where checkpoints go; None where there is no place for them."""
        self._about = about
        self._position = position
        self._started = started
        self._newest = resumed_at
        self._interrupted_at: float | None = None
        self._interrupt: Callable[[int, FrameType | None], Any] | None = None

    def __enter__(self) -> CheckpointWriter:
        before = signal.getsignal(signal.SIGINT)
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Where Ctrl-C is ignored, as in the background of a shell, it stays so.
        if self.folder is not None and in_main_thread and callable(before):
            self._interrupt = before
            signal.signal(signal.SIGINT, self._put_off)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._interrupt is not None:
            signal.signal(signal.SIGINT, self._interrupt)
            if self._interrupted_at is not None and kind is None:
                self._interrupt(signal.SIGINT, None)

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > SAME_PRESS_SECONDS and self._interrupt is not None:
            self._interrupt(number, frame)

    def __call__(self, trainer: CLTTrainer) -> None:
        """Write one where it is due, or where Ctrl-C was pressed.

        Raises:
            KeyboardInterrupt: it was, on this rank or another; or whatever else Ctrl-C did before.
        """
        # SAELens counts the step after this call.
        step = trainer.n_training_steps + 1
        cfg = self._cfg
        if self.folder is None:
            return
        due = cfg.checkpoint_path is not None and step % cfg.checkpoint_every == 0
        if due:
            self._make(trainer, step)
        pressed = self._interrupted_at is not None
        interrupted = trainer.sae.grid.anywhere(pressed, trainer.sae.device)
        if interrupted and not due:
            self._make(trainer, step)
        if interrupted:
            self._interrupted_at = None
            if pressed and self._interrupt is not None:
                self._interrupt(signal.SIGINT, None)
            else:
                raise KeyboardInterrupt

    def write_last(self, trainer: CLTTrainer) -> None:
        """Write one when training is done, which a run of more tokens can go on from. The CLT itself is still to be
        written: where this checkpoint cannot be, a warning says so."""
        if self._cfg.checkpoint_path is None or trainer.n_training_steps == self._newest:
            return
        try:
            self._make(trainer, trainer.n_training_steps)
        except NotWritten as error:
            warnings.warn(
                f"The run goes on to its end without its last checkpoint. {error}", TrainingWarning, stacklevel=2
            )

    def _make(self, trainer: CLTTrainer, step: int) -> None:
        cfg, grid = self._cfg, trainer.sae.grid
        grid.everywhere(lambda: require_finite_weights(trainer.sae.state_dict(), f"After step {step}", cfg))
        state = capture(trainer, self._position())
        grid.on_main(lambda: None if state is None else self._write(step, state))
        self._newest = step

    def _write(self, step: int, state: TrainingState) -> None:
        cfg = self._cfg
        state.values["n_training_steps"] = step
        about = {
            "config": cfg.to_dict(),
            **self._about(),
            "seconds": round(time.monotonic() - self._started, 1),
            "wandb_run_id": wandb.run.id if cfg.log_to_wandb and wandb.run is not None else None,
        }
        assert self.folder is not None
        write_checkpoint(self.folder, step, state, about, cfg.keep_checkpoints)
