"""What one sees while a CLT trains: lines, table, figure, warnings, and where time went."""

from __future__ import annotations

import csv
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.small_clts import N_LAYERS, build, raw_batch, scale_of, step_input
from tl_clt.errors import CheckpointError, ConfigError, LayerWarning
from tl_clt.training import CLTSettings, CLTTrainingRunner, TrainingProgress
from tl_clt.training.data.batches import apply_scale
from tl_clt.training.fast.step import FastStep
from tl_clt.training.run import progress
from tl_clt.training.run.progress import LayerWatch, ProgressMeter, ProgressTable, draw_progress, in_words, read_lines


def line(step: int = 5, n_steps: int = 10, **changes: object) -> TrainingProgress:
    values = {
        "step": step,
        "n_steps": n_steps,
        "tokens": 64 * step,
        "losses": {"mse_loss": 12.5, "sparsity_loss": 0.25},
        "seconds": 1.5 * step,
        "explained_variance": 0.5,
        "explained_variance_per_layer": [0.25, 0.5, 0.75],
        "l0_per_layer": [3.0, 9.0, 6.0],
        "dead_share": 0.125,
        "tokens_per_second": 1234.0,
        "seconds_left": 65.0,
    }
    return TrainingProgress(**(values | changes))


# -- lines


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_batch_is_measured_as_an_evaluation_would(activation: str) -> None:
    clt = build(activation)
    given = step_input(clt)
    step = clt.step(given, FastStep())
    measured = progress.measure_batch(clt, step, given.sae_in[:, 1], clt.count_firing(step))
    y, acts = given.sae_in[:, 1], torch.stack([f.dense() for f in step.features], dim=1)
    error = (step.recons.detach() - y).square().sum(dim=(0, 2)) / (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    assert measured.explained_variance_per_layer == pytest.approx((1 - error).tolist(), rel=1e-12)
    assert measured.explained_variance == pytest.approx(float((1 - error).mean()), rel=1e-12)
    assert measured.l0_per_layer == pytest.approx((acts > 0).sum(dim=2).double().mean(dim=0).tolist())


def test_mean_least_and_greatest_layer() -> None:
    assert (line().l0_mean, line().l0_least, line().l0_greatest) == (6.0, 3.0, 9.0)


def test_a_line_reads_as_a_sentence() -> None:
    assert str(line()) == (
        "step 5/10: loss 12.75 (mse 12.5, sparsity 0.25), explained variance 0.500, L0 6 (3 to 9 by layer),"
        " dead 12.5%, 1234 tokens/s, 1m05s left"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0s"), (59.6, "1m00s"), (61.0, "1m01s"), (3599.7, "1h00m"), (3720.0, "1h02m"), (270_000.0, "3d03h")],
)
def test_time_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"log_every": 15}, [15, 30, 40]),
        ({"log_every": None}, list(range(1, 41))),
        ({"log_every": None, "training_tokens": 64 * 120}, list(range(3, 121, 3))),
        ({"log_every": 100}, [40]),
    ],
)
def test_lines_come_every_so_many_steps_and_after_the_last(model, tokens, make_config, changes, steps) -> None:
    told: list[TrainingProgress] = []
    run = CLTTrainingRunner(make_config(**changes), model=model, dataset=tokens, on_progress=told.append)
    run.run()
    assert [one.step for one in told] == steps
    assert list(run.progress) == told
    last = told[-1]
    assert last.tokens == run.cfg.training_tokens and last.seconds_left == 0.0
    assert all(one.tokens_per_second > 0 and one.seconds > 0 and one.n_steps == run.cfg.n_steps for one in told)
    # topk, k = 6: such as are negative do not fire. Over the last steps of three seeds L0 is 5.78 to 5.95.
    assert last.l0_mean == pytest.approx(6.0, rel=0.05) and last.l0_mean <= 6.0
    assert last.explained_variance == pytest.approx(run.record.metrics.explained_variance, abs=0.1)
    assert last.explained_variance > told[0].explained_variance or len(told) == 1


def test_lines_change_nothing_that_is_learned(model, tokens, make_config) -> None:
    clts = [
        CLTTrainingRunner(make_config(log_every=every, activation="jumprelu"), model=model, dataset=tokens).run()
        for every in (1, 1000)
    ]
    for name, value in clts[0].state_dict().items():
        assert torch.equal(clts[1].state_dict()[name], value)


