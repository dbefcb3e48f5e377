"""When what a task needs comes up over training: the model at several steps, measured at the places where the last one
carries each hop.

At each step the task's accuracy; how well each hop can be read there, by a linear probe on prompts held out; and how
often the answer follows when the hop is exchanged there (`interchange`), on the same pairs of prompts at all steps.
A hop may be read long before the model uses it: where its inputs stand at a place, a probe can read much from a model
that was never trained. And an exchange can only be followed by a model that gives answers at all. So each is told
beside its control (shuffled labels, a change of the same size in a random direction), and the step 0 of an untrained
model is one as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from pandas import NA, DataFrame
from tqdm.auto import tqdm

from tl_clt.arguments import as_path, as_seed, as_switch, as_whole, shown
from tl_clt.errors import ConfigError
from tl_clt.lens import HookedModel, load_model, model_name
from tl_clt.organisms.interchange import (
    answer_ids,
    answered_right,
    as_batch,
    find_variables,
    interchange,
    probe,
    take_means,
)
from tl_clt.organisms.tasks import Case, Task, require_task
from tl_clt.report import GREY, PALETTE, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FigureName = Literal["courses"]
READ = 0.9
"""A hop can be read from this accuracy of the probe on."""
OF_FINAL = 0.9
"""A hop is used, and the task done, from this share of what the last model reaches on."""
CARRIED = 0.5
"""Of the last model's pairs so many at least must follow, beyond those that a random direction makes follow: else the
hop is not carried there, and there is no step at which it is first used."""
PLACE_COLUMNS = ("variable", "layer", "pos", "part")


class Checkpoints(Mapping[int, HookedModel]):
    """The models of a folder that has one a step in subfolders named by their steps; each is loaded when it is asked
    for, and not kept.

    Args:
        folder: of a run, as `python -m tl_clt.organisms.school.train_model --keep-every 500` writes its `checkpoints`.

    Raises:
        ConfigError: it has no such subfolders.
    """

    def __init__(self, folder: str | Path) -> None:
        path = as_path("folder", folder)
        found = path.iterdir() if path.is_dir() else ()
        self.folders = {int(one.name): one for one in found if one.name.isdecimal() and one.is_dir()}
        if not self.folders:
            raise ConfigError(f"{path} has no checkpoints: give a folder of folders named by their steps.")

    def __getitem__(self, step: int) -> HookedModel:
        return load_model(self.folders[step])

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.folders))

    def __len__(self) -> int:
        return len(self.folders)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Emergence(Report[FigureName]):
    """A task's hops over training.

    Figure: "courses" (a panel for each hop). `save` writes it, courses.csv (`table`), first.csv and info.json.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    table: DataFrame
    """One row a step and hop: step, hop, accuracy_text, accuracy_held_out (of the task), layer, pos, token, part (where
    the last model carries the hop), read (the probe's accuracy, balanced over values), shuffled (the same on shuffled
    labels), values (how many are tested), follows, keeps, random_direction (as of `interchange`)."""

    info: dict[str, Any]
    """Model, task, n_pairs, n_prompts, held_out, seed."""

    @property
    def first(self) -> DataFrame:
        """For each hop: layer, pos, token, part, final_read, final_follows, and the first steps at which the task is
        done (held-out accuracy at least .9 of the last model's), the hop is read (probe at least .9) and is used
        (follows at least .9 of the last model's): answered, read, used. None where it never is, or is not carried."""
        rows = []
        for hop, of in self.table.groupby("hop", sort=False):
            last = of.iloc[-1]
            carried = last["follows"] - last["random_direction"] >= CARRIED
            row = {"hop": hop, **{name: last[name] for name in ("layer", "pos", "token", "part")}}
            row |= {"final_read": last["read"], "final_follows": last["follows"]}
            row["answered"] = _first(of, "accuracy_held_out", OF_FINAL * last["accuracy_held_out"])
            row["read"] = _first(of, "read", READ)
            row["used"] = _first(of, "follows", OF_FINAL * last["follows"]) if carried else None
            rows.append(row)
        return DataFrame(rows).astype(dict.fromkeys(("answered", "read", "used"), "Int64"))

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        first = self.first
        n, wide = len(first), min(len(first), 3)
        figure = Figure(figsize=(4.4 * wide + 0.6, 3.2 * math.ceil(n / wide) + 1.0), layout="constrained")
        panels = figure.subplots(math.ceil(n / wide), wide, squeeze=False, sharey=True).flatten()
        lines = [
            ("accuracy_held_out", "task, held out", "#000000", "-"),
            ("read", "read by a probe", PALETTE[0], "-"),
            ("shuffled", "probe, shuffled labels", PALETTE[0], ":"),
            ("follows", "answer follows an exchange", PALETTE[1], "-"),
            ("random_direction", "the same, random direction", PALETTE[1], ":"),
        ]
        rows: Any = first.itertuples()
        for axes, row in zip(panels, rows, strict=False):
            of = self.table[self.table["hop"] == row.hop]
            for column, label, colour, style in lines:
                axes.plot(of["step"], of[column], style, marker="o", markersize=3, color=colour, label=label)
            for step, label, colour in ((row.read, "first read", PALETTE[0]), (row.used, "first used", PALETTE[1])):
                at = math.nan if step is NA else step
                axes.axvline(at, color=colour, linewidth=5, alpha=0.2, label=label)
            where = f"behind layer {row.layer}, at {row.pos} ({str(row.token).strip()})"
            axes.set_title(f"{self.info['task']}, {row.hop}\n{where}", fontsize=10)
            axes.set_xlabel("step")
            axes.axhline(READ, color=GREY, linewidth=0.8, linestyle="--")
            axes.grid(linewidth=0.3)
        for axes in panels[n:]:
            axes.set_axis_off()
        panels[0].set(ylabel="share of prompts", ylim=(-0.03, 1.03))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4 if wide > 1 else 2, fontsize=8)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        self.table.to_csv(folder / "courses.csv", index=False)
        self.first.to_csv(folder / "first.csv", index=False)
        (folder / "info.json").write_text(json.dumps(self.info, indent=1) + "\n")

    def _in_short(self) -> str:
        rows: Any = self.first.itertuples()
        told = [f"{row.hop} read {_said(row.read)}, used {_said(row.used)}" for row in rows]
        return f"{self.info['task']}, {self.table['step'].nunique()} steps; {'; '.join(told)}"

    def _tables(self) -> dict[str, DataFrame]:
        return {"first steps": self.first, "courses": self.table}


