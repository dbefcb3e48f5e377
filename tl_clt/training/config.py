"""What a training run is, in plain values: the settings of the CLT, of the data and of the run, what is chosen where
nothing is said, and what all of it must satisfy, with the field and the mend in each message.

The command line's options are these fields. Neither SAELens nor TransformerLens is imported here, so that its help
comes at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

from tl_clt.arguments import Backend, as_choice, as_number, as_several, as_switch, as_whole, is_whole, plain, shown
from tl_clt.errors import ConfigError, nearest
from tl_clt.training.losses import Across, LossSettings, SparsityKind, StraightThrough, TrainedActivation
from tl_clt.transcoder.config import DTYPES

Config = TypeVar("Config")
CacheDtype = Literal["float16", "int8"]
Scheduler = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]

CHOSEN: Any = None
"""Default of what a run's config chooses by itself where it is left out: see `choose`."""

if TYPE_CHECKING:  # once a run's config is made
    WholeOrChosen: TypeAlias = int
    NumberOrChosen: TypeAlias = float
else:
    WholeOrChosen: TypeAlias = int | None
    NumberOrChosen: TypeAlias = float | None

HELD_OUT_EVERY = 16
"""Of so many prompts of a dataset one is kept out of training: the last."""

# -- the CLT

DEFAULT_K = 16
"""Active features per layer and token where nothing is said of them."""


@dataclass(kw_only=True, unsafe_hash=True)
class CLTShape:
    """What a user says of a CLT's weights and activation."""

    d_transcoder: int
    """Features per layer."""

    span: int | None = None
    """Layers a feature writes to: n_layers (a CLT) where left out, 1 for per-layer transcoders."""

    activation: TrainedActivation = "topk"
    """topk, batchtopk, jumprelu or relu. topk and batchtopk rank features by activation * ||W_dec,i||, so that as many
    are active as were asked for, in every layer and from the first step on; jumprelu and relu have to learn it."""

    k: int | None = None
    """Features kept per layer and token, in the mean, by topk and batchtopk. `target_l0` where left out, or else 16."""

    topk_across: Across = "layer"
    """What k is counted over: each layer by itself ("layer"), or all layers together ("all_layers"), so that layers
    which need more features get them. All layers together, and batchtopk, are exported as jumprelu."""

    skip: bool = False
    """Whether each layer adds a linear map of its own input."""

    far_rank: int | None = None
    """Rank of the decoders to later layers, which are exported as full ones; full where left out."""

    input_hook: str = "hook_resid_mid"
    """Hook that features read, within a block."""

    output_hook: str = "hook_mlp_out"
    """Hook that features write, within a block."""

    jumprelu_init_threshold: float = 0.03
    """Threshold of every feature at the start, in units of hidden_pre."""

    jumprelu_bandwidth: float = 1.0
    """Width of the window of the straight-through gradient, in units of hidden_pre."""

    straight_through: StraightThrough = "all"
    """Whether that gradient reaches hidden_pre as well ("all") or the threshold only ("threshold")."""

    @property
    def selects(self) -> bool:
        """Whether features are chosen by rank (topk, batchtopk), and not by a threshold of their own."""
        return self.activation in ("topk", "batchtopk")

    @property
    def has_score_threshold(self) -> bool:
        """Whether inference compares scores with a fixed threshold, because what competes is not known then.

        One token knows nothing of its batch, and a layer of a model nothing of the layers above.
        """
        return self.activation == "batchtopk" or (self.selects and self.topk_across == "all_layers")


@dataclass(kw_only=True, unsafe_hash=True)
class CLTSettings(LossSettings, CLTShape):
    """All that a user says of a CLT in training: the `clt` of a `CLTTrainingRunnerConfig`. The formulas and units of
    the losses are in `losses`."""

    dtype: str = "float32"
    """Number type of the CLT's weights and of training; bfloat16 weights are rounded at random."""

    k_start: int | None = None
    """k at the first step, from where it falls linearly to `k` over the first `k_anneal_steps` steps."""

    k_anneal_steps: int = 0
    """Steps over which k falls from `k_start`."""

    def k_asked_for(self) -> int:
        """k where it is left out: `target_l0`, or else `DEFAULT_K`."""
        k = DEFAULT_K if self.target_l0 is None else max(1, round(self.target_l0))
        return min(k, self.d_transcoder)

    def k_at(self, step: int) -> int | None:
        """k at a training step: it falls linearly from `k_start` to `k` over the first `k_anneal_steps` steps."""
        if self.k is None or self.k_start is None or step >= self.k_anneal_steps:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * step / self.k_anneal_steps)


