"""The data types that every part of Lens shares: prompts, texts, batches, scores; and its errors.

Shapes: B batch, C latent channels, h w latent grid, L tapped encoder layers, T tokens, D width, H W pixels.
The dtype tells the unit: uint8 is a picture, float pixels in [-1, 1] exist only around the VAE.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, field, frozen

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. From the host to a GPU it goes by way of pinned memory, so that the host does not wait for
    what the GPU has still to do, as it does with a plain copy."""
    if tensor.device.type != "cpu" or str(device).partition(":")[0] != "cuda":
        return tensor.to(device)  # elsewhere an asynchronous copy may read memory that is gone by then
    # torch keeps the pinned copy until the GPU has read it.
    return tensor.pin_memory().to(device, non_blocking=True)


class LensError(Exception):
    """An error that a user can fix. The message names the thing, its neighbour and the next step, in one line."""


class ConfigError(LensError):
    """A recipe or a config is wrong. `problems` holds every problem found, each with its path."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(LensError):
    """A checkpoint or one of its files cannot be used: missing, truncated, foreign, or of the wrong shape."""


class NumericalError(LensError):
    """A computation left the finite numbers, or would."""


class RefusedError(LensError):
    """A reasoner's policy forbids a request: nothing is drawn. In a benchmark that picture counts as refused."""


class PluginError(LensError):
    """A plugin's component raised what it should not, or returned what its kind may not; the message names it."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`" Did you mean 'flux2'?"` if something known is close to `word`, else the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names)}." if names else ""


class StopGeneration(LensError):
    """A generator cannot go on: a wrong key, no quota, a ceiling that is reached. Nothing more is requested of it."""


@frozen
class Prompt:
    """What a picture is asked to show. `task` groups prompts in a benchmark; `data` is what a judge needs to know."""

    text: str
    id: int = 0
    task: str = ""
    data: Mapping[str, Any] = field(factory=dict)


def prompts_of_tasks(prompts: Iterable[Prompt], tasks: Collection[str]) -> list[Prompt]:
    """The prompts of some tasks, in their order; without `tasks`, all. ConfigError for a task that none has."""
    listed = list(prompts)
    known = {prompt.task for prompt in listed}
    for task in tasks:
        if task not in known:
            raise ConfigError(f"no task of the prompts is called {task!r}.{did_you_mean(task, known)}")
    return [prompt for prompt in listed if not tasks or prompt.task in tasks]


@frozen
class Message:
    """One turn of a chat. `images` are PNG files in memory."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[bytes, ...] = ()


@frozen
class Completion:
    """What a language model wrote after a conversation, in the order in which it wrote it.

    `pieces` are (is a control token, its name or text): a token that opens a turn or a channel differs from text that
    spells it. `finished`: the model ended its turn, and was not stopped at a limit. `tokens` counts what it wrote.
    """

    pieces: tuple[tuple[bool, str], ...]
    finished: bool
    tokens: int


@frozen
class Refinement:
    """What a reasoner made of a request: `text` is drawn. Where that is the `request` itself, and the
    reasoner's answer was not used, `reason` says why."""

    request: str
    text: str
    reason: str = ""


@frozen
class Score:
    """A reward's verdict on one picture. A failure is never a zero: `value` is None unless `status` is "ok"."""

    status: Literal["ok", "abstain", "failed"]
    value: float | None = None
    components: Mapping[str, float] = field(factory=dict)
    evidence: str = ""

    def __attrs_post_init__(self) -> None:
        if self.status not in ("ok", "abstain", "failed"):
            raise ValueError(f"a score's status is ok, abstain or failed, not {str(self.status)[:80]!r}")
        if (self.status == "ok") != (self.value is not None):
            raise ValueError(f"a score that is {self.status!r} cannot have the value {str(self.value)[:80]}")
        # A value that is not finite may stand here: whoever averages scores takes it for a failure of its one picture.
        if self.value is not None and not isinstance(self.value, Real):
            raise ValueError(f"a score's value is a number, not {str(self.value)[:80]}; what broke is 'failed'")


@frozen
class SystemInfo:
    """What a generator is: the model's name (or the API's id of it), its revision, and the settings that decide its
    pictures beside prompt and seed. `seeded`: whether the seed of a request decides the picture."""

    name: str
    revision: str = ""  # "": none is known
    settings: Mapping[str, Any] = field(factory=dict)  # JSON; no key, no address with a password
    seeded: bool = True


@frozen
class PictureRequest:
    """One picture to generate. `prompt_id` and `index` (from 0, of the pictures of one prompt) name it in a benchmark;
    `size` is (height, width) in px, None for the generator's own."""

    prompt: str
    seed: int = 0
    size: tuple[int, int] | None = None
    prompt_id: str = ""
    index: int = 0


@frozen
class PictureOutcome:
    """What became of a request: `ok` with a picture, `refused` by the system's policy, or `failed` otherwise.

    A refusal is final; a failure is tried again when the run is started again. `reason` begins with a code, as in
    "moderation_blocked: the prompt …", and is empty for `ok`.
    """

    request: PictureRequest
    status: Literal["ok", "refused", "failed"]
    image: bytes = b""  # a PNG, JPEG or WebP file, of an `ok`
    reason: str = ""
    seconds: float = 0.0  # from the request to the picture; of a batch, its share
    usd: float = 0.0  # what was paid, if it is known
    sent_prompt: str | None = None  # as the system got it, after any rewriting; None: the request's
    facts: Mapping[str, Any] = field(factory=dict)  # JSON: what the system said about the picture

    def __attrs_post_init__(self) -> None:
        if self.status not in ("ok", "refused", "failed"):
            raise ValueError(f"an outcome's status is ok, refused or failed, not {str(self.status)[:80]!r}")
        if (self.status == "ok") != bool(self.image):
            raise ValueError(f"an outcome that is {self.status!r} has {'no' if not self.image else 'a'} picture")


