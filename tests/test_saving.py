"""What is saved is there whole or not at all, and where it cannot be, one of our errors says why and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from matplotlib.figure import Figure

from tests.conftest import small_disk
from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import (
    AttributionGraph,
    CrossLayerTranscoder,
    Intervention,
    attribute,
    evaluate,
    intervene,
    measure_faithfulness,
    validate,
)
from tl_clt.errors import FormatError, NotWritten, OutputNotEmpty, TlCltError
from tl_clt.evaluation.tradeoff import Tradeoff, compare
from tl_clt.files import MEND, files_into, new_file, new_folder, require_file, require_new
from tl_clt.viewer import save_circuit_tracer, save_figure, save_html, save_neuronpedia

REPORTS = ("evaluation", "validation", "faithfulness", "tradeoff", "effect")
WHAT = ("graph", "clt", "circuit-tracer", *REPORTS, "added")
NEW_FOLDERS = WHAT[1:-1]
WRITERS = ("graph", "clt", "added")
"""One that writes a file, one that writes a new folder, and one that adds files to a folder."""


class Saving(NamedTuple):
    save: Callable[[Path], Any]
    is_whole: Callable[[Path], bool]


@pytest.fixture(scope="module")
def savings() -> dict[str, Saving]:
    model = tiny_hooked("gpt2")
    clt, tokens = tiny_clt(model, d_transcoder=64), random_tokens(model, batch=4, pos=8)
    graph = attribute(model, clt, tokens[0], progress=False)
    report = evaluate(model, clt, tokens, n_graphs=0, progress=False)
    validation = validate(graph, model, clt, n_features=2, progress=False)
    tradeoff = compare(model, tokens, {"a": clt}, n_graphs=0, progress=False)
    faithfulness = measure_faithfulness(model, clt, tokens[:1], n_perturbations=1, progress=False)
    effect = intervene(model, clt, tokens, Intervention(layer=0, pos=-1, feature=3, value=9))

    def add(folder: Path) -> None:
        """As `tl-clt tradeoff` does, which has what it trained in the same folder."""
        with files_into(folder) as unfinished:
            tradeoff.write_into(unfinished)

    def has(*files: str) -> Callable[[Path], bool]:
        return lambda folder: set(files) <= {path.name for path in folder.iterdir()}

    def loads(folder: Path) -> bool:
        return CrossLayerTranscoder.from_pretrained(folder).cfg.d_transcoder == 64

    return {
        "graph": Saving(graph.save, lambda path: len(AttributionGraph.load(path).nodes) == len(graph.nodes)),
        "clt": Saving(clt.save_pretrained, loads),
        "circuit-tracer": Saving(lambda folder: clt.save_pretrained(folder, "circuit-tracer"), loads),
        "evaluation": Saving(report.save, has("report.json", "layers.png")),
        "validation": Saving(validation.save, has("report.json", "measurements.csv")),
        "faithfulness": Saving(faithfulness.save, has("measurements.csv", "by_distance.csv", "distance.png")),
        "tradeoff": Saving(tradeoff.save, has("tradeoff.csv", "reports.json", "tradeoff.png")),
        "effect": Saving(effect.save, has("changes.csv", "changes.png")),
        "added": Saving(add, has("tradeoff.csv", "reports.json", "tradeoff.png")),
    }


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def denied(*args: object, **kwargs: object) -> None:
    raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def stopped(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", WHAT)
def test_missing_parents_are_made_and_nothing_else_is_left(savings, tmp_path, what):
    path = tmp_path / "a" / "b" / "it"
    savings[what].save(path)
    assert savings[what].is_whole(path)
    assert [p.name for p in path.parent.iterdir()] == ["it"]
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize("what", ["clt", "added"])
def test_an_empty_folder_is_filled_even_where_the_user_stands_in_it(savings, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    savings[what].save(Path("."))
    assert savings[what].is_whole(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize("what", ["clt", "added"])
def test_a_link_to_an_empty_folder_stays_a_link(savings, tmp_path, what):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    savings[what].save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and savings[what].is_whole(tmp_path / "real")


@pytest.mark.parametrize("what", WHAT)
def test_the_wrong_kind_of_path_is_refused_by_name(savings, tmp_path, what):
    path = tmp_path / "it"
    if what == "graph":
        path.mkdir()
    else:
        path.write_text("mine")
    before = contents(tmp_path)
    said = "is a folder, and a file is|is a file, and a folder is|is no folder"
    with pytest.raises((NotWritten, OutputNotEmpty), match=said) as e:
        savings[what].save(path)
    assert str(path) in str(e.value) and "Give a" in str(e.value)
    assert contents(tmp_path) == before


def test_a_pipe_or_device_is_not_replaced_by_a_file(savings, tmp_path):
    """A superuser may replace even /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(NotWritten, match="is a device or a pipe"):
            savings["graph"].save(path)
        assert path.is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_to_a_file_stays_a_link(savings, tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    savings["graph"].save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and savings["graph"].is_whole(tmp_path / "real")


@pytest.mark.parametrize("what", WRITERS)
def test_a_place_where_nobody_may_write_is_found_by_trying(savings, tmp_path, what):
    """Not even a superuser writes to /proc, though permissions would let them."""
    for check in (require_file, require_new):
        with pytest.raises(NotWritten, match="takes nothing"):
            check(Path("/proc") / "graph")
    with pytest.raises(NotWritten, match="takes nothing"):
        savings[what].save(Path("/proc") / "a" / "b")
    with pytest.raises(TlCltError, match="null byte|is no path|give a path"):
        savings[what].save(tmp_path / "a\0b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", [new_file, new_folder, files_into])
def test_a_null_byte_is_no_name(tmp_path, writer):
    with pytest.raises(NotWritten, match="null byte"), writer(tmp_path / "a\0b"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["clt", "added"])
def test_stopped_between_two_files_of_a_folder_leaves_neither(savings, tmp_path, monkeypatch, what):
    real, calls = Path.replace, []

    def second(self: Path, target: Path) -> Path:
        calls.append(target)
        return real(self, target) if len(calls) < 2 else stopped()

    monkeypatch.setattr(Path, "replace", second)
    with pytest.raises(KeyboardInterrupt):
        savings[what].save(tmp_path)
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", NEW_FOLDERS)
def test_a_folder_that_holds_something_is_refused(savings, tmp_path, what):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputNotEmpty, match="is not empty. Give a new folder"):
        savings[what].save(tmp_path)
    assert list(contents(tmp_path)) == [tmp_path / "mine"]


