"""Does the local replacement model respond as the model does? (Methods, "Evaluating mechanistic faithfulness")

The residual stream after block l is moved by a vector v at one position, in the model and in its local replacement
model. With d and d' the changes that follow in the residual stream after block l + distance (all positions),

    cosine = <d', d> / (|d'| |d|)          normalised error = |d' - d| / |d|

Both changes hold v itself, carried on by the residual stream: `carried_cosine` and `carried_error` say what v alone,
as though nothing after block l responded, would score in the place of d'.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from tl_clt.errors import ConfigError, DatasetError, ModelUnsupported
from tl_clt.interventions import Freeze, intervention_hooks
from tl_clt.lens import (
    FwdHook,
    HookedModel,
    Prompt,
    block_hook,
    run_with_cache,
    run_with_hooks,
    to_tokens,
    user_hooks_aside,
)
from tl_clt.replacement import check_fit, require_free
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["feature", "encoder", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS = ["transcoder", "kind", "frozen_norms", "distance"]
MEASURES = ("cosine", "normalised_error", "carried_cosine", "carried_error")
Changes = Float[Tensor, "n_later n_perturbations pos d_model"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FaithfulnessReport:
    """What `measure_faithfulness` found."""

    table: DataFrame
    """One row for each perturbation, later layer and way of holding norms: transcoder (its name), prompt (number),
    kind, layer (after whose block the stream is moved), position, source_layer and feature (whose direction; -1
    for random ones), frozen_norms, distance (blocks between), cosine, normalised_error, carried_cosine,
    carried_error."""

    size: float
    """Norm of each perturbation, as a share of the norm of the residual stream where it is added."""

    real_freeze: Freeze
    """What was held in the model's own run."""

    @property
    def by_distance(self) -> DataFrame:
        """Means over perturbations, by transcoder, kind, frozen_norms and distance; n is how many, *_std their
        standard deviations."""
        means = {measure: (measure, "mean") for measure in MEASURES}
        spread = {f"{measure}_std": (measure, "std") for measure in MEASURES[:2]}
        groups = self.table.groupby(GROUPS, sort=False)
        return groups.agg(n=("cosine", "size"), **means, **spread).reset_index()

    def plot(self) -> Figure:
        """Cosine and normalised error against distance, one row of panels a transcoder. Needs matplotlib."""
        from matplotlib.figure import Figure

        means, names = self.by_distance, list(dict.fromkeys(self.table["transcoder"]))
        figure = Figure(figsize=(10, 3.6 * len(names) + 0.6), layout="constrained")
        panels = figure.subplots(len(names), 2, squeeze=False, sharex=True, sharey="col")
        colours = {kind: f"C{i}" for i, kind in enumerate(KINDS)}
        for name, row in zip(names, panels, strict=True):
            for axes, measure, carried in zip(row, MEASURES[:2], MEASURES[2:], strict=True):
                label = measure.replace("_", " ")
                ours = means[means["transcoder"] == name]
                for (kind, colour), frozen in product(colours.items(), (False, True)):
                    line = ours[(ours["kind"] == kind) & (ours["frozen_norms"] == frozen)]
                    if len(line) > 0:
                        style = {"color": colour, "linestyle": "--" if frozen else "-", "marker": "o"}
                        held = "norms held" if frozen else "norms free"
                        axes.plot(line["distance"], line[measure], label=f"{kind}, {held}", **style)
                alone = ours.groupby("distance")[carried].mean()
                axes.plot(alone.index, alone, color="grey", linestyle=":", label="perturbation alone")
                axes.set(title=f"{name}: {label}", xlabel="distance (layers)", ylabel=f"{label} (mean)")
                axes.set_xticks(alone.index)
        panels[0][1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        return figure


@torch.no_grad()
def measure_faithfulness(
    model: HookedModel,
    clts: CrossLayerTranscoder | Mapping[str, CrossLayerTranscoder],
    prompts: Sequence[Prompt],
    *,
    kinds: Sequence[Kind] = KINDS,
    size: float = 0.1,
    n_perturbations: int = 4,
    frozen_norms: Sequence[bool] = (False, True),
    real_freeze: Freeze = "none",
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> FaithfulnessReport:
    """Perturb the residual stream of the model and of its local replacement model, and compare what follows.

    In the local replacement model features respond: they are computed anew from the perturbed stream and write in
    place of the MLPs, with the clean run's errors and attention patterns (and, with frozen norms, scales of norms).
    Perturbations are added after each block but the last, at positions after 0, in these directions:

    - "feature": `W_dec[s -> l]`, what a feature that is active there writes to layer l (s <= l);
    - "encoder": `W_enc[l + 1]` of a feature that is active at that position, in the next layer to read the stream;
    - "random": uniform on the sphere; the same for all transcoders.

    Hooks of the user's own are set aside.

    Args:
        model: a HookedTransformer or TransformerBridge, of 2 layers or more.
        clts: a CLT of this model, or several by name (a CLT, PLTs).
        prompts: texts or token ids.
        kinds: which directions.
        size: norm of each perturbation, as a share of the stream's norm at its place; below 0 to go against it.
        n_perturbations: of each kind, for each prompt and layer; fewer where fewer features are active.
        frozen_norms: hold the scales of norms in the replacement model: False, True, or each in turn.
        real_freeze: what is held in the model's own run. "none" compares with the model as it is; with "attention"
            what is left is due to the MLPs' replacement (and to norms where they are held).
        batch_size: perturbations in one pass.
        seed: of what is drawn.
        progress: show a progress bar.

    Raises:
        ConfigError: an argument out of range.
        DatasetError, PromptError: there are no prompts, or one that the model cannot take.
        CLTMismatch, HookNotFound: a CLT is of another model.
        AlreadyAttached: the model has a CLT attached: it would not be the model itself that runs.
        ModelUnsupported: the model has one layer, so that nothing comes later.
    """
    named = dict(clts) if isinstance(clts, Mapping) else {"PLT" if clts.cfg.span == 1 else "CLT": clts}
    _check(model, named, prompts, kinds, size, n_perturbations, frozen_norms, real_freeze, batch_size)
    texts = [to_tokens(model, prompt) for prompt in prompts]
    rows: list[tuple] = []
    jobs = [(name, number) for name in named for number in range(len(texts))]
    for name, number in tqdm(jobs, desc="perturbing", unit=" prompts", delay=2.0, disable=not progress):
        clt, tokens = named[name], texts[number]
        clean = _clean_run(model, clt, tokens)
        for layer in range(clt.cfg.n_layers - 1):
            drawn = [p for kind in kinds for p in _draw(clt, clean, layer, kind, n_perturbations, (seed, number))]
            for chunk in (drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)):
                moved = _moved(chunk, clean.stream[layer], size)
                real = residual_changes(model, clt, tokens, moved, layer, -1, real_freeze)
                for frozen in frozen_norms:
                    replaced = residual_changes(
                        model, clt, tokens, moved, layer, None, "all" if frozen else "attention"
                    )
                    for distance, p, measures in _compare(chunk, moved, real, replaced):
                        at = (name, number, p.kind, layer, p.position, p.source_layer, p.feature)
                        rows.append((*at, frozen, distance, *measures))
    names = ["transcoder", "prompt", "kind", "layer", "position", "source_layer", "feature", "frozen_norms", "distance"]
    return FaithfulnessReport(table=DataFrame(rows, columns=[*names, *MEASURES]), size=size, real_freeze=real_freeze)


@torch.no_grad()
def residual_changes(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    tokens: Tokens,
    moved: Float[Tensor, "n_perturbations pos d_model"],
    layer: int,
    through_layer: int | None,
    freeze: Freeze,
) -> Changes:
    """Change of the residual stream after every later block, when that after block `layer` is moved.

    Args:
        model, clt, tokens: a model, a CLT of it and one prompt.
        moved: what is added, one perturbation a row.
        layer: after whose block.
        through_layer: as for `intervention_hooks`: None for the local replacement model, -1 for the model itself.
        freeze: what is held at the clean run's values.
    """
    # The first of the batch stays unperturbed: every change is a difference within one pass.
    batch = tokens.expand(len(moved) + 1, -1)
    added = torch.cat([torch.zeros_like(moved[:1]), moved])
    seen: dict[int, Tensor] = {}

    def add(x: Tensor, hook: object) -> Tensor:
        return x + added.to(x.dtype)

    def keep(x: Tensor, hook: object, at: int) -> None:
        seen[at] = x

    later = range(layer + 1, clt.cfg.n_layers)
    hooks: list[FwdHook] = intervention_hooks(model, clt, batch, [], through_layer, freeze)
    hooks.append((block_hook(layer, "hook_resid_post"), add))
    hooks += [(block_hook(t, "hook_resid_post"), partial(keep, at=t)) for t in later]
    with user_hooks_aside(model):
        run_with_hooks(model, batch, hooks)
    return torch.stack([seen[t][1:] - seen[t][:1] for t in later])


class _CleanRun(NamedTuple):
    feature_acts: Float[Tensor, "pos n_layers d_transcoder"]
    stream: Float[Tensor, "n_layers pos d_model"]
    """After each block."""


class _Perturbation(NamedTuple):
    kind: Kind
    position: int
    source_layer: int
    feature: int
    direction: Float[Tensor, " d_model"]


def _clean_run(model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens) -> _CleanRun:
    reads = [block_hook(t, clt.cfg.input_hook) for t in clt.layers]
    posts = [block_hook(t, "hook_resid_post") for t in clt.layers]
    with user_hooks_aside(model):
        _, cache = run_with_cache(model, tokens[None], lambda name: name in {*reads, *posts})
    inputs = torch.stack([cache[name][0] for name in reads], dim=-2).to(clt.W_enc.dtype)
    return _CleanRun(clt.encode(inputs), torch.stack([cache[name][0] for name in posts]))


def _draw(
    clt: CrossLayerTranscoder, clean: _CleanRun, layer: int, kind: Kind, n: int, seed: tuple[int, int]
) -> list[_Perturbation]:
    """Perturbations of one kind after one block; features are drawn without repeats."""
    # crc32: torch's generator on the CPU takes 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer} {kind}".encode()))
    _, n_pos, d_model = clean.stream.shape
    if kind == "random":
        positions = torch.randint(1, n_pos, (n,), generator=generator).tolist()
        directions = torch.randn(n, d_model, generator=generator, dtype=torch.float64).to(clean.stream)
        return [_Perturbation(kind, p, -1, -1, v) for p, v in zip(positions, directions, strict=True)]
    sources = [layer + 1] if kind == "encoder" else list(clt.cfg.sources(layer))
    # Position 0 means nothing, and a CLT need not have been trained on it.
    active = torch.nonzero(clean.feature_acts[1:, sources]).cpu()
    chosen = active[torch.randperm(len(active), generator=generator)[:n]]
    found = []
    for position, place, feature in chosen.tolist():
        source = sources[place]
        if kind == "encoder":
            direction = clt.W_enc[source, :, feature]
        else:
            rows = clt.decoder_rows(source, torch.tensor([feature], device=clt.W_enc.device))
            direction = rows[0, layer - source]
        # A feature may write nothing at all to one of its layers.
        if bool(direction.any()):
            found.append(_Perturbation(kind, position + 1, source, feature, direction.to(clean.stream)))
    return found


def _moved(
    drawn: list[_Perturbation], stream: Float[Tensor, "pos d_model"], size: float
) -> Float[Tensor, "n_perturbations pos d_model"]:
    """Each perturbation at its position, `size` times as long as the stream is there."""
    moved = stream.new_zeros(len(drawn), *stream.shape)
    for i, p in enumerate(drawn):
        moved[i, p.position] = size * stream[p.position].norm() * p.direction / p.direction.norm()
    return moved


def _compare(
    drawn: list[_Perturbation], moved: Tensor, real: Changes, replaced: Changes
) -> Iterator[tuple[int, _Perturbation, list[float]]]:
    """(distance, perturbation, values of MEASURES) for each perturbation and later layer."""
    real, replaced = (x.double().flatten(start_dim=2) for x in (real, replaced))
    alone = moved.double().flatten(start_dim=1).expand_as(real)
    each = []
    for change in (replaced, alone):
        each += [cosine_similarity(change, real, dim=-1), (change - real).norm(dim=-1) / real.norm(dim=-1)]
    for later, values in enumerate(torch.stack(each, dim=-1).tolist()):
        for p, measures in zip(drawn, values, strict=True):
            yield later + 1, p, measures


def _check(
    model: HookedModel,
    clts: dict[str, CrossLayerTranscoder],
    prompts: Sequence[Prompt],
    kinds: Sequence[Kind],
    size: float,
    n_perturbations: int,
    frozen_norms: Sequence[bool],
    real_freeze: Freeze,
    batch_size: int,
) -> None:
    if not clts or not frozen_norms or not kinds:
        raise ConfigError("There is nothing to measure: give at least one CLT, one kind and one way to hold norms.")
    require_free(model)
    for clt in clts.values():
        check_fit(model, clt)
    if len(prompts) == 0:
        raise DatasetError("There are no prompts to measure on: give at least one.")
    if model.cfg.n_layers < 2:
        raise ModelUnsupported("The model has one layer: no later layer could follow a perturbation.")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kinds has {kind!r}: give some of {', '.join(KINDS)}.")
    if size == 0 or not math.isfinite(size):
        raise ConfigError(f"size is {size}: give a share of the residual stream's norm other than 0, such as 0.1.")
    for name, number in (("n_perturbations", n_perturbations), ("batch_size", batch_size)):
        if number < 1:
            raise ConfigError(f"{name} is {number}: give at least 1.")
    if real_freeze not in get_args(Freeze):
        raise ConfigError(f"real_freeze is {real_freeze!r}: give one of {', '.join(get_args(Freeze))}.")
