"""What comes back from a language model: parsed, cleaned and checked."""

from __future__ import annotations

import itertools

import pytest
from lens_reason.checks import flaw, language_of, missing_words, quoted_words
from lens_reason.cleaning import clean
from lens_reason.harmony import HarmonyError, Turn, final_text, parse, pieces_of


def turns(text: str) -> list[Turn]:
    return parse(pieces_of(text))


def final(text: str, finished: bool = True) -> str:
    return final_text(pieces_of(text), finished)


# ---- Harmony --------------------------------------------------------------------------------------------------------


def test_the_turns_of_an_answer_are_told_apart():
    text = (
        "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>commentary to=functions.draw "
        '<|constrain|>json<|message|>{"a": 1}<|call|><|start|>functions.draw to=assistant<|channel|>commentary'
        "<|message|>done<|end|><|start|>assistant<|channel|>final<|message|>A cat.<|return|>"
    )
    assert turns(text) == [
        Turn("assistant", "analysis", "", "I think.", "<|end|>"),
        Turn("assistant", "commentary", "functions.draw", '{"a": 1}', "<|call|>"),
        Turn("functions.draw", "commentary", "assistant", "done", "<|end|>"),
        Turn("assistant", "final", "", "A cat.", "<|return|>"),
    ]
    assert final(text) == "A cat."


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A cat.", "A cat."),
        ("<|channel|>final<|message|>A cat.<|return|>", "A cat."),
        ("<|channel|>final<|message|>A cat.", "A cat."),
        ("<|start|>assistant<|channel|>final<|message|>A cat.<|end|>", "A cat."),
        ("<|channel|>final <|constrain|>text<|message|>A cat.<|end|>", "A cat."),
        ("<|channel|>final<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>", "Two."),
        ("<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>A cat.<|return|>", "A cat."),
        ("<|message|>A cat.<|return|>", "A cat."),
    ],
)
def test_the_final_channel_is_the_answer(text, wanted):
    assert final(text) == wanted


@pytest.mark.parametrize(
    ("text", "finished", "words"),
    [
        ("", True, "empty"),
        ("<|channel|>analysis<|message|>Only thoughts.<|end|>", True, "no final part"),
        ("<|channel|>analysis<|message|>Thoughts that never", False, "no final part: it was cut off before"),
        ("<|channel|>final<|message|>A cat on a", False, "cut off at its longest"),
        ("A cat on a", False, "cut off at its longest"),
        ("<|channel|>commentary to=python<|message|>print(1)<|call|>", True, "calls a tool"),
        ("<|channel|>commentary to=python<|message|>print(1)", True, "calls a tool"),
        ("<|channel|>final", True, "no final part"),
        ("<|start|>user<|channel|>final<|message|>a dog<|end|>", True, "no final part"),
        ("<|end|><|end|>", True, "empty"),
    ],
)
def test_an_answer_without_a_final_part_says_why(text, finished, words):
    with pytest.raises(HarmonyError, match=words):
        final(text, finished)


def test_any_order_of_control_tokens_is_read():
    """No sequence of tokens makes the parser fail in another way, or takes text out of a channel that is not final."""
    tokens = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "final", "analysis"]
    for sequence in itertools.product(tokens, repeat=5):
        for turn in turns("".join(sequence)):
            assert isinstance(turn, Turn)
    for ends in itertools.product(tokens, repeat=3):
        text = f"<|channel|>analysis<|message|>secret{''.join(ends)}"
        try:
            assert "secret" not in final(text)
        except HarmonyError:
            continue


def test_control_tokens_told_by_a_tokenizer_differ_from_text_that_spells_them():
    pieces = [
        (True, "<|channel|>"),
        (False, "final"),
        (True, "<|message|>"),
        (False, "a <|end|> b"),
        (True, "<|return|>"),
    ]
    assert final_text(pieces) == "a <|end|> b"


# ---- cleaning -------------------------------------------------------------------------------------------------------

CAT = "A red cat sits on a blue mat."


