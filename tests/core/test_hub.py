"""The Hub, by way of a stand-in on this machine: what is fetched, what is not, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub import _tree_cache

from lens_core.catalog import Catalog
from lens_core.checkpoint import digest, fetch
from lens_core.pipeline import LensPipeline
from lens_core.types import CheckpointError


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


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    hub: Hub, checkpoint: Path, pipeline: LensPipeline, catalog: Catalog
) -> None:
    first, before = hub.publish("toys/blocks", checkpoint, "v1"), digest(checkpoint)
    pipeline.vae.gain.data += 1
    pipeline.save_pretrained(checkpoint)
    hub.publish("toys/blocks", checkpoint)
    assert digest(checkpoint) != before
    for revision, expected in {"v1": before, first: before, "main": digest(checkpoint)}.items():
        assert digest(fetch(f"toys/blocks@{revision}", catalog)) == expected
    assert digest(fetch("toys/blocks", catalog)) == digest(checkpoint)
    assert "toys/blocks@v2: cannot be fetched from the Hub: it has no such branch" in error(
        lambda: fetch("toys/blocks@v2", catalog)
    )


def test_only_what_a_checkpoint_consists_of_is_fetched(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (checkpoint / "modeling.py").write_text("raise SystemExit")
    hub.publish("toys/blocks", checkpoint)
    folder = fetch("toys/blocks", catalog)
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.py"))
    assert (folder / "lens.json").is_file()


def test_offline_the_cache_is_used_and_nobody_is_asked(
    hub: Hub, unplug: Callable[[Hub], None], checkpoint: Path, catalog: Catalog
) -> None:
    hub.publish("toys/blocks", checkpoint, "v1")
    online = fetch("toys/blocks", catalog)
    fetch("toys/blocks@v1", catalog)
    unplug(hub)
    assert fetch("toys/blocks", catalog) == online == fetch("toys/blocks@v1", catalog)
    assert "toys/blocks@v2: model_index.json is not in the cache, and nothing is fetched offline" in error(
        lambda: fetch("toys/blocks@v2", catalog)
    )
    said = error(lambda: fetch("toys/other", catalog))
    assert "toys/other: model_index.json is not in the cache" in said and "`hf download toys/other`" in said
    assert hub.asked == []


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
    folder = fetch("toys/blocks", catalog)
    (folder / "transformer" / "part-2.safetensors").unlink()
    if not listed:  # as an older client of the Hub leaves its cache
        for listing in (tmp_path / "cache").rglob("trees/*.json"):
            listing.unlink()
        _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    unplug(hub)
    said = error(lambda: fetch("toys/blocks", catalog))
    assert said.startswith("toys/blocks: transformer/part-2.safetensors is not in the cache, and nothing is fetched")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "transformer" / "part-1.safetensors").unlink()
    assert ("and 2 more" if listed else "and 1 more") in error(lambda: fetch("toys/blocks", catalog))
    assert hub.asked == []


def test_a_download_that_was_cut_short_is_finished(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    hub.publish("toys/blocks", checkpoint)
    folder = fetch("toys/blocks", catalog)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.resolve().unlink()
    path.unlink()
    assert fetch("toys/blocks", catalog) == folder and digest(folder) == digest(checkpoint)


def test_what_the_hub_refuses_is_told_with_the_cure(hub: Hub, checkpoint: Path, catalog: Catalog) -> None:
    assert "there is none of that name, or it is private; then run `hf auth login`" in error(
        lambda: fetch("toys/none", catalog)
    )
    hub.publish("toys/gated", checkpoint)
    hub.gated.add("toys/gated")
    assert "it is gated; accept its terms" in error(lambda: fetch("toys/gated", catalog))
    assert "cannot be fetched from the Hub" in error(lambda: fetch("toys/bad..name", catalog))


def test_a_folder_here_goes_before_a_repository(
    hub: Hub, pipeline: LensPipeline, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "toys" / "blocks")
    monkeypatch.chdir(tmp_path)
    assert fetch("toys/blocks", catalog) == Path("toys/blocks")
    assert hub.asked == []


def test_reading_a_folder_asks_nobody(hub: Hub) -> None:
    LensPipeline.from_pretrained("tiny:")
    assert hub.asked == []


FETCH = """
import sys
from lens_core import hub
from lens_core.types import CheckpointError
try:
    print(hub.snapshot("toys/blocks"))
except CheckpointError as error:
    print(error)
"""


def test_the_environment_names_the_hub_the_cache_and_whether_to_ask(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.publish("toys/blocks", checkpoint)

    def say(**environment: str) -> str:
        hub.asked.clear()
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        clean |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        run = [sys.executable, "-c", FETCH]
        return subprocess.run(run, env=clean | environment, capture_output=True, text=True, check=True).stdout.strip()

    assert "not in the cache, and nothing is fetched offline" in say(TRANSFORMERS_OFFLINE="1")
    assert hub.asked == []
    folder = say(HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert folder.startswith(str(tmp_path / "home")) and digest(Path(folder)) == digest(checkpoint)
    assert hub.asked != []
    assert say(HF_HUB_OFFLINE="1") == folder and hub.asked == []
