"""From a config to a trained CLT."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import sae_lens
import torch
import wandb
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata

from tl_clt.errors import ConfigError
from tl_clt.lens import HookedModel, load_model, model_name
from tl_clt.training.batches import activation_batches, check_fits, without_store_noise
from tl_clt.training.config import CLTTrainingRunnerConfig
from tl_clt.training.data import DatasetSource, open_dataset
from tl_clt.training.export import export
from tl_clt.training.init import init_decoder_biases, init_encoder_biases
from tl_clt.training.memory import MemoryEstimate, estimate_memory, require_memory
from tl_clt.training.record import TrainingRecord, measure
from tl_clt.training.scaling import ActivationScale, Batch, apply_scale, estimate_scale
from tl_clt.training.trainer import CLTTrainer
from tl_clt.training.training_clt import TrainingCLT, TrainingCLTConfig
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.formats import native
from tl_clt.transcoder.formats.writing import new_folder, require_new

RECORD = "training.json"
OWN_PATHS = ("output_path", "checkpoint_path")
"""Left out of the record: where a run was written says nothing of it, and folders move."""


class TrainingProgress(NamedTuple):
    """What `on_progress` is told."""

    step: int
    """Steps done."""

    n_steps: int
    """Steps of the whole run."""

    tokens: int
    """Tokens trained on so far."""

    losses: dict[str, float]
    """Terms of the last step's loss, coefficients included."""


