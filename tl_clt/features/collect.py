"""One pass over a text that makes a `FeatureStore`.

What is kept of each feature has a fixed size (`KeptContexts`, counts), whatever the length of the text. It depends on
the set of prompts alone, not on their order: so any number of processes may share the prompts, and a pass that was
interrupted may go on, and the store is the same to the bit. Each process writes what it has so far to a file of its
own, and the first one puts them together.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tl_clt.arguments import as_path, as_switch, as_whole
from tl_clt.errors import ConfigError, DatasetError, MemoryLimit, NotWritten, OutputNotEmpty
from tl_clt.features.checksums import write_checksums
from tl_clt.features.connections import strongest_connections
from tl_clt.features.kept import LAST, KeptContexts, Windows, rank_at_random, rank_by_peak
from tl_clt.features.logits import direct_logits
from tl_clt.features.processes import Processes, sharing
from tl_clt.features.store import (
    ABOUT,
    BANDS,
    EXAMPLES,
    FORMAT,
    HELD_OUT,
    HISTOGRAM_EDGES,
    PARTS,
    STATISTICS,
    TOKENS,
    UNFINISHED,
    VERSION,
    FeatureStore,
)
from tl_clt.files import files_into, new_file, read_json, reading, require_new
from tl_clt.lens import HookedModel, model_name, special_token_ids, token_strings
from tl_clt.machine import GIB, free_memory
from tl_clt.replacement import check_fit, layer_inputs
from tl_clt.shapes import TokenBatch, Tokens
from tl_clt.texts import HeldOut, NumberedBatch, held_out_prompts, numbered_batches, up_to
from tl_clt.transcoder import CrossLayerTranscoder

SAMPLED_PER_BAND = 6
"""Prompts of the random sample for each of its quarters; `n_per_band` of them are shown."""
LOGITS_AT_ONCE = 2**24
BATCHES_BETWEEN_FILES = 64
"""After so many batches a process writes what it has."""
HELD_OUT_EVERY = 4
"""Of so many prompts one is for choosing labels and one for scoring them, until there are enough."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a store's content depends on, beside model, CLT and text."""

    max_tokens: int | None
    context_size: int | None
    n_top: int
    n_per_band: int
    before: int
    after: int
    n_logits: int
    n_connected: int
    label_tokens: int

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return self.before + 1 + self.after

    @property
    def n_sampled(self) -> int:
        """Prompts of the random sample."""
        return SAMPLED_PER_BAND * (len(BANDS) - 1)


