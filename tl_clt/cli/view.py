"""`tl-clt view`: graphs as a page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tl_clt.cli.app import Backend, Device, LazyDecoder, app, console, load_pair, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.errors import ConfigError


@app.command()
def view(
    graphs: Annotated[list[Path], typer.Argument(help="Graph files, as trace, demo and graph.save write them.")],
    features: Annotated[
        Optional[Path], typer.Option(help="Folder that `tl-clt features` wrote: what features mean.")
    ] = None,
    model: Annotated[
        Optional[str],
        typer.Option(help="With --clt: the model to change features in. Default: the model the CLT is for."),
    ] = None,
    clt: Annotated[
        Optional[str],
        typer.Option(
            help="CLT the graphs were traced with: features can be changed from the page, to see what follows."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(help="Port of 127.0.0.1 that the page is served at; 0 for one that is free.")
    ] = 0,
    annotations: Annotated[
        Optional[Path],
        typer.Option(help="File to keep pins, groups and labels in. Default: the page's address keeps them."),
    ] = None,
    browser: Annotated[
        bool,
        typer.Option(
            help="Open the page in a browser. Others on this machine may read the address in its command line."
        ),
    ] = True,
    backend: Backend = "hooked",
    device: Device = "cpu",
    lazy_decoder: LazyDecoder = False,
) -> None:
    """Show graphs in the browser: a page that this machine alone can open, until Ctrl-C."""
    with plain_errors():
        if model is not None and clt is None:
            raise ConfigError("--model is for steering, which takes the model's CLT as well: give --clt.")
        with console.status("Reading the graphs"):
            from tl_clt.attribution import AttributionGraph
            from tl_clt.files import require_file
            from tl_clt.viewer.server import PageServer, open_page, require_port

            require_port(port)
            if annotations is not None:
                require_file(annotations)
            read = {_name_of(path, graphs): AttributionGraph.load(path) for path in graphs}
            store = None if features is None else _open_features(features)
        hooked, transcoder = None, None
        if clt is not None:
            with console.status("Loading the model and the CLT"):
                hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder)
            if store is not None:
                store.require_clt(transcoder)
        with PageServer(read, store, hooked, transcoder, port, annotations=annotations) as server:
            if annotations is not None:
                interruption.kept = lambda: (
                    f"The annotations are in {annotations}." if annotations.exists() else "Nothing was annotated."
                )
            console.print(f"The page is at {server.url}", soft_wrap=True)
            console.print("Ctrl-C ends it.")
            if browser:
                open_page(server.url)
            server.run()


def _name_of(path: Path, others: list[Path]) -> str:
    """A graph's file name, or its path where others are named alike."""
    return path.stem if sum(other.stem == path.stem for other in others) == 1 else str(path)


def _open_features(folder: Path) -> Any:
    from tl_clt.features import FeatureStore

    return FeatureStore.open(folder)
