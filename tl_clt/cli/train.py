"""`tl-clt train`: its options are the fields of a run's config, with their defaults and docstrings."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

import typer
import yaml
from typer.core import TyperCommand

from tl_clt.cli.app import app, console, errors, plain_errors
from tl_clt.cli.interruption import interruption

if TYPE_CHECKING:
    from tl_clt.training import TrainingProgress

SHORT = {
    **{"model_name": "model", "dataset_path": "dataset", "output_path": "output", "cache_path": "cache"},
    **{"checkpoint_path": "checkpoints", "log_to_wandb": "wandb", "sparsity_coefficient": "sparsity"},
    **{"train_batch_size_tokens": "batch-size"},
}
"""Options that have a shorter name beside that of their field."""

REQUIRED = ("model_name", "dataset_path", "output_path")
"""Fields that may be left out only where a model or a dataset is at hand already, as in Python."""

D_TRANSCODER = 1024
"""Features per layer: the config, which has a default for all else, has none for them."""

PANELS = {"clt": "The CLT", "data": "The data", None: "The run"}
"""Headings of the help, by part of the config."""


class TrainCommand(TyperCommand):
    """A command whose options are made when they are asked for: the config that they come from loads torch, which takes
    a second, and the help of other commands does without."""

    @cached_property
    def made(self) -> Any:
        """The command with its options."""
        once = typer.Typer(add_completion=False)
        once.command()(_with_options(run))
        return typer.main.get_command(once)

    def get_params(self, ctx: Any) -> list[Any]:
        """The options."""
        return self.made.get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        """Train."""
        return ctx.invoke(self.made.callback, **ctx.params)


@app.command(cls=TrainCommand)
def train() -> None:
    """Train a CLT on a model's activations over a text, with SAELens's training loop.

    On several GPUs: torchrun --nproc-per-node 4 -m tl_clt.cli train --device cuda ...
    Where an option takes several values, write them as YAML: --seqpos-slice "[1, null]".
    """


def run(resume: Path | None, settings: dict[str, Any]) -> None:
    """What the command does.

    Args:
        resume: checkpoint, or folder of them, to go on from.
        settings: fields of the run's config that were given.
    """
    with plain_errors():
        from tl_clt.files import require_new
        from tl_clt.lens import load_model
        from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig, own_device
        from tl_clt.training.run.checkpoints import folder_if_interrupted

        # Of several processes the main one speaks; its errors are raised on all.
        console.quiet = errors.quiet = "LOCAL_RANK" in os.environ and int(os.environ.get("RANK", "0")) > 0
        output, checkpoints = Path(settings["output_path"]), settings.get("checkpoint_path")
        require_new(output)
        checkpoint_path = _checkpoint_folder(None if checkpoints is None else Path(checkpoints), resume)
        if checkpoints is not None and resume is None:
            require_new(Path(checkpoints))
        values = {"d_transcoder": D_TRANSCODER, **settings, "checkpoint_path": checkpoint_path}
        cfg = CLTTrainingRunnerConfig.from_dict(values)
        interruption.quiet = errors.quiet
        cache = None if cfg.data.cache_path is None else Path(cfg.data.cache_path)
        checkpoint_folder = folder_if_interrupted(cfg)
        interruption.kept = lambda: _kept(output, checkpoint_folder, cache)
        hooked: Any = None
        if not console.quiet:
            with console.status("Loading the model"):
                device = own_device(cfg.device)
                hooked = load_model(cfg.model_name, backend=cfg.backend, device=device)  # type: ignore[arg-type]
        runner = CLTTrainingRunner(cfg, model=hooked, on_start=lambda memory: console.print(f"Memory: about {memory}"))
        with progress_shown():
            runner.run(resume)
        console.print(
            f"CLT written to {output}. Trace with it: tl-clt trace --model {cfg.model_name} --clt {output} --prompt ..."
        )


LINES_PER_HEADER = 25


class ProgressLines(logging.Handler):
    """Prints what a run's logger is told: its progress, a line at a time, as a table of 80 columns, and sentences."""

    def __init__(self) -> None:
        super().__init__()
        self._n_printed = 0
        self._losses: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        from tl_clt.training import TrainingProgress

        said = record.args[0] if isinstance(record.args, tuple) and record.args else None
        if isinstance(said, TrainingProgress):
            self._print_line(said)
        else:
            console.print(record.getMessage(), markup=False)

    def _print_line(self, line: TrainingProgress) -> None:
        from tl_clt.training.run.progress import in_words, shorten

        if self._n_printed == 0:
            console.print(
                "Of the last batch of each interval: the terms of the loss, explained variance (EV, mean over layers;"
                " 1 is all), active features per layer and token (L0: mean, least and greatest layer). Dead: share of"
                " features that hardly ever fire."
            )
        steps, new = f"{line.step}/{line.n_steps}", [name for name in line.losses if name not in self._losses]
        # A term may come later, and go: AuxK's, where no feature is dead.
        self._losses += new
        cells = {
            "step": f"{steps:>{2 * len(str(line.n_steps)) + 1}}",
            **{LOSSES.get(name, shorten(name)): _loss(line.losses.get(name)) for name in self._losses},
            "EV": f"{line.explained_variance:6.3f}",
            "L0": f"{line.l0_mean:5.3g}",
            "least": f"{line.l0_least:5.2g}",
            "most": f"{line.l0_greatest:5.3g}",
            "dead": f"{line.dead_share:4.0%}",
            "tok/s": f"{_thousands(line.tokens_per_second):>5}",
            "left": f"{in_words(line.seconds_left):>6}",
        }
        if self._n_printed % LINES_PER_HEADER == 0 or new:
            header = " ".join(f"{name:>{len(cell)}}" for name, cell in cells.items())
            console.print(f"[bold]{header}[/]", soft_wrap=True)
        console.print(" ".join(cells.values()), markup=False, soft_wrap=True)
        self._n_printed += 1


