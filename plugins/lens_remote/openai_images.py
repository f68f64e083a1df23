"""The generator `openai_images`: the images endpoint of OpenAI, and whoever speaks its protocol.

GPT Image 1 was shut down on 23 October 2026; name one of its successors. The API takes no seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from lens_core.config import SECRET
from lens_core.io.api_keys import A_NAME
from lens_core.types import PictureRequest
from lens_core.validators import matching, one_of
from lens_remote.answers import Codes, Drawn, Failure, read_items
from lens_remote.config import RemoteConfig
from lens_remote.generator import RemoteGenerator
from lens_remote.protocol import Call, error_object, with_request

SIZE = matching(r"auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4}", "auto or WIDTHxHEIGHT, as in 1024x1024")


ENDS = {
    "gpt-image-1": "23 October 2026", "gpt-image-1-mini": "1 December 2026", "gpt-image-1.5": "1 December 2026",
    "chatgpt-image-latest": "1 December 2026", "dall-e-2": "12 May 2026", "dall-e-3": "12 May 2026",
}  # fmt: skip
"""When models are shut down, by OpenAI's pages in November 2026."""


class OpenAIImages(RemoteGenerator):
    """Draw with OpenAI's image API, or a server that speaks it.

    Pictures by POST {base_url}/images/generations, one a request.
    """

    @frozen(kw_only=True)
    class Config(RemoteConfig):
        key_env: str = field(default="OPENAI_API_KEY", metadata={SECRET: A_NAME})  # the NAME of the key's variable
        size: str = field(default="1024x1024", validator=SIZE)  # width x height; that of a picture's request wins
        # `auto` lets the model choose, and the price with it.
        quality: str = field(default="high", validator=one_of("low", "medium", "high", "xhigh", "max", "auto"))
        background: str = field(default="opaque", validator=one_of("opaque", "transparent", "auto"))  # of the picture
        moderation: str = field(default="auto", validator=one_of("auto", "low"))  # how strictly prompts are filtered
        output_format: str = field(default="png", validator=one_of("png", "jpeg", "webp"))  # of the picture's file

    base_url = "https://api.openai.com/v1"
    seeded = False
    codes = Codes(
        refusal=r"moderation_blocked|content_policy|content_filter|image_generation_user_error|safety",
        fatal=r"insufficient_quota|billing|invalid_api_key|invalid_authentication|authentication|model_not_found"
        r"|not_found_error|deactivated|unsupported_country|organization|permission|access_terminated|ip_not_authorized",
        retry=r"rate_limit|server_error|overloaded|timeout|slow_down|unavailable|internal",
        bad_request=r"^invalid|unsupported|missing|above_max|unknown_parameter",
    )

    def call(self, config: Config, request: PictureRequest) -> Call:
        size = f"{request.size[1]}x{request.size[0]}" if request.size else config.size
        body = {
            "model": config.model,
            "prompt": request.prompt,
            "n": 1,
            "size": size,
            "quality": config.quality,
            "background": config.background,
            "moderation": config.moderation,
            "output_format": config.output_format,
        }
        return Call("/images/generations", with_request(body, config), None)

    def headers(self, key: str) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def read(self, data: Any) -> Drawn | Failure:
        return read_items(data, self.codes, ("size", "quality", "output_format", "background", "created"))

    def error(self, data: Any) -> Mapping[str, Any]:
        return error_object(data)

    def hint(self, model: str) -> str:
        return f"; OpenAI gives {ENDS[model]} as the end of {model}: name a successor" if model in ENDS else ""
