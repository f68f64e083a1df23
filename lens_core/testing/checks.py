"""What components promise, as checks for a plugin's own tests: each raises AssertionError with one clear line.

    def test_hashed_words_keeps_the_contract() -> None:
        check_text_encoder(HashedWords(config), config)

Give them small float32 components on the CPU, with weights that count: of a network that is still 0 they learn little.
What carries weights is put in eval mode and saved to a temporary folder. Global generators are left as they were.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens_core.attribution import headline_of
from lens_core.inference.parts import PIPELINE_PARTS
from lens_core.inference.pipeline import LensPipeline
from lens_core.testing.assertions import component_name, equal, hold, near, random_tensor, shaped, through_json, twice
from lens_core.training.optimizers import apply_step
from lens_core.types import Batch, Loss, TextFeatures

PROMPTS = ("a red circle", "two blue squares left of a small green star", "")


def _survives(module: Any, config: Any, run: Callable[[Any], Any], name: str) -> None:
    """save, load: the same weights, the same answers; and in bfloat16 if asked."""
    with tempfile.TemporaryDirectory() as folder:
        module.save(Path(folder))
        again = type(module).load(Path(folder), config).eval()
        half = type(module).load(Path(folder), config, dtype=torch.bfloat16)
    before, after = module.state_dict(), again.state_dict()
    lost = sorted(k for k in before.keys() | after.keys() if k not in before or not equal(before[k], after.get(k)))
    hold(not lost, f"{name}: {lost[:1]} is not what was saved")
    hold(equal(run(module), run(again)), f"{name}: answers differently after save and load")
    kinds = {p.dtype for p in half.parameters()}
    hold(kinds <= {torch.bfloat16}, f"{name}: load(dtype=torch.bfloat16) gives {kinds}")


@torch.no_grad()
def check_vae(vae: Any, config: Any) -> None:
    """Shapes, determinism, rows that do not depend on their batch, and the disk. `config` is what `vae` was built from.

    Unit variance is not asked for: an untrained one does not have it.
    """
    name = component_name(vae, "vae")
    vae.eval()
    h, w = 2, 3
    pixels = random_tensor(0, 2, 3, h * vae.downscale, w * vae.downscale).clamp(-1, 1)
    z = twice(lambda: vae.encode(pixels), f"{name}.encode")
    shaped(z, [2, vae.channels, h, w], f"{name}: z")
    near(z[1:], vae.encode(pixels[1:]), f"{name}: a picture's z depends on its batch")
    back = twice(lambda: vae.decode(z), f"{name}.decode")
    shaped(back, pixels.shape, f"{name}: the decoded picture")
    near(back[1:], vae.decode(z[1:]), f"{name}: a decoded picture depends on its batch")
    _survives(vae, config, lambda v: [v.encode(pixels), v.decode(z)], name)


@torch.no_grad()
def check_text_encoder(encoder: Any, config: Any, prompts: Sequence[str] = PROMPTS) -> None:
    """Shapes, a mask that says what counts, prompts that are read and do not depend on their batch, and the disk."""
    name = component_name(encoder, "text_encoder")
    encoder.eval()
    text = twice(lambda: encoder.encode(prompts), f"{name}.encode")
    hold(isinstance(text, TextFeatures), f"{name}.encode gives a {type(text).__name__}, not a TextFeatures")
    tokens = text.mask.shape[-1]
    shaped(text.features, [len(prompts), encoder.layers, tokens, encoder.width], f"{name}: features")
    shaped(text.mask, [len(prompts), tokens], f"{name}: mask", torch.bool)
    features_alone = []
    for row, prompt in enumerate(prompts):
        alone = encoder.encode([prompt])
        mine, alone_features = text.features[row][:, text.mask[row]], alone.features[0][:, alone.mask[0]]
        near(mine, alone_features, f"{name}: the features of {prompt!r} depend on its batch")
        features_alone.append(alone_features)
    hold(
        not any(equal(a, b) for a, b in itertools.combinations(features_alone, 2)),
        f"{name}: two prompts read the same",
    )
    _survives(encoder, config, lambda e: e.encode(prompts), name)


def check_backbone(backbone: Any, config: Any, *, channels: int, layers: int, width: int) -> None:
    """Shapes, T = 0, masked tokens that do not count, rows that do not depend on their batch, gradients, the disk; and
    packed batches where it has `packed`.

    `channels` is C of the VAE it is made for; `layers` and `width` are L and D of the text encoder.
    """
    name = component_name(backbone, "backbone")
    backbone.eval()
    x, t = random_tensor(0, 2, channels, 4, 6), torch.tensor([0.25, 1.0])
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    text = TextFeatures(random_tensor(1, 2, layers, 5, width), mask)
    originals = copy.deepcopy((x, t, text))
    with torch.no_grad():
        v = twice(lambda: backbone(x, t, text), name)
        shaped(v, x.shape, f"{name}: v")
        hold(equal(originals, (x, t, text)), f"{name} changes what it is given")
        for row in (0, 1):
            one_row = slice(row, row + 1)
            near(
                v[one_row], backbone(x[one_row], t[one_row], text[one_row]), f"{name}: a row of v depends on its batch"
            )
        louder = TextFeatures(text.features.masked_fill(~mask[:, None, :, None], 100.0), mask)
        near(backbone(x, t, louder), v, f"{name}: tokens that the mask hides change v")
        none = backbone(x, t, TextFeatures.empty(2, layers, width, like=x))
        shaped(none, x.shape, f"{name}: v without text (T = 0)")
        hidden = backbone(x, t, TextFeatures(text.features, torch.zeros_like(mask)))
        near(hidden, none, f"{name}: a text that is all masked is not the empty text (T = 0)")
        if hasattr(backbone, "packed"):
            xs = [x[0], x[1, :, :3], x[0, :, :, :5]]
            rows = [0, 1, 1]
            several = TextFeatures(text.features[rows], torch.cat([mask, mask.new_zeros(1, 5)]))
            velocities = twice(lambda: backbone.packed(xs, t[rows], several), f"{name}.packed")
            hold(len(velocities) == 3, f"{name}.packed: {len(velocities)} velocities for 3 samples")
            for i, one in enumerate(xs):
                alone = backbone(one[None], t[rows][i : i + 1], several[i : i + 1])[0]
                near(velocities[i], alone, f"{name}.packed: a sample of a packed batch is not what it is alone")
        _survives(backbone, config, lambda b: b(x, t, text), name)
    backbone.train().requires_grad_(True)
    backbone(x, t, text).square().sum().backward()
    hold(any(p.grad is not None for p in backbone.parameters()), f"{name}: no weight gets a gradient")
    backbone.zero_grad()
    backbone.eval()


def check_sampler(sampler: Any) -> None:
    """Times that fall from 1 to 0, one step each, and an exact arrival where every velocity points at the data."""
    name = component_name(sampler, "sampler")
    for size, steps in (((2, 3), 1), ((2, 3), 4), ((64, 64), 20)):
        times = twice(partial(sampler.times, size, steps), f"{name}.times")
        shaped(times, [steps + 1], f"{name}: times for {steps} steps", torch.float32)
        falls = times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())
        hold(bool(falls), f"{name}: times must fall from 1 to 0, not {times.tolist()}")
    noise, data = random_tensor(0, 2, 3, 2, 3), random_tensor(1, 2, 3, 2, 3)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        shaped(x, [len(x), 3, 2, 3], f"{name}: the velocity's x", torch.float32)
        shaped(t, [len(x)], f"{name}: the velocity's t", torch.float32)
        goal, start = data[-len(x) :], noise[-len(x) :]
        late = t.view(-1, 1, 1, 1)
        return torch.where(late > 0, (x - goal) / late, start - goal)

    walk = twice(lambda: list(sampler.sample(velocity, noise, 4)), f"{name}.sample")
    hold(len(walk) == 4, f"{name}: sample yields {len(walk)} times in 4 steps")
    times, want = [float(t) for t, _ in walk], sampler.times((2, 3), 4)[1:].tolist()
    hold(
        all(map(math.isclose, times, want)), f"{name}: sample is at the times {times}, not at those of times(): {want}"
    )
    near(walk[-1][1], data, f"{name}: does not arrive at the data that every velocity points at")
    alone = list(sampler.sample(velocity, noise[1:], 4))
    near(walk[-1][1][1:], alone[-1][1], f"{name}: a row of x depends on its batch")


def check_dataset(make: Callable[[], Any], before: int = 2, after: int = 3) -> None:
    """Batches of one size or packed, as many captions as pictures, and a state that JSON keeps and goes on exactly.

    The state is taken after `before` batches of what `make` builds; what it builds anew goes on for `after` more.
    """
    dataset, fresh = make(), make()
    name = component_name(dataset, "dataset")
    stream = dataset.batches(0, 1)
    for batch in itertools.islice(stream, before):
        hold(len(batch) > 0, f"{name}: a batch is empty")
        if isinstance(images := batch.images, tuple):
            hold(len(images) == len(batch), f"{name}: {len(images)} images for {len(batch)} captions")
            for image in images:
                shaped(image, [3, *image.shape[1:]], f"{name}: an image", torch.uint8)
        elif batch.images is not None:
            shaped(batch.images, [len(batch), 3, *batch.images.shape[2:]], f"{name}: images", torch.uint8)
        hold(len(batch.keys) in (0, len(batch)), f"{name}: {len(batch.keys)} keys for {len(batch)} samples")
    fresh.load_state_dict(through_json(dataset.state_dict(), name))
    for mine, theirs in zip(itertools.islice(stream, after), fresh.batches(0, 1), strict=False):
        same = all(equal(getattr(mine, n), getattr(theirs, n)) for n in ("images", "captions", "keys"))
        hold(same, f"{name}: goes on with other batches after state_dict and load_state_dict")


class _Bench:
    """A loop in small: what the trainer does around a method, with plain gradient descent in one fused kernel.

    A fused kernel does not raise the version of the weights that it writes, as the loop's does not.
    """

    def __init__(self, method: Any, batches: Sequence[Batch]) -> None:
        self.method, self.batches = method, batches
        self.modules: dict[str, nn.Module] = dict(method.trainable_modules())
        hold(bool(self.modules), f"{type(method).__name__}: nobody can learn; trainable_modules() is empty")
        for net in self.modules.values():
            net.requires_grad_(False).eval()
        self.rng, self.served, self.step = torch.Generator().manual_seed(0), 0, 0
        self.name = type(method).__name__
        self.source: Iterator[Sequence[Any]] | None = None
        self.figures: set[str] = set()  # what a run would log, as MODULE/NAME

    def _stream(self) -> Iterator[Batch]:
        for _ in range(1000):
            self.served += 1
            yield self.batches[(self.served - 1) % len(self.batches)]
        raise AssertionError(f"{self.name}.steps pulls 1000 batches for a few steps; it must be lazy")

    def learn(self, steps: int) -> list[float]:
        """The losses of the next `steps` steps."""
        losses = []
        self.source = self.source or self.method.steps(self._stream(), self.modules, self.rng)
        for micro in itertools.islice(self.source, steps):
            hold(torch.is_grad_enabled(), f"{self.name}.steps leaves gradients off while its step is out")
            hold(len(micro) > 0, f"{self.name}.steps yields a step without a micro-batch")
            for module_name in self.method.update_order(self.step):
                known = ", ".join(self.modules)
                hold(
                    module_name in self.modules,
                    f"{self.name}.update_order names {module_name!r}; the trainable modules are {known}",
                )
                losses += [self._update(module_name, batch) for batch in micro]
            self.method.after_step(self.step, self.modules)
            self.step += 1
        return losses

    def _update(self, module_name: str, batch: Any) -> float:
        net = self.modules[module_name].requires_grad_(True).train()
        loss = self.method.loss(module_name, self.modules, batch, self.rng)
        hold(isinstance(loss, Loss), f"{self.name}.loss gives a {type(loss).__name__}, not a Loss")
        shaped(loss.total, [], f"{self.name}: the loss of {module_name}")
        hold(loss.total.requires_grad, f"{self.name}: the loss of {module_name} has no gradient")
        self.figures |= {f"{module_name}/{part}" for part in ("loss", "grad_norm", *loss.parts)}
        attached = [k for k, v in (*loss.parts.items(), *loss.sums.items()) if v.requires_grad]
        hold(not attached, f"{self.name}: the parts {attached} have a gradient; detach them")
        loss.total.backward()
        hold(
            any(p.grad is not None for p in net.parameters()),
            f"{self.name}: the loss of {module_name} does not reach it",
        )
        trainable = {id(p) for p in net.parameters()}
        touched = [
            r for r, n in self.modules.items() for p in n.parameters() if p.grad is not None and id(p) not in trainable
        ]
        hold(not touched, f"{self.name}: the loss of {module_name} gives {', '.join(touched[:1])} gradients too")
        apply_step(torch.optim.SGD(list(net.parameters()), lr=1e-3, fused=True))  # without momentum: no state
        if loss.sums:
            self.method.after_update(module_name, self.modules, {k: v.detach().double() for k, v in loss.sums.items()})
        net.zero_grad()
        net.requires_grad_(False).eval()
        return float(loss.total.detach())

    def state(self) -> dict[str, Any]:
        """What a checkpoint would hold of it: the method's tensors, and the rest as JSON."""
        kept = self.method.state_dict()
        plain = through_json({k: v for k, v in kept.items() if not isinstance(v, Tensor)}, self.name)
        modules = {r: {k: v.clone() for k, v in n.state_dict().items()} for r, n in self.modules.items()}
        tensors = {k: v.clone() for k, v in kept.items() if isinstance(v, Tensor)}
        return {
            "method": {**plain, **tensors}, "modules": modules, "served": self.served, "step": self.step,
            "rng": self.rng.get_state(), "torch": torch.get_rng_state(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        for module_name, net in self.modules.items():
            net.load_state_dict(state["modules"][module_name])
        self.served, self.step = state["served"], state["step"]
        self.rng.set_state(state["rng"])
        torch.set_rng_state(state["torch"])


def check_method(make: Callable[[], Any], batches: Sequence[Batch], steps: int = 2) -> None:
    """Losses with a gradient for the updated module alone, and a run that goes on, loss for loss, where it was stopped.
    A headline of figures that are logged.

    Trains what `make` builds for `2 * steps` steps on `batches`, over and over; then what it builds anew goes on from
    the state after `steps`. A method that pulls batches ahead, or keeps what its state_dict does not tell, differs.
    Where the method keeps a whole pipeline as `pipeline`, both draw the same picture at the end, although one of them
    has drawn before: what is kept between pictures must not outlive an optimizer step.
    """

    def build() -> _Bench:
        torch.manual_seed(0)  # as the loop seeds before it builds: parts that are not trainable are in no state
        return _Bench(make(), batches)

    with torch.random.fork_rng(), torch.enable_grad():
        whole = build()
        name = component_name(whole.method, "method")
        whole.learn(steps)
        headline = headline_of(whole.method, whole.modules)
        known = ", ".join(sorted(whole.figures))
        hold(bool(whole.figures & {*headline}), f"{name}: logs no figure of its headline {headline}; it logs {known}")
        state = whole.state()
        _picture(whole.method)
        want = whole.learn(steps)
        again = build()
        again.restore(state)
        got = again.learn(steps)
        hold(got == want, f"{name}: resumed after {steps} steps its losses are {got}, uninterrupted {want}")
        if hasattr(whole.method, "validate"):
            before = copy.deepcopy([list(n.parameters()) for n in whole.modules.values()])
            rng = torch.Generator()
            seen = twice(
                lambda: dict(whole.method.validate(batches[0], whole.modules, rng.manual_seed(0))), f"{name}.validate"
            )
            hold("loss" in seen and all(map(math.isfinite, seen.values())), f"{name}.validate gives {seen}, no loss")
            hold(
                equal(before, [list(n.parameters()) for n in whole.modules.values()]),
                f"{name}.validate changes weights",
            )
        lost = [
            r for r, n in whole.modules.items() if not equal(list(n.parameters()), list(again.modules[r].parameters()))
        ]
        hold(not lost, f"{name}: resumed after {steps} steps {', '.join(lost)} ends with other weights")
        same = equal(_picture(whole.method), _picture(again.method))
        hold(same, f"{name}: its pipeline draws with what it kept of earlier weights; a cache must see every step")


def _picture(method: Any) -> list[Tensor]:
    """The latents of one picture, drawn by the method's pipeline where it keeps a whole one."""
    pipeline = getattr(method, "pipeline", None)
    if not isinstance(pipeline, LensPipeline) or any(getattr(pipeline, part) is None for part in PIPELINE_PARTS):
        return []
    side = 2 * pipeline.vae.downscale
    settings = {"height": side, "width": side, "num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    return list(pipeline(PROMPTS[0], **settings).images)
