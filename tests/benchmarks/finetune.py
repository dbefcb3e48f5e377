"""What fine-tuning helps, on known circuits and on atlas: `python -m tests.benchmarks.finetune circuits --rows F`, and
`... atlas --rows F`, print a table each. Not collected by pytest.

Circuits: a CLT of each (`tl_clt.benchmark.train`: 32 features a layer, JumpReLU with the tanh penalty), then so many
steps of `finetune` at the same lambda, with each of some terms, on all prompts at the position of the answer. atlas:
the bundled CLT, then so many steps on packed sentences of its training text from another seed; judged on held-out
questions. "given" is the CLT before, "plain" the same number of steps without any term, to hold everything else
against. Rows are added to `--rows`, a file of JSON lines, as they are done; what is there is not done again.
"""

from __future__ import annotations

import json
import random
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from tests.benchmarks.hops import COLUMNS
from tl_clt import CrossLayerTranscoder, evaluate, finetune, load_organism, measure_faithfulness
from tl_clt.benchmark import measure_hops, measure_task
from tl_clt.benchmark.train import train_on_circuit
from tl_clt.lens import HookedModel, block_hook, run_with_cache, run_with_hooks
from tl_clt.organisms import find_variables, load_circuit, organism_tasks
from tl_clt.organisms.atlas.text import sentences
from tl_clt.organisms.atlas.train_clt import held_out_sentences
from tl_clt.organisms.word_model import TrainOptions, training_batches

app = typer.Typer(add_completion=False)
TEXT_SEED = 2
"""Of the text that atlas's CLT is trained on further; the model had 0, the CLT 1."""
Rows = Annotated[Path, typer.Option(help="JSON lines that rows are added to.")]
Terms = Annotated[list[str], typer.Option(help="Terms with weights, as kl=10,jacobian=1; given; plain. Repeatable.")]
Seeds = Annotated[int, typer.Option(help="Runs of each.")]
Steps = Annotated[int, typer.Option(help="Of fine-tuning.")]


def weights_of(terms: str) -> dict[str, float]:
    """Arguments of `finetune` that a word like kl=10,jacobian=1 stands for."""
    if terms in ("given", "plain"):
        return {}
    return {name: float(value) for name, value in (term.split("=") for term in terms.split(","))}


class Table:
    """Rows by key, in a file."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys = path, keys
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def missing(self, *key: Any) -> bool:
        """Whether there is no row of this key yet."""
        return key not in {tuple(row[name] for name in self.keys) for row in self.rows}

    def add(self, key: tuple[Any, ...], numbers: dict[str, Any]) -> None:
        """Add one."""
        self.rows.append({**dict(zip(self.keys, key, strict=True)), **numbers})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def print(self, by: list[str], columns: dict[str, str]) -> None:
        """Means over seeds."""
        groups = pd.DataFrame(self.rows).groupby(by, sort=False)
        means = groups[list(columns)].mean().rename(columns=columns).round(3)
        print(pd.concat([groups.size().rename("runs"), means], axis=1).reset_index().to_string(index=False))


@app.command()
def circuits(
    rows: Rows,
    terms: Terms,
    circuit: Annotated[list[str], typer.Option(help="Of `known_circuits`.")] = ["hops", "equal", "parity", "automaton"],  # noqa: B006
    sparsity: Annotated[list[float], typer.Option(help="lambda, of training and of fine-tuning.")] = [3.0],  # noqa: B006
    lr: Annotated[float, typer.Option(help="Of fine-tuning.")] = 1e-3,
    n_steps: Steps = 300,
    seeds: Seeds = 3,
) -> None:
    """Hops that CLTs of known circuits show, before and after."""
    torch.set_num_threads(1)
    table = Table(rows, ("circuit", "sparsity", "terms", "lr", "n_steps", "seed"))
    for name in circuit:
        loaded = load_circuit(name)
        for strength in sparsity:
            for seed in range(seeds):
                wanted = [one for one in terms if table.missing(name, strength, one, lr, n_steps, seed)]
                trained = train_on_circuit(loaded, loaded.model.cfg.n_layers, strength, seed) if wanted else None
                for one in wanted:
                    assert trained is not None
                    began = time.process_time()
                    tuned = finetune(
                        loaded.model,
                        trained,
                        loaded.prompts,
                        **weights_of(one),
                        sparsity=strength,
                        n_steps=0 if one == "given" else n_steps,
                        lr=lr,
                        batch_size=len(loaded.prompts),
                        pos=loaded.answer_position,
                        seed=seed,
                        progress=False,
                    )
                    seconds = time.process_time() - began
                    numbers = measure_hops(loaded, tuned, seed=seed).numbers
                    table.add((name, strength, one, lr, n_steps, seed), {**numbers, "seconds": seconds})
    table.print(["circuit", "sparsity", "terms", "lr"], {**COLUMNS, "seconds": "CPU s"})


@torch.no_grad()
def strengths(
    model: HookedModel, clt: CrossLayerTranscoder, prompts: list[str], size: float = 0.1, seed: int = 0
) -> dict[str, float]:
    """How strongly a layer's own features answer a shift of what they read, against the MLP.

    The shift is `size` times as long as what is read there, at every position after 0, along the encoder of a random
    feature that is active there ("encoder") or anywhere ("random"). `strength` is the norm of what the layer's features
    write more or less, over that of the MLP's change: the median over layers and positions. `error` is the median of
    |one - other|^2 / |the MLP's|^2.
    """
    generator, found = torch.Generator().manual_seed(seed), {name: [] for name in ("encoder", "random")}
    for tokens in (model.to_tokens(prompt) for prompt in prompts):
        names = [block_hook(layer, hook) for layer in clt.layers for hook in (clt.cfg.input_hook, clt.cfg.output_hook)]
        _, cache = run_with_cache(model, tokens, lambda name, names=names: name in names)
        for layer in clt.layers:
            x, name = cache[block_hook(layer, clt.cfg.input_hook)], block_hook(layer, clt.cfg.input_hook)
            out = cache[block_hook(layer, clt.cfg.output_hook)]
            acts = clt.encode_layer(x, layer).feature_acts
            chance = torch.rand(acts.shape, generator=generator) * (acts != 0)
            along = {
                "encoder": clt.W_enc[layer].T[chance.argmax(dim=-1)],
                "random": torch.randn(x.shape, generator=generator),
            }
            for kind, v in along.items():
                v = size * v * x.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)
                seen: list[torch.Tensor] = []
                hooks = [
                    (name, lambda x, hook, v=v: x + v),
                    (block_hook(layer, clt.cfg.output_hook), lambda y, hook, seen=seen: seen.append(y)),
                ]
                run_with_hooks(model, tokens, hooks)
                truth = (seen[0] - out)[0, 1:]
                written = (clt.encode_layer(x + v, layer).feature_acts - acts) @ clt.W_dec[layer][:, 0]
                own = written[0, 1:]
                error = (own - truth).square().sum(dim=-1) / truth.square().sum(dim=-1)
                found[kind].append(torch.stack([own.norm(dim=-1) / truth.norm(dim=-1), error]))
    medians = {kind: torch.cat(values, dim=1).median(dim=1).values.tolist() for kind, values in found.items()}
    return {f"{what}_{kind}": medians[kind][i] for kind in medians for i, what in enumerate(("strength", "error"))}


def judge(model: HookedModel, clt: CrossLayerTranscoder, places: pd.DataFrame) -> dict[str, float]:
    """atlas's figures: on all held-out sentences; on 40 of them; and of the hop of its task."""
    report = evaluate(model, clt, held_out_sentences(), n_graphs=0, progress=False)
    some = random.Random(0).sample(held_out_sentences(), 40)
    faithful = measure_faithfulness(model, clt, some, freeze="attention", progress=False).by_distance
    near = faithful[faithful["distance"] == 1].set_index("kind")
    hop = measure_task(model, clt, organism_tasks("atlas")["two_hop"], places=places).hops.iloc[0]
    return {
        "explained_variance": report.explained_variance,
        "l0": sum(report.l0_per_layer),
        "top1": report.top1_agreement,
        "top1_uncertain": report.top1_agreement_uncertain or float("nan"),
        "kl": report.kl_divergence,
        "dead": report.dead_share,
        "told": float(hop["accuracy"]),
        "swap": float(hop["swap"]),
        "pure": float(hop["swap_pure"]),
        **{f"cosine_{kind}": float(near.loc[kind, "cosine"]) for kind in near.index},
        **{f"normalised_error_{kind}": float(near.loc[kind, "normalised_error"]) for kind in near.index},
        **{f"median_error_{kind}": float(near.loc[kind, "median_error"]) for kind in near.index},
        **strengths(model, clt, some),
    }


