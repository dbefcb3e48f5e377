"""The command line: what it writes, what it shows, and what it says of bad input."""

from __future__ import annotations

import json
import re
from inspect import Parameter, signature

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import tl_clt
from tl_clt import (
    AttributionGraph,
    CrossLayerTranscoder,
    FeatureStore,
    Intervention,
    NodeKind,
    attribute,
    intervene,
    load_features,
    load_organism,
)
from tl_clt.cli import app
from tl_clt.cli.train import ProgressLines
from tl_clt.evaluation.tradeoff import compare
from tl_clt.viewer import FeatureBundles, load_neuronpedia_features
from tl_clt.viewer.html import plain_json

ATLAS_CLT = "atlas"
PROMPT = "the capital of the state containing Dallas is"


def run(*arguments: str, status: int = 0) -> str:
    """Output of a command (both streams), whose exit status must be as given."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def test_demo_shows_the_answer_and_writes_the_graph(tmp_path):
    output = run("demo", "--output", str(tmp_path / "graph.safetensors"))
    assert 'output "Austin"' in output
    for words in ("explained variance", "same top token", "replacement score", "completeness score", "token"):
        assert words in output
    graph = AttributionGraph.load(tmp_path / "graph.safetensors")
    assert graph.logit_tokens[0].strip() == "Austin"


def test_demo_tells_the_story_and_what_labels_are_worth(tmp_path):
    output = run("demo", "--output", str(tmp_path / "graph.safetensors"))
    path = re.search(r"In words:\n +(.+)\n", output)
    assert path and path[1].startswith("Dallas -> ") and path[1].endswith(" -> say Austin")
    # Texas is named as the step between, or it is said that no feature stands for it.
    assert (
        "Texas, which the prompt does not name, is a step between" in output
        or "No feature here is labelled Texas" in output
    )
    model, clt = load_organism("atlas")
    store = load_features("atlas")
    graph = attribute(model, clt, "Fact: the capital of the state containing Dallas is").prune()
    for number in graph.nodes.where(NodeKind.FEATURE).tolist():
        record = store[graph.nodes[number].layer, graph.nodes[number].index]
        assert record.label and record.label_score is not None and record.label_score_random is not None, record


def test_features_makes_a_labelled_store_and_goes_on_with_it(tmp_path):
    text = tmp_path / "text.txt"
    sentences = [
        f"the capital of the state containing {city} is {capital} ."
        for city, capital in (
            ("Dallas", "Austin"),
            ("Oakland", "Sacramento"),
            ("Chicago", "Springfield"),
            ("Boise", "Boise"),
        )
    ]
    text.write_text("\n".join(sentences * 10))
    folder = tmp_path / "store"
    command = ("features", "--clt", ATLAS_CLT, "--dataset", str(text), "--output", str(folder), "--top", "3")
    output = run(*command)
    for words in ("The features that write most", "random dictionary", "label", str(folder)):
        assert words in output
    store = FeatureStore.open(folder, CrossLayerTranscoder.from_pretrained(ATLAS_CLT))
    assert len(store.labels()) > 20
    assert "is not empty" in run(*command, status=1)
    labels = (folder / "labels.safetensors").read_bytes()
    output = run(*command, "--resume", "--labels", "none")
    assert "The features that write most" in output and "whole, and as asked for: nothing is read again" in output
    assert "It has these labels, by rules: nothing is labelled again" in run(*command, "--resume")
    assert "Labels by rules, seed 0, are replaced" in run(*command, "--resume", "--seed", "1")
    assert labels != (folder / "labels.safetensors").read_bytes()
    output = " ".join(run(*command, "--resume", "--context-size", "7", status=1).split())
    assert "was made with other settings (context_size None -> 7). Give the same, or a new folder" in output
    text.write_text("\n".join(sentences[::-1] * 10))
    assert "was made of another text" in run(*command, "--resume", status=1)
    assert "give one of rules, endpoint, none" in run(*command, "--labels", "rule", status=1)
    assert "--endpoint-model" in run(*command, "--labels", "endpoint", status=1)


def test_demo_says_which_words_it_does_not_know(tmp_path):
    prompt = "the capital of France is"
    output = run("demo", "--prompt", prompt, "--output", str(tmp_path / "graph.safetensors"))
    assert "became <unk>" in output and "Warning" not in output


def test_warnings_of_this_package_are_a_line_each_and_others_as_they_are(capsys):
    import warnings

    from tl_clt.cli.app import PACKAGE, plain_warnings

    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with plain_warnings():
            warnings.warn_explicit("a word that [no one] knows", UserWarning, str(PACKAGE / "lens" / "prompts.py"), 7)
            warnings.warn_explicit("of a library", UserWarning, "/else/where.py", 8)
    said = capsys.readouterr().err
    assert "Warning: a word that [no one] knows\n" in said and "prompts.py" not in said
    assert [(w.filename, w.lineno, str(w.message)) for w in others] == [("/else/where.py", 8, "of a library")]


def test_trace_writes_the_whole_graph(tmp_path):
    path = tmp_path / "graph.safetensors"
    run("trace", "--model", "atlas", "--clt", ATLAS_CLT, "--prompt", PROMPT, "--output", str(path), "--bos", "features")
    graph = AttributionGraph.load(path)
    assert graph.info["bos"] == "features"
    assert bool(graph.expanded[: graph.logit_probs.shape[0]].all())


def test_trace_with_a_named_target_on_a_bridge(tmp_path):
    options = ("--target", "Houston", "--backend", "bridge", "--max-feature-nodes", "10")
    path = str(tmp_path / "g.safetensors")
    output = run("trace", "--model", "atlas", "--clt", ATLAS_CLT, "--prompt", PROMPT, "--output", path, *options)
    assert 'output "Houston"' in output
    assert "influence not traced" in output


@pytest.mark.parametrize("options", [("--keep-edges", "0.9"), ("--keep-edges", "0.9", "--max-feature-nodes", "20")])
def test_trace_shows_and_writes_a_sparse_graph(tmp_path, options):
    path = tmp_path / "g.safetensors"
    output = run("trace", "--model", "atlas", "--clt", ATLAS_CLT, "--prompt", PROMPT, "--output", str(path), *options)
    graph = AttributionGraph.load(path)
    assert graph.is_sparse
    assert f"{len(graph.nodes)} and {graph.n_edges}" in output


def test_a_graph_is_written_before_it_is_shown(tmp_path, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the terminal is gone")

    monkeypatch.setattr("tl_clt.cli.prompts._show_graph", broken)
    path = tmp_path / "g.safetensors"
    args = ["trace", "--model", "atlas", "--clt", ATLAS_CLT, "--prompt", PROMPT, "--output", str(path)]
    assert CliRunner().invoke(app, args).exit_code != 0
    assert len(AttributionGraph.load(path).nodes) > 100


def test_train_needs_no_more_than_model_dataset_and_output(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["the capital of Texas is Austin ."] * 900))
    sizes = ("--training-tokens", "8192", "--d-transcoder", "8")  # the defaults take minutes
    run("train", "--model", "atlas", "--dataset", str(text), "--output", str(tmp_path / "clt"), *sizes)
    record = json.loads((tmp_path / "clt" / "training.json").read_text())
    assert record["config"]["context_size"] == 64


def test_train_takes_recipes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["the capital of Texas is Austin ."] * 200))
    sizes = ("--d-transcoder", "16", "--training-tokens", "2048", "--batch-size", "256", "--context-size", "32")
    recipe = ("--activation", "batchtopk", "--k", "4", "--topk-across", "all_layers", "--far-rank", "8", "--skip")
    run("train", "--model", "atlas", "--dataset", str(text), "--output", str(tmp_path / "clt"), *sizes, *recipe)
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "clt")
    assert (clt.cfg.activation, clt.cfg.skip) == ("jumprelu", True)
    record = json.loads((tmp_path / "clt" / "training.json").read_text())
    assert record["config"]["far_rank"] == 8 and record["config"]["topk_across"] == "all_layers"


def test_train_refuses_a_full_folder_before_it_loads_anything(tmp_path):
    (tmp_path / "mine").write_text("kept")
    output = run("train", "--model", "none", "--dataset", "none", "--output", str(tmp_path), status=1)
    assert "OutputNotEmpty" in output
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_train_then_trace(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["the capital of Texas is Austin ."] * 200))
    folder = tmp_path / "clt"
    sizes = ("--d-transcoder", "16", "--training-tokens", "2048", "--batch-size", "256", "--context-size", "32")
    run("train", "--model", "atlas", "--dataset", str(text), "--output", str(folder), *sizes)
    assert CrossLayerTranscoder.from_pretrained(folder).cfg.d_transcoder == 16
    assert json.loads((folder / "training.json").read_text())["tokens_seen"] == 2048
    run("trace", "--model", "atlas", "--clt", str(folder), "--prompt", PROMPT, "--output", str(tmp_path / "g"))


@pytest.fixture
def small_run(tmp_path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["the capital of Texas is Austin .", "Dallas is a city in Texas ."] * 100))
    sizes = ("--d-transcoder", "8", "--training-tokens", "2048", "--batch-size", "256", "--context-size", "32")
    return ["train", "--model", "atlas", "--dataset", str(text), *sizes, "--cache", str(tmp_path / "cache")]


def test_train_resumes_and_reads_its_cache(tmp_path, small_run):
    writing = ("--checkpoints", str(tmp_path / "checkpoints"), "--checkpoint-every", "3", "--keep-checkpoints", "3")
    run(*small_run, "--output", str(tmp_path / "whole"), *writing)
    files = ["progress.csv", *(f"step_0000000{step}" for step in (3, 6, 8))]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == files
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    for given, name in (("checkpoints", "newest"), ("checkpoints/step_00000003", "older")):
        run(*small_run, "--output", str(tmp_path / name), "--resume", str(tmp_path / given), "--checkpoint-every", "3")
        for file in ("clt.safetensors", "cfg.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == cached
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (("--resume", "no/such/folder"), "CheckpointError", "holds no checkpoint"),
        (("--cache-dtype", "int4"), "ConfigError", "give one of float16, int8"),
        (("--max-norm-ratio", "0.5"), "ConfigError", "max_norm_ratio is 0.5"),
        (("--checkpoint-every", "0"), "ConfigError", "checkpoint_every is 0"),
        (("--device", "gpu"), "ConfigError", "device is 'gpu', which is not here: give one of cpu"),
        (("--seed", "-1"), "ConfigError", "seed is -1"),
        (("--adam-beta1", "1.5"), "ConfigError", "adam_beta1 is 1.5"),
        (("--far-rank", "999"), "ConfigError", "far_rank is 999"),
        (("--n-data-parallel", "2"), "ConfigError", "the number of processes 1: start a multiple of 2"),
    ],
)
def test_bad_training_options_are_one_message_and_no_file(tmp_path, small_run, as_users_run_it, options, error, words):
    before = sorted(tmp_path.rglob("*"))
    output = run(*small_run, "--output", str(tmp_path / "clt"), *options, status=1)
    assert error in output and words in output.replace("\n", " ") and "Traceback" not in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lr", "1e30"), "NotFinite: Training stopped at step"),
        (("--dtype", "float16"), "ConfigError: CLTTrainingRunnerConfig: dtype is 'float16'"),
    ],
)
def test_training_that_goes_out_of_bounds_ends_with_one_message_and_saves_no_clt(tmp_path, small_run, options, words):
    written = ("--output", str(tmp_path / "clt"), "--checkpoints", str(tmp_path / "s"))
    output = run(*small_run, *written, *options, status=1)
    assert words in output and "float32" in output and "Traceback" not in output
    assert not (tmp_path / "clt").exists() and not (tmp_path / "s").exists()


BAD = {
    "model": ({"--model": "atlass"}, "ModelNotFound", "Nearest|bundled organism"),
    "clt name": ({"--clt": "atlass"}, "FormatError", "Nearest names: atlas"),
    "clt": ({"--clt": "no/such/clt"}, "FormatError", "neither a folder here nor a hub repository"),
    "prompt": ({"--prompt": " "}, "PromptError", "empty"),
    "max_n_logits": ({"--max-n-logits": "0"}, "TargetError", "max_n_logits is 0"),
    "bos": ({"--bos": "keep"}, "ConfigError", "bos is 'keep'"),
    "backend": ({"--backend": "hugging"}, "ConfigError", "backend is 'hugging': give one of hooked, bridge"),
    "threshold": ({"--node-threshold": "2"}, "ConfigError", "node_threshold"),
    "target": ({"--target": "Dallas Austin"}, "TargetError", "2 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_no_file(case, tmp_path, as_users_run_it):
    changed, error, words = BAD[case]
    options = {"--model": "atlas", "--clt": ATLAS_CLT, "--prompt": PROMPT, "--output": str(tmp_path / "g"), **changed}
    output = run("trace", *[part for pair in options.items() for part in pair], status=1)
    assert error in output
    assert any(word in output.replace("\n", " ") for word in words.split("|"))
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_a_graph_file_is_not_overwritten(tmp_path):
    (tmp_path / "g").write_text("mine")
    output = run(
        "trace", "--model", "atlas", "--clt", ATLAS_CLT, "--prompt", PROMPT, "--output", str(tmp_path / "g"), status=1
    )
    assert "OutputNotEmpty" in output
    assert (tmp_path / "g").read_text() == "mine"


def test_a_clt_of_another_model_is_refused(tmp_path):
    _, clt = load_organism("atlas")
    from dataclasses import replace

    other = CrossLayerTranscoder(replace(clt.cfg, n_layers=3, span=3, input_scale=None, output_scale=None))
    other.save_pretrained(tmp_path / "other")
    output = run(
        "trace", "--model", "atlas", "--clt", str(tmp_path / "other"), "--prompt", PROMPT,
        "--output", str(tmp_path / "g"), status=1,
    )  # fmt: skip
    assert "CLTMismatch" in output
    assert "has 3 layers, but atlas has 4" in output.replace("\n", " ")


def test_numbers_between_colons_are_no_pictures():
    """rich makes a thumb of ":-1:" where it may."""
    output = run("intervene", "--clt", ATLAS_CLT, "--prompt", "Dallas", status=1)
    assert "2:-1:17=0" in " ".join(output.split())


def test_intervene_shows_what_changes_and_says_what_is_inactive():
    model, clt = load_organism("atlas")
    graph = attribute(model, clt, PROMPT)
    first = graph.nodes.where(NodeKind.FEATURE)[-1]
    layer, pos, feature = (int(x[first]) for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
    silent = next(f for f in range(256) if f not in graph.nodes.index[graph.nodes.layer == layer])
    basic = ("intervene", "--model", "atlas", "--clt", ATLAS_CLT, "--prompt", PROMPT)
    output = run(*basic, "--scale", f"{layer}:{pos}:{feature}=-20", "--top", "3", "--freeze", "none")
    assert "Austin" in output and "Probability of the next token" in output
    assert "is not active" not in output
    output = run(*basic, "--value", f"{layer}:all:{feature},{silent}=30", "--through-layer", "3", "--backend", "bridge")
    assert f"feature {layer}.{silent} is not active there in prompt 0" in output
    assert "Scaling it does nothing" not in output  # it was set, which does something
    output = run(*basic, "--scale", f"{layer}:{pos}:{silent}=2", "--top", "3")
    assert f"feature {layer}.{silent} is not active there in prompt 0. Scaling it does nothing." in output
    what = Intervention(layer=layer, pos=pos, feature=feature, scale=-20)
    first_row = intervene(model, clt, PROMPT, [what], freeze="none").top_changes(1).iloc[0]
    output = run(*basic, "--scale", f"{layer}:{pos}:{feature}=-20", "--freeze", "none")
    assert f"{first_row['before']:.4f}" in output and f"{first_row['change']:+.4f}" in output


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "InterventionError: Nothing is changed"),
        (("--add", "1:2=3"), "InterventionError: '1:2=3' is no intervention: write layer:pos:feature=number"),
        (("--add", "1:2:3=x"), "is no intervention"),
        (("--add", "1:2:3=nan"), "add is nan"),
        (("--scale", "9:2:3=0"), "there is no layer 9. The CLT has layers 0 to 3"),
        (("--value", "1:99:3=1"), "there is no position 99"),
        (("--value", "1:2:3=1", "--through-layer", "most"), "through_layer is 'most': give one of all"),
        (("--value", "1:2:3=1", "--freeze", "norms"), "ConfigError: freeze is 'norms'"),
        (("--value", "1:2:3=1", "--top", "0"), "InterventionError: --top is 0: give 1 to"),
        (("--value", "1:2:3=1", "--top", "99999"), "--top is 99999: give 1 to"),
    ],
)
def test_intervene_refuses_what_is_not_there(options, error, as_users_run_it):
    output = run("intervene", "--model", "atlas", "--clt", ATLAS_CLT, "--prompt", PROMPT, *options, status=1)
    assert error in " ".join(output.split()) and "Traceback" not in output


COMMANDS = (
    "demo",
    "trace",
    "intervene",
    "train",
    "finetune",
    "evaluate",
    "tradeoff",
    "benchmark",
    "view",
    "list",
    "export",
    "features",
    "import",
)


def test_these_are_all_commands():
    assert set(get_command(app).commands) == set(COMMANDS)


WRITES = [
    ("demo", "--output", "mine"),
    ("demo", "--output", "it.safetensors"),
    ("trace", "--model", "atlas", "--clt", "atlas", "--prompt", PROMPT, "--output", "mine"),
    ("trace", "--model", "atlas", "--clt", "atlas", "--prompt", PROMPT, "--output", "new", "--figure", "it.png"),
    ("export", "graph.safetensors", "--output", "mine"),
    ("export", "graph.safetensors", "--format", "circuit-tracer", "--output", ".", "--slug", "it"),
    ("export", "atlas", "--output", "folder"),
    ("export", "atlas", "--format", "circuit-tracer", "--output", "folder"),
    ("import", "graph.json", "--output", "mine"),
    ("features", "--clt", "atlas", "--dataset", "text.txt", "--output", "folder"),
    ("evaluate", "--clt", "atlas", "--dataset", "text.txt", "--output", "folder"),
    ("finetune", "--clt", "atlas", "--dataset", "text.txt", "--output", "folder"),
    ("tradeoff", "--model", "atlas", "--clt", "atlas", "--dataset", "text.txt", "--output", "folder"),
    ("benchmark", "--clt", "atlas", "--n-prompts", "1", "--output", "folder"),
    ("train", "--model", "atlas", "--dataset", "text.txt", "--training-tokens", "1000", "--output", "folder"),
]


def test_every_command_that_writes_is_here():
    made = get_command(app).commands
    options = {name: {o for p in one.get_params(typer.Context(one)) for o in p.opts} for name, one in made.items()}
    assert {one[0] for one in WRITES} == {name for name in made if "--output" in options[name]}


@pytest.mark.parametrize("arguments", WRITES, ids=" ".join)
def test_no_command_replaces_what_is_there(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "it.html", "it.png", "it.json", "text.txt", "folder/mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}: kept")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "OutputNotEmpty" in run(*arguments, status=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_option_is_for(command):
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", run(command, "--help")).split())
    made = get_command(app).commands[command]
    parameters = made.get_params(typer.Context(made))
    for parameter in parameters:
        assert parameter.opts[0] in shown
        assert parameter.help is not None and len(parameter.help) > 10, f"{parameter.opts[0]} says nothing"
        assert " ".join(parameter.help.split()) in shown
    texts = [parameter.help for parameter in parameters]
    assert len(set(texts)) == len(texts), "two options say the same"


@pytest.mark.parametrize(
    ("command", "function", "not_offered"),
    [
        ("evaluate", tl_clt.evaluate, {"progress"}),
        ("finetune", tl_clt.finetune, {"progress", "prompts", "on_progress"}),
        ("tradeoff", compare, {"progress", "transcoders", "neuron_l0s"}),
        ("intervene", tl_clt.intervene, {"interventions", "attention_mask", "record", "bos"}),
    ],
)
def test_a_command_offers_what_its_function_takes_with_the_same_defaults(command, function, not_offered):
    offered = {parameter.name: parameter.default for parameter in get_command(app).commands[command].params}
    taken = signature(function).parameters
    assert not_offered <= set(taken)
    for name in set(taken) - not_offered:
        assert name in offered, f"{command} has no --{name}"
        default = taken[name].default
        if default is not Parameter.empty:
            assert offered[name] == default, name


def test_intervene_holds_all_layers_by_that_word():
    basic = ("intervene", "--model", "atlas", "--clt", ATLAS_CLT, "--prompt", PROMPT, "--value", "1:-1:3=30")
    assert run(*basic, "--through-layer", "all") == run(*basic, "--through-layer", "3") != run(*basic)


def test_train_has_an_option_for_every_field_with_its_default_and_docstring():
    from tl_clt.training import CLTTrainingRunnerConfig

    made = get_command(app).commands["train"]
    options = {option.name: option for option in made.get_params(typer.Context(made))}
    cfg = CLTTrainingRunnerConfig(d_transcoder=1024)
    fields_of_run = cfg.to_dict()
    assert set(fields_of_run) == set(options) - {"resume", "help"}
    for name, default in fields_of_run.items():
        option = options[name]
        assert f"--{name.replace('_', '-')}" in option.opts and len(option.help) > 5
        if option.show_default:
            assert option.show_default == (default if isinstance(default, str) else json.dumps(default))
        else:
            assert default is None or name in cfg.chosen
    for name in ("model_name", "dataset_path", "output_path"):
        assert options[name].required and "left out" not in options[name].help and len(options[name].help) > 40
    assert options["lr"].help.startswith("Adam's learning rate. Where left out: ")
    assert options["span"].help.endswith("1 for per-layer transcoders.")


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("--seqpos-slice", "[1, null]", [1, None]),
        ("--exclude-special-tokens", "true", True),
        ("--exclude-special-tokens", "[3, 5]", [3, 5]),
        ("--sequence-separator-token", "eos", "eos"),
        ("--no-prefetch", None, False),
        ("--lr", "0.25", 0.25),
    ],
)
def test_what_a_field_may_be_its_option_says(tmp_path, small_run, option, field, value):
    given = (option,) if field is None else (option, field)
    run(*small_run, "--output", str(tmp_path / "clt"), *given)
    config = json.loads((tmp_path / "clt" / "training.json").read_text())["config"]
    assert config[option.removeprefix("--no-").removeprefix("--").replace("-", "_")] == value


def test_train_shows_its_progress_in_80_columns_and_warns_in_one_line(tmp_path, small_run):
    from rich.text import Text

    options = ("--output", str(tmp_path / "clt"), "--log-every", "3", "--lr", "1", "--activation", "relu")
    result = CliRunner().invoke(app, [*small_run, *options], env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    shown = [line for line in lines if re.match(r" *\d/8 ", line)]
    assert [line.split()[0] for line in shown] == ["3/8", "6/8", "8/8"]
    header = next(line for line in lines if line.lstrip().startswith("step"))
    names = ["step", "mse", "sparsity", "deadloss", "EV", "L0", "least", "most", "dead", "tok/s", "left"]
    assert header.split() == names and len(shown[0].split()) == len(names)
    assert all(Text(line).cell_len <= 80 for line in shown)
    assert "Training took" in result.output and "Training SAE" not in result.output
    warning = " ".join(result.output.split()).partition("Warning: ")[2]
    assert "worse than a constant" in warning and "Lower sparsity_coefficient (now 1)" in warning
    assert "train.py" not in result.output and "LayerWarning" not in result.output
    rows = (tmp_path / "clt" / "progress.csv").read_text().splitlines()
    assert len(rows) == 4


def test_train_says_it_once_and_leaves_logging_and_warnings_as_they_were(tmp_path, small_run, caplog):
    import logging
    import warnings

    logger, before = logging.getLogger("tl_clt.training"), warnings.showwarning
    run(*small_run, "--output", str(tmp_path / "clt"))
    # Nothing went to the handlers that others have set up.
    assert not [record for record in caplog.records if record.name == logger.name]
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
    assert warnings.showwarning is before


def test_a_table_keeps_its_columns_where_a_term_of_the_loss_comes_and_goes(capsys):
    import logging

    from tests.training.test_progress import line

    lines = ProgressLines()
    for losses in ({"mse_loss": 9.0}, {"mse_loss": 8.0, "auxk_loss": 0.5}, {"mse_loss": 7.0}):
        lines.emit(logging.LogRecord("", logging.INFO, "", 0, "%s", (line(losses=losses),), None))
    shown = [text for text in capsys.readouterr().out.splitlines() if text.lstrip()[:1] in "s5"]
    assert [text.split()[:3] for text in shown[:4]] == [
        ["step", "mse", "EV"],
        ["5/10", "9", "0.500"],
        ["step", "mse", "auxk"],
        ["5/10", "8", "0.5"],
    ]
    assert len(shown) == 5 and len(shown[4]) == len(shown[3]) == len(shown[2])


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory) -> str:
    model, clt = load_organism("atlas")
    path = tmp_path_factory.mktemp("graph") / "dallas.safetensors"
    return str(attribute(model, clt, PROMPT, progress=False).save(path))


def test_a_graph_exported_is_imported_as_it_was(graph_file, tmp_path):
    whole = AttributionGraph.load(graph_file)
    exported, folder = tmp_path / "g.json", tmp_path / "graphs"
    assert str(exported) in run("export", graph_file, "--output", str(exported), "--features", "atlas")
    nodes = json.loads(exported.read_text())["nodes"]
    assert all(node["clerp"] for node in nodes if node["feature_type"] == "cross layer transcoder")
    run("import", str(exported), "--output", str(tmp_path / "again.safetensors"))
    assert AttributionGraph.load(tmp_path / "again.safetensors") == whole
    options = ("--format", "circuit-tracer", "--node-threshold", "0.7", "--edge-threshold", "0.9")
    run("export", graph_file, "--output", str(folder), *options)
    assert {path.name for path in folder.iterdir()} == {"dallas.json", "graph-metadata.json"}
    assert "AttributionGraph(" in run("import", str(folder / "dallas.json"), "--output", str(tmp_path / "pruned"))
    assert AttributionGraph.load(tmp_path / "pruned") == whole.prune(0.7, 0.9)


@pytest.mark.parametrize("format", ["neuronpedia", "circuit-tracer"])
def test_features_exported_are_read_as_they_were(format, tmp_path):
    store, folder = load_features("atlas"), tmp_path / "features"
    assert f"{4 * 256} features, with their labels" in run(
        "export", "atlas", "--output", str(folder), "--format", format
    )
    if format == "neuronpedia":
        found = list(load_neuronpedia_features(folder))
    else:
        bundles = FeatureBundles.open(folder)
        found = [bundles[place] for place in bundles]
    assert found == [plain_json(record.to_dict()) for record in store]
    again = ("export", str(store.folder), "--output", str(folder), "--format", format)
    assert "is not empty" in run(*again, status=1)
    other = ("export", str(store.folder), "--output", str(tmp_path / "o"), "--slug", "a", "--format", format)
    assert "is a feature store, and --slug is of graphs" in " ".join(run(*other, status=1).split())
    nothing = run("export", str(tmp_path), "--output", str(tmp_path / "o"), status=1)
    assert "no feature store" in " ".join(nothing.split())
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (("--format", "dot"), "ConfigError", "give one of neuronpedia, circuit-tracer"),
        (("--slug", "a b"), "ConfigError", "letters, digits"),
        (("--node-threshold", "2"), "ConfigError", "node_threshold"),
        (("--upload",), "KeyMissing", "NEURONPEDIA_API_KEY"),
        (("--upload", "--format", "circuit-tracer"), "ConfigError", "--upload are for --format neuronpedia"),
    ],
)
def test_what_cannot_be_exported_is_one_message_and_no_file(options, error, words, graph_file, tmp_path, monkeypatch):
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    output = run("export", graph_file, "--output", str(tmp_path / "g.json"), *options, status=1)
    assert error in output and words in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []


def test_import_and_export_overwrite_nothing(graph_file, tmp_path):
    (tmp_path / "g.json").write_text("mine")
    assert "OutputNotEmpty" in run("export", graph_file, "--output", str(tmp_path / "g.json"), status=1)
    assert "FormatError" in run("import", str(tmp_path / "g.json"), "--output", str(tmp_path / "x"), status=1)
    assert "OutputNotEmpty" in run("import", graph_file, "--output", str(tmp_path / "g.json"), status=1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_trace_draws_the_shown_graph_where_asked(tmp_path):
    atlas = ("trace", "--clt", ATLAS_CLT, "--prompt", PROMPT, "--output", str(tmp_path / "g"))
    assert "png, svg, pdf" in run(*atlas, "--figure", str(tmp_path / "g.gif"), status=1)
    assert list(tmp_path.iterdir()) == []
    assert "picture" in run(*atlas, "--figure", str(tmp_path / "g.svg"))
    assert (tmp_path / "g.svg").read_text().startswith("<?xml")


SHORT = ("--judge", "hops", "--k", "2", "--sparsity", "1", "--n-seeds", "1", "--n-steps", "5", "--n-pairs", "4")


def test_benchmark_judges_known_circuits(tmp_path):
    from tl_clt.benchmark import BenchmarkReport

    output = run("benchmark", "--quick", *SHORT, "--n-graphs", "1", "--output", str(tmp_path / "b"))
    for words in ("Known hops", "hop recall", "neurons", "10%", "chance", "λ 1", "k 2", "PLT", "CLT"):
        assert words in output
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        *("report.json", "runs.csv", "summary.csv", "hops.png")
    }
    report = BenchmarkReport.from_json((tmp_path / "b" / "report.json").read_text())
    # What is said goes before what --quick stands for.
    assert set(report.table["judge"]) == {"hops"} and (report.info["n_steps"], report.info["n_pairs"]) == (5, 4)
    assert sorted(report.table.query("kind == 'neurons'")["sparsity"]) == [0.1, 1.0]


def test_benchmark_keeps_what_it_judged_when_something_later_fails(tmp_path, monkeypatch):
    from tl_clt.benchmark import BenchmarkReport
    from tl_clt.benchmark.judges import JUDGES
    from tl_clt.errors import NotFinite

    hops = JUDGES["hops"]

    def diverging(name):
        judge = hops(name)

        def make(candidate, n_steps):
            if candidate.sparsity == 3:
                raise NotFinite("The loss is infinite.")
            return judge.make(candidate, n_steps)

        return judge._replace(make=make)

    options = ("--judge", "hops", "--n-seeds", "1", "--n-steps", "5", "--n-pairs", "4", "--n-graphs", "1")
    options += ("--kind", "clt", "--output", str(tmp_path / "b"))
    with monkeypatch.context() as patched:
        patched.setitem(JUDGES, "hops", diverging)
        output = " ".join(run("benchmark", *options, "--k", "2", "--k", "3", status=1).split())
    record = tmp_path / "b.runs.jsonl"
    assert "loss is infinite" in output and f"judged already is in {record}" in output and not (tmp_path / "b").exists()
    [line] = record.read_text().splitlines()
    output = run("benchmark", *options, "--k", "2", "--k", "3")
    report = BenchmarkReport.from_json((tmp_path / "b" / "report.json").read_text())
    # Where k alone is given there is no JumpReLU.
    assert report.table[["activation", "sparsity"]].to_numpy().tolist() == [["topk", 2.0], ["topk", 3.0]]
    assert report.runs[0].report.to_dict() == json.loads(line)["report"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_benchmark_draws_the_curves_of_a_clt(tmp_path):
    from tl_clt.evaluation import FaithfulnessCurves
    from tl_clt.organisms import benchmark_prompts

    folder = tmp_path / "curves"
    output = run("benchmark", "--clt", ATLAS_CLT, "--n-prompts", "2", "--output", str(folder))
    for words in ("influence", "magnitude", "random", "area", "distance", "Circuits of 2 prompts, ablated to zero"):
        assert words in output
    # None is computed from so few prompts.
    assert "intervals" not in output
    report = FaithfulnessCurves.from_json((folder / "report.json").read_text())
    first = benchmark_prompts("atlas")[:2]
    assert [target.strip() for target in report.info["targets"]] == [prompt.target for prompt in first]
    assert report.info["prompts"] == [f"<bos> {prompt.prompt}" for prompt in first]
    assert (folder / "curves.png").is_file()
    options = ("--counterfactual", "--errors", "removed", "--freeze", "all", "--max-feature-nodes", "50", "--seed", "3")
    output = run("benchmark", "--clt", ATLAS_CLT, "--n-prompts", "1", *options, "--output", str(tmp_path / "other"))
    assert "ablated to counterfactual; metric difference, errors removed" in " ".join(output.split())
    assert (folder / "numbers.png").is_file()
    beside = tmp_path / "beside"
    kept = ("--neurons-kept", "1", "--neurons-kept", "0.2")
    output = run("benchmark", "--clt", ATLAS_CLT, "--n-prompts", "1", *kept, "--output", str(beside))
    names = FaithfulnessCurves.from_json((beside / "report.json").read_text()).table["transcoder"].unique()
    assert names.tolist() == ["atlas", "neurons", "neurons, 0.2 kept"] and "for .9" in output
    output = run(
        "benchmark", "--clt", ATLAS_CLT, "--n-prompts", "1", "--level", "edges", "--output", str(tmp_path / "e")
    )
    assert "f by share of edges" in " ".join(output.split())


def test_benchmark_reads_prompts_of_files(tmp_path):
    from tl_clt.evaluation import FaithfulnessCurves

    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text(PROMPT + "\n\nthe region of the state containing Tucson is\n")
    other = PROMPT.replace("Dallas", "Oakland")
    lines.write_text(json.dumps({"prompt": PROMPT, "target": "Houston", "counterfactual": other}) + "\n")
    targets = []
    for file, more in ((text, ()), (lines, ("--counterfactual",))):
        folder = tmp_path / file.suffix
        run("benchmark", "--clt", ATLAS_CLT, "--prompts", str(file), *more, "--output", str(folder))
        report = FaithfulnessCurves.from_json((folder / "report.json").read_text())
        targets.append([target.strip() for target in report.info["targets"]])
    assert targets == [["Austin", "West"], ["Houston"]]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (("--judge", "hop"), "ConfigError", "parity, automaton, atlas, school. Nearest: 'hops'"),
        (("--kind", "sae"), "ConfigError", "give one of neurons, untrained, plt, clt"),
        (("--n-seeds", "0"), "ConfigError", "n_seeds is 0"),
        (("--metric", "logit"), "ConfigError", "--metric is of faithfulness curves. Leave it out, or give --clt"),
        (("--counterfactual",), "ConfigError", "--counterfactual is of faithfulness curves"),
        (("--device", "cuda"), "ConfigError", "--device is of faithfulness curves"),
        (("--backend", "bridge"), "ConfigError", "--backend is of faithfulness curves"),
        (("--lazy-decoder",), "ConfigError", "--lazy-decoder is of faithfulness curves"),
        (("--kind", "neurons", "--k", "4"), "ConfigError", "--k is of --kind clt and plt. Leave it out, or judge one"),
        (("--kind", "untrained", "--n-steps", "4"), "ConfigError", "--n-steps is of --kind clt and plt"),
        (("--kind", "clt", "--neurons-kept", "1"), "ConfigError", "--neurons-kept is of --kind neurons"),
        (("--clt", "atlas", "--device", "cuda:99"), "ConfigError", "device is 'cuda:99', which is not here"),
        (("--clt", "atlas", "--prompts", "LIST"), "DatasetError", "would be read as plain text"),
        (
            ("--clt", "atlas", "--quick"),
            "ConfigError",
            "--quick is of known circuits. Leave it out, or leave out --clt",
        ),
        (("--clt", "atlas", "--judge", "hops"), "ConfigError", "--judge is of known circuits"),
        (("--clt", "atlass"), "FormatError", "Nearest names: atlas"),
        (("--clt", "atlas", "--metric", "loss"), "ConfigError", "give one of logit, difference, log_prob"),
        (("--clt", "atlas", "--errors", "no"), "ConfigError", "give one of nodes, kept, removed"),
        (("--clt", "atlas", "--level", "edge"), "ConfigError", "give one of nodes, edges"),
        (("--clt", "atlas", "--level", "edges", "--neurons-kept", "1"), "ConfigError", "Neurons have no graph"),
        (("--clt", "atlas", "--level", "edges", "--freeze", "none"), "ConfigError", "Give freeze='all'"),
        (("--clt", "atlas", "--neurons-kept", "2"), "ConfigError", "kept is 2"),
        (("--level", "edges"), "ConfigError", "--level is of faithfulness curves"),
        (("--clt", "atlas", "--n-prompts", "0"), "ConfigError", "--n-prompts is 0"),
        (("--clt", "atlas", "--prompts", "no/file"), "DatasetError", "'no/file' is no file"),
        (("--clt", "atlas", "--prompts", "EMPTY"), "DatasetError", "has no prompts: write one on each line"),
        (("--clt", "atlas", "--prompts", "BAD"), "DatasetError", "Line 2 of"),
        (("--clt", "atlas", "--prompts", "TEXT", "--counterfactual"), "ConfigError", "has no counterfactual prompts"),
        (("--clt", "atlas", "--prompts", "TEXT", "--metric", "difference"), "ConfigError", "needs counterfactual"),
    ],
)
def test_what_cannot_be_benchmarked_is_one_message_and_no_file(tmp_path, options, error, words, as_users_run_it):
    files = {"EMPTY": "\n", "TEXT": PROMPT, "BAD": f'{{"prompt": "{PROMPT}"}}\n{{"prompt": 3}}\n'}
    files["LIST"] = json.dumps([{"prompt": PROMPT}])
    suffixes = {"BAD": ".jsonl", "LIST": ".json"}
    paths = {name: tmp_path / f"{name}{suffixes.get(name, '')}" for name in files}
    for name, text in files.items():
        paths[name].write_text(text)
    given = [str(paths.get(option, option)) for option in options]
    output = run("benchmark", *given, "--output", str(tmp_path / "out"), status=1)
    assert error in output and words in " ".join(output.split()) and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_benchmark_says_the_defaults_that_its_functions_have():
    from tl_clt.benchmark import known_judges, run_benchmark
    from tl_clt.benchmark.judges import KINDS
    from tl_clt.evaluation import measure_curves

    options = {option.name: option.help for option in get_command(app).commands["benchmark"].params}
    defaults = {name: parameter.default for name, parameter in signature(run_benchmark).parameters.items()}
    for name in ("sparsities", "k", "neurons_kept"):
        *before, last = (f"{value:g}" for value in defaults[name])
        assert f"Default: {', '.join(before)} and {last}." in options[name]
    for name in ("n_seeds", "n_steps", "n_pairs", "n_graphs"):
        assert f"Default: {defaults[name]}." in options[name]
    assert all(name in options["judges"] for name in known_judges()) and all(kind in options["kinds"] for kind in KINDS)
    curves = signature(measure_curves).parameters
    for name in ("errors", "level"):
        assert f"Default: {curves[name].default}." in options[name]