@torch.no_grad()
def collect_features(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    text: HeldOut,
    folder: str | Path,
    *,
    max_tokens: int | None = None,
    context_size: int | None = None,
    n_top: int = 8,
    n_per_band: int = 2,
    before: int = 16,
    after: int = 8,
    n_logits: int = 10,
    n_connected: int = 10,
    label_tokens: int = 16_384,
    resume: bool = False,
    progress: bool = True,
) -> FeatureStore:
    """Make a feature store of a CLT from a text.

    Each feature gets the prompts in which it is most active, some of each quarter of a uniform random sample of the
    prompts in which it is active at all (by rank of its greatest activation there), each as the window around that
    activation; density and histogram of its activations over all tokens; the output tokens that it pushes up and
    down; and the features that it is most connected with. Position 0 and special tokens are left out, as in training.
    Labels come next: `label_features`.

    Started by torchrun, each process takes its share of the prompts, and the store is that of one process; `folder`
    must lie on a disk that all of them see. A pass that was cut off goes on with `resume=True`, on any number of
    processes; of one that is done, with this CLT, these settings and this text, the store is given back. Memory, beside
    model and CLT: for each feature `KeptContexts.bytes_per_feature` for every kept context (about 5 KiB in all), twice
    on the first process; it is checked before the work starts.

    Args:
        text: what `evaluate` takes: prompts, token ids, a text file, a folder, a hub name, a `datasets` object.
        folder: a new or empty folder.
        max_tokens: stop after the prompt that reaches so many tokens, those kept out for labels among them: prompts
            are read whole. None for all.
        context_size: tokens of a prompt at most. None for 128, or the model's own where that is less.
        n_top, n_per_band: contexts of the greatest activations, and of each quarter.
        before, after: tokens of a window around its peak.
        n_logits, n_connected: output tokens (up, and down) and connected features of each.
        label_tokens: prompts of about so many tokens are kept out of all this for choosing labels, and of as many for
            scoring them; together at most half of the text. 0 for none.
        resume: go on with what an interrupted call left in `folder`, or made whole.
        progress: show a bar.

    Raises:
        CLTMismatch, HookNotFound: the CLT is of another model.
        ConfigError: a pass is to be resumed that had another CLT or other settings.
        DatasetError, PromptError, TokenizerMissing: the text cannot be read, or differs from that of a resumed pass.
        OutputNotEmpty, NotWritten: the folder holds something else, or cannot be written. Where a disk becomes full,
            what was read stays and the call can be resumed; where nothing was read yet, nothing is left.
        MemoryLimit: what is kept would not fit.
    """
    check_fit(model, clt)
    settings = Settings(
        max_tokens=as_whole("max_tokens", max_tokens, 1, none="all"),
        context_size=context_size,
        n_top=as_whole("n_top", n_top, 1),
        n_per_band=as_whole("n_per_band", n_per_band, 0, SAMPLED_PER_BAND, why="the prompts sampled for a quarter"),
        before=as_whole("before", before, 0),
        after=as_whole("after", after, 0),
        n_logits=as_whole("n_logits", n_logits, 0, model.cfg.d_vocab, why="the size of the vocabulary"),
        n_connected=as_whole("n_connected", n_connected, 0),
        label_tokens=as_whole("label_tokens", label_tokens, 0),
    )
    path = as_path("folder", folder)
    prompts = held_out_prompts(model, text, settings.context_size)
    if isinstance(text, (list, tuple, Tensor, np.ndarray)):
        # A prompt that cannot be taken is told before the pass, which may be long, and not within it.
        for _ in up_to(held_out_prompts(model, text, settings.context_size), settings.max_tokens):
            pass
    _check_memory(clt, settings)
    with sharing(clt.W_enc.device) as processes:
        started = {"clt": clt.fingerprint(), "settings": asdict(settings)}
        is_new, was_begun = not path.exists(), (path / UNFINISHED / ABOUT).is_file()
        if processes.on_main(partial(_is_finished, path, started, as_switch("resume", resume), prompts)):
            return FeatureStore.open(path)
        with _kept_or_gone(path, is_new, mine=processes.rank == 0 and not was_begun):
            held_out = HeldOutPrompts(settings.label_tokens)
            counted = held_out.kept_apart(up_to(prompts, settings.max_tokens))
            done = _done(path / UNFINISHED)
            n_files = len(list((path / UNFINISHED).glob("part-*")))
            own_file = path / UNFINISHED / f"part-{processes.rank}-of-{processes.n}-{n_files}.safetensors"
            processes.everywhere(lambda: None)  # all have named their files before one is written
            show = tqdm(desc="Features", unit=" tokens", disable=not progress or processes.rank > 0)
            with show:
                found, *_ = processes.everywhere(
                    lambda: _pass(model, clt, counted, settings, own_file, processes, done, show)
                )
            processes.on_main(lambda: _finish(model, clt, settings, path, found, held_out))
    return FeatureStore.open(path)


def require_text_for_labels(
    model: HookedModel, text: HeldOut, max_tokens: int | None, context_size: int | None, label_tokens: int
) -> None:
    """Raise where a store of this text would have none to choose and score labels on, before the text is read through.

    Args:
        model, text, max_tokens, context_size, label_tokens: as for `collect_features`.

    Raises:
        DatasetError: there are fewer than 4 prompts, or label_tokens is 0.
        PromptError, TokenizerMissing, ConfigError: as for `collect_features`.
    """
    most = as_whole("max_tokens", max_tokens, 1, none="all")
    kept = HeldOutPrompts(as_whole("label_tokens", label_tokens, 0))
    first = islice(up_to(held_out_prompts(model, text, context_size), most), HELD_OUT_EVERY)
    n_others = sum(1 for _ in kept.kept_apart(first))
    if not all(kept.prompts.values()):
        n_prompts = n_others + sum(map(len, kept.prompts.values()))
        too_few = f"it has {n_prompts} prompts, and takes {HELD_OUT_EVERY} at least"
        why = too_few if n_prompts < HELD_OUT_EVERY else "label_tokens is 0"
        raise DatasetError(
            f"The text leaves none to choose and score labels on: {why}. Give more, or make a store without labels"
            " (`--labels none`)."
        )


