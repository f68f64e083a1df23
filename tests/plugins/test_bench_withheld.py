"""The generator `diffusers` and the safety checkers that pipelines bring."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lens_bench.diffusers_pipeline import Diffusers
from PIL import Image

from lens_core.types import PictureRequest


class Checked:
    """A pipeline whose checker blackens every second picture."""

    dtype = "torch.float32"

    def __call__(
        self,
        prompt: list[str],
        generator: Any,
        output_type: str,
        num_inference_steps: int = 2,
        guidance_scale: float = 1.0,
    ) -> Any:
        flags = [i % 2 == 1 for i in range(len(prompt))]
        return SimpleNamespace(
            images=[Image.new("RGB", (8, 8), "black" if flag else "red") for flag in flags], nsfw_content_detected=flags
        )


def test_a_picture_that_a_checker_withholds_is_refused_and_never_a_black_picture() -> None:
    generator = Diffusers(Diffusers.Config("checked", batch_size=3, device="cpu"), Checked())
    outcomes = list(generator.generate([PictureRequest(f"{i}", prompt_id=str(i)) for i in range(3)]))
    assert [outcome.status for outcome in outcomes] == ["ok", "refused", "ok"]
    assert outcomes[1].reason.startswith("nsfw_content_detected: ") and outcomes[1].image == b""
