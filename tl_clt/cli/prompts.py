"""`tl-clt demo`, `trace` and `intervene`: one prompt, explained or changed, and what is printed of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tl_clt.cli.app import (
    Backend,
    CLTName,
    Device,
    LazyDecoder,
    ModelOfCLT,
    app,
    console,
    errors,
    load_pair,
    plain_errors,
)
from tl_clt.cli.interruption import interruption
from tl_clt.errors import InterventionError

if TYPE_CHECKING:
    from tl_clt.attribution import AttributionGraph
    from tl_clt.attribution.edges import Node
    from tl_clt.evaluation import EvaluationReport
    from tl_clt.features import FeatureRecord, FeatureStore
    from tl_clt.interventions import Intervention, InterventionEffect
    from tl_clt.lens import HookedModel
    from tl_clt.transcoder import CrossLayerTranscoder


N_EVALUATION_SENTENCES = 100
"""Held-out sentences that the demo measures the CLT on."""


@app.command()
def demo(
    prompt: Annotated[Optional[str], typer.Option(help="A prompt in atlas's own words.")] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(
            help="Graph file to write, and beside it the page, as .html. Default: atlas-graph.safetensors, which the"
            " demo replaces."
        ),
    ] = None,
) -> None:
    """Trace a prompt through the bundled model "atlas" and show how it arrives at its answer."""
    with plain_errors():
        from tl_clt.files import require_file, require_unused

        # What it wrote before under its own name it may replace; under a name that was given, something else may be.
        check = require_file if output is None else require_unused
        output = output or Path("atlas-graph.safetensors")
        page = output.with_suffix(".html")
        for path in {output, page}:
            check(path)
        with console.status("Loading the model and its CLT"):
            import torch

            from tl_clt.attribution import attribute
            from tl_clt.organisms import default_prompt, load_features, load_organism

            # Handing parts of so small a model to a second thread costs more than it saves.
            torch.set_num_threads(1)
            model, clt = load_organism("atlas")
            features = load_features("atlas")
        with console.status("Tracing the prompt"), warnings.catch_warnings():
            # Said below in words for whoever sees atlas for the first time.
            warnings.filterwarnings("ignore", message="The tokenizer of atlas reads a part")
            graph = attribute(model, clt, prompt or default_prompt("atlas"))
        if "<unk>" in graph.prompt_tokens:
            errors.print("Words that atlas does not know became <unk>: it has read of US states and cities only.")
        _write(graph, output)
        interruption.kept = lambda: f"The graph is in {output}."
        pruned = graph.prune()
        _tell(pruned, features)
        _show_graph(graph, pruned, model, clt, _meanings(pruned, features))
        with console.status("Measuring how well the CLT stands in for the MLPs"):
            from tl_clt.viewer.tables import evaluation_table

            report = _evaluate_on_atlas(model, clt)
        console.print(evaluation_table(report))
        pruned.save_html(page, features=features)
        console.print(f"The page is in {page}: open it in a browser.", soft_wrap=True)


def _meanings(graph: AttributionGraph, features: FeatureStore) -> Callable[[Node], str]:
    """What each feature of a graph of atlas means where it stands: the part of its label that holds there."""
    from tl_clt.features.rules import label_here
    from tl_clt.organisms import known_variables

    tokens, variables = [*graph.prompt_tokens, graph.logit_tokens[0]], known_variables("atlas")

    def meaning(node: Node) -> str:
        record = features[node.layer, node.index]
        return label_here(record, tokens, node.pos, variables) or "without a label"

    return meaning


def _tell(graph: AttributionGraph, features: FeatureStore) -> None:
    """Print the story of a graph of atlas: its paths, whether the state is a step between, and its groups."""
    from tl_clt.organisms.atlas.variables import state_in_mind
    from tl_clt.viewer import group_features, strongest_paths
    from tl_clt.viewer.tables import group_table

    groups = group_features(graph, _meanings(graph, features))
    paths = strongest_paths(graph, groups)
    console.print("In words:", style="bold")
    for path in paths:
        console.print(f"    {path}", markup=False, soft_wrap=True)
    states = state_in_mind(graph.prompt_tokens)
    state = next((state for state in reversed(states) if state), None)
    if state is not None and state not in map(str.strip, graph.prompt_tokens):
        between = [group for group in groups if group.meaning == state]
        if between:
            nodes = [node for group in between for node in group.nodes]
            share = sum(group.share for group in between)
            parts = [_part_in_words(features[node.layer, node.index], state) for node in nodes]
            said = f"{state}, which the prompt does not name, is a step between: {share:.0%} of the influence of all"
            said += f" features shown. {' '.join(parts)}"
        else:
            strongest = f" The strongest group is: {groups[0].meaning}." if groups else ""
            said = f"No feature here is labelled {state}, the state that the prompt is about: at these activations none"
            said += f" of the CLT's features stands for it alone.{strongest}"
        console.print(said, markup=False)
    console.print(group_table(groups, graph, features))


def _part_in_words(record: FeatureRecord, meaning: str) -> str:
    """How much of a feature one part of its label is: a feature may stand for several things."""
    share = next((part.share for part in record.label_parts if part.text == meaning), 1.0)
    return f"{record.layer}.{record.feature} as a whole: {record.label}; {share:.0%} of its activation is at {meaning}."


def _evaluate_on_atlas(model: HookedModel, clt: CrossLayerTranscoder) -> EvaluationReport:
    """The CLT on two-hop questions that neither it nor the model has seen."""
    from tl_clt.evaluation import evaluate
    from tl_clt.organisms.atlas.text import held_out_questions, sentence_of

    sentences = [sentence_of(q) for q in held_out_questions()[:N_EVALUATION_SENTENCES]]
    return evaluate(model, clt, sentences, n_graphs=0)


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
    figure: Annotated[
        Optional[Path], typer.Option(help="Picture of the shown graph to write as well: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Trace one prompt into an attribution graph, show it pruned, and write it whole to a file."""
    with plain_errors():
        from tl_clt.files import require_unused

        require_unused(output)
        if figure is not None:
            from tl_clt.viewer import require_figure

            require_figure(figure)
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
        _write(graph, output)
        _show_graph(graph, graph.prune(node_threshold, edge_threshold), hooked, transcoder)
        if figure is not None:
            from tl_clt.viewer import graph_figures, save_figure

            pictures = graph_figures(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
            console.print(f"Its picture is in {save_figure(pictures.plot('graph'), figure)}.")


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
        Optional[str],
        typer.Option(
            help="Hold MLP outputs up to this layer, or all (constrained). Default: recompute features (iterative)."
        ),
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
            from tl_clt.arguments import as_whole
            from tl_clt.interventions import intervene as change
            from tl_clt.interventions import parse_intervention

            given = {"value": value, "scale": scale, "add": add}
            changes = [parse_intervention(text, setter) for setter, texts in given.items() for text in texts or ()]
            if not changes:
                raise InterventionError("Nothing is changed: give --value, --scale or --add, for example 2:-1:17=0.")
            hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder)
        last: int | str | None = through_layer
        if through_layer is not None and through_layer.removeprefix("-").isdecimal():
            last = int(through_layer)
        as_whole("--top", top, 1, hooked.cfg.d_vocab, why="the size of the vocabulary", error=InterventionError)
        effect = change(hooked, transcoder, prompt, changes, last, freeze)  # type: ignore[arg-type]
        _show_effect(effect, changes, top)


