"""Text-to-image systems behind an HTTP API, as generators: OpenAI's, Google's and ByteDance's protocols.

openai_images  generator `openai_images`: GPT Image, and whoever speaks its protocol
gemini_images  generator `gemini_images`: Nano Banana
ark_images     generator `ark_images`: Seedream
config         the options that all three share
protocol       what a protocol says for itself: its request, its answers, its error codes
answers        what an HTTP answer is: pictures, or one of four kinds of failure
generator      describe, estimate, and generate: so many requests at a time
drawing        one picture from request to outcome: retries, the rate, and when to stop
ledger         what was sent, what it cost and what came back, on disk: no picture is paid for twice
pictures       a picture in an answer, or at the address that it names
commands       `lens ledger`
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_generators() -> dict[str, type[Any]]:
    from lens_remote.ark_images import ArkImages
    from lens_remote.gemini_images import GeminiImages
    from lens_remote.openai_images import OpenAIImages

    return {"openai_images": OpenAIImages, "gemini_images": GeminiImages, "ark_images": ArkImages}


@hookimpl
def lens_commands() -> dict[str, str]:
    from lens_remote import commands  # light; so `lens --help` can describe it

    return {"ledger": f"{commands.__name__}:ledger"}
