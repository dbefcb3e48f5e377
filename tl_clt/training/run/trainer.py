"""SAELens's trainer, with a step that costs what its matrix products cost.

From the `TrainStepInput` that is made here to the optimiser's step a run goes through this file, `clt` (`step`),
`fast.step`, its `fast.products`, and `losses`.

Adam for weights in bfloat16 has moments in float32, and rounds weights at random: bfloat16 has 8 significant bits, and
an update of Adam is often less than half of the last one: rounded to the nearest, it is lost every time. Rounded up
with the probability that the position between two neighbours gives, it is right on average.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn
from torch.optim import Optimizer

from tl_clt.errors import NotFinite
from tl_clt.training.clt import TrainingCLT, TrainingCLTConfig
from tl_clt.training.data.batches import ActivationBatch
from tl_clt.training.fast.products import set_gradients_aside, zero_gradients_aside
from tl_clt.training.fast.step import FastStep
from tl_clt.training.losses import L0Controller
from tl_clt.training.parallel import ProcessGrid, is_shared
from tl_clt.training.resampling import UNTIL, resample
from tl_clt.training.run.progress import ProgressMeter

CONTROLLER_START = 0.01
"""Share of `sparsity_coefficient` that the controller of `target_l0` begins with."""

CONTROLLER_GAINS = (8.0, 30.0)
"""Its K_p, and its K_i times the steps of the run."""

MOST_PER_STEP = 0.1
"""Its largest K_i: L0 answers to lambda after some ten steps, however short the run."""

LEAST_LAMBDA, GREATEST_TIMES = 1e-4, 10.0
"""Bounds of its lambdas: the least; and the greatest as a multiple of n_layers * d_model / target_l0, which is what one
feature of a layer would have to save, in the mean, if a layer's features alone explained all layers' outputs."""

WITHOUT_PENALTIES = {"sparsity": 0.0, "dead_feature": 0.0, "auxk": 0.0}
"""Of a forward pass that is to reconstruct only."""

MAX_NORM = 1.0
"""Norm that gradients are clipped to, as in SAELens."""


@dataclass
class CLTTrainerConfig(SAETrainerConfig):
    """`SAETrainerConfig` of a run that ends on exactly its tokens: the last batch may be shorter."""

    steps_done: int = 0
    """Steps of the run that is gone on with."""

    samples_done: int = 0
    """Tokens of those steps. Where that run had come to its end, its last batch may have been shorter, too."""

    @property
    def total_training_steps(self) -> int:
        """Steps, the last one included."""
        left = self.total_training_samples - self.samples_done
        return self.steps_done + -(-left // self.train_batch_size_samples)


class CLTTrainer(SAETrainer[TrainingCLT, TrainingCLTConfig]):
    """`SAETrainer` with a step, an optimiser and a notion of dead features of its own: see `tl_clt.training` for what
    differs and why."""

    after_step: Callable[[CLTTrainer], None] | None = None
    """Called after every step, before it is counted in `n_training_steps`."""

    progress: ProgressMeter | None = None
    """Told of every step."""

    upcoming: Callable[[], ActivationBatch] | None = None
    """Gives some tokens that are soon trained on, scaled, on a grid the same for every rank. Dead features begin anew
    from them (see `resampling`); none do where it is left out."""

    seconds_in_steps: float = 0.0
    """That all steps took."""

    def __init__(self, cfg: SAETrainerConfig, sae: TrainingCLT, data_provider: Any, **options: Any) -> None:
        sae.in_own_trainer = True
        super().__init__(cfg, sae, data_provider, **options)
        self.fast_step = FastStep()
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
        greatest = GREATEST_TIMES * clt.n_layers * clt.d_in / clt.target_l0
        start = min(max(CONTROLLER_START * clt.sparsity_coefficient, LEAST_LAMBDA), greatest)
        self.coefficient_schedulers["sparsity"] = L0Controller(  # type: ignore[assignment]
            clt.n_layers,
            clt.target_l0,
            start=start,
            ramp_steps=clt.sparsity_warm_up_steps,
            gains=(
                CONTROLLER_GAINS[0],
                min(CONTROLLER_GAINS[1] / self.cfg.total_training_steps, MOST_PER_STEP),
            ),
            bounds=(LEAST_LAMBDA, greatest),
        )

    @property
    def controller(self) -> L0Controller | None:
        """Of `target_l0`, where lambdas are adjusted."""
        scheduler: Any = self.coefficient_schedulers.get("sparsity")
        return scheduler if isinstance(scheduler, L0Controller) else None

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
        began = time.monotonic()
        sae.train()
        step_input = TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        # Norms of low-rank decoders are taken by plain torch, which adds to zeros.
        by_products = [*sae.W_enc, *(sae.W_dec if sae.W_far is None else ())]
        set_gradients_aside(by_products)
        self.optimizer.zero_grad(set_to_none=False)
        with self.autocast_if_enabled:
            output = self._forward(sae, step_input)
        output.loss.backward()
        zero_gradients_aside(by_products)
        combine_gradients(sae, sae.grid)
        norm = gradient_norm(sae, sae.grid)
        output = self._with_losses_of_whole_batch(output)
        self._require_finite_step(output, norm, sae_in)
        self._change_weights(clip_divisor(norm, MAX_NORM))
        self._resample_if_due(sae)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        # SAELens has counted the tokens of this rank.
        self.n_training_samples += len(sae_in) * (sae.grid.n_data_parallel - 1)
        self.seconds_in_steps += time.monotonic() - began
        return output

    @torch.no_grad()
    def _change_weights(self, divisor: Tensor) -> None:
        """Adam's step, with the gradients divided."""
        if self.sae.dtype == torch.float32:
            # Fused Adam divides while it reads them, by a float32.
            self.optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
        else:
            for weight in self.sae.parameters():
                if weight.grad is not None:
                    weight.grad /= divisor
        self.optimizer.step()

    def _resample_if_due(self, sae: TrainingCLT) -> None:
        """Begin dead features anew, once a window, up to `UNTIL` of the run."""
        step, every = self.n_training_steps + 1, self.cfg.dead_feature_window
        if self.upcoming is None or step % every != 0 or step > UNTIL * self.cfg.total_training_steps:
            return
        dead = self.dead_neurons
        if not dead.any():
            return
        errors, tokens = [], self.upcoming()
        with torch.no_grad():
            for batch in tokens.split(self.cfg.train_batch_size_samples):
                result = self.fast_step(
                    sae, TrainStepInput(batch, WITHOUT_PENALTIES, None, self.n_training_steps, False)
                )
                errors.append(batch[:, 1] - result.recons)
        begun = resample(sae, self.optimizer.state, dead, tokens[:, 0], torch.cat(errors), seed=step)
        self.density.forgive(begun)

    def _require_finite_step(self, output: TrainStepOutput, norm: Tensor, sae_in: Tensor) -> None:
        """Raise, on all ranks alike, where the loss or the norm of the gradients is infinite or no number: before the
        weights change.

        Raises:
            NotFinite: with the step, the term and the layers.
        """
        # One number is read from the device. Loss and norm are those of all ranks.
        if math.isfinite(float(output.loss + norm)):
            return
        sae, cfg = self.sae, self.cfg
        by_layer = output.sae_out.unflatten(1, (sae.cfg.n_layers, -1))
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        by_rank = sae.grid.everywhere(
            lambda: (
                bool(sae_in.isfinite().all()),
                [layer for layer in range(sae.cfg.n_layers) if not by_layer[:, layer].isfinite().all()],
                not_finite(gradients),
            )
        )
        step = f"Training stopped at step {self.n_training_steps + 1} of {cfg.total_training_steps}:"
        if not all(finite for finite, _, _ in by_rank):
            raise NotFinite(
                f"{step} the model's activations are infinite or no number at some token. Nothing is saved. Load the"
                " model in float32 (model_dtype), or check its weights."
            )
        terms = [f"{name} is {float(value)}" for name, value in output.losses.items() if not value.isfinite()]
        layers = sorted({layer for _, of_rank, _ in by_rank for layer in of_rank})
        if layers:
            terms.append(f"the reconstruction of layers {', '.join(map(str, layers))} is not finite")
        if not terms:
            names = sorted({name for _, _, of_rank in by_rank for name in of_rank})
            source = f", from {', '.join(names)}" if 0 < len(names) < len(gradients) else ""
            terms = [f"the gradient's norm is {float(norm)}{source}"]
        raise NotFinite(f"{step} {'; '.join(terms)}. Nothing is saved of these weights. {mend_of_growth(cfg)}")

    @torch.no_grad()
    def _with_losses_of_whole_batch(self, output: TrainStepOutput) -> TrainStepOutput:
        """A step whose losses, no longer needed for gradients, are those of all ranks' tokens."""
        losses = {name: value.detach().clone() for name, value in output.losses.items()}
        self.sae.grid.mean_over_data(list(losses.values()))
        self.sae.last_losses = losses
        return replace(output, loss=torch.stack(list(losses.values())).sum(), losses=losses)

    def _forward(self, sae: TrainingCLT, step_input: TrainStepInput) -> TrainStepOutput:
        if self.controller is not None:
            sae.sparsity_shares = self.controller.shares.to(sae.device)
        step = sae.step(step_input, self.fast_step)
        fired = sae.count_firing(step)
        self._count(fired, len(step.recons) * sae.grid.n_data_parallel)
        if self.progress is not None:
            self.progress.see(sae, step, step_input, fired)
        if step_input.is_logging_step:
            acts = torch.cat([f.dense() for f in step.features], dim=1)
            hidden_pre = torch.cat(step.hidden_pre, dim=1)
        else:
            acts = hidden_pre = step.recons.new_empty(0, sae.cfg.n_layers * sae.n_own_features)
        return sae.step_output(step, step_input, acts, hidden_pre)

    def _checkpoint_if_needed(self) -> None:
        try:
            if self.after_step is not None:
                self.after_step(self)
        except KeyboardInterrupt:
            # After its checkpoint, which has this step: what goes on from there does not make its line again.
            if self.progress is not None:
                self.progress.done(self)
            raise
        if self.progress is not None:
            self.progress.done(self)

    @torch.no_grad()
    def _count(self, fired: Tensor, n_tokens: int) -> None:
        """SAELens's running counts and ours, from how many tokens each feature fired at."""
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired
        self.n_frac_active_samples += n_tokens
        self.density.add(fired, n_tokens)
        if self.controller is not None:
            self.controller.observe(self.sae.l0_per_layer(fired, n_tokens))