@contextmanager
def _kept_or_gone(path: Path, is_new: bool, mine: bool) -> Iterator[None]:
    """Within, an error leaves what the pass can go on from, and says so where it is that of a full disk; or nothing.

    Args:
        path: folder of the store.
        is_new: whether it was made for it.
        mine: whether the beginning in it was made by this call and this process, which then removes it.
    """
    try:
        yield
    except BaseException as error:
        is_kept = any((path / UNFINISHED).glob("part-*"))
        if mine and not is_kept:
            shutil.rmtree(path / UNFINISHED, ignore_errors=True)
            if is_new and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if is_kept and isinstance(error, NotWritten):
            raise NotWritten(
                f"{error} What was read before is kept in '{path}': the same call with resume=True (`--resume`) goes on"
                " from there."
            ) from error
        raise


class Passed(NamedTuple):
    """What a pass has seen, on any process."""

    n_prompts: int
    n_batches: int


def _pass(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompts: Iterable[tuple[int, Tokens]],
    settings: Settings,
    own_file: Path,
    processes: Processes,
    done: dict[int, int],
    show: tqdm,
) -> Passed:
    """This process's share of the batches, into a file of its own. Every process reads the whole text."""
    collected = Collected(clt, settings)
    special = torch.tensor(special_token_ids(model), dtype=torch.long, device=clt.W_enc.device)
    store = own_file.parent.parent
    n_prompts, n_batches, unwritten = 0, 0, 0
    batches = numbered_batches(model, prompts, values_per_token=2 * clt.cfg.d_transcoder)
    for n_batches, batch in enumerate(batches, start=1):
        n_prompts += len(batch.numbers)
        show.update(batch.tokens.numel())
        number, digest = n_batches - 1, _digest(batch)
        if number in done:
            if done[number] != digest:
                raise DatasetError(
                    f"Batch {number} of the text is another than in the pass that is to be resumed: '{store}'"
                    " was begun on another text. Give the same text, or a new folder."
                )
            continue
        if number % processes.n != processes.rank:
            continue
        collected.add(model, clt, batch, special)
        collected.batches.append((number, digest))
        unwritten += 1
        if unwritten == BATCHES_BETWEEN_FILES:
            collected.write(own_file)
            unwritten = 0
    if unwritten:
        collected.write(own_file)
    if any(number >= n_batches for number in done):
        raise DatasetError(
            f"The text ends before that of the pass that is to be resumed: '{store}' was begun on another text."
            " Give the same text, or a new folder."
        )
    return Passed(n_prompts, n_batches)


