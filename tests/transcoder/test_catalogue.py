"""The catalogue of public transcoders: names resolve, only what is needed is fetched, what does not fit is refused."""

from __future__ import annotations

import errno
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tl_clt
from tests.transcoder.layouts import gemma_scope_1
from tl_clt.cli import app
from tl_clt.errors import CLTMismatch, FormatError, NotWritten
from tl_clt.organisms import organism_folder
from tl_clt.transcoder import CrossLayerTranscoder, check_fits, hub


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Repositories in folders; what was fetched is noted as (repository, revision, path)."""
    folders: dict[str, Path] = {}
    fetched: list[tuple[str, str | None, str]] = []

    def snapshot(repo: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        if repo not in folders:
            raise OSError("no such repository")
        here = tmp_path / "cache" / repo
        for path in folders[repo].rglob("*"):
            name = path.relative_to(folders[repo]).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns or ["*"]):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                (here / name).write_bytes(path.read_bytes())
                fetched.append((repo, revision, name))
        here.mkdir(parents=True, exist_ok=True)
        return str(here)

    def file(repo: str, path: str, revision: str | None = None) -> str:
        return str(Path(snapshot(repo, revision, [path])) / path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "hf_hub_download", file)
    return folders, fetched


def test_names_are_one_each_and_say_what_they_are():
    entries = tl_clt.public_transcoders()
    assert len({entry.name for entry in entries}) == len({entry.repo for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.kind in ("CLT", "PLT") and entry.kind.lower() in entry.name
        assert hub.parse(entry.repo).repo.count("/") == 1 and entry.model.count("/") == 1


def test_a_full_disk_is_no_missing_repository(monkeypatch):
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(NotWritten, match="No space left on device.* Make room there, or set HF_HOME"):
        tl_clt.CrossLayerTranscoder.from_pretrained("owner/repo")


def test_a_catalogue_name_a_repository_and_a_sub_folder_load(fake_hub, tmp_path: Path):
    folders, fetched = fake_hub
    atlas = organism_folder("atlas") / "clt"
    folders["mntss/clt-gemma-2-2b-426k"] = atlas
    (tmp_path / "repo" / "sub").mkdir(parents=True)
    for path in atlas.iterdir():
        if path.is_file():
            (tmp_path / "repo" / "sub" / path.name).write_bytes(path.read_bytes())
            (tmp_path / "repo" / f"other.{path.name}").write_bytes(b"not to be fetched")
    folders["some/repo"] = tmp_path / "repo"
    clt = CrossLayerTranscoder.from_pretrained(atlas)
    for where in ("gemma-2-2b-clt-426k@v2", "mntss/clt-gemma-2-2b-426k@v2", "some/repo/sub@v2"):
        assert torch.equal(CrossLayerTranscoder.from_pretrained(where).W_enc, clt.W_enc)
    assert {revision for _, revision, _ in fetched} == {"v2"}
    assert all(name.startswith("sub/") for repo, _, name in fetched if repo == "some/repo")


def test_of_a_repository_that_lists_its_files_only_those_are_fetched(fake_hub, tmp_path: Path):
    folders, fetched = fake_hub
    made = gemma_scope_1(tmp_path / "set")
    other = made.folder / "layer_0/width_16k/average_l0_7"
    other.mkdir()
    (other / "params.npz").write_bytes(b"of no interest")
    folders["some/repo"] = made.folder
    clt = CrossLayerTranscoder.from_pretrained("some/repo")
    x = torch.randn(4, clt.cfg.n_layers, clt.cfg.d_model)
    torch.testing.assert_close(clt(x), made.outputs(x), atol=5e-5, rtol=1e-5)
    assert not any("average_l0_7/" in name for _, _, name in fetched)


def test_a_repository_that_is_not_there_is_named(fake_hub):
    with pytest.raises(FormatError, match=r"no/such.*neither a folder here nor a hub repository"):
        CrossLayerTranscoder.from_pretrained("no/such")


def test_a_model_of_another_shape_is_refused_before_anything_is_fetched(fake_hub):
    _, fetched = fake_hub
    with pytest.raises(CLTMismatch, match=r"made for google/gemma-2-2b \(26 layers of width 2304\).*Nothing was down"):
        check_fits("gemma-2-2b-plt", "atlas", (4, 64))
    arguments = ["trace", "--model", "atlas", "--clt", "gemma-2-2b-plt", "--prompt", "a", "--output", "no.safetensors"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 1 and "made for google/gemma-2-2b" in result.output and not fetched
    check_fits("gemma-2-2b-plt", "a model whose config tells nothing", None)
    check_fits("gemma-2-2b-plt@v1", "google/gemma-2-2b-it", (26, 2304))


def test_list_shows_every_entry():
    output = CliRunner().invoke(app, ["list"], env={"COLUMNS": "400"}).output
    for entry in tl_clt.public_transcoders():
        assert entry.name in output and entry.repo in output
    assert "atlas: CLT of atlas" in output


def test_an_organisms_clt_is_loaded_by_its_name_unless_a_folder_here_is_named_so(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = CrossLayerTranscoder.from_pretrained(organism_folder("atlas") / "clt")
    assert CrossLayerTranscoder.from_pretrained("atlas").fingerprint() == bundled.fingerprint()
    from tests.models import tiny_clt

    own = tiny_clt((3, 8))
    own.save_pretrained(tmp_path / "atlas")
    assert CrossLayerTranscoder.from_pretrained("atlas").fingerprint() == own.fingerprint()


def test_a_name_that_is_nearly_an_organisms_gets_it_named():
    message = (
        r"'atlass' is neither a folder.*nor a bundled organism \(atlas, school\), nor a name.*Nearest names: atlas\."
    )
    with pytest.raises(FormatError, match=message):
        CrossLayerTranscoder.from_pretrained("atlass")


def test_trace_alone_knows_the_model_of_its_clt(tmp_path: Path):
    clt = CrossLayerTranscoder.from_pretrained(organism_folder("atlas") / "clt")
    assert clt.cfg.model_name == "atlas"
    arguments = ["trace", "--clt", "atlas", "--prompt", tl_clt_prompt()]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "g.safetensors")])
    assert result.exit_code == 0, result.output


def tl_clt_prompt() -> str:
    return "the capital of the state containing Dallas is"


def test_a_clt_that_does_not_know_its_model_says_so(tmp_path: Path):
    from tests.models import tiny_clt

    clt = tiny_clt((3, 8))
    clt.cfg = clt.cfg.from_dict({**clt.cfg.to_dict(), "model_name": "unknown"})
    clt.save_pretrained(tmp_path / "clt")
    arguments = ["trace", "--clt", str(tmp_path / "clt"), "--prompt", "a", "--output", str(tmp_path / "g.safetensors")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 1 and "Give --model" in result.output


@pytest.mark.parametrize("where", ["/no/such/folder", Path("no/such"), "./no/such", "~/no/such"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(where, monkeypatch):
    monkeypatch.setattr(hub, "fetch_folder", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(FormatError, match=f"'{where}' is neither a folder here .*there is no folder"):
        CrossLayerTranscoder.from_pretrained(where)


def test_a_name_that_is_nearly_in_the_catalogue_gets_the_nearest_ones():
    with pytest.raises(FormatError, match="tl-clt list.*Nearest names: gemma-2-2b-plt"):
        CrossLayerTranscoder.from_pretrained("Gemma-2-2B-PLTs")
    with pytest.raises(FormatError, match="neither a folder here"):
        CrossLayerTranscoder.from_pretrained(" ")


def test_without_a_connection_the_error_says_that_this_was_asked_for(monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match="HF_HUB_OFFLINE is set"):
        CrossLayerTranscoder.from_pretrained("nobody/nothing-here")