# -- gradients: their mean over tokens, and their norm, over the processes of a run

EPSILON = 1e-6
"""Added to the norm, as `torch.nn.utils.clip_grad_norm_` does."""


SUMS_OVER_FEATURES = "W_far"
"""A shared weight through which each rank's features write: a rank has its features' part of the gradient. Others
(b_dec, W_skip) come after the sum over ranks, and every rank has the whole of theirs."""


def combine_gradients(clt: nn.Module, grid: ProcessGrid) -> None:
    """Make each rank's gradients those of all tokens and, of shared weights, all features; in place."""
    for name, parameter in clt.named_parameters():
        if name.startswith(SUMS_OVER_FEATURES) and parameter.grad is not None:
            grid.add_over_features(parameter.grad)
    grid.mean_over_data([p.grad for p in clt.parameters() if p.grad is not None])


def gradient_norm(clt: nn.Module, grid: ProcessGrid) -> Float[Tensor, ""]:
    """The norm of all gradients, over all ranks.

        norm = sqrt(sum over ranks of |gradients of their features|^2 + |gradients of shared weights|^2)

    Where one rank has all features this is that of `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = {name: p.grad for name, p in clt.named_parameters() if p.grad is not None}
    if grid.n_feature_shards == 1:
        return torch.nn.utils.get_total_norm(list(gradients.values()))
    return _norm_over_ranks(gradients, grid)


def clip_divisor(norm: Float[Tensor, ""], max_norm: float) -> Float[Tensor, ""]:
    """What gradients of that norm are divided by, so that it is at most `max_norm`."""
    return ((norm + EPSILON) / max_norm).clamp(min=1.0)


def _norm_over_ranks(gradients: Mapping[str, Tensor], grid: ProcessGrid) -> Float[Tensor, ""]:
    def square(shared: bool) -> Tensor:
        grads = [g for name, g in gradients.items() if is_shared(name) == shared]
        return torch.stack([torch.linalg.vector_norm(g, dtype=_sum_dtype(g)).square() for g in grads]).sum()

    return (grid.add_over_features(square(shared=False)) + square(shared=True)).sqrt()


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# -- numbers that are not finite


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold infinities, or what is no number."""
    return [name for name, value in tensors.items() if not value.isfinite().all()]


