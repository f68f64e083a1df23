"""Files at the border: each kind of damage is one clear line, and what is written is written whole."""

from __future__ import annotations

import functools
import json
import os
import pickle
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.checkpoints.manifest import digest, read_manifest, resolve_uri
from lens_core.checkpoints.tensor_files import load_module, read_header, read_tensors, save_module, save_tensors
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.atomic_files import read_json, read_log, write_atomic, write_json
from lens_core.types import CheckpointError, ConfigError, LensError

STEM = "diffusion_pytorch_model"


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def shards(folder: Path, table: dict[str, str]) -> None:
    """`net()` in one file a tensor, under an index that says `table`."""
    state = net().state_dict()
    save_file({"weight": state["weight"]}, folder / "one.safetensors")
    save_file({"bias": state["bias"]}, folder / "two.safetensors")
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- writing --------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    assert "No space left on device" in error(lambda: write_atomic(path, fail))
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def stop(temporary: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_permissions_that_open_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_json(tmp_path / "file.json", {})
        write_atomic(tmp_path / "replaced", lambda path: save_file({"x": torch.ones(1)}, path))
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    wanted = (tmp_path / "plain").stat().st_mode
    assert [(tmp_path / name).stat().st_mode for name in ("file.json", "replaced")] == [wanted, wanted]


def test_threads_that_write_leave_the_umask_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    umask = os.umask

    def slowly(mask: int) -> int:  # widens the gap between setting the umask and setting it back
        before = umask(mask)
        time.sleep(0.01)
        return before

    mask = umask(0o027)
    monkeypatch.setattr(os, "umask", slowly)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda n: write_json(tmp_path / f"{n}.json", {}), range(24)))
    finally:
        left = umask(mask)
    assert left == 0o027
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "below.json", Path("."), Path("/")):
        assert "choose another output" in error(functools.partial(write_json, place, {}))


def test_equal_tensors_are_equal_files_that_say_what_they_are(tmp_path: Path) -> None:
    save_module(net(), tmp_path / "a")
    header = {"z": "1", "a": "é\n", "m": "{}"}
    for number in range(8):
        save_tensors(tmp_path / f"{number}.safetensors", net().state_dict(), header)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}) == 1
    assert read_header(tmp_path / "0.safetensors") == {"format": "pt", **header}
    assert torch.equal(read_tensors(tmp_path / "0.safetensors")["weight"], net().weight)
    said = read_header(tmp_path / "a" / f"{STEM}.safetensors")
    assert said == {"format": "pt", "modelspec.architecture": "Linear"}


# ---- reading --------------------------------------------------------------------------------------------------


def test_a_module_reads_back_what_it_wrote(tmp_path: Path) -> None:
    save_module(net(), tmp_path)
    other = nn.Linear(3, 2)
    load_module(other, tmp_path, dtype=torch.bfloat16)
    assert other.weight.dtype == torch.bfloat16
    assert torch.equal(other.weight, net().weight.bfloat16())


def test_a_module_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    save_module(net(), tmp_path)
    with torch.device("meta"):
        other = nn.Linear(3, 2)
    load_module(other, tmp_path)
    assert torch.equal(other.weight, net().weight)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    shards(tmp_path, {"weight": "one.safetensors", "bias": "two.safetensors"})
    other = nn.Linear(3, 2)
    load_module(other, tmp_path)
    assert torch.equal(other.weight, net().weight) and torch.equal(other.bias, net().bias)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path, {"weight": "one.safetensors", "bias": "three.safetensors"})
    assert "three.safetensors: this shard is missing" in error(lambda: load_module(net(), tmp_path))


def test_a_shard_whose_name_no_file_can_have_is_missing(tmp_path: Path) -> None:
    shards(tmp_path, {"weight": f"{'x' * 300}.safetensors", "bias": "two.safetensors"})
    assert "this shard is missing" in error(lambda: load_module(net(), tmp_path))


BAD = [
    "../one.safetensors",
    "/etc/passwd",
    "a/../../x.safetensors",
    "one.bin",
    "",
    "a\x00.safetensors",
    "\n.safetensors",
]


