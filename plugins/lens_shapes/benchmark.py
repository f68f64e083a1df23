"""Benchmark and reward `shapes`: held-out prompts in GenEval's six tasks, and words, judged exactly by the reader.

The same facts stand in each prompt's data as rubrics too: see `rubrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import evolve, field, frozen
from torch import Tensor

from lens_core.config import SPEED_ONLY
from lens_core.types import ConfigError, Prompt, Score, did_you_mean
from lens_core.validators import SEED, each, integer, one_of
from lens_shapes import captions, splits
from lens_shapes.captions import dense, prompt
from lens_shapes.languages import LANGUAGES, request
from lens_shapes.render import render
from lens_shapes.rubrics import rubrics
from lens_shapes.scenes import GENEVAL, TASKS, Scene, prompt_facts, sample
from lens_shapes.scoring import score_images

RULES = integer(at_least=1, at_most=2)
"""2: the splits of `splits`; 1: those by which the embedded checkpoints were trained."""
PROCESSES = integer(at_least=1, at_most=256)


@frozen
class QuestionScene:
    """One distinct question of a benchmark: a scene that it is true of, its wordings, and its combination's name."""

    scene: Scene
    texts: tuple[str, ...]
    question: str
    fact: str


def check_split(split: str, rules: int) -> None:
    """ConfigError where the rules know no such split."""
    known = ("train", "heldout") if rules == 1 else splits.SPLITS
    if split not in known:
        other = "; 'heldout' is a split of rules 1" if split == "heldout" else ""
        other = f"; {split!r} is a split of rules 2" if rules == 1 and split in splits.SPLITS else other
        raise ConfigError(
            f"no split of rules {rules} is called {split!r}{other}; use {' or '.join(map(repr, known))}"
            f"{did_you_mean(split, known)}"
        )


def check_count(name: str, task: str, split: splits.Split, count: int) -> None:
    """ConfigError where a task has fewer distinct prompts than wanted."""
    most = splits.capacity(task, split)
    if count > most:
        raise ConfigError(
            f"{name}: the task {task!r} has {most} distinct prompts in the split {split!r}, not {count}; ask for fewer"
        )


def question_scene(
    question: splits.Question, split: splits.Split, seed: Sequence[int], phrasings: int, largest: bool
) -> QuestionScene:
    """A question with a scene of its own and `phrasings` different wordings, the plain one first."""
    rng = np.random.default_rng(seed)
    scene = splits.scene_for(rng, question, split, largest)
    plain, *others = captions.phrasings(scene)
    texts = (plain, *(others[n] for n in rng.permutation(len(others))[: phrasings - 1]))
    return QuestionScene(scene, texts, str(question), str(evolve(question, background=(), halves="")))


def pictures(scenes: Sequence[Scene], height: int, width: int) -> Tensor:
    """Scenes -> uint8 [B,3,H,W]."""
    import torch

    return torch.from_numpy(np.stack([render(scene, height, width) for scene in scenes])).permute(0, 3, 1, 2)


