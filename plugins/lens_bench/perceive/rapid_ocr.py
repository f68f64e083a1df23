"""The perceivers `rapidocr` and `paddle_ocr`: lines of text, read by RapidOCR's engine with ONNX models.

`rapidocr` is what the wheel brings (PP-OCRv6, small) with its own defaults. `paddle_ocr` is the configuration behind
CVTG-2K's published numbers, PaddleOCR 2.10 with `lang="en"`: other nets, other thresholds, ImageNet's normalisation.
The wheel does not bring those nets, and nothing is downloaded: they are files in a folder that the recipe names.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from attrs import field, frozen

from lens_bench.perceive import canary
from lens_core.checkpoints.manifest import hash_of
from lens_core.io import readers
from lens_core.types import ConfigError, LensError
from lens_core.validators import integer, text, within

if TYPE_CHECKING:
    from PIL.Image import Image

BUNDLED = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
}
# The files by the names under which RapidOCR's authors publish them, with the hashes that rapidocr 3.10 lists.
PADDLE = {
    "Det": ("en_PP-OCRv3_det_mobile.onnx", "ea07c15d38ac40cd69da3c493444ec75b44ff23840553ff8ba102c1219ed39c2"),
    "Cls": ("ch_ppocr_mobile_v2.0_cls_mobile.onnx", ""),  # any: the wheel's own serves where the folder has none
    "Rec": ("en_PP-OCRv4_rec_mobile.onnx", "e8770c967605983d1570cdf5352041dfb68fa0c21664f49f47b155abd3e0e318"),
}
PADDLE_OPTIONS: dict[str, Any] = {
    "Global.use_preprocess_img": False,  # PaddleOCR neither shrinks nor pads a picture before detection
    "Global.use_vertical_padding": False,
    "Global.text_score": 0.5,  # drop_score: lines that are less certain are left out
    "Det.limit_side_len": 960,
    "Det.limit_type": "max",
    "Det.mean": [0.485, 0.456, 0.406],
    "Det.std": [0.229, 0.224, 0.225],
    "Det.thresh": 0.3,
    "Det.box_thresh": 0.6,
    "Det.unclip_ratio": 1.5,
    "Det.use_dilation": False,
}


class _Engine:
    """RapidOCR with given files, loaded at its first use."""

    perceives: ClassVar[str] = "lines"
    batch_size = 8  # pictures read at once; the engine takes them one by one

    def __init__(self, files: Mapping[str, Path], options: Mapping[str, Any], version: str, threads: int) -> None:
        self._files, self._options, self._version, self._threads = files, options, version, threads
        self._engine: Any = None

    def describe(self) -> dict[str, str]:
        hashes = "+".join(hash_of(path)[:12] for path in self._files.values())
        names = "+".join(self._files[part].name.removesuffix(".onnx") for part in ("Det", "Rec"))
        return {"model": names, "revision": hashes, "version": f"rapidocr-{_version()}-{self._version}"}

    def close(self) -> None:
        self._engine = None

    def canary(self) -> str | None:
        return canary.sentence(self)

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[list[str] | LensError]:
        return [self._read(image) for image in images]

    def _read(self, image: Image) -> list[str] | LensError:
        engine = self._loaded()
        try:
            output = engine(np.ascontiguousarray(np.asarray(image)[..., ::-1]))  # BGR, as OpenCV has it
        except Exception as error:  # an engine that fails has read nothing, which is not the same as no text
            return LensError(f"RapidOCR failed ({readers.one_line(f'{type(error).__name__}: {error}')})")
        return [str(line) for line in getattr(output, "txts", None) or ()]

    def _loaded(self) -> Any:
        if self._engine is None:
            _package()
            from rapidocr import RapidOCR

            logging.getLogger("RapidOCR").setLevel(logging.ERROR)
            paths = {f"{part}.model_path": str(path) for part, path in self._files.items()}
            threads = {"EngineConfig.onnxruntime.intra_op_num_threads": self._threads} if self._threads else {}
            self._engine = RapidOCR(params={**self._options, **paths, **threads, "Global.log_level": "error"})
        return self._engine


class RapidOcr(_Engine):
    """RapidOCR reads lines of text; its models come with the package.

    Question None -> the lines of text in a picture, top to bottom.
    """

    @frozen
    class Config:
        text_score: float = field(default=0.5, validator=within(0, 1))  # certainty below which a line is left out
        threads: int = field(default=0, validator=integer(at_least=0, at_most=1024))  # CPU threads; 0: all

    def __init__(self, config: Config) -> None:
        self.config = config
        folder = _package() / "models"
        files = {part: _existing(folder / name, "reinstall rapidocr 3.10") for part, name in BUNDLED.items()}
        options = {"Global.text_score": config.text_score}
        super().__init__(files, options, f"defaults-score{config.text_score:g}", config.threads)


class PaddleOcr(_Engine):
    """PaddleOCR models read lines of text, as CVTG-2K's published numbers were made.

    Question None -> the lines of text in a picture, by the nets and thresholds of CVTG-2K's published numbers.
    """

    @frozen
    class Config:
        # With en_PP-OCRv3_det_mobile.onnx and en_PP-OCRv4_rec_mobile.onnx.
        folder: str = field(validator=text())
        # Refuse other files than those that RapidOCR's authors publish.
        check_hashes: bool = True
        threads: int = field(default=0, validator=integer(at_least=0, at_most=1024))  # CPU threads; 0: all

    def __init__(self, config: Config) -> None:
        self.config = config
        folder, bundled = Path(config.folder).expanduser(), _package() / "models"
        files = {}
        for part, (name, digest) in PADDLE.items():
            path = folder / name
            if part == "Cls" and not path.is_file():
                path = bundled / name
            cure = "fetch it from the model list of RapidOCR 3.10 (onnx/PP-OCRv4), which is not in its wheel"
            files[part] = _existing(path, cure)
            if digest and config.check_hashes and hash_of(path) != digest:
                problem = "is not the published file (its SHA-256 differs); fetch it again, or set check_hashes: false"
                raise ConfigError(f"{path}: {problem}")
        super().__init__(files, PADDLE_OPTIONS, "paddleocr-2.10-en", config.threads)


def _existing(path: Path, cure: str) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; {cure}")
    return path


def _package() -> Path:
    """The folder of the package. Raises ConfigError where it is not installed."""
    import importlib.util

    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None or importlib.util.find_spec("onnxruntime") is None:
        raise ConfigError("this perceiver needs rapidocr and onnxruntime; pip install 'lens-t2i[bench]'")
    return Path(spec.origin).parent


def _version() -> str:
    return importlib.metadata.version("rapidocr")
