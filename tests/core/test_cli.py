"""The command line: what it prints, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lens_core import catalog as catalogs
from lens_core.catalog import Catalog
from lens_core.checkpoints import lora_keys
from lens_core.checkpoints.adapters import LoRA
from lens_core.checkpoints.tensor_files import read_weights, save_tensors
from lens_core.cli import main as command
from lens_core.cli.main import main
from lens_core.cli.options import CORE_COMMANDS, read_prompts
from lens_core.inference import png_metadata
from lens_core.inference.batch import is_preview
from lens_core.io.atomic_files import read_json, write_json
from lens_core.types import PluginError


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch, catalog: Catalog, tmp_path: Path) -> None:
    """Every command sees the toy plugin and works in a folder of its own."""
    monkeypatch.setattr(catalogs.Catalog, "installed", classmethod(lambda cls: catalog))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def draw(checkpoint: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(checkpoint), "--size", "32x48", "--device", "cpu", *arguments])


def read_picture(path: str) -> tuple[tuple[int, int], bytes, dict[str, Any]]:
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
    report = json.loads(capsys.readouterr().out)
    size, _, facts = read_picture("cat.png")
    assert size == (48, 32)
    assert facts["prompt"] == "a red cat" and facts["seed"] == 7 and facts["steps"] == 3
    assert facts["model_hash"] == report["model_hash"] and report["file"] == "cat.png"


def test_a_lora_changes_the_picture_by_its_weight(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    high, wide = read_weights(checkpoint / "transformer")["inner.weight"].shape
    low = {
        "transformer.inner.lora_A.weight": torch.ones(1, wide),
        "transformer.inner.lora_B.weight": torch.ones(high, 1),
    }
    save_tensors(Path("a.safetensors"), low)
    bench = ["bench", "reds", "--model", str(checkpoint), "--device", "cpu", "--size", "16x16"]
    for name, loras in {"plain": (), "none": ("a.safetensors:0",), "all": ("a.safetensors",)}.items():
        flags = [word for lora in loras for word in ("--lora", lora)]
        assert draw(checkpoint, "a red cat", "--seed", "7", "-o", f"{name}.png", *flags) == 0
        assert main([*bench, "--output", name, *flags]) == 0
    sheets = [Path(name, "sheet.png").read_bytes() for name in ("plain", "none", "all")]
    assert sheets[0] == sheets[1] != sheets[2]
    results = [json.loads(Path(name, "result.json").read_text()) for name in ("plain", "none", "all")]
    models = [str(checkpoint), f"{checkpoint} + a.safetensors:0", f"{checkpoint} + a.safetensors:1"]
    assert [result["model"] for result in results] == models
    assert len({result["model_hash"] for result in results}) == 3
    (_, plain, facts), (_, none, _), (_, full, lora_facts) = (
        read_picture(f"{n}.png") for n in ("plain", "none", "all")
    )
    assert none == plain != full
    assert "loras" not in facts and lora_facts["loras"] == ["a.safetensors:1"]
    capsys.readouterr()
    assert "b.safetensors: there is no such LoRA" in refused(
        capsys, draw(checkpoint, "x", "--lora", "b.safetensors:0.5")
    )
    assert "b.safetensors: there is no such LoRA" in refused(capsys, main([*bench, "--lora", "b.safetensors"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "3 steps at guidance 5: the preset of this checkpoint; --steps and --guidance-scale choose others"),
        (("--steps", "2"), "guidance 5: the preset of this checkpoint; --steps and --guidance-scale choose others"),
        (("--steps", "2", "--guidance-scale", "1"), ""),
    ],
)
def test_the_preset_is_reported_once_and_explicit_options_are_not(
    options: tuple[str, ...], said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        draw(
            checkpoint, "a red cat", "--seed", "7", "-o", "cat.png", "--num-images", "3", "--batch-size", "1", *options
        )
        == 0
    )
    assert capsys.readouterr().err == (f"lens: {said}\n" if said else "")


def test_how_a_variant_was_recognised_is_reported(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = read_json(checkpoint / "lens.json")
    write_json(checkpoint / "lens.json", {**data, "note": "the preset of Toy, as nothing tells"})
    assert draw(checkpoint, "a red cat", "--seed", "7", "-o", "cat.png") == 0
    assert "lens: 3 steps at guidance 5: the preset of Toy, as nothing tells; --steps" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_an_option_without_effect_is_reported_on_a_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--guidance-scale", "1", "--steps", "2", "--negative-prompt", "dog", "--seed", "1", "-o", "a.png")
    assert draw(checkpoint, "a red cat", *options) == 0
    said = capsys.readouterr().err
    assert said == "lens: a negative prompt has no effect at guidance 1; give a guidance scale above 1\n"


def test_pictures_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    Path("p.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    for name, batch in (("a", "8"), ("b", "3")):
        Path(name).mkdir()
        assert (
            draw(
                checkpoint,
                "--prompts-file",
                "p.txt",
                "--num-images",
                "2",
                "--batch-size",
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
        (_, first, facts), (_, other, same) = read_picture(f"a/{name}"), read_picture(f"b/{name}")
        assert facts["seed"] == same["seed"]
        assert max(abs(p - q) for p, q in zip(first, other, strict=True)) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one prompt, or a file of prompts"),
        (["a", "--prompts-file", "p.txt"], "give one prompt, or a file of prompts"),
        (["  "], "the prompt is empty"),
        (["--prompts-file", "none.txt"], "none.txt: cannot be read"),
        (["--prompts-file", "blank.txt"], "blank.txt: holds no prompt"),
        (["--prompts-file", "latin.txt"], "latin.txt: is not UTF-8 (byte 3)"),
        (["a", "--size", "30x32"], "height 30 is not a multiple of 16 px"),
        (["a", "--size", "32"], "size '32' must be HEIGHTxWIDTH"),
        (["a", "--size", "0x32"], "size '0x32' must be HEIGHTxWIDTH"),
        (["a", "--aspect-ratio", "3:2"], "give height and width, or an aspect ratio, not both"),
        (["a", "--seed", "-1"], "seed -1 must be between"),
        (["a", "--steps", "0"], "steps must be at least 1, not 0"),
        (["a", "--num-images", "0"], "--num-images and --batch-size must be at least 1"),
        (["a", "--batch-size", "0"], "--num-images and --batch-size must be at least 1"),
        (["a", "-o", "x.jpg"], "pictures are written as .png; use x.png"),
        (["a", "-o", "no/x.png"], "there is no such folder"),
        (["a", "-o", "folder.png"], "is a folder; name a .png file"),
        (["a", "-o", "."], ".: is a folder; name a .png file in it"),
        (["a", "-o", ".."], "..: is a folder; name a .png file in it"),
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


def test_no_plugin_may_take_the_name_of_a_command_of_the_core() -> None:
    assert {name for name in command.app if not name.startswith("-")} >= set(CORE_COMMANDS)


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
    out = capsys.readouterr().out
    assert "| red |" in out and ", sampler {'use': " in out
    result = json.loads(Path("runs/bench-reds/result.json").read_text())
    assert result["tasks"]["other"]["missing"] == 2 and len(result["pictures"]) == 4
    assert sorted(p.name for p in Path("runs/bench-reds").iterdir()) == [
        "cache",
        "images",
        "manifest.jsonl",
        "perceptions.jsonl",
        "result.json",
        "run.json",
        "sheet.png",
        "table.md",
    ]
    assert (result["dtype"], result["device"]) == ("float32", "cpu")


def test_a_bad_recipe_tells_each_problem_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(RECIPE.replace("vae: blocks", "vae: blocs").replace("steps: 2", "stepz: 2"))
    assert main(["train", "r.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Did you mean 'blocks'?" in err and "$.train.stepz: unknown" in err
    assert not Path("runs").exists()


def test_a_benchmark_takes_options_as_in_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(RECIPE)
    assert main(["train", "r.yaml"]) == 0
    capsys.readouterr()
    assert main(["bench", "{use: reds, split: train}", "--model", "runs/r/model"]) == 2
    assert "$.split: unknown. Known: prompts. Fields: prompts." in capsys.readouterr().err
    place = ["--model", "runs/r/model", "--size", "16x16", "--device", "cpu"]
    assert main(["bench", "{use: reds, prompts: 2}", *place]) == 0
    assert len(json.loads(Path("runs/bench-reds/result.json").read_text())["pictures"]) == 2
    assert main(["bench", "{use: reds, prompts: 3}", *place]) == 0
    assert len(json.loads(Path("runs/bench-reds-2/result.json").read_text())["pictures"]) == 3
    assert len(json.loads(Path("runs/bench-reds/result.json").read_text())["pictures"]) == 2, "nothing is overwritten"
    assert main(["bench", "{use: reds, prompts: 3}", *place, "--output", "runs/bench-reds"]) == 2
    words = "runs/bench-reds: holds another run, with prompts 2, not 3; choose another --output"
    assert words in capsys.readouterr().err
    Path("reds.yaml").write_text("use: reds\nprompts: 2\n")
    assert main(["bench", "reds.yaml", *place]) == 0, "the same run in a file"
    assert json.loads(Path("runs/bench-reds/result.json").read_text())["benchmark"] == "{use: reds, prompts: 2}"
    for wrong in ("{use: [", "[1, 2]", "{split: train}"):
        capsys.readouterr()
        assert main(["bench", wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


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
from lens_core.cli.main import main
assert main(["--help"]) == 0
assert main(["plugins"]) == 0
heavy = {"torch", "diffusers", "transformers", "numpy", "accelerate", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout and "lens_flux2" in done.stdout and "disabled: " not in done.stdout
    assert "Draw what runs have logged" in done.stdout, "a light plugin's command is described too"
    assert "lens --plugin FILE.py" in done.stdout, "no command lists this option"


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
from lens_core.cli.main import main
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


# ---- pictures that are there, drawn again, or begun at ---------------------------------------------------------------


def test_prompts_from_a_file_go_on_where_they_stopped(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    flags = ("--prompts-file", "p.txt", "--seed", "5", "-o", "a.png")
    assert draw(checkpoint, *flags) == 0
    names = [f"a-{i:04d}.png" for i in range(3)]
    before = [read_picture(n) for n in names]
    Path(names[1]).unlink()
    stamps = [Path(n).stat().st_mtime_ns for n in (names[0], names[2])]
    capsys.readouterr()
    assert draw(checkpoint, *flags) == 0
    out, err = capsys.readouterr()
    assert "2 of 3 pictures are there already" in err
    assert names[1] in out and names[0] not in out
    assert [Path(n).stat().st_mtime_ns for n in (names[0], names[2])] == stamps
    assert [read_picture(n) for n in names] == before


def test_a_run_without_a_seed_goes_on_with_the_seeds_that_it_had(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    assert draw(checkpoint, "--prompts-file", "p.txt") == 0
    pictures = {n: read_picture(n) for n in ("lens-0000.png", "lens-0001.png", "lens-0002.png")}
    Path("lens-0000.png").unlink()
    assert draw(checkpoint, "--prompts-file", "p.txt") == 0
    assert "2 of 3 pictures are there already" in capsys.readouterr().err
    assert {path.name: read_picture(path.name) for path in Path().glob("*.png")} == pictures
    Path("p.txt").write_text("one\n", encoding="utf-8")
    for _ in range(2):
        assert draw(checkpoint, "--prompts-file", "p.txt") == 0
    assert len(list(Path().glob("*.png"))) == 4 and "1 of 1 pictures are there already" in capsys.readouterr().err


def test_json_holds_no_character_that_commands_a_terminal(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a \x9b31m\u202e ü\U0001f534\U000e0041 cat\x7f"
    assert draw(checkpoint, prompt, "--json") == 0
    line = capsys.readouterr().out
    assert line.rstrip("\n").isprintable() and "ü\U0001f534" in line and json.loads(line)["prompt"] == prompt


def test_overwrite_draws_over_the_picture_of_the_usual_name(checkpoint: Path) -> None:
    for seed in ("1", "2"):
        assert draw(checkpoint, "a red cat", "--seed", seed, "--overwrite") == 0
    assert [path.name for path in Path().glob("*.png")] == ["lens.png"]
    assert png_metadata.facts(Path("lens.png"))[1]["seed"] == 2


def test_a_picture_that_was_asked_for_differently_is_not_overwritten(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("one\ntwo\n", encoding="utf-8")
    flags = ("--prompts-file", "p.txt", "-o", "a.png")
    assert draw(checkpoint, *flags, "--seed", "5") == 0
    first = read_picture("a-0000.png")
    capsys.readouterr()
    for other in (("--seed", "6"), ("--seed", "5", "--steps", "2"), ("--seed", "5", "--guidance-scale", "2")):
        assert "is there, and was asked for differently; use --overwrite" in refused(
            capsys, draw(checkpoint, *flags, *other)
        )
    assert read_picture("a-0000.png") == first
    assert draw(checkpoint, *flags, "--seed", "6", "--overwrite") == 0
    assert read_picture("a-0000.png") != first
    Image.new("RGB", (48, 32)).save("a-0001.png")  # not one of ours
    capsys.readouterr()
    assert "a-0001.png: is there" in refused(capsys, draw(checkpoint, *flags, "--seed", "6"))


def again(checkpoint: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(checkpoint), "--device", "cpu", *arguments])


def test_a_picture_is_drawn_again_from_what_it_carries(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--seed", "9", "--steps", "2", "--guidance-scale", "3", "--guidance-interval", "0.2,1")
    assert draw(checkpoint, "a red cat", *options, "--negative-prompt", "dog", "-o", "a.png") == 0
    capsys.readouterr()
    assert again(checkpoint, "--reproduce", "a.png", "-o", "b.png") == 0
    assert capsys.readouterr().out == "identical\n"
    assert read_picture("b.png")[:2] == read_picture("a.png")[:2]
    assert sorted(p.name for p in Path().iterdir()) == ["a.png", "b.png"]


def write_lora(checkpoint: Path, path: Path, value: float) -> str:
    """A LoRA for the toy backbone, whose numbers are `value`."""
    high, wide = read_weights(checkpoint / "transformer")["inner.weight"].shape
    path.parent.mkdir(exist_ok=True)
    lora_keys.write(path, {"inner": LoRA(torch.full((1, wide), value), torch.ones(high, 1), 1.0)})
    return str(path)


def test_another_lora_of_the_same_name_is_another_lora(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"a": 1.0, "b": 2.0}
    one, other = (write_lora(checkpoint, Path(name, "style.safetensors"), value) for name, value in values.items())
    lora_keys.write(Path("comfy.safetensors"), lora_keys.read(Path(one)), "comfy")
    Path("style.safetensors").write_bytes(Path("comfy.safetensors").read_bytes())
    Path("p.txt").write_text("one\ntwo\n", encoding="utf-8")
    flags = ("--prompts-file", "p.txt", "-o", "a.png", "--seed", "5")
    assert draw(checkpoint, *flags, "--lora", one) == 0
    facts = read_picture("a-0000.png")[2]
    assert facts["loras"] == ["style.safetensors:1"] and [len(digest) for digest in facts["lora_hashes"]] == [16]
    capsys.readouterr()
    assert "is there, and was asked for differently" in refused(capsys, draw(checkpoint, *flags, "--lora", other))
    assert draw(checkpoint, *flags, "--lora", "style.safetensors") == 0  # the same numbers in another key format
    assert "2 of 2 pictures are there already" in capsys.readouterr().err
    assert again(checkpoint, "--reproduce", "a-0000.png", "--lora", one) == 0
    assert capsys.readouterr().out == "identical\n"
    line = refused(capsys, again(checkpoint, "--reproduce", "a-0000.png", "--lora", other))
    assert "another LoRA style.safetensors:1, of hash" in line and "give that file, --lora" in line
    older = tamper("a-0000.png", {}, leave_out=("lora_hashes", "dtype"))
    assert again(checkpoint, "--reproduce", older, "--lora", one) == 0
    assert capsys.readouterr().out == "identical\n"


def test_the_dtype_is_recorded_and_drawn_with_again(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("one\ntwo\n", encoding="utf-8")
    flags = ("--prompts-file", "p.txt", "-o", "a.png", "--seed", "5")
    assert draw(checkpoint, *flags, "--dtype", "bfloat16") == 0
    assert read_picture("a-0000.png")[2]["dtype"] == "bfloat16"
    capsys.readouterr()
    assert "is there, and was asked for differently" in refused(capsys, draw(checkpoint, *flags))
    assert draw(checkpoint, *flags, "--dtype", "bfloat16") == 0
    assert "2 of 2 pictures are there already" in capsys.readouterr().err
    assert again(checkpoint, "--reproduce", "a-0000.png") == 0
    assert capsys.readouterr().out == "identical\n"
    again(checkpoint, "--reproduce", "a-0000.png", "--dtype", "float32")
    assert capsys.readouterr().out.startswith('dtype: was "bfloat16", is "float32"\n')


def test_what_a_picture_decides_is_no_option_beside_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(checkpoint, "a red cat", "--seed", "9", "-o", "a.png") == 0
    capsys.readouterr()
    options = (
        "--seed",
        "9",
        "--size",
        "32x48",
        "--sampler",
        "even",
        "--num-images",
        "4",
        "--json",
        "--preview",
        "p.png",
    )
    line = refused(capsys, again(checkpoint, "--reproduce", "a.png", *options))
    for name in ("--seed", "--size", "--sampler", "--num-images", "--json", "--preview"):
        assert name in line
    Path("b.png").write_bytes(b"mine")
    line = refused(capsys, again(checkpoint, "--reproduce", "a.png", "-o", "b.png"))
    assert "b.png: is there already; use --overwrite" in line and Path("b.png").read_bytes() == b"mine"
    assert again(checkpoint, "--reproduce", "a.png", "-o", "b.png", "--overwrite") == 0
    assert read_picture("b.png")[:2] == read_picture("a.png")[:2]


def test_names_that_nobody_gave_are_free(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert draw(checkpoint, "a red cat", "--seed", "9", "--num-images", "2") == 0
    names = ["lens-0000.png", "lens-0001.png", "lens-2-0000.png", "lens-2-0001.png"]
    assert sorted(path.name for path in Path().iterdir()) == names
    Path("p.txt").write_text("one\ntwo\n", encoding="utf-8")
    capsys.readouterr()
    assert "was asked for differently" in refused(capsys, draw(checkpoint, "--prompts-file", "p.txt", "--seed", "9"))


def test_a_preview_is_written_over_no_picture(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (48, 32), "red").save("init.png")
    Path("link.png").symlink_to("init.png")
    before = Path("init.png").read_bytes()
    for name in ("init.png", "link.png", "out.png"):
        flags = ("--image", "init.png", "-o", "out.png", "--preview", name, "--overwrite")
        assert f"{name}: is a picture that the run reads or writes" in refused(capsys, draw(checkpoint, "a", *flags))
    line = refused(capsys, draw(checkpoint, "a", "-o", "out.png", "--preview", "init.png"))
    assert "init.png: is there already; use --overwrite, or another --preview" in line
    assert not is_preview(Path("init.png")) and not is_preview(Path("absent.png"))
    assert Path("init.png").read_bytes() == before


def tamper(name: str, change: dict[str, Any] | str, other: str = "bad.png", pixel: int | None = None,
           leave_out: tuple[str, ...] = ()) -> str:  # fmt: skip
    from PIL.PngImagePlugin import PngInfo

    with Image.open(name) as picture:
        kept = {name: value for name, value in json.loads(picture.info["lens"]).items() if name not in leave_out}
        facts = change if isinstance(change, str) else json.dumps({**kept, **change})
        info = PngInfo()
        info.add_itxt("lens", facts)
        image = picture.convert("RGB")
        if pixel is not None:
            red, *rest = image.getpixel((0, 0))  # type: ignore[misc]
            image.putpixel((0, 0), ((red + pixel) % 256, *rest))
        image.save(other, pnginfo=info)
    return other


def test_a_picture_that_differs_is_reported(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(checkpoint, "a red cat", "--seed", "9", "-o", "a.png") == 0
    capsys.readouterr()
    assert again(checkpoint, "--reproduce", tamper("a.png", {}, pixel=100)) == 1
    assert "differs by" in capsys.readouterr().out
    assert again(checkpoint, "--reproduce", tamper("a.png", {"seed": 10})) == 1
    assert again(checkpoint, "--reproduce", tamper("a.png", {"versions": {"lens": "0.0.1"}})) == 0
    out = capsys.readouterr().out
    assert 'versions: was {"lens": "0.0.1"}' in out and out.endswith("identical\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", "its facts cannot be read"),
        ("[]", "its facts cannot be read (not an object)"),
        ("[" * 100_000, "its facts cannot be read"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "its facts cannot be read"),
        ({"seed": -1}, "no sound 'seed'"),
        ({"seed": True}, "no sound 'seed'"),
        ({"seed": 2**64}, "no sound 'seed'"),
        ({"height": 10**9}, "no sound 'height'"),
        ({"steps": "4"}, "no sound 'steps'"),
        ({"steps": 10**6}, "no sound 'steps'"),
        ({"guidance_scale": float("nan")}, "no sound 'guidance_scale'"),
        ({"prompt": ["a"]}, "no sound 'prompt'"),
        ({"sampler": "even"}, "no sound 'sampler'"),
        ({"sampler": {"use": "evil"}}, "no sampler is called 'evil'"),
        ({"sampler": {"use": "even", "path": "/etc"}}, "unknown"),
        ({"model_hash": "0"}, "was drawn by"),
        ({"loras": ["a.safetensors:1"]}, "give --model and --lora"),
        ({"lora_hashes": "0"}, "no sound 'lora_hashes'"),
        ({"dtype": 16}, "no sound 'dtype'"),
        ({"dtype": "int4"}, "no dtype is called 'int4'"),
        ({"image_hash": "0"}, "was drawn from one: give it, --image"),
        ({"guidance_interval": [1, 0]}, "0 <= low < high <= 1"),
        ({"height": 48}, "the picture is 32x48 px, but its facts say 48x48"),
    ],
)
def test_facts_are_not_believed(change: Any, words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(checkpoint, "a red cat", "--seed", "9", "-o", "a.png") == 0
    bad = tamper("a.png", change)
    capsys.readouterr()
    code = again(checkpoint, "--reproduce", bad)
    out, err = capsys.readouterr()
    assert code == 2 and words in err and err.count("\n") == 1, (out, err)


def test_a_picture_without_facts_or_none_at_all_cannot_be_drawn_again(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("text.png").write_text("no picture")
    for name, words in (("plain.png", "carries no facts"), ("text.png", "cannot be read as a picture"),
                        ("gone.png", "there is no such picture")):  # fmt: skip
        assert again(checkpoint, "--reproduce", name) == 2
        assert words in capsys.readouterr().err
    assert again(checkpoint, "a cat", "--reproduce", "plain.png") == 2
    assert "leave the prompt out" in capsys.readouterr().err


def test_a_picture_can_be_begun_at_and_drawn_again_from_it(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = torch.Generator().manual_seed(0)
    Image.fromarray(torch.randint(0, 256, (32, 48, 3), generator=rng, dtype=torch.uint8).numpy()).save("photo.png")
    mask = torch.zeros(32, 48, dtype=torch.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask.numpy()).save("mask.png")
    begun = ("--image", "photo.png", "--mask", "mask.png")
    assert again(checkpoint, "a cat", "--seed", "1", *begun, "-o", "a.png") == 0
    size, pixels, facts = read_picture("a.png")
    assert size == (48, 32) and facts["strength"] == 1.0
    with Image.open("photo.png") as photo:
        box = (16, 0, 48, 32)
        assert Image.frombytes("RGB", size, pixels).crop(box).tobytes() == photo.crop(box).tobytes()
    capsys.readouterr()
    assert again(checkpoint, "--reproduce", "a.png", *begun) == 0
    assert capsys.readouterr().out == "identical\n"
    assert again(checkpoint, "--reproduce", "a.png", "--image", "mask.png", "--mask", "mask.png") == 1
    assert "image_hash: was" in capsys.readouterr().out
    assert again(checkpoint, "--reproduce", "a.png", "--image", "photo.png") == 2
    assert "give it, --mask" in capsys.readouterr().err
    for words, message in (
        (("--strength", "0.5"), "a strength without a picture"),
        (("--mask", "mask.png"), "a mask without a picture"),
        (("--image", "photo.png", "--strength", "2"), "must be in [0, 1]"),
        (("--image", "gone.png"), "there is no such picture"),
        (("--guidance-interval", "1"), "must be LOW,HIGH"),
        (("--sampler", "evan"), "Did you mean 'even'?"),
        (("--sampler", "{use: even, mu: 1.0}"), "sampler.mu: unknown"),
        (("--sampler", "[even]"), "must name a component"),
        (("--sampler", "even:"), "even: must name a component (`even`, or `{use: even, …}`), not {'even': None}"),
        (("--plugin", "mine.py"), "It stands before the command: lens --plugin FILE generate"),
    ):
        assert again(checkpoint, "a cat", *words, "-o", "x.png") == 2
        assert message in capsys.readouterr().err
    assert not Path("x.png").exists()


# ---- memory ----------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_and_the_picture_is_the_same(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for plan in ("none", "block", "encoder-cpu"):
        assert draw(checkpoint, "a red cat", "--seed", "7", "-o", f"{plan}.png", "--offload", plan) == 0
        err = capsys.readouterr().err
        assert ("offload: " + plan in err and "peak: denoise" in err) == (plan != "none")
    assert read_picture("none.png") == read_picture("block.png") == read_picture("encoder-cpu.png")
    Path("none.png").unlink()
    assert draw(checkpoint, "a red cat", "-o", "none.png", "--offload", "blok") == 2
    assert "no offload plan is called 'blok'. Did you mean 'block'?" in refused(capsys)
    assert not Path("none.png").exists()


# ---- whatever a user can type -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "caf\udcff"],
        ["generate", "a", "-o", "a\0.png"],
        ["generate", "a\0"],
        ["generate", "a", "--model", "\udc80"],
        ["generate", "--prompts-file", "x\0"],
        ["gen\0"],
        ["train", "a\0.yaml"],
        ["train", "x" * 5000],
        ["train", "x.yaml", "--set", "a=[" + "[" * 10_000],
        ["bench", "fit", "--size", "9" * 5000 + "x1"],
        ["bench", "{use: a, x: &a [*a]}"],
        ["bench", "[" * 10_000],
        ["compare", "a\0", "b"],
        ["compare", "x" * 5000],
        ["lora", "convert", "x" * 5000, "a.safetensors", "--to", "comfy"],
        ["push", "x" * 5000, "a/b"],
        ["push", "nowhere", "a b"],
        ["generate", "a", "-o", "x" * 300 + ".png"],
        ["generate", "a", "--num-images", "1000000000"],
        ["generate", "a", "--seed", "9" * 5000],
        ["generate", "a", "--guidance-interval", "9" * 5000],
        ["generate", "a", "--size", "9" * 5000 + "x1"],
        ["generate", "a", "--lora", "\x1b[2J"],
        ["generate", "a", "--model", "a\nb"],
    ],
    ids=lambda words: repr(" ".join(words))[:40],
)
def test_whatever_is_typed_is_refused_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code in (1, 2) and out == "" and err.startswith("lens: ")
    assert err.count("\n") == 1 and len(err) < 6000 and err[:-1].isprintable() and "fault of Lens" not in err


def test_what_nobody_foresaw_is_one_line_and_a_traceback_where_one_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class PanicException(BaseException):
        pass

    faults: list[tuple[BaseException, int, str]] = [
        (ZeroDivisionError("a\nb"), 1, "ZeroDivisionError: a b; this is a fault of Lens or of a plugin"),
        (PanicException("rust"), 1, "PanicException: rust"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory: you tried"), 1, "not enough memory"),
        (PluginError("a:b.forward raised OutOfMemoryError: CUDA out of memory. Tried"), 1, "not enough memory"),
        (OSError(30, "Read-only file system", "/ro/x"), 1, "/ro/x: Read-only file system; check the path"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (RecursionError("deep"), 1, "RecursionError: deep"),
        (SystemExit("why"), 1, "why"),
    ]
    for fault, code, words in faults:

        def fail(*_: object, fault: BaseException = fault, **__: object) -> None:
            raise fault

        monkeypatch.setattr(command, "app", fail)
        assert main(["plugins"]) == code
        out, err = capsys.readouterr()
        assert out == "" and words in err and err.count("\n") == 1
    monkeypatch.setenv("LENS_DEBUG", "1")
    monkeypatch.setattr(command, "app", lambda *_, **__: 1 // 0)
    assert main(["plugins"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setattr(command, "app", lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError))
    assert main(["plugins"]) == 0


LISTING = "import sys; from lens_core.cli.main import main; sys.exit(main(['plugins']))"


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    code = f"import os; read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n{LISTING}"
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    if not Path("/dev/full").exists():
        return
    done = run("-c", f"import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n{LISTING}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_a_terminal_without_unicode_gets_it_spelled_out() -> None:
    words = r'{"a": "\u00e9 \u732b \U0001f600 \udcff"}'
    code = f"from lens_core.cli import main as m; m.app = lambda *_, **__: print({words!r}.encode().decode(kind))"
    for encoding in ("ascii", "latin-1", "cp1252", "utf-8"):
        begin = f"import sys; kind = 'unicode_escape'; sys.stdout.reconfigure(encoding={encoding!r})"
        shell = f"{begin}; {code}; m.main(['plugins'])"
        done = subprocess.run([sys.executable, "-c", shell], capture_output=True, check=False)
        assert done.returncode == 0 and done.stderr == b""
        assert json.loads(done.stdout.decode(encoding).replace("\\udcff", "!")) == {"a": "é 猫 😀 !"}


def test_a_prompts_file_loses_its_byte_order_mark_and_is_split_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\u2028on a mat\r\n\n a dog \n".encode())
    assert read_prompts(None, path) == ["a cat\u2028on a mat", "a dog"]


def test_help_describes_every_command_and_imports_none_for_it() -> None:
    script = """
import sys
from lens_core.cli.main import main
assert main(["--help"]) == 0
heavy = {"torch", "lens_data.commands", "lens_bench.figures", "lens_reason.commands"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run("-c", script, COLUMNS="160")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("│ ") for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) > 15
    assert not [row for row in rows if " " not in row], "a command without a description"
    assert any(row.startswith("data") and row.endswith("encode it once, estimate packing.") for row in rows)


def test_a_command_shows_its_whole_help() -> None:
    done = run("-m", "lens_core", "data", "import", "--help", COLUMNS="160")
    assert "WebDataset tars" in done.stdout and "--image-column" in done.stdout


def test_the_options_of_generate_stand_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    groups = re.findall(r"╭─ (.+?) ─", capsys.readouterr().out)
    assert groups == ["Prompts and files", "Model", "Picture", "Sampling", "Init image"]
