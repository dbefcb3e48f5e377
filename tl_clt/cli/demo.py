"""`tl-clt demo`: the bundled model, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tl_clt.cli.app import app, console, errors, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.cli.show import show_graph, write

if TYPE_CHECKING:
    from tl_clt.evaluation import EvaluationReport
    from tl_clt.lens import HookedModel
    from tl_clt.transcoder import CrossLayerTranscoder

N_EVALUATION_SENTENCES = 100
"""Held-out sentences that the demo measures the CLT on."""


@app.command()
def demo(
    prompt: Annotated[Optional[str], typer.Option(help="A prompt in atlas's own words.")] = None,
    output: Annotated[Path, typer.Option(help="Graph file to write.")] = Path("atlas-graph.safetensors"),
) -> None:
    """Trace a prompt through the bundled model "atlas" and show how it arrives at its answer."""
    with plain_errors():
        from tl_clt.transcoder.formats.writing import require_file

        require_file(output)
        with console.status("Loading the model and its CLT"):
            import torch

            from tl_clt.attribution import attribute
            from tl_clt.organisms import default_prompt, load_organism

            # Handing parts of so small a model to a second thread costs more than it saves.
            torch.set_num_threads(1)
            model, clt = load_organism("atlas")
        with console.status("Tracing the prompt"):
            graph = attribute(model, clt, prompt or default_prompt("atlas"))
        if "<unk>" in graph.prompt_tokens:
            errors.print("Words that atlas does not know became <unk>: it has read of US states and cities only.")
        write(graph, output)
        interruption.kept = lambda: f"The graph is in {output}."
        show_graph(graph, graph.prune(), model, clt)
        with console.status("Measuring how well the CLT stands in for the MLPs"):
            from tl_clt.viewer.tables import evaluation_table

            report = _evaluate_on_atlas(model, clt)
        console.print(evaluation_table(report))


def _evaluate_on_atlas(model: HookedModel, clt: CrossLayerTranscoder) -> EvaluationReport:
    """The CLT on two-hop questions that neither it nor the model has seen."""
    from tl_clt.evaluation import evaluate
    from tl_clt.organisms.atlas.text import held_out_questions, sentence_of

    sentences = [sentence_of(q) for q in held_out_questions()[:N_EVALUATION_SENTENCES]]
    return evaluate(model, clt, sentences, n_graphs=0)
