"""Whatever bytes a file holds: it is read, or refused in one line. Never another exception, never more memory than it.

A few hundred cases, always the same. `LENS_FUZZ=10000 make test` tries that many other ones, in each test;
`LENS_FUZZ=10000 .venv/bin/python -m pytest tests/core/test_fuzz.py -k mutated -s` as many mutated files and arguments.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from attrs import evolve
from fuzzing import CASES, JSON, NUMBERS, TEXTS, changed, fuzz, little_memory, read
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lens_core.catalog import Catalog
from lens_core.checkpoints import lora_keys, model_card
from lens_core.checkpoints.manifest import read_manifest
from lens_core.checkpoints.tensor_files import load_module, read_header, read_tensors, read_weights, save_tensors
from lens_core.inference import lora
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.atomic_files import read_json

STEM = "diffusion_pytorch_model"


@pytest.fixture(autouse=True, scope="module")
def _little_memory() -> Iterator[None]:
    yield from little_memory()


# ---- safetensors --------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from(
    ["F32", "F16", "BF16", "F64", "I8", "U8", "I64", "U16", "U32", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4",
     "F6_E2M3", "C64", "F32 ", "f32", "", "X"]
)  # fmt: skip
NAMES = st.one_of(st.sampled_from(["weight", "bias", "__metadata__", "a.b", "\x1b[2J\n", ""]), st.text(max_size=4))
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(DTYPES, NUMBERS),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), st.lists(st.integers(0, 4), max_size=3), NUMBERS),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), st.tuples(st.integers(0, 24), st.integers(0, 48))),
    },
)
SOUND = st.builds(
    lambda rows, start: {"dtype": "F32", "shape": [rows, 2], "data_offsets": [start, start + 8 * rows]},
    st.integers(0, 4),
    st.integers(0, 24),
)
HEADERS = st.one_of(
    st.dictionaries(NAMES, st.one_of(SOUND, ENTRY, NUMBERS), max_size=4).map(json.dumps),
    st.just(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ),
    st.just('{"__metadata__":{"a":1}}'),
    st.just("[" * 100_000),
    st.just('{"a":' * 50_000),
    st.text(max_size=30),
)
LENGTHS = st.one_of(st.none(), st.sampled_from([0, 1, 2, 7, 100, 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1]))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A safetensors file with something wrong with it, as a rule."""
    header = draw(HEADERS).encode("utf-8", "surrogatepass")
    length = draw(LENGTHS)
    data = (len(header) if length is None else length).to_bytes(8, "little") + header + draw(st.binary(max_size=64))
    return damage(draw, data)


def damage(draw: st.DrawFn, data: bytes) -> bytes:
    kind = draw(st.sampled_from(["none", "none", "cut", "flip", "more", "shuffle"]))
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    if kind == "cut":
        return data[:place]
    if kind == "flip" and data:
        return data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
    if kind == "more":
        return data[:place] + draw(st.binary(max_size=9)) + data[place:]
    if kind == "shuffle":
        other = draw(st.integers(0, max(len(data) - 1, 0)))
        return data[:place] + data[other : other + 16] + data[place + 16 :]
    return data


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound file of two tensors, then damaged once or twice."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        nan = torch.full((2,), torch.nan)
        save_tensors(path, {"weight": torch.ones(2, 3), "bias": nan}, {"note": "x"})
        data = path.read_bytes()
    for _ in range(draw(st.integers(1, 2))):
        data = damage(draw, data)
    return data