# -- the data


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What a CLT is trained on: the `data` of a `CLTTrainingRunnerConfig`."""

    streaming: bool = True
    """Read a hub dataset while training, in place of a download beforehand."""

    training_tokens: int = 2_000_000
    """Tokens to train on, repeats of the dataset included. Exactly so many: the last batch may be shorter."""

    context_size: WholeOrChosen = CHOSEN
    """Tokens of a prompt. Where left out: 128, or as many as the model takes where these are fewer."""

    train_batch_size_tokens: WholeOrChosen = CHOSEN
    """Tokens of a training step. Where left out: the power of two of at least 128 and at most 4096 tokens that makes
    about 300 steps of training_tokens, because features need some hundred steps to settle."""

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

    exclude_special_tokens: bool | tuple[int, ...] = True
    """Leave the tokenizer's special tokens (True; none where the model has no tokenizer), or these token ids, out of
    training. The beginning-of-sequence token has a norm a hundred times the others', and means nothing."""

    seqpos_slice: tuple[int | None, ...] = (None,)
    """Positions to train on, as the arguments of `slice`: (1, None) leaves the first out."""

    max_norm_ratio: float | None = 10.0
    """Leave out tokens at which some layer's input has a norm of more than so many times its median over the prompts
    of a forward pass: massive activations, which mean nothing, and a few of which would make up most of the squared
    error. None leaves none out. On Gemma 3 270M only the beginning-of-sequence token has any (13 times the median)."""

    n_eval_prompts: WholeOrChosen = CHOSEN
    """Prompts that the final metrics are measured on; where thresholds are set at the end, half of them are for that.
    Every 16th prompt of the dataset is kept out of training for them. Where left out: 1 for every 16 that are trained
    on, and at least 16, at most 256."""

    cache_path: str | None = None
    """Folder of cached activations: what is in it is read, what is not is added. Any run of the same model and hooks
    may use it, whatever its dataset, context size, left-out tokens and seed."""

    cache_dtype: CacheDtype = "float16"
    """float16, or int8 for half the space. A run with a cache trains on the rounded activations, the first run
    as well as the next. On Gemma 3 270M a layer's activations change by up to 0.02% (float16) or 5% (int8)."""

    prefetch: bool = True
    """Run the model for the next batches on a thread of its own while a step is made. Batches are the same."""

    n_batches_for_scale: WholeOrChosen = CHOSEN
    """First batches, on which scales and the first weights are set. They are trained on as well. Where left out: so
    many that they have 4,096 tokens, or two for each feature of a layer if that is more, but at most 16,384."""

    @property
    def positions_per_prompt(self) -> int:
        """Positions of a prompt that `seqpos_slice` leaves to train on."""
        return len(range(self.context_size)[slice(*self.seqpos_slice)])


# -- the run

PARTS: dict[str, type[CLTSettings] | type[DataSettings]] = {"clt": CLTSettings, "data": DataSettings}
"""Settings that a run's config contains, by the field that holds them."""


NO_LONGER = ("n_eval_batches",)
"""Fields of older records that have nothing in their place now."""


def part_of(name: str) -> str | None:
    """The part of a run's config that has a field, if any."""
    return next((part for part, kind in PARTS.items() if name in {f.name for f in fields(kind)}), None)


def _takes_fields_of_parts(cls: type[Config]) -> type[Config]:
    """Let a config be made with its parts' fields as keywords of its own: `(d_transcoder=8, lr=1e-3)` is
    `(clt=CLTSettings(d_transcoder=8), lr=1e-3)`, and beside `clt=` it changes `d_transcoder` there."""
    init = cls.__init__

    @wraps(init)
    def make(self: Config, **values: Any) -> None:
        init(self, **_by_part(cls, values))

    cls.__init__ = make  # type: ignore[method-assign]
    return cls


