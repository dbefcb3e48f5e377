"""What a training run is, in plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from tl_clt.errors import ConfigError, nearest
from tl_clt.lens import Backend
from tl_clt.training.activations import StraightThrough
from tl_clt.training.cache import CacheDtype
from tl_clt.transcoder.config import DTYPES

TrainedActivation = Literal["relu", "jumprelu", "topk"]
Scheduler = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]

POSITIVE = (
    *("d_transcoder", "training_tokens", "context_size", "train_batch_size_tokens", "lr", "tanh_scale"),
    *("store_batch_size_prompts", "n_batches_in_buffer", "n_batches_for_scale", "n_eval_batches"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "dead_feature_window", "wandb_log_frequency"),
    *("checkpoint_every", "keep_checkpoints"),
)
NOT_NEGATIVE = (
    *("sparsity_coefficient", "dead_feature_coefficient", "lr_warm_up_steps", "lr_decay_steps"),
    *("lr_end",),
)


@dataclass(frozen=True, kw_only=True)
class CLTTrainingRunnerConfig:
    """A training run. Names are those of SAELens's `LanguageModelSAERunnerConfig` where it has them.

    Raises:
        ConfigError: a value is out of range, or two do not fit; the message names the field and the mend.
    """

    model_name: str | None = None
    """A bundled organism, a Hugging Face folder, a `.gguf` file or a hub name. May be left out where the runner
    is given a model."""

    backend: Backend = "hooked"
    """Load it as a HookedTransformer ("hooked") or a TransformerBridge ("bridge")."""

    model_dtype: str = "float32"
    """Number type in which it is loaded."""

    dataset_path: str | None = None
    """A text file, a folder (data files, or saved with `save_to_disk`) or a hub dataset. May be left out
    where the runner is given a dataset."""

    streaming: bool = True
    """Read a hub dataset while training, in place of a download beforehand."""

    output_path: str | None = None
    """New or empty folder for the CLT and `training.json`; nothing is written where left out."""

    # -- the CLT

    d_transcoder: int
    """Features per layer."""

    span: int | None = None
    """Layers a feature writes to: n_layers (a CLT) where left out, 1 for per-layer transcoders."""

    activation: TrainedActivation = "jumprelu"
    """relu, jumprelu or topk."""

    k: int | None = None
    """Features kept per layer and token, for topk."""

    input_hook: str = "hook_resid_mid"
    """Hook that features read, within a block."""

    output_hook: str = "hook_mlp_out"
    """Hook that features write, within a block."""

    dtype: str = "float32"
    """Number type of the CLT's weights and of training."""

    # -- losses: see `losses` for their formulas and units

    sparsity_coefficient: float = 1.0
    """lambda at the end; it rises linearly from 0 over the whole run. About the squared error, summed over
    layers, that a feature must save to be worth firing. No part for topk."""

    tanh_scale: float = 4.0
    """c of the sparsity loss."""

    dead_feature_coefficient: float = 3e-6
    """lambda_P. Small dictionaries with lambda near 1 need far more, 0.01 to 0.1, to keep most features alive; more
    of it raises L0. No part for topk."""

    jumprelu_init_threshold: float = 0.03
    """Threshold of every feature at the start, in units of hidden_pre."""

    jumprelu_bandwidth: float = 1.0
    """Width of the window of the straight-through gradient, in units of hidden_pre."""

    straight_through: StraightThrough = "all"
    """Whether that gradient reaches hidden_pre as well ("all") or the threshold only ("threshold")."""

    # -- data

    training_tokens: int = 2_000_000
    """Tokens to train on, repeats of the dataset included. Exactly so many: the last batch may be shorter."""

    context_size: int = 128
    """Tokens of a prompt."""

    train_batch_size_tokens: int = 4096
    """Tokens of a training step."""

    store_batch_size_prompts: int = 32
    """Prompts of a forward pass of the model."""

    n_batches_in_buffer: int = 128
    """The shuffling buffer's size in prompts; n_batches_in_buffer * context_size tokens must hold a batch."""

    activations_mixing_fraction: float = 0.5
    """Share of the buffer that is kept back for mixing with new activations."""

    prepend_bos: bool = True
    """Begin each prompt made of text with the beginning-of-sequence token."""

    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "bos"
    """What goes between rows of text that share a prompt."""

    exclude_special_tokens: bool | tuple[int, ...] = False
    """Leave the tokenizer's special tokens (True), or these token ids, out of training."""

    seqpos_slice: tuple[int | None, ...] = (None,)
    """Positions to train on, as the arguments of `slice`: (1, None) leaves the first out."""

    max_norm_ratio: float | None = None
    """Leave out tokens at which some layer's input or output has a norm of more than so many times its median over
    the prompts of a forward pass. None leaves none out; models with huge activations at a few tokens want about 10."""

    cache_path: str | None = None
    """Folder of cached activations: what is in it is read, what is not is added. Any run of the same model and hooks
    may use it, whatever its dataset, context size, left-out tokens and seed."""

    cache_dtype: CacheDtype = "float16"
    """float16, or int8 for half the space. A run with a cache trains on the rounded activations, the first run
    as well as the next."""

    prefetch: bool = True
    """Run the model for the next batches on a thread of its own while a step is made. Batches are the same."""

    n_batches_for_scale: int = 8
    """First batches, on which scales and encoder biases are set. They are trained on as well."""

    # -- optimisation

    lr: float = 4e-4
    """Adam's learning rate."""

    lr_scheduler_name: Scheduler = "constant"
    """Its course between warm-up and decay."""

    lr_warm_up_steps: int = 0
    """Steps over which it rises linearly from 0."""

    lr_decay_steps: int = 0
    """Last steps, over which it falls linearly to 0."""

    lr_end: float | None = None
    """Where a cosine course ends: lr / 10 where left out."""

    adam_beta1: float = 0.9
    """Adam's beta_1."""

    adam_beta2: float = 0.999
    """Adam's beta_2."""

    autocast: bool = False
    """Matrix products of training in bfloat16."""

    seed: int = 42
    """Of weights and shuffling. The same seed gives the same weights on the CPU."""

    device: str = "cpu"
    """Where the CLT and the buffer are, and where the model is loaded."""

    # -- records

    dead_feature_window: int = 1000
    """Steps without firing after which a feature counts as dead."""

    n_eval_batches: int = 8
    """Batches after training on which the final metrics are measured."""

    checkpoint_path: str | None = None
    """New or empty folder, outside of output_path, for checkpoints to resume from; none are written where left out."""

    checkpoint_every: int = 1000
    """Steps between them."""

    keep_checkpoints: int = 2
    """As many of them are kept, the newest."""

    log_to_wandb: bool = False
    """Whether SAELens's trainer logs to Weights & Biases."""

    wandb_project: str = "tl_clt"
    """Project there."""

    wandb_entity: str | None = None
    """Account or team there."""

    run_name: str | None = None
    """Name of the run there."""

    wandb_log_frequency: int = 10
    """Steps between logs there, and between calls of the runner's `on_progress`."""

    def __post_init__(self) -> None:
        self._check_values()
        self._check_activation()
        self._check_data()
        self._check_course()
        self._check_folders()

    def _check_values(self) -> None:
        for name in POSITIVE:
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: give more than 0.")
        for name in NOT_NEGATIVE:
            _require((getattr(self, name) or 0) >= 0, f"{name} is {getattr(self, name)}: give 0 or more.")
        for name, choices in {
            "backend": get_args(Backend),
            "activation": get_args(TrainedActivation),
            "straight_through": get_args(StraightThrough),
            "lr_scheduler_name": get_args(Scheduler),
            "dtype": DTYPES,
            "model_dtype": DTYPES,
            "cache_dtype": get_args(CacheDtype),
        }.items():
            value = getattr(self, name)
            _require(
                value in choices,
                f"{name} is {value!r}: give one of {', '.join(choices)}.{nearest(str(value), choices)}",
            )
        mix = self.activations_mixing_fraction
        _require(0 <= mix <= 1, f"activations_mixing_fraction is {mix}: give 0 to 1.")
        ratio = self.max_norm_ratio
        _require(ratio is None or ratio > 1, f"max_norm_ratio is {ratio}: give more than 1, or None.")

    def _check_activation(self) -> None:
        _require(
            (self.k is not None) == (self.activation == "topk"),
            f"k is {self.k} with activation {self.activation!r}: topk needs k, others take none.",
        )
        _require(
            self.k is None or 1 <= self.k <= self.d_transcoder,
            f"k is {self.k} for {self.d_transcoder} features per layer: give 1 to {self.d_transcoder}.",
        )
        _require(self.span is None or self.span >= 1, f"span is {self.span}: give 1 (PLT) to n_layers (CLT).")
        _require(
            self.input_hook != self.output_hook,
            f"input_hook and output_hook are both {self.input_hook!r}: give two different hooks.",
        )

    def _check_data(self) -> None:
        per_prompt = len(range(self.context_size)[slice(*self.seqpos_slice)])
        _require(
            per_prompt > 0,
            f"seqpos_slice {self.seqpos_slice} leaves none of {self.context_size} positions: widen it.",
        )
        needed = -(-self.train_batch_size_tokens // per_prompt)
        _require(
            self.n_batches_in_buffer >= needed,
            f"n_batches_in_buffer is {self.n_batches_in_buffer}, which is a buffer of"
            f" {self.n_batches_in_buffer * per_prompt} tokens for a batch of {self.train_batch_size_tokens}:"
            f" give at least {needed}, better {4 * needed}, or a smaller train_batch_size_tokens.",
        )
        _require(
            self.training_tokens >= self.train_batch_size_tokens,
            f"training_tokens is {self.training_tokens}, less than one batch of {self.train_batch_size_tokens}:"
            " give more tokens or a smaller train_batch_size_tokens.",
        )

    def _check_course(self) -> None:
        ramps = self.lr_warm_up_steps + self.lr_decay_steps
        _require(
            ramps <= self.n_steps,
            f"lr_warm_up_steps and lr_decay_steps are {ramps} together, but the run has {self.n_steps} steps:"
            " shorten them or give more training_tokens.",
        )

    def _check_folders(self) -> None:
        for name in ("checkpoint_path", "cache_path"):
            if self.output_path is not None and getattr(self, name) is not None:
                output, other = Path(self.output_path).resolve(), Path(getattr(self, name)).resolve()
                _require(
                    output != other and output not in other.parents,
                    f"{name} '{getattr(self, name)}' is within output_path '{self.output_path}', which must be empty"
                    " when training ends: give a folder outside of it.",
                )

    @property
    def n_steps(self) -> int:
        """Training steps; the last may be on fewer tokens."""
        return -(-self.training_tokens // self.train_batch_size_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CLTTrainingRunnerConfig:
        """The config of `to_dict`'s values.

        Raises:
            ConfigError: a key is unknown, or d_transcoder is missing.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            _require(key in known, f"'{key}' is no key of CLTTrainingRunnerConfig.{nearest(key, known)}")
        _require("d_transcoder" in values, "'d_transcoder' is missing: give the features per layer.")
        as_tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**as_tuples)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(f"CLTTrainingRunnerConfig: {message}")