LOSSES = {
    "mse_loss": "mse",
    "sparsity_loss": "sparsity",
    "dead_feature_loss": "deadloss",
    "auxk_loss": "auxk",
    "far_write_loss": "farwrite",
}
"""Names of columns, of at most 8 letters."""


def _loss(value: float | None) -> str:
    return " " * 8 if value is None else f"{value:8.3g}"


def _thousands(number: float) -> str:
    """820, 8.2k, 82k."""
    if number < 1000:
        return f"{number:.0f}"
    return f"{number / 1000:.1f}k" if number < 10_000 else f"{number / 1000:.0f}k"


@contextmanager
def progress_shown() -> Iterator[None]:
    """Within, lines of training are printed."""
    logger, lines = logging.getLogger("tl_clt.training"), ProgressLines()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    # Libraries set up handlers of their own, which would say it all once more.
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(lines)


def _with_options(train_with: Callable[[Path | None, dict[str, Any]], None]) -> Callable[..., None]:
    """The same as a function with a parameter for each field, in the form that typer makes options from."""

    def command(resume: Path | None = None, **given: Any) -> None:
        asked = {name: value for name, value in given.items() if value is not None}
        train_with(resume, {name: _plain(value) if name in parsed else value for name, value in asked.items()})

    options, parsed = {}, set()
    for part, field_, kind, help_text in _fields_of_config():
        simple = _simple_type(kind)
        if simple is None:
            parsed.add(field_.name)
        options[field_.name] = _option(part, field_, simple or str, help_text)
    options = {name: options[name] for name in REQUIRED} | options
    options["resume"] = Annotated[
        Optional[Path],
        typer.Option(
            help="Checkpoint, or folder of them, of a run that was cut off, or is to have more training tokens; give"
            " its other options again."
        ),
    ]
    command.__annotations__ = options
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=kind,
                default=inspect.Parameter.empty if name in REQUIRED else None,
            )
            for name, kind in options.items()
        ]
    )
    return command


