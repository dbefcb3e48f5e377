"""SAELens's trainer, with a step that costs what its matrix products cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from tl_clt.training.density import RunningDensity
from tl_clt.training.gradients import clip_gradients, combine_gradients
from tl_clt.training.l0_control import L0Controller
from tl_clt.training.optimizer import RandomRoundingAdam
from tl_clt.training.step import Workspace
from tl_clt.training.training_clt import TrainingCLT, TrainingCLTConfig

CONTROLLER_START = 0.01
"""Share of `sparsity_coefficient` that the controller of `target_l0` begins with."""
CONTROLLER_GAIN = 40.0
"""Its gain times the steps of the run: it follows within a twentieth of the run or so."""

MAX_NORM = 1.0
"""Norm that gradients are clipped to, as in SAELens."""


@dataclass
class CLTTrainerConfig(SAETrainerConfig):
    """`SAETrainerConfig` of a run that ends on exactly its tokens: the last batch may be shorter."""

    @property
    def total_training_steps(self) -> int:
        """Steps, the last one included."""
        return -(-self.total_training_samples // self.train_batch_size_samples)


class CLTTrainer(SAETrainer[TrainingCLT, TrainingCLTConfig]):
    """`SAETrainer` with another `_train_step`; loop, schedules and logs are SAELens's. Checkpoints are ours, which
    hold all that a step depends on, each file with its checksum: see `checkpoints`.

    `dead_neurons` are features whose running density is below `dead_feature_density`: see `RunningDensity`. With
    `target_l0`, an `L0Controller` stands in the place of lambda's schedule.

    What differs, and what it saves in a step of 6 layers, d_model 512, 4,096 features per layer, batch 1,024 on two
    cores (`tests/benchmarks/training.py`):
    - Adam is fused. Weights in bfloat16 have an Adam of their own: see `optimizer`.
    - Gradients are zeroed, not dropped: see `products`.
    - Firing is counted by layer in the step; SAELens makes two copies of all activations for it, flattened and as
      0 and 1. The flattened activations are made on logging steps only.
    """

    after_step: Callable[[CLTTrainer], None] | None = None
    """Called after every step, before it is counted in `n_training_steps`."""

    def __init__(self, cfg: SAETrainerConfig, sae: TrainingCLT, data_provider: Any, **options: Any) -> None:
        super().__init__(cfg, sae, data_provider, **options)
        self.workspace = Workspace()
        self.density = RunningDensity(sae.cfg.d_sae, cfg.dead_feature_window, cfg.device)
        self._use_controller()
        if sae.dtype == torch.bfloat16:
            self._use_random_rounding()
        else:
            for group in self.optimizer.param_groups:
                group["fused"] = True

    def _use_controller(self) -> None:
        clt = self.sae.cfg
        if clt.target_l0 is None or clt.selects or clt.sparsity_loss == "quadratic_l0":
            return
        self.coefficient_schedulers["sparsity"] = L0Controller(  # type: ignore[assignment]
            clt.target_l0,
            start=CONTROLLER_START * clt.sparsity_coefficient,
            ramp_steps=clt.sparsity_warm_up_steps,
            gain=CONTROLLER_GAIN / self.cfg.total_training_steps,
        )

    @property
    def dead_neurons(self) -> Tensor:
        """Of all features, those that are dead: a bool each."""
        return self.density.dead(self.sae.cfg.dead_feature_density)

    def _use_random_rounding(self) -> None:
        cfg = self.cfg
        self.optimizer = RandomRoundingAdam(self.sae.parameters(), lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2))
        assert cfg.lr_end is not None
        self.lr_scheduler = get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )

    def _train_step(self, sae: TrainingCLT, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        step_input = TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        with self.autocast_if_enabled:
            output = self._forward(sae, step_input)
        output.loss.backward()
        combine_gradients(sae, sae.grid)
        clip_gradients(sae, MAX_NORM, sae.grid)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        # SAELens has counted the tokens of this rank.
        self.n_training_samples += len(sae_in) * (sae.grid.n_data_parallel - 1)
        return self._with_losses_of_whole_batch(output)

    @torch.no_grad()
    def _with_losses_of_whole_batch(self, output: TrainStepOutput) -> TrainStepOutput:
        """A step whose losses, no longer needed for gradients, are those of all ranks' tokens."""
        losses = {name: value.detach().clone() for name, value in output.losses.items()}
        self.sae.grid.mean_over_data(list(losses.values()))
        self.sae.last_losses = losses
        return replace(output, loss=torch.stack(list(losses.values())).sum(), losses=losses)

    def _forward(self, sae: TrainingCLT, step_input: TrainStepInput) -> TrainStepOutput:
        step = sae.step(step_input, self.workspace)
        self._count(sae.count_firing(step), len(step.recons) * sae.grid.n_data_parallel)
        if step_input.is_logging_step:
            acts = torch.cat([f.dense() for f in step.features], dim=1)
            hidden_pre = torch.cat(step.hidden_pre, dim=1)
        else:
            acts = hidden_pre = step.recons.new_empty(0, sae.cfg.n_layers * sae.n_own_features)
        return sae.step_output(step, step_input, acts, hidden_pre)

    def _checkpoint_if_needed(self) -> None:
        if self.after_step is not None:
            self.after_step(self)

    @torch.no_grad()
    def _count(self, fired: Tensor, n_tokens: int) -> None:
        """SAELens's running counts and ours, from how many tokens each feature fired at."""
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired
        self.n_frac_active_samples += n_tokens
        self.density.add(fired, n_tokens)
        controller = self.coefficient_schedulers.get("sparsity")
        if isinstance(controller, L0Controller):
            controller.observe(float(fired.sum()) / (n_tokens * self.sae.cfg.n_layers))
