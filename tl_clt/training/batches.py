"""Activations of all layers, token by token, out of SAELens's activation store."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor

from tl_clt.errors import ConfigError
from tl_clt.lens import HookedModel, block_hook, model_name, require_hooks, require_tokenizer
from tl_clt.training.config import CLTTrainingRunnerConfig
from tl_clt.training.data import AnyDataset
from tl_clt.training.scaling import Batch

NOISE = (
    "Dataset is not tokenized",
    "The training dataset contains fewer samples",
    "All samples in the training dataset have been exhausted",
    "pretokenized dataset has context_size",
    "To copy construct from a tensor",
)
"""SAELens's warnings about what is meant to be so: text, repeats, and rows cut to context_size."""


def hook_names(model: HookedModel, cfg: CLTTrainingRunnerConfig) -> list[str]:
    """The input hook of every layer, then the output hook of every layer.

    Raises:
        HookNotFound: the model lacks one.
    """
    layers = range(model.cfg.n_layers)
    names = [block_hook(layer, hook) for hook in (cfg.input_hook, cfg.output_hook) for layer in layers]
    require_hooks(model, names)
    return names


def check_fits(model: HookedModel, cfg: CLTTrainingRunnerConfig) -> None:
    """Raise where the run asks for what the model does not have.

    Raises:
        HookNotFound: it lacks a hook.
        ConfigError: context_size or span is more than the model's.
        TokenizerMissing: special tokens are to be left out, and there is no tokenizer to name them.
    """
    hook_names(model, cfg)
    name, n_ctx, n_layers = model_name(model), model.cfg.n_ctx, model.cfg.n_layers
    if cfg.context_size > n_ctx:
        raise ConfigError(f"context_size is {cfg.context_size}, but {name} takes {n_ctx} tokens: give at most {n_ctx}.")
    if cfg.span is not None and cfg.span > n_layers:
        raise ConfigError(f"span is {cfg.span}, but {name} has {n_layers} layers: give 1 (PLT) to {n_layers} (CLT).")
    if cfg.exclude_special_tokens is True:
        require_tokenizer(model, "name its special tokens, which exclude_special_tokens=True leaves out,")


def activation_batches(model: HookedModel, dataset: AnyDataset, cfg: CLTTrainingRunnerConfig) -> Iterator[Batch]:
    """Endless, shuffled batches of raw inputs and outputs [batch, 2, n_layers, d_model] in the run's dtype."""
    names, d_model = hook_names(model, cfg), model.cfg.d_model
    store = ActivationsStore.from_config_multi_hook(
        cast(Any, model),
        dataset=dataset,
        hook_names=names,
        hook_d_ins=dict.fromkeys(names, d_model),
        context_size=cfg.context_size,
        n_batches_in_buffer=cfg.n_batches_in_buffer,
        total_training_tokens=cfg.training_tokens,
        store_batch_size_prompts=cfg.store_batch_size_prompts,
        train_batch_size_tokens=cfg.train_batch_size_tokens,
        prepend_bos=cfg.prepend_bos,
        device=cfg.device,
        dtype=cfg.dtype,
        seqpos_slice=cfg.seqpos_slice,
        exclude_special_tokens=_excluded(model, cfg),
        sequence_separator_token=cfg.sequence_separator_token,
        activations_mixing_fraction=cfg.activations_mixing_fraction,
    )
    dtype = getattr(torch, cfg.dtype)
    for batch in store.get_multi_hook_data_loader():
        yield pack([batch[name] for name in names], names, d_model).to(dtype)


def pack(activations: list[Tensor], names: list[str], d_model: int) -> Batch:
    """The 2 * n_layers hooks' activations [batch, d_model] as [batch, 2, n_layers, d_model].

    Raises:
        ConfigError: a hook's width is not d_model.
    """
    for name, value in zip(names, activations, strict=True):
        if value.shape[-1] != d_model:
            raise ConfigError(
                f"'{name}' has width {value.shape[-1]}, but a CLT reads and writes d_model = {d_model}: give hooks"
                " of the residual stream or the MLP's output."
            )
    return torch.stack(activations, dim=1).unflatten(1, (2, -1))


def _excluded(model: HookedModel, cfg: CLTTrainingRunnerConfig) -> Tensor | None:
    if cfg.exclude_special_tokens is False:
        return None
    ids = cfg.exclude_special_tokens
    ids = get_special_token_ids(cast(Any, model.tokenizer)) if ids is True else list(ids)
    return torch.tensor(ids, dtype=torch.long, device=cfg.device)


@contextmanager
def without_store_noise() -> Iterator[None]:
    """Within, SAELens's warnings about text, repeats and cut rows stay silent."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield
