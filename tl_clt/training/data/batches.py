"""From a dataset to shuffled batches of scaled activations, in an order that can be taken up again.

    prompts --model, or cache--> chunks: the tokens of one forward pass that are trained on
    chunks --shuffling buffer--> batches: tokens mixed from many prompts
    batches --handed out to all ranks, scaled--> what a training step sees

Prompts and activations come out of SAELens's activation store. The shuffling buffer is SAELens's `mixing_buffer` in
what it does, with random numbers of its own (so that neither the trainer's numbers nor a background thread change the
order) and with a position: which tokens it holds, without their activations.

The main rank alone runs the model, shuffles, and reads or writes files. The order of tokens is therefore that of a
single process, a run can go on from a checkpoint on another number of ranks, and the other ranks hold no model. The
price: the model's forward passes are not split among the ranks. A token costs 6 operations per weight of the CLT,
shared by all ranks, and 2 per weight of the model, on one: with N_clt and N_model weights the others wait once there
are more than about 3 * N_clt / N_model ranks, and then cached activations take the model away.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, UInt8
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.util import get_special_token_ids
from torch import Tensor

from tl_clt.errors import ConfigError, DatasetError, HookNotFound, ModelUnsupported
from tl_clt.lens import (
    HookedModel,
    block_hook,
    mlp_hook_points,
    model_fingerprint,
    model_name,
    require_hooks,
    user_hooks_aside,
)
from tl_clt.training.config import HELD_OUT_EVERY, CLTSettings, CLTShape, DataSettings
from tl_clt.training.data.cache import ActivationCache, Activations, Prompts
from tl_clt.training.data.dataset import AnyDataset, require_known_tokens
from tl_clt.training.parallel import ProcessGrid

ActivationBatch = Float[Tensor, "batch 2 n_layers d_model"]


class ActivationScale(NamedTuple):
    """Factors that activations are multiplied by in training."""

    inputs: tuple[float, ...]
    """One a layer, for what features read."""

    outputs: tuple[float, ...]
    """One a layer, for what they write."""


def estimate_scale(batches: Sequence[ActivationBatch]) -> ActivationScale:
    """sqrt(d_model) / median norm over tokens, for the inputs and the outputs of each layer.

    The median, because a few tokens of huge norm would make all others small.

    Raises:
        ModelUnsupported: most of a layer's activations are zero, or not finite.
    """
    each = torch.cat([b.double().norm(dim=-1) for b in batches])
    norms = torch.where(each.isfinite().all(dim=0), each.median(dim=0).values, torch.nan)
    for side, values in zip(("input", "output"), norms.tolist(), strict=True):
        for layer, norm in enumerate(values):
            if not 0 < norm < float("inf"):
                raise ModelUnsupported(
                    f"The {side} of layer {layer} has median norm {norm}: there is nothing to learn from."
                    " Check the model's weights and the hook names."
                )
    inputs, outputs = (batches[0].shape[-1] ** 0.5 / norms).tolist()
    return ActivationScale(tuple(inputs), tuple(outputs))


def apply_scale(batch: ActivationBatch, scale: ActivationScale) -> ActivationBatch:
    """Every layer's inputs and outputs times their factors."""
    return batch * torch.tensor(scale, dtype=batch.dtype, device=batch.device)[..., None]