def test_log_every_must_be_more_than_0(make_config) -> None:
    with pytest.raises(ConfigError, match="log_every is 0: give more than 0, or leave it out"):
        make_config(log_every=0)


def test_a_logger_has_the_lines_and_by_default_nothing_is_said(model, tokens, make_config, caplog, capsys) -> None:
    run = CLTTrainingRunner(make_config(), model=model, dataset=tokens)
    run.run()
    # As users of SAELens know it: its bar.
    assert "Training SAE" in capsys.readouterr().err and not caplog.records
    with caplog.at_level(logging.INFO, logger="tl_clt.training"):
        run.run()
    first, *lines, times, last = [record.message for record in caplog.records]
    assert (first, lines, times) == (run.cfg.in_words(), [*map(str, run.progress)], str(run.record.times))
    assert last == f"{run.record.data.in_words()} {run.record.metrics.in_words(6.0)}"
    assert len(run.progress) == 4
    assert "Training SAE" not in capsys.readouterr().err


def test_print_is_a_callback(model, tokens, make_config, capsys) -> None:
    CLTTrainingRunner(make_config(), model=model, dataset=tokens, on_progress=print).run()
    shown = capsys.readouterr()
    assert [text.split(":")[0] for text in shown.out.splitlines()] == [f"step {n}/40" for n in (10, 20, 30, 40)]
    assert "Training SAE" not in shown.err


# -- table and figure


def test_a_row_is_a_line_and_back(tmp_path: Path) -> None:
    lines = [line(1, losses={"mse_loss": 3.0}), line(2), line(3)]
    table = ProgressTable(["mse_loss", "sparsity_loss"], None, lines)
    table.write(tmp_path / "t.csv")
    assert read_lines(tmp_path / "t.csv", up_to=9) == lines
    assert read_lines(tmp_path / "t.csv", up_to=2) == lines[:2]
    assert read_lines(tmp_path / "none.csv", up_to=2) == []


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_output_has_the_table_and_a_figure(model, tokens, make_config, tmp_path: Path, activation: str) -> None:
    cfg = make_config(activation=activation, output_path=str(tmp_path / "clt"), dead_feature_window=8)
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    run.run()
    rows = list(csv.DictReader((tmp_path / "clt" / "progress.csv").open()))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    assert read_lines(tmp_path / "clt" / "progress.csv", up_to=40)[-1].l0_per_layer == run.progress[-1].l0_per_layer
    for row, one in zip(rows, run.progress, strict=True):
        assert float(row["mse_loss"]) == one.losses["mse_loss"]
        assert set(one.losses) <= {name for name in row if name.endswith("_loss")}
        assert float(row["l0_layer_2"]) == one.l0_per_layer[2]
        assert float(row["explained_variance_layer_0"]) == one.explained_variance_per_layer[0]
    assert (tmp_path / "clt" / "progress.png").read_bytes()[:4] == b"\x89PNG"


def test_the_clt_is_kept_where_its_figure_cannot_be_drawn(model, tokens, make_config, tmp_path, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("tl_clt.training.run.runner.draw_progress", broken)
    with pytest.raises(RuntimeError, match="no fonts"):
        CLTTrainingRunner(make_config(output_path=str(tmp_path / "clt")), model=model, dataset=tokens).run()
    names = sorted(path.name for path in (tmp_path / "clt").iterdir())
    assert names == ["cfg.json", "clt.safetensors", "progress.csv", "training.json"]


def test_a_resumed_run_goes_on_with_the_rows_of_the_one_that_was_cut_off(model, tokens, make_config, tmp_path) -> None:
    def stop(told: TrainingProgress) -> None:
        if told.step == 17:
            raise KeyboardInterrupt

    cfg = make_config(log_every=1, checkpoint_path=str(tmp_path / "checkpoints"), checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=stop).run()
    table = tmp_path / "checkpoints" / "progress.csv"
    before = read_lines(table, up_to=99)
    assert [one.step for one in before] == list(range(1, 18))
    run = CLTTrainingRunner(replace(cfg, output_path=str(tmp_path / "clt")), model=model, dataset=tokens)
    run.run(resume=tmp_path / "checkpoints")
    assert [one.step for one in run.progress] == list(range(1, 41))
    assert list(run.progress[:15]) == before[:15]
    # The same steps again, but for how long they took.
    again, once = run.progress[15], before[15]
    assert (again.losses, again.l0_per_layer) == (once.losses, once.l0_per_layer)
    assert again.seconds > run.progress[14].seconds
    for path in (table, tmp_path / "clt" / "progress.csv"):
        assert read_lines(path, up_to=99) == read_lines(table, up_to=99)
        assert [one.step for one in read_lines(path, up_to=99)] == list(range(1, 41))


def test_a_run_cut_off_before_its_first_checkpoint_leaves_its_folder_free(model, tokens, make_config, tmp_path) -> None:
    def stop(told: TrainingProgress) -> None:
        raise KeyboardInterrupt

    cfg = make_config(checkpoint_path=str(tmp_path / "checkpoints"), checkpoint_every=20)
    with pytest.raises(KeyboardInterrupt):
        CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=stop).run()
    CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    assert len(read_lines(tmp_path / "checkpoints" / "progress.csv", up_to=99)) == 4