class Collected:
    """What a process has of every feature so far."""

    def __init__(self, clt: CrossLayerTranscoder, settings: Settings) -> None:
        n_layers, d_transcoder, device = clt.cfg.n_layers, clt.cfg.d_transcoder, clt.W_enc.device
        n = n_layers * d_transcoder
        self.settings = settings
        self.top = KeptContexts(n, settings.n_top, settings.width, device)
        self.sample = KeptContexts(n, settings.n_sampled, settings.width, device)
        self.n_active = torch.zeros(n, dtype=torch.int64, device=device)
        self.max_activation = torch.zeros(n, dtype=torch.float32, device=device)
        self.histogram = torch.zeros(n, len(HISTOGRAM_EDGES) - 1, dtype=torch.int64, device=device)
        self.n_tokens = 0
        self.batches: list[tuple[int, int]] = []
        """Number and digest of each batch."""

    def add(self, model: HookedModel, clt: CrossLayerTranscoder, batch: NumberedBatch, special: Tensor) -> None:
        """Count a batch in."""
        tokens = batch.tokens
        wanted = counted_tokens(tokens, special)
        self.n_tokens += int(wanted.sum())
        inputs = layer_inputs(model, clt, tokens)
        for layer in clt.layers:
            acts = clt.encode_layer(inputs[..., layer, :], layer).feature_acts
            acts = torch.where(wanted[..., None], acts, 0).to(torch.float32)
            self._count(acts, layer)
            self._keep(acts, layer, batch.numbers.to(tokens.device), tokens)

    def _count(self, acts: Float[Tensor, "batch pos d_transcoder"], layer: int) -> None:
        d_transcoder, n_bins = acts.shape[-1], self.histogram.shape[1]
        own = slice(layer * d_transcoder, (layer + 1) * d_transcoder)
        *_, features = where = torch.nonzero(acts > 0, as_tuple=True)
        edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float32, device=acts.device)
        bins = (torch.bucketize(acts[where], edges, right=True) - 1).clamp(0, n_bins - 1)
        counts = torch.bincount(features * n_bins + bins, minlength=d_transcoder * n_bins).view(d_transcoder, n_bins)
        self.histogram[own] += counts
        self.n_active[own] += counts.sum(dim=1)
        self.max_activation[own] = self.max_activation[own].maximum(acts.amax(dim=(0, 1)))

    def _keep(
        self,
        acts: Float[Tensor, "batch pos d_transcoder"],
        layer: int,
        numbers: Int[Tensor, " batch"],
        tokens: TokenBatch,
    ) -> None:
        peaks, positions = acts.max(dim=1)
        live = torch.nonzero(peaks.amax(dim=0) > 0).flatten()
        if not len(live):
            return
        peak, at = peaks[:, live].T, positions[:, live].T
        features = layer * acts.shape[-1] + live
        prompt = numbers.expand(len(live), -1)
        offsets = torch.arange(-self.settings.before, self.settings.after + 1, device=tokens.device)

        def windows(rows: Int[Tensor, " c"], prompts: Int[Tensor, " c"]) -> Windows:
            around = at[rows, prompts][:, None] + offsets
            inside = (around >= 0) & (around < tokens.shape[1])
            around = around.clamp(0, tokens.shape[1] - 1)
            found = torch.where(inside, tokens[prompts[:, None], around], -1)
            values = acts[prompts[:, None], around, live[rows][:, None]] / peak[rows, prompts][:, None]
            return Windows(found.to(torch.int32), torch.where(inside, values, 0).to(torch.float16))

        self.top.add(features, rank_by_peak(peak), prompt, peak, windows)
        self.sample.add(features, rank_at_random(features, numbers, peak), prompt, peak, windows)

    def write(self, path: Path) -> None:
        tensors = {
            **self.top.named_tensors("top."),
            **self.sample.named_tensors("sample."),
            "n_active": self.n_active,
            "max_activation": self.max_activation,
            "histogram": self.histogram,
            "n_tokens": torch.tensor([self.n_tokens]),
            "batches": torch.tensor(self.batches, dtype=torch.int64).reshape(-1, 2),
        }
        with new_file(path) as unfinished:
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, unfinished)

    def merge(self, path: Path) -> None:
        """Add what another process, or an earlier pass, wrote."""
        with reading(path, "part of a feature store", RESTART), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            for name in ("n_active", "histogram"):
                getattr(self, name).add_(tensors[name].to(self.n_active.device))
            other = tensors["max_activation"].to(self.n_active.device)
            self.max_activation = self.max_activation.maximum(other)
            self.n_tokens += int(tensors["n_tokens"])
            self.top.merge(tensors, "top.")
            self.sample.merge(tensors, "sample.")


RESTART = "Remove the folder, and start anew without resume."


