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
    "answer",
    [
        f"## Refined prompt\n```\n{CAT}\n```", f"Here's your prompt ✨\n```\n{CAT}\n```",
        f"Here is the refined prompt\n```\n{CAT}\n```", f"Final prompt\n```\n{CAT}\n```",
        f"以下是优化后的提示词：\n```\n{CAT}\n```", f'Here is the JSON\n```json\n{{"prompt": "{CAT}"}}\n```',
        f"Prompt\n\n```text\n{CAT}\n```", f"```\n{CAT}\n```\nhope this helps!", f"```{CAT}```\nhope this helps!",
        f"I rewrote it so that the prompt reads\n```\n{CAT}\n```", f"```\n{CAT}",
        f"The refined prompt reads:\n```\n{CAT}\n```", f"Here is the prompt:\n```\n{CAT}\n```\nlet me know!",
        f"Now your new prompt reads\n```\n{CAT}\n```\nas you asked",
        f'The file shows\n```json\n{{"prompt": "{CAT}"}}\n```',
        f"Prompt:\n```\n{CAT}\n```\nNegative prompt:\n```\nblurry\n```", f"{CAT}\n\nNegative prompt:\n```\nblurry\n```",
        f"Option 1:\n```\n{CAT}\n```\nOption 2:\n```\nA dog runs.\n```",
    ],
)  # fmt: skip
def test_a_fence_below_chatter_holds_the_prompt(answer):
    assert clean(answer) == CAT


@pytest.mark.parametrize(
    "answer",
    [
        # English, as chat models write it
        f"Here’s a refined version of your prompt:\n\n> {CAT}\n\nWould you like me to make it more cinematic?",
        f"Absolutely! 🎨 Here's an enhanced prompt:\n\n**Prompt:**\n{CAT}\n\n**Negative prompt:**\nblurry, low quality",
        f"**Option 1: Cinematic**\n{CAT}\n\n**Option 2: Minimal**\nA dog runs.",
        f"**Option 1 (Cinematic):**\n{CAT}\n\n**Option 2 (Minimal):**\nA dog runs.",
        f"### Option 1 — Cozy\n{CAT}\n\n### Option 2 — Wild\nA dog runs.",
        f"Here are two options:\n\nOption 1: {CAT}\n\nOption 2: A dog runs.",
        f"Option 1 - {CAT}\nOption 2 - A dog runs.",
        f"### Prompt\n{CAT}\n### Negative Prompt\nblurry",
        f"✨ **Refined Prompt** ✨\n\n{CAT}", f"Got it! Here's your prompt:\n\n\"{CAT}\"\n\nEnjoy!", f"*{CAT}*",
        f"**Refined Prompt**\n\n{CAT}\n\n---\n\nIf you'd like, I can also make a version in another style.",
        f"I've expanded your prompt into a detailed description:\n\n{CAT}", f"Prompt\n{CAT}",
        f"# Refined Prompt\n\n{CAT}\n\n## What I changed\n- added a mat\n- a cat",
        f"Here's a more vivid take:\n\n{CAT}\n\nI kept the composition simple.",
        f"{CAT}\n\nThe refined prompt keeps your subject.", f"{CAT}\nChanges made:\nmat added\ncat added",
        f"{CAT}\nLet me know if you want changes!\nI kept the colours as you asked.",
        f"{CAT}\nNote: the colours are kept.\nExplanation: it is vivid.\n- red\n- blue",
        # other languages
        f"当然可以！以下是优化后的提示词：\n\n{CAT}\n\n如果您需要调整，请告诉我！",
        f"版本一：{CAT}\n\n版本二：A dog runs.",
        f"下面是优化后的提示：\n{CAT}", f"以下是优化后的描述如下：{CAT}",
        f"**优化后的提示词：**\n\n{CAT}\n\n说明：保留了颜色。",
        f"以下が改善したプロンプトです：\n\n{CAT}\n\nご希望があればお知らせください。",
        f"다음은 개선된 프롬프트입니다:\n\n{CAT}\n\n원하시면 수정해 드릴게요.",
        f"Bien sûr ! Voici une version améliorée :\n\n{CAT}\n\nN'hésitez pas à me dire ce que vous en pensez.",
        f"Voici le prompt amélioré :\n\n« {CAT} »\n\nSouhaitez-vous que je l'adapte ?",
        f"Gerne! Hier ist der überarbeitete Prompt:\n\n{CAT}\n\nMöchtest du noch etwas ändern?",
        f"**Überarbeiteter Prompt:**\n{CAT}\n\n**Änderungen:**\n- Matte", f"{CAT}\n\nOder:\n\nEin Hund rennt.",
        f"¡Claro! Aquí tienes el prompt mejorado:\n\n{CAT}\n\n¿Quieres que lo adapte?",
        f"Claro! Aqui está o prompt refinado:\n\n{CAT}\n\nSe quiser, posso ajustar.",
        f"Ecco il prompt migliorato:\n\n{CAT}\n\nFammi sapere se vuoi modifiche.",
        f"Конечно! Вот улучшенный промпт:\n\n{CAT}\n\nЕсли хотите, могу изменить.",
    ],
)  # fmt: skip
def test_what_chat_models_say_around_a_prompt_is_taken_away(answer):
    assert clean(answer) == CAT