@pytest.mark.parametrize("text", ["step,tokens\n1,64\n", "what is this\n", "step\nx\n", "\x00\xff"])
def test_a_damaged_table_is_named_with_the_mend(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.csv").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="progress.csv' is no table of a run's progress.*Remove it to go on"):
        read_lines(tmp_path / "progress.csv", up_to=9)


def test_figure_has_a_band_of_layers_and_what_was_asked_for() -> None:
    lines = [line(n, l0_per_layer=[1.0 * n, 2.0, 3.0]) for n in range(1, 9)]
    losses, explained, l0, dead = draw_progress(lines, 6.0, "a run").axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["mse", "sparsity"]
    for axes in (explained, l0):
        assert len(axes.collections) == 1  # the band
    assert l0.get_legend().get_texts()[-1].get_text() == "asked for: 6"
    assert dead.lines[0].get_xdata().tolist() == [64 * n for n in range(1, 9)]
    assert len(draw_progress(lines[:1]).axes) == 4


@pytest.mark.parametrize(("l0_per_layer", "scale"), [([4.0, 4.0, 4.0], "linear"), ([0.0, 4.0, 30.0], "log")])
def test_a_flat_line_stands_on_an_axis_with_numbers(l0_per_layer: list[float], scale: str) -> None:
    """Of a TopK run L0 is k throughout; of layers that differ a hundredfold the least is seen as well."""
    lines = [line(n, l0_per_layer=l0_per_layer) for n in range(1, 9)]
    figure = draw_progress(lines, 4.0)
    figure.canvas.draw()
    l0 = figure.axes[2]
    low, high = l0.get_ylim()
    assert l0.get_yscale() == scale and low < max(min(l0_per_layer), 0.05) and high > max(l0_per_layer)
    assert low == 0 or scale == "log"
    for axes in figure.axes:
        ends = axes.get_ylim()
        numbered = [
            tick for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if text.get_text()
        ]
        assert sum(ends[0] <= tick <= ends[1] for tick in numbered) >= 2


# -- layers that do not learn


def told_by(watch: LayerWatch, one: TrainingProgress) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        messages = watch.look(one)
    assert [str(w.message) for w in caught] == messages
    assert all(w.category is LayerWarning for w in caught)
    return messages


def test_a_layer_that_falls_silent_is_told_once_with_the_mend() -> None:
    watch = LayerWatch(CLTSettings(d_transcoder=8, activation="jumprelu", target_l0=16.0, dead_feature_coefficient=0.5))
    assert told_by(watch, line()) == []
    (message,) = told_by(watch, line(2, l0_per_layer=[3.0, 0.0, 0.02]))
    assert message == (
        "Step 2 of 10: Layers 1 and 2 have almost no active features left (L0 0.02). Raise target_l0 (now 16), or"
        " raise dead_feature_coefficient (now 0.5)."
    )
    assert told_by(watch, line(3, l0_per_layer=[3.0, 0.0, 0.0])) == []
    (message,) = told_by(watch, line(4, l0_per_layer=[0.0, 0.0, 0.0]))
    assert "Layer 0 has almost no" in message


def test_a_layer_worse_than_a_constant_is_told_late_in_the_run_only() -> None:
    watch, bad = (
        LayerWatch(CLTSettings(d_transcoder=8, activation="jumprelu", sparsity_coefficient=2.0)),
        [0.5, -0.25, 0.5],
    )
    assert told_by(watch, line(5, explained_variance_per_layer=bad)) == []
    (message,) = told_by(watch, line(6, explained_variance_per_layer=bad))
    assert "layer 1 is worse than a constant (explained variance -0.25)" in message
    assert "Lower sparsity_coefficient (now 2)" in message and "max_norm_ratio" in message
    assert told_by(watch, line(7, explained_variance_per_layer=bad)) == []


@pytest.mark.parametrize(("across", "words"), [("layer", "Raise k (now 4)."), ("all_layers", "topk_across='layer'")])
def test_the_mend_of_topk_is_k(across: str, words: str) -> None:
    watch = LayerWatch(CLTSettings(d_transcoder=8, activation="topk", k=4, topk_across=across))
    (message,) = told_by(watch, line(l0_per_layer=[0.0, 5.0, 5.0]))
    assert words in message


def test_few_features_that_were_asked_for_are_no_silence() -> None:
    watch = LayerWatch(CLTSettings(d_transcoder=8, activation="jumprelu", target_l0=0.3))
    assert told_by(watch, line(l0_per_layer=[0.2, 0.3, 0.05])) == []
    assert len(told_by(watch, line(l0_per_layer=[0.2, 0.3, 0.01]))) == 1


def test_a_run_warns_while_a_layer_dies(model, tokens, make_config) -> None:
    seen: list[int] = []
    cfg = make_config(activation="jumprelu", sparsity_coefficient=1e4, training_tokens=64 * 100, log_every=1)
    with pytest.warns(LayerWarning, match=r"Lower sparsity_coefficient \(now 10000\)") as caught:
        CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=lambda told: seen.append(told.step)).run()
    first = next(w for w in caught if w.category is LayerWarning)
    assert int(str(first.message).split()[1]) < 100 == seen[-1]


