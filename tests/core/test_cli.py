"""The command line: what it prints, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lens_core import catalog as catalogs
from lens_core.__main__ import main
from lens_core.catalog import Catalog
from lens_core.checkpoint import read_weights, save_tensors


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch, catalog: Catalog, tmp_path: Path) -> None:
    """Every command sees the toy plugin and works in a folder of its own."""
    monkeypatch.setattr(catalogs.Catalog, "installed", classmethod(lambda cls: catalog))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def draw(checkpoint: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(checkpoint), "--size", "32x48", "--device", "cpu", *arguments])


def look(path: str) -> tuple[tuple[int, int], bytes, dict[str, Any]]:
    """A picture's size, pixels and facts."""
    with Image.open(path) as picture:
        return picture.size, picture.tobytes(), json.loads(picture.info["lens"])


def refused(capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr; nothing on stdout and nothing in the working folder."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lens: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert code == 2
    return err


def test_a_picture_carries_what_drew_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(checkpoint, "a red cat", "--seed", "7", "-o", "cat.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    size, _, facts = look("cat.png")
    assert size == (48, 32)
    assert facts["prompt"] == "a red cat" and facts["seed"] == 7 and facts["steps"] == 3
    assert facts["model_hash"] == told["model_hash"] and told["file"] == "cat.png"


def test_a_lora_changes_the_picture_by_its_weight(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    high, wide = read_weights(checkpoint / "transformer")["inner.weight"].shape
    low = {
        "transformer.inner.lora_A.weight": torch.ones(1, wide),
        "transformer.inner.lora_B.weight": torch.ones(high, 1),
    }
    save_tensors(Path("a.safetensors"), low)
    for name, loras in {"plain": (), "none": ("a.safetensors:0",), "all": ("a.safetensors",)}.items():
        flags = [word for lora in loras for word in ("--lora", lora)]
        assert draw(checkpoint, "a red cat", "--seed", "7", "-o", f"{name}.png", *flags) == 0
    (_, plain, facts), (_, none, _), (_, full, told) = (look(f"{n}.png") for n in ("plain", "none", "all"))
    assert none == plain != full
    assert "loras" not in facts and told["loras"] == ["a.safetensors:1"]
    capsys.readouterr()
    assert "b.safetensors: there is no such LoRA" in refused(
        capsys, draw(checkpoint, "x", "--lora", "b.safetensors:0.5")
    )


def test_pictures_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    Path("p.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    for name, batch in (("a", "8"), ("b", "3")):
        Path(name).mkdir()
        assert (
            draw(
                checkpoint,
                "--prompts",
                "p.txt",
                "--images",
                "2",
                "--batch",
                batch,
                "--seed",
                "1",
                "-o",
                f"{name}/x.png",
            )
            == 0
        )
    names = [f"x-000{i}.png" for i in range(4)]
    assert sorted(p.name for p in Path("a").iterdir()) == names
    for name in names:
        (_, first, facts), (_, other, same) = look(f"a/{name}"), look(f"b/{name}")
        assert facts["seed"] == same["seed"]
        assert max(abs(p - q) for p, q in zip(first, other, strict=True)) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one prompt, or a file of prompts"),
        (["a", "--prompts", "p.txt"], "give one prompt, or a file of prompts"),
        (["  "], "the prompt is empty"),
        (["--prompts", "none.txt"], "none.txt: cannot be read"),
        (["--prompts", "blank.txt"], "blank.txt: holds no prompt"),
        (["--prompts", "latin.txt"], "latin.txt: is not UTF-8 (byte 3)"),
        (["a", "--size", "30x32"], "height 30 is not a multiple of 16 px"),
        (["a", "--size", "32"], "size '32' must be HEIGHTxWIDTH"),
        (["a", "--size", "0x32"], "size '0x32' must be HEIGHTxWIDTH"),
        (["a", "--aspect-ratio", "3:2"], "give height and width, or an aspect ratio, not both"),
        (["a", "--seed", "-1"], "seed -1 must be between"),
        (["a", "--steps", "0"], "steps must be at least 1, not 0"),
        (["a", "--images", "0"], "images and batch must be at least 1"),
        (["a", "--batch", "0"], "images and batch must be at least 1"),
        (["a", "-o", "x.jpg"], "pictures are written as .png; use x.png"),
        (["a", "-o", "no/x.png"], "there is no such folder"),
        (["a", "-o", "folder.png"], "is a folder; name a .png file"),
        (["a", "--model", "nowhere"], "no such folder, and not a Hub name"),
        (["a", "--model", "empty"], "neither lens.json nor a layout"),
        (["a", "--device", "warp"], "no device is called 'warp'"),
        (["a", "--dtype", "float16"], "overflows in float16"),
        (["a", "--dtype", "float46"], "no dtype is called 'float46'"),
        (["a", "--sead", "1"], "--sead"),
        (["a", "--seed", "one"], "seed"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("blank.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    Path("folder.png").mkdir()
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    rest = [] if "--size" in arguments else ["--size", "32x48"]
    rest += [] if "--model" in arguments else ["--model", str(checkpoint)]
    code = main(["generate", *arguments, *rest])
    assert words in refused(capsys, code)
    assert sorted(Path().rglob("*")) == before


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "genrate" in refused(capsys, main(["genrate"]))


RECIPE = """
pipeline: {vae: blocks, text_encoder: letters, backbone: mixer, sampler: even}
method: fit
dataset: squares
train: {steps: 2}
"""


def test_a_recipe_is_trained_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(RECIPE)
    assert main(["train", "r.yaml"]) == 0
    assert capsys.readouterr().out.startswith("runs/r/model  2 steps")
    assert main(["bench", "reds", "--model", "runs/r/model", "--size", "16x16", "--device", "cpu"]) == 0
    assert "| red |" in capsys.readouterr().out
    result = json.loads(Path("runs/bench-reds/result.json").read_text())
    assert result["tasks"]["other"]["missing"] == 2 and len(result["pictures"]) == 4
    assert sorted(p.name for p in Path("runs/bench-reds").iterdir()) == ["result.json", "sheet.png", "table.md"]


def test_a_bad_recipe_tells_each_problem_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(RECIPE.replace("vae: blocks", "vae: blocs").replace("steps: 2", "stepz: 2"))
    assert main(["train", "r.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Did you mean 'blocks'?" in err and "$.train.stepz: unknown" in err
    assert not Path("runs").exists()


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no benchmark is called 'redz'. Did you mean 'reds'?" in refused(capsys, main(["bench", "redz"]))


def test_plugins_are_listed_with_what_they_offer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "toy" and {"vae", "method"} <= set(row["offers"]) and row["error"] is None


def run(*code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_help_and_plugins_import_no_model_library() -> None:
    script = """
import sys
from lens_core.__main__ import main
assert main(["--help"]) == 0
assert main(["plugins"]) == 0
heavy = {"torch", "diffusers", "transformers", "numpy", "accelerate", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout and "lens_flux2" in done.stdout and "set aside" not in done.stdout


def test_the_module_runs_as_a_program() -> None:
    done: Any = run("-m", "lens_core", "plugins", LENS_PLUGINS="shapes")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["lens_shapes"]


def test_a_plugins_command_runs_by_its_name(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from lens_core import catalog as catalogs
from lens_core.catalog import Catalog
import brings
catalogs.Catalog.installed = classmethod(lambda cls: Catalog.of(brings))
from lens_core.__main__ import main
assert main(["weigh", "--times", "3"]) == 7
assert main(["--help"]) == 0
"""
    (tmp_path / "brings.py").write_text(
        "from lens_core import hookimpl\n@hookimpl\ndef lens_commands():\n    return {'weigh': 'scales:weigh'}\n"
    )
    (tmp_path / "scales.py").write_text("def weigh(*, times: int = 1) -> int:\n    return 4 + times\n")
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "weigh" in done.stdout