def counted_tokens(tokens: TokenBatch, special: Int[Tensor, " n"]) -> Bool[Tensor, "batch pos"]:
    """Where features are looked at: not at position 0, at which activations are huge and mean nothing, and not at
    special tokens."""
    wanted = ~torch.isin(tokens, special)
    wanted[:, 0] = False
    return wanted


class HeldOutPrompts:
    """The prompts that are kept for labels, in the order of the text. What is kept depends on their numbers and
    lengths alone."""

    def __init__(self, n_tokens: int) -> None:
        self._left: dict[str, int] = dict.fromkeys(PARTS, n_tokens)
        self.prompts: dict[str, list[Tensor]] = {part: [] for part in PARTS}

    def kept_apart(self, prompts: Iterable[Tokens]) -> Iterator[tuple[int, Tokens]]:
        """The prompts that are not kept, with their numbers in the text."""
        turns = {1: PARTS[0], 3: PARTS[1]}
        for number, tokens in enumerate(prompts):
            part = turns.get(number % HELD_OUT_EVERY)
            if part is None or self._left[part] <= 0:
                yield number, tokens
                continue
            self._left[part] -= len(tokens)
            self.prompts[part].append(tokens)

    @property
    def are_enough(self) -> bool:
        """Whether no more of the text will be kept."""
        return max(self._left.values()) <= 0

    def tensors(self) -> dict[str, Tensor]:
        of = [(PARTS.index(part), tokens.cpu()) for part, prompts in self.prompts.items() for tokens in prompts]
        lengths = torch.tensor([0, *(len(tokens) for _, tokens in of)])
        return {
            "tokens": torch.cat([torch.zeros(0, dtype=torch.int32), *(t.to(torch.int32) for _, t in of)]),
            "starts": lengths.cumsum(0),
            "part": torch.tensor([part for part, _ in of], dtype=torch.uint8),
        }


# -- files of a pass


def _is_finished(path: Path, started: dict[str, Any], resume: bool, prompts: Iterator[Tokens]) -> bool:
    """Make the folder of an unfinished store, or find that of the pass to go on with; or else tell that the pass to go
    on with is done."""
    unfinished = path / UNFINISHED
    begun = unfinished / ABOUT
    if resume and begun.is_file():
        with reading(begun, "beginning of a feature store", RESTART):
            before = read_json(begun.read_text(encoding="utf-8"))
            _require_same(path, "begun", before["clt"], before["settings"], started)
        return False
    if resume and (path / ABOUT).is_file():
        store = FeatureStore.open(path)
        with reading(path / ABOUT, "index of a feature store", RESTART):
            about = store.about
            _require_same(path, "made", about["clt"]["fingerprint"], about["settings"], started)
        _require_same_text(store, up_to(prompts, started["settings"]["max_tokens"]), started["settings"])
        return True
    if begun.is_file():
        raise OutputNotEmpty(
            f"'{path}' holds an unfinished store. Go on with it by resume=True (`--resume`), or give a new folder."
        )
    require_new(path)
    with new_file(begun) as file:
        file.write_text(json.dumps(started), encoding="utf-8")
    return False


def _require_same(path: Path, how: str, clt: str, settings: dict[str, Any], started: dict[str, Any]) -> None:
    """Raise unless a store was begun, or made, with this CLT and these settings."""
    if clt != started["clt"]:
        raise ConfigError(f"'{path}' was {how} with another CLT. Give that CLT, or a new folder.")
    now = started["settings"]
    changed = ", ".join(f"{k} {settings.get(k)} -> {now[k]}" for k in now if settings.get(k) != now[k])
    if changed:
        raise ConfigError(f"'{path}' was {how} with other settings ({changed}). Give the same, or a new folder.")


def _require_same_text(store: FeatureStore, prompts: Iterable[Tokens], settings: dict[str, Any]) -> None:
    """Raise unless the prompts that this text would hold out for labels are those that a store has. No more is read
    than has them; with label_tokens=0 nothing tells one text from another."""
    held_out = HeldOutPrompts(settings["label_tokens"])
    left = held_out.kept_apart(prompts)
    while not held_out.are_enough and next(left, None) is not None:
        pass
    for part in PARTS:
        own, given = store.held_out(part), held_out.prompts[part]
        if len(own) != len(given) or not all(map(torch.equal, own, (tokens.cpu().long() for tokens in given))):
            raise DatasetError(f"'{store.folder}' was made of another text. Give the same text, or a new folder.")