def _first(of: DataFrame, column: str, least: float) -> int | None:
    enough = np.asarray(of["step"])[np.asarray(of[column]) >= least]
    return int(enough[0]) if len(enough) else None


def _said(step: Any) -> str:
    return "never" if step is NA else f"from {step}"


@torch.no_grad()
def measure_emergence(
    models: Mapping[int, HookedModel],
    task: Task,
    places: DataFrame | None = None,
    *,
    n_pairs: int = 64,
    n_prompts: int = 512,
    held_out: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Emergence:
    """Measure a task and its hops at each step, where the last model carries them.

    Args:
        models: by step; they are taken one after another, so that `Checkpoints` need not be in memory together.
        task: what they learn.
        places: what `find_variables` gives for the last model, where it is known; only variable, layer, pos and part
            are read. None to find them.
        n_pairs: pairs of prompts that are exchanged, of such as the last model answers right, the same at all steps.
        n_prompts: of each split, for accuracies and probes; fewer where there are fewer.
        held_out: whether pairs are of prompts that were kept out of the text of training.
        seed: of prompts, pairs, random directions and shuffled labels.
        progress: show a bar where it takes longer than 2 s.

    Raises:
        ConfigError: an argument out of range, no models, no hop before the answer, places that the models do not have,
            or a last model that answers fewer than two prompts right.
    """
    require_task(task)
    if not isinstance(models, Mapping) or not models or not all(isinstance(step, int) for step in models):
        raise ConfigError(f"models is {shown(models)}: give the models by their steps, at least one.")
    n_pairs, n_prompts = as_whole("n_pairs", n_pairs, 1), as_whole("n_prompts", n_prompts, 2)
    held_out, progress = as_switch("held_out", held_out), as_switch("progress", progress)
    seed = as_seed("seed", seed)
    steps = sorted(models)
    last = models[steps[-1]]
    if len(task.hops) < 2:
        raise ConfigError(f"{task.name} has no hop before its answer, so that none can emerge: give a task that has.")
    if places is None:
        places = find_variables(last, task, n_pairs=n_pairs, held_out=held_out, seed=seed)
    missing = [name for name in PLACE_COLUMNS if name not in places]
    if missing or places.empty:
        said = f"lacks {', '.join(missing)}" if missing and places.shape[1] else "is empty"
        raise ConfigError(f"places {said}: give what find_variables gives, for a task with a hop at least.")
    # With another seed than places were found with.
    exchanged, _ = answered_right(last, task, 8 * n_pairs, held_out, seed + 2)
    splits = [task.cases(n_prompts, held_out=of, seed=seed) for of in (False, True)]
    rows = []
    for step in tqdm(steps, desc="Emergence", unit=" steps", delay=2.0, disable=not progress):
        model = last if step == steps[-1] else models[step]
        _require_alike(model, last, step, steps[-1])
        in_text, kept_out = (share_right(model, task, cases) for cases in splits)
        means = take_means(model, task, seed=seed) if "mean" in set(places["part"]) else None
        for place in places.to_dict("records"):
            hop, at = str(place["variable"]), [(int(place["layer"]), int(place["pos"]))]
            given: dict[str, Any] = {"n_pairs": n_pairs, "seed": seed, "places": at, "cases": exchanged, "means": means}
            found = interchange(model, task, hop, part=place["part"], **given).iloc[0]
            probed = probe(model, task, hop, n_prompts=n_prompts, seed=seed, places=at).iloc[0]
            row = {"step": step, "hop": hop, "accuracy_text": in_text, "accuracy_held_out": kept_out}
            row |= {name: found[name] for name in ("layer", "pos", "token", "part")}
            row |= {"read": probed["accuracy"], "shuffled": probed["shuffled"], "values": probed["values"]}
            rows.append(row | {name: found[name] for name in ("follows", "keeps", "random_direction")})
    about = {"n_pairs": n_pairs, "n_prompts": n_prompts, "held_out": held_out, "seed": seed}
    return Emergence(table=DataFrame(rows), info={"model_name": model_name(last), "task": task.name, **about})


ALIKE = ("n_layers", "d_model", "d_vocab")


def _require_alike(model: HookedModel, last: HookedModel, step: int, last_step: int) -> None:
    """Raise unless the models of two steps are of one shape, as those of one training are."""
    for name in ALIKE:
        here, there = getattr(model.cfg, name, None), getattr(last.cfg, name, None)
        if here != there:
            raise ConfigError(
                f"models[{step}], {model_name(model)}, has {name} {here}, and models[{last_step}], {model_name(last)},"
                f" {there}: give the models of one training."
            )


def share_right(model: HookedModel, task: Task, cases: Sequence[Case]) -> float:
    """The share of some prompts after which a model's likeliest token is the answer."""
    likeliest = model(as_batch(model, task, cases))[:, -1].argmax(dim=-1)
    return float((likeliest == answer_ids(model, [case.answer for case in cases])).double().mean())