# -- where time goes


def test_times_are_shares_of_the_time_of_training(model, tokens, make_config, tmp_path: Path) -> None:
    for prefetch in (True, False):
        cfg = make_config(prefetch=prefetch, output_path=str(tmp_path / str(prefetch)))
        run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
        run.run()
        times = run.record.times
        assert times.step_share > 0 and times.waiting_share > 0 and times.step_share + times.waiting_share <= 1.0001
        assert times.model_share > 0 and (prefetch or times.model_share < times.waiting_share)
        assert times.seconds <= run.record.seconds + 0.1  # both are rounded
        record = json.loads((tmp_path / str(prefetch) / "training.json").read_text())
        assert record["times"] == times._asdict()


def test_times_are_one_sentence() -> None:
    times = progress.TrainingTimes(seconds=725.0, step_share=0.8, waiting_share=0.15, model_share=0.6)
    assert str(times) == (
        "Training took 12m05s: 80% in steps, 15% waiting for activations and 5% for the rest, with the model's forward"
        " passes (or the cache) busy for 60% of the time."
    )


def test_shares_are_of_the_clock(monkeypatch) -> None:
    clock = iter([10.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    meter = ProgressMeter(every=1, n_steps=1, n_tokens=1, started=0.0, tell=lambda told: None)
    meter.begin(0)
    assert meter.times(in_steps=6.0, waiting=3.0, in_model=2.5) == (10.0, 0.6, 0.3, 0.25)


def test_speed_and_time_left(monkeypatch) -> None:
    clt = build("topk")
    clock = iter([100.0, 104.0, 106.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    told: list[TrainingProgress] = []
    meter = ProgressMeter(every=2, n_steps=8, n_tokens=800, started=90.0, tell=told.append)

    class Trainer:
        sae, n_training_steps, n_training_samples = clt, 3, 400
        dead_neurons = torch.tensor([True, False] * (N_LAYERS * 5))

    def take(trainer: Trainer) -> None:
        given = step_input(clt)
        given.sae_in = apply_scale(raw_batch(), scale_of(clt))
        given.n_training_steps = trainer.n_training_steps
        step = clt.step(given, FastStep())
        meter.see(clt, step, given, clt.count_firing(step))
        meter.done(trainer)

    trainer = Trainer()
    meter.begin(200)  # resumed
    take(trainer)
    trainer.n_training_steps, trainer.n_training_samples = 4, 500
    take(trainer)
    trainer.n_training_steps, trainer.n_training_samples = 5, 500
    take(trainer)
    assert [(one.step, one.tokens, one.seconds) for one in told] == [(4, 400, 14.0), (6, 500, 16.0)]
    assert [one.tokens_per_second for one in told] == [50.0, 50.0]
    assert [one.seconds_left for one in told] == [8.0, 6.0]
    assert told[0].dead_share == 0.5
