"""`tl-clt trace` and `tl-clt intervene`: one prompt, explained or changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from tl_clt.cli.app import Backend, CLTName, Device, LazyDecoder, ModelOfCLT, app, console, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.cli.pair import load_pair
from tl_clt.cli.show import show_effect, show_graph, write
from tl_clt.errors import InterventionError, OutputNotEmpty


@app.command()
def trace(
    clt: CLTName,
    prompt: Annotated[str, typer.Option(help="Text whose next token to explain.")],
    model: ModelOfCLT = None,
    output: Annotated[Path, typer.Option(help="Graph file to write.")] = Path("graph.safetensors"),
    backend: Backend = "hooked",
    device: Device = "cpu",
    target: Annotated[
        Optional[list[str]], typer.Option(help="Token to explain; may be given again. Default: the likeliest.")
    ] = None,
    max_n_logits: Annotated[int, typer.Option(help="At most so many output tokens.")] = 10,
    desired_logit_prob: Annotated[float, typer.Option(help="Probability that the output tokens reach.")] = 0.95,
    max_feature_nodes: Annotated[
        Optional[int], typer.Option(help="Trace at most so many features. Default: all.")
    ] = None,
    max_unexplored: Annotated[
        Optional[float], typer.Option(help="Stop when this share of influence is left. Default: trace all.")
    ] = None,
    contrast: Annotated[
        Optional[str], typer.Option(help="A prompt of as many tokens: show what the first has beyond it.")
    ] = None,
    keep_edges: Annotated[
        Optional[float], typer.Option(help="Hold the strongest edges that make up this share of each node's input.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, sweep, or autograd.")] = "auto",
    memory_limit: Annotated[
        Optional[float], typer.Option(help="GiB that tracing may take. Default: 80% of what is free.")
    ] = None,
    bos: Annotated[str, typer.Option(help="Position 0: error, drop, or features.")] = "error",
    bias_nodes: Annotated[bool, typer.Option(help="Position and bias nodes.")] = True,
    node_threshold: Annotated[float, typer.Option(help="Share of influence that shown nodes keep.")] = 0.8,
    edge_threshold: Annotated[float, typer.Option(help="Share of influence that shown edges keep.")] = 0.98,
    lazy_decoder: LazyDecoder = False,
) -> None:
    """Trace one prompt into an attribution graph, show it pruned, and write it whole to a file."""
    with plain_errors():
        from tl_clt.transcoder.formats.writing import require_file

        require_file(output)
        if os.path.lexists(output):
            raise OutputNotEmpty(f"'{output}' exists. Give another --output, or remove it first.")
        interruption.kept = lambda: f"The graph is in {output}." if output.exists() else "Nothing was written."
        with console.status("Loading the model and the CLT"):
            from tl_clt.attribution import attribute, check_thresholds

            check_thresholds(node_threshold, edge_threshold)
            hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder)
        graph = attribute(
            hooked,
            transcoder,
            prompt,
            target,
            max_n_logits=max_n_logits,
            desired_logit_prob=desired_logit_prob,
            max_feature_nodes=max_feature_nodes,
            max_unexplored=max_unexplored,
            engine=engine,  # type: ignore[arg-type]
            contrast=contrast,
            keep_edges=keep_edges,
            memory_limit=memory_limit,
            bos=bos,  # type: ignore[arg-type]
            bias_nodes=bias_nodes,
        )
        write(graph, output)
        show_graph(graph, graph.prune(node_threshold, edge_threshold), hooked, transcoder)


@app.command()
def intervene(
    clt: CLTName,
    prompt: Annotated[str, typer.Option(help="Text whose next token to change.")],
    model: ModelOfCLT = None,
    value: Annotated[
        Optional[list[str]],
        typer.Option(help="Set features: layer:pos:feature=number. pos may be all; feature may be 17,30. Repeatable."),
    ] = None,
    scale: Annotated[Optional[list[str]], typer.Option(help="Multiply features, in the same form. Repeatable.")] = None,
    add: Annotated[Optional[list[str]], typer.Option(help="Add to features, in the same form. Repeatable.")] = None,
    through_layer: Annotated[
        Optional[int],
        typer.Option(help="Hold MLP outputs up to this layer (constrained). Default: recompute features (iterative)."),
    ] = None,
    freeze: Annotated[str, typer.Option(help="Hold attention, all (and norms' scales), or none.")] = "attention",
    top: Annotated[int, typer.Option(help="Tokens to show.")] = 10,
    backend: Backend = "hooked",
    device: Device = "cpu",
    lazy_decoder: LazyDecoder = False,
) -> None:
    """Change features on a prompt and show which next tokens become likelier or less likely."""
    with plain_errors():
        with console.status("Loading the model and the CLT"):
            from tl_clt.interventions import intervene as change
            from tl_clt.interventions import parse_intervention

            given = {"value": value, "scale": scale, "add": add}
            changes = [parse_intervention(text, setter) for setter, texts in given.items() for text in texts or ()]
            if not changes:
                raise InterventionError("Nothing is changed: give --value, --scale or --add, for example 2:-1:17=0.")
            hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder)
        effect = change(hooked, transcoder, prompt, changes, through_layer, freeze)  # type: ignore[arg-type]
        show_effect(effect, top)