ATLAS_COLUMNS = {
    **{"explained_variance": "EV", "l0": "L0", "top1": "top-1", "top1_uncertain": "p<.8", "kl": "KL", "dead": "dead"},
    **{"told": "told", "swap": "swap", "pure": "pure"},
    **{"cosine_encoder": "enc cos", "normalised_error_encoder": "enc err", "median_error_encoder": "median"},
    **{"strength_encoder": "enc strength", "error_encoder": "enc own err"},
    **{"strength_random": "rnd strength", "error_random": "rnd own err"},
    **{"cosine_feature": "feat cos", "median_error_feature": "feat median", "seconds": "CPU s"},
}


def packed(model: HookedModel, n: int) -> torch.Tensor:
    """At least so many prompts of atlas's sentences, of its whole context."""
    assert model.tokenizer is not None
    options = TrainOptions()
    batches = training_batches(model.tokenizer, sentences(TEXT_SEED), options)
    return torch.cat(list(islice(batches, -(-n // options.batch_size))))


@app.command()
def atlas(
    rows: Rows,
    terms: Terms,
    clt: Annotated[str, typer.Option(help="A CLT of atlas, or PLTs.")] = "atlas",
    lr: Annotated[float, typer.Option(help="Of fine-tuning.")] = 5e-4,
    n_steps: Steps = 300,
    batch_size: Annotated[int, typer.Option(help="Prompts of 64 tokens a step.")] = 8,
    n_directions: Annotated[int, typer.Option(help="Of Jacobian terms.")] = 1,
    seeds: Seeds = 1,
) -> None:
    """atlas's CLT before and after."""
    torch.set_num_threads(1)
    model, given = load_organism("atlas").model, CrossLayerTranscoder.from_pretrained(clt)
    table = Table(rows, ("clt", "terms", "lr", "n_steps", "n_directions", "seed"))
    text = packed(model, n_steps * batch_size)
    places = find_variables(model, organism_tasks("atlas")["two_hop"])
    for seed in range(seeds):
        for one in terms:
            key = (clt, one, lr, n_steps, n_directions, 0 if one == "given" else seed)
            if not table.missing(*key):
                continue
            began = time.process_time()
            tuned = given
            if one != "given":
                tuned = finetune(
                    model,
                    given,
                    text,
                    **weights_of(one),
                    n_directions=n_directions,
                    n_steps=n_steps,
                    lr=lr,
                    batch_size=batch_size,
                    seed=seed,
                    progress=False,
                )
            seconds = time.process_time() - began
            table.add(key, {**judge(model, tuned.requires_grad_(False), places), "seconds": seconds})
    table.print(["clt", "terms", "lr", "n_steps", "n_directions"], ATLAS_COLUMNS)


if __name__ == "__main__":
    app()
