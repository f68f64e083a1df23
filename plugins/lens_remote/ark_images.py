"""The generator `ark_images`: Seedream at ByteDance's Ark, in China (Volcengine) or elsewhere (BytePlus)."""

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

SIZE = matching(r"[124]K|[1-9][0-9]{2,4}x[1-9][0-9]{2,4}", "1K, 2K, 4K or WIDTHxHEIGHT, as in 1024x1024")


class ArkImages(RemoteGenerator):
    """Draw with the image API of Volcengine Ark (Seedream).

    Pictures by POST {base_url}/images/generations, one a request, without the watermark that is Ark's default.
    """

    @frozen(kw_only=True)
    class Config(RemoteConfig):
        key_env: str = field(default="ARK_API_KEY", metadata={SECRET: A_NAME})  # the NAME of the key's variable
        size: str = field(default="1024x1024", validator=SIZE)  # width x height; that of a picture's request wins
        # `url`: an address that lives a day; `b64_json` brings the picture with the answer.
        response_format: str = field(default="b64_json", validator=one_of("b64_json", "url"))
        watermark: bool = False  # Ark's own default is true

    base_url = "https://ark.cn-beijing.volces.com/api/v3"
    seeded = False  # of Seedream 4.0 no seed is documented
    codes = Codes(
        refusal=r"SensitiveContentDetected|RiskDetection|PolicyViolation|Copyright",
        fatal=r"Authentication|AccessDenied|Unauthorized|Forbidden|OperationDenied|AccountOverdue|InsufficientBalance"
        r"|ModelNotOpen|NotFound|UnsupportedModel|ModelIDAccessDisabled|InvalidEndpoint|InvalidSubscription"
        r"|QuotaExceeded|SetLimitExceeded",
        retry=r"RateLimit|ServerOverloaded|BurstTooFast|InflightBatchsizeExceeded|Internal|DetectionError|Timeout"
        r"|Unavailable",
        bad_request=r"InvalidParameter|MissingParameter|InvalidArgument",
    )

    def call(self, config: Config, request: PictureRequest) -> Call:
        body = {
            "model": config.model,
            "prompt": request.prompt,
            "size": f"{request.size[1]}x{request.size[0]}" if request.size else config.size,
            "response_format": config.response_format,
            "watermark": config.watermark,
            "sequential_image_generation": "disabled",
            "stream": False,
        }
        return Call("/images/generations", with_request(body, config), None)

    def headers(self, key: str) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def read(self, data: Any) -> Drawn | Failure:
        return read_items(data, self.codes, ("created", "created_at"))

    def error(self, data: Any) -> Mapping[str, Any]:
        return error_object(data)
