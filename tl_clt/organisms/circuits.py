"""Models whose circuits are known by construction: judges of what a CLT's graphs show.

`hops` is written by hand: (a xor b) and (c xor d), after Lange et al. 2026, "Cross-Layer Transcoders are incentivized
to learn Unfaithful Circuits". The others are RASP programs, compiled by Tracr. All read a prompt [bos, inputs] of whole
numbers, fetch the inputs to the last position by attention in layer 0, and compute step after step there by MLPs; the
answer is the likeliest token after the last position. No norms, so that every number can be followed by hand.

What is known of a circuit is tested without any CLT by `ground_truth`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from safetensors.torch import load_file
from torch import Tensor

from tl_clt.arguments import as_seed, as_whole, shown
from tl_clt.errors import ConfigError, ModelNotFound, nearest
from tl_clt.lens import FwdHook, HookedTransformer, block_hook, model_from_weights, run_with_cache, run_with_hooks
from tl_clt.organisms.programs import PROGRAMS, Program, Values
from tl_clt.shapes import TokenBatch

RASP = Path(__file__).parent / "rasp"


class CircuitVariable(NamedTuple):
    """An intermediate value of a program: where the model computes it, and where it writes it."""

    name: str
    layer: int
    """Its MLP computes it."""

    pos: int
    """Position, counted from the first, at which it does so."""

    values: Values
    """On each prompt."""

    arguments: Values
    """On each prompt, the number of the combination of arguments that it is computed from."""

    subspace: Float[Tensor, "rank d_model"]
    """Orthonormal directions of the residual stream that carry it and nothing else."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class KnownCircuit:
    """A model, all its prompts, and the variables that it computes on the way to its answers."""

    name: str
    program: Program
    model: HookedTransformer = field(repr=False)
    prompts: TokenBatch
    """Token ids; every input there is."""

    answers: Int[Tensor, " n_prompts"]
    """Token ids of the right answers."""

    variables: tuple[CircuitVariable, ...]
    """In the order of the program; the last one is the answer itself."""

    answer_position: int
    """Position after which the answer comes, counted from the first."""

    def __repr__(self) -> str:
        names = ", ".join(f"{v.name} (layer {v.layer})" for v in self.variables)
        return f"KnownCircuit({self.name!r}, {len(self.prompts)} prompts, {names})"

    def variable(self, name: str) -> CircuitVariable:
        """The variable of that name.

        Raises:
            ConfigError: there is none.
        """
        names = [v.name for v in self.variables]
        if name not in names:
            raise ConfigError(f"name is {shown(name)}: {self.name} has the variables {', '.join(names)}.")
        return self.variables[names.index(name)]

    def answers_with(self, name: str, rows: Int[Tensor, " n"], values: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Answers of the program on some prompts, were a variable to have other values there.

        Args:
            name: of the variable.
            rows: which prompts.
            values: of the variable at each of them.
        """
        inputs = self.prompts[rows, 1:]
        return self.program.run(inputs, {self.variable(name).name: values})[self.program.steps[-1].name]


def known_circuits() -> list[str]:
    """Names of the circuits that `load_circuit` knows."""
    return list(PROGRAMS)


def load_circuit(name: str) -> KnownCircuit:
    """A model whose circuit is known, with all its prompts and variables.

    Raises:
        ModelNotFound: there is no circuit of that name.
    """
    known = known_circuits()
    if not isinstance(name, str) or name not in known:
        near = nearest(name, known) if isinstance(name, str) else ""
        raise ModelNotFound(f"name is {shown(name)}: give one of the known circuits ({', '.join(known)}).{near}")
    program = PROGRAMS[name]
    model, coordinates = _by_hand(program) if name == "hops" else _compiled(name)
    inputs = program.all_inputs()
    prompts = torch.cat([torch.full((len(inputs), 1), program.n_values), inputs], dim=1)
    values, at = program.run(inputs), len(program.inputs)
    identity = torch.eye(model.cfg.d_model)
    variables = [
        CircuitVariable(
            name=step.name,
            layer=program.layer(step.name),
            pos=at,
            values=values[step.name],
            arguments=_number(torch.stack([values[argument] for argument in step.arguments], dim=1)),
            subspace=identity[coordinates[step.name]],
        )
        for step in program.steps
    ]
    answers = values[program.steps[-1].name]
    return KnownCircuit(
        name=name,
        program=program,
        model=model,
        prompts=prompts,
        answers=answers,
        variables=tuple(variables),
        answer_position=at,
    )


def _number(rows: Int[Tensor, "n_prompts n"]) -> Values:
    """The number of each row among the different ones."""
    return torch.unique(rows, dim=0, return_inverse=True)[1]


# -- written by hand

HOPS_STREAM = ("bit", "pos 0", "pos 1", "pos 2", "pos 3", "pos 4", "a", "b", "c", "a_xor_b", "c_xor_d", "both")
"""What each coordinate of the residual stream of `hops` stands for. A bit is +1 or -1, and so are all results; d is the
last position's own "bit"."""

SHARP = 1000.0
"""Attention score of the position that a head looks for, beside 0 for all others: the pattern is exactly 0 and 1."""


def _by_hand(program: Program) -> tuple[HookedTransformer, dict[str, list[int]]]:
    """`hops`: tokens 0, 1 and bos; positions 0 (bos), 1 to 4 (a, b, c, d).

    Embedding: 0 is -1 and 1 is +1 along "bit"; each position is one-hot.
    Attention of layer 0: head i, at position 4, looks at position i + 1 and copies its bit to coordinate a, b or c.
    Layer 0, two neurons an xor and one for its constant, all silent but at position 4 (`last` is 1 there, else 0):
        x xor y = 2 relu(x - y - 2 + last) + 2 relu(y - x - 2 + last) - relu(last)         in {+1, -1}
    (x - y is 2, 0 or -2, so that the first is 1 where x = 1 and y = -1, else 0.)
    Layer 1, at position 4:
        both = 2 relu(a_xor_b + c_xor_d - 2 + last) - relu(last)                             in {+1, -1}
    Attention of layer 1 writes nothing. Logit of 1: 5 both; logit of 0: -5 both.
    """
    at = {name: i for i, name in enumerate(HOPS_STREAM)}
    n_pos, n_heads, d_model, d_head, d_mlp = 5, 3, len(HOPS_STREAM), 5, 6
    weights = {
        "embed.W_E": torch.zeros(3, d_model),
        "pos_embed.W_pos": torch.zeros(n_pos, d_model),
        "unembed.W_U": torch.zeros(d_model, 3),
        "blocks.0.attn.W_Q": torch.zeros(n_heads, d_model, d_head),
        "blocks.0.attn.W_K": torch.zeros(n_heads, d_model, d_head),
        "blocks.0.attn.W_V": torch.zeros(n_heads, d_model, d_head),
        "blocks.0.attn.W_O": torch.zeros(n_heads, d_head, d_model),
        **{f"blocks.{layer}.mlp.W_in": torch.zeros(d_model, d_mlp) for layer in (0, 1)},
        **{f"blocks.{layer}.mlp.b_in": torch.zeros(d_mlp) for layer in (0, 1)},
        **{f"blocks.{layer}.mlp.W_out": torch.zeros(d_mlp, d_model) for layer in (0, 1)},
    }
    weights["embed.W_E"][:2, at["bit"]] = torch.tensor([-1.0, 1.0])
    for pos in range(n_pos):
        weights["pos_embed.W_pos"][pos, at[f"pos {pos}"]] = 1.0
    for head, name in enumerate("abc"):
        weights["blocks.0.attn.W_Q"][head, at["pos 4"], head + 1] = SHARP
        for pos in range(n_pos):
            weights["blocks.0.attn.W_K"][head, at[f"pos {pos}"], pos] = 1.0
        weights["blocks.0.attn.W_V"][head, at["bit"], 0] = 1.0
        weights["blocks.0.attn.W_O"][head, 0, at[name]] = 1.0

    def neuron(layer: int, number: int, reads: dict[str, float], bias: float, writes: str, size: float) -> None:
        for name, weight in reads.items():
            weights[f"blocks.{layer}.mlp.W_in"][at[name], number] = weight
        weights[f"blocks.{layer}.mlp.b_in"][number] = bias
        weights[f"blocks.{layer}.mlp.W_out"][number, at[writes]] = size

    for i, (x, y, result) in enumerate([("a", "b", "a_xor_b"), ("c", "bit", "c_xor_d")]):
        neuron(0, 3 * i, {x: 1.0, y: -1.0, "pos 4": 1.0}, -2.0, result, 2.0)
        neuron(0, 3 * i + 1, {x: -1.0, y: 1.0, "pos 4": 1.0}, -2.0, result, 2.0)
        neuron(0, 3 * i + 2, {"pos 4": 1.0}, 0.0, result, -1.0)
    neuron(1, 0, {"a_xor_b": 1.0, "c_xor_d": 1.0, "pos 4": 1.0}, -2.0, "both", 2.0)
    neuron(1, 1, {"pos 4": 1.0}, 0.0, "both", -1.0)
    weights["unembed.W_U"][at["both"], :2] = torch.tensor([-5.0, 5.0])
    settings = {"d_model": d_model, "d_head": d_head, "d_mlp": d_mlp, "n_heads": n_heads, "n_layers": 2, "n_ctx": n_pos}
    return _model("hops", settings, weights, d_vocab=3), {step.name: [at[step.name]] for step in program.steps}


# -- compiled

ANSWER_LOGIT = 10.0
"""Logit of the answer, beside 0 for the other tokens: Tracr's models end with the largest, which has no size."""


def _compiled(name: str) -> tuple[HookedTransformer, dict[str, list[int]]]:
    """Tracr's weights as a HookedTransformer, with the tokens 0 to n_values - 1 and bos; its padding is left out.

    Tracr has no biases, but embeds a 1 in every token: what reads that becomes a bias, so that graphs tell biases from
    tokens. Both divide attention scores by the root of the width of a head.
    """
    about = json.loads((RASP / f"{name}.json").read_text())
    given = load_file(RASP / f"{name}.safetensors")
    program, stream = PROGRAMS[name], about["residual_stream"]
    n_heads, n_layers, one = about["n_heads"], about["n_layers"], stream.index("one")
    ids = [*about["token_ids"], about["bos_id"]]
    coordinates = {
        step.name: [i for i, label in enumerate(stream) if label.rpartition(":")[0] == step.name]
        for step in program.steps
    }
    weights = {
        "embed.W_E": given["token_embed/embeddings"][ids],
        "pos_embed.W_pos": given["pos_embed/embeddings"],
        "unembed.W_U": torch.zeros(len(stream), len(ids)),
    }
    for coordinate in coordinates[program.steps[-1].name]:
        value = int(stream[coordinate].rpartition(":")[2])
        weights["unembed.W_U"][coordinate, value] = ANSWER_LOGIT
    weights["embed.W_E"][:, one] = 0.0

    def reading(theirs: str) -> tuple[Tensor, Tensor]:
        """Weights [d_model, n] and biases [n] of what reads the residual stream."""
        W = given[f"{theirs}/w"].clone()
        bias = given[f"{theirs}/b"] + W[one]
        W[one] = 0.0
        return W, bias

    for layer in range(n_layers):
        theirs, ours = f"transformer/layer_{layer}", f"blocks.{layer}"
        for their_name, our_name in (("query", "Q"), ("key", "K"), ("value", "V")):
            W, bias = reading(f"{theirs}/attn/{their_name}")
            weights[f"{ours}.attn.W_{our_name}"] = W.unflatten(1, (n_heads, -1)).transpose(0, 1)
            weights[f"{ours}.attn.b_{our_name}"] = bias.unflatten(0, (n_heads, -1))
        weights[f"{ours}.attn.W_O"] = given[f"{theirs}/attn/linear/w"].unflatten(0, (n_heads, -1))
        weights[f"{ours}.attn.b_O"] = given[f"{theirs}/attn/linear/b"]
        weights[f"{ours}.mlp.W_in"], weights[f"{ours}.mlp.b_in"] = reading(f"{theirs}/mlp/linear_1")
        weights[f"{ours}.mlp.W_out"] = given[f"{theirs}/mlp/linear_2/w"]
        weights[f"{ours}.mlp.b_out"] = given[f"{theirs}/mlp/linear_2/b"]
    d_head, d_mlp = weights["blocks.0.attn.W_Q"].shape[2], weights["blocks.0.mlp.W_in"].shape[1]
    settings = {"d_model": len(stream), "d_head": d_head, "d_mlp": d_mlp, "n_heads": n_heads, "n_layers": n_layers}
    return _model(
        name, {**settings, "n_ctx": len(given["pos_embed/embeddings"])}, weights, d_vocab=len(ids)
    ), coordinates


def _model(name: str, settings: dict[str, int], weights: dict[str, Tensor], d_vocab: int) -> HookedTransformer:
    fixed: dict[str, Any] = {"act_fn": "relu", "normalization_type": None, "d_vocab": d_vocab, "seed": 0}
    return model_from_weights(name, {**settings, **fixed}, weights)


# -- what is known, tested


@torch.no_grad()
def ground_truth(circuit: KnownCircuit, *, n_pairs: int = 256, seed: int = 0) -> DataFrame:
    """Whether the model uses each variable as the program does, by interchange interventions, without any CLT.

    For pairs of prompts, the part of an MLP's output that lies in the variable's subspace is taken from the other
    prompt (Geiger et al. 2021, "Causal Abstractions of Neural Networks"). The answer must become what the program gives
    with that variable's value of the other prompt.

    Args:
        circuit: the model and what is known of it.
        n_pairs: pairs of prompts for each variable, in which the variable's values differ; fewer where there are fewer.
        seed: of the pairs and of the random directions.

    Returns:
        One row a variable: variable, layer, pos, pairs, changing (pairs whose answer is to change); follows (share of
        these whose answer becomes the program's); stays (share of the others whose answer stays, NaN where there are
        none). Controls, as shares of the changing pairs whose answer becomes the program's: other_position (the same
        patch one position before), other_layer (mean over the layers that do not compute it, 0 where there is no
        other), random_direction (a change of the same size at the right place).
    """
    n_pairs = as_whole("n_pairs", n_pairs, 1)
    generator = torch.Generator().manual_seed(as_seed("seed", seed))
    layers = range(circuit.model.cfg.n_layers)
    names = [block_hook(layer, "hook_mlp_out") for layer in layers]
    logits, cache = run_with_cache(circuit.model, circuit.prompts, lambda name: name in names)
    clean = logits[:, circuit.answer_position].argmax(dim=-1)
    rows = []
    for variable in circuit.variables:
        to, source = pairs_that_differ(variable.values, n_pairs, generator)
        wanted = circuit.answers_with(variable.name, to, variable.values[source])
        changing = wanted != clean[to]

        def swap(
            layer: int, pos: int, subspace: Tensor = variable.subspace, to: Tensor = to, source: Tensor = source
        ) -> Tensor:
            written = cache[names[layer]][:, pos]
            return (written[source] - written[to]) @ subspace.T @ subspace

        def right(layer: int, pos: int, change: Tensor, to: Tensor = to, wanted: Tensor = wanted) -> Tensor:
            answers = run_with_hooks(circuit.model, circuit.prompts[to], [_add(names[layer], pos, change)])
            return answers[:, circuit.answer_position].argmax(dim=-1) == wanted

        layer, pos = variable.layer, variable.pos
        own = swap(layer, pos)
        drawn = torch.randn(own.shape, generator=generator)
        at_random = drawn * own.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
        followed = right(layer, pos, own)
        elsewhere = [share(right(other, pos, swap(other, pos)), changing) for other in layers if other != layer]
        rows.append(
            {
                "variable": variable.name,
                "layer": layer,
                "pos": pos,
                "pairs": len(to),
                "changing": int(changing.sum()),
                "follows": share(followed, changing),
                "stays": share(followed, ~changing),
                "other_position": share(right(layer, pos - 1, swap(layer, pos - 1)), changing),
                "other_layer": sum(elsewhere) / max(1, len(elsewhere)),
                "random_direction": share(right(layer, pos, at_random), changing),
            }
        )
    return DataFrame(rows)


def share(holds: Bool[Tensor, " n"], among: Bool[Tensor, " n"]) -> float:
    """Share of some cases in which something holds; NaN of none."""
    return float(holds[among].double().mean())


def pairs_that_differ(
    values: Values, n_pairs: int, generator: torch.Generator
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Rows, and for each another row whose value differs; at random, each pair at most once."""
    both = (values[:, None] != values).nonzero()
    chosen = both[torch.randperm(len(both), generator=generator)[:n_pairs]]
    return chosen[:, 0], chosen[:, 1]


def _add(name: str, pos: int, change: Float[Tensor, "batch d_model"]) -> FwdHook:
    """A hook that adds to what stands at one position."""

    def add(x: Float[Tensor, "batch pos d_model"], hook: object) -> Float[Tensor, "batch pos d_model"]:
        x = x.clone()
        x[:, pos] += change
        return x

    return name, add