@pytest.mark.parametrize(
    "answer",
    [
        CAT, f'"{CAT}"', f"“{CAT}”", f"```\n{CAT}\n```", f"```text\n{CAT}\n```",
        f"Here is the refined prompt:\n\n{CAT}",
        f"Sure! Here's a detailed prompt for you: {CAT}", f"**Prompt:** {CAT}", f"Refined prompt: \"{CAT}\"",
        f"Voici une description : {CAT}", f"Hier ist die Beschreibung: {CAT}", f"Aquí tienes: {CAT}",
        f"<think>The user wants a cat. {CAT} no</think>\n{CAT}", f"thoughts without a start</think>{CAT}",
        f"{CAT}\n**Changes made:**\n- a mat\n- a cat", f"{CAT}\nNote that I kept the colours.",
        f"{CAT}\nOr:\nA dog runs.",
        f"Option A: {CAT}\nOption B: A dog runs.", f"I made it vivid.\n```\n{CAT}\n```\nLet me know!",
        f"{CAT}\n\nLet me know if you want changes!", f"{CAT}\n\nNote: I kept the colours.",
        f"Option 1: {CAT}\n\nOption 2: A dog runs.", f"{CAT}\n\nAlternatively:\nA dog runs.",
        f'{{"prompt": "{CAT}"}}', f'```json\n{{"prompt": "{CAT}"}}\n```', f"<answer>{CAT}</answer>",
        f"Certainly! {CAT}", f"{CAT}\n\n---\n**Changes made:**\n- a mat", f"Here it is:\n{CAT}",
        f"Here is the rewritten request:\n{CAT}", f"Here’s the enhanced text: {CAT}", f"Voici le résultat : {CAT}",
        f"{CAT}\n\n---\n\n*Why this works:* it is short.", f"{CAT}\n\nExplanation of changes: none.",
        f"Here's something lovely:\n\n{CAT}", "A red cat\nsits on  a blue mat.", f"# Prompt: {CAT}",
    ],
)  # fmt: skip
def test_what_stands_around_a_prompt_is_taken_away(answer):
    assert clean(answer) == CAT


@pytest.mark.parametrize(
    "prompt",
    [
        '"CAT" is written above "DOG"', 'the word "STOP"', '"OPEN"', "a sign: no entry", "a sure-footed goat",
        "a here-and-now poster", "two cats, or one cat in a mirror", "a prompt book on a stage", "it's a dog's life",
        "a clock at 1. There is a cat.", "a cat {in braces}", 'a note that says "Note: buy milk" on a fridge',
        "'Twas night", "an answer: 42 in neon", 'This is a neon sign in an alley, reading: "OPEN LATE"',
        'Here is a chalkboard with the answer: "42"', "A poster. Or, seen from afar, a stamp.",
        "This is a watercolor version of the Mona Lisa: she smiles.", '"REFUSE" in red letters on a bin',
    ],
)  # fmt: skip
def test_what_belongs_to_a_prompt_stays(prompt):
    assert clean(prompt) == prompt


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("Three cups:\n1. A red cup.\n2. A blue cup.\n3. A white cup.", "1. A red cup. 2. A blue cup. 3. A white cup."),
        ("1. A cat sleeps.\n2. A dog stands.", "2. A dog stands."),
        ("A chalkboard in a classroom.\nNote the dusty window and the red apple.", "the red apple."),
        (
            "A poster on a wall.\n---\nBelow it stands a green bench.",
            "A poster on a wall. Below it stands a green bench.",
        ),
        ("A stage.\nOr the moon rises behind it.", "A stage. Or the moon rises behind it."),
        ("A handwritten page.\nNote: buy milk\nA red pin holds it.", "page. Note: buy milk A red pin holds it."),
        ("A sticky note that reads\nNote: buy milk", "reads Note: buy milk"),
        (
            "A card that says:\n\nI hope you feel better\n\nwith a bear below.",
            "says: I hope you feel better with",
        ),
        ("A waiter's speech bubble:\nWould you like some tea?\nA cat nods.", "tea? A cat nods."),
        ("A sign that says\nOR\nin neon.", "says OR in neon."),
        ("A road forks; a sign for each way:\nOption B\npoints left.", "way: Option B points left."),
        ("A terminal window showing\n```\n$ ls\n```\non a black screen.", "showing $ ls on a black screen."),
        (f"1. In the first panel {CAT * 4}\n2. In the second panel a dog runs.", "2. In the second panel a dog runs."),
    ],
)
def test_things_that_are_listed_are_all_drawn(answer, kept):
    assert kept in clean(answer)