@dataclass(frozen=True)
class DataCounts:
    """Tokens read from the dataset so far, each in one of four places. Some that are kept still wait in the buffer."""

    epochs: int = 0
    """Times that the dataset was read to its end."""

    prompts: int = 0
    """Prompts that went through the model or came from the cache."""

    kept: int = 0
    """Tokens to train on."""

    other_positions: int = 0
    """Tokens left out by `seqpos_slice`."""

    special_tokens: int = 0
    """Tokens left out by `exclude_special_tokens`."""

    outliers: int = 0
    """Tokens left out by `max_norm_ratio`."""

    def in_words(self) -> str:
        """What was read and left out."""
        left_out = {
            "at other positions": self.other_positions,
            "special tokens": self.special_tokens,
            "of outlying norm": self.outliers,
        }
        left_out_text = ", ".join(f"{n:,} {what}" for what, n in left_out.items() if n > 0)
        return f"Of {self.prompts:,} prompts {self.kept:,} tokens were kept" + (
            f", and {left_out_text} left out." if left_out_text else "."
        )

    def __add__(self, other: DataCounts) -> DataCounts:
        """Both together."""
        mine, theirs = asdict(self), asdict(other)
        return DataCounts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class Rules:
    """Which tokens are trained on."""

    seqpos_slice: tuple[int | None, ...] = (None,)
    """Positions within a prompt, as the arguments of `slice`."""

    excluded: Int[Tensor, " n_ids"] | None = None
    """Token ids that are left out."""

    max_norm_ratio: float | None = None
    """Left out: tokens at which the norm of some layer's input is more than so many times the chunk's median of it.
    (The median, because the mean moves with what is to be left out. Inputs alone: a massive activation stays in the
    stream from the layer that writes it on. Outputs of a layer may well have two usual sizes, of which the rarer one is
    ten times the median: Gemma's first layer writes 15 times as much at every space as elsewhere.)"""

    def choose(self, tokens: Prompts, activations: Activations) -> tuple[Int[Tensor, " kept"], DataCounts]:
        """Which rows of `activations`, one for each token, prompt after prompt, to train on; and the counts."""
        within = torch.zeros_like(tokens, dtype=torch.bool)
        within[:, slice(*self.seqpos_slice)] = True
        ordinary = torch.ones_like(within) if self.excluded is None else ~torch.isin(tokens, self.excluded)
        wanted = within.flatten() & ordinary.flatten()
        kept = wanted
        if self.max_norm_ratio is not None and wanted.any():
            kept = wanted & _usual(activations, wanted, self.max_norm_ratio)
        n_within, n_wanted, n_kept = int(within.sum()), int(wanted.sum()), int(kept.sum())
        counts = DataCounts(
            prompts=len(tokens),
            kept=n_kept,
            other_positions=tokens.numel() - n_within,
            special_tokens=n_within - n_wanted,
            outliers=n_wanted - n_kept,
        )
        return kept.nonzero()[:, 0], counts


def _usual(activations: Activations, wanted: Bool[Tensor, " token"], max_norm_ratio: float) -> Bool[Tensor, " token"]:
    """Tokens none of whose inputs has a norm above the limit."""
    norms = activations[:, 0].norm(dim=-1, dtype=torch.promote_types(activations.dtype, torch.float32))
    limit = max_norm_ratio * norms[wanted].median(dim=0).values
    return (norms <= limit).flatten(start_dim=1).all(dim=1)


class ChunkPlace(NamedTuple):
    """Where a chunk is in the dataset."""

    epoch: int
    """Passes over the dataset before this one."""

    index: int
    """Chunks of this pass before this one."""


class Chunk(NamedTuple):
    """What one forward pass gives to train on."""

    place: ChunkPlace
    """Where it is."""

    rows: Activations
    """Activations of the tokens that are kept."""

    ids: Int[Tensor, " token"]
    """Which they are: index of the chunk * tokens of a full chunk + place within it. The same in every pass."""

    counts: DataCounts
    """Of this chunk alone."""

    tokens_digest: str
    """sha256 of all tokens of this pass up to the end of this chunk."""


