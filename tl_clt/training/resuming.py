"""Which runs may go on from which checkpoints, and when checkpoints are made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

from tl_clt.errors import CheckpointError
from tl_clt.files import require_new
from tl_clt.training import checkpoints
from tl_clt.training.config import CLTTrainingRunnerConfig
from tl_clt.training.mixing import Position
from tl_clt.training.state import TrainingState, capture, readable
from tl_clt.training.trainer import CLTTrainer

MAY_DIFFER = (
    *("model_name", "dataset_path", "streaming", "output_path", "device", "prefetch", "cache_path", "n_data_parallel"),
    *("checkpoint_path", "checkpoint_every", "keep_checkpoints", "n_eval_batches"),
    *("log_to_wandb", "wandb_project", "wandb_entity", "run_name", "wandb_log_frequency"),
)
"""Fields that a resumed run may change: none changes a step. Model and data are compared by what they hold."""


def find_checkpoint(cfg: CLTTrainingRunnerConfig, folder: Path) -> checkpoints.Checkpoint:
    """The checkpoint to resume from: `folder`, or the newest in it.

    Raises:
        CheckpointError: it is damaged, or of a run with another config; the message names the first field.
    """
    checkpoint = checkpoints.find(folder)
    about = checkpoint.about
    with readable(checkpoint.folder):
        if not isinstance(about["model_fingerprint"], str) or not 0 <= about["seconds"] < math.inf:
            raise ValueError(f"{checkpoints.MANIFEST} has no model_fingerprint, or no seconds")
        before, now = _comparable(about["config"]), _comparable(cfg.to_dict())
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"'{checkpoint.folder}' was made with {name}={before.get(name)!r}, but this run has"
                f" {name}={now.get(name)!r}: give the same, or start a new run without resume."
            )
    return checkpoint


def require_same_model(checkpoint: checkpoints.Checkpoint, fingerprint: str) -> None:
    """Raise where the model is another than that of the checkpoint.

    Raises:
        CheckpointError: its weights or settings differ.
    """
    if checkpoint.about["model_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"'{checkpoint.folder}' was made with another model: its weights or settings differ from those of this"
            " run's. Give the same model, or start a new run without resume."
        )


def require_checkpoint_folder(cfg: CLTTrainingRunnerConfig, resumed: checkpoints.Checkpoint | None) -> None:
    """Raise unless the folder for new checkpoints is empty or the one resumed from.

    Raises:
        OutputNotEmpty: it holds something else.
    """
    if cfg.checkpoint_path is not None:
        folder = Path(cfg.checkpoint_path)
        if resumed is None or resumed.folder.parent.resolve() != folder.resolve():
            require_new(folder)
        checkpoints.remove_unfinished(folder)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights, as JSON has it."""
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k not in MAY_DIFFER}
    # Without a cache nothing is rounded, whatever cache_dtype says.
    return kept | {"cache_dtype": None if config["cache_path"] is None else config["cache_dtype"]}


class CheckpointWriter:
    """Writes a checkpoint every `cfg.checkpoint_every` steps. Call it after each step."""

    def __init__(
        self,
        cfg: CLTTrainingRunnerConfig,
        about: dict[str, Any],
        position: Callable[[], Position | None],
        started: float,
    ) -> None:
        self._cfg = cfg
        self._about = about
        self._position = position
        self._started = started

    def __call__(self, trainer: CLTTrainer) -> None:
        """Write one where it is due."""
        # SAELens counts the step after this call.
        step = trainer.n_training_steps + 1
        cfg = self._cfg
        if cfg.checkpoint_path is None or step % cfg.checkpoint_every != 0:
            return
        state, grid = capture(trainer, self._position()), trainer.sae.grid
        grid.on_main(lambda: None if state is None else self._write(step, state))

    def _write(self, step: int, state: TrainingState) -> None:
        cfg = self._cfg
        state.values["n_training_steps"] = step
        about = {
            "config": cfg.to_dict(),
            **self._about,
            "seconds": round(time.monotonic() - self._started, 1),
            "wandb_run_id": wandb.run.id if cfg.log_to_wandb and wandb.run is not None else None,
        }
        assert cfg.checkpoint_path is not None
        checkpoints.write(Path(cfg.checkpoint_path), step, state, about, cfg.keep_checkpoints)
