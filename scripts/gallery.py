"""Draw the pictures of docs/gallery.md with the examples, and write the page: `make gallery`.

`--page` writes the page alone. Each example runs as it stands, in an empty folder, and what it draws is copied.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sys
import tempfile
import types
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, PICTURES, PAGE = ROOT / "examples", ROOT / "docs" / "gallery", ROOT / "docs" / "gallery.md"

# Example -> its title, its arguments, the picture it draws ("": none), and what that shows.
ENTRIES: dict[str, tuple[str, list[str], str, str]] = {
    "generate": (
        "Draw a picture", ["two red circles left of a blue star", "out.png"], "out.png",
        "\"two red circles left of a blue star\", by the embedded checkpoint `tiny:`.",
    ),
    "assemble": ("Assemble a pipeline by hand", ["out.png"], "out.png", "\"a green square\"."),
    "steps_and_guidance": (
        "Steps against guidance", ["a green triangle and a pink ring", "out.png"], "out.png",
        "From top to bottom 2, 4, 12 steps; from left to right guidance 1, 2.5, 5, 8.",
    ),
    "image_to_image": (
        "Image to image", ["out.png"], "out.png",
        "Left the init image; then \"a blue star\" drawn from it at strength 0.3, 0.6, 0.9.",
    ),
    "inpaint": (
        "Inpaint", ["out.png"], "out.png",
        "The picture, the mask, the result: the left half is drawn anew, the right half is the same, pixel for pixel.",
    ),
    "own_sampler": (
        "A sampler of your own", ["out.png"], "out.png", "\"a yellow ring\", by a sampler that the script defines.",
    ),
    "another_encoder": (
        "Another text encoder", ["20", "run"], "",
        "It trains a byte-level text encoder with a small backbone. Twenty steps are too few to draw anything.",
    ),
    "own_reward": (
        "A reward of your own, and ten RL steps", ["10", "run"], "run/before_and_after.png",
        "\"a red circle\" for three seeds: above before, below after ten RL steps with a reward for blue.",
    ),
    "lora_on_pictures": (
        "A LoRA on twenty pictures", ["moons", "150", "runs"], "runs/moon.png",
        "\"a red moon\" before and after 150 steps, a few minutes on a CPU. `tiny:` was trained without moons.",
    ),
    "two_loras": (
        "Two LoRAs mixed", ["a.safetensors", "b.safetensors", "out.png"], "out.png",
        "Without a LoRA, with the first, with the second, with both at weight 0.5. These LoRAs are small and random.",
    ),
    "distil": (
        "Distil", ["40", "runs"], "runs/student.png",
        "\"three green squares\" in four steps without guidance: above the teacher, below a student of 40 updates.",
    ),
    "benchmark_remote_api": (
        "Benchmark an image API", ["run"], "run/sheet.png",
        "The sheet of a benchmark run against a local server with OpenAI's API; correct pictures have a green frame.",
    ),
    "several_gpus": (
        "Several GPUs with accelerate", ["prompts.txt", "pictures"], "pictures/0001.png",
        "One of the pictures. `accelerate launch` instead of `python` starts a process per GPU, to share the prompts.",
    ),
    "push_to_hub": (
        "Export to the Hub", ["model"], "",
        "It saves a checkpoint in diffusers' layout, and uploads it if you also name a repository.",
    ),
}  # fmt: skip
PROMPTS = "a red circle\na blue star\n"  # the file that several_gpus reads
LARGEST = 768  # px, the longest side of a picture in the docs


def code_lines(path: Path) -> int:
    """Lines of code: no blank lines, no comments, no docstring of the file."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()[len((ast.get_docstring(ast.parse(source), clean=False) or "").splitlines()) :]
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))


def page() -> str:
    """docs/gallery.md."""
    parts = [
        "# Gallery",
        "",
        "Short scripts of [`examples/`](../examples) to copy and change, with the pictures that they draw. They run on",
        "a CPU with `tiny:`, the small checkpoint inside the package. `make gallery` makes pictures and page.",
    ]  # fmt: skip
    for name, (title, arguments, picture, shown) in ENTRIES.items():
        path = EXAMPLES / f"{name}.py"
        words = " ".join(f'"{a}"' if " " in a else a for a in arguments)
        parts += [
            "", f"## {title}", "",
            f"[`examples/{name}.py`](../examples/{name}.py): {code_lines(path)} lines of code", "",
            "```text", f"python examples/{name}.py {words}".rstrip(), "```", "",
        ]  # fmt: skip
        if picture:
            parts += [f"![{re.sub('[`]', '', shown).rstrip('.')}](gallery/{name}.png)", ""]
        parts.append(shown)
    return "\n".join(parts) + "\n"


def draw(name: str) -> None:
    """Run an example in an empty folder, and copy its picture."""
    _, arguments, picture, _ = ENTRIES[name]
    path = EXAMPLES / f"{name}.py"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("prompts.txt").write_text(PROMPTS, encoding="utf-8")
        sys.argv = [path.name, *arguments]
        # In this process, whose imports take longer than most examples; a script's classes are found in `__main__`.
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
        if picture:
            PICTURES.mkdir(exist_ok=True)
            image = Image.open(picture).convert("RGB")
            image.thumbnail((LARGEST, LARGEST))
            image.save(PICTURES / f"{name}.png", optimize=True)


def main(words: list[str]) -> None:
    for name in ENTRIES if not words else [word for word in words if word != "--page"]:
        draw(name)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
