"""What a training run is, in plain values, and what these must satisfy, with the field and the mend in each message."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from tl_clt.arguments import as_choice, as_number, as_several, as_switch, as_whole, is_whole, plain, shown
from tl_clt.errors import ConfigError, nearest
from tl_clt.lens import Backend
from tl_clt.training.data.cache import CacheDtype
from tl_clt.training.losses import Across, SparsityKind, StraightThrough, TrainedActivation
from tl_clt.transcoder.config import DTYPES


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
    """relu, jumprelu, topk, or batchtopk. topk and batchtopk rank features by activation * ||W_dec,i||."""

    k: int | None = None
    """Features kept per layer and token, in the mean; for topk and batchtopk."""

    topk_across: Across = "layer"
    """What k is counted over: each layer by itself ("layer"), or all layers together ("all_layers"), so that layers
    which need more features get them. All layers together, and batchtopk, are exported as jumprelu."""

    k_start: int | None = None
    """k at the first step, from where it falls linearly to `k` over the first `k_anneal_steps` steps."""

    k_anneal_steps: int = 0
    """Steps of that."""

    skip: bool = False
    """Whether each layer adds a linear map of its own input."""

    far_rank: int | None = None
    """Rank of the decoders to later layers, which are exported as full ones; full where left out."""

    input_hook: str = "hook_resid_mid"
    """Hook that features read, within a block."""

    output_hook: str = "hook_mlp_out"
    """Hook that features write, within a block."""

    dtype: str = "float32"
    """Number type of the CLT's weights and of training."""

    # -- losses: see `losses` for their formulas and units

    sparsity_loss: SparsityKind = "tanh"
    """tanh, l0 or quadratic_l0. The latter two are for jumprelu. No part for topk and batchtopk."""

    sparsity_coefficient: float = 1.0
    """lambda at the end; it rises linearly from 0 over the whole run. About the squared error, summed over
    layers, that a feature must save to be worth firing. With target_l0 a guess is enough."""

    target_l0: float | None = None
    """Active features per layer and token, mean over layers, to ask for in place of a lambda: lambda is adjusted
    during training until they are reached. "quadratic_l0" needs it, and leaves lambda as it is."""

    tanh_scale: float = 4.0
    """c of the tanh sparsity loss."""

    dead_feature_coefficient: float = 3e-6
    """lambda_P. Small dictionaries with lambda near 1 need far more, 0.01 to 0.1, to keep most features alive; more
    of it raises L0. No part for topk and batchtopk."""

    auxk_coefficient: float = 1 / 32
    """Weight of AuxK, by which dead features learn what the others leave out; for topk and batchtopk."""

    k_aux: int | None = None
    """Dead features of each layer that it trains at a token; d_model / 2 where left out."""

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
    the prompts of a forward pass. None leaves none out. On Gemma 3 270M, of 1,024 tokens 10 leaves out 6%, 30 2%."""

    cache_path: str | None = None
    """Folder of cached activations: what is in it is read, what is not is added. Any run of the same model and hooks
    may use it, whatever its dataset, context size, left-out tokens and seed."""

    cache_dtype: CacheDtype = "float16"
    """float16, or int8 for half the space. A run with a cache trains on the rounded activations, the first run
    as well as the next. On Gemma 3 270M a layer's activations change by up to 0.02% (float16) or 5% (int8)."""

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

    n_data_parallel: int = 1
    """Under torchrun: parts that each batch's tokens are split into. The processes of each part split the CLT's
    features among them, all processes where left out. Neither changes the result, but for rounding."""

    autocast: bool = False
    """Matrix products of training in bfloat16."""

    seed: int = 42
    """Of weights and shuffling. The same seed gives the same weights on the CPU."""

    device: str = "cpu"
    """Where the CLT and the buffer are, and where the model is loaded."""

    # -- records

    dead_feature_window: int = 1000
    """Steps over which the density of features is measured, which tells the dead ones; a quarter of the run at most."""

    dead_feature_density: float = 1e-6
    """Share of tokens below which a feature counts as dead. Such as fire at no token of the window always do."""

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
        check(self)

    @property
    def n_steps(self) -> int:
        """Training steps; the last may be on fewer tokens."""
        return -(-self.training_tokens // self.train_batch_size_tokens)

    @property
    def dead_window_steps(self) -> int:
        """`dead_feature_window`, or a quarter of a shorter run: at the start every feature fires, so that a longer
        window would find none dead."""
        return min(self.dead_feature_window, -(-self.n_steps // 4))

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
            require(key in known, f"'{key}' is no key of CLTTrainingRunnerConfig.{nearest(key, known)}")
        require("d_transcoder" in values, "'d_transcoder' is missing: give the features per layer.")
        as_tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**as_tuples)


Scheduler = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]

POSITIVE = (
    *("d_transcoder", "training_tokens", "context_size", "train_batch_size_tokens", "lr", "tanh_scale"),
    *("store_batch_size_prompts", "n_batches_in_buffer", "n_batches_for_scale", "n_eval_batches"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "dead_feature_window", "wandb_log_frequency"),
    *("checkpoint_every", "keep_checkpoints", "n_data_parallel"),
)
NOT_NEGATIVE = (
    *("sparsity_coefficient", "dead_feature_coefficient", "lr_warm_up_steps", "lr_decay_steps"),
    *("lr_end", "k_anneal_steps", "auxk_coefficient", "dead_feature_density"),
)


def check(cfg: CLTTrainingRunnerConfig) -> None:
    """Raise where a value is out of range, or two do not fit.

    Raises:
        ConfigError: with the field and the mend.
    """
    _make_plain(cfg)
    _check_values(cfg)
    _check_activation(cfg)
    _check_sparsity(cfg)
    _check_data(cfg)
    _check_parts(cfg)
    _check_course(cfg)
    _check_folders(cfg)


def require(holds: bool, message: str) -> None:
    """Raise a `ConfigError` with the message unless the condition holds."""
    if not holds:
        raise ConfigError(f"CLTTrainingRunnerConfig: {message}")


def _make_plain(cfg: CLTTrainingRunnerConfig) -> None:
    """Put plain values of Python's in the place of what was given for numbers, switches and text."""
    for field in fields(cfg):
        value, kind = getattr(cfg, field.name), str(field.type)
        if value is None and kind.endswith("| None"):
            continue
        told = f"CLTTrainingRunnerConfig: {field.name}"
        as_plain = {"int": as_whole, "float": as_number, "bool": as_switch, "str": _as_text}
        kind = kind.removesuffix(" | None")
        if kind in as_plain:
            object.__setattr__(cfg, field.name, as_plain[kind](told, value))
    for name in ("seqpos_slice", "exclude_special_tokens"):
        value = getattr(cfg, name)
        if name == "seqpos_slice" or not isinstance(value, bool):
            entries = as_several(f"CLTTrainingRunnerConfig: {name}", value, "whole numbers")
            told = f"CLTTrainingRunnerConfig: {name}"
            whole = [as_whole(f"{told}[{i}]", n, none="no bound") for i, n in enumerate(entries)]
            require(None not in whole or name == "seqpos_slice", f"{name} is {value!r}: give token ids.")
            require(len(whole) <= 3 or name != "seqpos_slice", f"seqpos_slice is {value!r}: give start, stop and step.")
            object.__setattr__(cfg, name, tuple(whole))
    token = plain(cfg.sequence_separator_token)
    require(
        token is None or is_whole(token) or token in ("bos", "eos", "sep"),
        f"sequence_separator_token is {shown(token)}: give a token id, 'bos', 'eos', 'sep' or None.",
    )
    object.__setattr__(cfg, "sequence_separator_token", token)


def _as_text(name: str, value: object) -> str:
    if not isinstance(value, (str, Path)):
        raise ConfigError(f"{name} is {shown(value)}: give text.")
    return str(value)


def _check_values(cfg: CLTTrainingRunnerConfig) -> None:
    for name in POSITIVE:
        require(getattr(cfg, name) > 0, f"{name} is {getattr(cfg, name)}: give more than 0.")
    for name in NOT_NEGATIVE:
        require((getattr(cfg, name) or 0) >= 0, f"{name} is {getattr(cfg, name)}: give 0 or more.")
    for name, choices in {
        "backend": get_args(Backend),
        "activation": get_args(TrainedActivation),
        "sparsity_loss": get_args(SparsityKind),
        "topk_across": get_args(Across),
        "straight_through": get_args(StraightThrough),
        "lr_scheduler_name": get_args(Scheduler),
        "dtype": DTYPES,
        "model_dtype": DTYPES,
        "cache_dtype": get_args(CacheDtype),
    }.items():
        as_choice(f"CLTTrainingRunnerConfig: {name}", getattr(cfg, name), choices)
    mix = cfg.activations_mixing_fraction
    require(0 <= mix <= 1, f"activations_mixing_fraction is {mix}: give 0 to 1.")
    ratio = cfg.max_norm_ratio
    require(ratio is None or ratio > 1, f"max_norm_ratio is {ratio}: give more than 1, or None.")


def _check_activation(cfg: CLTTrainingRunnerConfig) -> None:
    selects = cfg.activation in ("topk", "batchtopk")
    require(
        (cfg.k is not None) == selects,
        f"k is {cfg.k} with activation {cfg.activation!r}: topk and batchtopk need k, others take none.",
    )
    for name in ("k", "k_start", "k_aux"):
        k = getattr(cfg, name)
        require(
            k is None or 1 <= k <= cfg.d_transcoder,
            f"{name} is {k} for {cfg.d_transcoder} features per layer: give 1 to {cfg.d_transcoder}.",
        )
    require(
        selects or cfg.topk_across == "layer",
        f"topk_across is {cfg.topk_across!r} with activation {cfg.activation!r}: only topk and batchtopk have it.",
    )
    require(
        (cfg.k_start is not None) == (cfg.k_anneal_steps > 0),
        f"k_start is {cfg.k_start} with k_anneal_steps {cfg.k_anneal_steps}: give both or neither.",
    )
    require(
        cfg.k_start is None or (selects and cfg.k_start >= (cfg.k or 0)),
        f"k_start is {cfg.k_start} with k {cfg.k}: k falls from k_start, which must be more; topk and batchtopk only.",
    )
    require(cfg.far_rank is None or cfg.far_rank >= 1, f"far_rank is {cfg.far_rank}: give 1 or more, or leave it out.")
    require(
        cfg.far_rank is None or cfg.span != 1,
        f"far_rank is {cfg.far_rank} with span 1: such features write to no far layer. Leave far_rank out.",
    )
    require(cfg.span is None or cfg.span >= 1, f"span is {cfg.span}: give 1 (PLT) to n_layers (CLT).")
    require(
        cfg.input_hook != cfg.output_hook,
        f"input_hook and output_hook are both {cfg.input_hook!r}: give two different hooks.",
    )


def _check_sparsity(cfg: CLTTrainingRunnerConfig) -> None:
    target = cfg.target_l0
    require(
        target is None or 0 < target <= cfg.d_transcoder,
        f"target_l0 is {target} for {cfg.d_transcoder} features per layer: give more than 0 and at most as many.",
    )
    require(
        target is None or cfg.activation in ("relu", "jumprelu"),
        f"target_l0 is {target} with activation {cfg.activation!r}, whose L0 is k: set k, and leave target_l0 out.",
    )
    require(
        cfg.sparsity_loss == "tanh" or cfg.activation == "jumprelu",
        f"sparsity_loss is {cfg.sparsity_loss!r} with activation {cfg.activation!r}: its gradient goes through"
        " thresholds, which only jumprelu has. Use jumprelu, or 'tanh'.",
    )
    require(
        cfg.sparsity_loss != "quadratic_l0" or target is not None,
        "sparsity_loss is 'quadratic_l0' without target_l0: set the active features per layer to reach.",
    )
    require(
        target is None or cfg.sparsity_coefficient > 0,
        "sparsity_coefficient is 0 with target_l0: give more than 0 for lambda to start from.",
    )


def _check_data(cfg: CLTTrainingRunnerConfig) -> None:
    require(0 not in cfg.seqpos_slice[2:], f"seqpos_slice is {cfg.seqpos_slice}: give a step other than 0.")
    per_prompt = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    require(
        per_prompt > 0,
        f"seqpos_slice {cfg.seqpos_slice} leaves none of {cfg.context_size} positions: widen it.",
    )
    needed = -(-cfg.train_batch_size_tokens // per_prompt)
    require(
        cfg.n_batches_in_buffer >= needed,
        f"n_batches_in_buffer is {cfg.n_batches_in_buffer}, which is a buffer of"
        f" {cfg.n_batches_in_buffer * per_prompt} tokens for a batch of {cfg.train_batch_size_tokens}:"
        f" give at least {needed}, better {4 * needed}, or a smaller train_batch_size_tokens.",
    )
    require(
        cfg.training_tokens >= cfg.train_batch_size_tokens,
        f"training_tokens is {cfg.training_tokens}, less than one batch of {cfg.train_batch_size_tokens}:"
        " give more tokens or a smaller train_batch_size_tokens.",
    )


def _check_parts(cfg: CLTTrainingRunnerConfig) -> None:
    for name in ("train_batch_size_tokens", "training_tokens"):
        value, parts = getattr(cfg, name), cfg.n_data_parallel
        require(
            value % parts == 0,
            f"{name} is {value} with n_data_parallel {parts}: give a multiple, so that every part has as many tokens.",
        )


def _check_course(cfg: CLTTrainingRunnerConfig) -> None:
    ramps = cfg.lr_warm_up_steps + cfg.lr_decay_steps
    require(
        ramps <= cfg.n_steps,
        f"lr_warm_up_steps and lr_decay_steps are {ramps} together, but the run has {cfg.n_steps} steps:"
        " shorten them or give more training_tokens.",
    )


def _check_folders(cfg: CLTTrainingRunnerConfig) -> None:
    for name in ("checkpoint_path", "cache_path"):
        path = getattr(cfg, name)
        if path is not None and cfg.output_path is not None:
            output, other = Path(cfg.output_path).resolve(), Path(path).resolve()
            require(
                output != other and output not in other.parents,
                f"{name} '{path}' is within output_path '{cfg.output_path}', which must be empty when training ends:"
                " give a folder outside of it.",
            )
