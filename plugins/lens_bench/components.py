"""The public benchmarks as components of kind `benchmark`: their prompts, who perceives, and how lines are decided.

A config names the perceivers, so that another detector or another OCR engine can be measured with. `prompts` takes so
many prompts, spread evenly over the file; None: all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lens_bench import decisions, prompt_files
from lens_bench.benchmarks import BENCHMARKS
from lens_core.catalog import Catalog
from lens_core.config import ComponentSpec
from lens_core.evaluation.decision import Decision
from lens_core.types import ConfigError, Picture, Prompt, Score
from lens_core.validators import integer, matching, one_of, optional, text

if TYPE_CHECKING:
    from torch import Tensor

    from lens_bench.perception import Roles

FILE = optional(text())
COUNT = optional(integer(at_least=1))
SHA256 = optional(matching("[0-9a-fA-F]{64}", "64 hexadecimal digits"))
Lines = list[list[dict[str, Any]]]
Log = Callable[[str], None]


def silent(line: str) -> None:
    """Write no progress."""


class PublicBenchmark:
    """What the four have in common. Perceiving is `lens_bench.perception`'s, deciding `lens_bench.benchmarks`'."""

    images_per_prompt = 4
    size = (1024, 1024)
    roles: tuple[str, ...] = ()  # fields of the config that name a perceiver

    def __init__(self, config: Any) -> None:
        self.config = config
        self._prompts: list[Prompt] | None = None

    def prompts(self) -> list[Prompt]:
        """Read once. Raises ConfigError, which names the file that is missing or wrong."""
        if self._prompts is None:
            self._prompts = prompt_files.evenly(self._read(), self.config.prompts)
        return self._prompts

    def _read(self) -> list[Prompt]:
        raise NotImplementedError

    def references(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The fields of each line of a picture that are known without it."""
        raise NotImplementedError

    def perceivers(self) -> Roles:
        """Who is asked about a picture. Raises ConfigError where the config names none."""
        raise NotImplementedError

    def check_requirements(self) -> None:
        """Raise ConfigError where a perceiver is not named, is of the wrong kind, or lacks a package, a file or a key.
        Loads no model and downloads nothing."""
        from lens_bench.perceive.run import missing_for

        if problems := missing_for(self.perceivers(), Catalog.installed()):
            raise ConfigError(problems)

    def perceive(self, pictures: Sequence[Picture], folder: Path, log: Log = silent) -> Lines:
        """What the config's perceivers read, for each picture the fields of its lines. One model is in memory at a
        time: what `score` kept is freed first."""
        self.close()
        return self._read_pictures(pictures, folder, log=log)

    def _read_pictures(self, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
        raise NotImplementedError

    def close(self) -> None:
        """Free the perceivers that `score` keeps, in this process, for its next call."""
        from lens_bench.perceive.kept import KEPT

        with KEPT.lock:
            KEPT.close()

    def decide(self, perceptions: Path) -> Decision:
        return decisions.decide(type(self).__name__, perceptions)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> one Score each: perceived, decided, and the share of the verdict that is right.
        Means of these are not always the benchmark's official score, which `decide` gives. Perceivers stay loaded for
        the next call, in this process, until `close`, or until another benchmark has other options for the role."""
        from PIL import Image

        from lens_bench.perceive.kept import KEPT

        with tempfile.TemporaryDirectory() as name, KEPT.lock:
            pictures = []
            for place, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                path = Path(name) / f"{place}.png"
                Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path)
                digest = decisions.sha256_of(path)
                pictures.append(Picture(path, digest, prompt, place))
            perceived = self._read_pictures(pictures, Path(name) / "cache", kept=KEPT)
        return [self._score(prompt, lines) for prompt, lines in zip(prompts, perceived, strict=True)]

    def _score(self, prompt: Prompt, lines: Sequence[Mapping[str, Any]]) -> Score:
        """The score of the first line that decides about one picture alone."""
        references = {reference["bench"]: reference for reference in self.references(prompt)}
        for line in lines:
            bench = line["bench"]
            if line.get("status", "ok") != "ok":
                continue
            verdict = BENCHMARKS[bench].decide({**references[bench], **line})
            one = decisions.picture_score(bench, verdict, "", 0, prompt.task)
            if one is not None and one.value is not None:
                return Score("ok", one.value, evidence=str(verdict.get("reason", "")))
        return Score("abstain", evidence="nothing in the config perceives what this prompt is judged by")

    def workload(self, images: int) -> dict[str, int]:
        """How many prompts there are, and how often each perceiver is asked, for a dry run. A prompt file is read only
        where the config names one. Raises ConfigError for more prompts than there are."""
        raise NotImplementedError

    def _counts(self, total: int, images: int, per_picture: Mapping[str, float]) -> dict[str, int]:
        """`per_picture`: for each perceiver, how many questions there are for one picture of each of all prompts. Other
        prompts, of a file, are taken to be like these."""
        english = getattr(self.config, "language", "en") == "en"  # of others there may be more
        if self.config.file is not None:
            prompts = self.prompts()
            count = sum(bool(self.references(prompt)) for prompt in prompts) or len(prompts)
        elif self.config.prompts is None:
            count = total
        elif self.config.prompts > total and english:
            raise ConfigError(f"prompts: there are {total} prompts, not {self.config.prompts}; ask for fewer")
        else:
            count = min(self.config.prompts, total)
        named = {role: n for role, n in per_picture.items() if getattr(self.config, role) is not None}
        questions = {_label(role): round(n * images * count / total) for role, n in named.items()}
        return {"prompts": count, **questions}


def _label(role: str) -> str:
    return f"{role.replace('_', ' ')} readings"


def _uses(config: Any, roles: Sequence[str]) -> Iterator[tuple[str, str, ComponentSpec]]:
    for role in roles:
        if getattr(config, role) is not None:
            yield role, "perceiver", getattr(config, role)


class GenEval(PublicBenchmark):
    """GenEval: objects, counts, colours and positions, by a detector; 553 prompts.

    Four pictures each.
    """

    total = 553

    @frozen
    class Config:
        file: str | None = field(default=None, validator=FILE)  # evaluation_metadata.jsonl; None: fetched
        sha256: str | None = field(default=None, validator=SHA256)  # what that file must have
        prompts: int | None = field(default=None, validator=COUNT)
        detector: ComponentSpec = field(default=ComponentSpec("mask2former"))
        classifier: ComponentSpec = field(default=ComponentSpec("clip_colors"))

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """What is checked with this config: (path, kind, use)."""
            yield from _uses(self, ("detector", "classifier"))

    def _read(self) -> list[Prompt]:
        (path,) = prompt_files.locate(prompt_files.GENEVAL, self.config.file, self.config.sha256).values()
        prompts = prompt_files.geneval(path, BENCHMARKS["geneval"].nothing)
        return prompts if self.config.file else prompt_files.check_count("geneval", prompts, self.total)

    def references(self, prompt: Prompt) -> list[dict[str, Any]]:
        return [{"bench": "geneval", "metadata": dict(prompt.data["metadata"])}]

    def perceivers(self) -> Roles:
        from lens_bench import perception

        return perception.geneval_roles(self.config)

    def _read_pictures(self, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
        from lens_bench import perception

        return perception.geneval(self.config, pictures, folder, **options)

    def workload(self, images: int) -> dict[str, int]:
        return self._counts(self.total, images, {"detector": 553, "classifier": 194})  # colors and color_attr


class CVTG(PublicBenchmark):
    """CVTG-2K: words to be drawn, read back by OCR; 2,000 prompts.

    One picture each.
    """

    total = 2000
    images_per_prompt = 1

    @frozen
    class Config:
        file: str | None = field(default=None, validator=FILE)  # CVTG-2K.zip or its folder
        sha256: str | None = field(default=None, validator=SHA256)  # of the zip
        # A commit of the authors' dataset on the Hub, from which it is fetched where `file` is not given.
        revision: str | None = field(default=None, validator=optional(matching("[0-9a-f]{40}", "a commit's 40 digits")))
        prompts: int | None = field(default=None, validator=COUNT)
        ocr: ComponentSpec = field(default=ComponentSpec("rapidocr"))
        similarity: ComponentSpec | None = field(default=ComponentSpec("clip_similarity"))  # None: no CLIPScore

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """What is checked with this config: (path, kind, use)."""
            yield from _uses(self, ("ocr", "similarity"))

    def _read(self) -> list[Prompt]:
        config = self.config
        path = Path(config.file).expanduser() if config.file else _cvtg_archive(config.revision)
        if config.sha256 is not None:
            prompt_files.check_sha256(path, config.sha256)
        prompts = prompt_files.cvtg(path)
        return prompts if config.file else prompt_files.check_count("cvtg", prompts, self.total)

    def references(self, prompt: Prompt) -> list[dict[str, Any]]:
        return [{"bench": "cvtg2k", "prompt": prompt.text, "category": prompt.data["category"]}]

    def perceivers(self) -> Roles:
        from lens_bench import perception

        return perception.cvtg_roles(self.config)

    def _read_pictures(self, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
        from lens_bench import perception

        return perception.cvtg(self.config, pictures, folder, **options)

    def workload(self, images: int) -> dict[str, int]:
        return self._counts(self.total, images, {"ocr": 2000, "similarity": 2000})


def _cvtg_archive(revision: str | None) -> Path:
    """The authors' zip in the Hub's cache, fetched if need be."""
    name, repository = prompt_files.CVTG_ARCHIVE, prompt_files.CVTG_REPOSITORY
    advice = f"download {name} from the dataset {repository} of the Hub and give it with --prompts-file"
    if revision is None:
        raise ConfigError(f"cvtg: {name} is not given, and no revision to fetch it at; {advice}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(f"cvtg: {name} cannot be fetched ({type(error).__name__}); {advice}") from error


class LongText(PublicBenchmark):
    """LongText-Bench: long texts to be drawn, read back by a model; 160 prompts.

    Four pictures each.
    """

    total = 160

    @frozen
    class Config:
        file: str | None = field(default=None, validator=FILE)  # text_prompts.jsonl; None: fetched
        sha256: str | None = field(default=None, validator=SHA256)  # what that file must have
        prompts: int | None = field(default=None, validator=COUNT)
        language: str = field(default="en", validator=one_of("en", "zh"))
        # A model that answers, as the authors use one, or an OCR engine. Needed for the stage perceive.
        reader: ComponentSpec | None = None

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """What is checked with this config: (path, kind, use)."""
            yield from _uses(self, ("reader",))

    def _read(self) -> list[Prompt]:
        source = prompt_files.LONGTEXT[self.config.language]
        (path,) = prompt_files.locate(source, self.config.file, self.config.sha256).values()
        prompts = prompt_files.longtext(path)
        return prompts if self.config.file else prompt_files.check_count("longtext", prompts, self.total)

    def references(self, prompt: Prompt) -> list[dict[str, Any]]:
        bench = f"longtext_{self.config.language}"
        return [{"bench": bench, "text": list(prompt.data["text"]), "category": prompt.data["category"]}]

    def perceivers(self) -> Roles:
        from lens_bench import perception

        return perception.longtext_roles(self.config)

    def _read_pictures(self, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
        from lens_bench import perception

        return perception.longtext(self.config, pictures, folder, **options)

    def workload(self, images: int) -> dict[str, int]:
        return self._counts(self.total, images, {"reader": 160})


ONEIG_ROLES = ("reader", "vlm", "style_csd", "style_encoder", "diversity", "reasoning")
NO_ONEIG_ROLE = f"oneig: no perceiver is named; name one of {', '.join(ONEIG_ROLES)}"


class OneIG(PublicBenchmark):
    """OneIG-Bench: alignment, text, diversity, style, reasoning; 1,120 prompts.

    Four pictures each, of prompts of those dimensions alone whose perceivers are named.
    """

    total = 1120

    @frozen
    class Config:
        file: str | None = field(default=None, validator=FILE)  # a folder with the authors' files; None: fetched
        prompts: int | None = field(default=None, validator=COUNT)
        language: str = field(default="en", validator=one_of("en", "zh"))
        reader: ComponentSpec | None = None  # text
        vlm: ComponentSpec | None = None  # alignment
        style_csd: ComponentSpec | None = None  # style needs both
        style_encoder: ComponentSpec | None = None
        diversity: ComponentSpec | None = None
        reasoning: ComponentSpec | None = None

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """What is checked with this config: (path, kind, use)."""
            yield from _uses(self, ONEIG_ROLES)

    def prompts(self) -> list[Prompt]:
        """All, or a part of those that count for a dimension whose perceivers are named; of all where none is."""
        if self._prompts is None:
            prompts = self._read()
            if self.config.prompts is not None:
                prompts = [prompt for prompt in prompts if self.references(prompt)] or prompts
            self._prompts = prompt_files.evenly(prompts, self.config.prompts)
        return self._prompts

    def _read(self) -> list[Prompt]:
        language = self.config.language
        prompts = prompt_files.oneig(prompt_files.locate(prompt_files.ONEIG[language], self.config.file), language)
        counted = self.config.file or language != "en"  # the Chinese file has more
        return prompts if counted else prompt_files.check_count("oneig", prompts, self.total)

    def references(self, prompt: Prompt) -> list[dict[str, Any]]:
        from lens_bench import perception

        known = ("text_content", "questions", "dependencies", "style", "answer")
        fields = {name: prompt.data[name] for name in known if name in prompt.data}
        benches = perception.oneig_benches(self.config, prompt)
        return [{"bench": bench, "category": prompt.data["category"], **fields} for bench in benches]

    def perceivers(self) -> Roles:
        from lens_bench import perception

        config = self.config
        if (config.style_csd is None) != (config.style_encoder is None):
            named, absent = ("style_csd", "style_encoder")[:: 1 if config.style_encoder is None else -1]
            raise ConfigError(f"$.{absent}: OneIG's style needs it beside {named}; name both, or neither")
        if not perception.named_dimensions(config):
            raise ConfigError(NO_ONEIG_ROLE)
        return perception.oneig_roles(config)

    def _read_pictures(self, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
        from lens_bench import perception

        if all(getattr(self.config, role) is None for role in ONEIG_ROLES):
            raise ConfigError(NO_ONEIG_ROLE)
        return perception.oneig(self.config, pictures, folder, **options)

    def workload(self, images: int) -> dict[str, int]:
        from lens_bench import perception

        dimensions = perception.named_dimensions(self.config)
        # The prompts of style are among those of alignment; those of diversity are all.
        counted = {"text": 200, "alignment": 695, "style": 114, "reasoning": 225, "diversity": self.total}
        if "diversity" in dimensions or not dimensions:
            total = self.total
        else:
            total = sum(counted[d] for d in dimensions if d != "style" or "alignment" not in dimensions)
        questions = {
            "reader": 200, "vlm": 11_231, "style_csd": 114, "style_encoder": 114, "diversity": 1120, "reasoning": 225
        }  # fmt: skip
        return self._counts(total, images, questions)
