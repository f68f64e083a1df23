"""The examples work as they stand: a third party's distribution installs and is used by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ACME = ROOT / "examples" / "lens-acme"

SCRIPT = """
import sys
from pathlib import Path

import toy

from lens_core.catalog import Catalog, Plugin
from lens_core.recipe import read_recipe
from lens_core.training.trainer import Trainer

catalog = Catalog.installed()
(acme,) = [p for p in catalog.plugins if p.name == "lens_acme"]
assert (acme.distribution, acme.version, acme.error) == ("lens-acme", "0.1.0", None)
assert catalog.find("reward", "contrast").name == "lens_acme:contrast"
catalog._add(Plugin("toy", "toy", "0"), lambda: toy)
report = Trainer(read_recipe(Path("acme.yaml"), catalog), catalog, Path("run"), log=lambda line: None).train()

from lens_core.inference.pipeline import LensPipeline

pipeline = LensPipeline.from_pretrained(report.model, catalog=catalog)
assert pipeline.specs["text_encoder"].use == "lens_acme:hashed_words"
assert pipeline.plugins["lens_acme"] == "lens-acme==0.1.0"
images = pipeline("red", height=16, width=16, seed=0, output_type="pt").images
score = catalog.find("reward", "contrast").cls
print(score(score.Config()).score(images, [])[0].status)
"""

RECIPE = """
pipeline: {vae: blocks, text_encoder: {use: hashed_words, rows: 64, width: 8}, backbone: mixer, sampler: even}
method: fit
dataset: squares
train: {steps: 2}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed a copy of the example, without a network."""
    copy, site = tmp_path_factory.mktemp("source") / "lens-acme", tmp_path_factory.mktemp("site")
    shutil.copytree(ACME, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site), str(copy)]
    done = subprocess.run([sys.executable, "-m", "pip", *pip], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in `folder`, with what pip installed in `site` and this project in front of it."""
    paths = [str(site), str(ROOT), str(ROOT / "plugins"), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_an_installed_third_party_is_used_by_name(site: Path, tmp_path: Path) -> None:
    (tmp_path / "acme.yaml").write_text(RECIPE)
    done = run(site, tmp_path, "-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


def test_an_installed_third_party_is_listed(site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, "-m", "lens_core", "plugins")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("lens_acme")]
    assert line.split(maxsplit=3)[1:3] == ["lens-acme", "0.1.0"] and "text_encoder, reward" in line


def test_its_own_tests_pass(site: Path) -> None:
    done = run(site, ACME, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
