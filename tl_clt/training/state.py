"""All that a step depends on, out of a trainer and back into one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_clt.errors import CheckpointError, TlCltError
from tl_clt.files import READING_ERRORS
from tl_clt.training.chunks import DataCounts, Place
from tl_clt.training.gathering import gather_all
from tl_clt.training.mixing import Position
from tl_clt.training.scaling import ActivationScale
from tl_clt.training.trainer import CLTTrainer

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


def restore(trainer: CLTTrainer, state: TrainingState) -> None:
    """Bring a new trainer of the same run, and torch's random numbers, to a state.

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
        trainer.density.load_state_dict({"n_steps": n_steps, "fired": fired, "tokens": tokens})
        trainer.optimizer.load_state_dict(_optimizer_state(trainer, state))
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
            place=Place(**data["place"]),
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


def _optimizer_state(trainer: CLTTrainer, state: TrainingState) -> dict[str, Any]:
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
    return {"state": per_weight, "param_groups": as_they_were}


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
