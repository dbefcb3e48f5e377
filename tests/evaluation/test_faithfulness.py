"""`measure_faithfulness`: a CLT that is the MLPs scores 1 and 0; any other what the same runs by hand give."""

from __future__ import annotations

import math

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch.nn.functional import cosine_similarity
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tests.models import ARCHITECTURES, COMMON, randomise, tiny_clt, tiny_hooked
from tests.replacement.by_hand import clean_run, run_by_hand
from tl_clt import attach, frozen_hooks
from tl_clt.errors import AlreadyAttached, CLTMismatch, ConfigError, DatasetError, ModelUnsupported
from tl_clt.evaluation import measure_faithfulness
from tl_clt.evaluation.faithfulness import COLUMNS, GROUPS
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig

PROMPTS = [torch.tensor([0, 5, 9, 40, 2]), torch.tensor([0, 33, 12, 7])]
SIZE = 0.2


@pytest.fixture(scope="module")
def relu_model():
    """A model whose MLPs have ReLU neurons."""
    settings = {**COMMON, **ARCHITECTURES["gpt2"], "act_fn": "relu", "dtype": torch.float64, "seed": 0}
    model = HookedTransformer(HookedTransformerConfig(**settings))
    randomise(model, 0)
    return model.eval()


@pytest.fixture(scope="module")
def neurons(relu_model):
    """The model's own neurons as a CLT: it reads what the MLP's norm normalises, and is gain, bias and MLP."""
    cfg = CrossLayerTranscoderConfig(
        n_layers=relu_model.cfg.n_layers,
        d_model=relu_model.cfg.d_model,
        d_transcoder=relu_model.cfg.d_mlp,
        span=1,
        activation="relu",
        input_hook="ln2.hook_normalized",
        model_name="tiny",
        dtype="float64",
    )
    clt = CrossLayerTranscoder(cfg).requires_grad_(False)
    for t, block in enumerate(relu_model.blocks):
        clt.W_enc[t] = (block.ln2.w[:, None] * block.mlp.W_in).detach()
        clt.b_enc[t] = (block.mlp.b_in + block.ln2.b @ block.mlp.W_in).detach()
        clt.W_dec[t][:, 0] = block.mlp.W_out.detach()
        clt.b_dec[t] = block.mlp.b_out.detach()
    return clt


@pytest.mark.parametrize(("real_freeze", "frozen_norms"), [("attention", False), ("all", True)])
def test_the_models_own_neurons_are_faithful(relu_model, neurons, real_freeze, frozen_norms):
    report = measure_faithfulness(
        relu_model, neurons, PROMPTS, real_freeze=[real_freeze], frozen_norms=[frozen_norms], progress=False
    )
    assert set(report.table["distance"]) == {1, 2}
    assert set(report.table["kind"]) == {"feature", "encoder", "random"}
    assert (report.table["cosine"] - 1).abs().max() < 1e-12
    assert report.table["normalised_error"].max() < 1e-18
    assert report.table["carried_error"].min() > 1e-3


def test_held_norms_and_free_attention_are_seen(relu_model, neurons):
    """What the paper suspects: with all else exact, what is held in one model and not in the other shows."""
    norms = measure_faithfulness(relu_model, neurons, PROMPTS, real_freeze=["attention"], progress=False).table
    assert norms[norms["frozen_norms"]]["normalised_error"].min() > 1e-6
    free = measure_faithfulness(relu_model, neurons, PROMPTS, frozen_norms=[False], progress=False).table
    assert free["normalised_error"].max() > 1e-6