@pytest.mark.parametrize(
    "said",
    [
        "\nLet me know if you want changes!", "\nNote: I kept the mat.", "\nAlternatively:\nblue cat, 4k",
        "\nOr:\nblue cat", "\nOption 2: blue cat", "\nThis prompt keeps it short", "\nFeel free to tweak it",
        "\nOR\nblue cat, 4k", "\nOR\n\nblue cat, 4k\n\nEnjoy!", "\nRationale: x",
    ],
)  # fmt: skip
def test_tags_without_a_full_stop_end_where_the_user_is_addressed(said):
    assert clean(f"red cat, blue mat, 8k{said}") == "red cat, blue mat, 8k"


@pytest.mark.parametrize("run", ["#", "\n", " ", "> ", "\n#", "```\n", "<think>", "A.\nNote: x\n"])
def test_an_answer_of_one_thing_repeated_is_cleaned(run):
    """Patterns that go back over what they have read would need hours."""
    assert "A cat." in clean(f"A cat.{run * 2000}\nx")
    assert isinstance(clean(f"{run * 2000}\nA cat."), str)


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
        ("A sign at a fork showing:\n```\nNORTH 5\n```", "A sign at a fork showing: NORTH 5"),
        ("A CRT monitor displays\n```\nHELLO\n```", "A CRT monitor displays HELLO"),
        ("A wall with a stencil: ```CODE``` in black", "a stencil: ```CODE``` in black"),
        ("A ballot on a table listing\nOption A: Yes\nOption B: No", "listing Option A: Yes Option B: No"),
        (
            "A chat bubble that says:\nLet me know if you are home\nA thumb above it.",
            "says: Let me know if you are home A",
        ),
        ("Two cats.\nAnother version of the cat sits behind.", "Another version of the cat sits behind."),
        ("A poster.\nAlternative rock band in neon.", "Alternative rock band in neon."),
        (
            "A page.\nShall I compare thee to a summer's day?\nAn inkwell.",
            "Shall I compare thee to a summer's day? An ink",
        ),
        ("A window.\nFeel free to browse\nis painted on it.", "Feel free to browse is painted on it."),
        ("A banner.\nSi quieres paz, prepárate\ncuelga sobre la calle.", "Si quieres paz, prepárate cuelga"),
        ("一张海报。\n如果你想飞\n写在天空上。", "如果你想飞 写在天空上。"),
        ("A board with the words:\nChanges made:\nmat added", "words: Changes made: mat added"),
        ("**A cat** and **a dog**", "A cat and a dog"),
        ("Version 1 of a cat robot stands in a lab.", "Version 1 of a cat robot stands in a lab."),
        (f"1. In the first panel {CAT * 4}\n2. In the second panel a dog runs.", "2. In the second panel a dog runs."),
    ],
)
def test_things_that_are_listed_are_all_drawn(answer, kept):
    assert kept in clean(answer)


