"""Mutated files and arguments, one case a seed: each is read, or refused in one line, in time and in little memory.

`python tests/fuzz_worker.py FIRST COUNT` runs the cases of the seeds FIRST, FIRST + 1, …; a case is the same wherever
it runs. Each prints `SEED TARGET` to stdout where it begins, and that with its seconds and outcome where it ends; one
that fails prints its traceback to stderr. The exit status is 1 if one failed. To repeat a case, run it alone.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 10  # seconds a case may take
MEMORY = 2 * 2**30  # bytes that it may take beyond what the libraries do
ROOT = Path(__file__).resolve().parents[1]

NASTY: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", "\0", "a" * 70_000, "\ud800", "\u2028", "\ufeff", "..", "/", "-",
    "é" * 9, "\x1b[2J", "a\nb", [], {}, [[]], {"": {}}, [1, 2], {"use": "x"}, "tiny:", "x:y", [None] * 300,
]  # fmt: skip
TOKENS = [
    b"NaN", b"Infinity", b"1e400", b"9" * 5000, b'"\\ud800"', b"[" * 2000, b'{"a":' * 2000, b"\xff", b"\0",
    b"\xef\xbb\xbf", "\u2028".encode(), b"\r", b"\n", b"-1", b"null", b"true", b"[]", b"{}", b"''", b'""', b": ", b"- ",
    b"&a [*a]", b"*a",
    b"<<: ", b"!!int ''", b"0x" + b"f" * 300, b"{{ 1/0 }}", b"{% for a in range(99999) %}", b"{{ 'a' * 3000000000 }}",
    b"'a' * 3000000000", b"1:1:1:1", b"2026-99-99", b"\xed\xa0\x80", b"18446744073709551616", b"1e308",
]  # fmt: skip


class TooLong(BaseException):
    """A case has had its time."""


# ---- mutations ----------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        to = min(to, at + 200)
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:at]
        elif kind == 1 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + rng.choice(TOKENS) + data[to:]
        elif kind == 3:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 4:
            data = data[:at] + data[to:]
        elif kind == 5:
            data = data[:at] + data[at:to] * rng.choice([2, 3, 50]) + data[to:]
        else:
            data = data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, of a long list and a deep one only the first few."""
    if len(path) > 20:
        return [path]
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path, *(p for key, item in inner[:40] for p in places(item, (*path, key)))]


def mutate_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with a few places replaced, removed, renamed, swapped or made deep."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        every = places(value)[1:]
        if not every:
            return copy.deepcopy(rng.choice(NASTY))
        *way, last = rng.choice(every)
        here = value
        for key in way:
            here = here[key]
        kind = rng.randrange(6)
        if kind <= 2:
            here[last] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 3:
            del here[last]
        elif kind == 4 and isinstance(here, dict):
            here[rng.choice(["", "use", "type", "config", "steps", "x" * 300, "\ud800", "__metadata__"])] = here.pop(
                last
            )
        elif kind == 4:
            here.insert(0, copy.deepcopy(here[last]))
        else:
            for _ in range(rng.choice([1, 3, 70, 300])):
                here[last] = [here[last]] if rng.random() < 0.5 else {"a": here[last]}
    return value


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Text of JSON: most often changed as a value, else as bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    return json.dumps(mutate_value(rng, json.loads(data))).encode("utf-8", "surrogatepass")


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """Lines of JSON: one or two of them changed."""
    rows = data.removesuffix(b"\n").split(b"\n")
    for at in rng.sample(range(len(rows)), min(len(rows), rng.randrange(1, 3))):
        rows[at] = mutate_json(rng, rows[at])
    return b"\n".join(rows)


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file: its header changed as a value and its length made to fit, else bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate_value(rng, json.loads(data[8 : 8 + size]))).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


# ---- targets ------------------------------------------------------------------------------------------------------


