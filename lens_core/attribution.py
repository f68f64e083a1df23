"""Calls into plugins: whatever a component raises or wrongly returns becomes one line that names it and its method.

    with calling(reward, "score"):
        scores = reward.score(images, prompts)

The error is a PluginError, whose cause is the original. A LensError passes: its message is the component's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

from attrs import evolve

from lens_core.io.readers import check_text, is_line, one_line, shown
from lens_core.io.redaction import replace_surrogates
from lens_core.types import Batch, ConfigError, LensError, Loss, PluginError, Prompt, Score, TextFeatures

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
_NAMES: WeakKeyDictionary[type[Any], str] = WeakKeyDictionary()  # for messages alone


def remember(cls: type[Any], name: str) -> None:
    """Let `name_of` call the instances of a class `plugin:short`, as a catalog does."""
    _NAMES[cls] = name


def name_of(component: Any) -> str:
    """`plugin:short` of a component that a catalog offered, else the module and name of its class."""
    cls = type(component)
    return _NAMES.get(cls, f"{cls.__module__}:{cls.__qualname__}")


@contextmanager
def calling(component: Any, method: str) -> Iterator[None]:
    """What is raised inside becomes a PluginError about `component.method`."""
    try:
        yield
    except (LensError, MemoryError):  # a full memory is nobody's fault
        raise
    except Exception as error:
        reason = one_line(error)
        raise PluginError(
            f"{name_of(component)}.{method} raised {type(error).__name__}{': ' if reason else ''}{reason}"
        ) from error


@contextmanager
def building(name: str) -> Iterator[None]:
    """What is raised inside, while the component `plugin:short` is built, becomes a PluginError about it."""
    try:
        yield
    except LensError:
        raise
    except Exception as error:
        raise PluginError(f"{name} cannot be built: {type(error).__name__}: {one_line(error)}") from error


def items(component: Any, method: str, values: Iterable[T]) -> Iterator[T]:
    """The items of what `component.method` returned, each fetched inside `calling`."""
    with calling(component, method):
        if not isinstance(values, Iterable):
            refuse(component, method, values, "it must return an iterator")
        source = iter(values)
    while True:
        with calling(component, method):
            try:
                value = next(source)
            except StopIteration:
                return
        yield value


def refuse(component: Any, method: str, value: Any, must: str, *, verb: str = "returned") -> NoReturn:
    """Raise PluginError: `component.method returned what value is; must`."""
    raise PluginError(f"{name_of(component)}.{method} {verb} {kind_of(value)}; {must}")


def kind_of(value: Any) -> str:
    """What a value is, in a few words: its type, and of a tensor its dtype and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{type(value).__name__} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple) and value:
        kinds = sorted({type(v).__name__ for v in value})
        return f"{type(value).__name__} of {' and '.join(kinds)}"
    return type(value).__name__


def checked_tensor(
    component: Any, method: str, value: Any, shape: Sequence[int | None], must: str, dtype: Any = None
) -> Tensor:
    """`value`, if it is a tensor of this shape (None: any size) and of `dtype`, or a float where that is None."""
    if not _fits(value, shape, dtype):
        refuse(component, method, value, must)
    return value  # type: ignore[no-any-return]  # a tensor, as `_fits` has seen


def checked_scores(component: Any, scores: Any, count: int, method: str = "score") -> tuple[Score, ...]:
    """What a reward or a benchmark returned for `count` pictures. A value that is not finite, or beyond LARGEST_SCORE,
    is a failure of its one picture."""
    must = "it must return one Score an image"
    if isinstance(scores, str | Mapping) or not isinstance(scores, Iterable):
        refuse(component, method, scores, must)
    with calling(component, method):
        result = tuple(scores)
    for score in result:
        if not isinstance(score, Score):
            refuse(component, method, score, must)
    if len(result) != count:
        raise PluginError(f"{name_of(component)}.{method} returned {len(result)} scores for {count} images; {must}")
    return tuple(map(_averageable, result))


LARGEST_SCORE = 1e100
"""Sums and squares of larger ones are not finite."""


def _averageable(score: Score) -> Score:
    evidence = replace_surrogates(str(score.evidence))
    if score.value is None:
        return evolve(score, evidence=evidence)
    try:
        value = float(score.value)
    except OverflowError:  # an int beyond what a float can hold
        value = math.inf
    if not abs(value) <= LARGEST_SCORE:
        what = f"beyond {LARGEST_SCORE:g}" if math.isfinite(value) else "not finite"
        return Score("failed", evidence=f"{what}: {value}")
    return evolve(score, value=value, evidence=evidence)


