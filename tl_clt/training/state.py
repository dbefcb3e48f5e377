"""All that a step depends on, out of a trainer and back into one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_clt.errors import CheckpointError
from tl_clt.training.chunks import DataCounts, Place
from tl_clt.training.gathering import gather_all
from tl_clt.training.mixing import Position
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
        CheckpointError: the weights are of another shape.
    """
    _load_weights(trainer, state.tensors["weights"])
    values = state.values
    for name in NUMBERS:
        setattr(trainer, name, values[name])
    for name in COUNTS:
        getattr(trainer, name).copy_(state.tensors["feature_counts"][name])
    fired, density = state.tensors["feature_counts"]["density"], values["density"]
    trainer.density.load_state_dict({**density, "fired": fired, "tokens": torch.tensor(density["tokens"])})
    trainer.optimizer.load_state_dict(_optimizer_state(trainer, state))
    trainer.lr_scheduler.load_state_dict(values["lr_scheduler"])
    for name, scheduler in trainer.coefficient_schedulers.items():
        scheduler.load_state_dict(values["coefficient_schedulers"][name])
    # After its first step a run's gradients are zeros, not None, and sums then round in another order: `products`.
    for weight in trainer.sae.parameters():
        weight.grad = torch.zeros_like(weight)
    torch.set_rng_state(state.tensors["random"]["cpu"])
    if "cuda" in state.tensors["random"]:
        torch.cuda.set_rng_state(state.tensors["random"]["cuda"], trainer.cfg.device)


def position_of(state: TrainingState) -> Position:
    """Where the data was."""
    data = state.values["data"]
    return Position(
        place=Place(**data["place"]),
        tokens_digest=data["tokens_digest"],
        ids=state.tensors["data"]["ids"],
        n_ready=data["n_ready"],
        generator=state.tensors["data"]["generator"],
        counts=DataCounts(**data["counts"]),
    )


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
    names = [name for name, _ in trainer.sae.named_parameters()]
    steps = state.values["optimizer_steps"]
    per_weight = {
        index: {
            "step": torch.tensor(steps[name]),
            "exp_avg": state.tensors["exp_avg"][name],
            "exp_avg_sq": state.tensors["exp_avg_sq"][name],
        }
        for index, name in enumerate(names)
        if name in steps
    }
    groups = trainer.optimizer.state_dict()["param_groups"]
    saved = state.values["optimizer_groups"]
    as_they_were = [
        {**group, **{key: tuple(v) if isinstance(v, list) else v for key, v in old.items()}}
        for group, old in zip(groups, saved, strict=True)
    ]
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
