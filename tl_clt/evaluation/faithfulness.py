"""Does the local replacement model respond as the model does? (Methods, "Evaluating mechanistic faithfulness")

The residual stream after block l is moved by a vector v at one position, in the model and in its local replacement
model. With d and d' the changes that follow in the residual stream after block l + distance, over all positions,

    cosine = <d', d> / (|d'| |d|)          normalised error = |d' - d|^2 / |d|^2

(squared, as the normalised mean squared error of 0.4 that the paper gives beside a cosine of 0.8). Both changes hold v
itself, which the residual stream carries on: `carried_cosine` and `carried_error` say what v would score in the place
of d', as though nothing after block l responded. A replacement model is worth something where it does better.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from tl_clt.arguments import as_choices, as_number, as_seed, as_switch, as_whole, shown
from tl_clt.errors import CLTMismatch, ConfigError, DatasetError, ModelUnsupported
from tl_clt.interventions import Freeze, intervention_hooks
from tl_clt.lens import (
    HookedModel,
    Prompt,
    block_hook,
    require_model,
    run_with_cache,
    run_with_hooks,
    to_prompts,
    user_hooks_aside,
)
from tl_clt.replacement import check_fit, feature_acts, require_free
from tl_clt.report import PALETTE, Report
from tl_clt.shapes import TokenBatch, Tokens
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FigureName = Literal["distance"]
Kind = Literal["feature", "encoder", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ROUNDING = 1000
"""A vector must be so many rounding errors of the stream long for changes that follow it to be told from rounding."""
GROUPS = ["transcoder", "kind", "model_freeze", "freeze", "distance"]
MEASURES = ["cosine", "normalised_error", "carried_cosine", "carried_error"]
COLUMNS = [
    *("transcoder", "prompt", "kind", "layer", "position", "source_layer", "feature", "size"),
    *("model_freeze", "freeze", "distance", *MEASURES),
]
Changes = Float[Tensor, "n_later n_perturbations pos d_model"]


@torch.no_grad()
def measure_faithfulness(
    model: HookedModel,
    clts: CrossLayerTranscoder | Mapping[str, CrossLayerTranscoder],
    prompts: Prompt | Sequence[Prompt],
    *,
    kinds: Kind | Sequence[Kind] = KINDS,
    n_perturbations: int = 4,
    size: float = 0.1,
    freeze: Freeze | Sequence[Freeze] = ("attention", "all"),
    model_freeze: Freeze | Sequence[Freeze] = ("none",),
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> FaithfulnessReport:
    """Perturb the residual stream of the model and of its local replacement model, and compare what follows.

    In the local replacement model features are computed anew from the perturbed stream and write in place of the
    MLPs, with the clean run's errors and what `freeze` holds of it.
    Perturbations are added after each block but the last, at positions after 0:

    - "feature": `feature_acts[s] W_dec[s -> l]`, what an active feature of this or an earlier layer writes to layer
      l, once more;
    - "encoder": along `W_enc[l + 1]` of a feature that is active there, in the next layer to read the stream;
    - "random": in a direction uniform on the sphere, the same for all transcoders.

    Hooks of the user's own are set aside.

    Args:
        model: a HookedTransformer or TransformerBridge, of 2 layers or more.
        clts: a CLT of this model (of span 1: per-layer transcoders), or several by name.
        prompts: texts or token ids; one or several.
        kinds: which perturbations, one or several.
        n_perturbations: of each kind, for each prompt and layer; fewer where fewer features are active.
        size: norm of encoder and random perturbations, as a share of the stream's norm at their place.
        freeze: what is held at the clean run's values in the local replacement model, each in turn: "attention"
            patterns, "all" (patterns and the scales of norms), or "none".
        model_freeze: what is held in the model's own run, each in turn. "none" compares with the model as it is;
            with "attention" what is left is due to the MLPs' replacement (and to norms where they are held).
        batch_size: perturbations in one pass.
        seed: of what is drawn.
        progress: show a progress bar.

    Raises:
        ConfigError: an argument out of range.
        DatasetError, PromptError, TokenizerMissing: no prompts, or one that the model cannot take.
        CLTMismatch, HookNotFound: a CLT is of another model.
        AlreadyAttached: the model has a CLT attached: it would not be the model itself that runs.
        ModelUnsupported: the model has one layer, so that nothing comes later.
    """
    require_model(model)
    named = name_transcoders(clts)
    plan = _Plan(
        kinds=as_choices("kinds", kinds, KINDS),
        n_perturbations=as_whole("n_perturbations", n_perturbations, 1),
        size=float(as_number("size", size, above=0)),
        freeze=as_choices("freeze", freeze, get_args(Freeze)),
        model_freeze=as_choices("model_freeze", model_freeze, get_args(Freeze)),
        batch_size=as_whole("batch_size", batch_size, 1),
        seed=as_seed("seed", seed),
    )
    progress = as_switch("progress", progress)
    _check(model, named)
    texts = read_prompts(model, prompts)
    n_jobs = len(named) * len(texts) * (model.cfg.n_layers - 1)
    rows: list[tuple] = []
    with tqdm(total=n_jobs, desc="perturbing", unit=" layers", delay=2.0, disable=not progress) as bar:
        for name, clt in named.items():
            for number, tokens in enumerate(texts):
                for found in _measure(model, clt, tokens, plan, number):
                    rows += ((name, number, *row) for row in found)
                    bar.update()
    return FaithfulnessReport(table=DataFrame(rows, columns=COLUMNS))


@dataclass(frozen=True)
class _Plan:
    """What is measured: the arguments of `measure_faithfulness`."""

    kinds: Sequence[Kind]
    n_perturbations: int
    size: float
    freeze: Sequence[Freeze]
    model_freeze: Sequence[Freeze]
    batch_size: int
    seed: int


class _LastBlock(Exception):
    """Ends a pass after the last block."""


def name_transcoders(
    clts: CrossLayerTranscoder | Mapping[str, CrossLayerTranscoder],
) -> dict[str, CrossLayerTranscoder]:
    """Transcoders by name; one by itself is "PLT" or "CLT"."""
    if isinstance(clts, CrossLayerTranscoder):
        return {"PLT" if clts.cfg.span == 1 else "CLT": clts}
    if not isinstance(clts, Mapping):
        raise CLTMismatch(f"clts is {shown(clts)}: give a CrossLayerTranscoder, or a dict of several by name.")
    return dict(clts)


def read_prompts(model: HookedModel, prompts: Prompt | Sequence[Prompt]) -> list[Tokens]:
    """Token ids of each of some prompts, of which there must be one at least."""
    has_length = hasattr(prompts, "__len__") and not isinstance(prompts, str) and getattr(prompts, "ndim", 1) > 0
    if has_length and len(prompts) == 0:
        raise DatasetError("There are no prompts to measure on: give at least one.")
    return to_prompts(model, prompts)  # type: ignore[arg-type]


def _check(model: HookedModel, clts: dict[str, CrossLayerTranscoder]) -> None:
    if not clts:
        raise ConfigError("There is no CLT to measure: give at least one.")
    for clt in clts.values():
        check_fit(model, clt)
    require_free(model)
    if model.cfg.n_layers < 2:
        raise ModelUnsupported("The model has one layer: no later layer could follow a perturbation.")


def _measure(
    model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens, plan: _Plan, number: int
) -> Iterator[list[tuple]]:
    """Rows of the table, for one prompt after one block after another."""
    clean = clean_activations(model, clt, tokens)
    for layer in range(clt.cfg.n_layers - 1):
        drawn: list[Perturbation] = []
        for kind in plan.kinds:
            key = f"{plan.seed} {number}"
            drawn += draw_perturbations(clt, clean, layer, kind, plan.n_perturbations, plan.size, key)
        rows = []
        for chunk in (drawn[i : i + plan.batch_size] for i in range(0, len(drawn), plan.batch_size)):
            moved = clean.stream.new_zeros(len(chunk), *clean.stream.shape[1:])
            for i, p in enumerate(chunk):
                moved[i, p.position] = p.vector
            # The first of a batch stays unperturbed: every change is a difference within one pass.
            batch = tokens.expand(len(chunk) + 1, -1)
            changes = partial(_changes, model, clt, batch, moved, layer)
            real = {held: changes(-1, held) for held in plan.model_freeze}
            replaced = {held: changes(None, held) for held in plan.freeze}
            for model_freeze, freeze in product(real, replaced):
                for later, values in enumerate(_compare(moved, real[model_freeze], replaced[freeze]).tolist()):
                    for p, of_it in zip(chunk, values, strict=True):
                        share = float(p.vector.norm() / clean.stream[layer, p.position].norm())
                        what = (p.kind, layer, p.position, p.source_layer, p.feature, share)
                        rows.append((*what, model_freeze, freeze, later + 1, *of_it))
        yield rows


def _changes(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    batch: TokenBatch,
    moved: Float[Tensor, "n_perturbations pos d_model"],
    layer: int,
    through_layer: int | None,
    freeze: Freeze,
) -> Changes:
    """Change of the residual stream after every later block, when that after block `layer` is moved.

    In the model itself (`through_layer=-1`) or in the local replacement model (None).
    """
    added = torch.cat([torch.zeros_like(moved[:1]), moved])
    seen: dict[int, Tensor] = {}

    def add(x: Tensor, hook: object) -> Tensor:
        return x + added.to(x.dtype)

    def keep(x: Tensor, hook: object, at: int) -> None:
        seen[at] = x
        if at == later[-1]:
            raise _LastBlock

    later = range(layer + 1, model.cfg.n_layers)
    hooks = intervention_hooks(model, clt, batch, [], through_layer, freeze)
    move = (block_hook(layer, "hook_resid_post"), add)
    record = [(block_hook(t, "hook_resid_post"), partial(keep, at=t)) for t in later]
    # Without the unembedding, which takes most of a pass where vocabularies are large.
    with user_hooks_aside(model) as known, suppress(_LastBlock):
        run_with_hooks(model, batch, [*hooks, move, *record], known)
    return torch.stack([seen[t][1:] - seen[t][:1] for t in later])


def _compare(
    moved: Float[Tensor, "n_perturbations pos d_model"], real: Changes, replaced: Changes
) -> Float[Tensor, "n_later n_perturbations n_measures"]:
    """Cosine and normalised error of the replacement model's changes, and of the perturbations themselves."""
    real, replaced = (x.double().flatten(start_dim=2) for x in (real, replaced))
    carried = moved.double().flatten(start_dim=1).expand_as(real)
    measures = []
    for change in (replaced, carried):
        error = (change - real).square().sum(dim=-1) / real.square().sum(dim=-1)
        measures += [cosine_similarity(change, real, dim=-1), error]
    return torch.stack(measures, dim=-1)