@pytest.mark.parametrize("name", BAD)
def test_an_index_may_not_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    shards(tmp_path, {"weight": name, "bias": "two.safetensors"})
    assert "not a safetensors file of its own folder" in error(lambda: load_module(net(), tmp_path))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_without_a_map_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(text)
    assert "no weight_map" in error(lambda: load_module(net(), tmp_path))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, {"weight": "one.safetensors", "bias": "two.safetensors"})
    save_file(net().state_dict(), tmp_path / "two.safetensors")
    assert "which another shard holds too" in error(lambda: load_module(net(), tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{STEM}.safetensors: missing" in error(lambda: load_module(net(), tmp_path))


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_reported_with_its_size(keep: int, tmp_path: Path) -> None:
    save_module(net(), tmp_path)
    path = tmp_path / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"not a whole safetensors file ({path.stat().st_size} bytes" in error(lambda: load_module(net(), tmp_path))


@pytest.mark.parametrize("data", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>404</html>", b"\xff" * 64])
def test_a_foreign_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.safetensors").write_bytes(data)
    assert "not a whole safetensors file" in error(lambda: load_module(net(), tmp_path))


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a pickle was run",)


@pytest.mark.parametrize("name", [f"{STEM}.safetensors", f"{STEM}.bin", "pytorch_model.pt"])
def test_a_pickle_is_never_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Trap(), protocol=2))
    assert f"{name}: is a pickle, which can run code" in error(lambda: load_module(net(), tmp_path))


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.ones(2)}, {"pad": ""})
    save_tensors(path, {"w": torch.ones(2)}, {"pad": "x" * (length - int.from_bytes(path.read_bytes()[:8], "little"))})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert torch.equal(read_tensors(path)["w"], torch.ones(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"weight": torch.zeros(4, 2), "bias": torch.zeros(2)},
            "'weight' has the shape [4, 2]; its config asks for [2, 3]",
        ),
        ({"weight": torch.zeros(2, 3)}, "lacks 'bias'"),
        ({"weight": torch.zeros(2, 3), "bais": torch.zeros(2)}, "lacks 'bias'. Did you mean 'bais'?"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)}, "holds 'x' (1 such)"),
        ({"weight": torch.zeros(2, 3, dtype=torch.uint8), "bias": torch.zeros(2)}, "'weight' is torch.uint8"),
    ],
)
def test_names_shapes_and_types_must_be_those_of_the_model(
    change: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    save_file(change, tmp_path / f"{STEM}.safetensors")
    before = net()
    assert words in error(lambda: load_module(before, tmp_path))
    assert torch.equal(before.weight, net().weight), "nothing is loaded by halves"


@pytest.mark.parametrize("text", ["{", "", '{"a": 1, "a": 2}', "[" * 100_000, "[1]", "3", "NaN", '{"a": 1e400}'])
def test_json_that_is_not_one_plain_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert "x.json: " in error(lambda: read_json(tmp_path / "x.json"))


def test_a_byte_order_mark_before_json_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_a_log_is_the_lines_about_a_whole_finite_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    sound = [{"step": 1, "loss": 0.5, "note": "a\u2028b\x0cc"}, {"step": 2.0}, {"step": 3, "loss": float("nan")}]
    torn = ['{"step": Infinity}', '{"step": NaN}', '{"step": -1}', '{"step": 1.5}', '{"step": "4"}', '{"step": true}',
            '{"step": 1e400}', f'{{"step": {"9" * 400}}}', "[" * 100_000, '{"a":' * 100_000, "[1]", "7", "",
            '{"step": 5, "x": "\\ud800"}', '{"step": 6']  # fmt: skip
    kept = [json.dumps(line, ensure_ascii=False) for line in sound]
    path.write_bytes("\n".join([*kept, *torn]).encode() + b'\n{"step": 7, "x": "\xff')
    entries = read_log(path)
    assert [line["step"] for line in entries] == [1, 2, 3]
    assert entries[:2] == sound[:2]
    assert [line["step"] for line in read_log(path, 2)] == [1, 2]


# ---- whole checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri", ["no/such/folder", "nowhere", "tiny", "other:", "../x", "org/name:tag", "org/a b", "a\\b/c"]
)
def test_what_is_neither_a_folder_nor_a_hub_name_is_reported(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such folder, and not a Hub name" in error(lambda: resolve_uri(uri, Catalog.of()))


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    said = error(lambda: resolve_uri("no-such-org/no-such-name@main", Catalog.of()))
    assert "no-such-org/no-such-name@main: model_index.json is not in the cache" in said
    assert "`hf download no-such-org/no-such-name --revision main` brings it" in said


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert "is a file; a checkpoint is a folder" in error(lambda: resolve_uri(str(tmp_path / "x"), Catalog.of()))


def test_a_folder_of_unknown_layout_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    assert "neither lens.json nor a layout" in error(lambda: read_manifest(tmp_path, catalog))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_asks_for_an_upgrade(version: object, checkpoint: Path, catalog: Catalog) -> None:
    data = read_json(checkpoint / "lens.json")
    write_json(checkpoint / "lens.json", {**data, "format": version})
    assert f"is of format {version!r}; this Lens reads 1" in error(lambda: read_manifest(checkpoint, catalog))


@pytest.mark.parametrize("components", [None, [], {"vae": "blocks"}, {"vae": {}}, {"vae": {"use": "x", "config": 3}}])
def test_components_that_name_nothing_are_refused(components: object, checkpoint: Path, catalog: Catalog) -> None:
    data = read_json(checkpoint / "lens.json")
    write_json(checkpoint / "lens.json", {**data, "components": components})
    assert "has no components that each name what they use" in error(lambda: read_manifest(checkpoint, catalog))


def test_a_plugin_that_has_left_is_named(checkpoint: Path) -> None:
    with pytest.raises(LensError, match=r"components\.vae.*The plugin 'toy' is not installed") as caught:
        LensPipeline.from_pretrained(checkpoint, catalog=Catalog.of())
    assert "\n" not in str(caught.value)


def test_a_config_with_an_unknown_field_is_refused_with_its_path(checkpoint: Path, catalog: Catalog) -> None:
    data = read_json(checkpoint / "lens.json")
    data["components"]["backbone"]["config"]["widht"] = 3
    write_json(checkpoint / "lens.json", data)
    with pytest.raises(ConfigError, match=r"lens\.json: components\.backbone\.widht: unknown\. Did you mean 'width'"):
        LensPipeline.from_pretrained(checkpoint, catalog=catalog)


def test_a_save_that_fails_leaves_no_description(
    pipeline: LensPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.backbone, "save", lambda folder: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        pipeline.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x" / "lens.json").exists()


def test_a_folder_of_other_things_is_not_written_over(pipeline: LensPipeline, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert "not empty and not a checkpoint" in error(lambda: pipeline.save_pretrained(tmp_path))


def test_the_digest_follows_weights_and_names(checkpoint: Path, pipeline: LensPipeline) -> None:
    before = digest(checkpoint)
    pipeline.save_pretrained(checkpoint)
    assert digest(checkpoint) == before
    with torch.no_grad():
        pipeline.vae.gain += 1
    pipeline.save_pretrained(checkpoint)
    changed = digest(checkpoint)
    (checkpoint / "vae" / f"{STEM}.safetensors").rename(checkpoint / "vae" / "other.safetensors")
    assert len({before, changed, digest(checkpoint)}) == 3


def test_a_plugin_answers_for_its_own_names_first(tmp_path: Path) -> None:
    module = types.ModuleType("resolver")
    (tmp_path / "here").mkdir()

    def lens_fetch(uri: str) -> Path | None:
        return tmp_path / "here" if uri == "small:" else None

    module.lens_fetch = hookimpl(lens_fetch)  # type: ignore[attr-defined]  # made on the spot
    assert resolve_uri("small:", Catalog.of(module)) == tmp_path / "here"
    assert resolve_uri(str(tmp_path), Catalog.of(module)) == tmp_path
