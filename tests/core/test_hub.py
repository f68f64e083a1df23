"""The Hub, by way of a stand-in on this machine: what is fetched, what is not, and what is said."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub import _tree_cache

from lens_core.catalog import Catalog
from lens_core.checkpoints import integrity
from lens_core.checkpoints.hub import FOLDERS, _reason, create, snapshot, upload
from lens_core.checkpoints.manifest import combined, digest, hashes, read_manifest, resolve_uri
from lens_core.checkpoints.tensor_files import read_tensors
from lens_core.cli.main import main
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.atomic_files import read_json, write_json
from lens_core.types import CheckpointError, ConfigError

# The Hub's client, where it uploads without Xet, hands its files over in a way that its own HTTP library is leaving.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_repository_draws_what_its_folder_draws(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    hub.publish("toys/blocks", checkpoint)
    here, there = (LensPipeline.from_pretrained(uri, catalog=catalog) for uri in (checkpoint, "toys/blocks"))
    assert here.version == there.version
    draw = {"prompt": "red", "seed": 1, "height": 32, "width": 32, "output_type": "pt"}
    assert here(**draw).images.equal(there(**draw).images)


def test_large_files_of_the_cache_are_known_by_their_names_and_not_read_again(
    hub: Hub, checkpoint: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("toys/blocks", checkpoint)
    folder, expected = resolve_uri("toys/blocks", catalog), digest(checkpoint)
    read: list[str] = []
    taken = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (read.append(file.name), taken(file, kind))[1])
    assert digest(folder) == expected
    assert read and not [name for name in read if name.endswith(".safetensors")]


def test_a_part_that_a_repository_shares_stays_that_of_its_revision(
    hub: Hub, checkpoint: Path, pipeline: LensPipeline, catalog: Catalog, tmp_path: Path
) -> None:
    hub.publish("toys/blocks", checkpoint, "v1")
    mine = tmp_path / "mine"
    pipeline.save_pretrained(mine)
    shutil.rmtree(mine / "vae")
    about = read_json(mine / "lens.json")
    shared = {"from": "toys/blocks@v1", "hash": combined(hashes(checkpoint, FOLDERS["vae"]))}
    about["components"]["vae"] |= shared
    write_json(mine / "lens.json", about)
    gain = pipeline.vae.gain.clone()
    requests_before = len(hub.requests)
    assert LensPipeline.from_pretrained(mine, catalog=catalog).vae.gain.equal(gain)
    weights = [path for path in hub.requests[requests_before:] if path.endswith(".safetensors")]
    assert weights and all("/vae/" in path for path in weights), "of another checkpoint, only shared parts are fetched"
    assert snapshot("toys/blocks", "v1", local=True, under=("vae/",)).is_dir()
    assert "are not in the cache" in error(lambda: snapshot("toys/blocks", "v1", local=True))
    pipeline.vae.gain.data += 1
    pipeline.save_pretrained(checkpoint)
    hub.publish("toys/blocks", checkpoint)
    assert LensPipeline.from_pretrained(mine, catalog=catalog).vae.gain.equal(gain)
    about["components"]["vae"]["from"] = "toys/blocks"
    write_json(mine / "lens.json", about)
    assert f"its vae is that of toys/blocks as it was at {shared['hash']}, and it is at" in error(
        lambda: LensPipeline.from_pretrained(mine, catalog=catalog)
    )
    LensPipeline.from_pretrained(mine, catalog=catalog, parts=("backbone",))  # nobody asked for the VAE
    about["components"]["vae"]["from"] = "toys/none"
    write_json(mine / "lens.json", about)
    assert "its vae is that of toys/none, which cannot be had: toys/none: cannot be fetched" in error(
        lambda: LensPipeline.from_pretrained(mine, catalog=catalog)
    )


def test_a_part_that_is_shared_now_is_no_longer_kept_beside(hub: Hub, checkpoint: Path, pipeline: LensPipeline) -> None:
    hub.publish("toys/mine", checkpoint)
    pipeline.save_pretrained(checkpoint)
    shutil.rmtree(checkpoint / "vae")
    about = read_json(checkpoint / "lens.json")
    about["components"]["vae"] |= {"from": "toys/blocks@v1", "hash": "0" * 16}
    write_json(checkpoint / "lens.json", about)
    assert any(p.startswith("vae/") for p in hub.repositories["toys/mine"].files)
    upload(checkpoint, about, "toys/mine", token="hf_secret")
    kept = hub.repositories["toys/mine"].files
    assert not any(p.startswith("vae/") for p in kept) and any(p.startswith("transformer/") for p in kept)


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    hub: Hub, checkpoint: Path, pipeline: LensPipeline, catalog: Catalog
) -> None:
    first, before = hub.publish("toys/blocks", checkpoint, "v1"), digest(checkpoint)
    pipeline.vae.gain.data += 1
    pipeline.save_pretrained(checkpoint)
    hub.publish("toys/blocks", checkpoint)
    assert digest(checkpoint) != before
    for revision, expected in {"v1": before, first: before, "main": digest(checkpoint)}.items():
        assert digest(resolve_uri(f"toys/blocks@{revision}", catalog)) == expected
    assert digest(resolve_uri("toys/blocks", catalog)) == digest(checkpoint)
    assert "toys/blocks@v2: cannot be fetched from the Hub: it has no such branch" in error(
        lambda: resolve_uri("toys/blocks@v2", catalog)
    )


def test_only_what_a_checkpoint_consists_of_is_fetched(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (checkpoint / "modeling.py").write_text("raise SystemExit")
    hub.publish("toys/blocks", checkpoint)
    folder = resolve_uri("toys/blocks", catalog)
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.py"))
    assert (folder / "lens.json").is_file()


def test_offline_the_cache_is_used_and_nobody_is_asked(
    hub: Hub, unplug: Callable[[Hub], None], checkpoint: Path, catalog: Catalog
) -> None:
    hub.publish("toys/blocks", checkpoint, "v1")
    online = resolve_uri("toys/blocks", catalog)
    resolve_uri("toys/blocks@v1", catalog)
    unplug(hub)
    assert resolve_uri("toys/blocks", catalog) == online == resolve_uri("toys/blocks@v1", catalog)
    assert "toys/blocks@v2: model_index.json is not in the cache, and nothing is fetched offline" in error(
        lambda: resolve_uri("toys/blocks@v2", catalog)
    )
    said = error(lambda: resolve_uri("toys/other", catalog))
    assert "toys/other: model_index.json is not in the cache" in said and "`hf download toys/other`" in said
    assert hub.requests == []


@pytest.mark.parametrize("listed", [True, False])
def test_offline_a_file_that_a_snapshot_lacks_is_named(
    listed: bool, hub: Hub, unplug: Callable[[Hub], None], checkpoint: Path, catalog: Catalog, tmp_path: Path
) -> None:
    whole = (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    for number in (1, 2):
        (checkpoint / "transformer" / f"part-{number}.safetensors").write_bytes(whole)
    index = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "../x.safetensors"}}')
    hub.publish("toys/blocks", checkpoint)
    folder = resolve_uri("toys/blocks", catalog)
    (folder / "transformer" / "part-2.safetensors").unlink()
    if not listed:  # as an older client of the Hub leaves its cache
        for listing in (tmp_path / "cache").rglob("trees/*.json"):
            listing.unlink()
        _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    unplug(hub)
    said = error(lambda: resolve_uri("toys/blocks", catalog))
    assert said.startswith("toys/blocks: transformer/part-2.safetensors is not in the cache, and nothing is fetched")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "transformer" / "part-1.safetensors").unlink()
    assert ("and 2 more" if listed else "and 1 more") in error(lambda: resolve_uri("toys/blocks", catalog))
    assert hub.requests == []


def test_a_download_that_was_cut_short_is_finished(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    hub.publish("toys/blocks", checkpoint)
    folder = resolve_uri("toys/blocks", catalog)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.resolve().unlink()
    path.unlink()
    assert resolve_uri("toys/blocks", catalog) == folder and digest(folder) == digest(checkpoint)


def test_what_the_hub_refuses_is_reported_with_the_cure(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    assert "there is none of that name, or it is private; then run `hf auth login`" in error(
        lambda: resolve_uri("toys/none", catalog)
    )
    hub.publish("toys/gated", checkpoint)
    hub.gated.add("toys/gated")
    assert "it is gated; accept its terms" in error(lambda: resolve_uri("toys/gated", catalog))
    assert "cannot be fetched from the Hub" in error(lambda: resolve_uri("toys/bad..name", catalog))


def test_a_folder_here_goes_before_a_repository(
    hub: Hub, pipeline: LensPipeline, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "toys" / "blocks")
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("toys/blocks", catalog) == Path("toys/blocks")
    assert hub.requests == []


def test_reading_a_folder_asks_nobody(hub: Hub) -> None:
    LensPipeline.from_pretrained("tiny:")
    assert hub.requests == []


# ---- to the Hub -------------------------------------------------------------------------------------------------


def test_a_pushed_pipeline_is_read_back_as_it_was(
    hub: Hub, pipeline: LensPipeline, checkpoint: Path, catalog: Catalog
) -> None:
    where = pipeline.push_to_hub("toys/blocks", private=True, token="hf_secret", commit_message="First")
    assert where == f"{hub.url}/toys/blocks"
    repository = hub.repositories["toys/blocks"]
    assert repository.private and hub.messages == ["First"] and hub.tokens == {"hf_secret"}
    assert len(repository.commits) == 2, "the one that made it, and one more"
    assert LensPipeline.from_pretrained("toys/blocks", catalog=catalog).version == digest(checkpoint)
    assert not any(b"hf_secret" in data for data in repository.files.values())


def test_the_card_on_the_hub_says_how_to_load_it_and_its_snippet_runs(
    hub: Hub, pipeline: LensPipeline, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline.push_to_hub("toys/blocks", token="hf_secret")
    card = hub.repositories["toys/blocks"].files["README.md"].decode()
    assert '"toys/blocks"' in card and "--model toys/blocks" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(Catalog, "installed", classmethod(lambda cls: catalog))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "star.png").is_file()


def test_a_model_made_from_a_repository_names_it_and_a_path_is_not_reported(
    hub: Hub, pipeline: LensPipeline, catalog: Catalog, tmp_path: Path
) -> None:
    pipeline.push_to_hub("toys/blocks", token="hf_secret")
    LensPipeline.from_pretrained("toys/blocks@main", catalog=catalog).save_pretrained(tmp_path / "made")
    made = LensPipeline.from_pretrained(tmp_path / "made", catalog=catalog)
    assert made.provenance == {"base_model": "toys/blocks"}
    made.push_to_hub("toys/made", token="hf_secret")
    files = hub.repositories["toys/made"].files
    assert b'base_model: "toys/blocks"\n' in files["README.md"]
    assert not any(str(tmp_path).encode() in data for data in files.values())


def test_a_card_that_a_person_wrote_stays_there_and_here(
    hub: Hub, pipeline: LensPipeline, checkpoint: Path, catalog: Catalog
) -> None:
    def push() -> None:
        upload(checkpoint, read_manifest(checkpoint, catalog), "toys/blocks", token="hf_secret")

    pipeline.push_to_hub("toys/blocks", token="hf_secret")
    repository = hub.repositories["toys/blocks"]
    ours = repository.files["README.md"]
    pipeline.presets["steps"] = 9
    pipeline.push_to_hub("toys/blocks", token="hf_secret")
    assert repository.files["README.md"] != ours, "ours is brought up to date"
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# Written here\n")
    push()
    assert repository.files["README.md"].endswith(b"# Written here\n")
    repository.commit({**repository.files, "README.md": b"# Written there\n"})
    pipeline.push_to_hub("toys/blocks", token="hf_secret")
    push()
    assert repository.files["README.md"] == b"# Written there\n"


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(
    hub: Hub, pipeline: LensPipeline, checkpoint: Path, catalog: Catalog
) -> None:
    pipeline.push_to_hub("toys/blocks", token="hf_secret")
    repository = hub.repositories["toys/blocks"]
    repository.commit({**repository.files, "lora.safetensors": b"mine", "extra/a.safetensors": b"mine"})
    folder = checkpoint / "transformer"
    single = folder / "diffusion_pytorch_model.safetensors"
    names = read_tensors(single)
    single.rename(folder / "part.safetensors")
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)
    upload(checkpoint, read_manifest(checkpoint, catalog), "toys/blocks", token="hf_secret")
    there = {name for name in repository.files if ".safetensors" in name and not name.startswith(("vae/", "text"))}
    assert there == {
        "lora.safetensors",
        "extra/a.safetensors",
        "transformer/part.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    }


def test_a_public_repository_does_not_pass_for_a_private_one(hub: Hub, pipeline: LensPipeline) -> None:
    pipeline.push_to_hub("toys/blocks", token="hf_secret")
    before = dict(hub.repositories["toys/blocks"].commits)
    assert "toys/blocks: is there and public; make it private" in error(
        lambda: pipeline.push_to_hub("toys/blocks", private=True, token="hf_secret")
    )
    assert hub.repositories["toys/blocks"].commits == before


@pytest.mark.parametrize("read_only", [True, False])
def test_a_token_that_may_not_write_is_reported_and_never_shown(
    read_only: bool, hub: Hub, pipeline: LensPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if read_only:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.read_only = read_only
    said = error(lambda: pipeline.push_to_hub("toys/blocks"))
    assert said.startswith("toys/blocks: cannot be made on the Hub: your token may not do that; run `hf auth login`")
    assert "hf_secret" not in said
    assert hub.tokens == ({"hf_secret"} if read_only else set())
    assert "hf_secret" not in caplog.text


def test_a_secret_in_what_the_hub_answers_is_not_repeated() -> None:
    assert _reason(ValueError("bad Bearer hf_secret"), "hf_secret") == "ValueError: bad Bearer (token)"


def test_offline_nothing_is_uploaded(hub: Hub, unplug: Callable[[Hub], None], pipeline: LensPipeline) -> None:
    unplug(hub)
    assert "toys/blocks: nothing is uploaded offline; unset HF_HUB_OFFLINE" in error(
        lambda: pipeline.push_to_hub("toys/blocks", token="hf_secret")
    )
    assert hub.requests == []


@pytest.mark.parametrize("name", ["blocks", "a/b/c", "../x", "a/b\nc", "", "toys:blocks/x"])
def test_what_is_no_name_of_a_repository_is_refused(name: str, hub: Hub, pipeline: LensPipeline) -> None:
    with pytest.raises(ConfigError, match="is no name for a repository; it must be org/name"):
        pipeline.push_to_hub(name)
    assert hub.requests == []


def test_half_a_checkpoint_is_not_uploaded(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    write_json(checkpoint / "vae" / "x.safetensors.index.json", {"weight_map": {"a": "gone.safetensors"}})
    create("toys/blocks", token="hf_secret")
    said = error(lambda: upload(checkpoint, read_manifest(checkpoint, catalog), "toys/blocks", token="hf_secret"))
    assert said == f"{checkpoint / 'vae' / 'gone.safetensors'}: missing; only a whole checkpoint is uploaded"


def test_the_command_pushes_a_folder_as_it_is(
    hub: Hub, checkpoint: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(Catalog, "installed", classmethod(lambda cls: catalog))
    (checkpoint / "LICENSE").write_text("Do what you like.")
    (checkpoint / "notes.txt").write_text("not for you")
    assert main(["push", str(checkpoint), "toys/blocks", "--private", "--message", "Second"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/toys/blocks\n"
    repository = hub.repositories["toys/blocks"]
    there = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {"notes.txt"}
    assert repository.private and hub.messages == ["Second"] and set(repository.files) == there | {".gitattributes"}
    for name in there - {"README.md"}:
        assert repository.files[name] == (checkpoint / name).read_bytes()
    assert main(["push", str(checkpoint / "none"), "toys/blocks"]) == 2


FETCH = """
import sys
from lens_core.checkpoints import hub
from lens_core.types import CheckpointError
try:
    print(hub.snapshot("toys/blocks"))
