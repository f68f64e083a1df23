"""Both layouts, with the first-party parts: what is carried over draws the same picture, in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lens_flux2.vae import Flux2VAE
from lens_mmdit.model import LensTransformer2DModel
from lens_tools import convert as module
from lens_tools.convert import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_core.catalog import Catalog
from lens_core.checkpoints.lazy_tensors import LazyTensor, read_lazy, write_lazy
from lens_core.cli.main import main
from lens_core.inference.pipeline import LensPipeline
from lens_core.types import CheckpointError, ConfigError

SINGLE = {
    "backbone": "diffusion_models/lens.safetensors",
    "text_encoder": "text_encoders/gpt_oss.safetensors",
    "vae": "vae/flux2-vae.safetensors",
}
FOLDERS = {
    "backbone": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def installed() -> Catalog:
    return Catalog.installed()


@pytest.fixture(scope="module")
def tiny(installed: Catalog) -> Path:
    from lens_core.checkpoints.manifest import resolve_uri

    return resolve_uri("tiny:", installed)


@pytest.fixture(scope="module")
def singles(tiny: Path, installed: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny:` as Comfy keeps models."""
    out = tmp_path_factory.mktemp("comfy") / "models"
    convert(tiny, out, "single", None, installed)
    return out


def draw(pipeline: LensPipeline) -> Tensor:
    images: Tensor = pipeline(
        "a red circle", num_inference_steps=2, seed=1, height=32, width=32, output_type="pt"
    ).images
    return images


def weights(path: Path) -> dict[str, Tensor]:
    return {k: v for k, v in load_file(path).items() if k != "tokenizer_json"}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(v.dtype == two[k].dtype and torch.equal(v, two[k]) for k, v in one.items())


