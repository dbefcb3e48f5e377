"""`tl-clt features`: what the features of a CLT mean, as a store of contexts and labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

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
from tl_clt.errors import ConfigError

if TYPE_CHECKING:
    from tl_clt.features import FeatureRecord, FeatureStore

LABELS = ("rules", "endpoint", "none")


@app.command()
def features(
    clt: CLTName,
    dataset: Annotated[str, typer.Option(help="Text to read: a text file, dataset folder, or hub dataset.")],
    output: Annotated[Path, typer.Option(help="New folder for the store.")],
    model: ModelOfCLT = None,
    max_tokens: Annotated[
        Optional[int], typer.Option(help="Read whole prompts of it until they have so many tokens. Default: all.")
    ] = None,
    context_size: Annotated[
        Optional[int], typer.Option(help="Tokens of a prompt at most. Default: 128, or the model's own if less.")
    ] = None,
    n_top: Annotated[int, typer.Option(help="Contexts of the greatest activations of each feature.")] = 8,
    n_per_band: Annotated[int, typer.Option(help="Contexts of each quarter of a random sample.")] = 2,
    label_tokens: Annotated[
        int, typer.Option(help="Tokens kept out for choosing labels, and as many for scoring them.")
    ] = 16_384,
    labels: Annotated[str, typer.Option(help="rules, endpoint (a language model), or none.")] = "rules",
    endpoint: Annotated[
        Optional[str],
        typer.Option(help="Base URL of an OpenAI-compatible endpoint, for example http://localhost:8000/v1."),
    ] = None,
    endpoint_model: Annotated[Optional[str], typer.Option(help="Name of the model there.")] = None,
    key_from: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    top: Annotated[int, typer.Option(help="Features to show; an endpoint labels these alone.")] = 20,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on with what a run of the same text and settings left in --output: only what is missing is read,"
            " asked for or labelled. Labels by another labeller or seed are replaced."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random dictionary, and of the contexts that score labels.")] = 0,
    backend: Backend = "hooked",
    device: Device = "cpu",
    lazy_decoder: LazyDecoder = False,
) -> None:
    """Read a text and keep what each feature of a CLT is active at, with labels and what these are worth.

    On several GPUs or cores, which share both: torchrun --nproc-per-node 4 -m tl_clt.cli features ...
    """
    with plain_errors():
        from tl_clt.arguments import as_choice, as_whole
        from tl_clt.features import EndpointLabeller, RuleLabeller, collect_features, label_features
        from tl_clt.features.collect import require_text_for_labels
        from tl_clt.features.processes import sharing
        from tl_clt.features.store import ABOUT
        from tl_clt.files import require_new

        # Of several processes the main one speaks; its errors are raised on all.
        console.quiet = errors.quiet = interruption.quiet = int(os.environ.get("RANK", "0")) > 0
        as_choice("--labels", labels, LABELS)
        as_whole("--top", top, 1)
        labeller: Any = None
        if labels == "endpoint":
            if endpoint is None or endpoint_model is None:
                raise ConfigError("--labels endpoint asks a language model: give --endpoint and --endpoint-model.")
            labeller = EndpointLabeller(endpoint, endpoint_model, key_from=key_from)
        if not resume:
            require_new(output)
        finished = (output / ABOUT).is_file()
        interruption.kept = lambda: _kept(output)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from tl_clt.training import own_device

            device = own_device(device)
        with console.status("Loading the model and the CLT"):
            hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder)
        if labels != "none" and not finished:
            require_text_for_labels(hooked, dataset, max_tokens, context_size, label_tokens)
        with sharing(device):
            store = collect_features(
                hooked,
                transcoder,
                dataset,
                output,
                max_tokens=max_tokens,
                context_size=context_size,
                n_top=n_top,
                n_per_band=n_per_band,
                label_tokens=label_tokens,
                resume=resume,
            )
            if finished:
                console.print(f"The store in {output} is whole, and as asked for: nothing is read again.")
            strongest = _strongest(store, top)
            if labels == "rules":
                from tl_clt.organisms import known_variables

                labeller = RuleLabeller(known_variables(transcoder.cfg.model_name))
            if labeller is not None:
                wanted = strongest if labels == "endpoint" else None
                if _is_labelled(store, labeller.name, wanted, seed):
                    console.print(f"It has these labels, by {labeller.name}: nothing is labelled again.", markup=False)
                else:
                    label_features(hooked, transcoder, store, labeller, features=wanted, seed=seed)
        _show(store, [store[place] for place in strongest])


def _kept(output: Path) -> str:
    """What of a store is there."""
    from tl_clt.features.labels import ANSWERS
    from tl_clt.features.store import ABOUT, LABELS, UNFINISHED

    if any((output / UNFINISHED).glob("part-*")):
        return f"What was read is in {output}: the same command with --resume goes on from there."
    if not (output / ABOUT).is_file():
        begun = (output / UNFINISHED).is_dir()
        return "Nothing was read yet" + (
            ": the same command with --resume goes on." if begun else ", and nothing is left."
        )
    labels = "with the labels that it had" if (output / LABELS).is_file() else "without labels"
    asked = " and does not ask again for what was answered" if (output / ANSWERS).is_dir() else ""
    return f"The store is in {output}, {labels}: the same command with --resume labels it{asked}."


def _is_labelled(store: FeatureStore, name: str, features: list[tuple[int, int]] | None, seed: int) -> bool:
    """Whether a store has the labels that are asked for; says so where others are replaced."""
    about = store.label_summary()
    if not about:
        return False
    asked = None if features is None else sorted(list(place) for place in features)
    if (about.get("labeller"), about.get("seed"), about.get("features")) == (name, seed, asked):
        return True
    console.print(f"Labels by {about.get('labeller')}, seed {about.get('seed')}, are replaced.", markup=False)
    return False


def _strongest(store: FeatureStore, n: int) -> list[tuple[int, int]]:
    """The features that write most at their greatest activation."""
    stats = store.statistics()
    written = (stats["max_activation"] * stats["decoder_norm"]).flatten()
    order = written.argsort(descending=True, stable=True)[:n].tolist()
    return [divmod(number, store.d_transcoder) for number in order if written[number] > 0]


def _show(store: FeatureStore, records: list[FeatureRecord]) -> None:
    """Print the table of features, and what labels are worth beside a random dictionary's."""
    from tl_clt.viewer.tables import feature_table, label_table

    console.print(feature_table(records))
    if store.is_labelled:
        console.print(label_table(store.label_summary()))
    console.print(
        f"The store is in {store.folder}: tl_clt.FeatureStore.open('{store.folder}') reads it.", soft_wrap=True
    )