def changes_by_hand(model, clt, tokens, vector, position, layer, *, frozen=None, real="none"):
    """Change of the stream after each later block: in the model itself, or with the CLT's reconstruction + error."""
    clean = clean_run(model, clt, tokens)
    errors = clean.mlp_outs - clt(clean.inputs)
    _, cache = model.run_with_cache(tokens)
    norms = frozen if frozen is not None else real == "all"
    held = [] if frozen is None and real == "none" else frozen_hooks(cache, scales=norms)
    streams = []
    for by in (torch.zeros_like(vector), vector):
        seen = {}

        def add(x, hook, by=by):
            x = x.clone()
            x[:, position] += by
            return x

        def keep(x, hook, seen=seen):
            seen[int(hook.name.split(".")[1])] = x[0]

        posts = [f"blocks.{t}.hook_resid_post" for t in range(layer, model.cfg.n_layers)]
        hooks = [*held, (posts[0], add), *((name, keep) for name in posts[1:])]
        if frozen is None:
            with torch.no_grad():
                model.run_with_hooks(tokens, fwd_hooks=hooks)
        else:
            run_by_hand(model, clt, tokens, errors=errors, hooks=hooks)
        streams.append(torch.stack([seen[t] for t in sorted(seen)]))
    return streams[1] - streams[0]


@torch.no_grad()
def vector_by_hand(model, clt, tokens, row):
    _, cache = model.run_with_cache(tokens)
    source, feature, layer = (int(row[name]) for name in ("source_layer", "feature", "layer"))
    if row["kind"] == "feature":
        x = torch.stack([cache[f"blocks.{t}.{clt.cfg.input_hook}"] for t in clt.layers], dim=-2)
        act = clt.encode(x)[0, row["position"], source, feature]
        assert act > 0 and source <= layer
        return act * clt.W_dec[source][feature, layer - source]
    assert source == layer + 1
    direction = clt.W_enc[source][:, feature]
    return SIZE * cache[f"blocks.{layer}.hook_resid_post"][0, row["position"]].norm() * direction / direction.norm()


@pytest.mark.parametrize("span", [1, 3])
def test_every_measure_equals_runs_by_hand(one_of_each, span):
    model = one_of_each
    clt = tiny_clt(model, span=span)
    report = measure_faithfulness(
        model,
        clt,
        PROMPTS,
        kinds=["feature", "encoder"],
        size=SIZE,
        real_freeze=["none", "attention"],
        n_perturbations=1,
        progress=False,
    )
    rows = report.table.sort_values("distance")
    assert set(rows["transcoder"]) == {"PLT" if span == 1 else "CLT"}
    places = ["prompt", "kind", "layer", "position", "source_layer", "feature", "real_freeze", "frozen_norms"]
    for _, group in rows.groupby(places):
        row = group.iloc[0]
        tokens = PROMPTS[row["prompt"]][None]
        vector = vector_by_hand(model, clt, tokens, row)
        where = (model, clt, tokens, vector, int(row["position"]), int(row["layer"]))
        d = changes_by_hand(*where, real=row["real_freeze"]).flatten(1)
        replaced = changes_by_hand(*where, frozen=bool(row["frozen_norms"])).flatten(1)
        carried = torch.zeros(tokens.shape[1], len(vector), dtype=torch.float64)
        carried[row["position"]] = vector
        for name, change in (("cosine", replaced), ("carried_cosine", carried.flatten().expand_as(d))):
            error = "normalised_error" if name == "cosine" else "carried_error"
            assert group[name].tolist() == pytest.approx(cosine_similarity(change, d).tolist(), rel=1e-6)
            expected = ((change - d).norm(dim=1) / d.norm(dim=1)).square()
            assert group[error].tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("gpt2")


@pytest.fixture(scope="module")
def clts(model):
    return {"ours": tiny_clt(model), "per layer": tiny_clt(model, span=1, seed=3)}


def measured(model, clts, **options):
    return measure_faithfulness(model, clts, PROMPTS, progress=False, **options)


def test_the_table_has_a_row_for_each_perturbation_layer_and_way_of_holding_norms(model, clts):
    table = measured(model, clts, n_perturbations=3).table
    # After block 0 two blocks come, after block 1 one.
    random = table[table["kind"] == "random"]
    assert len(random) == 2 * len(PROMPTS) * 3 * (2 + 1) * 2
    assert (table["position"] > 0).all() and set(table["layer"]) == {0, 1}
    assert (table["layer"] + table["distance"] < model.cfg.n_layers).all()
    assert table["size"][table["kind"] != "feature"].to_numpy() == pytest.approx(0.1)
    per_layer = table[(table["transcoder"] == "per layer") & (table["kind"] == "feature")]
    assert (per_layer["source_layer"] == per_layer["layer"]).all()
    features = table[table["feature"] >= 0]
    assert not features.duplicated([*COLUMNS[:7], "frozen_norms", "distance"]).any()