@pytest.mark.parametrize(
    "picture",
    [
        # Words that a remark can begin with too.
        "A dark office with one computer.\nThe command prompt is blinking green on the black screen.",
        "A dark office with one computer, viewed from behind.\n\nThe prompt is shown in green letters.",
        "A retro terminal. Green glow.\n\nThe shell prompt now shows a blinking cursor.",
        "A split screen.\nThe enhanced prompt is glowing on it.",
        "A museum label beside a vase.\nThis description is engraved in brass.",
        "A before and after picture.\n\nWhat changed is the light, from dawn to dusk.",
        "A card. On it, in gold letters:\nHappy birthday\nHope you like it!\nA ribbon lies beside it.",
        "A greeting card.\nHope you enjoy the day\nA blue ribbon lies beside it.",
        "A letter. It says:\nDear Bob,\nplease let me know if you come.\nYours, Ann\nThe desk is of oak.",
        "A letter on a desk with three lines of ink:\n\nDear Bob,\nI hope you like it.\nlet me know if you come",
        "A slide titled Q3 with bullets:\n- Growth\n- Improvements\n- Costs\nClean flat style.",
        "An infographic with four headings:\nPlans\nChanges:\nCosts\nOn a white background.",
        "Two signs at a crossroads:\nYES\nOR\nNO\nin the desert.",
        "A shop window. A sign says:\nOPEN\nShould I change?\nA cat looks out.",
        "A mirror in a fitting room.\nShould I change?\nA cat looks out.",
        "A sign on a door.\nIf you need help, let me know\nin red letters.",
        "A small card, on it,\nFeel free to ask",
        "店の入り口に看板、\nお気軽にどうぞ\nと書かれている。",
        "酒店大堂里有一块告示牌。\n如需帮助，请按铃\n金色字体。",
        "酒店大堂里有一块告示牌，\n如果您需要帮助，请随时按铃",
        "Ein Schild an der Tür mit der Aufschrift\nWenn Sie Hilfe brauchen, sagen Sie Bescheid\nin rot.",
        "A wall of clocks\nnegative prompt text on a screen.",
        "A café sign in a window at dawn.\nEnjoy!",
        "A tip jar on a counter. A card beside it.\n\nTip: smile\n\nWarm light.",
        "A sticky note on a fridge.\n\nNote: buy milk\n\nwritten in red ink.",
        # A preamble names the prompt last.
        "这是一张提示牌的照片：上面写着小心", "这是一张描述春天的水彩画：远山如黛",
        "这是一个红色提示灯的特写：背景模糊", "这为城市天际线的提示图：夜晚",
    ],
)  # fmt: skip
def test_a_picture_with_words_like_a_remark_is_whole(picture):
    assert clean(picture) == " ".join(picture.split())


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("The tablet displays the following:", "in green."),
        ("A monitor displays the following text:", "beside a mug."),
        ("A monitor shows this code:", "Beside it stands a mug."),
        ("A monitor showing the Python code", "Beside it stands a mug."),
        ("A blackboard reading as follows:", "In chalk."),
        ("A chalkboard on which is written", "In white chalk."),
        ("A T-shirt printed with", "On a chair."),
        ("A sign that spells out", "On a chair."),
        ("A terminal whose text spells", ""),
        ("A robot holding a sign with the caption", "In a park."),
        ("A sign labelled:", "It hangs in a window."),
        ("A screen, my terminal, displaying:", "On a desk."),
        ("A dim room; here a monitor shows", "In green."),
        ("Here is a sign that reads:", "On a door."),
        ("A vintage computer at a desk. Its screen shows the prompt", "In green."),
        ("A monitor, and on it, in large letters,", "in the middle of a dark room."),
        ("A poster. The text on it reads:\n", "\nThe background is red."),
        ("A fork in the road, and a sign for your version of it, reading", "In the mist."),
    ],
)
@pytest.mark.parametrize("info", ["", "python"])
def test_a_fence_that_a_sentence_leads_on_to_is_an_inscription(before, behind, info):
    picture = f"{before} HELLO {behind}"
    assert clean(f"{before}\n```{info}\nHELLO\n```\n{behind}") == " ".join(picture.split())
    assert clean(f"Prompt:\n{before}\n```{info}\nHELLO\n```\n{behind}") == " ".join(picture.split())


@pytest.mark.parametrize("second", ["Alternatively:", "Or:", "Option 2:", "**Option B**:", "**Option B**"])
def test_the_number_of_a_first_version_goes_with_the_second(second):
    for number in ("1.", "1)"):
        assert clean(f"{number} {CAT}\n\n{second}\nblue cat") == CAT
    cups = f"1. A red cup.\n2. A blue cup.\n\n{second}\nblue cat"
    assert clean(cups) == "1. A red cup. 2. A blue cup."


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
