"""What a training run's config must satisfy, each with the field and the mend in its message."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from tl_clt.arguments import as_choice, as_number, as_several, as_switch, as_whole, is_whole, plain, shown
from tl_clt.errors import ConfigError
from tl_clt.lens import Backend
from tl_clt.training.activations import StraightThrough, TrainedActivation
from tl_clt.training.cache import CacheDtype
from tl_clt.training.losses import SparsityKind
from tl_clt.training.selection import Across
from tl_clt.transcoder.config import DTYPES

if TYPE_CHECKING:
    from tl_clt.training.config import CLTTrainingRunnerConfig

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