@pytest.mark.parametrize(
    "save",
    [AttributionGraph.save, AttributionGraph.save_html, save_html, save_figure, save_neuronpedia, save_circuit_tracer],
)
def test_single_files_say_that_they_replace(save):
    """Who saves again from a notebook wants the new one; folders of many files, and commands, refuse instead."""
    assert re.search("(that is there|of the same name) is replaced", " ".join(save.__doc__.split()))


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("below", ["file", "file/sub", "x" * 300])
def test_a_place_where_nothing_can_be_is_refused_by_name(savings, tmp_path, what, below):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / below / "it" if "file" in below else tmp_path / below
    with pytest.raises(NotWritten, match="is no folder. Give another path|File name too long.* Make room, or") as e:
        savings[what].save(path)
    assert str(path) in str(e.value)
    assert contents(tmp_path) == {tmp_path / "file": b"mine"}


@pytest.mark.parametrize("what", WHAT)
def test_a_full_disk_leaves_nothing(savings, tmp_path, what):
    with small_disk(), pytest.raises(NotWritten, match="could not be written .*Nothing half-written is left") as e:
        savings[what].save(tmp_path / "a" / "it")
    assert str(tmp_path / "a" / "it") in str(e.value) and MEND in str(e.value)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("what", WRITERS)
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("method", ["replace", "rename", "mkdir"])
@pytest.mark.parametrize(("fault", "error"), [(full, NotWritten), (denied, NotWritten), (stopped, KeyboardInterrupt)])
def test_a_fault_at_any_step_leaves_what_was_there(savings, tmp_path, monkeypatch, what, there, method, fault, error):
    # Six panels take a second to draw, and what is drawn does not matter here.
    monkeypatch.setattr(Tradeoff, "_draw", lambda self, name: Figure(figsize=(1, 1)))
    path = tmp_path / "it"
    if there and what in NEW_FOLDERS:
        path.mkdir()
    elif there:
        savings[what].save(path)
    before = contents(tmp_path)
    calls = []
    with monkeypatch.context() as patched:
        patched.setattr(Path, method, lambda *args, **kwargs: (calls.append(args), fault())[1])
        try:
            savings[what].save(path)
        except error as e:
            causes = (os.strerror(errno.ENOSPC), os.strerror(errno.EACCES))
            assert fault is stopped or any(cause in str(e) for cause in causes)
    if calls:
        assert contents(tmp_path) == before
    else:  # a step that this writer has no need of
        assert savings[what].is_whole(path)


@pytest.mark.parametrize("check", [require_new, require_file])
def test_a_place_that_may_not_be_written_to_is_found_before_the_work(tmp_path, monkeypatch, check):
    check(tmp_path / "a" / "it")
    monkeypatch.setattr(Path, "mkdir", denied)  # nothing is forbidden to root, who may run this
    with pytest.raises(NotWritten, match=f"'{tmp_path}' takes nothing .Permission denied.. Give another path"):
        check(tmp_path / "a" / "it")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("writer", [new_file, new_folder, files_into])
def test_errors_of_the_caller_stay_what_they_are(tmp_path, writer):
    for error in (ValueError("mine"), FormatError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writer(tmp_path / "a" / "it"):
            raise error
        assert caught.value is error and contents(tmp_path) == {}


def test_files_come_into_a_folder_all_together_or_not_at_all(tmp_path):
    for name in ("other", "b"):
        (tmp_path / name).write_text("old")
    (tmp_path / "c").mkdir()
    for names, whole in ((("a", "b"), True), (("b", "c"), False)):
        before = contents(tmp_path)
        try:
            with files_into(tmp_path) as inside:
                for name in names:
                    (inside / name).write_text(f"new, {whole}")
        except NotWritten as error:
            assert not whole and "'" + str(tmp_path / "c") + "' is a folder" in str(error)
            assert contents(tmp_path) == before
        else:
            assert contents(tmp_path) == {**before, tmp_path / "a": b"new, True", tmp_path / "b": b"new, True"}


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_loading_a_folder_or_nothing_as_a_graph_is_refused_by_name(tmp_path, make):
    make(tmp_path / "it")
    with pytest.raises(FormatError, match="is a folder. Give the graph file|does not exist. Check the path"):
        AttributionGraph.load(tmp_path / "it")


def test_what_is_saved_has_the_permissions_that_new_files_have(savings, tmp_path):
    (plain := tmp_path / "plain").write_text("")
    for what, saving in savings.items():
        saving.save(tmp_path / what)
        files = [p for p in [tmp_path / what, *(tmp_path / what).rglob("*")] if p.is_file()]
        assert files and {p.stat().st_mode for p in files} == {plain.stat().st_mode}, what