def _fields_of_config() -> Iterator[tuple[str | None, Field[Any], Any, str]]:
    """Part, field, type and docstring of everything that a run's config says."""
    from tl_clt.training.config import PARTS, CLTTrainingRunnerConfig

    for part, kind in (*PARTS.items(), (None, CLTTrainingRunnerConfig)):
        hints, told = get_type_hints(kind), _docstrings(kind)
        for one in fields(kind):
            if part is not None or one.name not in PARTS:
                yield part, one, hints[one.name], told[one.name]


def _docstrings(kind: type) -> dict[str, str]:
    """What stands under each field of a dataclass."""
    found = {}
    for base in kind.__mro__[-2::-1]:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for one, following in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(one, ast.AnnAssign) and isinstance(following, ast.Expr):
                found[ast.unparse(one.target)] = " ".join(ast.literal_eval(following.value).split())
    return found


def _option(part: str | None, field_: Field[Any], kind: type, help_text: str) -> Any:
    """A field as an option of a type that typer knows."""
    default = D_TRANSCODER if field_.name == "d_transcoder" else field_.default
    names = [f"--{name.replace('_', '-')}" for name in (SHORT.get(field_.name), field_.name) if name is not None]
    if kind is bool:
        names[0] += f"/--no-{names[0].removeprefix('--')}"
    shown: Any = False
    if default not in (None, MISSING):
        shown = default if isinstance(default, str) else json.dumps(default)
    if field_.name in REQUIRED:
        # What Python may leave out, since it can give the runner a model and a dataset, a command must be given.
        help_text = re.sub(r"[.;] [^.;]*left out[^.;]*\.$", ".", help_text)
    told = typer.Option(*names, help=help_text, show_default=shown, rich_help_panel=PANELS[part])
    return Annotated[Optional[kind], told]


def _simple_type(kind: Any) -> type | None:
    """The type that typer turns an option's text into; None where only YAML can say what is meant."""
    several = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = [one for one in several if one is not type(None)]
    if len(kinds) != 1:
        return None
    # What may be chosen, the config knows, and names the nearest.
    only = str if get_origin(kinds[0]) is Literal else kinds[0]
    return only if only in (bool, int, float, str) else None


def _plain(text: str) -> Any:
    """The value that a text stands for: true, 7, [1, null], bos."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _checkpoint_folder(checkpoints: Path | None, resume: Path | None) -> str | None:
    """Where new checkpoints go: beside the one resumed from, unless another folder is given."""
    if checkpoints is None and resume is not None:
        checkpoints = resume.parent if resume.name.startswith("step_") else resume
    return None if checkpoints is None else str(checkpoints)


def _kept(output: Path, checkpoints: Path | None, cache: Path | None) -> str:
    """What of a run is there."""
    if (output / "cfg.json").exists():
        return f"The CLT is in {output}."
    cached = "" if cache is None or not cache.exists() else f" Cached activations stay in {cache}."
    written = [] if checkpoints is None else sorted(checkpoints.glob("step_*"))
    if not written:
        return "No CLT and no checkpoint was written." + cached
    step, folder = int(written[-1].name.removeprefix("step_")), written[-1].parent
    in_full = "" if "LOCAL_RANK" in os.environ else f" In full: {_command_to_go_on(sys.argv[1:], folder)}"
    return f"The newest checkpoint is of step {step}: the same command with --resume {folder} goes on.{cached}{in_full}"


def _command_to_go_on(arguments: list[str], folder: Path) -> str:
    """The command line that was given, with `--resume`, as one types it."""
    kept, skip = [], False
    for one in arguments:
        if not skip and one != "--resume" and not one.startswith("--resume="):
            kept.append(one)
        skip = one == "--resume"
    return shlex.join(["tl-clt", *kept, "--resume", str(folder)])