class Targets:
    """What is read, in a folder of its own: `all` is (name, how often, case), a case takes a random generator."""

    def __init__(self, folder: Path) -> None:
        sys.path[:0] = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "tests"), str(ROOT / "tests" / "core")]
        import gguf_files
        import torch
        import toy
        from attrs import evolve

        from lens_core.catalog import Catalog
        from lens_core.checkpoints import manifest, tensor_files
        from lens_core.inference import png_metadata
        from lens_core.inference.pipeline import LensPipeline

        torch.set_num_threads(1)
        self.folder = folder
        self.toys, self.catalog = Catalog.of(toy), Catalog.installed()
        torch.manual_seed(0)
        made = LensPipeline.from_parts(evolve(toy.PARTS, steps=3), self.toys)
        made.presets["sizes"] = {"1024": {"1:1": [32, 32]}}
        made.provenance = {"base_model": "a/b", "recipe": {"method": "fit"}, "loras": ["x:1"]}
        made.save_pretrained(folder / "toy")
        shutil.copytree(manifest.resolve_uri("tiny:", self.catalog), folder / "tiny")
        (folder / "tiny" / "lens.json").unlink()
        picture = made("a cat", height=32, width=48, seed=1)
        facts = {"prompt": "a cat", "seed": 1, **picture.settings}
        png_metadata.save(picture.images[0], folder / "a.png", facts)
        LensPipeline.from_pretrained("tiny:", device="cpu")  # imports what is heavy, which is no case's fault
        self.facts = json.loads(json.dumps(facts))
        self.picture = picture.images[0]
        self.layers = made.backbone
        self.recipes = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
        low = {
            "transformer.inner.lora_A.weight": torch.ones(1, made.backbone.inner.weight.shape[1]),
            "transformer.inner.lora_B.weight": torch.ones(made.backbone.inner.weight.shape[0], 1),
            "transformer.inner.alpha": torch.tensor(2.0),
        }
        about = json.dumps({"transformer.lora_alpha": 1, "transformer.r": 1, "transformer.target_modules": ["inner"]})
        tensor_files.save_tensors(folder / "lora.safetensors", low, {"lora_adapter_metadata": about})
        peft = folder / "peft"
        peft.mkdir()
        tensor_files.save_tensors(
            peft / "adapter_model.safetensors", {f"base_model.model.{k.partition('.')[2]}": v for k, v in low.items()}
        )
        (peft / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 4, "target_modules": ["inner"], "alpha_pattern": {}})
        )
        weight = torch.ones(2, 64)
        stored = {"w": (gguf_files.quantised(weight, "Q4_0"), "Q4_0"), "x": weight}
        gguf_files.write(folder / "a.gguf", stored, {"a": "text", "b": ["x", "y"], "c": [1, 2]})
        encoder = "text_encoder"
        self.all: list[tuple[str, int, Callable[[random.Random], None]]] = [
            ("recipe", 8, self.recipe),
            ("lens.json", 8, self.lens_json),
            ("model_index.json", 4, lambda rng: self.published(rng, "model_index.json", "backbone")),
            ("transformer/config.json", 4, lambda rng: self.published(rng, "transformer/config.json", "backbone")),
            ("vae/config.json", 4, lambda rng: self.published(rng, "vae/config.json", "vae")),
            ("text_encoder/config.json", 3, lambda rng: self.published(rng, "text_encoder/config.json", encoder)),
            ("tokenizer_config.json", 2, lambda rng: self.published(rng, "tokenizer/tokenizer_config.json", encoder)),
            ("tokenizer.json", 3, self.tokenizer),
            ("chat template", 1, self.template),
            ("PNG", 4, self.png),
            ("facts of a PNG", 5, self.facts_of_png),
            ("another tool's PNG", 4, self.foreign_png),
            ("latent_preview.json", 2, self.preview_map),
            ("LoRA", 7, self.lora),
            ("PEFT folder", 4, self.peft),
            ("safetensors", 6, self.tensors),
            ("GGUF", 6, self.gguf),
            ("index of shards", 4, self.shards),
            ("prompts file", 3, self.prompts_file),
            ("prompt set", 7, self.prompt_set),
            ("taxonomy", 4, self.taxonomy),
            ("judge's answer", 8, self.judge),
            ("image API's answer", 8, self.image_answer),
            ("ledger", 4, self.ledger),
            ("perceptions", 6, self.perceptions),
            ("perception cache", 4, self.perception_cache),
            ("manifest", 4, self.manifest),
            ("prompt file", 6, self.prompt_file),
            ("benchmark run", 4, self.benchmark_run),
            ("log", 5, self.log),
            ("evaluation log", 6, self.evaluations),
            ("results", 6, self.results),
            ("tar", 6, self.tar),
            ("folder of pictures", 3, self.pictures),
            ("curation recipe", 8, self.curation_recipe),
            ("list of addresses", 4, self.addresses),
            ("picture in a curation", 6, self.curated_picture),
            ("arguments", 8, self.arguments),
        ]  # fmt: skip

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / "case" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def recipe(self, rng: random.Random) -> None:
        import yaml

        from lens_core.recipe import read_recipe

        data = rng.choice(self.recipes).read_bytes()
        if rng.random() < 0.6:
            value = mutate_value(rng, yaml.safe_load(data))
            data = json.dumps(value).encode("utf-8", "surrogatepass")
        else:
            data = mutate_bytes(rng, data)
        changes = [mutate_bytes(rng, b"train.lr=1e-4").decode("utf-8", "replace")] if rng.random() < 0.2 else []
        read_recipe(self.write("recipe.yaml", data), self.catalog, changes)

    def curation_recipe(self, rng: random.Random) -> None:
        import yaml
        from lens_curate.recipe import build_filters, read_spec
        from lens_curate.sources import build_sources

        data = (ROOT / "examples" / "curation" / "holidays.yaml").read_bytes()
        if rng.random() < 0.7:
            data = json.dumps(mutate_value(rng, yaml.safe_load(data))).encode("utf-8", "surrogatepass")
        else:
            data = mutate_bytes(rng, data)
        spec = read_spec(self.write("curation.yaml", data))
        build_filters(spec, self.catalog)
        build_sources(spec.sources, self.catalog)

    def addresses(self, rng: random.Random) -> None:
        from lens_curate.urls import Urls

        lines = [json.dumps({"url": f"https://example.org/{n}.png", "caption": "A picture."}) for n in range(5)]
        data = mutate_lines(rng, "\n".join(lines).encode()) + b"\nhttps://example.org/last.png\n"
        data = mutate_bytes(rng, data) if rng.random() < 0.3 else data
        config = Urls.Config(str(self.write("list.txt", data)), downloads=str(self.folder / "downloads"))
        for part in Urls(config, self.catalog).parts():
            assert part.fault or all(isinstance(entry["url"], str) for entry in part.payload["urls"])
            json.dumps(part.payload)

    def curated_picture(self, rng: random.Random) -> None:
        from lens_curate.recipe import CurationSpec
        from lens_curate.worker import PartTask, Worker

        from lens_core.config import structure

        folder = self.folder / "case" / "raw"
        for name in ("a.png", "b.png"):
            self.write(f"raw/{name}", mutate_bytes(rng, (self.folder / "a.png").read_bytes()))
        self.write("raw/a.txt", mutate_bytes(rng, b"A picture of a cat."))
        self.write("raw/metadata.csv", mutate_bytes(rng, b"file_name,text\na.png,A cat\nb.png,A dog"))
        filters = ["luminance", "clarity", "blockiness", "borders", "file", "captions", "entropy"]
        recipe = {"sources": [{"use": "folder", "path": str(folder)}], "filters": filters}
        worker = Worker(structure(CurationSpec, recipe), str(self.folder / "no-store"), self.catalog)
        parts = list(worker.sources[0].source.parts())
        answers = list(worker.run([PartTask(0, part, True, tuple(range(len(filters)))) for part in parts]))
        assert {answer.kind for answer in answers} >= {"records", "parts"}

    def swapped(self, path: Path, data: bytes, call: Callable[[], object]) -> None:
        """`call` while `path` holds `data`."""
        sound = path.read_bytes()
        try:
            path.write_bytes(data)
            call()
        finally:
            path.write_bytes(sound)

    def lens_json(self, rng: random.Random) -> None:
        from lens_core.checkpoints import model_card
        from lens_core.checkpoints.manifest import read_manifest
        from lens_core.inference.pipeline import LensPipeline

        path = self.folder / "toy" / "lens.json"

        def call() -> None:
            model_card.text(read_manifest(path.parent, self.toys), "toys/blocks")
            pipeline = LensPipeline.from_pretrained(path.parent, catalog=self.toys, device="cpu")
            if pipeline.vae is not None:
                pipeline.size()

        self.swapped(path, mutate_json(rng, path.read_bytes()), call)

    def published(self, rng: random.Random, name: str, part: str) -> None:
        import torch
        from lens_mmdit.published import describe

        from lens_core.recipe import ComponentSpec, build

        root = self.folder / "tiny"

        def call() -> None:
            described = describe(root)
            if described is not None:
                use = described["components"][part]
                _, cls, config = build(self.catalog, part, ComponentSpec(use["use"], use["config"]), part)
                cls.load(root, config, dtype=torch.float32)

        self.swapped(root / name, mutate_json(rng, (root / name).read_bytes()), call)

    def tokenizer(self, rng: random.Random) -> None:
        from lens_gpt_oss.template import Wrapper, open_tokenizer

        path = self.folder / "tiny" / "tokenizer" / "tokenizer.json"

        def call() -> None:
            Wrapper(open_tokenizer(path.parent), "2026-05-20").ids(["a red cat é 猫"], 512)

        self.swapped(path, mutate_json(rng, path.read_bytes()), call)

    def template(self, rng: random.Random) -> None:
        from lens_gpt_oss.template import HARMONY, conversation, render

        text = mutate_bytes(rng, HARMONY.encode()).decode("utf-8", "replace")
        render(text, conversation("a cat"), "2026-05-20")

    def png(self, rng: random.Random) -> None:
        from lens_core.inference import png_metadata
        from lens_core.io import images

        path = self.write("b.png", mutate_bytes(rng, (self.folder / "a.png").read_bytes()))
        images.read_rgb(path)
        png_metadata.facts(path)

    def facts_of_png(self, rng: random.Random) -> None:
        from PIL.PngImagePlugin import PngInfo

        from lens_core.inference import png_metadata

        text = mutate_json(rng, json.dumps(self.facts).encode()).decode("utf-8", "replace")
        info = PngInfo()
        info.add_itxt("lens", text)
        path = self.write("c.png", b"")
        self.picture.save(path, pnginfo=info)
        png_metadata.facts(path)

    def foreign_png(self, rng: random.Random) -> None:
        from PIL.PngImagePlugin import PngInfo
        from test_foreign_facts import A1111, GRAPH, WORKFLOW

        from lens_core.inference import foreign_facts

        name, content = rng.choice([("prompt", GRAPH), ("workflow", WORKFLOW), ("parameters", A1111)])
        change = mutate_bytes if name == "parameters" else mutate_json
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        info = PngInfo()
        info.add_itxt(name, change(rng, data).decode("utf-8", "replace"))
        path = self.write("d.png", b"")
        self.picture.save(path, pnginfo=info)
        foreign_facts.read(path)

    def preview_map(self, rng: random.Random) -> None:
        from lens_core.checkpoints import latent_preview, manifest

        source = self.folder / "tiny" / "vae" / manifest.PREVIEW_FILE
        latent_preview.read(self.write(manifest.PREVIEW_FILE, mutate_json(rng, source.read_bytes())), 32)

    def lora(self, rng: random.Random) -> None:
        from lens_core.checkpoints import lora_keys
        from lens_core.inference import lora as loras

        path = self.write("lora.safetensors", mutate_header(rng, (self.folder / "lora.safetensors").read_bytes()))
        lora_keys.write(path.with_name("out.safetensors"), lora_keys.read(path), rng.choice(lora_keys.KEY_FORMATS))
        loras.read(path, self.layers)

    def peft(self, rng: random.Random) -> None:
        from lens_core.inference import lora as loras

        path = self.folder / "peft" / "adapter_config.json"
        self.swapped(path, mutate_json(rng, path.read_bytes()), lambda: loras.read(path.parent, self.layers))

    def tensors(self, rng: random.Random) -> None:
        from lens_core.checkpoints.lazy_tensors import read_lazy
        from lens_core.checkpoints.tensor_files import read_header, read_tensors
        from lens_core.types import LensError

        path = self.write("x.safetensors", mutate_header(rng, (self.folder / "lora.safetensors").read_bytes()))
        with contextlib.suppress(LensError):
            read_tensors(path)
            read_header(path)
        for tensor in read_lazy(path)[0].values():
            tensor.read()

    def gguf(self, rng: random.Random) -> None:
        from lens_core.checkpoints.gguf_files import read_gguf

        path = self.write("x.gguf", mutate_bytes(rng, (self.folder / "a.gguf").read_bytes()))
        for tensor in read_gguf(path, ("b",))[0].values():
            tensor.read()

    def shards(self, rng: random.Random) -> None:
        from lens_core.checkpoints.tensor_files import read_weights

        index = {"metadata": {"total_size": 4}, "weight_map": {"a": "lora.safetensors", "b": "none.safetensors"}}
        self.write("lora.safetensors", (self.folder / "lora.safetensors").read_bytes())
        path = self.write("m.safetensors.index.json", mutate_json(rng, json.dumps(index).encode()))
        read_weights(path.parent, "m")

    def prompts_file(self, rng: random.Random) -> None:
        from lens_core.cli.options import read_prompts

        lines = read_prompts(None, self.write("prompts.txt", mutate_bytes(rng, "a cat\né\u2028b\r\n\n猫\n".encode())))
        assert all("\n" not in line and line.strip() for line in lines)

    def prompt_set(self, rng: random.Random) -> None:
        from lens_llm.prompts import read

        words = ["a red cat", "two blue dogs on a hill", "a lamp"]
        entries = [
            {
                "schema": "lens-rl/1", "prompt_id": i, "split": "train", "prompt": text, "taxonomy": {"class": "a"},
                "sizes": [[64, 96]], "rubrics": [{"id": "r", "q": "Is it?", "weight": 1.0}],
                "global": {"id": "g", "q": "Coherent?", "weight": 1.0}, "provenance": {"license": "CC0"},
            }
            for i, text in enumerate(words)
        ]  # fmt: skip
        data = b"\n".join(json.dumps(e).encode() for e in entries)
        for prompt in read(self.write("set.jsonl", mutate_lines(rng, data)), rng.choice([1, None])):
            prompt.text.encode()

    def taxonomy(self, rng: random.Random) -> None:
        from lens_llm.taxonomy import read_taxonomy
        from lens_llm.writing import prompt_requests

        value = {
            "llm": {"use": "openai", "model": "m"},
            "license": "CC0",
            "classes": {"a": {"b": ["c", "d"]}},
            "eval": 0.1,
        }
        taxonomy = read_taxonomy(self.write("taxonomy.yaml", mutate_json(rng, json.dumps(value).encode())))
        for _, order in zip(range(100), prompt_requests(taxonomy), strict=False):
            order.split.encode()

    def judge(self, rng: random.Random) -> None:
        import torch
        from lens_llm.client import OpenAI
        from lens_llm.completions import unpack
        from lens_llm.rubric import RubricReward

        from lens_core.io.http import Answer
        from lens_core.recipe import ComponentSpec
        from lens_core.types import Prompt, Score

        verdicts = {"verdicts": [{"id": i, "evidence": "seen", "v": "yes"} for i in ("r", "g")]}
        text = json.dumps(mutate_value(rng, verdicts) if rng.random() < 0.5 else verdicts)
        text = rng.choice([text, f"<think>x</think>{text}", f"```json\n{text}\n```", text[: rng.randrange(len(text))]])
        whole = {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5},
        }
        body = mutate_json(rng, json.dumps(whole).encode()) if rng.random() < 0.7 else json.dumps(whole).encode()
        status, wait = rng.choice([200, 200, 200, 400, 429, 500]), rng.choice([None, "x", "-1", "1e400"])
        answer = Answer(status, "application/json", wait, None, body)

        class Canned(OpenAI):
            def _send(self, url: str, secret: str, body: bytes, tokens: int, as_is: bool = False) -> Any:
                return unpack(answer, secret, tokens, self._most())

        llm = Canned(OpenAI.Config(model="m", base_url="http://127.0.0.1:9/v1"), sleep=lambda _: None)
        reward = RubricReward(RubricReward.Config(ComponentSpec("openai")), llm)
        data = {"rubrics": [{"id": "r", "q": "Is it?"}], "global": {"id": "g", "q": "Coherent?"}}
        (score,) = reward.score(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [Prompt("a cat", data=data)])
        assert isinstance(score, Score) and (score.value is None or 0 <= score.value <= 1)

    def image_answer(self, rng: random.Random) -> None:
        from lens_remote.answers import Drawn
        from lens_remote.ark_images import ArkImages
        from lens_remote.gemini_images import GeminiImages
        from lens_remote.openai_images import OpenAIImages
        from lens_remote.pictures import check, decode
        from lens_remote.protocol import understand

        from lens_core.io.http import Answer

        coded = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
        part = {"inlineData": {"mimeType": "image/png", "data": coded}}
        details = [{"retryDelay": "9s", "reason": "x"}, {"violations": [{"quotaId": "PerDay", "quotaValue": "0"}]}]
        whole = rng.choice([
            {"data": [{"b64_json": coded, "size": "1x1"}, {"error": {"code": "x"}}], "usage": {"output_tokens": 5}},
            {"candidates": [{"content": {"parts": [part, {"thought": True}]}, "finishReason": "STOP"}],
             "usageMetadata": {"candidatesTokenCount": 3}, "promptFeedback": {"blockReason": ""}},
            {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m", "type": "t", "details": details}},
        ])  # fmt: skip
        body = mutate_json(rng, json.dumps(whole).encode())
        kind = rng.choice(["application/json", "text/event-stream", "text/html", ""])
        body = b"data: " + body + b"\n\n" if kind == "text/event-stream" else body
        headers = {"retry-after-ms": rng.choice(["", "nan", "-1", "1e400", "5"]), "x-should-retry": "true"}
        status = rng.choice([200, 200, 302, 400, 403, 429, 500, 999])
        cls = rng.choice([OpenAIImages, GeminiImages, ArkImages])
        config = cls.Config(model="m")  # type: ignore[attr-defined]  # each has its own
        result = understand(Answer(status, kind, "5", None, body, headers), cls(config))
        if isinstance(result, Drawn):
            data = decode(result.base64)
            result = check(data) if isinstance(data, bytes) else data
        else:
            assert result.kind in ("retry", "refusal", "fatal", "bad_request") and result.wait >= 0
            json.dumps(dict(result.usage), allow_nan=False)

    def ledger(self, rng: random.Random) -> None:
        from lens_remote.ledger import FILE, Ledger, Limits, read_lines, table

        place = self.folder / "case" / "ledger"
        shutil.rmtree(place, ignore_errors=True)
        book = Ledger(place)
        for key in ("a", "b"):
            line, _ = book.begin(key, "m", "a cat", 0.04, 60.0, Limits(), False)
            book.settle(line, "drawn", pictures=1, seconds=1.0, place="pictures/x.png", facts={"usage": {"x": 1}})
        book.close()
        self.write(f"ledger/{FILE}", mutate_bytes(rng, (place / FILE).read_bytes()))
        table(read_lines(place)).encode()

    def perceptions(self, rng: random.Random) -> None:
        from lens_bench import report

        data = (ROOT / "tests" / "cases" / "bench_samples.jsonl").read_bytes().strip()
        path = self.write("perceptions.jsonl", mutate_lines(rng, data))
        summary = report.score(rng.choice(list(report.BENCHMARKS)), path)
        report.write(path.with_name("verdicts.jsonl"), summary.verdicts)
        json.dumps(report.as_json(summary), allow_nan=False)
        report.table(summary).encode()

    def perception_cache(self, rng: random.Random) -> None:
        import numpy as np
        from lens_bench.perceive import masks
        from lens_bench.perceive.cache import PerceptionCache, key_of, other_versions

        folder = self.folder / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        made = PerceptionCache(folder, "objects", {"model": "m", "revision": "1"})
        thing = {"box": [0, 0, 3, 2], "score": 0.5, "mask": masks.encode(np.ones((2, 3), bool))}
        made.add((key_of(f"{i:064x}", None), {"dog": [thing] * i}) for i in range(3))
        (path,) = made.folder.glob("*.jsonl")
        change = rng.choice([mutate_lines, mutate_bytes])
        path.write_bytes(change(rng, path.read_bytes()) + b"\n" * rng.randrange(2))
        again = PerceptionCache(folder, "objects", {"model": "m", "revision": "1"})
        other_versions(folder, PerceptionCache(folder, "objects", {"model": "m", "revision": "2"}))
        for i in range(3):
            if (key := key_of(f"{i:064x}", None)) in again:
                assert again.answer(key) == {"dog": [thing] * i}

    def manifest(self, rng: random.Random) -> None:
        from lens_core.evaluation.manifest import Manifest

        row = {
            "prompt_id": "0", "index": 0, "prompt": "a dog", "sent_prompt": "a dog", "seed": 1, "system": "m",
            "revision": "", "status": "ok", "seconds": 1.0, "file": "images/0_0.png", "sha256": "0" * 64, "reason": "",
        }  # fmt: skip
        lost = row | {"index": 1, "status": "failed", "file": "", "sha256": "", "reason": "timeout"}
        data = mutate_lines(rng, b"\n".join(json.dumps(r).encode() for r in (row, lost)))
        manifest = Manifest(self.write("run/manifest.jsonl", data + b"\n").parent, "m")
        assert {key[0] for key in manifest.missing({"0": "a dog"}, 3)} == {"0"}

    def prompt_file(self, rng: random.Random) -> None:
        from lens_bench import components

        entry = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a red car"}
        text = {"prompt_id": 1, "category": "signs", "prompt": "a sign", "text": ["Hello"], "text_length": "short"}
        listed = {"data_list": [{"index": 0, "prompt": "a sign 'x'"}]}
        name, data = rng.choice([("geneval", entry), ("longtext", text), ("cvtg", listed)])
        raw = mutate_lines(rng, json.dumps(data).encode())
        if name == "cvtg":
            for style, regions in ((s, r) for s in ("CVTG", "CVTG-Style") for r in (2, 3, 4, 5)):
                self.write(f"cvtg/{style}/{regions}.json", raw)
            prompts = components.CVTG(components.CVTG.Config(file=str(self.folder / "cvtg"))).prompts()
        else:
            cls = components.GenEval if name == "geneval" else components.LongText
            prompts = cls(cls.Config(file=str(self.write("prompts.jsonl", raw)))).prompts()
        assert prompts and all(prompt.text.strip() for prompt in prompts)

    def benchmark_run(self, rng: random.Random) -> None:
        import stage_worker

        folder = self.folder / "bench-run"
        shutil.rmtree(folder, ignore_errors=True)
        if not hasattr(self, "finished_run"):
            stage_worker.run(folder, images=1)
            self.finished_run = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
            self.finished_images = {p.name: p.read_bytes() for p in (folder / "images").iterdir()}
        for place, files in ((folder, self.finished_run), (folder / "images", self.finished_images)):
            place.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (place / name).write_bytes(data)
        name = rng.choice(["run.json", "manifest.jsonl", "perceptions.jsonl", "ceiling.json"])
        data = self.finished_run.get(name, b'{"overall": 1.0}')
        (folder / name).write_bytes(
            mutate_lines(rng, data.strip()) + b"\n" if name.endswith("l") else mutate_json(rng, data)
        )
        report = stage_worker.run(folder, images=1, stages=("decide",))
        json.loads((folder / "result.json").read_text())
        assert 0 <= report.decision.coverage <= 1

    def log(self, rng: random.Random) -> None:
        from lens_tools import curves

        rows = [{"step": i, "backbone/loss": 1 / (i + 1), "seconds": 1.0, "lr": 1e-4} for i in range(6)]
        path = self.write("run/log.jsonl", mutate_lines(rng, b"\n".join(json.dumps(row).encode() for row in rows)))
        runs = {"run": [curves.read(path.parent)]}
        curves.table(runs)
        if rng.random() < 0.2:
            curves.draw(runs)

    def evaluations(self, rng: random.Random) -> None:
        from lens_core.recipe import Evaluation
        from lens_core.training.evaluator import Evaluator

        rows = [{"step": i, "seconds": 1.0, "shapes": 0.1 * i, "score": 0.1 * i, "sha256": "0" * 64} for i in range(6)]
        path = self.write(
            "evaluation/evaluations.jsonl", mutate_lines(rng, b"\n".join(json.dumps(row).encode() for row in rows))
        )
        evaluator = Evaluator.__new__(Evaluator)
        evaluator.config, evaluator.out, evaluator.lines = (
            Evaluation(every=1, prompts=("a",), patience=2),
            path.parent,
            {},
        )
        evaluator.log = lambda line: None
        for changed in ([], ["$.evaluation.seed was 1 and is 2"]):
            evaluator.resume(5, changed)
            evaluator.due(6, 9)
            evaluator.should_stop(5)
            evaluator.weights(5)

    def results(self, rng: random.Random) -> None:
        from lens_core.evaluation import comparison

        def result(model: str, value: float) -> dict[str, Any]:
            pictures = [{"prompt": f"p{i}", "task": "a", "seed": i, "status": "ok", "value": value} for i in range(4)]
            return {
                "benchmark": "shapes", "model": model, "model_hash": model, "seed": 0, "steps": 4,
                "guidance_scale": 1.0, "size": [64, 64], "headline": ["a"], "pictures": pictures,
                "dtype": "float32", "device": "cpu",
            }  # fmt: skip

        every = [json.dumps(result(f"m{i}", i / 2)).encode() for i in range(2)]
        at = rng.randrange(2)
        every[at] = mutate_json(rng, every[at])
        paths = [self.write(f"{i}.json", data) for i, data in enumerate(every)]
        comparison.table(comparison.compare([comparison.read(path) for path in paths]))

    def tar(self, rng: random.Random) -> None:
        import tarfile

        from lens_core.io import tars

        data = io.BytesIO()
        picture = (self.folder / "a.png").read_bytes()
        with tarfile.open(
            fileobj=data, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
        ) as archive:
            for name, content in (
                ("a.png", picture),
                ("a.txt", b"a cat"),
                ("b.png", picture),
                ("b.json", b'{"caption": "x"}'),
            ):
                member = tarfile.TarInfo(rng.choice([name, name, f"{'d' * 120}/{name}"]))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        path = self.write("a.tar", mutate_bytes(rng, data.getvalue()))
        for item in tars.read_tars(path):
            repr(item)[:10]

    def pictures(self, rng: random.Random) -> None:
        from lens_core.io import folders

        shutil.rmtree(self.folder / "case" / "pictures", ignore_errors=True)
        self.write("pictures/a.png", mutate_bytes(rng, (self.folder / "a.png").read_bytes()))
        self.write("pictures/a.json", mutate_json(rng, b'{"caption": "x", "brief": "y"}'))
        self.write(
            "pictures/metadata.jsonl", mutate_lines(rng, b'{"file_name": "a.png", "text": "x"}\n{"file_name": "b"}')
        )
        self.write("pictures/a.txt", mutate_bytes(rng, b"a cat"))
        for item in folders.read_folder(self.folder / "case" / "pictures"):
            repr(item)[:10]

    def arguments(self, rng: random.Random) -> None:
        from lens_core import catalog as catalogs
        from lens_core.cli import main as command

        toy, place = str(self.folder / "toy"), self.folder / "case"
        lines = [
            ["generate", "a cat", "--model", toy, "--size", "32x48", "--steps", "2", "--seed", "1", "-o", "x.png"],
            ["generate", "a", "--model", toy, "--aspect-ratio", "3:2", "--guidance-interval", "0.1,0.9", "--json"],
            ["generate", "a", "--model", toy, "--size", "32x32", "--lora", "lora:0.5",
             "--batch-size", "1", "--num-images", "2"],
            ["generate", "--reproduce", str(self.folder / "a.png"), "--model", toy],
            ["train", "recipe.yaml", "--set", "train.steps=1", "--dry-run"],
            ["bench", "fit", "--model", toy, "--limit", "1", "--size", "32x32", "--seed", "0", "--batch-size", "2"],
            ["compare", "a,b", "c"],
            ["lora", "convert", "lora.safetensors", "y.safetensors", "--to", "comfy"],
            ["push", "nowhere", "a/b", "--message", "x"],
            ["plugins", "--json"],
        ]  # fmt: skip
        words = rng.choice(lines)
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(len(words))
            nasty = rng.choice([str(rng.choice(NASTY[:-1])), rng.choice(TOKENS).decode("utf-8", "surrogateescape")])
            new = rng.choice(
                [
                    nasty,
                    mutate_bytes(rng, words[at].encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape"),
                ]
            )
            words = rng.choice([[*words[:at], new, *words[at + 1 :]], [*words[:at], *words[at + 1 :]], [*words, new]])
        if any(w in (".", "/") or w.startswith(("/dev", "http")) for w in words):
            return  # nothing outside this folder
        place.mkdir(exist_ok=True)
        before, installed = Path.cwd(), catalogs.Catalog.installed
        out, err = io.StringIO(), io.StringIO()
        try:
            os.chdir(place)
            catalogs.Catalog.installed = classmethod(lambda cls: self.toys)  # type: ignore[method-assign]
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = command.main(words)
        finally:
            os.chdir(before)
            catalogs.Catalog.installed = installed  # type: ignore[method-assign]  # as it was
        assert code in (0, 1, 2), (words, code)
        assert "fault of Lens" not in err.getvalue() and "Traceback" not in err.getvalue(), (words, err.getvalue())


# ---- the worker ---------------------------------------------------------------------------------------------------


def little_memory() -> None:
    """Allocations beyond MEMORY fail, as an exception that nobody expects."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))


def stop(*_: object) -> None:
    raise TooLong


def run(seed: int, targets: Targets) -> tuple[str, str]:
    """One case: (target, what was wrong with it, or nothing)."""
    from lens_core.types import LensError

    rng = random.Random(seed)
    names, weights, cases = zip(*targets.all, strict=True)
    at = rng.choices(range(len(names)), weights)[0]
    print(f"{seed} {names[at]}", flush=True)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    faulthandler.dump_traceback_later(3 * LIMIT, exit=True)  # for what does not come back to Python
    try:
        cases[at](rng)
    except LensError as error:
        lines = getattr(error, "problems", (str(error),))
        if any("\n" in line or len(line) > 3000 for line in lines):
            return names[at], f"a message of more than one line, or a very long one: {str(error)[:300]!r}"
    except TooLong:
        return names[at], f"took longer than {LIMIT} s: {traceback.format_exc(limit=-4)}"
    except BaseException as error:
        return names[at], f"{type(error).__name__}: {traceback.format_exc(limit=-8)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return names[at], ""


def main(first: int, count: int) -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "none", "RUST_BACKTRACE": "0"}
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(Path(folder))
        little_memory()
        for seed in range(first, first + count):
            begun = time.monotonic()
            name, fault = run(seed, targets)
            print(f"{seed} {name} {time.monotonic() - begun:.2f} {'failed' if fault else 'ok'}", flush=True)
            if fault:
                bad += 1
                print(f"seed {seed}, {name}: {fault}", file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{count} cases, {bad} failed, peak {peak} MiB", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