except CheckpointError as error:
    print(error)
"""


def test_the_environment_names_the_hub_the_cache_and_whether_to_ask(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.publish("toys/blocks", checkpoint)

    def output_of(**environment: str) -> str:
        hub.requests.clear()
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        clean |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        run = [sys.executable, "-c", FETCH]
        return subprocess.run(run, env=clean | environment, capture_output=True, text=True, check=True).stdout.strip()

    assert "not in the cache, and nothing is fetched offline" in output_of(TRANSFORMERS_OFFLINE="1")
    assert hub.requests == []
    folder = output_of(HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert folder.startswith(str(tmp_path / "home")) and digest(Path(folder)) == digest(checkpoint)
    assert hub.requests != []
    assert output_of(HF_HUB_OFFLINE="1") == folder and hub.requests == []


def test_only_what_the_checkpoint_names_is_uploaded(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    for name in (
        "client_secret.json", "optimizer.safetensors", "transformer/optimizer.safetensors", "vae/notes.json",
        "._lens.json", "vae/._diffusion_pytorch_model.safetensors", "other/config.json", "prompts.jinja",
    ):  # fmt: skip
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
    (checkpoint / "LICENSE").write_text("MIT")
    create("toys/a", token="hf_secret")
    upload(checkpoint, read_manifest(checkpoint, catalog), "toys/a", token="hf_secret")
    files = hub.repositories["toys/a"].files
    weights = "diffusion_pytorch_model.safetensors"
    assert set(files) - {".gitattributes"} == {
        "LICENSE", "README.md", "lens.json", "model_index.json",
        f"vae/{weights}", f"text_encoder/{weights}", f"transformer/{weights}",
    }  # fmt: skip
    about = read_json(checkpoint / "lens.json")
    del about["files"]
    write_json(checkpoint / "lens.json", about)
    create("toys/b", token="hf_secret")
    upload(checkpoint, read_manifest(checkpoint, catalog), "toys/b", token="hf_secret")
    assert set(hub.repositories["toys/b"].files) == set(files), "nor where lens.json names no files"


def test_a_concurrent_change_is_not_overwritten(
    hub: Hub, checkpoint: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    create("toys/a", token="hf_secret")
    listed = HfApi.list_repo_files

    def meanwhile(self: HfApi, *args: object, **more: object) -> object:
        listing = listed(self, *args, **more)
        hub.repositories["toys/a"].commit({"theirs.json": b"{}"})
        return listing

    monkeypatch.setattr(HfApi, "list_repo_files", meanwhile)
    said = error(lambda: upload(checkpoint, read_manifest(checkpoint, catalog), "toys/a", token="hf_secret"))
    assert "somebody has changed it meanwhile" in said
    assert set(hub.repositories["toys/a"].files) == {"theirs.json"}


def test_what_was_pushed_and_fetched_is_as_it_was_written(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    create("toys/a", token="hf_secret")
    upload(checkpoint, read_manifest(checkpoint, catalog), "toys/a", token="hf_secret")
    folder = resolve_uri("toys/a", catalog)
    report = integrity.check(folder, read_manifest(folder, catalog))
    assert report.named == 4 and report.problems == []
    LensPipeline.from_pretrained("toys/a", catalog=catalog, verify=True)