class CLTTrainingRunner:
    """Trains a `CrossLayerTranscoder` with SAELens's activation store and trainer; see `CLTTrainer` for its step."""

    record: TrainingRecord | None = None
    """What `training.json` holds; set when `run` is done."""

    def __init__(
        self,
        cfg: CLTTrainingRunnerConfig,
        model: HookedModel | None = None,
        dataset: DatasetSource | None = None,
        on_progress: Callable[[TrainingProgress], None] | None = None,
        on_start: Callable[[MemoryEstimate], None] | None = None,
    ) -> None:
        """Take a run's parts; nothing is loaded yet.

        Args:
            cfg: the run.
            model: used in place of loading `cfg.model_name`.
            dataset: used in place of `cfg.dataset_path`; see `open_dataset` for what it may be.
            on_progress: called every `cfg.wandb_log_frequency` steps.
            on_start: told what memory the run will need, before any activations are made.

        Raises:
            ConfigError: there is no model or no dataset.
        """
        if model is None and cfg.model_name is None:
            raise ConfigError("CLTTrainingRunner: there is no model. Set model_name in the config, or pass model=.")
        if dataset is None and cfg.dataset_path is None:
            raise ConfigError(
                "CLTTrainingRunner: there is no dataset. Set dataset_path in the config, or pass dataset=."
            )
        self.cfg = cfg
        self.model = model
        self.dataset = dataset
        self.on_progress = on_progress
        self.on_start = on_start

    def run(self) -> CrossLayerTranscoder:
        """Train, save to `cfg.output_path` where given, and return the CLT, which takes raw activations.

        The state of torch's random numbers is afterwards as it was before.

        Raises:
            OutputNotEmpty: the output or checkpoint folder holds something (found before any work).
            HookNotFound, DatasetError, TokenizerMissing, ConfigError, ModelNotFound, ModelUnsupported,
                NotEnoughMemory: before training; nothing is written.
        """
        started = time.monotonic()
        for folder in (self.cfg.output_path, self.cfg.checkpoint_path):
            if folder is not None:
                require_new(Path(folder))
        model = self.model or self._load_model()
        check_fits(model, self.cfg)
        self._check_memory(model)
        dataset = open_dataset(
            self.cfg.dataset_path if self.dataset is None else self.dataset,  # type: ignore[arg-type]
            model,
            self.cfg,
        )
        with without_store_noise(), _seeded(self.cfg), _wandb(self.cfg):
            clt = self._train(model, activation_batches(model, dataset, self.cfg), started)
        self._save(clt)
        return clt

    def _check_memory(self, model: HookedModel) -> None:
        shape = replace(self._sae_config(model, None), device="meta")
        estimate = estimate_memory(TrainingCLT(shape), self.cfg)
        if self.on_start is not None:
            self.on_start(estimate)
        require_memory(estimate, torch.device(self.cfg.device))

    def _load_model(self) -> HookedModel:
        cfg = self.cfg
        assert cfg.model_name is not None
        dtype = getattr(torch, cfg.model_dtype)
        return load_model(cfg.model_name, backend=cfg.backend, device=cfg.device, dtype=dtype)

    def _train(self, model: HookedModel, raw: Iterator[Batch], started: float) -> CrossLayerTranscoder:
        cfg = self.cfg
        first = list(islice(raw, cfg.n_batches_for_scale))
        scale = estimate_scale(first)
        sae = TrainingCLT(self._sae_config(model, scale))
        init_encoder_biases(sae, torch.cat([apply_scale(batch, scale)[:, 0] for batch in first]))
        init_decoder_biases(sae, torch.cat([apply_scale(batch, scale)[:, 1] for batch in first]))
        scaled = (apply_scale(batch, scale) for batch in chain(_emptied(first), raw))
        trainer = CLTTrainer(cfg=self._trainer_config(), sae=sae, data_provider=self._reporting(scaled, sae))
        trainer.fit()
        last = islice(scaled, cfg.n_eval_batches)
        metrics = measure(sae, last, trainer.dead_neurons, cfg.dead_window_steps, trainer.workspace)
        self.record = TrainingRecord(
            config={k: v for k, v in cfg.to_dict().items() if k not in OWN_PATHS},
            tokens_seen=trainer.n_training_samples,
            seconds=round(time.monotonic() - started, 1),
            sae_lens_version=sae_lens.__version__,
            coefficients=trainer.get_coefficients(),
            metrics=metrics,
        )
        return export(sae)

    def _save(self, clt: CrossLayerTranscoder) -> None:
        assert self.record is not None
        if self.cfg.output_path is not None:
            with new_folder(Path(self.cfg.output_path)) as unfinished:
                native.save(clt, unfinished)
                (unfinished / RECORD).write_text(json.dumps(self.record.to_dict(), indent=2) + "\n")

    def _reporting(self, batches: Iterator[Batch], sae: TrainingCLT) -> Iterator[Batch]:
        """The batches as they are, with a call of `on_progress` between steps."""
        for step, batch in enumerate(batches):
            if self.on_progress is not None and step > 0 and step % self.cfg.wandb_log_frequency == 0:
                losses = {name: float(value) for name, value in sae.last_losses.items()}
                tokens = step * self.cfg.train_batch_size_tokens
                self.on_progress(TrainingProgress(step, self.cfg.n_steps, tokens, losses))
            yield batch

    def _sae_config(self, model: HookedModel, scale: ActivationScale | None) -> TrainingCLTConfig:
        cfg, n_layers = self.cfg, model.cfg.n_layers
        name = cfg.model_name or model_name(model)
        return TrainingCLTConfig(
            d_in=model.cfg.d_model,
            d_sae=n_layers * cfg.d_transcoder,
            dtype=cfg.dtype,
            device=cfg.device,
            n_layers=n_layers,
            d_transcoder=cfg.d_transcoder,
            span=cfg.span,
            activation=cfg.activation,
            k=cfg.k,
            topk_across=cfg.topk_across,
            k_start=cfg.k_start,
            k_anneal_steps=cfg.k_anneal_steps,
            auxk_coefficient=cfg.auxk_coefficient,
            k_aux=cfg.k_aux,
            skip=cfg.skip,
            far_rank=cfg.far_rank,
            jumprelu_init_threshold=cfg.jumprelu_init_threshold,
            jumprelu_bandwidth=cfg.jumprelu_bandwidth,
            straight_through=cfg.straight_through,
            sparsity_loss=cfg.sparsity_loss,
            sparsity_coefficient=cfg.sparsity_coefficient,
            # lambda rises over the whole run; a controller's target is kept for the last quarter.
            sparsity_warm_up_steps=cfg.n_steps if cfg.target_l0 is None else cfg.n_steps * 3 // 4,
            target_l0=cfg.target_l0,
            tanh_scale=cfg.tanh_scale,
            dead_feature_coefficient=cfg.dead_feature_coefficient,
            dead_feature_density=cfg.dead_feature_density,
            model_name=name,
            input_hook=cfg.input_hook,
            output_hook=cfg.output_hook,
            input_scale=None if scale is None else scale.inputs,
            output_scale=None if scale is None else scale.outputs,
            metadata=SAEMetadata(
                model_name=name,
                hook_name=cfg.input_hook,
                hook_name_out=cfg.output_hook,
                context_size=cfg.context_size,
                prepend_bos=cfg.prepend_bos,
            ),
        )

    def _trainer_config(self) -> SAETrainerConfig:
        cfg = self.cfg
        return SAETrainerConfig(
            total_training_samples=cfg.training_tokens,
            train_batch_size_samples=cfg.train_batch_size_tokens,
            lr=cfg.lr,
            lr_end=cfg.lr / 10 if cfg.lr_end is None else cfg.lr_end,
            lr_scheduler_name=cfg.lr_scheduler_name,
            lr_warm_up_steps=cfg.lr_warm_up_steps,
            lr_decay_steps=cfg.lr_decay_steps,
            adam_beta1=cfg.adam_beta1,
            adam_beta2=cfg.adam_beta2,
            device=cfg.device,
            autocast=cfg.autocast,
            dead_feature_window=cfg.dead_window_steps,
            n_checkpoints=cfg.n_checkpoints,
            checkpoint_path=cfg.checkpoint_path,
            logger=LoggingConfig(
                log_to_wandb=cfg.log_to_wandb,
                wandb_project=cfg.wandb_project,
                wandb_entity=cfg.wandb_entity,
                run_name=cfg.run_name,
                wandb_log_frequency=cfg.wandb_log_frequency,
            ),
        )


def _emptied(batches: list[Batch]) -> Iterator[Batch]:
    """The batches in order, each let go of as it is handed out."""
    while batches:
        yield batches.pop(0)


@contextmanager
def _seeded(cfg: CLTTrainingRunnerConfig) -> Iterator[None]:
    """Within, torch's random numbers are those of the run's seed; afterwards they are as before."""
    device = torch.device(cfg.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(cfg.seed)
        yield


@contextmanager
def _wandb(cfg: CLTTrainingRunnerConfig) -> Iterator[None]:
    """Within, a Weights & Biases run is open where the config asks for one."""
    if not cfg.log_to_wandb:
        yield
        return
    run = wandb.init(project=cfg.wandb_project, entity=cfg.wandb_entity, name=cfg.run_name, config=cfg.to_dict())
    with run:
        yield
