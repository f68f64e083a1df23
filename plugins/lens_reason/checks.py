"""Whether an answer may take the place of its request: each function says what is wrong, or None."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from lens_core.io.readers import shown
from lens_reason.harmony import CONTROL
from lens_reason.policy import NAMES

QUOTED = re.compile(r"\"([^\"\n]{1,200})\"|“([^”\n]{1,200})”|„([^“”\n]{1,200})[“”]|«\s*([^»\n]{1,200}?)\s*»|"
                    r"(?<!\w)'([^'\n]{1,200})'(?!\w)|(?<!\w)‘([^’\n]{1,200})’(?!\w)|「([^」\n]{1,200})」")  # fmt: skip
"""Words in quotation marks; an apostrophe within a word is none."""
REFUSALS = re.compile(
    r"(?i)\A\W*(?:i(?:'|’)?m (?:very |so |really )?(?:sorry|afraid|unable|not able)|i am (?:sorry|unable|not able)|"
    r"sorry\b|i (?:can(?:'|’)?t|can ?not|won(?:'|’)?t|will not|must decline|apologi[sz]e)|unfortunately|as an ai\b|"
    r"je suis désolé|désolé|je ne peux pas|es tut mir leid|tut mir leid|entschuldigung|"
    r"ich kann (?:das|dies|dir|ihnen)?\s*(?:leider )?nicht|lo siento|no puedo|"
    r"我(?:很)?抱歉|抱歉|对不起|申し訳)"
)
"""How a refusal begins."""
QUESTIONS = re.compile(
    r"(?i)\A(?:could you|can you|would you|do you|what |which |please (?:provide|tell|specify|clarify))"
)
_WORDS = re.compile(r"[^\W\d_]+")
# Words that are frequent in one of these languages and rare in the others.
_COMMON = {
    "en": "the of and a an is are in on with to at it there this that its from by left right above below",
    "fr": "le la les un une des du de et est sont dans sur avec à au aux il elle qui deux trois fond gauche droite",
    "de": "der die das ein eine einem einer einen und ist sind in im auf mit von zu über unter zwei drei links rechts",
    "es": "el la los las un una unos unas de del y es son en con a al sobre que dos tres fondo izquierda derecha",
}
_FREQUENT = {language: frozenset(words.split()) for language, words in _COMMON.items()}
LEAST_WORDS = 3
"""A shorter text shows no language by its words alone."""


def flaw(request: str, answer: str, language: str, longest: int) -> str | None:
    """Why `answer` may not be drawn instead of `request`, or None. `language`: keep, or that of all answers;
    `longest`: characters."""
    if not answer.strip() or not any(c.isalnum() for c in answer):
        return "the answer is empty"
    if len(answer) > longest:
        return f"the answer has {len(answer)} characters, more than {longest}"
    if CONTROL.search(answer) or "\ue000" in answer:
        return "the answer holds control tokens"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Co") for c in answer):
        return "the answer holds characters that are no text"
    if REFUSALS.match(answer):
        return f"the model refuses: {shown(answer, 100)}"
    if answer.rstrip().endswith("?") and (QUESTIONS.match(answer) or not request.rstrip().endswith("?")):
        return "the answer is a question"
    lost = next(missing_words(request, answer), None)
    if lost is not None:
        return f"the words {shown(lost, 60)} are not kept to the letter"
    return language_flaw(request, answer, language)


def quoted_words(text: str) -> list[str]:
    """What stands in quotation marks."""
    return [next(filter(None, groups), "").strip() for groups in QUOTED.findall(text)]


def missing_words(request: str, answer: str) -> Iterator[str]:
    """The quoted words of a request that an answer does not hold, letter by letter."""
    for words in quoted_words(request):
        # Letters around it would make another word of it: CAT in CATS.
        if words and not re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer):
            yield words


def language_flaw(request: str, answer: str, language: str) -> str | None:
    """Where it is plain that an answer is in another language than it should be."""
    want_script = script_of(request)
    if language != "keep":
        answered = language_of(answer)
        if script_of(answer) not in ("", "LATIN"):
            return f"the answer is not in {NAMES[language]}"
        return None if answered in (language, "") else f"the answer is in {NAMES[answered]}, not in {NAMES[language]}"
    if script_of(answer) != want_script and want_script and script_of(answer):
        return f"the answer is written in {script_of(answer).lower()} script, the request in {want_script.lower()}"
    requested, answered = language_of(request), language_of(answer)
    if requested and answered and requested != answered:
        return f"the answer is in {NAMES[answered]}, the request in {NAMES[requested]}"
    return None


def script_of(text: str) -> str:
    """The script of most letters outside quotation marks: LATIN, CYRILLIC, CJK (kana too) …; "" without letters."""
    counts: Counter[str] = Counter()
    for c in QUOTED.sub(" ", text)[:4000]:
        if c.isalpha():
            name = unicodedata.name(c, "").partition(" ")[0]
            counts["CJK" if name in ("HIRAGANA", "KATAKANA", "CJK") else name] += 1
    return counts.most_common(1)[0][0] if counts else ""


def language_of(text: str) -> str:
    """en, fr, de or es where frequent words say so plainly, else "": of a short text, or of another language."""
    words = [word.lower() for word in _WORDS.findall(QUOTED.sub(" ", text)[:4000])]
    if len(words) < LEAST_WORDS:
        return ""
    hits = {language: sum(word in known for word in words) for language, known in _FREQUENT.items()}
    (best, most), (_, second) = Counter(hits).most_common(2)
    return best if most >= 2 and most > second and most / len(words) >= 0.15 else ""
