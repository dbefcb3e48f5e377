"""The app, what its commands share (consoles, errors, options, a model with its CLT), and `tl-clt list`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.text import Text

from tl_clt.cli.interruption import run_interruptible
from tl_clt.errors import ConfigError, LayerWarning, TlCltError

if TYPE_CHECKING:
    from tl_clt.transcoder import CrossLayerTranscoder


class App(typer.Typer):
    """The commands, each of which Ctrl-C ends with one line."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run_interruptible(partial(super().__call__, *args, **kwargs))


app = App(
    name="tl-clt",
    help="Cross-layer transcoders for TransformerLens: train one, and trace how a model arrives at its answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)


ModelName = Annotated[str, typer.Option(help="Bundled organism, model folder, .gguf file, or hub name.")]
ModelOfCLT = Annotated[
    Optional[str],
    typer.Option(help="Bundled organism, model folder, .gguf file, or hub name. Default: the model the CLT is for."),
]
CLTName = Annotated[str, typer.Option(help="Bundled organism, CLT folder, name from `tl-clt list`, or hub repository.")]
Backend = Annotated[str, typer.Option(help="hooked (HookedTransformer) or bridge (TransformerBridge).")]
Device = Annotated[str, typer.Option(help="Where to compute, for example cuda.")]
LazyDecoder = Annotated[bool, typer.Option(help="Leave decoders on disk, reading only what is needed.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show an error of ours as one message, without a traceback, and end with status 1; warnings as a line each."""
    try:
        with plain_warnings():
            yield
    except TlCltError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False)
        raise typer.Exit(1) from error


PACKAGE = Path(__file__).parents[1]


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, warnings of ours are a line each, without a place in the code."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **options: Any) -> None:
        ours = issubclass(category, UserWarning) and Path(filename).is_relative_to(PACKAGE)
        if not (ours or issubclass(category, LayerWarning)):
            before(message, category, filename, *where, **options)
            return
        errors.print(Text.assemble(("Warning", "bold yellow"), f": {message}"))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def load_pair(
    model: Optional[str], clt: str, backend: str, device: str, lazy_decoder: bool
) -> tuple[Any, CrossLayerTranscoder]:
    """The model and the CLT. Without a name, the model that the CLT was made for.

    Raises:
        ConfigError: no model is named, and the CLT does not know its own.
        CLTMismatch: the catalogue tells that the CLT is of another model; nothing was downloaded.
    """
    from tl_clt.lens import load_model, model_shape
    from tl_clt.transcoder import CrossLayerTranscoder, check_fits

    if model is not None:
        check_fits(clt, model, model_shape(model))
    transcoder = CrossLayerTranscoder.from_pretrained(clt, device=device, lazy_decoder=lazy_decoder)
    if model is None and transcoder.cfg.model_name == "unknown":
        raise ConfigError(f"'{clt}' does not say which model it is for. Give --model.")
    return load_model(model or transcoder.cfg.model_name, backend=backend, device=device), transcoder  # type: ignore[arg-type]


@app.command("list")
def list_transcoders() -> None:
    """List the CLTs and per-layer transcoders that --clt takes by name: bundled ones, and public ones."""
    from tl_clt.bundled import bundled_organisms
    from tl_clt.transcoder import public_transcoders

    for name in bundled_organisms():
        console.print(f"[bold]{name}[/]: CLT of {name}, a small model; both come with this package", soft_wrap=True)
    for entry in public_transcoders():
        features, activation, reads, writes, gigabytes, licence = (
            "?" if value is None else value
            for value in (
                entry.d_transcoder,
                entry.activation,
                entry.input_hook,
                entry.output_hook,
                entry.gigabytes,
                entry.licence,
            )
        )
        console.print(f"[bold]{entry.name}[/]: {entry.kind} of {entry.model}", soft_wrap=True)
        console.print(f"    {entry.repo}", soft_wrap=True)
        console.print(
            f"    {entry.n_layers} layers x {features} features, {activation}; reads {reads}, writes {writes};"
        )
        console.print(f"    {gigabytes} GB; licence {licence}")
    console.print("? is not stated by its makers where this was looked up; the files tell it when they are loaded.")