@fuzz
@given(data=st.one_of(files(), damaged(), st.binary(max_size=40)))
def test_any_bytes_are_tensors_or_a_refusal(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{STEM}.safetensors"
        path.write_bytes(data)
        tensors = read(lambda: read_tensors(path))
        if tensors is not None:
            assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(data)
            read_header(path)
        net = nn.Linear(3, 2)
        before = net.weight.clone()
        read(lambda: load_module(net, Path(folder)))
        assert net.weight.shape == before.shape


SHARDS = st.one_of(
    st.sampled_from(
        ["one.safetensors", "two.safetensors", "gone.safetensors", "../one.safetensors", "/etc/passwd", ".safetensors",
         "a\x00.safetensors", "a/one.safetensors", "x" * 300 + ".safetensors", "one.safetensors/", "..",
         "\udcff.safetensors", "C:\\one.safetensors", "link.safetensors", "folder.safetensors"]
    ),
    st.text(max_size=5).map(lambda name: f"{name}.safetensors"),
    NUMBERS,
)  # fmt: skip
INDEXES = st.one_of(
    st.builds(lambda table: {"weight_map": table}, st.dictionaries(NAMES, SHARDS, max_size=3)),
    st.builds(lambda table: {"weight_map": table}, NUMBERS),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
)


@fuzz
@given(index=INDEXES)
def test_any_index_stays_in_its_folder(index: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "here"
        folder.mkdir()
        save_tensors(Path(place) / "one.safetensors", {"outside": torch.ones(1)})
        save_tensors(folder / "one.safetensors", {"weight": torch.ones(2, 3)})
        save_tensors(folder / "two.safetensors", {"bias": torch.ones(2)})
        (folder / "folder.safetensors").mkdir()
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
        tensors = read(lambda: read_weights(folder))
        assert tensors is None or tensors.keys() <= {"weight", "bias"}


# ---- JSON ---------------------------------------------------------------------------------------------------------


@fuzz
@given(data=st.one_of(TEXTS.map(lambda t: t.encode("utf-8", "surrogatepass")), st.binary(max_size=20)))
def test_any_text_is_an_object_or_a_refusal(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        path.write_bytes(data)
        value = read(lambda: read_json(path))
        assert value is None or isinstance(value, dict)
        (Path(folder) / "README.md").write_bytes(data)
        assert all(isinstance(v, str) for v in model_card.licence(Path(folder)).values())


@fuzz
@given(drawn=st.data())
def test_any_lens_json_is_a_pipeline_or_a_refusal(drawn: st.DataObject, saved: Path, catalog: Catalog) -> None:
    path = saved / "lens.json"
    sound = json.loads((saved / "sound.json").read_text())
    path.write_text(json.dumps(drawn.draw(changed(sound))))
    pipeline = read(lambda: LensPipeline.from_pretrained(saved, catalog=catalog, device="cpu"))
    described = read(lambda: read_manifest(saved, catalog))
    assert pipeline is None or described is not None
    if described is not None:
        model_card.text(described, "toys/blocks")
    if pipeline is not None and all(
        getattr(pipeline, part) is not None for part in ("vae", "text_encoder", "backbone")
    ):
        size = read(pipeline.size)
        assert size is None or all(isinstance(side, int) and side > 0 for side in size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, catalog: Catalog) -> Path:
    torch.manual_seed(0)
    made = LensPipeline.from_parts(evolve(toy.PARTS, steps=3), catalog)
    made.presets["sizes"] = {"1024": {"1:1": [32, 32]}}
    made.provenance = {"base_model": "a/b", "license": "mit", "recipe": {"method": "fit"}, "loras": ["x:1"]}
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    made.save_pretrained(folder)
    (folder / "lens.json").rename(folder / "sound.json")
    return folder


# ---- LoRA ---------------------------------------------------------------------------------------------------------

KEYS = st.builds(
    lambda prefix, layer, end: prefix + layer + end,
    st.sampled_from(["", "transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", "lora_unet_inner"]
    ),
    st.sampled_from(["inner", "outer", "a.b", "inner.lora_A", ""]),
    st.sampled_from(
        [".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_A.default.weight",
         ".hada_w1_a", ".lora_A.bias", ""]
    ),
)  # fmt: skip
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.one_of(st.sampled_from([(2, 5), (16, 2), (1, 5), (16, 1)]), st.lists(st.integers(0, 3), max_size=3)),
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.cfloat]
    ),
    st.sampled_from([1.0, 0.0, torch.nan, torch.inf, 1e38]),
)
PAIRS = st.fixed_dictionaries(
    {
        "transformer.inner.lora_A.weight": st.one_of(st.just(torch.ones(2, 5)), TENSORS),
        "transformer.inner.lora_B.weight": st.one_of(st.just(torch.ones(16, 2)), TENSORS),
    },
    optional={"transformer.inner.alpha": st.one_of(st.just(torch.tensor(2.0)), TENSORS)},
)
ABOUT = st.dictionaries(
    st.sampled_from(
        ["transformer.lora_alpha", "lora_alpha", "transformer.target_modules", "transformer.alpha_pattern", "x", "r"]
    ),
    JSON,
    max_size=3,
)
TOLD = st.fixed_dictionaries(
    {},
    optional={
        "lora_adapter_metadata": st.one_of(ABOUT.map(json.dumps), TEXTS.filter(str.isascii)),
        "ss_network_alpha": st.sampled_from(["4", "nan", "1e999", "", "x", "0"]),
        "alpha": st.sampled_from(["4", "-inf", "9" * 5000]),
    },
)