def mend_of_growth(cfg: Any) -> str:
    """What to do where numbers grew out of bounds.

    Args:
        cfg: of a run or of a trainer.
    """
    precise = " without autocast" if cfg.autocast else ""
    return f"Lower lr (now {cfg.lr:g}), lengthen lr_warm_up_steps, or train with dtype='float32'{precise}."


def require_finite_weights(weights: Mapping[str, Tensor], when: str, cfg: Any) -> None:
    """Raise where weights are infinite or no number.

    Args:
        weights: by name.
        when: in training, for the message: "After step 3".
        cfg: of the run or of its trainer.

    Raises:
        NotFinite: with their names.
    """
    names = not_finite(weights)
    if names:
        raise NotFinite(
            f"{when}, these weights hold infinities, or what is no number: {', '.join(names)}. Nothing is saved of"
            f" them. {mend_of_growth(cfg)}"
        )


# -- Adam for weights in bfloat16

LOW_BITS = 16
"""Bits that float32 has and bfloat16 has not."""


def round_at_random(x: Float32[Tensor, "*any"]) -> BFloat16[Tensor, "*any"]:
    """x in bfloat16: the neighbour above or below, so that the mean is x. Exact values and infinities stay."""
    # A number's bits, read as an integer, grow with its size, and their upper half is its bfloat16: add a random lower
    # half and cut. 64 random bits make four lower halves.
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    noise = words.view(torch.int16)[: x.numel()].view(x.shape).to(torch.int32) & (2**LOW_BITS - 1)
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(2**LOW_BITS)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