def checked_loss(component: Any, loss: Any) -> Loss:
    """What a method's `loss` returned: a scalar with a gradient, and detached parts by name."""
    must = "it must return a Loss"
    if not isinstance(loss, Loss):
        refuse(component, "loss", loss, must)
    total = checked_tensor(component, "loss", loss.total, (), "the total of a Loss must be a float scalar")
    if not total.requires_grad:
        raise PluginError(f"{name_of(component)}.loss returned a total without a gradient; nothing can learn from it")
    if not isinstance(loss.parts, Mapping):
        refuse(
            component, "loss", loss.parts, "the parts of a Loss must be a mapping of scalars", verb="gave, as parts,"
        )
    return loss


def checked_step(component: Any, micro: Any) -> Sequence[Any]:
    """An item of a method's `steps`: the micro-batches of one optimizer step."""
    import torch

    if isinstance(micro, str | torch.Tensor) or not isinstance(micro, Sequence):
        refuse(component, "steps", micro, "each step must be a list of micro-batches", verb="yielded")
    if not len(micro):
        raise PluginError(f"{name_of(component)}.steps yielded no micro-batch; each step needs at least one")
    return micro


def checked_text(component: Any, text: Any, count: int) -> TextFeatures:
    """What a text encoder returned for `count` prompts: its `layers` and `width`, and a mask of as many tokens."""
    import torch

    if not isinstance(text, TextFeatures):
        refuse(component, "encode", text, "it must return a TextFeatures")
    layers, width = getattr(component, "layers", None), getattr(component, "width", None)
    must = f"features must be floats [B,L,T,D] with B = {count}, L = {layers} and D = {width}"
    features = checked_tensor(component, "encode", text.features, (count, layers, None, width), must)
    tokens = features.shape[2]
    must = f"the mask must be bool [B,T] with B = {count} and T = {tokens}, as the features have"
    checked_tensor(component, "encode", text.mask, (count, tokens), must, torch.bool)
    return text


def checked_batch(component: Any, batch: Any) -> Batch:
    """An item of a dataset's `batches`: as many pictures, latents, texts and keys as captions, of the right kinds."""
    import torch

    def fail(value: Any, must: str) -> NoReturn:
        refuse(component, "batches", value, must, verb="yielded")

    if not isinstance(batch, Batch):
        fail(batch, "it must yield Batches")
    count = len(batch.captions) if isinstance(batch.captions, tuple | list) else -1
    if count < 1 or not all(isinstance(c, str) for c in batch.captions):
        fail(batch.captions, "the captions of a Batch must be a tuple of texts, at least one")
    for name, kind, channels in (("images", torch.uint8, 3), ("latents", None, None)):
        value = getattr(batch, name)
        one = f"[{channels or 'C'},{'H,W' if channels else 'h,w'}]"
        words = f"{'uint8' if kind else 'float'} tensor [{count},{one[1:]}"
        must = f"{name} must be a {words}, or a tuple of {count} of {one}"
        for tensor in value if isinstance(value, tuple) else (value,) if value is not None else ():
            whole = not isinstance(value, tuple)
            shape = (*((count,) if whole else ()), channels, None, None)
            if not _fits(tensor, shape, kind):
                fail(tensor, must)
        if isinstance(value, tuple) and len(value) != count:
            fail(value, must)
    if len(batch.keys) not in (0, count):
        fail(batch.keys, f"{len(batch.keys)} keys are for {count} captions; give as many, or none")
    if len(batch.chats) not in (0, count):
        fail(batch.chats, f"{len(batch.chats)} chats are for {count} captions; give as many, or none")
    if batch.text is not None and not (isinstance(batch.text, TextFeatures) and len(batch.text) == count):
        fail(batch.text, f"text must be a TextFeatures of {count} captions")
    return batch


def _fits(value: Any, shape: Sequence[int | None], dtype: Any) -> bool:
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.ndim == len(shape)
        and all(want in (None, have) for want, have in zip(shape, value.shape, strict=True))
        and (value.dtype == dtype if dtype is not None else value.dtype.is_floating_point)
    )


# ---- the calls that several make ------------------------------------------------------------------------------------


def text_of(encoder: Any, prompts: Sequence[str]) -> TextFeatures:
    """What a text encoder makes of prompts, checked."""
    with calling(encoder, "encode"):
        text = encoder.encode(list(prompts))
    return checked_text(encoder, text, len(prompts))