def test_random_perturbations_are_the_same_for_all_transcoders(model, clts):
    table = measured(model, clts, kinds=["random"]).table
    ours, other = (table[table["transcoder"] == name].reset_index(drop=True) for name in clts)
    assert ours["carried_cosine"].equals(other["carried_cosine"])
    assert not ours["cosine"].equals(other["cosine"])


def test_a_seed_fixes_what_is_drawn_and_passes_do_not_matter(model, clts):
    first, again = measured(model, clts).table, measured(model, clts, batch_size=3).table
    one, other = (table.sort_values(COLUMNS[:11], kind="stable").reset_index(drop=True) for table in (first, again))
    assert_frame_equal(one, other, rtol=1e-9)
    assert not first["cosine"].equals(measured(model, clts, seed=1).table["cosine"])


def test_means_are_over_perturbations(model, clts):
    report = measured(model, clts)
    row = report.by_distance.iloc[0]
    table = report.table
    group = table[(table[GROUPS] == row[GROUPS]).all(axis=1)]
    assert row["n"] == len(group)
    assert row["cosine"] == pytest.approx(group["cosine"].mean())
    assert row["normalised_error"] == pytest.approx(group["normalised_error"].mean())
    assert row["median_error"] == pytest.approx(group["normalised_error"].median())


def test_the_figure_has_two_panels_for_each_transcoder(model, clts, tmp_path):
    figure = measured(model, clts, kinds=["feature", "random"], real_freeze=["none", "attention"]).plot()
    titles = [axes.get_title() for axes in figure.axes]
    against = ("against the model", "against the model with attention held")
    assert titles == [f"{name} {what}" for name in clts for what in against for _ in range(2)]
    # Two kinds with norms free and held, and each perturbation alone.
    assert [len(axes.lines) for axes in figure.axes] == [6] * 8
    figure.savefig(tmp_path / "faithfulness.png")


def test_hooks_of_the_users_are_set_aside_and_stay(model, clts):
    without = measured(model, clts["ours"]).table
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)]):
        assert measured(model, clts["ours"]).table.equals(without)
        assert len(model.hook_dict["blocks.1.hook_mlp_out"].fwd_hooks) == 1
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_features_that_write_nothing_are_left_out(model):
    clt = tiny_clt(model, span=1)
    for source in clt.layers:
        clt.W_dec[source][:] = 1e-20
    assert len(measured(model, clt, kinds=["feature"]).table) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": []}, "kinds is [], of type list: give some of feature, encoder, random"),
        ({"kinds": ["decoder"]}, "kinds[0] is 'decoder': give one of feature, encoder, random"),
        ({"frozen_norms": []}, "frozen_norms is [], of type list: give False, True or both"),
        ({"size": 0.0}, "size is 0.0"),
        ({"size": math.nan}, "size is nan"),
        ({"n_perturbations": 0}, "n_perturbations is 0: give at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"real_freeze": ["norms"]}, "real_freeze[0] is 'norms': give one of attention, all, none"),
        ({"real_freeze": []}, "real_freeze is []"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_options_are_refused(model, clts, options, message):
    with pytest.raises(ConfigError) as error:
        measured(model, clts, **options)
    assert message in str(error.value)


def test_models_clts_and_prompts_that_do_not_fit_are_refused(model, clts):
    with pytest.raises(DatasetError, match="no prompts"):
        measure_faithfulness(model, clts, [])
    with pytest.raises(ConfigError, match="no CLT"):
        measure_faithfulness(model, {}, PROMPTS)
    with pytest.raises(CLTMismatch):
        measure_faithfulness(model, {**clts, "other": tiny_clt((2, model.cfg.d_model))}, PROMPTS)
    with attach(model, clts["ours"]), pytest.raises(AlreadyAttached):
        measured(model, clts)
    shallow = tiny_hooked("gpt2", n_layers=1)
    with pytest.raises(ModelUnsupported, match="one layer"):
        measured(shallow, tiny_clt(shallow))