class RandomRoundingAdam(Optimizer):
    """Adam as torch has it (no weight decay), on bfloat16 weights."""

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._change(weight, group)
        return loss

    def _change(self, weight: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
        state["step"] += 1
        n, grad = int(state["step"]), weight.grad.float()  # type: ignore[union-attr]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = square.sqrt().div_((1 - beta2**n) ** 0.5).add_(group["eps"])
        weight.copy_(round_at_random(weight.float().addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**n))))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments stay in float32, which torch casts to the weights' dtype."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[weights[index]][name] = saved[name].to(weights[index].device, torch.float32, copy=True)


# -- dead features

BLOCKS = 8
"""Parts of the window: the oldest is dropped whole when a new one begins."""


class RunningDensity:
    """The share of tokens at which each feature fires, over the last `window` steps (and up to an eighth fewer)."""

    def __init__(self, d_sae: int, window: int, device: torch.device | str) -> None:
        """Nothing seen yet.

        Args:
            d_sae: features of all layers.
            window: steps.
            device: where the counts are.
        """
        self.steps_per_block = max(1, -(-window // BLOCKS))
        self.n_steps = 0
        self.fired = torch.zeros(BLOCKS, d_sae, dtype=torch.long, device=device)
        self.tokens = torch.zeros(BLOCKS, dtype=torch.long, device=device)

    @torch.no_grad()
    def add(self, fired: Int[Tensor, " d_sae"], n_tokens: int) -> None:
        """A step: at how many of its tokens each feature fired."""
        block = self.n_steps // self.steps_per_block % BLOCKS
        if self.n_steps % self.steps_per_block == 0:
            self.fired[block] = 0
            self.tokens[block] = 0
        self.fired[block] += fired
        self.tokens[block] += n_tokens
        self.n_steps += 1

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Of each feature; 0 before the first step."""
        return self.fired.sum(dim=0) / self.tokens.sum().clamp(min=1)

    def dead(self, below: float) -> Bool[Tensor, " d_sae"]:
        """Features with a density under `below`, or that did not fire at all. None before the window is full."""
        if self.n_steps < self.steps_per_block * (BLOCKS - 1):
            return torch.zeros_like(self.fired[0], dtype=torch.bool)
        fired = self.fired.sum(dim=0)
        return (fired == 0) | (fired < below * self.tokens.sum())

    @torch.no_grad()
    def forgive(self, features: Bool[Tensor, " d_sae"]) -> None:
        """Count these as alive until the present part of the window has passed."""
        block = (self.n_steps - 1) // self.steps_per_block % BLOCKS
        self.fired[block, features] += self.tokens.sum()

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"n_steps": self.n_steps, "fired": self.fired.clone(), "tokens": self.tokens.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.n_steps = state["n_steps"]
        self.fired.copy_(state["fired"])
        self.tokens.copy_(state["tokens"])