class Chunks:
    """A dataset's activations, chunk by chunk, again and again.

    Args:
        one_pass: makes an iterator over the dataset's prompts, the same every time, some prompts at a time.
        read: raw activations of prompts, all positions.
        rules: which tokens to keep.
        full: tokens of a chunk that is not the last of its pass.
    """

    def __init__(
        self,
        one_pass: Callable[[], Iterator[Prompts]],
        read: Callable[[Prompts], Activations],
        rules: Rules,
        full: int,
    ) -> None:
        self._one_pass = one_pass
        self._read = read
        self._rules = rules
        self._full = full
        self.seconds = 0.0
        """That reading activations took."""

    def after(self, place: ChunkPlace | None, tokens_digest: str | None = None) -> Iterator[Chunk]:
        """The chunks that follow a place, without end; all of them where place is None.

        Args:
            place: of the last chunk that is not wanted again. Its pass is read to there, without the model.
            tokens_digest: what that chunk said of the tokens; they must be the same now.

        Raises:
            DatasetError: the tokens up to the place are others, or no token of a whole pass is kept, or of the first
                `MOST_WITHOUT_ANY` chunks of it.
        """
        epoch, skip = (0, 0) if place is None else (place.epoch, place.index + 1)
        while True:
            digest, prompts = hashlib.sha256(), self._one_pass()
            for tokens in islice(prompts, skip):
                digest.update(tokens.cpu().numpy().tobytes())
            if skip > 0 and digest.hexdigest() != tokens_digest:
                raise DatasetError(_OTHER_TOKENS)
            read = DataCounts()
            for index, tokens in enumerate(prompts, start=skip):
                digest.update(tokens.cpu().numpy().tobytes())
                chunk = self._chunk(ChunkPlace(epoch, index), tokens, digest.hexdigest(), new_epoch=index == 0 < epoch)
                read += chunk.counts
                yield chunk
                if read.kept == 0 and skip == 0 and index + 1 == MOST_WITHOUT_ANY:
                    raise _nothing_left(read)
            if read.kept == 0 and skip == 0:
                raise _nothing_left(read)
            epoch, skip = epoch + 1, 0

    def find(self, ids: Int[Tensor, " token"]) -> Activations:
        """The activations of tokens, in order, read once more. There must be at least one.

        Raises:
            DatasetError: the dataset is shorter than it was.
        """
        places, offsets = ids // self._full, ids % self._full
        wanted = set(places.tolist())
        rows: Tensor | None = None
        for index, tokens in enumerate(self._one_pass()):
            if index in wanted:
                found, here = self._read(tokens), places == index
                if rows is None:
                    rows = found.new_empty(len(ids), *found.shape[1:])
                rows[here.to(rows.device)] = found[offsets[here].to(found.device)]
                wanted.remove(index)
            if not wanted and rows is not None:
                return rows
        raise DatasetError(_OTHER_TOKENS)

    def _chunk(self, place: ChunkPlace, tokens: Prompts, digest: str, new_epoch: bool) -> Chunk:
        began = time.monotonic()
        activations = self._read(tokens)
        # Numbers come off the device here, which waits until it has made them.
        kept, counts = self._rules.choose(tokens.to(activations.device), activations)
        self.seconds += time.monotonic() - began
        ids = place.index * self._full + kept.cpu()
        return Chunk(place, activations[kept], ids, counts + DataCounts(epochs=int(new_epoch)), digest)


MOST_WITHOUT_ANY = 64
"""Chunks at the beginning of a pass that may be without a token to train on. A pass over a long text, whose prompts
are perhaps all too short or of words that the tokenizer does not know, would end hours later with the same."""


def _nothing_left(read: DataCounts) -> DatasetError:
    return DatasetError(
        f"No token is left to train on. {read.in_words()} Give a longer context_size, or text whose words the tokenizer"
        " knows (unknown ones are special tokens). Or widen seqpos_slice, exclude fewer tokens, or raise"
        " max_norm_ratio."
    )


_OTHER_TOKENS = (
    "The dataset gives other tokens than the run that is to be resumed read. Give the same dataset and tokenizer, or"
    " start a new run without resume."
)


@dataclass(frozen=True)
class Position:
    """Where a stream of batches is, after some batch. With the dataset and the model this is enough to go on."""

    place: ChunkPlace
    """Of the last chunk that went into the buffer."""

    tokens_digest: str
    """What that chunk says of its pass's tokens."""

    ids: Int[Tensor, " held"]
    """Tokens in the buffer, in order."""

    n_ready: int
    """Batches that come off its front before it is filled and shuffled again."""

    generator: UInt8[Tensor, " _"]
    """State of the shuffling's random numbers."""

    counts: DataCounts
    """What was read so far."""


