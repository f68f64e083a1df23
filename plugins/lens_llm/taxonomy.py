"""What a prompt set is to be about: classes, subclasses and items, and the aspects that its prompts bring in.

The defaults are the paper's: ten categories, each with classes and items, and one to four of five aspects a prompt.
Source: [S], a reading note of the Lens paper, section on Lens-RL-8K. The note names the ten categories and the five
aspects; the classes and items below are ours, for the published lists are not public.
"""

from __future__ import annotations

from pathlib import Path

from attrs import field, frozen

from lens_core.attribution import TASK, is_task
from lens_core.io import readers
from lens_core.recipe import ComponentSpec, structure
from lens_core.types import ConfigError
from lens_core.validators import PIXELS, SEED, each, integer, real, text
from lens_llm.prompts import NAME, QUESTIONS, text_flaws

MAX_PROMPTS = 1_000_000  # of a set
MAX_ASPECTS = 4  # of a prompt [S]; more would ask for pictures that no one could check at a glance

ASPECTS = ("attribute", "spatial", "counting", "interaction", "colour")  # [S]

# The keys are the paper's ten categories [S].
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "human": {
        "profession": ("baker", "firefighter", "violinist", "surgeon"),
        "age": ("toddler", "teenager", "elderly couple"),
        "activity": ("person reading", "dancer", "rock climber", "group of friends at a table"),
    },
    "object": {
        "furniture": ("armchair", "bookshelf", "writing desk"),
        "tool": ("hammer", "sewing machine", "microscope"),
        "vehicle": ("bicycle", "steam locomotive", "sailing boat", "delivery van"),
        "household": ("teapot", "umbrella", "alarm clock"),
    },
    "animal": {
        "mammal": ("fox", "elephant", "otter", "tabby cat"),
        "bird": ("parrot", "heron", "barn owl"),
        "sea life": ("octopus", "sea turtle", "clownfish"),
        "insect": ("honeybee", "dragonfly", "ladybird"),
    },
    "plant": {
        "flower": ("sunflower", "tulip", "orchid"),
        "tree": ("oak", "cherry tree", "palm"),
        "other": ("cactus", "fern", "mushroom"),
    },
    "scene": {
        "nature": ("mountain lake", "desert dunes", "rain forest", "rocky coast"),
        "city": ("market street", "subway station", "rooftop at night"),
        "interior": ("library", "kitchen", "greenhouse", "workshop"),
    },
    "food": {
        "dish": ("bowl of ramen", "pizza", "breakfast plate"),
        "dessert": ("layer cake", "fruit tart", "ice cream sundae"),
        "ingredient": ("basket of vegetables", "cheese board", "sliced citrus"),
    },
    "event": {
        "celebration": ("wedding", "birthday party", "lantern festival"),
        "sport": ("football match", "marathon", "chess tournament"),
        "public": ("street parade", "concert", "science fair"),
    },
    "fictional": {
        "creature": ("dragon", "unicorn", "robot gardener"),
        "place": ("floating island", "underwater city", "lunar colony"),
        "character": ("wizard", "space explorer", "knight"),
    },
    "text": {
        "sign": ("shop sign", "road sign", "neon sign"),
        "print": ("book cover", "movie poster", "newspaper page"),
        "handwriting": ("chalkboard menu", "greeting card", "sticky notes"),
    },
    "UI": {
        "mobile": ("weather app", "music player", "chat screen"),
        "web": ("online shop page", "news site", "sign-in form"),
        "dashboard": ("sales dashboard", "fitness tracker", "car display"),
    },
}


@frozen
class Taxonomy:
    """Classes -> subclasses -> items, and how prompts about them are made. Raises ConfigError for a set that its reader
    would refuse, before anything is paid for."""

    llm: ComponentSpec  # as in {use: openai, model: gpt-4.1, cache: prompt-cache}
    license: str = field(validator=text())  # of the set, for its provenance
    classes: dict[str, dict[str, tuple[str, ...]]] = field(factory=lambda: CLASSES)
    prompts_per_item: int = field(default=1, validator=integer(at_least=1))
    rubrics: int = field(default=10, validator=integer(at_least=1, at_most=QUESTIONS))  # beside the global one
    eval: float = field(default=0.1, validator=real(at_least=0, below=1))  # share of items kept for evaluation
    # Height, width px, offered to every prompt.
    sizes: tuple[tuple[int, int], ...] = field(default=(), validator=each(each(PIXELS)))
    aspects: tuple[str, ...] = field(default=ASPECTS, validator=each(text(), at_least=1))
    seed: int = field(default=0, validator=SEED)

    def __attrs_post_init__(self) -> None:
        count = sum(len(items) for subclasses in self.classes.values() for items in subclasses.values())
        if not count:
            raise ConfigError("classes holds no item; write classes: {animal: {bird: [parrot]}}")
        if count * self.prompts_per_item > MAX_PROMPTS:
            raise ConfigError(
                f"classes and prompts_per_item make more than {MAX_PROMPTS:,} prompts; divide the taxonomy"
            )
        inner = [n for subs in self.classes.values() for s, items in subs.items() for n in (s, *items)]
        names = [*self.classes, *inner, *self.aspects, self.license]
        problems = [f"the name {readers.shown(n)} {flaw}" for n in names for flaw in text_flaws(n, NAME)]
        problems += [f"the class {readers.shown(n)} must be {TASK}" for n in self.classes if not is_task(n)]
        if problems:
            raise ConfigError(problems)


def read_taxonomy(path: Path) -> Taxonomy:
    """The taxonomy of a YAML file; `llm` and `license` are all that it must hold.

    Raises ConfigError with every problem and its path.
    """
    data, twice = readers.read_yaml(path, "a taxonomy")
    if twice:
        raise ConfigError([f"{path}: {problem}" for problem in twice])
    try:
        return structure(Taxonomy, data)
    except ConfigError as error:
        raise ConfigError([f"{path}: {p}" for p in error.problems]) from error
