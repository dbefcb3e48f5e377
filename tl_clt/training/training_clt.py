"""A CLT as SAELens's trainer takes it: a `TrainingSAE`, registered under `ARCHITECTURE`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import registry
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    SAEMetadata,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor

from tl_clt.errors import ConfigError
from tl_clt.training.activations import step_function
from tl_clt.training.layers import ARCHITECTURE, CLTLayers, CLTShape
from tl_clt.training.losses import SparsityKind, dead_feature_loss, sparsity_loss, tanh_count
from tl_clt.training.sharding import SINGLE, ProcessGrid
from tl_clt.training.step import CLTStep, Workspace, clt_step

THRESHOLD_RATE = 0.01
"""Weight of a step in the running mean of the smallest kept score."""


@dataclass(kw_only=True)
class InferenceCLTConfig(CLTShape, SAEConfig):
    """SAELens's config of a trained CLT. d_in is d_model, d_sae is n_layers * d_transcoder."""

    metadata: Any = field(default_factory=SAEMetadata)
    """SAELens's record of the training; its loader puts a plain dict here for a moment."""

    apply_b_dec_to_input: bool = False
    """Always False: outputs are not inputs."""

    @classmethod
    def architecture(cls) -> str:
        """`ARCHITECTURE`."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, self)


@dataclass(kw_only=True)
class TrainingCLTConfig(CLTShape, TrainingSAEConfig):
    """SAELens's config of a CLT in training. d_in is d_model, d_sae is n_layers * d_transcoder."""

    apply_b_dec_to_input: bool = False
    """Always False: outputs are not inputs."""

    decoder_init_norm: float | None = None
    """Always None: the decoder starts uniform."""

    sparsity_loss: SparsityKind = "tanh"
    """Form of the sparsity loss; no part for topk and batchtopk."""

    sparsity_coefficient: float = 1.0
    """lambda at the end of training, or where the controller of `target_l0` begins."""

    sparsity_warm_up_steps: int = 0
    """Steps over which lambda rises linearly from 0, or the controller's L0 falls to its target."""

    target_l0: float | None = None
    """Active features per layer and token, mean over layers, that training is to reach."""

    tanh_scale: float = 4.0
    """c of the tanh sparsity loss."""

    dead_feature_coefficient: float = 3e-6
    """lambda_P."""

    k_start: int | None = None
    """k at the first step; `k` where left out."""

    k_anneal_steps: int = 0
    """Steps over which k falls linearly from `k_start`."""

    auxk_coefficient: float = 1 / 32
    """Weight of AuxK, for topk and batchtopk."""

    k_aux: int | None = None
    """Dead features of each layer that AuxK trains at a token; d_model / 2 where left out."""

    dead_feature_density: float = 1e-6
    """Share of tokens, over the dead-feature window, below which a feature counts as dead."""

    @classmethod
    def architecture(cls) -> str:
        """`ARCHITECTURE`."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, self)


def _check(shape: CLTShape, cfg: SAEConfig) -> None:
    shape.transcoder_config(cfg.d_in, cfg.dtype)
    n_features = shape.n_layers * shape.d_transcoder
    if cfg.d_sae != n_features:
        raise ConfigError(f"d_sae is {cfg.d_sae}: it must be n_layers * d_transcoder = {n_features}.")
    if cfg.normalize_activations != "none" or cfg.apply_b_dec_to_input:
        raise ConfigError(
            "A CLT is trained with normalize_activations='none' and apply_b_dec_to_input=False:"
            " each layer's inputs and outputs are scaled before they reach SAELens's trainer."
        )


class InferenceCLT(CLTLayers, SAE[InferenceCLTConfig]):
    """A trained CLT, on scaled inputs, as SAELens loads it. For everything else export a `CrossLayerTranscoder`."""

    def encode(self, x: Float[Tensor, "batch n_layers d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations of scaled inputs, flattened over layers."""
        encodings = self.encode_layers(x.to(self.dtype).unbind(dim=1))
        return torch.cat([e.feature_acts for e in encodings], dim=1)

    @property
    def selects_in_batch(self) -> bool:
        """Never."""
        return False


