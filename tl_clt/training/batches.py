"""Activations of all layers, token by token, out of SAELens's activation store."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.util import get_special_token_ids
from torch import Tensor

from tl_clt.errors import ConfigError
from tl_clt.lens import (
    HookedModel,
    block_hook,
    mlp_hook_points,
    model_fingerprint,
    model_name,
    require_hooks,
    require_tokenizer,
)
from tl_clt.training.cache import ActivationCache
from tl_clt.training.chunks import Activations, Chunk, Chunks, Prompts, Rules
from tl_clt.training.config import CLTTrainingRunnerConfig
from tl_clt.training.data import AnyDataset
from tl_clt.training.mixing import MixedBatches, Position
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
    with mlp_hook_points(model):
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


class ActivationBatches(Iterator[Batch]):
    """Endless, shuffled batches of raw inputs and outputs [batch, 2, n_layers, d_model] in the run's dtype.

    Prompts and activations are SAELens's store's. With `cfg.prefetch` a thread of its own runs the model for the next
    fill of the buffer while a step is made, in the same order: close the batches when done, and use the model
    elsewhere only within `paused()`.

    Args:
        model: run over the dataset.
        dataset: as `open_dataset` gives it.
        cfg: the run.
        position: go on from there; from the beginning where left out.
    """

    def __init__(
        self, model: HookedModel, dataset: AnyDataset, cfg: CLTTrainingRunnerConfig, position: Position | None = None
    ) -> None:
        source = _chunks(model, dataset, cfg)
        buffer = cfg.n_batches_in_buffer * len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
        kept = int(buffer * cfg.activations_mixing_fraction)
        rows = source.find(position.ids) if position is not None and len(position.ids) > 0 else None
        chunks = source.after(None) if position is None else source.after(position.place, position.tokens_digest)
        self._prefetching: PrefetchingIterator[Chunk] | None = None
        if cfg.prefetch:
            n_chunks = -(-(buffer - kept) // (cfg.store_batch_size_prompts * cfg.context_size))
            chunks = self._prefetching = PrefetchingIterator(chunks, max(1, n_chunks))
        self._batches = MixedBatches(
            chunks, size=buffer, batch_size=cfg.train_batch_size_tokens, kept=kept, seed=cfg.seed
        )
        if position is not None:
            self._batches.go_on(position, rows)
        self._ahead: list[tuple[Batch, Position]] = []
        self.position = self._batches.position
        """After the last batch that was handed out."""

    def __next__(self) -> Batch:
        if self._ahead:
            batch, self.position = self._ahead.pop(0)
        else:
            batch, self.position = next(self._batches), self._batches.position
        return batch

    def peek(self, n: int) -> list[Batch]:
        """The next n batches, which are still to be handed out."""
        while len(self._ahead) < n:
            self._ahead.append((next(self._batches), self._batches.position))
        return [batch for batch, _ in self._ahead[:n]]

    def paused(self) -> AbstractContextManager[None]:
        """Within, no other thread runs the model."""
        return nullcontext() if self._prefetching is None else self._prefetching.paused()

    def close(self) -> None:
        """End the thread that runs the model."""
        if self._prefetching is not None:
            self._prefetching.close()


def _chunks(model: HookedModel, dataset: AnyDataset, cfg: CLTTrainingRunnerConfig) -> Chunks:
    names, dtype, device = hook_names(model, cfg), getattr(torch, cfg.dtype), torch.device(cfg.device)
    store = _store(model, dataset, cfg, names)

    def run(tokens: Prompts) -> Activations:
        activations = store.get_multi_hook_activations(tokens)
        return pack([activations[name].flatten(0, 1).to(device) for name in names], names, model.cfg.d_model)

    def one_pass() -> Iterator[Prompts]:
        return _prompts(_store(model, dataset, cfg, names), cfg.store_batch_size_prompts)

    rules = Rules(cfg.seqpos_slice, _excluded(model, cfg), cfg.max_norm_ratio)
    full = cfg.store_batch_size_prompts * cfg.context_size
    if cfg.cache_path is None:
        return Chunks(one_pass, lambda tokens: run(tokens).to(dtype), rules, full)
    name = cfg.model_name or model_name(model)
    cache = ActivationCache(Path(cfg.cache_path), model_fingerprint(model), names, cfg.cache_dtype, name)
    return Chunks(one_pass, lambda tokens: cache.read(tokens, run).to(device, dtype), rules, full)


def _store(model: HookedModel, dataset: AnyDataset, cfg: CLTTrainingRunnerConfig, names: list[str]) -> ActivationsStore:
    """SAELens's store, which reads prompts and runs the model; shuffling and leaving tokens out come after it."""
    return ActivationsStore.from_config_multi_hook(
        cast(Any, model),
        dataset=dataset,
        hook_names=names,
        hook_d_ins=dict.fromkeys(names, model.cfg.d_model),
        context_size=cfg.context_size,
        total_training_tokens=cfg.training_tokens,
        store_batch_size_prompts=cfg.store_batch_size_prompts,
        prepend_bos=cfg.prepend_bos,
        device=cfg.device,
        sequence_separator_token=cfg.sequence_separator_token,
    )


def _prompts(store: ActivationsStore, n: int) -> Iterator[Prompts]:
    """One pass over the store's dataset, n prompts at a time and the rest at its end."""
    prompts: list[Prompts] = []
    while True:
        try:
            prompts.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
        except StopIteration:
            break
        if len(prompts) == n:
            yield torch.cat(prompts)
            prompts = []
    if prompts:
        yield torch.cat(prompts)


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
