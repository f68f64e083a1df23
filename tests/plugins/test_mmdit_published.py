"""Published folders are recognised by what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Hub
from lens_mmdit.published import REPOSITORIES, SIZES, describe, fetch

from lens_core.types import CheckpointError


def make(folder: Path, index: str = '{"_class_name": "LensPipeline"}', config: str = '{"num_layers": 48}') -> Path:
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(index)
    (folder / "transformer" / "config.json").write_text(config)
    return folder


def test_a_published_folder_becomes_its_lens_json(tmp_path: Path) -> None:
    config = {
        "_class_name": "LensTransformer2DModel",
        "_diffusers_version": "0.37",
        "num_layers": 48,
        "inner_dim": 1536,
        "selected_layer_index": [5, 11, 17, 23],
    }
    assert describe(make(tmp_path / "mine", config=json.dumps(config))) == {
        "format": 1,
        "components": {
            "vae": {"use": "lens_flux2:flux2", "config": {}},
            "text_encoder": {"use": "lens_gpt_oss:gpt_oss", "config": {"selected_layers": [5, 11, 17, 23]}},
            "backbone": {
                "use": "lens_mmdit:mmdit",
                "config": {"num_layers": 48, "inner_dim": 1536, "selected_layer_index": [5, 11, 17, 23]},
            },
            "sampler": {"use": "lens_flow:euler", "config": {}},
        },
        "presets": {"steps": 20, "guidance_scale": 5.0, "base_resolution": 1024, "sizes": SIZES},
        "note": "the preset of Lens, as nothing tells which variant this is "
        "(Lens-Turbo has 4 and 1, Lens-Base has 50 and 5)",
    }


def test_buckets_keep_their_area_and_their_shape() -> None:
    for base, table in SIZES.items():
        for ratio, (height, width) in table.items():
            across, down = map(int, ratio.split(":"))
            assert height % 16 == width % 16 == 0
            assert height * width == pytest.approx(int(base) ** 2, rel=0.06)
            assert width / height == pytest.approx(across / down, rel=0.03)


@pytest.mark.parametrize(
    ("path", "named", "variant", "sign"),
    [
        ("Lens-Diffusers", "", "Lens", "going by the name 'Lens-Diffusers'"),
        ("Lens-Turbo-Diffusers", "", "Lens-Turbo", "going by the name 'Lens-Turbo-Diffusers'"),
        ("lens_base", "", "Lens-Base", "going by the name 'lens_base'"),
        ("turbo/lens", "", "Lens", "going by the name 'lens'"),
        ("mine", "someone/Lens-Turbo", "Lens-Turbo", "going by the name 'Lens-Turbo'"),
        ("my-turbo", "someone/Lens-Base", "Lens-Turbo", "going by the name 'my-turbo'"),
        ("models--me--Lens-Base-Cats/snapshots/0123abc", "", "Lens-Base", "the name 'models--me--Lens-Base-Cats'"),
        ("models--YuCollection--Lens-Base-Diffusers/snapshots/01", "", "Lens-Base", "its repository is known"),
        ("models--SceneWorks--Lens-Turbo/snapshots/01", "", "Lens-Turbo", "its repository is known"),
        ("models--microsoft--Lens/snapshots/01", "", "Lens", "its repository is known"),
        ("database", "", "Lens", "nothing tells"),
        ("turbocharged", "", "Lens", "nothing tells"),
        ("lens-base-turbo", "", "Lens", "nothing tells"),
        ("checkpoint-300", "", "Lens", "nothing tells"),
    ],
)
def test_the_variant_follows_from_its_repository_or_a_word_of_its_name(
    tmp_path: Path, path: str, named: str, variant: str, sign: str
) -> None:
    index = json.dumps({"_class_name": "LensPipeline", "_name_or_path": named})
    described = describe(make(tmp_path / "here" / path, index))
    assert described is not None
    steps, guidance = {"Lens": (20, 5.0), "Lens-Turbo": (4, 1.0), "Lens-Base": (50, 5.0)}[variant]
    assert (described["presets"]["steps"], described["presets"]["guidance_scale"]) == (steps, guidance)
    assert described["note"].startswith(f"the preset of {variant}, as") or variant in described["note"]
    assert sign in described["note"]


def test_presets_are_not_shared_between_answers(tmp_path: Path) -> None:
    folder = make(tmp_path / "lens")
    first = describe(folder)
    assert first is not None
    first["presets"]["steps"] = 1
    assert describe(folder) != first


def test_other_folders_are_left_to_others(tmp_path: Path) -> None:
    assert describe(tmp_path) is None
    assert describe(make(tmp_path / "flux", index='{"_class_name": "FluxPipeline"}')) is None


@pytest.mark.parametrize(
    ("index", "config"),
    [
        ("{", "{}"),
        ('{"_class_name": "LensPipeline"}', "{"),
        ('{"_class_name": "LensPipeline"}', '{"_class_name": "FluxTransformer2DModel"}'),
    ],
)
def test_broken_or_foreign_json_is_a_checkpoint_error(tmp_path: Path, index: str, config: str) -> None:
    with pytest.raises(CheckpointError):
        describe(make(tmp_path / "lens", index, config))


def test_a_missing_transformer_is_a_checkpoint_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "lens")
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        describe(folder)


@pytest.mark.parametrize("variant", REPOSITORIES)
def test_a_withdrawn_original_is_answered_with_its_mirrors(variant: str, hub: Hub, tmp_path: Path) -> None:
    hub.publish(f"microsoft/{variant}", make(tmp_path / "impostor"))
    with pytest.raises(CheckpointError) as caught:
        fetch(f"microsoft/{variant}")
    mirrors = " or ".join(REPOSITORIES[variant])
    assert str(caught.value) == f"microsoft/{variant}: was withdrawn; the same files are in {mirrors}"
    assert hub.requests == []


def test_a_withdrawn_original_that_is_still_in_the_cache_is_read(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish("microsoft/Lens", make(tmp_path / "lens"))
    cached = tmp_path / "cache" / "models--microsoft--Lens"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    make(cached / "snapshots" / commit)
    assert fetch("microsoft/Lens") == fetch(f"microsoft/Lens@{commit}") == cached / "snapshots" / commit
    assert hub.requests == []


def test_offline_the_message_names_what_is_missing_and_another_mirror(
    hub: Hub, unplug: Callable[[Hub], None], tmp_path: Path
) -> None:
    unplug(hub)
    with pytest.raises(CheckpointError) as caught:
        fetch("SceneWorks/Lens-Turbo@v1")
    said = str(caught.value)
    assert said.startswith("SceneWorks/Lens-Turbo@v1: model_index.json is not in the cache")
    assert said.endswith("the same files are in YuCollection/Lens-Turbo-Diffusers") and "\n" not in said


def test_a_mirror_is_fetched_at_its_revision(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish("YuCollection/Lens-Diffusers", make(tmp_path / "lens"), "v1")
    hub.publish("YuCollection/Lens-Diffusers", make(tmp_path / "newer", config='{"num_layers": 2}'))
    folder = fetch("YuCollection/Lens-Diffusers@v1")
    assert folder is not None and folder.name == commit
    with pytest.raises(CheckpointError, match=r"no such branch, tag or commit; .*brings it$"):
        fetch("YuCollection/Lens-Diffusers@v2")  # it has no other mirror


def test_other_names_and_folders_are_left_to_others(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "microsoft" / "Lens")
    assert [fetch(uri) for uri in ("toys/Lens", "microsoft/Lens", "tiny:", "./Lens")] == [None] * 4
    assert hub.requests == []