class TrainingCLT(CLTLayers, TrainingSAE[TrainingCLTConfig]):
    """A CLT in training. Its input is [batch, 2, n_layers, d_model]: scaled inputs, then scaled outputs."""

    last_losses: dict[str, Tensor]
    """Terms of the last step's loss, without gradients."""

    def __init__(self, cfg: TrainingCLTConfig, use_error_term: bool = False, grid: ProcessGrid = SINGLE) -> None:
        """Make a CLT with fresh weights.

        Args:
            cfg: of the whole CLT.
            use_error_term: SAELens's; no part in training.
            grid: the processes that its features are split among. This one's share of them is made.

        Raises:
            ConfigError: the features cannot be split equally.
        """
        self.grid = grid
        super().__init__(cfg, use_error_term)
        self.last_losses = {}

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """lambda and lambda_P for SAELens's schedulers, or the weight of AuxK."""
        if self.cfg.selects:
            return {"auxk": self.cfg.auxk_coefficient}
        return {
            "dead_feature": self.cfg.dead_feature_coefficient,
            "sparsity": TrainCoefficientConfig(self.cfg.sparsity_coefficient, self.cfg.sparsity_warm_up_steps),
        }

    def encode_with_hidden_pre(
        self, x: Float[Tensor, "batch n_layers d_model"]
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_sae"]]:
        """(feature_acts, hidden_pre) of scaled inputs, flattened over layers."""
        encodings = self.encode_layers(x.to(self.dtype).unbind(dim=1))
        feature_acts, hidden_pre = zip(*encodings, strict=True)
        return torch.cat(feature_acts, dim=1), torch.cat(hidden_pre, dim=1)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses and activations, all flattened over layers as SAELens's metrics expect.

        `sae_in` and `sae_out` of the result are the scaled outputs and their reconstruction,
        [batch, n_layers * d_model]; `feature_acts` and `hidden_pre` are [batch, n_layers * d_transcoder] and
        carry no gradient (the loss does).
        """
        step = self.step(step_input, Workspace())
        acts = torch.cat([f.dense() for f in step.features], dim=1)
        hidden_pre = torch.cat(step.hidden_pre, dim=1)
        return self.step_output(step, step_input, acts, hidden_pre)

    def step(self, step_input: TrainStepInput, workspace: Workspace) -> CLTStep:
        """One step's losses and activations, layer by layer. In training mode the running threshold follows."""
        step = clt_step(self, step_input, workspace)
        if self.cfg.has_score_threshold and self.training and step.smallest_kept is not None:
            rate = max(1 / (step_input.n_training_steps + 1), THRESHOLD_RATE)
            self.score_threshold.lerp_(step.smallest_kept.to(self.score_threshold.dtype), rate)
        self.last_losses = {name: value.detach() for name, value in step.losses.items()}
        return step

    def count_firing(self, step: CLTStep) -> Int[Tensor, " d_sae"]:
        """Tokens of a step at which each feature fires: of all layers, all ranks' features, all ranks' tokens."""
        own = torch.stack([features.fired for features in step.features])
        return self.grid.all_features(self.grid.add_over_data(own), dim=1).flatten()

    def step_output(
        self, step: CLTStep, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor
    ) -> TrainStepOutput:
        """A step as SAELens's trainer takes it, with the flattened activations given."""
        metrics: dict[str, Any] = {}
        outputs = step_input.sae_in[:, 1].to(self.sum_dtype).flatten(start_dim=1)
        recons = step.recons.detach().flatten(start_dim=1)
        if step_input.is_logging_step:
            # SAELens logs what it is given here: on a grid, of the whole batch and all features.
            outputs, recons = self.grid.all_tokens(outputs), self.grid.all_tokens(recons)
            metrics["l0"] = self.count_firing(step).sum() / len(recons)
            metrics["l0_mean_per_layer"] = metrics["l0"] / self.cfg.n_layers
        return TrainStepOutput(
            sae_in=outputs,
            sae_out=recons,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=step.loss,
            losses=step.losses,
            metrics=metrics,
        )

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """Sparsity and dead-feature terms of flattened activations, times their coefficients. AuxK is the step's."""
        if self.cfg.selects:
            return {}
        cfg, coefficients = self.cfg, step_input.coefficients
        shape = (cfg.n_layers, self.n_own_features)
        acts, pre = (flat.unflatten(-1, shape).unbind(dim=1) for flat in (feature_acts, hidden_pre))
        norms, thresholds = self.norms(), self.thresholds()
        if cfg.sparsity_loss == "tanh":
            counts = [tanh_count(a, norm, cfg.tanh_scale) for a, norm in zip(acts, norms, strict=True)]
        else:
            gradient = (cfg.jumprelu_bandwidth, cfg.straight_through)
            counts = [step_function(h, t, *gradient).sum(dim=1) for h, t in zip(pre, thresholds, strict=True)]
        sparsity = sparsity_loss(torch.stack(counts).sum(dim=0), cfg.sparsity_loss, self.l0_target)
        losses = {"sparsity_loss": coefficients["sparsity"] * sparsity}
        if coefficients["dead_feature"] > 0:
            losses["dead_feature_loss"] = coefficients["dead_feature"] * dead_feature_loss(pre, thresholds, norms)
        return losses

    @property
    def l0_target(self) -> float | None:
        """`target_l0`, summed over layers."""
        return None if self.cfg.target_l0 is None else self.cfg.target_l0 * self.cfg.n_layers

    @torch.no_grad()
    def log_histograms(self) -> dict[str, Any]:
        """Norms of the decoder, for wandb."""
        return {"weights/W_dec_norms": self.get_W_dec_norm().float().cpu().numpy()}

    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """||W_dec,i|| of every feature, on whatever rank, flattened over layers."""
        return torch.cat([self.grid.all_features(norms.detach(), dim=0) for norms in self.norms()])

    def fold_W_dec_norm(self) -> None:
        """Not offered.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("A CLT's decoder norms are not folded: export a CrossLayerTranscoder instead.")


def register() -> None:
    """Make SAELens know CLTs: its configs look their classes up by name. Doing it twice changes nothing."""
    if ARCHITECTURE not in registry.SAE_CLASS_REGISTRY:
        registry.register_sae_class(ARCHITECTURE, InferenceCLT, InferenceCLTConfig)
    if ARCHITECTURE not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(ARCHITECTURE, TrainingCLT, TrainingCLTConfig)


register()