def _show_graph(
    graph: AttributionGraph,
    pruned: AttributionGraph,
    model: HookedModel,
    clt: CrossLayerTranscoder,
    meaning: Callable[[Node], str] | None = None,
) -> None:
    """Print a pruned graph as a tree, and the scores of the whole. Features are named by what they mean, or else by
    what they promote."""
    import torch

    from tl_clt.features import promoted_tokens
    from tl_clt.viewer import graph_tree
    from tl_clt.viewer.tables import graph_table

    def label(node: Node) -> str:
        if meaning is not None:
            return meaning(node)
        features = torch.tensor([node.index], device=clt.W_enc.device)
        words = promoted_tokens(model, clt, node.layer, features)[0]
        return "promotes " + ", ".join(w.strip() for w in words)

    what = "the tokens it promotes most directly" if meaning is None else "what its label says here"
    console.print(f"Each line: the share of the input of the node above it, the node, and {what}.", style="dim")
    console.print(graph_tree(pruned, label=label))
    console.print(graph_table(graph, pruned))


def _show_effect(effect: InterventionEffect, changes: Sequence[Intervention], top: int) -> None:
    """Print the tokens whose probability changed most, and which features that were changed are not active."""
    from tl_clt.viewer.tables import effect_table

    # What is set or added to does something all the same.
    otherwise = {(one.layer, feature) for one in changes if one.scale is None for feature in one.features}
    for inactive in effect.inactive:
        idle = "" if (inactive.layer, inactive.feature) in otherwise else " Scaling it does nothing."
        errors.print(f"Note: {inactive}.{idle}", markup=False)
    console.print(effect_table(effect, top))


def _write(graph: AttributionGraph, output: Path) -> None:
    graph.save(output)
    console.print(f"The whole graph is in {output}: tl_clt.AttributionGraph.load('{output}') reads it.")