def _by_part(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    own = [f.name for f in fields(cls)]
    known = [*own, *(f.name for kind in PARTS.values() for f in fields(kind))]
    result = {name: value for name, value in values.items() if name in own}
    for name in values:
        require(name in known, f"'{name}' is no key of CLTTrainingRunnerConfig.{nearest(name, known)}")
    require("clt" in values or "d_transcoder" in values, "'d_transcoder' is missing: give the features per layer.")
    for part, kind in PARTS.items():
        changes = {name: value for name, value in values.items() if part_of(name) == part}
        if part not in result:
            result[part] = kind(**changes)
        elif changes and isinstance(result[part], kind):
            result[part] = replace(result[part], **changes)
    return result


@_takes_fields_of_parts
@dataclass(frozen=True, kw_only=True)
class CLTTrainingRunnerConfig:
    """A training run. Names are those of SAELens's `LanguageModelSAERunnerConfig` where it has them.

    It contains the settings of the CLT (`clt`) and of the data (`data`), as SAELens's contains those of the SAE. Their
    fields may be given as keywords of the run, and read as its attributes: `d_transcoder` is `clt.d_transcoder`.

    Raises:
        ConfigError: a value is out of range, or two do not fit; the message names the field and the mend.
    """

    clt: CLTSettings
    """The CLT."""

    chosen: ClassVar[dict[str, str]]
    """Of each value that was left out and chosen from the others: why it is this one."""

    data: DataSettings = field(default_factory=DataSettings)
    """What it is trained on."""

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

    init_from: str | None = None
    """A CLT whose weights the run begins with, as a folder or a name by which CLTs are loaded. It must have the run's
    shape, hooks and activation. Where left out, weights begin from the first batches (`init_from_tokens`)."""

    output_path: str | None = None
    """New or empty folder for the CLT, `training.json`, `progress.csv` and `progress.png`; nothing is written where
    left out."""

    # -- optimisation

    lr: NumberOrChosen = CHOSEN
    """Adam's learning rate. Where left out: 0.045 / sqrt(steps), at least 2e-4 and at most 4e-3: short runs need large
    steps to get anywhere, and long ones small steps to end well."""

    lr_scheduler_name: Scheduler = "constant"
    """Its course between warm-up and decay."""

    lr_warm_up_steps: WholeOrChosen = CHOSEN
    """Steps over which it rises linearly from 0. Where left out: a twentieth of the run, at most 1000."""

    lr_decay_steps: WholeOrChosen = CHOSEN
    """Last steps, over which it falls linearly to 0. Where left out: a fifth of the run."""

    lr_end: float | None = None
    """Where a cosine course ends: lr / 10 where left out."""

    adam_beta1: float = 0.9
    """Adam's beta_1."""

    adam_beta2: float = 0.999
    """Adam's beta_2."""

    resample_dead: bool = True
    """Whether dead features begin anew, during the first two thirds of the run, as detectors of tokens that are
    reconstructed badly."""

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
    """Steps over which the density of features is measured, which tells the dead ones; an eighth of the run at most."""

    log_every: int | None = None
    """Steps between lines of progress: what the runner's `on_progress` is told, the command line prints, and
    `progress.csv` holds. About 50 lines a run where left out."""

    checkpoint_path: str | None = None
    """New or empty folder, outside of output_path, for checkpoints to resume from, the last one when training is done.
    Where left out there is one in OUTPUT-interrupted after Ctrl-C alone; a resumed run goes on in the folder of the
    checkpoint that it was resumed from, and keeps as many there."""

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
    """Steps between logs there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen", {})
        check(self)

    def changed(self, **values: Any) -> CLTTrainingRunnerConfig:
        """This config with other values, as `dataclasses.replace` gives it, which still knows what was chosen."""
        other = replace(self, **values)
        object.__setattr__(other, "chosen", {k: v for k, v in self.chosen.items() if k not in values})
        return other

    def fitted_to(self, n_ctx: int) -> CLTTrainingRunnerConfig:
        """This config for a model that takes so many tokens: a context_size that nobody asked for is no more, and what
        was chosen by it is chosen anew."""
        if "context_size" not in self.chosen or self.data.context_size <= n_ctx:
            return self
        other = replace(self, **{name: None for name in self.chosen} | {"context_size": n_ctx})
        reason = {"context_size": f"the model takes no more; {DEFAULT_CONTEXT} where it does"}
        object.__setattr__(other, "chosen", reason | other.chosen)
        return other

    def in_words(self) -> str:
        """The activation, what was chosen where nothing was said, and why, and what of the text is left out."""
        data = self.data
        chosen_lines = [f"  {name} = {getattr(self, name)}: {reason}" for name, reason in self.chosen.items()]
        rules = []
        if data.exclude_special_tokens is not False:
            named = data.exclude_special_tokens is True
            rules.append("special tokens, where the tokenizer names any" if named else "the token ids that were given")
        if data.max_norm_ratio is not None:
            rules.append(f"tokens of a norm above {data.max_norm_ratio:g} times the median (max_norm_ratio)")
        rules.append(f"every {HELD_OUT_EVERY}th prompt, to measure on, where there are so many")
        sentences = ["Chosen, where nothing was said:", *chosen_lines] if chosen_lines else []
        kept = f", {self.clt.k} features a layer and token" if self.clt.selects else ""
        first, last = f"Activation {self.clt.activation}{kept}.", f"Left out of training: {', '.join(rules)}."
        return "\n".join([first, *sentences, last])

    @property
    def l0_asked_for(self) -> float | None:
        """Active features per token that each layer is to have; None where a lambda is given, or layers share them."""
        if self.clt.topk_across == "all_layers":
            return None
        return self.clt.target_l0 if self.clt.k is None else float(self.clt.k)

    @property
    def n_steps(self) -> int:
        """Training steps; the last may be on fewer tokens."""
        return -(-self.data.training_tokens // self.data.train_batch_size_tokens)

    @property
    def steps_per_line(self) -> int:
        """`log_every`, or as many steps as make 50 lines a run at most."""
        return self.log_every or -(-self.n_steps // 50)

    @property
    def dead_window_steps(self) -> int:
        """`dead_feature_window`, or an eighth of a shorter run: at the start every feature fires, so that a longer
        window would find none dead, and what AuxK revives needs time."""
        return min(self.dead_feature_window, -(-self.n_steps // 8))

    def __getattr__(self, name: str) -> Any:
        """A field of a part."""
        part = part_of(name)
        if part is None:
            raise AttributeError(f"CLTTrainingRunnerConfig has no field '{name}'.")
        return getattr(getattr(self, part), name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, those of the parts among them; `from_dict` takes them back."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PARTS}
        return own | vars(self.clt) | vars(self.data)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLTTrainingRunnerConfig:
        """The config of `to_dict`'s values. Those of a part may also stand together: {"clt": {...}, "data": {...}}.

        Raises:
            ConfigError: a key is unknown, or d_transcoder is missing.
        """
        flat: dict[str, Any] = {}
        for name, value in values.items():
            if name in NO_LONGER:
                continue
            if name in PARTS and isinstance(value, Mapping):
                strange = [key for key in value if part_of(key) != name]
                require(not strange, f"{name} has the keys {strange}, which are none of its fields.")
                flat.update(value)
            else:
                flat[name] = value
        as_tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}
        return cls(**as_tuples)


DEFAULT_CONTEXT = 128
STEPS_WANTED, SMALLEST_BATCH, LARGEST_BATCH = 300, 128, 4096
LR_TIMES_ROOT_OF_STEPS, SMALLEST_LR, LARGEST_LR = 0.045, 2e-4, 4e-3
PROMPTS_PER_EVAL_PROMPT, FEWEST_EVAL_PROMPTS, MOST_EVAL_PROMPTS = 16, 16, 256
FEWEST_FIRST_TOKENS, MOST_FIRST_TOKENS = 4096, 16_384
MOST_WARM_UP_STEPS = 1000


def choose(cfg: CLTTrainingRunnerConfig) -> None:
    """Put values where none were given, and say in `cfg.chosen` why these.

    A value that another one makes impossible is not chosen here, but refused by the checks that follow.
    """
    clt, data = cfg.clt, cfg.data

    def fill(holder: Any, name: str, value: Any, reason: str) -> None:
        if getattr(holder, name) is None:
            object.__setattr__(holder, name, value)
            cfg.chosen[name] = reason

    if clt.selects:
        reason = "nothing was said of L0" if clt.target_l0 is None else f"target_l0 is {clt.target_l0:g}"
        fill(clt, "k", clt.k_asked_for(), reason)
    fill(
        data, "context_size", DEFAULT_CONTEXT, f"{DEFAULT_CONTEXT}, or as many as the model takes where it takes fewer"
    )
    tokens = max(1, data.training_tokens)
    wanted = 2 ** round(math.log2(max(1.0, tokens / STEPS_WANTED)))
    parts = max(1, cfg.n_data_parallel)
    in_buffer = data.n_batches_in_buffer * data.positions_per_prompt
    batch = max(1, min(max(SMALLEST_BATCH, min(LARGEST_BATCH, wanted)), tokens, in_buffer))
    reason = f"as near to {STEPS_WANTED} steps as {SMALLEST_BATCH} to {LARGEST_BATCH} tokens come"
    fill(data, "train_batch_size_tokens", batch // parts * parts, reason)
    n_prompts = -(-tokens // max(1, data.context_size)) // PROMPTS_PER_EVAL_PROMPT
    few, most = FEWEST_EVAL_PROMPTS, MOST_EVAL_PROMPTS
    fill(data, "n_eval_prompts", min(max(n_prompts, few), most), f"one for every 16 trained on, from {few} to {most}")
    n_steps = -(-tokens // max(1, data.train_batch_size_tokens))
    first_tokens = min(max(FEWEST_FIRST_TOKENS, 2 * clt.d_transcoder), MOST_FIRST_TOKENS)
    n_first = min(n_steps, -(-first_tokens // max(1, data.train_batch_size_tokens)))
    fill(data, "n_batches_for_scale", n_first, f"{first_tokens:,} tokens, by which to begin, if the run has as many")
    lr = min(max(LR_TIMES_ROOT_OF_STEPS / max(1, n_steps) ** 0.5, SMALLEST_LR), LARGEST_LR)
    fill(cfg, "lr", float(f"{lr:.1e}"), f"the fewer steps the larger; there are {n_steps}")
    rising = min(n_steps // 20, MOST_WARM_UP_STEPS, n_steps - (cfg.lr_decay_steps or 0))
    fill(cfg, "lr_warm_up_steps", max(0, rising), f"a twentieth of {n_steps} steps, at most {MOST_WARM_UP_STEPS}")
    falling = min(n_steps // 5, n_steps - cfg.lr_warm_up_steps)
    fill(cfg, "lr_decay_steps", max(0, falling), f"a fifth of {n_steps} steps")


POSITIVE = (
    *("d_transcoder", "training_tokens", "context_size", "train_batch_size_tokens", "lr", "tanh_scale"),
    *("store_batch_size_prompts", "n_batches_in_buffer", "n_batches_for_scale", "n_eval_prompts"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "dead_feature_window", "wandb_log_frequency"),
    *("checkpoint_every", "keep_checkpoints", "n_data_parallel"),
)
OF_PENALTIES, OF_THRESHOLDS = ("relu", "jumprelu"), ("jumprelu",)
HAVING: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sparsity_coefficient", "tanh_scale", "dead_feature_coefficient"), OF_PENALTIES),
    **dict.fromkeys(("jumprelu_init_threshold", "jumprelu_bandwidth", "straight_through"), OF_THRESHOLDS),
}
"""Settings of the CLT that only some activations have."""

NOT_NEGATIVE = (
    *("lr_warm_up_steps", "lr_decay_steps", "lr_end", "k_anneal_steps", "dead_feature_density", "seed"),
    *(f.name for f in fields(CLTSettings) if f.name.endswith("_coefficient")),
)


def check(cfg: CLTTrainingRunnerConfig) -> None:
    """Raise where a value is out of range, or two do not fit.

    Raises:
        ConfigError: with the field and the mend.
    """
    _make_plain(cfg)
    choose(cfg)
    _check_values(cfg)
    _check_activation(cfg.clt)
    _check_sparsity(cfg.clt)
    _check_data(cfg.data)
    _check_parts(cfg)
    _check_course(cfg)
    _check_folders(cfg)


def require(holds: bool, message: str) -> None:
    """Raise a `ConfigError` with the message unless the condition holds."""
    if not holds:
        raise ConfigError(f"CLTTrainingRunnerConfig: {message}")


def _make_plain(cfg: CLTTrainingRunnerConfig) -> None:
    """Put plain values of Python's in the place of what was given for numbers, switches and text."""
    for part, kind in PARTS.items():
        settings = getattr(cfg, part)
        require(isinstance(settings, kind), f"{part} is {shown(settings)}: give a {kind.__name__}.")
        # A copy, so that what was given stays as it is.
        object.__setattr__(cfg, part, replace(settings))
    for holder in (cfg, cfg.clt, cfg.data):
        for field_ in fields(holder):
            value, kind = getattr(holder, field_.name), str(field_.type)
            if value is None and kind.endswith(("| None", "OrChosen")):
                continue
            label = f"CLTTrainingRunnerConfig: {field_.name}"
            as_plain = {"int": as_whole, "float": as_number, "bool": as_switch, "str": _as_text}
            as_plain |= {"WholeOrChosen": as_whole, "NumberOrChosen": as_number}
            kind = kind.removesuffix(" | None")
            if kind in as_plain:
                object.__setattr__(holder, field_.name, as_plain[kind](label, value))
    data = cfg.data
    for name in ("seqpos_slice", "exclude_special_tokens"):
        value = getattr(data, name)
        if name == "seqpos_slice" or not isinstance(value, bool):
            entries = as_several(f"CLTTrainingRunnerConfig: {name}", value, "whole numbers")
            label = f"CLTTrainingRunnerConfig: {name}"
            if name == "seqpos_slice":
                whole = [as_whole(f"{label}[{i}]", n, none="no bound") for i, n in enumerate(entries)]
            else:
                whole = [as_whole(f"{label}[{i}]", n, 0, why="a token id") for i, n in enumerate(entries)]
            require(len(whole) <= 3 or name != "seqpos_slice", f"seqpos_slice is {value!r}: give start, stop and step.")
            object.__setattr__(data, name, tuple(whole))
    require(0 not in data.seqpos_slice[2:], f"seqpos_slice is {data.seqpos_slice}: give a step other than 0.")
    token = plain(data.sequence_separator_token)
    require(
        token is None or is_whole(token) or token in ("bos", "eos", "sep"),
        f"sequence_separator_token is {shown(token)}: give a token id, 'bos', 'eos', 'sep' or None.",
    )
    object.__setattr__(data, "sequence_separator_token", token)


def _as_text(name: str, value: object) -> str:
    if not isinstance(value, (str, Path)):
        raise ConfigError(f"{name} is {shown(value)}: give text.")
    return str(value)


def _check_values(cfg: CLTTrainingRunnerConfig) -> None:
    for name in POSITIVE:
        require(getattr(cfg, name) > 0, f"{name} is {getattr(cfg, name)}: give more than 0.")
    for name in NOT_NEGATIVE:
        require((getattr(cfg, name) or 0) >= 0, f"{name} is {getattr(cfg, name)}: give 0 or more.")
    every = cfg.log_every
    require(every is None or every > 0, f"log_every is {every}: give more than 0, or leave it out.")
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
    require(
        cfg.clt.dtype != "float16",
        "dtype is 'float16': Adam's updates and the losses of training leave its range. Give 'bfloat16', which takes as"
        " little room, or 'float32'.",
    )
    for name in ("adam_beta1", "adam_beta2"):
        require(0 <= getattr(cfg, name) < 1, f"{name} is {getattr(cfg, name)}: give 0 or more, and less than 1.")
    mix = cfg.data.activations_mixing_fraction
    require(0 <= mix <= 1, f"activations_mixing_fraction is {mix}: give 0 to 1.")
    density = cfg.clt.dead_feature_density
    require(density <= 1, f"dead_feature_density is {density:g}: give a share of tokens, 0 to 1.")
    require(
        cfg.lr_end is None or cfg.lr_scheduler_name != "constant",
        f"lr_end is {cfg.lr_end} with lr_scheduler_name 'constant', which has no such end: leave it out, or give"
        " 'cosineannealing'.",
    )
    ratio = cfg.data.max_norm_ratio
    require(ratio is None or ratio > 1, f"max_norm_ratio is {ratio}: give more than 1, or None.")


def _check_activation(clt: CLTSettings) -> None:
    selects = clt.activation in ("topk", "batchtopk")
    require(
        (clt.k is not None) == selects,
        f"k is {clt.k} with activation {clt.activation!r}: topk and batchtopk need k, others take none.",
    )
    for name in ("k", "k_start", "k_aux"):
        k = getattr(clt, name)
        require(
            k is None or 1 <= k <= clt.d_transcoder,
            f"{name} is {k} for {clt.d_transcoder} features per layer: give 1 to {clt.d_transcoder}.",
        )
    require(
        selects or clt.topk_across == "layer",
        f"topk_across is {clt.topk_across!r} with activation {clt.activation!r}: only topk and batchtopk have it.",
    )
    require(
        (clt.k_start is not None) == (clt.k_anneal_steps > 0),
        f"k_start is {clt.k_start} with k_anneal_steps {clt.k_anneal_steps}: give both or neither.",
    )
    require(
        clt.k_start is None or (selects and clt.k_start >= (clt.k or 0)),
        f"k_start is {clt.k_start} with k {clt.k}: k falls from k_start, which must be more; topk and batchtopk only.",
    )
    require(clt.far_rank is None or clt.far_rank >= 1, f"far_rank is {clt.far_rank}: give 1 or more, or leave it out.")
    require(
        clt.far_rank is None or clt.span != 1,
        f"far_rank is {clt.far_rank} with span 1: such features write to no far layer. Leave far_rank out.",
    )
    require(
        clt.far_write_coefficient == 0 or clt.span != 1,
        f"far_write_coefficient is {clt.far_write_coefficient:g} with span 1: such features write to no far layer."
        " Leave it out.",
    )
    require(clt.span is None or clt.span >= 1, f"span is {clt.span}: give 1 (PLT) to n_layers (CLT).")
    require(
        clt.input_hook != clt.output_hook,
        f"input_hook and output_hook are both {clt.input_hook!r}: give two different hooks.",
    )


def _check_sparsity(clt: CLTSettings) -> None:
    target = clt.target_l0
    require(
        target is None or 0 < target <= clt.d_transcoder,
        f"target_l0 is {target} for {clt.d_transcoder} features per layer: give more than 0 and at most as many.",
    )
    require(
        target is None or not clt.selects or target == round(target),
        f"target_l0 is {target} with activation {clt.activation!r}, which keeps a whole number of features: give"
        f" {math.floor(target or 0) or 1} or {math.floor(target or 0) + 1}, or activation 'jumprelu'.",
    )
    require(
        target is None or not clt.selects or clt.k == clt.k_asked_for(),
        f"target_l0 is {target} and k {clt.k} with activation {clt.activation!r}, whose L0 is k: give one of them.",
    )
    require(
        clt.sparsity_loss == "tanh" or clt.activation == "jumprelu",
        f"sparsity_loss is {clt.sparsity_loss!r} with activation {clt.activation!r}: its gradient goes through"
        " thresholds, which only jumprelu has. Use jumprelu, or leave it out.",
    )
    for name, having in HAVING.items():
        value, default = getattr(clt, name), CLTSettings.__dataclass_fields__[name].default
        require(
            value == default or clt.activation in having,
            f"{name} is {value!r} with activation {clt.activation!r}, where it has no part: leave it out, or set"
            f" activation to {' or '.join(map(repr, having))}.",
        )
    require(
        clt.sparsity_loss != "quadratic_l0" or target is not None,
        "sparsity_loss is 'quadratic_l0' without target_l0: set the active features per layer to reach.",
    )
    require(
        target is None or clt.sparsity_coefficient > 0,
        "sparsity_coefficient is 0 with target_l0: give more than 0 for lambda to start from.",
    )


def _check_data(data: DataSettings) -> None:
    per_prompt = data.positions_per_prompt
    require(
        per_prompt > 0,
        f"seqpos_slice {data.seqpos_slice} leaves none of {data.context_size} positions: widen it.",
    )
    needed = -(-data.train_batch_size_tokens // per_prompt)
    require(
        data.n_batches_in_buffer >= needed,
        f"n_batches_in_buffer is {data.n_batches_in_buffer}, which is a buffer of"
        f" {data.n_batches_in_buffer * per_prompt} tokens for a batch of {data.train_batch_size_tokens}:"
        f" give at least {needed}, better {4 * needed}, or a smaller train_batch_size_tokens.",
    )
    require(
        data.training_tokens >= data.train_batch_size_tokens,
        f"training_tokens is {data.training_tokens}, less than one batch of {data.train_batch_size_tokens}:"
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