@fuzz
@given(tensors=st.one_of(PAIRS, st.dictionaries(KEYS, TENSORS, max_size=4)), header=TOLD, scribble=st.data())
def test_any_lora_is_folded_in_or_refused(
    tensors: dict[str, torch.Tensor], header: dict[str, str], scribble: st.DataObject
) -> None:
    net = nn.ModuleDict({"inner": nn.Linear(5, 16), "outer": nn.Linear(16, 4)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_tensors(path, tensors, header)
        if scribble.draw(st.booleans()):
            path.write_bytes(scribble.draw(st.composite(damage)(path.read_bytes())))
        changes = read(lambda: lora.read(path, net))
        if changes:
            lora.fold(net, changes, 1.0, kept := {})
            lora.unfold(net, kept)
        pairs = read(lambda: lora_keys.read(path))
        for name in lora_keys.KEY_FORMATS if pairs else ():
            other = Path(folder) / "b.safetensors"
            read(lambda name=name, other=other: lora_keys.write(other, pairs, name))


# ---- every reader, in processes of its own ------------------------------------------------------------------------

WORKER = Path(__file__).resolve().parents[1] / "fuzz_worker.py"


def work(first: int, count: int, folder: Path) -> tuple[list[str], list[str]]:
    """The cases of `count` seeds from `first` on: (the lines that ended, what failed). A worker that a case has killed
    is followed by another, which goes on behind it."""
    ended: list[str] = []
    failed: list[str] = []
    seed = first
    while seed < first + count:
        output, wrong = folder / f"{seed}.out", folder / f"{seed}.err"
        with output.open("w") as out, wrong.open("w") as err:
            command = [sys.executable, str(WORKER), str(seed), str(first + count - seed)]
            code = subprocess.run(command, stdout=out, stderr=err, check=False).returncode
        lines = [line for line in output.read_text().split("\n") if line[:1].isdigit() and " cases, " not in line]
        done = [line for line in lines if line.endswith((" ok", " failed"))]
        ended += done
        failed += [wrong.read_text()] if any(line.endswith(" failed") for line in done) else []
        if not lines or lines[-1] != (done or [""])[-1]:  # one had begun
            failed.append(f"the worker ended with {code} in {lines[-1:]}: {wrong.read_text()[-3000:]}")
        seed = int(lines[-1].split()[0]) + 1 if lines else first + count
    return ended, failed


def test_mutated_files_and_arguments_are_read_or_refused_in_time_and_in_little_memory(tmp_path: Path) -> None:
    count = CASES or 300
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda first: work(first, count // 2, tmp_path), (0, count // 2)))
    ended = [line for done, _ in halves for line in done]
    failed = [words for _, wrong in halves for words in wrong]
    slowest = max(([*line.split()[-2:], line] for line in ended), key=lambda words: float(words[0]))
    print(f"{len(ended)} cases in {time.monotonic() - begun:.0f} s, {len(failed)} failed, the slowest: {slowest[-1]}")
    assert failed == []
    assert len(ended) == count // 2 * 2
    assert len({line.split(maxsplit=1)[1].rsplit(maxsplit=2)[0] for line in ended}) >= 20, "each target has its turn"
