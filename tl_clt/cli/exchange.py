"""`tl-clt export` and `import`: graphs in the formats of other viewers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tl_clt.cli.app import app, console, errors, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.errors import ConfigError

FORMATS = ("neuronpedia", "circuit-tracer")


@app.command("export")
def export_graph(
    graph: Annotated[Path, typer.Argument(help="Graph file, as `tl-clt trace` writes it.")],
    output: Annotated[
        Path, typer.Option(help="For neuronpedia, the JSON file to write; for circuit-tracer, its folder of graphs.")
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
    source_set: Annotated[
        Optional[str], typer.Option(help="Neuronpedia's name for the set of features, if it has their pages.")
    ] = None,
    upload: Annotated[
        bool, typer.Option(help="Upload it to Neuronpedia, where everybody can see it, by NEURONPEDIA_API_KEY.")
    ] = False,
) -> None:
    """Write a graph for Neuronpedia or for circuit-tracer's server."""
    with plain_errors():
        from tl_clt.arguments import as_choice
        from tl_clt.attribution import AttributionGraph
        from tl_clt.files import require_unused
        from tl_clt.viewer import formats

        as_choice("--format", format, FORMATS)
        interruption.kept = lambda: "Nothing was written."
        thresholds: dict[str, Any] = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
        if format == "circuit-tracer":
            if source_set is not None or upload:
                raise ConfigError("--source-set and --upload are for --format neuronpedia. Leave them out.")
            name = graph.stem if slug is None else slug
            require_unused(output / f"{name}.json")
            traced = AttributionGraph.load(graph)
            written = formats.save_circuit_tracer(traced, output, slug=name, scan=scan, **thresholds)
        else:
            require_unused(output)
            if upload:
                formats.require_upload()
            traced = AttributionGraph.load(graph)
            written = formats.save_neuronpedia(
                traced, output, slug=slug, scan=scan, source_set=source_set, **thresholds
            )
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