class CleanActivations(NamedTuple):
    """What the model does by itself with one prompt."""

    feature_acts: Float[Tensor, "pos n_layers d_transcoder"]
    stream: Float[Tensor, "n_layers pos d_model"]
    """The residual stream after each block."""


class Perturbation(NamedTuple):
    """A vector to add to the residual stream at one position."""

    kind: Kind
    position: int
    source_layer: int
    """Layer of the feature whose direction it is; -1 where there is none."""
    feature: int
    vector: Float[Tensor, " d_model"]


@torch.no_grad()
def clean_activations(model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens) -> CleanActivations:
    """Run one prompt without users' hooks."""
    posts = [block_hook(t, "hook_resid_post") for t in clt.layers]
    with user_hooks_aside(model):
        _, cache = run_with_cache(model, tokens[None], lambda name: name in posts)
    return CleanActivations(feature_acts(model, clt, tokens), torch.stack([cache[name][0] for name in posts]))


def draw_perturbations(
    clt: CrossLayerTranscoder, clean: CleanActivations, layer: int, kind: Kind, n: int, size: float, seed: str
) -> list[Perturbation]:
    """Draw perturbations of one kind after one block, at positions after 0.

    Features are drawn from those that are active, without repeats, so there may be fewer than n; those that write
    nothing to that layer, or no more than rounding, are passed over. Random ones do not depend on the CLT.

    Args:
        clt, clean: a CLT and one prompt.
        layer: after whose block, not the last.
        kind: "feature": `feature_acts[s] W_dec[s -> layer]`, all that a feature of a layer s <= layer writes there;
            "encoder": along `W_enc[layer + 1]` of a feature; "random": uniform on the sphere.
        n: how many.
        size: norm of encoder and random directions, as a share of the stream's norm at their place.
        seed: text from which all that is drawn follows.
    """
    # crc32: torch's generator on the CPU takes 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer} {kind}".encode()))
    stream = clean.stream[layer]
    # Position 0 means nothing, and a CLT need not have been trained on it.
    if kind == "random":
        positions = torch.randint(1, len(stream), (n,), generator=generator).tolist()
        directions = torch.randn(n, stream.shape[-1], generator=generator, dtype=torch.float64).to(stream)
        pairs = zip(positions, directions, strict=True)
        return [Perturbation(kind, p, -1, -1, _of_size(v, stream[p], size)) for p, v in pairs]
    sources = [layer + 1] if kind == "encoder" else list(clt.cfg.sources(layer))
    active = torch.nonzero(clean.feature_acts[1:, sources]).cpu()
    drawn: list[Perturbation] = []
    for before, place, feature in active[torch.randperm(len(active), generator=generator)].tolist():
        if len(drawn) == n:
            break
        position, source = before + 1, sources[place]
        if kind == "encoder":
            vector = _of_size(clt.W_enc[source, :, feature].to(stream), stream[position], size)
        else:
            rows = clt.decoder_rows(source, torch.tensor([feature], device=stream.device))
            vector = (clean.feature_acts[position, source, feature] * rows[0, layer - source]).to(stream)
        if float(vector.norm()) > ROUNDING * float(stream[position].norm()) * torch.finfo(stream.dtype).eps:
            drawn.append(Perturbation(kind, position, source, feature, vector))
    return drawn