def test_of_numbered_versions_the_first_is_drawn():
    versions = [f"{animal} {CAT[2:]} " * 4 for animal in ("A", "Another")]
    assert clean(f"1. {versions[0]}\n2. {versions[1]}") == versions[0].strip()


# ---- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "answer", "words"),
    [
        ("a cat", "", "empty"),
        ("a cat", "...", "empty"),
        ("a cat", "I'm sorry, but I can't help with that.", "refuses"),
        ("a cat", "I cannot create this image.", "refuses"),
        ("un chat", "Désolé, je ne peux pas.", "refuses"),
        ("a cat", "Could you tell me which cat you mean?", "question"),
        ("a cat", "x" * 5000, "5000 characters, more than 4000"),
        ("a cat", "a cat <|channel|>", "control tokens"),
        ("a cat", "a cat\x00", "no text"),
        ('the word "CAT"', "the word cat in bold", "'CAT' are not kept"),
        ('the word "CAT"', 'the word "CATS"', "'CAT' are not kept"),
        ("ein Schild mit „Bäckerei“", "ein Schild mit Bakery", "'Bäckerei' are not kept"),
        ("un panneau « Sortie »", "un panneau avec le mot sortie", "'Sortie' are not kept"),
        ("une étoile à gauche d'un cercle", "a star is to the left of a circle", "in English, the request in French"),
        ("a star is on the mat", "der Stern ist auf der Matte", "in German, the request in English"),
        ("кошка на ковре", "a cat on a mat with a bowl", "latin script, the request in cyrillic"),
        ("a cat on a mat with a bowl", "一只猫坐在垫子上", "cjk script, the request in latin"),
    ],
)  # fmt: skip
def test_an_answer_that_may_not_be_drawn_says_why(request_, answer, words):
    problem = flaw(request_, answer, "keep", 4000)
    assert problem is not None and words in problem and len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        ("a cat", "A small grey cat sits on a red mat in the light of the morning."),
        ("circle", "ein Kreis, rot"),  # too short to show a language
        ('the word "CAT"', 'the word "CAT" is written in bold letters'),
        ("don't draw dogs, it's a cat's home", "a home of cats, without any dogs in it"),
        ("une étoile sur un fond blanc", "une étoile jaune est dessinée au centre, sur un fond blanc uni"),
        ("quién es?", "un retrato de una persona que es desconocida?"),
        ("猫", "一只小猫坐在红色的垫子上"),
        ("カフェの看板", "日本のカフェの看板"),
    ],
)
def test_a_good_answer_passes(request_, answer):
    assert flaw(request_, answer, "keep", 4000) is None


def test_a_target_language_takes_the_place_of_the_request_s():
    french, english = "une étoile à gauche d'un cercle sur un fond blanc", "a star is to the left of a circle on white"
    assert flaw(french, english, "en", 4000) is None
    assert "in French, not in English" in str(flaw(french, french, "en", 4000))
    assert flaw("кошка", "a cat on the mat in the sun", "en", 4000) is None


def test_quoted_words_are_found_in_every_kind_of_quotation_marks():
    text = "\"a b\" and “c” „d“ « e » 'f' 「g」 but not it's or dogs' or 5'"
    assert quoted_words(text) == ["a b", "c", "d", "e", "f", "g"]
    assert list(missing_words('"C.A.T" and "x"', "C.A.T, and X")) == ["x"]


def test_languages_are_told_by_frequent_words_and_short_texts_by_none():
    assert language_of("a star is left of the circle") == "en"
    assert language_of("ein Stern ist links von dem Kreis") == "de"
    assert language_of("un rond bleu est sur le fond blanc") == "fr"
    assert language_of("una estrella a la izquierda de un círculo") == "es"
    assert language_of("der die das") == "de"
    assert language_of("der die") == ""
    assert language_of("cat") == language_of("Stern") == language_of("kissa istuu matolla sateessa") == ""