@frozen
class Picture:
    """A picture of a benchmark's run: its file, the SHA-256 of that file, the prompt that it answers, and its number
    among the pictures of that prompt, from 0."""

    path: Path
    sha256: str
    prompt: Prompt
    index: int = 0


@frozen
class GenerationEstimate:
    """What pictures will cost, for a dry run. None: not known before something is drawn."""

    calls: int
    usd: float | None = None
    seconds: float | None = None


@frozen
class TextFeatures:
    """Encoded prompts: `features` [B,L,T,D], `mask` bool [B,T], True where a token counts. T may be 0.

    `host` is the mask on the CPU, which whoever made it there keeps: lengths are then known without a read of the
    device, for which the CPU would have to wait.
    """

    features: Tensor
    mask: Tensor
    host: Tensor | None = field(default=None, eq=False, repr=False)

    def __len__(self) -> int:
        return int(self.features.shape[0])

    def __getitem__(self, rows: slice | list[int]) -> TextFeatures:
        return TextFeatures(self.features[rows], self.mask[rows], None if self.host is None else self.host[rows])

    @property
    def known(self) -> Tensor:
        """The mask on the CPU."""
        if self.mask.device.type == "cpu":
            return self.mask
        return self.mask.cpu() if self.host is None else self.host

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        host = self.mask if self.mask.device.type == "cpu" else self.host
        features = self.features if device is None else move(self.features, device)
        return TextFeatures(features.to(dtype=dtype), self.mask if device is None else move(self.mask, device), host)

    @staticmethod
    def empty(batch: int, layers: int, width: int, like: Tensor) -> TextFeatures:
        """The empty negative prompt: no tokens at all, with the device and dtype of `like`."""
        import torch

        nothing = torch.zeros(batch, 0, dtype=torch.bool, device="cpu")
        return TextFeatures(like.new_zeros(batch, layers, 0, width), like.new_zeros(batch, 0).bool(), nothing)

    @staticmethod
    def cat(texts: Sequence[TextFeatures]) -> TextFeatures:
        """Stack texts along the batch, padding each on the right to the longest."""
        import torch
        from torch.nn.functional import pad

        longest = max(t.mask.shape[1] for t in texts)
        gaps = [longest - t.mask.shape[1] for t in texts]
        hosts = [t.mask if t.mask.device.type == "cpu" else t.host for t in texts]
        known = [h for h in hosts if h is not None]
        return TextFeatures(
            torch.cat([pad(t.features, (0, 0, 0, gap)) for t, gap in zip(texts, gaps, strict=True)]),
            torch.cat([pad(t.mask, (0, gap)) for t, gap in zip(texts, gaps, strict=True)]),
            torch.cat([pad(h, (0, g)) for h, g in zip(known, gaps, strict=True)]) if len(known) == len(texts) else None,
        )


@frozen
class Batch:
    """Training samples. `images` uint8 [B,3,H,W] (None where only captions count); `captions` one each.

    `keys` name the samples for caches: equal keys mean equal images. An empty tuple forbids caching. A dataset that
    has them encoded gives `latents` [B,C,h,w] and `text` instead, and methods encode nothing. In a packed batch, of
    mixed sizes, `images` or `latents` is a tuple with one [3,H,W] or [C,h,w] for each sample.
    `chats`, where a dataset has them, are conversations; a language model learns the last turn of each, which is the
    caption.
    """

    images: Tensor | tuple[Tensor, ...] | None
    captions: tuple[str, ...]
    keys: tuple[int, ...] = ()
    latents: Tensor | tuple[Tensor, ...] | None = None
    text: TextFeatures | None = None
    weight: float = 1.0  # of its mean loss, where ranks have unequal numbers of samples: this number over the mean one
    chats: tuple[tuple[Message, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Batch:
        """What it holds on `device`; pictures travel as the bytes that they are."""

        def there(part: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
            if isinstance(part, tuple):
                return tuple(move(each, device) for each in part)
            return None if part is None else move(part, device)

        text = None if self.text is None else self.text.to(device)
        return evolve(self, images=there(self.images), latents=there(self.latents), text=text)

    def even(self) -> Tensor | None:
        """`images`, for methods that need them, or their latents, of one size. Raises LensError for a packed batch."""
        if isinstance(self.images, tuple) or isinstance(self.latents, tuple):
            raise LensError("this method cannot train on packed batches; use a dataset with batches of one size")
        return self.images


@frozen
class Shard:
    """Which micro-batch of a training step to make, of how many: 0 of 1 where there is only one."""

    index: int = 0
    count: int = 1


@frozen
class Loss:
    """`total` is what is minimised (a scalar with a gradient); `parts` is what is logged (detached scalars).

    `weight` is how much `total` counts in the step: the tokens that it is a mean of, say. The step is the mean by
    weight over the micro-batches of all parts and processes. None: parts count alike, and so do the micro-batches of a
    part. Either all losses of a module have one or none has.
    `sums` are detached tensors that are added up over those micro-batches; after a step that is made, and not after one
    that is skipped, the method gets the sums: `after_update(module_name, modules, sums)`.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(factory=dict)
    weight: float | None = None
    sums: Mapping[str, Tensor] = field(factory=dict)


@frozen(eq=False)
class Record:
    """One picture with its words on the way into a training store, decoded once for all curators."""

    image: bytes  # the file, byte for byte
    pixels: NDArray[np.uint8]  # [H,W,3], upright RGB
    brief: str = ""  # captions, "" where there is none
    dense: str = ""
    data: Mapping[str, Any] = field(factory=dict)  # where it is from: name, source, licence