def _of_size(
    direction: Float[Tensor, " d_model"], stream: Float[Tensor, " d_model"], size: float
) -> Float[Tensor, " d_model"]:
    return size * stream.norm() * direction / direction.norm()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FaithfulnessReport(Report[FigureName]):
    """How the changes that follow a perturbation compare in the model and in its local replacement model.

    Figure: "distance" (cosine and normalised error against distance, a row of panels for each transcoder and
    model_freeze, beside what the perturbation alone would score). `save` writes it, measurements.csv (`table`) and
    by_distance.csv.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    table: DataFrame
    """One row for each perturbation, way of holding things and later layer: transcoder (its name), prompt (number),
    kind, layer (after whose block the stream is moved), position, source_layer and feature (whose direction; -1
    for random ones), size (norm, as a share of the stream's there), model_freeze (what was held in the model's own
    run), freeze (what was held in the replacement model's), distance (blocks between), cosine, normalised_error,
    carried_cosine, carried_error."""

    @property
    def by_distance(self) -> DataFrame:
        """Means over perturbations for each transcoder, kind, model_freeze, freeze and distance. n is their
        number; the median stands beside the mean of the normalised error, which few large values can carry."""
        means = {measure: (measure, "mean") for measure in MEASURES}
        groups = self.table.groupby(GROUPS, sort=False)
        median = ("normalised_error", "median")
        return groups.agg(n=("cosine", "size"), **means, median_error=median).reset_index()

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        means = self.by_distance
        parts = [part for _, part in means.groupby(["transcoder", "model_freeze"], sort=False)]
        figure = Figure(figsize=(10, 3.4 * len(parts) + 0.8), layout="constrained")
        panels = figure.subplots(len(parts), 2, squeeze=False, sharex=True, sharey="col")
        # Errors of 0.1 and of 10 are to be told apart, and an error of 0 drawn.
        panels[0][1].set_yscale("symlog", linthresh=0.1)
        for ours, row in zip(parts, panels, strict=True):
            name, freeze = ours["transcoder"].iloc[0], ours["model_freeze"].iloc[0]
            _lines(row[0], ours, "cosine", "carried_cosine")
            _lines(row[1], ours, "normalised_error", "carried_error")
            against = f"{name} against the model" + ("" if freeze == "none" else f" with {freeze} held")
            row[0].set(title=against, ylabel="cosine (mean)", ylim=(None, 1.02))
            row[1].set(title=against, ylabel="normalised error (mean)")
        panels[0][1].set_ylim(bottom=0)
        for axes in panels[-1]:
            axes.set_xlabel("distance (layers)")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=means["kind"].nunique())
        return figure

    def _write_numbers(self, folder: Path) -> None:
        self.table.to_csv(folder / "measurements.csv", index=False)
        self.by_distance.to_csv(folder / "by_distance.csv", index=False)

    def _in_short(self) -> str:
        names = ", ".join(map(str, self.table["transcoder"].unique()))
        return f"{len(self.table)} comparisons of {names}: mean cosine {self.table['cosine'].mean():.3f}"

    def _tables(self) -> dict[str, DataFrame]:
        return {"means by distance": self.by_distance}


HELD = {"attention": ("norms free", "o-"), "all": ("norms held", "s--"), "none": ("nothing held", "^-.")}
"""What a line is called, and how it is drawn, by what is held in the local replacement model."""


def _lines(axes: Axes, means: DataFrame, measure: str, carried: str) -> None:
    """One line for each kind and what is held; dotted, the perturbation alone."""
    distances = sorted(means["distance"].unique())
    for i, kind in enumerate(KINDS):
        ours = means[means["kind"] == kind]
        for freeze, (held, style) in HELD.items():
            line = ours[ours["freeze"] == freeze]
            if len(line) > 0:
                axes.plot(
                    line["distance"], line[measure], style, color=PALETTE[i], label=f"{kind}, {held}", markersize=4
                )
        if len(ours) > 0:
            alone = ours.groupby("distance")[carried].first()
            axes.plot(alone.index, alone, ":", color=PALETTE[i], linewidth=1, label=f"{kind}, carried alone")
    step = -(-len(distances) // 12)
    axes.set_xticks(distances[::step])
    axes.grid(axis="y", linewidth=0.3)