def reconstruct(vae: Any, images: Tensor, batch: int = 32) -> Tensor:
    """Images uint8 [B,3,H,W], encoded and decoded by a VAE, as uint8 again."""
    import torch

    weight = next(iter(vae.parameters()), None) if hasattr(vae, "parameters") else None
    reconstructed = []
    with torch.no_grad():
        for part in torch.split(images, batch):
            pixels = part.float() / 127.5 - 1
            pixels = pixels if weight is None else pixels.to(weight.device, weight.dtype)
            back = vae.decode(vae.encode(pixels)).float().clamp(-1, 1)
            reconstructed.append(((back + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(reconstructed)


class ShapesBenchmark:
    """Prompts about coloured shapes, scored exactly from pixels.

    Distinct questions, spread evenly over the tasks. The overall figure is the mean of `headline`: the tasks of GenEval
    where there are any among the tasks, else all; without "single", which cannot be held out.
    """

    @frozen
    class Config:
        prompts: int = field(default=500, validator=integer(at_least=1))  # distinct questions
        seed: int = field(default=0, validator=SEED)
        split: str = ""  # train, select or test (rules 1: train or heldout); "": test (heldout)
        # Kinds of scene that prompts name; `scenes.TASKS` has them all.
        tasks: tuple[str, ...] = field(default=(*GENEVAL, "words"), validator=each(one_of(*TASKS), at_least=1))
        dense_prompts: bool = (
            False  # described at length, as a prompt enhancer would; the facts scored are the short prompt's
        )
        largest: bool = False  # scenes whose things are as large as their number allows; long prompts name it
        # How often each question stands in the set, each time in other words.
        phrasings: int = field(default=1, validator=integer(at_least=1, at_most=5))
        # Of the prompts: en, fr, de or es. The facts that are scored are the same, and pictures have the same seeds.
        language: str = field(default="en", validator=one_of(*LANGUAGES))
        # Things that were not asked for do no harm, unless the prompt counts: GenEval's rule.
        extras: bool = False
        # 1: the splits by which the embedded checkpoints were trained; prompts may repeat there.
        rules: int = field(default=2, validator=RULES)
        # That read pictures; more are faster, with the same scores. A script needs `if __name__ == "__main__":`.
        processes: int = field(default=1, validator=PROCESSES, metadata={SPEED_ONLY: True})

        def __attrs_post_init__(self) -> None:
            check_split(self.named_split, self.rules)
            if len(set(self.tasks)) < len(self.tasks):
                raise ConfigError(f"tasks names one of {list(self.tasks)} twice; name each once")
            if self.rules == 1 and self.phrasings != 1:
                raise ConfigError(f"phrasings is {self.phrasings}; rules 1 have one wording of each prompt")
            if self.language != "en" and (self.dense_prompts or self.phrasings != 1):
                raise ConfigError(
                    f"language is {self.language!r}; only brief prompts in one wording are translated: leave out "
                    "dense_prompts and phrasings"
                )
            if self.rules == 2:
                for place, task in enumerate(self.tasks):
                    count = len(range(place, self.prompts, len(self.tasks)))
                    check_count("shapes", task, self.named_split, count)  # type: ignore[arg-type]

        @property
        def named_split(self) -> str:
            """The split, with its default filled in."""
            return self.split or ("test" if self.rules == 2 else "heldout")

    def __init__(self, config: Config) -> None:
        self.config = config
        unseen = [task for task in config.tasks if config.rules == 1 or task != "single"] or list(config.tasks)
        self.headline = tuple(task for task in unseen if task in GENEVAL) or tuple(unseen)

    def _question_scenes(self) -> list[QuestionScene]:
        """One for each distinct question (rules 1: one for each prompt); number n is of task n mod their number."""
        config, tasks = self.config, self.config.tasks
        if config.rules == 1:
            return [self._scene_by_rules_1(number) for number in range(config.prompts)]
        split: Any = config.named_split
        lists = [
            splits.distinct_questions(split, task, len(range(place, config.prompts, len(tasks))), config.seed)
            for place, task in enumerate(tasks)
        ]
        return [
            question_scene(
                lists[n % len(tasks)][n // len(tasks)], split, [config.seed, n], config.phrasings, config.largest
            )
            for n in range(config.prompts)
        ]

    def _scene_by_rules_1(self, number: int) -> QuestionScene:
        """Prompt `number` by rules 1: drawn at random, so that it may repeat another."""
        config = self.config
        rng = np.random.default_rng([config.seed, number])
        split: Any = config.named_split
        scene = sample(rng, split, config.tasks[number % len(config.tasks)], largest=config.largest)
        return QuestionScene(scene, (prompt(scene),), prompt(scene), prompt(scene))

    def scenes(self) -> list[Scene]:
        """A scene that each prompt is true of, in the order of `prompts`."""
        return [one.scene for one in self._question_scenes() for _ in one.texts]

    def prompts(self) -> list[Prompt]:
        """The same prompts for the same config, ordered by id; the wordings of a question follow each other.

        In `data` stand the facts to judge, `question` (equal for all wordings of one distinct question) and `fact` (the
        combination behind it, which questions with other backgrounds share).
        """
        config = self.config
        prompts: list[Prompt] = []
        for number, one in enumerate(self._question_scenes()):
            facts = prompt_facts(one.scene)
            data = {**facts, **rubrics(facts), "question": one.question, "fact": one.fact}
            for turn, words in enumerate(one.texts):
                if config.language != "en":
                    words = request(facts, config.language)
                elif config.dense_prompts:
                    words = dense(one.scene, np.random.default_rng([config.seed, number, turn, 1]))
                prompts.append(Prompt(words, len(prompts), one.scene.task, data))
        return prompts

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return score_images(images, prompts, extras=self.config.extras, processes=self.config.processes)

    def ceiling(self, vae: Any, height: int, width: int) -> list[Score]:
        """The most that any generator with this VAE can score: true scenes, encoded and decoded, judged. One Score a
        prompt, in the order of `prompts`; pictures of `height` x `width` px, multiples of what the VAE needs."""
        return self.score(reconstruct(vae, pictures(self.scenes(), height, width)), self.prompts())


class ShapesReward:
    """Exact score of pictures of coloured shapes, read from pixels.

    The benchmark's judge as a reward: deterministic, and impossible to flatter.
    """

    @frozen
    class Config:
        partial: bool = False  # credit for the share of facts that are there: a weak model's pictures differ then
        # That read pictures; more are faster, with the same scores. A script needs `if __name__ == "__main__":`.
        processes: int = field(default=1, validator=PROCESSES)

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return score_images(images, prompts, self.config.partial, processes=self.config.processes)