def _done(folder: Path) -> dict[int, int]:
    """Digests by number of the batches that earlier passes have counted."""
    done: dict[int, int] = {}
    for path in sorted(folder.glob("part-*")):
        with reading(path, "part of a feature store", RESTART), safe_open(path, framework="pt") as file:
            done |= dict(file.get_tensor("batches").tolist())
    return done


def _digest(batch: NumberedBatch) -> int:
    ids = torch.cat([batch.numbers.cpu(), batch.tokens.cpu().flatten()]).to(torch.int64)
    return int.from_bytes(hashlib.sha256(ids.numpy().data).digest()[:7], "big")


def _check_memory(clt: CrossLayerTranscoder, settings: Settings) -> None:
    n = clt.cfg.n_layers * clt.cfg.d_transcoder
    of_feature = sum(KeptContexts.bytes_per_feature(k, settings.width) for k in (settings.n_top, settings.n_sampled))
    needed = 2 * n * (of_feature + 8 * len(HISTOGRAM_EDGES) + 16)
    free = free_memory(clt.W_enc.device)
    if free is not None and needed > 0.8 * free:
        raise MemoryLimit(
            f"Keeping the contexts of {n} features takes {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free:"
            " lower n_top, before or after, or use a larger machine."
        )


# -- the store


def _finish(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    settings: Settings,
    path: Path,
    passed: Passed,
    held_out: HeldOutPrompts,
) -> None:
    """Put all parts together and write the store."""
    whole = Collected(clt, settings)
    for part in sorted((path / UNFINISHED).glob("part-*")):
        whole.merge(part)
    if whole.n_tokens == 0:
        raise DatasetError("The text has no token to look at: give a longer one, or a lower label_tokens.")
    n_layers, d_transcoder = clt.cfg.n_layers, clt.cfg.d_transcoder

    def by_layer(values: Tensor) -> Tensor:
        return values.unflatten(0, (n_layers, d_transcoder)).cpu()

    statistics = {name: by_layer(getattr(whole, name)) for name in ("n_active", "max_activation", "histogram")}
    if int(statistics["histogram"].max()) < 2**31:
        statistics["histogram"] = statistics["histogram"].to(torch.int32)
    statistics |= _weights(model, clt, settings, statistics["n_active"] > 0)
    examples = _example_tensors(whole, settings)
    mentioned = [statistics["top_tokens"], statistics["bottom_tokens"], examples["tokens"]]
    ids = torch.cat([t.flatten().long() for t in mentioned]).unique()
    tokens = dict(zip(map(str, ids.tolist()), token_strings(model, ids.to(model.W_E.device)), strict=True))
    about = {
        "format": FORMAT,
        "version": VERSION,
        "clt": {
            "fingerprint": clt.fingerprint(),
            "model_name": model_name(model),
            "n_layers": n_layers,
            "d_transcoder": d_transcoder,
        },
        "text": {
            "n_tokens": whole.n_tokens,
            "n_prompts": passed.n_prompts,
            "n_prompts_held_out": {part: len(prompts) for part, prompts in held_out.prompts.items()},
        },
        "settings": asdict(settings),
    }
    with files_into(path) as unfinished:
        save_file({name: t.contiguous() for name, t in statistics.items()}, unfinished / STATISTICS)
        save_file(examples, unfinished / EXAMPLES)
        save_file(held_out.tensors(), unfinished / HELD_OUT)
        (unfinished / TOKENS).write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
        (unfinished / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        write_checksums(unfinished)
    shutil.rmtree(path / UNFINISHED)


def _weights(
    model: HookedModel, clt: CrossLayerTranscoder, settings: Settings, live: Bool[Tensor, "n_layers d_transcoder"]
) -> dict[str, Tensor]:
    """What the weights alone tell of every feature; connections among those that were active."""
    k, rows = settings.n_logits, max(1, LOGITS_AT_ONCE // model.cfg.d_vocab)
    found: dict[str, list[Tensor]] = {}
    for layer in clt.layers:
        for features in torch.arange(clt.cfg.d_transcoder).split(rows):
            logits = direct_logits(model, clt, layer, features).float()
            up, down = logits.topk(k, dim=1), logits.topk(k, dim=1, largest=False)
            values = {
                "decoder_norm": clt.decoder_rows(layer, features).float().flatten(start_dim=1).norm(dim=1),
                **{"top_tokens": up.indices.to(torch.int32), "top_values": up.values},
                **{"bottom_tokens": down.indices.to(torch.int32), "bottom_values": down.values},
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value.cpu())
    shape = (clt.cfg.n_layers, clt.cfg.d_transcoder)
    tensors = {name: torch.cat(values).unflatten(0, shape) for name, values in found.items()}
    partner, weight = strongest_connections(clt, settings.n_connected, live)
    return tensors | {"connected": partner.to("cpu", torch.int32), "connected_weights": weight.cpu()}


def _example_tensors(whole: Collected, settings: Settings) -> dict[str, Tensor]:
    """The contexts of all features one after another: the greatest activations, then those of each quarter."""
    top, sample = whole.top, whole.sample
    chosen = [_chosen_of_sample(sample.rank[f], sample.peak[f], settings) for f in range(len(sample.rank))]
    counts, bands, rows = [0], [], []
    for feature, of_sample in enumerate(chosen):
        slots = torch.nonzero(top.rank[feature] < LAST).flatten().tolist()
        shown = set(top.prompt[feature, slots].tolist())
        more = [(slot, band) for slot, band in of_sample if int(sample.prompt[feature, slot]) not in shown]
        rows += [(top, feature, slot) for slot in slots] + [(sample, feature, slot) for slot, _ in more]
        bands += [0] * len(slots) + [band for _, band in more]
        counts.append(len(slots) + len(more))
    width = settings.width
    tokens = [kept.tokens[f, slot] for kept, f, slot in rows]
    shares = [kept.shares[f, slot] for kept, f, slot in rows]
    peaks = [kept.peak[f, slot] for kept, f, slot in rows]
    all_tokens = torch.stack(tokens).cpu() if rows else torch.zeros(0, width, dtype=torch.int32)
    all_shares = torch.stack(shares).cpu() if rows else torch.zeros(0, width, dtype=torch.float16)
    inside = all_tokens >= 0
    lengths = torch.cat([torch.zeros(1, dtype=torch.int64), inside.sum(dim=1)])
    return {
        "first_example": torch.tensor(counts).cumsum(0),
        "first_token": lengths.cumsum(0),
        "tokens": all_tokens[inside],
        "shares": all_shares[inside],
        "peaks": torch.stack(peaks).cpu() if rows else torch.zeros(0),
        "positions": inside[:, : settings.before].sum(dim=1).to(torch.int32),
        "bands": torch.tensor(bands, dtype=torch.uint8),
    }


def _chosen_of_sample(
    rank: Int[Tensor, " n_sampled"], peak: Float[Tensor, " n_sampled"], settings: Settings
) -> list[tuple[int, int]]:
    """Slot and band of the contexts to show of a random sample: of each quarter, by activation, those of lowest rank;
    the highest quarter first, and the greatest activation first within it."""
    slots = torch.nonzero(rank < LAST).flatten()
    if not len(slots):
        return []
    n_bands = len(BANDS) - 1
    by_peak = peak[slots].argsort(stable=True).argsort(stable=True)  # each one's place from the least
    band = n_bands - 1 - (by_peak * n_bands) // len(slots)
    chosen = [slot for b in range(n_bands) for slot in slots[band == b][: settings.n_per_band].tolist()]
    of = dict(zip(slots.tolist(), (band + 1).tolist(), strict=True))
    return [(slot, of[slot]) for slot in sorted(chosen, key=lambda s: (of[s], -float(peak[s])))]
