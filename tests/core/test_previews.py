"""Step previews: a linear map from latents to small pictures, where it is kept, and what is shown after each step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from lens_core.catalog import Catalog
from lens_core.checkpoints import integrity, latent_preview, manifest
from lens_core.cli.main import main
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pixels import to_pixels
from lens_core.types import CheckpointError, ConfigError

EMBEDDED = ("tiny:", "tiny:rl", "tiny:turbo")
FILE = f"vae/{manifest.PREVIEW_FILE}"


def linear_map(side: int) -> tuple[latent_preview.PreviewFit, torch.Tensor, torch.Tensor]:
    """A fit to pictures that are a linear function of their latents, and that function."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * side**2, 5, generator=rng) / 30  # within [-1, 1], where nothing is clamped
    fit = latent_preview.PreviewFit(5, side)
    for _ in range(3):
        z = torch.randn(2, 5, 4, 6, generator=rng)
        cells = torch.nn.functional.pixel_shuffle(torch.einsum("oc,bchw->bohw", weight, z), side)
        fit.add(z, interpolate(cells, scale_factor=8 // side))  # the VAE's picture, of 8 px a cell
    z = torch.randn(1, 5, 4, 6, generator=rng)
    return fit, z, torch.nn.functional.pixel_shuffle(torch.einsum("oc,bchw->bohw", weight, z), side)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_linear_vae_is_fitted_exactly(side: int, tmp_path: Path) -> None:
    fit, z, expected = linear_map(side)
    preview = fit.solve(iter([(z, interpolate(expected, scale_factor=8 // side))]))
    assert preview.error < 0.1 and preview.pictures == 6
    torch.testing.assert_close(preview.pixels(z), expected, atol=1e-3, rtol=0)
    preview.write(tmp_path)
    again = latent_preview.read(tmp_path / FILE, 5)
    torch.testing.assert_close(again.pixels(z), expected, atol=1e-3, rtol=0)


def test_the_error_is_measured_on_pictures_that_the_fit_has_not_seen() -> None:
    fit, z, expected = linear_map(2)
    off = fit.solve(iter([(z, (interpolate(expected, scale_factor=4) + 0.1).clamp(-1, 1))]))
    assert off.error == pytest.approx(0.1 * 127.5, rel=0.05)
    with pytest.raises(ConfigError, match="no pictures left"):
        fit.solve(iter([]))
    with pytest.raises(ConfigError, match="no pictures to fit"):
        latent_preview.PreviewFit(5, 2).solve(iter([]))
    with pytest.raises(ConfigError, match="side must be one of 1, 2, 4, 8, not 3"):
        latent_preview.PreviewFit(5, 3)


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_checkpoint_has_a_map_that_its_hash_does_not_count(name: str) -> None:
    folder = manifest.resolve_uri(name, Catalog.installed())
    assert (folder / FILE).is_file()
    assert FILE not in manifest.hashes(folder)
    pipeline = LensPipeline.from_pretrained(name, device="cpu", parts=("vae",))
    assert pipeline.latent_preview is not None and pipeline.latent_preview.error < 20


def test_the_embedded_model_is_the_one_that_was_measured() -> None:
    measured = json.loads(Path("docs/results/tiny/128/seed-0/result.json").read_text(encoding="utf-8"))
    assert manifest.digest(manifest.resolve_uri("tiny:", Catalog.installed())) in json.dumps(measured)


def test_a_preview_of_a_picture_is_as_near_as_its_file_says() -> None:
    from lens_shapes.dataset import ShapesDataset

    pipeline = LensPipeline.from_pretrained("tiny:", device="cpu", parts=("vae",))
    batch = next(ShapesDataset(ShapesDataset.Config(batch=8, seed=99, sizes=((128, 128),))).batches(0, 1))
    assert isinstance(batch.images, torch.Tensor) and pipeline.latent_preview is not None
    with torch.no_grad():
        z = pipeline.vae.encode(to_pixels(batch.images))
        truth = latent_preview.small(pipeline.decode(z), z, 4)
    error = (to_pixels(pipeline.preview(z)) - truth).square().mean().sqrt() * 127.5
    assert tuple(pipeline.preview(z).shape) == (8, 3, 64, 64)
    assert float(error) < 1.5 * pipeline.latent_preview.error
    assert float((truth - truth.mean()).square().mean().sqrt() * 127.5) > 3 * float(error)


def test_the_callback_gets_the_picture_as_it_looks_now(pipeline: LensPipeline) -> None:
    seen: list[dict[str, Any]] = []
    result = pipeline("a", seed=1, height=32, width=32, output_type="latent",
                      callback_on_step_end=lambda p, i, t, v: seen.append({"t": t, **v}))  # fmt: skip
    assert torch.equal(seen[-1]["denoised"], result.images)  # at t = 0 it is the picture
    noise = pipeline.noise([torch.Generator().manual_seed(1)], (2, 2))
    # Euler's step ends at x = noise - (1 - t) v, and the data it points at is noise - v.
    velocity = (noise - seen[0]["latents"]) / (1 - seen[0]["t"])
    torch.testing.assert_close(seen[0]["denoised"], noise - velocity, atol=1e-5, rtol=1e-5)
    assert torch.equal(result.images, pipeline("a", seed=1, height=32, width=32, output_type="latent").images)


def test_a_map_travels_with_its_vae(pipeline: LensPipeline, catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no map for previews; lens fit-preview"):
        pipeline.preview(torch.zeros(1, 4, 2, 2))
    pipeline.save_pretrained(tmp_path / "plain")
    weight, bias = torch.zeros(3, 4), torch.tensor([0.5, 0.0, -0.5])
    pipeline.latent_preview = latent_preview.LatentPreview(weight, bias, 1, 3.0, 7)
    pipeline.save_pretrained(tmp_path / "mapped")
    assert manifest.digest(tmp_path / "plain") == manifest.digest(tmp_path / "mapped")
    described = manifest.read_manifest(tmp_path / "mapped", catalog)
    assert FILE not in described["files"] and integrity.check(tmp_path / "mapped", described).problems == []
    read = LensPipeline.from_pretrained(tmp_path / "mapped", catalog=catalog, device="cpu")
    assert read.preview(torch.ones(1, 4, 2, 2))[0, :, 0, 0].tolist() == [191, 128, 64]
    read.vae = read.vae  # the same part: the map stays
    assert read.latent_preview is not None
    read.put("vae", type(read.vae)(None), read.specs["vae"])
    assert read.latent_preview is None
    read.save_pretrained(tmp_path / "mapped")
    assert not (tmp_path / "mapped" / FILE).exists()  # a map of a VAE that is gone would show other colours


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "has the format 2"),
        ({"side": 3}, "the side 3"),
        ({"side": True}, "the side True"),
        ({"side": 2}, "must be 12 rows of 4 finite numbers"),
        ({"weight": [[0.0] * 4] * 2}, "must be 3 rows"),
        ({"weight": [[0.0] * 5] * 3}, "must be 3 rows of 4"),
        ({"weight": [[0.0, 0.0, 0.0, 1e300]] * 3}, "finite numbers"),
        ({"weight": [[0.0, 0.0, 0.0, "1"]] * 3}, "finite numbers"),
        ({"weight": "no"}, "must be 3 rows"),
        ({"bias": [0.0]}, "its bias 3"),
        ({"error": "small"}, "are no numbers"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format": 1, "format": 1}', "a key stands twice"),
        ('{"format": NaN}', "NaN is no number"),
    ],
)
def test_a_broken_map_is_refused_when_it_is_used_and_stops_no_picture(
    change: Any, words: str, pipeline: LensPipeline, catalog: Catalog, tmp_path: Path
) -> None:
    pipeline.latent_preview = latent_preview.LatentPreview(torch.zeros(3, 4), torch.zeros(3), 1, 1.0, 1)
    pipeline.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / FILE
    sound = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(change if isinstance(change, str) else json.dumps({**sound, **change}), encoding="utf-8")
    read = LensPipeline.from_pretrained(tmp_path / "model", catalog=catalog, device="cpu")
    assert len(read("a", height=32, width=32, seed=1).images) == 1
    with pytest.raises(CheckpointError, match=FILE) as error:
        read.preview(torch.zeros(1, 4, 2, 2))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_generate_shows_a_picture_while_it_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = tmp_path / "now.png"
    flags = ("--model", "tiny:turbo", "--device", "cpu", "--seed", "3", "--steps", "2", "--num-images", "2")
    assert main(["generate", "a red circle", *flags, "-o", "a.png", "--preview", str(shown)]) == 0
    with Image.open(shown) as small, Image.open("a-0000.png") as drawn:
        assert small.size == (drawn.width, drawn.height // 2)  # two pictures side by side, 4 px for each cell of 8
    assert main(["generate", "a red circle", *flags, "-o", "c.png", "--preview", str(shown)]) == 0, "over a preview"
    assert main(["generate", "a red circle", *flags, "-o", "b.png"]) == 0
    assert Path("a-0001.png").read_bytes() == Path("b-0001.png").read_bytes()


def test_a_model_without_a_map_says_how_to_make_one(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_PLUGINS", "")
    monkeypatch.chdir(tmp_path)
    assert main(["fit-preview", "no/folder"]) == 2
    assert "is no folder of a checkpoint" in capsys.readouterr().err


def test_fit_preview_writes_a_map_and_leaves_the_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    catalog = Catalog.installed()
    source = manifest.resolve_uri("tiny:", catalog)
    shutil.copytree(source / "vae", tmp_path / "m" / "vae", ignore=shutil.ignore_patterns(manifest.PREVIEW_FILE))
    about = json.loads((source / "lens.json").read_text(encoding="utf-8"))
    about["components"] = {"vae": about["components"]["vae"]}
    (tmp_path / "m" / "lens.json").write_text(json.dumps(about), encoding="utf-8")
    before = manifest.digest(tmp_path / "m")
    options = ("--pictures", "{use: shapes, batch: 4, sizes: [[64, 64]]}", "--limit", "20", "--side", "2")
    assert main(["fit-preview", str(tmp_path / "m"), *options, "--device", "cpu"]) == 0
    assert "fitted to 16 pictures" in capsys.readouterr().out
    assert manifest.digest(tmp_path / "m") == before
    assert latent_preview.read(tmp_path / "m" / FILE, 32).side == 2
    for n in range(5):
        Image.new("RGB", (80 + n, 64), (40 * n, 0, 0)).save(tmp_path / f"{n}.png")
    assert (
        main(["fit-preview", str(tmp_path / "m"), "--pictures", str(tmp_path), "--size", "32", "--device", "cpu"]) == 0
    )
    assert "fitted to 4 pictures" in capsys.readouterr().out
    for arguments, words in (
        (("--pictures", str(tmp_path / "m")), "holds 0 pictures"),
        (("--pictures", "./nowhere"), "no such folder"),
        (("--pictures", "shapez"), "Did you mean 'shapes'"),
        (("--side", "3"), "side must be one of"),
        (("--limit", "1"), "limit"),
    ):
        assert main(["fit-preview", str(tmp_path / "m"), *arguments, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