class MixedBatches(Iterator[ActivationBatch]):
    """Batches of a fixed size from a buffer that is filled to `size` tokens, shuffled, and emptied to `kept`.

    As soon as the buffer holds all that is still wanted, nothing is read any more, and it is emptied: the last batch
    may be shorter. Whoever asks for more gets it.

    Args:
        chunks: without end.
        size: tokens to which the buffer is filled; a chunk may take it beyond.
        batch_size: tokens of a batch, at most `size`.
        kept: tokens that stay for the next shuffle, about.
        seed: of the shuffling.
        wanted: tokens of all batches, those before a position that is taken up included.
    """

    def __init__(
        self, chunks: Iterator[Chunk], *, size: int, batch_size: int, kept: int, seed: int, wanted: int
    ) -> None:
        self._chunks = chunks
        self._size, self._batch_size, self._kept, self._wanted = size, batch_size, kept, wanted
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: Activations | None = None
        self._ids = torch.empty(0, dtype=torch.int64)
        self._n_ready = 0
        self._place, self._tokens_digest = ChunkPlace(0, -1), ""
        self.counts = DataCounts()

    def go_on(self, position: Position, rows: Activations | None) -> None:
        """Take up a position; `rows` are the activations of its ids, None where it has none."""
        self._rows, self._ids, self._n_ready = rows, position.ids, position.n_ready
        self._place, self._tokens_digest = position.place, position.tokens_digest
        self._generator.set_state(position.generator)
        self.counts = position.counts

    @property
    def position(self) -> Position:
        """After the last batch that was handed out."""
        return Position(
            self._place, self._tokens_digest, self._ids, self._n_ready, self._generator.get_state(), self.counts
        )

    @property
    def _n_left(self) -> int:
        """Tokens that are still wanted; those of a whole batch where more are asked for than that."""
        left = self._wanted - (self.counts.kept - len(self._ids))
        return left if left > 0 else self._size

    def __next__(self) -> ActivationBatch:
        # Fewer tokens than a batch are ready where a run was to end that is now longer.
        if self._n_ready == 0 or len(self._ids) < min(self._batch_size, self._n_left):
            self._fill()
        assert self._rows is not None
        batch, self._rows = self._rows[: self._batch_size], self._rows[self._batch_size :]
        self._ids = self._ids[self._batch_size :]
        self._n_ready -= 1
        return batch

    def _fill(self) -> None:
        parts, ids = [] if self._rows is None else [self._rows], [self._ids]
        n_held, n_left = len(self._ids), self._n_left
        while n_held < min(self._size, n_left):
            chunk = next(self._chunks)
            parts.append(chunk.rows)
            ids.append(chunk.ids)
            n_held += len(chunk.ids)
            self._place, self._tokens_digest = chunk.place, chunk.tokens_digest
            self.counts += chunk.counts
        order = torch.randperm(n_held, generator=self._generator)
        self._ids = torch.cat(ids)[order]
        self._rows = _in_order(parts, order)
        kept = self._kept if n_left > n_held else 0
        self._n_ready = max(1, (min(n_held, n_left) - kept) // self._batch_size)


def _in_order(parts: list[Tensor], order: Int[Tensor, " held"]) -> Tensor:
    """`torch.cat(parts)[order]`, without the copy that cat makes. The list is emptied."""
    target = torch.empty_like(order)
    target[order] = torch.arange(len(order))
    mixed = parts[0].new_empty(len(order), *parts[0].shape[1:])
    start = 0
    while parts:
        part = parts.pop(0)
        mixed[target[start : start + len(part)].to(part.device)] = part
        start += len(part)
    return mixed


NOISE = (
    "Dataset is not tokenized",
    "The training dataset contains fewer samples",
    "All samples in the training dataset have been exhausted",
    "pretokenized dataset has context_size",
    "To copy construct from a tensor",
)
"""SAELens's warnings about what is meant to be so: text, repeats, and rows cut to context_size."""


def hook_names(model: HookedModel, clt: CLTShape) -> list[str]:
    """The input hook of every layer, then the output hook of every layer.

    Raises:
        HookNotFound: the model lacks one.
    """
    layers = range(model.cfg.n_layers)
    names = [block_hook(layer, hook) for hook in (clt.input_hook, clt.output_hook) for layer in layers]
    with mlp_hook_points(model):
        require_hooks(model, names)
    return names


def check_fits(model: HookedModel, clt: CLTShape, data: DataSettings) -> None:
    """Raise where the run asks for what the model does not have.

    Raises:
        HookNotFound: it lacks a hook.
        ConfigError: context_size, span or far_rank is more than the model's, or a token id to exclude is none of its.
    """
    hook_names(model, clt)
    name, n_ctx, n_layers = model_name(model), model.cfg.n_ctx, model.cfg.n_layers
    if data.context_size > n_ctx:
        raise ConfigError(
            f"context_size is {data.context_size}, but {name} takes {n_ctx} tokens: give at most {n_ctx}."
        )
    if clt.span is not None and clt.span > n_layers:
        raise ConfigError(f"span is {clt.span}, but {name} has {n_layers} layers: give 1 (PLT) to {n_layers} (CLT).")
    if clt.far_rank is not None and clt.far_rank > model.cfg.d_model:
        raise ConfigError(
            f"far_rank is {clt.far_rank}, but d_model of {name} is {model.cfg.d_model}, above which no rank is lower:"
            " give less, or leave far_rank out for full decoders."
        )
    excluded = () if isinstance(data.exclude_special_tokens, bool) else data.exclude_special_tokens
    strange = [one for one in excluded if one >= model.cfg.d_vocab]
    if strange:
        raise ConfigError(
            f"exclude_special_tokens has the token id {strange[0]}, but {name} has ids 0 to {model.cfg.d_vocab - 1}:"
            " give ids of this model."
        )


class ActivationBatches(Iterator[ActivationBatch]):
    """Endless, shuffled batches of raw inputs and outputs [batch, 2, n_layers, d_model] in the CLT's dtype.

    Prompts and activations are SAELens's store's. Hooks of the user's own are set aside, as in `attribute`: the model
    itself is read, whether or not its activations are cached. With `data.prefetch` a thread of its own runs the model
    for the next fill of the buffer while a step is made, in the same order: close the batches when done, and use the
    model elsewhere only within `paused()`.

    Args:
        model: run over the dataset.
        dataset: as `open_dataset` gives it.
        clt: what is trained: its hooks and dtype.
        data: what of the dataset, and how it is mixed.
        device: where the batches are.
        seed: of the shuffling.
        model_name: for people, in a cache's index.
        position: go on from there; from the beginning where left out.
        n_trained: tokens that were trained on up to the position. The model runs for `data.training_tokens` in all, and
            for more only where more batches are asked for.
    """

    def __init__(
        self,
        model: HookedModel,
        dataset: AnyDataset,
        clt: CLTSettings,
        data: DataSettings,
        *,
        device: str,
        seed: int,
        model_name: str,
        position: Position | None = None,
        n_trained: int = 0,
    ) -> None:
        read = _reader(model, dataset, clt, data, device, model_name)
        source = self._source = _chunks(model, dataset, clt, data, device, read)
        buffer = data.n_batches_in_buffer * data.positions_per_prompt
        kept = int(buffer * data.activations_mixing_fraction)
        rows = source.find(position.ids) if position is not None and len(position.ids) > 0 else None
        chunks = source.after(None) if position is None else source.after(position.place, position.tokens_digest)
        # The end of a short last batch was handed out and not trained on.
        handed_out = 0 if position is None else position.counts.kept - len(position.ids)
        wanted = data.training_tokens - n_trained + handed_out
        self._prefetching: PrefetchingIterator[Chunk] | None = None
        if data.prefetch:
            n_chunks = -(-(buffer - kept) // (data.store_batch_size_prompts * data.context_size))
            read_before = 0 if position is None else position.counts.kept
            self._prefetching = PrefetchingIterator(_until(chunks, wanted - read_before), max(1, n_chunks))
            chunks = chain(self._prefetching, chunks)
        self._batches = MixedBatches(
            chunks,
            size=buffer,
            batch_size=data.train_batch_size_tokens,
            kept=kept,
            seed=seed,
            wanted=wanted,
        )
        if position is not None:
            self._batches.go_on(position, rows)
        self._ahead: list[tuple[ActivationBatch, Position]] = []
        self._held_out = partial(_held_out, model, dataset, clt, data, device, read)
        self.position = self._batches.position
        """After the last batch that was handed out."""

    def __next__(self) -> ActivationBatch:
        if self._ahead:
            batch, self.position = self._ahead.pop(0)
        else:
            batch, self.position = next(self._batches), self._batches.position
        return batch

    def peek(self, n: int) -> list[ActivationBatch]:
        """The next n batches, which are still to be handed out."""
        while len(self._ahead) < n:
            self._ahead.append((next(self._batches), self._batches.position))
        return [batch for batch, _ in self._ahead[:n]]

    def held_out(self) -> HeldOutActivations:
        """Prompts that are kept out of training, and what the model makes of them. To be used within `paused()`."""
        return self._held_out()

    @property
    def seconds_in_model(self) -> float:
        """That the model's forward passes took so far, or reading the cache; on a thread of their own with prefetch."""
        return self._source.seconds

    def paused(self) -> AbstractContextManager[None]:
        """Within the block, no other thread runs the model."""
        return nullcontext() if self._prefetching is None else self._prefetching.paused()

    def close(self) -> None:
        """End the thread that runs the model."""
        if self._prefetching is not None:
            self._prefetching.close()


def _until(chunks: Iterator[Chunk], n_tokens: int) -> Iterator[Chunk]:
    """The first of the chunks that have so many tokens together; those after them stay."""
    while n_tokens > 0:
        chunk = next(chunks)
        n_tokens -= chunk.counts.kept
        yield chunk


class HeldOutActivations(NamedTuple):
    """What the final metrics are measured on."""

    n_tokens: int
    """Tokens of the prompts that are counted: all but position 0, as `evaluate` has it, and but those that
    `exclude_special_tokens` names: those that stand between two rows of text, which `evaluate` does not join."""

    kept_out: bool
    """Whether training leaves them out. False where the dataset is too short for that: then they are its first."""

    batches: Iterator[ActivationBatch]
    """Their raw activations, some prompts at a time."""


Reader: TypeAlias = "Callable[[Prompts], Activations]"
"""Gives prompts' activations [batch * pos, 2, n_layers, d_model]."""


def _chunks(
    model: HookedModel, dataset: AnyDataset, clt: CLTSettings, data: DataSettings, device: str, read: Reader
) -> Chunks:
    def one_pass() -> Iterator[Prompts]:
        prompts = _prompts(_store(model, dataset, clt, data, device), data, model.cfg.d_vocab)
        wanted = (prompt for i, prompt in enumerate(prompts) if not _is_held_out(i))
        return _in_groups(wanted, data.store_batch_size_prompts)

    rules = Rules(data.seqpos_slice, _excluded(model, data, device), data.max_norm_ratio)
    return Chunks(one_pass, read, rules, data.store_batch_size_prompts * data.context_size)


def _held_out(
    model: HookedModel, dataset: AnyDataset, clt: CLTSettings, data: DataSettings, device: str, read: Reader
) -> HeldOutActivations:
    n = data.n_eval_prompts
    first: list[Prompts] = []
    kept_out: list[Prompts] = []
    for i, prompt in enumerate(_prompts(_store(model, dataset, clt, data, device), data, model.cfg.d_vocab)):
        if i < n:
            first.append(prompt)
        if _is_held_out(i):
            kept_out.append(prompt)
        if len(kept_out) >= n:
            break
    chosen, excluded = kept_out or first, _excluded(model, data, device)
    wanted = torch.ones(len(chosen), data.context_size, dtype=torch.bool)
    wanted[:, : min(1, data.context_size - 1)] = False  # a prompt of one token has but its position 0
    if excluded is not None:
        ordinary = wanted & ~torch.isin(torch.cat(chosen).cpu(), excluded.cpu())
        wanted = ordinary if ordinary.any() else wanted
    masks = wanted.split(data.store_batch_size_prompts)
    groups = _in_groups(iter(chosen), data.store_batch_size_prompts)
    batches = (read(p)[mask.flatten().to(device)] for p, mask in zip(groups, masks, strict=True))
    return HeldOutActivations(int(wanted.sum()), bool(kept_out), batches)


def _is_held_out(prompt: int) -> bool:
    return prompt % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _reader(
    model: HookedModel, dataset: AnyDataset, clt: CLTSettings, data: DataSettings, device: str, model_name: str
) -> Reader:
    """The model, or a cache before it."""
    names, dtype = hook_names(model, clt), getattr(torch, clt.dtype)
    store = _store(model, dataset, clt, data, device)

    def run(tokens: Prompts) -> Activations:
        try:
            with user_hooks_aside(model):
                activations = store.get_multi_hook_activations(tokens)
        except KeyError as error:
            missing = error.args[0]
            if missing not in names:
                raise
            raise HookNotFound(
                f"'{missing}' is a hook of {model_name}, but nothing passes it: a flag of the model keeps it off (as"
                " use_hook_mlp_in does with hook_mlp_in). Set the flag, or give another hook."
            ) from error
        return pack([activations[name].flatten(0, 1).to(device) for name in names], names, model.cfg.d_model)

    if data.cache_path is None:
        return lambda tokens: run(tokens).to(dtype)
    cache = ActivationCache(Path(data.cache_path), model_fingerprint(model), names, data.cache_dtype, model_name)
    return lambda tokens: cache.read(tokens, run).to(device, dtype)


def _store(
    model: HookedModel, dataset: AnyDataset, clt: CLTSettings, data: DataSettings, device: str
) -> ActivationsStore:
    """SAELens's store, which reads prompts and runs the model; shuffling and leaving tokens out come after it."""
    names = hook_names(model, clt)
    return ActivationsStore.from_config_multi_hook(
        cast(Any, model),
        dataset=dataset,
        hook_names=names,
        hook_d_ins=dict.fromkeys(names, model.cfg.d_model),
        context_size=data.context_size,
        total_training_tokens=data.training_tokens,
        store_batch_size_prompts=data.store_batch_size_prompts,
        prepend_bos=data.prepend_bos,
        device=device,
        sequence_separator_token=data.sequence_separator_token,
    )


def _prompts(store: ActivationsStore, data: DataSettings, d_vocab: int) -> Iterator[Prompts]:
    """One pass over the store's dataset, a prompt [1, context_size] at a time.

    Raises:
        DatasetError: a row of token ids is not like the first, which `open_dataset` has checked.
    """
    for row in count():
        try:
            prompt = store.get_batch_tokens(1, raise_at_epoch_end=True)
        except StopIteration:
            return
        except (TypeError, ValueError, OverflowError) as error:
            if not store.is_dataset_tokenized:
                raise
            raise DatasetError(
                f"Row {row} of the dataset is no list of token ids ({error}): mend it or leave it out."
            ) from error
        yield require_known_tokens(prompt, row, data.context_size, d_vocab)


def _in_groups(prompts: Iterator[Prompts], n: int) -> Iterator[Prompts]:
    """n prompts at a time, and the rest at the end."""
    while group := list(islice(prompts, n)):
        yield torch.cat(group)


def pack(activations: list[Tensor], names: list[str], d_model: int) -> ActivationBatch:
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


def _excluded(model: HookedModel, data: DataSettings, device: str) -> Tensor | None:
    if data.exclude_special_tokens is False or (data.exclude_special_tokens is True and model.tokenizer is None):
        return None
    ids = data.exclude_special_tokens
    ids = get_special_token_ids(cast(Any, model.tokenizer)) if ids is True else list(ids)
    return torch.tensor(ids, dtype=torch.long, device=device)


@contextmanager
def without_store_noise() -> Iterator[None]:
    """Within the block, SAELens's warnings about text, repeats and cut rows stay silent."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


class Handout(Iterator[ActivationBatch]):
    """Of each batch, the tokens that this rank is to see: the n-th of n_data_parallel equal parts.

    Args:
        batches: on the main rank; None on others.
        grid: the ranks. On a single process, batches are as they are.
        shape: of one token's activations, [2, n_layers, d_model].
        dtype: of the batches.
        device: where this rank's part is to be.
    """

    def __init__(
        self,
        batches: Iterator[ActivationBatch] | None,
        grid: ProcessGrid,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._batches, self._grid = batches, grid
        self._shape, self._dtype, self._device = shape, dtype, device

    def __next__(self) -> ActivationBatch:
        batch = None if self._batches is None else next(self._batches)
        grid = self._grid
        if grid.n_processes == 1:
            assert batch is not None
            return batch
        n_tokens = torch.tensor(0 if batch is None else len(batch), device=self._device)
        dist.broadcast(n_tokens, src=0)
        part = torch.empty(int(n_tokens) // grid.n_data_parallel, *self._shape, dtype=self._dtype, device=self._device)
        if grid.feature_index == 0 and grid.n_data_parallel > 1:
            parts = None if batch is None else [p.contiguous() for p in batch.chunk(grid.n_data_parallel)]
            dist.scatter(part, parts, src=0, group=grid.data_group)
        elif batch is not None:
            part.copy_(batch)
        if grid.n_feature_shards > 1:
            dist.broadcast(part, src=grid.data_index * grid.n_feature_shards, group=grid.feature_group)
        return part


def from_main(tensor: Tensor | None, grid: ProcessGrid, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The main rank's tensor, on every rank; None is given on others."""
    if grid.n_processes == 1:
        assert tensor is not None
        return tensor
    shape = grid.on_main(lambda: tuple(tensor.shape) if tensor is not None else ())
    received = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.contiguous()
    dist.broadcast(received, src=0)
    return received
