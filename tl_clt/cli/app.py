"""The app, and what its commands share: consoles, errors, options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from tl_clt.cli.interruption import run_interruptible
from tl_clt.errors import TlCltError


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
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


ModelName = Annotated[str, typer.Option(help="Bundled organism, model folder, .gguf file, or hub name.")]
ModelOfCLT = Annotated[
    Optional[str],
    typer.Option(help="Bundled organism, model folder, .gguf file, or hub name. Default: the model the CLT is for."),
]
CLTName = Annotated[str, typer.Option(help="CLT folder, name from `tl-clt list`, or hub repository.")]
Backend = Annotated[str, typer.Option(help="hooked (HookedTransformer) or bridge (TransformerBridge).")]
Device = Annotated[str, typer.Option(help="Where to compute, for example cuda.")]
LazyDecoder = Annotated[bool, typer.Option(help="Leave decoders on disk, reading only what is needed.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show an error of ours as one message, without a traceback, and end with status 1."""
    try:
        yield
    except TlCltError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False)
        raise typer.Exit(1) from error