def error(call: Callable[[], object], kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_folder_becomes_a_file_a_part_without_a_change(tiny: Path, singles: Path) -> None:
    assert files(singles) == set(SINGLE.values())
    for part, place in SINGLE.items():
        assert same(weights(singles / place), weights(tiny / FOLDERS[part]))


def test_a_file_takes_the_place_of_its_part_alone(singles: Path) -> None:
    expected = LensPipeline.from_pretrained("tiny:")
    versions = {expected.version}
    for part, place in SINGLE.items():
        pipeline = LensPipeline.from_pretrained("tiny:", parts=(part,), **{part: singles / place})
        assert same(getattr(pipeline, part).state_dict(), getattr(expected, part).state_dict())
        assert pipeline.specs[part].use == expected.specs[part].use
        versions.add(pipeline.version)
    assert len(versions) == 4, "what has been put in shows in the hash"


def test_a_pipeline_of_files_is_saved_as_a_folder(singles: Path, tmp_path: Path) -> None:
    pipeline = LensPipeline.from_pretrained("tiny:", **{part: singles / place for part, place in SINGLE.items()})
    pipeline.save_pretrained(tmp_path / "model")
    expected = draw(LensPipeline.from_pretrained("tiny:"))
    assert torch.equal(draw(pipeline), expected)
    assert torch.equal(draw(LensPipeline.from_pretrained(tmp_path / "model")), expected)


def test_there_and_back_again_is_the_same_checkpoint(tiny: Path, installed: Catalog, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "copy", "diffusers", None, installed)
    assert same(weights(tmp_path / "copy" / FOLDERS["backbone"]), weights(tiny / FOLDERS["backbone"]))
    assert torch.equal(draw(LensPipeline.from_pretrained(tmp_path / "copy")), draw(LensPipeline.from_pretrained(tiny)))
    about = json.loads((tmp_path / "copy/lens.json").read_text())
    assert about["presets"] == json.loads((tiny / "lens.json").read_text())["presets"]
    assert set(about["components"]) == {"vae", "text_encoder", "backbone", "sampler"}
    index = json.loads((tmp_path / "copy/model_index.json").read_text())
    assert index["scheduler"][0] == "diffusers" and (tmp_path / "copy/scheduler/scheduler_config.json").is_file()


def test_where_it_came_from_and_its_licence_stay(tiny: Path, installed: Catalog, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "in")
    about = json.loads((tiny / "lens.json").read_text())
    (tmp_path / "in/lens.json").write_text(json.dumps(about | {"provenance": {"base_model": "org/model"}}))
    (tmp_path / "in/README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    convert(tmp_path / "in", tmp_path / "out", "diffusers", None, installed)
    data = json.loads((tmp_path / "out/lens.json").read_text())["provenance"]
    assert data == {"base_model": "org/model", "license": "mit"}


def test_casting_halves_the_files_and_config_json_says_so(tiny: Path, installed: Catalog, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "half", "diffusers", "bf16", installed)
    convert(tmp_path / "half", tmp_path / "full", "diffusers", "fp32", installed)
    for place in FOLDERS.values():
        stored, half, full = (weights(p / place) for p in (tiny, tmp_path / "half", tmp_path / "full"))
        floats = {k for k, v in stored.items() if v.is_floating_point()}
        assert all(torch.equal(half[k], stored[k].bfloat16()) and half[k].dtype == torch.bfloat16 for k in floats)
        assert all(torch.equal(full[k], half[k].float()) for k in floats) and full.keys() == half.keys()
    dtypes = {d: json.loads((tmp_path / d / "text_encoder/config.json").read_text())["dtype"] for d in ("half", "full")}
    assert dtypes == {"half": "bfloat16", "full": "float32"}


def test_one_file_becomes_one_sub_folder(singles: Path, installed: Catalog, tmp_path: Path) -> None:
    said = error(lambda: convert(singles / SINGLE["backbone"], tmp_path / "x", "diffusers", None, installed))
    assert "reads 2 layers of a text encoder, and the model it is for 4" in said
    torch.manual_seed(0)
    config = LensTransformer2DModel.Config(
        num_layers=2, num_attention_heads=2, enc_hidden_dim=8
    )  # heads of the published width
    net = LensTransformer2DModel(config)
    save_file({f"diffusion_model.{k}": v for k, v in net.state_dict().items()}, tmp_path / "mine.safetensors")
    made = convert(tmp_path / "mine.safetensors", tmp_path / "out", "diffusers", "bf16", installed)
    assert made == [tmp_path / "out" / FOLDERS["backbone"]]
    assert files(tmp_path / "out") == {FOLDERS["backbone"], "transformer/config.json"}
    again = LensTransformer2DModel.from_pretrained(tmp_path / "out/transformer")
    assert dict(again.config)["num_layers"] == 2
    assert same(weights(made[0]), {k: v.bfloat16() for k, v in net.state_dict().items()})
    convert(tmp_path / "mine.safetensors", tmp_path / "bare.safetensors", "single", None, installed)
    assert same(weights(tmp_path / "bare.safetensors"), dict(net.state_dict()))


def test_a_folder_of_files_is_a_model_and_becomes_a_checkpoint(
    tiny: Path, singles: Path, installed: Catalog, tmp_path: Path
) -> None:
    shutil.copytree(singles, tmp_path / "in", copy_function=lambda a, b: Path(b).symlink_to(a))
    about = json.loads((tiny / "lens.json").read_text())
    for part, place in SINGLE.items():
        about["components"][part]["file"] = place
    (tmp_path / "in/lens.json").write_text(json.dumps(about))
    made = convert(tmp_path / "in", tmp_path / "out", "diffusers", None, installed)
    assert made == [tmp_path / "out" / FOLDERS[part] for part in ("vae", "text_encoder", "backbone")]
    expected = draw(LensPipeline.from_pretrained(tiny))
    for folder in ("in", "out"):
        assert torch.equal(draw(LensPipeline.from_pretrained(tmp_path / folder)), expected)
    for place in ("/etc/passwd", "../x.safetensors"):
        about["components"]["vae"]["file"] = place
        (tmp_path / "in/lens.json").write_text(json.dumps(about))
        assert "has no components that each name what they use" in error(
            lambda: LensPipeline.from_pretrained(tmp_path / "in")
        )


def test_comfys_folder_is_a_model_by_its_layout(installed: Catalog, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = LensTransformer2DModel(LensTransformer2DModel.Config(num_layers=1, num_attention_heads=1, enc_hidden_dim=8))
    (tmp_path / "lens_turbo/diffusion_models").mkdir(parents=True)
    save_file(net.state_dict(), tmp_path / "lens_turbo/diffusion_models/a.safetensors")
    pipeline = LensPipeline.from_pretrained(tmp_path / "lens_turbo")
    assert pipeline.presets["steps"] == 4 and same(pipeline.backbone.state_dict(), dict(net.state_dict()))


def test_experts_in_mxfp4_stay_so_in_every_layout(tiny: Path, installed: Catalog, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "in")
    path = tmp_path / "in" / FOLDERS["text_encoder"]
    state, rng = load_file(path), torch.Generator().manual_seed(0)
    for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8, generator=rng
        )
        state[f"{name}_scales"] = torch.randint(118, 122, (experts, out, inner // 32), dtype=torch.uint8, generator=rng)
    save_file(state, path)
    about = json.loads((tmp_path / "in/lens.json").read_text())
    about["components"]["text_encoder"]["config"]["experts"] = "auto"
    (tmp_path / "in/lens.json").write_text(json.dumps(about))
    expected = LensPipeline.from_pretrained(tmp_path / "in")
    assert "experts stay in mxfp4" in expected.notes[0]
    convert(tmp_path / "in", tmp_path / "single", "single", None, installed)
    convert(tmp_path / "in", tmp_path / "half", "diffusers", "bf16", installed)
    packed = {k: v for k, v in state.items() if k.endswith(("_blocks", "_scales"))}
    for file in (tmp_path / "single" / SINGLE["text_encoder"], tmp_path / "half" / FOLDERS["text_encoder"]):
        assert same({k: v for k, v in load_file(file).items() if k in packed}, packed)
    file = tmp_path / "single" / SINGLE["text_encoder"]
    assert torch.equal(draw(LensPipeline.from_pretrained(tmp_path / "in", text_encoder=file)), draw(expected))
    for part, place in SINGLE.items():
        about["components"][part]["file"] = place
    (tmp_path / "single/lens.json").write_text(json.dumps(about))
    convert(tmp_path / "single", tmp_path / "back", "diffusers", None, installed)
    assert same(load_file(tmp_path / "back" / FOLDERS["text_encoder"]), state)
    config = json.loads((tmp_path / "back/text_encoder/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4" and config["num_hidden_layers"] == 4


# ---- parts that another checkpoint shares -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharing(tiny: Path, installed: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny:` with another backbone, which names `tiny:` for the rest."""
    base = tmp_path_factory.mktemp("sharing")
    pipeline = LensPipeline.from_pretrained(tiny)
    with torch.no_grad():
        for p in pipeline.backbone.parameters():
            p.mul_(1.01)
    pipeline.save_pretrained(base / "whole")
    convert(base / "whole", base / "shared", "diffusers", None, installed, share="tiny:")
    return base / "shared"


def test_parts_that_are_anothers_are_named_and_draw_the_same(sharing: Path, installed: Catalog, tmp_path: Path) -> None:
    whole = sharing.with_name("whole")
    assert {f for f in files(sharing) if f.endswith(".safetensors")} == {FOLDERS["backbone"]}
    index = json.loads((sharing / "model_index.json").read_text())
    assert set(index) == {"_class_name", "scheduler", "transformer"}, "what is not there is not promised to other tools"
    assert "text encoder | `lens_gpt_oss:gpt_oss`, that of `tiny:` |" in (sharing / "README.md").read_text()
    expected = draw(LensPipeline.from_pretrained(whole))
    pipeline = LensPipeline.from_pretrained(sharing)
    assert torch.equal(draw(pipeline), expected)
    assert not torch.equal(expected, draw(LensPipeline.from_pretrained("tiny:")))
    pipeline.save_pretrained(tmp_path / "saved")
    convert(sharing, tmp_path / "converted", "diffusers", None, installed)
    for folder in (tmp_path / "saved", tmp_path / "converted"):
        assert set(FOLDERS.values()) <= files(folder) and '"from"' not in (folder / "lens.json").read_text()
        assert torch.equal(draw(LensPipeline.from_pretrained(folder)), expected)
    made = convert(sharing, tmp_path / "single", "single", None, installed)
    assert {str(p.relative_to(tmp_path / "single")) for p in made} == set(SINGLE.values())


def test_a_shared_encoder_shares_the_features_that_are_kept(
    sharing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(LensPipeline.from_pretrained("tiny:", prompt_cache=tmp_path))
    pipeline = LensPipeline.from_pretrained(sharing, prompt_cache=tmp_path)
    pipeline.store.deferred["text_encoder"] = lambda: pytest.fail("the encoder was read")
    draw(pipeline)


def test_a_shared_part_must_be_what_it_was(sharing: Path, installed: Catalog, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharing, folder)
    about = json.loads((folder / "lens.json").read_text())

    def message_for(part: str, **changes: object) -> str:
        components = about["components"] | {part: {**about["components"][part], **changes}}
        (folder / "lens.json").write_text(json.dumps(about | {"components": components}))
        return error(lambda: LensPipeline.from_pretrained(folder))

    held = about["components"]["vae"]["hash"]
    assert f"its vae is that of tiny: as it was at {'0' * 16}, and it is at {held} now" in message_for(
        "vae", hash="0" * 16
    )
    assert "its vae is that of tiny:none, which cannot be had: no embedded checkpoint" in message_for(
        "vae", **{"from": "tiny:none"}
    )
    assert "that of tiny:turbo, which has none of its own" in message_for("text_encoder", **{"from": "tiny:turbo"})
    wrong = (
        "/etc",
        "../tiny",
        "~/tiny",
        ".",
        "",
        7,
        "https://example.org/model",
        "org/..",
        "a/b@../..",
        "a/b@x\ny",
        "tiny:\n",
    )
    for uri in wrong:
        assert f"its 'vae' is to come from {uri!r} at" in message_for("vae", **{"from": uri})
    for hash_ in (None, "", "0" * 15, "x\n" + "0" * 14):
        assert f"its 'vae' is to come from 'tiny:' at {hash_!r}; a vae, " in message_for("vae", hash=hash_)
    assert "its 'sampler' is to come from" in message_for("sampler", hash="0" * 16, **{"from": "tiny:"})


def test_a_single_file_takes_the_place_of_a_part_whose_source_is_gone(
    sharing: Path, singles: Path, tmp_path: Path
) -> None:
    shutil.copytree(sharing, tmp_path / "model")
    about = json.loads((sharing / "lens.json").read_text())
    about["components"]["vae"]["from"] = "tiny:none"
    (tmp_path / "model/lens.json").write_text(json.dumps(about))
    pipeline = LensPipeline.from_pretrained(tmp_path / "model", vae=singles / SINGLE["vae"])
    assert torch.equal(draw(pipeline), draw(LensPipeline.from_pretrained(sharing)))


def test_a_part_that_config_json_makes_another_is_not_shared(sharing: Path, installed: Catalog, tmp_path: Path) -> None:
    """A component may be told in `lens.json` by its name alone, as a published folder's are: its own file decides."""
    shutil.copytree(sharing.with_name("whole"), tmp_path / "in")
    path = tmp_path / "in/text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    convert(tmp_path / "in", tmp_path / "out", "diffusers", None, installed, share="tiny:")
    components = json.loads((tmp_path / "out/lens.json").read_text())["components"]
    assert "from" in components["vae"] and "from" not in components["text_encoder"]


def test_a_loan_is_passed_on_and_kept(sharing: Path, installed: Catalog, tmp_path: Path) -> None:
    """`tiny:rl` itself borrows its encoder from `tiny:`, not the VAE; and what is shared stays so where the origin
    has no such part."""
    convert(sharing.with_name("whole"), tmp_path / "one", "diffusers", None, installed, share="tiny:rl")
    about = json.loads((sharing / "lens.json").read_text())["components"]
    passed_on = json.loads((tmp_path / "one/lens.json").read_text())["components"]
    assert passed_on["text_encoder"] == about["text_encoder"] and passed_on["text_encoder"]["from"] == "tiny:"
    assert "from" in about["vae"] and "from" not in passed_on["vae"]
    convert(sharing, tmp_path / "two", "diffusers", None, installed, share="tiny:rl")
    assert json.loads((tmp_path / "two/lens.json").read_text())["components"] == about


def test_what_cannot_be_shared_is_reported(tiny: Path, sharing: Path, installed: Catalog, tmp_path: Path) -> None:
    whole = sharing.with_name("whole")
    shutil.copytree(whole, tmp_path / "other")
    for place in (FOLDERS["vae"], FOLDERS["text_encoder"]):
        save_file(
            {k: v + 1 if v.is_floating_point() else v for k, v in load_file(whole / place).items()},
            tmp_path / "other" / place,
        )
    for source, layout, dtype, share, words in [
        (
            whole,
            "diffusers",
            None,
            str(tiny),
            "is no name that holds everywhere; use a Hub id org/name@revision, or tiny:",
        ),
        (whole, "diffusers", "bf16", "tiny:", "leave --layout and --dtype out"),
        (whole, "single", None, "tiny:", "leave --layout and --dtype out"),
        (tmp_path / "other", "diffusers", None, "tiny:", "has no part that is the same in this checkpoint"),
    ]:
        said = error(lambda: convert(source, tmp_path / "x", layout, dtype, installed, share), ConfigError)  # noqa: B023
        assert words in said
        assert not (tmp_path / "x").exists()


# ---- memory -----------------------------------------------------------------------------------------------------


def test_a_conversion_holds_no_more_than_a_piece(
    tiny: Path, installed: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lens_core.checkpoints import lazy_tensors

    monkeypatch.setattr(lazy_tensors, "PIECE", 2**14)
    made: list[int] = []
    opened = module.read_lazy

    def watched(*paths: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
        tensors, texts = opened(*paths)

        def watch(tensor: LazyTensor) -> LazyTensor:
            def rows(dtype: torch.dtype):  # type: ignore[no-untyped-def]  # an iterator of tensors
                for block in tensor.rows(dtype):
                    made.append(block.nbytes)
                    yield block

            return LazyTensor(tensor.shape, tensor.dtype, rows)

        return {k: watch(v) for k, v in tensors.items()}, texts

    monkeypatch.setattr(module, "read_lazy", watched)
    monkeypatch.setattr(LazyTensor, "read", lambda *_: pytest.fail("a whole tensor was read"))
    convert(tiny, tmp_path / "out", "diffusers", None, installed)
    largest = max(v[:1].nbytes for p in FOLDERS.values() for v in load_file(tiny / p).values() if v.ndim)
    assert max(made) <= max(2**14, largest) and sum(made) == sum(
        (tiny / p).stat().st_size for p in FOLDERS.values()
    ) - sum(8 + int.from_bytes((tiny / p).read_bytes()[:8], "little") for p in FOLDERS.values())


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from lens_core.checkpoints import lazy_tensors as lazy
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(source):
    tensors, _ = lazy.read_lazy(Path(source))
    lazy.write_lazy(Path(sys.argv[3]), tensors, torch.float32)
lazy.PIECE = 2**20
run(sys.argv[1])  # whatever is loaded by the way
before = peak()
run(sys.argv[2])
print(peak() - before)
"""


def sparse(path: Path, rows: int) -> str:
    """A bfloat16 matrix of zeros that takes no room on disk."""
    header = json.dumps({"a": {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 2048)
    return str(path)


def test_a_process_grows_by_pieces_not_by_the_file(tmp_path: Path) -> None:
    """64 MB of bfloat16 become 128 MB of float32 within 16 MB."""
    paths = [sparse(tmp_path / "small", 2048), sparse(tmp_path / "large", 2**15), str(tmp_path / "out")]
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    assert (tmp_path / "out").stat().st_size > 2**27
    assert int(run.stdout) < 16 * 1024


# ---- bad input --------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_for_is_reported(tiny: Path, singles: Path, installed: Catalog, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    for source, out, layout, dtype, words in [
        (tiny, "x", "gguf", None, "no layout is called 'gguf'; use diffusers or single"),
        (tiny, "x", "single", "fp16", "no dtype is called 'fp16'; use bf16 or fp32"),
        (tiny, "x.safetensors", "single", None, "one file is for one part"),
        (tiny, "x.safetensors", "diffusers", None, "one file is for one part"),
    ]:
        assert words in error(lambda: convert(source, tmp_path / out, layout, dtype, installed), ConfigError)  # noqa: B023
    assert "is there already" in error(lambda: convert(tiny, tmp_path / "full", "single", None, installed))
    assert files(tmp_path) == {"full/thesis.tex"}


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    tiny: Path, installed: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    assert "GB are needed and 0.0 free" in error(lambda: convert(tiny, tmp_path / "x", "single", None, installed))
    assert not (tmp_path / "x").exists()


def test_a_conversion_that_fails_leaves_nothing(
    tiny: Path, installed: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / "in")
    broken = tmp_path / "in" / FOLDERS["backbone"]
    broken.write_bytes(broken.read_bytes()[:-1])
    assert "not a whole safetensors file" in error(
        lambda: convert(tmp_path / "in", tmp_path / "o", "single", None, installed)
    )
    calls: list[Path] = []

    def fail(path: Path, *rest: object) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_lazy(path, *rest)  # type: ignore[arg-type]  # as it is called

    monkeypatch.setattr(module, "write_lazy", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny, tmp_path / "o", "diffusers", None, installed)
    assert len(calls) == 3 and [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("part", list(SINGLE))
def test_a_file_in_the_place_of_another_part_is_reported(part: str, singles: Path) -> None:
    wrong = singles / SINGLE["vae" if part == "backbone" else "backbone"]
    assert f"{wrong}: holds " in (said := error(lambda: LensPipeline.from_pretrained("tiny:", **{part: wrong})))
    assert "not a" in said


def test_a_file_that_no_plugin_knows_is_reported(installed: Catalog, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert "nor a layout that an installed plugin knows" in error(
        lambda: LensPipeline.from_pretrained(tmp_path / "a.safetensors")
    )


def test_a_toy_part_reads_no_files(checkpoint: Path, tmp_path: Path) -> None:
    import toy

    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    said = error(
        lambda: LensPipeline.from_pretrained(checkpoint, catalog=Catalog.of(toy), vae=tmp_path / "a.safetensors"),
        ConfigError,
    )
    assert "toy:blocks reads no single files" in said


# ---- the command line -------------------------------------------------------------------------------------------


def test_the_commands_convert_and_draw(singles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tiny:", str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    draw = ["generate", "a red circle", "--steps", "1", "--size", "32x32", "--seed", "1"]
    parts = [w for part, place in SINGLE.items() for w in (f"--{part.replace('_', '-')}", str(singles / place))]
    assert main([*draw, "--output", str(tmp_path / "a.png"), *parts]) == 0
    assert main([*draw, "--output", str(tmp_path / "b.png")]) == 0
    assert main(["generate", "--reproduce", str(tmp_path / "a.png"), *parts]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(["generate", "--reproduce", str(tmp_path / "a.png")]) == 2
    assert "this is hash" in capsys.readouterr().err
    assert main(["generate", "x", "--backbone", str(tmp_path / "none.safetensors"), "-o", str(tmp_path / "c.png")]) == 2
    assert "none.safetensors: missing" in capsys.readouterr().err
    assert main(["convert", "tiny:turbo", str(tmp_path / "turbo"), "--share", "tiny:"]) == 0
    assert not (tmp_path / "turbo/text_encoder").exists() and "transformer" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "a.png"), str(tmp_path / "x")]) == 2
    assert "or one file, .safetensors or .gguf" in capsys.readouterr().err


def test_a_single_backbone_is_a_model_without_the_other_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    net = LensTransformer2DModel(LensTransformer2DModel.Config(num_layers=1, num_attention_heads=1, enc_hidden_dim=8))
    save_file(net.state_dict(), tmp_path / "lens_turbo.safetensors")
    pipeline = LensPipeline.from_pretrained(tmp_path / "lens_turbo.safetensors")
    assert (
        pipeline.presets["steps"] == 4
        and pipeline.vae is None
        and pipeline.specs["backbone"].options["num_layers"] == 1
    )
    assert (
        main(["generate", "x", "--model", str(tmp_path / "lens_turbo.safetensors"), "-o", str(tmp_path / "c.png")]) == 2
    )
    assert "there is no vae and no text encoder in this pipeline" in capsys.readouterr().err


def test_parts_that_a_model_lacks_may_be_given(singles: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = LensTransformer2DModel(LensTransformer2DModel.Config(num_layers=1, num_attention_heads=1, enc_hidden_dim=8))
    save_file(net.state_dict(), tmp_path / "lens.safetensors")
    said = error(lambda: LensPipeline.from_pretrained(tmp_path / "lens.safetensors", vae=tmp_path / "lens.safetensors"))
    assert "is no vae, but a backbone" in said
    with torch.device("meta"):
        state = Flux2VAE(Flux2VAE.Config(layers_per_block=1)).net.state_dict()
    zero = {
        k: LazyTensor(tuple(v.shape), v.dtype, lambda d, s=v.shape: iter([torch.zeros(s, dtype=d)]))
        for k, v in state.items()
    }
    write_lazy(tmp_path / "vae.safetensors", zero)
    said = error(lambda: LensPipeline.from_pretrained(tmp_path / "lens.safetensors", vae=tmp_path / "vae.safetensors"))
    assert "its layers_per_block is 1, but that of the model it is for is 2" in said
    assert read_lazy(tmp_path / "vae.safetensors")[0].keys() == state.keys()


@pytest.mark.parametrize("name", [".", "new", "empty"])
def test_an_empty_folder_is_filled_even_the_one_that_we_are_in(
    name: str, tiny: Path, installed: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if name == "." else tmp_path)
    convert(tiny, Path(name), "diffusers", None, installed)
    assert same(weights(Path(name) / FOLDERS["backbone"]), weights(tiny / FOLDERS["backbone"]))
    assert (Path(name) / "lens.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    with pytest.raises(CheckpointError, match="is there already"):
        convert(tiny, Path(name), "diffusers", None, installed)


def test_floats_of_8_bits_without_scales_are_refused_in_a_folder_too(
    tiny: Path, installed: Catalog, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "in")
    path = tmp_path / "in" / FOLDERS["backbone"]
    tensors = weights(path)
    name = next(n for n in tensors if n.endswith("img_qkv.weight"))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path)
    for act in (
        lambda: LensPipeline.from_pretrained(tmp_path / "in"),
        lambda: convert(tmp_path / "in", tmp_path / "out", "diffusers", None, installed),
        lambda: convert(tmp_path / "in", tmp_path / "out", "single", "bf16", installed),
    ):
        with pytest.raises(CheckpointError, match=f"{name} is torch.float8_e4m3fn in a format that the file does not"):
            act()