def latents_of(vae: Any, pixels: Tensor) -> Tensor:
    """What a VAE makes of pixels [B,3,H,W]: z [B,C,h,w], checked."""
    with calling(vae, "encode"):
        z = vae.encode(pixels)
    channels, cell = getattr(vae, "channels", None), getattr(vae, "downscale", None)
    shape = (len(pixels), channels, *(side // cell if cell else None for side in pixels.shape[-2:]))
    words = f"B = {len(pixels)}, C = {channels} and {cell} px a cell, for pixels {list(pixels.shape)}"
    return checked_tensor(vae, "encode", z, shape, f"z must be a float tensor [B,C,h,w] with {words}")


def pixels_of(vae: Any, z: Tensor) -> Tensor:
    """What a VAE makes of z [B,C,h,w]: pixels [B,3,H,W], checked."""
    with calling(vae, "decode"):
        pixels = vae.decode(z)
    cell = getattr(vae, "downscale", None)
    shape = (len(z), 3, *(side * cell if cell else None for side in z.shape[-2:]))
    words = f"B = {len(z)} and {cell} px a cell, for z {list(z.shape)}"
    return checked_tensor(vae, "decode", pixels, shape, f"pixels must be a float tensor [B,3,H,W] with {words}")


def times_of(sampler: Any, size: tuple[int, int], steps: int) -> Tensor:
    """A sampler's times, which fall from 1 to 0: float32 [steps + 1], checked."""
    with calling(sampler, "times"):
        times = sampler.times(size, steps)
    must = f"times must be a float tensor [{steps + 1}] that falls from 1 to 0"
    times = checked_tensor(sampler, "times", times, (steps + 1,), must)
    if not (times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())):
        raise PluginError(f"{name_of(sampler)}.times returned {[round(t, 4) for t in times.tolist()][:8]}; {must}")
    return times


def trajectory_of(sampler: Any, velocity: Any, x: Tensor, steps: int, **more: Any) -> Iterator[tuple[float, Tensor]]:
    """The (t, x) of a sampler's walk, x of the shape that it began with; the last has t = 0. Checked."""
    with calling(sampler, "sample"):
        walk = sampler.sample(velocity, x, steps, **more)
    must = f"each step must be (t, x) with x a float tensor {list(x.shape)}"
    last = 1.0
    for item in items(sampler, "sample", walk):
        if not (isinstance(item, tuple | list) and len(item) == 2):
            refuse(sampler, "sample", item, must, verb="yielded")
        last, now = item
        yield last, checked_tensor(sampler, "sample", now, x.shape, must)
    if abs(float(last)) > 1e-6:
        raise PluginError(f"{name_of(sampler)}.sample ended at t = {last}; it must end at t = 0, which is the picture")


RESERVED_TASKS = ("overall", "all pictures", "pooled")
"""The rows of a benchmark's table and the fields of its results that are no task."""
TASK = f"one line of text, and none of {', '.join(RESERVED_TASKS)}"
"""What a task must be, in words."""


def is_task(name: Any) -> bool:
    """Whether a task, and so a class or a tag that prompts have as their task, can be called `name`."""
    return is_line(name) and name not in RESERVED_TASKS


def prompts_of(benchmark: Any) -> list[Prompt]:
    """The prompts of a benchmark, checked."""
    with calling(benchmark, "prompts"):
        prompts = benchmark.prompts()
    must = "it must return a list of Prompts"
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        refuse(benchmark, "prompts", prompts, must)
    result = list(items(benchmark, "prompts", prompts))
    for prompt in result:
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            refuse(benchmark, "prompts", prompt, must)
        if not is_text(prompt.text):
            refuse(benchmark, "prompts", prompt.text, "a prompt must be a text that UTF-8 can hold", verb="gave")
        if not is_task(prompt.task):
            raise PluginError(
                f"{name_of(benchmark)}.prompts gave, as a task, {shown(prompt.task)}; a task must be {TASK}"
            )
        question = prompt.data.get("question") if isinstance(prompt.data, Mapping) else []
        if not _is_hashable(question) or (isinstance(question, str) and not is_text(question)):
            must_be = "the data of a Prompt must be a mapping, and its question, if there is one, hashable"
            refuse(benchmark, "prompts", prompt.data, must_be, verb="gave, as data,")
    return result


def is_text(value: Any) -> bool:
    """Whether it is text that a file can hold: without half characters (lone surrogates)."""
    try:
        return isinstance(value, str) and check_text(value) is not None
    except ValueError:
        return False


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def headline_tasks_of(benchmark: Any) -> tuple[str, ...]:
    """The tasks whose mean stands for a benchmark, its `headline`, checked; () where it names none: all of them."""
    names = getattr(benchmark, "headline", ())
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        refuse(benchmark, "headline", names, "it must be a list of tasks", verb="is")
    if len(set(names)) < len(names):
        raise PluginError(f"{name_of(benchmark)}.headline names a task twice, {', '.join(names)}; name each once")
    return tuple(names)


def trainable_modules_of(method: Any) -> dict[str, nn.Module]:
    """Who can learn in a method, by name, checked: at least one network, each with a weight."""
    from torch import nn

    with calling(method, "trainable_modules"):
        trainable = method.trainable_modules()
    must = "it must return {name: nn.Module}, at least one"
    if not isinstance(trainable, Mapping) or not trainable:
        refuse(method, "trainable_modules", trainable, must)
    for module_name, net in trainable.items():
        if not isinstance(module_name, str) or not isinstance(net, nn.Module):
            refuse(method, "trainable_modules", net, must)
        if not any(p.numel() for p in net.parameters()):
            raise ConfigError(
                f"{name_of(method)}: {module_name} is to learn, and {name_of(net)} has no weight; name another"
            )
    return dict(trainable)


MAX_HEADLINE = 5


def headline_of(method: Any, trainable: Iterable[str]) -> tuple[str, ...]:
    """The names of the figures that training prints: the method's `headline`, checked, or each module's loss."""
    modules = tuple(trainable)
    names = getattr(method, "headline", tuple(f"{name}/loss" for name in modules)[:MAX_HEADLINE])
    must = f"it must be at most {MAX_HEADLINE} names of figures, MODULE/NAME, of {', '.join(modules)}"
    if isinstance(names, str) or not isinstance(names, Sequence) or not 0 < len(names) <= MAX_HEADLINE:
        refuse(method, "headline", names, must, verb="is")
    for name in names:
        if not isinstance(name, str) or name.partition("/")[0] not in modules:
            raise PluginError(f"{name_of(method)}.headline names {name!r}; {must}")
    return tuple(names)


def update_order_of(method: Any, step: int, trainable: Mapping[str, Any]) -> tuple[str, ...]:
    """Who learns in a step, in order, checked."""
    with calling(method, "update_order"):
        order = method.update_order(step)
    must = f"it must return names of trainable modules, which are {', '.join(trainable)}"
    if (
        isinstance(order, str)
        or not isinstance(order, Sequence)
        or not all(isinstance(module_name, str) for module_name in order)
    ):
        refuse(method, "update_order", order, must)
    for module_name in order:
        if module_name not in trainable:
            raise PluginError(f"{name_of(method)}.update_order named {module_name!r}; {must}")
    return tuple(order)


def batches_of(dataset: Any, rank: int, world: int) -> Iterator[Batch]:
    """The batches of a dataset, each checked."""
    with calling(dataset, "batches"):
        batches = dataset.batches(rank, world)
    return (checked_batch(dataset, batch) for batch in items(dataset, "batches", batches))


# ---- parts that fit one another -------------------------------------------------------------------------------------

MISFIT = re.compile(
    r"cannot be multiplied|same reduction dim|must match the size|to have \d+ channels|normalized_shape|size mismatch"
)
"""What torch says where a tensor is not of the width that a layer reads."""


def check_fit(vae: Any, encoder: Any, backbone: Any) -> None:
    """Raise ConfigError where a backbone says that it `takes` other channels, layers or widths than the VAE and the
    encoder give. Parts that are None, or do not say, are not compared."""
    if not hasattr(backbone, "takes"):
        return
    with calling(backbone, "takes"):
        channels, layers, width = backbone.takes()
    problems = [
        f"{name_of(backbone)} reads {want} {what}, and {name_of(part)} gives {have}; change one of them"
        for part, what, want, have in (
            (vae, "latent channels", channels, getattr(vae, "channels", None)),
            (encoder, "layers of text features", layers, getattr(encoder, "layers", None)),
            (encoder, "channels of a text feature", width, getattr(encoder, "width", None)),
        )
        if part is not None and have is not None and have != want
    ]
    if problems:
        raise ConfigError(problems)


def check_on_meta(vae: Any, encoder: Any, backbone: Any) -> None:
    """As `check_fit`; a backbone that does not say what it takes is tried on shapes. All are on the meta device."""
    import torch

    check_fit(vae, encoder, backbone)
    if vae is None or encoder is None or not isinstance(backbone, torch.nn.Module) or hasattr(backbone, "takes"):
        return
    with torch.no_grad(), torch.device("meta"):
        x, t = torch.empty(1, vae.channels, 64, 64), torch.empty(1)
        text = TextFeatures(torch.empty(1, encoder.layers, 4, encoder.width), torch.empty(1, 4, dtype=torch.bool))
        try:
            backbone(x, t, text)
        except Exception as error:  # most of which say that values are needed, and nothing of a fit
            if isinstance(error, RuntimeError) and MISFIT.search(str(error)):
                raise ConfigError(
                    f"{name_of(backbone)} cannot take what {name_of(vae)} ({vae.channels} latent channels) and "
                    f"{name_of(encoder)} ({encoder.layers} layers of {encoder.width} channels) give: {one_line(error)}"
                ) from error
