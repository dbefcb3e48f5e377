"""`tl-clt export` and `import`: graphs, and what features mean, in the formats of other viewers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.progress import track

from tl_clt.cli.app import app, console, errors, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.errors import ConfigError

FORMATS = ("neuronpedia", "circuit-tracer")


@app.command("export")
def export(
    source: Annotated[
        str,
        typer.Argument(
            help="Graph file, as `tl-clt trace` writes it; or feature store, as `tl-clt features` does (or a bundled"
            " organism, for its own).",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Of a graph, for neuronpedia, the JSON file to write; for circuit-tracer, its folder of graphs. Of a"
            " store, a new folder."
        ),
    ],
    format: Annotated[str, typer.Option(help="neuronpedia or circuit-tracer.")] = "neuronpedia",
    slug: Annotated[
        Optional[str], typer.Option(help="Name of the graph there. Default: the output's, or the graph file's.")
    ] = None,
    scan: Annotated[
        Optional[str], typer.Option(help="Name of the model there. Default: that of the model it was traced in.")
    ] = None,
    node_threshold: Annotated[
        Optional[float], typer.Option(help="Share of influence that nodes keep. Default: the graph as it is.")
    ] = None,
    edge_threshold: Annotated[
        Optional[float], typer.Option(help="Share of influence that edges keep. Default: the graph as it is.")
    ] = None,
    features: Annotated[
        Optional[Path],
        typer.Option(
            help="Of a graph: feature store of its CLT (a folder, or a bundled organism), whose labels go with it;"
            " features without one are named by what they promote. Default: the viewer's own words, or none."
        ),
    ] = None,
    source_set: Annotated[
        Optional[str], typer.Option(help="Neuronpedia's name for the set of features, if it has their pages.")
    ] = None,
    upload: Annotated[
        bool, typer.Option(help="Upload it to Neuronpedia, where everybody can see it, by NEURONPEDIA_API_KEY.")
    ] = False,
) -> None:
    """Write a graph, or the features of a store, for Neuronpedia or for circuit-tracer's server.

    Features become a JSON file each (neuronpedia), or a bundle a layer (circuit-tracer, which looks for the folder as
    `features` beside the transcoders).
    """
    with plain_errors():
        from tl_clt.arguments import as_choice
        from tl_clt.bundled import bundled_folder

        as_choice("--format", format, FORMATS)
        interruption.kept = lambda: "Nothing was written."
        thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
        names = {"slug": slug, "scan": scan}
        if Path(source).is_dir() or bundled_folder(source, "features") is not None:
            given = {**names, **thresholds, "features": features, "source_set": source_set, "upload": upload or None}
            _export_features(source, output, format, [name for name, value in given.items() if value is not None])
            return
        _export_graph(Path(source), output, format, {**names, **thresholds}, features, source_set, upload)


def _export_features(source: str, output: Path, format: str, of_graphs: list[str]) -> None:
    """Write the features of a store; `of_graphs` are the options given that say nothing of features."""
    from tl_clt.features import FeatureStore
    from tl_clt.files import require_new
    from tl_clt.viewer import formats

    if of_graphs:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in of_graphs)
        raise ConfigError(
            f"'{source}' is a feature store, and {named} is of graphs. Leave it out, or give a graph file."
        )
    store = FeatureStore.open(source)
    require_new(output)
    records = (record.to_dict() for record in track(store, "Features", console=errors, transient=True))
    if format == "circuit-tracer":
        formats.save_circuit_tracer_features(records, output, d_transcoder=store.d_transcoder)
    else:
        formats.save_neuronpedia_features(records, output)
    labelled = "with their labels" if store.is_labelled else "without labels"
    console.print(f"{len(store)} features, {labelled}, are in {output}.", markup=False, soft_wrap=True)


def _export_graph(
    file: Path,
    output: Path,
    format: str,
    options: dict[str, Any],
    features: Path | None,
    source_set: str | None,
    upload: bool,
) -> None:
    from tl_clt.attribution import AttributionGraph
    from tl_clt.features import FeatureStore
    from tl_clt.files import require_unused
    from tl_clt.viewer import formats

    options = {**options, "features": None if features is None else FeatureStore.open(features)}
    if format == "circuit-tracer":
        if source_set is not None or upload:
            raise ConfigError("--source-set and --upload are for --format neuronpedia. Leave them out.")
        named = {**options, "slug": options["slug"] or file.stem}
        require_unused(output / f"{named['slug']}.json")
        written = formats.save_circuit_tracer(AttributionGraph.load(file), output, **named)
    else:
        require_unused(output)
        if upload:
            formats.require_upload()
        graph = AttributionGraph.load(file)
        written = formats.save_neuronpedia(graph, output, source_set=source_set, **options)
    interruption.kept = lambda: f"The graph is in {written}."
    console.print(f"The graph is in {written}.", markup=False, soft_wrap=True)
    if upload:
        console.print(f"It is at {formats.upload_neuronpedia(written)}.", markup=False, soft_wrap=True)


@app.command("import")
def import_graph(
    file: Annotated[Path, typer.Argument(help="JSON file of a graph, for Neuronpedia or for circuit-tracer.")],
    output: Annotated[Path, typer.Option(help="Graph file to write.")],
) -> None:
    """Read a graph of Neuronpedia's or circuit-tracer's, and write it as `tl-clt trace` does."""
    with plain_errors():
        from tl_clt.files import require_unused
        from tl_clt.viewer.formats import load_circuit_tracer

        require_unused(output)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            graph = load_circuit_tracer(file)
        for warning in said:
            errors.print(f"Note: {warning.message}", markup=False, soft_wrap=True)
        graph.save(output)
        console.print(f"{graph}", markup=False, soft_wrap=True)
        console.print(
            f"It is in {output}: tl_clt.AttributionGraph.load('{output}') reads it.", markup=False, soft_wrap=True
        )
