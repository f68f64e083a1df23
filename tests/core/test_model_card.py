"""The model card: what it tells, that it works, and that a person's stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lens_core.catalog import Catalog
from lens_core.checkpoints import model_card
from lens_core.checkpoints.manifest import digest
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.atomic_files import read_json, write_json

DESCRIBED = {
    "format": 1,
    "components": {"vae": {"use": "toy:blocks", "config": {}}},
    "presets": {"steps": 3, "guidance_scale": 5.0},
    "plugins": {"toy": "toys==2"},
    "provenance": {
        "base_model": 'a/b"\nlicense: mit',
        "license": "apache-2.0",
        "recipe": {"method": "toy:fit", "steps": 6},
        "loras": ["style:0.8"],
    },
}


def head(text: str) -> dict[str, object]:
    front = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(front, dict)
    return front


def test_the_front_matter_holds_what_is_known_and_nothing_else() -> None:
    assert head(model_card.text({"format": 1, "components": {}})) == {
        "pipeline_tag": "text-to-image",
        "library_name": "lens-t2i",
        "tags": ["lens"],
    }
    front_matter = head(model_card.text(DESCRIBED))
    assert front_matter["license"] == "apache-2.0" and front_matter["base_model"] == 'a/b"\nlicense: mit'


def test_the_card_tells_recipe_presets_loras_and_versions() -> None:
    text = model_card.text(DESCRIBED, "toys/blocks")
    for row in (
        "| vae | `toy:blocks` |",
        "| steps | 3 |",
        "| guidance scale | 5.0 |",
        "| training | method toy:fit, steps 6 |",
        "| LoRAs in it | style:0.8 |",
        "| plugins | toy (toys==2) |",
    ):
        assert row in text
    assert "# toys/blocks\n" in text


def test_a_changed_card_is_a_persons() -> None:
    text = model_card.text(DESCRIBED)
    assert model_card.ours(text)
    assert not model_card.ours(text.replace("star", "moon"))
    assert not model_card.ours(f"{text}More.\n") and not model_card.ours("# Mine\n") and not model_card.ours("")


def test_a_folder_gets_a_card_unless_a_person_wrote_one(pipeline: LensPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)
    path = folder / "README.md"
    first, before = path.read_text(), digest(folder)
    assert model_card.ours(first) and "from lens_core import LensPipeline" in first and str(tmp_path) not in first
    pipeline.presets["steps"] = 7
    pipeline.save_pretrained(folder)
    assert "| steps | 7 |" in path.read_text()
    for mine in ("# Mine\n", path.read_text() + "PS\n", "\xff\xfe"):
        path.write_bytes(mine.encode("latin-1"))
        pipeline.save_pretrained(folder)
        assert path.read_bytes() == mine.encode("latin-1")
    pipeline.presets["steps"] = 3
    pipeline.save_pretrained(folder)
    assert digest(folder) == before, "a card is no part of the model"


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("---\nlicense: mit\n---\n# X\nlicense: no\n", {"license": "mit"}),
        ('---\ntags: [a]\nlicense: "other"\nlicense_name: lens\n---\n', {"license": "other", "license_name": "lens"}),
        ("# X\nlicense: mit\n", {}),
        ("---\nlicense:\n---\n", {}),
        ("", {}),
    ],
)
def test_the_licence_of_a_base_goes_on_into_what_is_made_from_it(
    text: str, known: dict[str, str], checkpoint: Path, catalog: Catalog, tmp_path: Path
) -> None:
    (checkpoint / "README.md").write_text(text)
    made = LensPipeline.from_pretrained(checkpoint, catalog=catalog)
    assert made.provenance == known
    made.save_pretrained(tmp_path / "made")
    assert read_json(tmp_path / "made" / "lens.json")["provenance"] == known
    again = LensPipeline.from_pretrained(tmp_path / "made", catalog=catalog)
    assert again.provenance == known
    assert {k: v for k, v in head((tmp_path / "made" / "README.md").read_text()).items() if k in known} == known


def test_a_checkpoint_older_than_provenance_is_read(checkpoint: Path, catalog: Catalog) -> None:
    data = read_json(checkpoint / "lens.json")
    del data["provenance"]
    write_json(checkpoint / "lens.json", data)
    assert LensPipeline.from_pretrained(checkpoint, catalog=catalog).provenance == {}
