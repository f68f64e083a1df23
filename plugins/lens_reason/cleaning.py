"""An answer without what models put around it: thoughts, fences, quotes, preambles, labels, remarks, second versions.

Words that frame a prompt and words to be drawn can look alike. Position decides: what stands above or below the prompt,
on lines of its own, is taken away; what the text before leads on to ("a sign that reads:") is an inscription.
Patterns are bounded, and each is searched once in a line, so the time is linear in the length of the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_THOUGHT = re.compile(r"(?i)<(/?)(?:think|thinking|reasoning|analysis|thought)>")
_MARKS = r"[^\w\n\"'“„«‘「『<]{0,12}"  # what decorates a heading: #, *, >, an emoji
_INFO = r"[\w+.# -]{0,20}\n"  # what is behind the marks that open a fence
_FENCE = re.compile(rf"(?sm)(?:^```|```(?={_INFO}))(?:{_INFO})?(.*?)```")
_OPEN_FENCE = re.compile(rf"\A```{_INFO}")
_TAGS = re.compile(r"(?is)\A<(request|prompt|answer|output|result|description)>(.*?)</\1>\Z")

# ---- above the prompt -----------------------------------------------------------------------------------------------

_YES = (
    r"(?:¡?(?:sure|certainly|of course|absolutely|okay|ok|great|yes|got it|bien sûr|d'accord|gerne|natürlich|klar|"
    r"claro|por supuesto|certo|конечно)\b[^\n:]{0,40}?[!,.:]\W{0,6})?"
)
_HERE = (
    r"(?:here(?:['’]s| is| are)|below is|voici|hier (?:ist|sind|kommt|is)|aquí (?:está|tienes|va)|aqui está|ecco|вот)"
)
_NOUN = (
    r"(?:prompts?|descriptions?|captions?|versions?|rewrite|request|text|result|json|options|variations|"
    r"invite|légende|texte|résultat|(?:bild)?beschreibung|fassung|descripción|versión|texto|descrição|versão|"
    r"descrizione|versione|промпт|описание|запрос)"
)
_LABEL = (
    r"(?:(?:final|refined|rewritten|revised|improved|detailed|enhanced|optimized|expanded|polished|full|your|image|new|"
    r"finaler|verbesserter|überarbeiteter|optimierter)\s+){0,4}"
    r"(?:prompt|description|caption|answer|output|version|rewrite|beschreibung|descripción)"
    r"(?:\s+(?:amélioré|final|mejorado|optimizado|melhorado|migliorato))?"
)
_COLON = "[:：]"
_END = rf"(?:[^\n:：]{{0,40}}{_COLON}|[^\w\n]{{0,9}}\n)\s*"
_PARAGRAPH = rf"[^\n:：]{{0,80}}{_COLON}\n\n"  # whatever is introduced, it stands apart
_DONE = (
    r"(?:kept|preserved|added|changed|made|used|included|removed|replaced|expanded|enhanced|refined|rewrote|rewritten|"
    r"improved|created|crafted|turned|adjusted|avoided|focused|chose|emphasi[sz]ed|translated|interpreted|assumed)"
)
_I_DID = rf"i(?:['’]ve| have)?\s+(?:also\s+)?{_DONE}\b"
# A preamble says what follows it: a prompt, a description. "This is a sign that reads: …" is the picture itself.
_PREAMBLES = tuple(
    re.compile(rf"(?i)\A{pattern}")
    for pattern in (
        # "Sure! Here is the refined prompt:", "Voici une description :", "Hier ist die Beschreibung:", "Aquí tienes:"
        rf"{_YES}{_MARKS}{_HERE}\s+(?:[\w'’-]+\s+){{0,4}}{_NOUN}\b{_END}",
        rf"{_YES}this is\s+(?:[\w-]+\s+){{0,4}}(?:prompt|description|caption|rewrite)\b{_END}",
        rf"{_YES}(?:here (?:you go|it is)\b{_END}|{_HERE}\b(?: ?{_COLON}\s*|{_PARAGRAPH}))",
        rf"{_I_DID}[^\n:：]{{0,160}}(?:{_COLON}\s*|\n\n)",
        r"(?:sure|certainly|of course|absolutely)\s*[!,.:]\s*",
        r"(?:好的|当然(?:可以)?|没问题|もちろん(?:です)?|承知しました|물론입니다|네)[!,.！，。]\s*",
        r"(?:以下|下面|这|こちら|다음)(?:是|为|が|は|은)[^\n:：。]{0,20}?(?:提示词?|描述|版本|prompt|プロンプト|説明|프롬프트|설명)"
        rf"(?:如下|内容|です|입니다)?[ *_]{{0,4}}(?:{_COLON}|。?\n)\s*",
        rf"{_MARKS}(?:(?:优化后的|改进后的|最终)?(?:提示词?|描述)|プロンプト|프롬프트)[*_ ]*{_COLON}[*_]*\s*",
        rf"{_MARKS}{_LABEL}(?: (?:a|1|one|#1))?(?: ?\([^\n()]{{1,30}}\))?[*_ ]*"
        rf"(?:{_COLON}[*_]*\s*|[^\w\n]{{0,9}}\n\s*)",
    )
)

# ---- below the prompt -----------------------------------------------------------------------------------------------

_CHANGES = "(?:changes|improvements|enhancements|adjustments)"
_NEW = "(?:refined|revised|final|new|enhanced|improved|updated|expanded|rewritten)"
_ADDRESS = re.compile(
    rf"(?i){_MARKS}(?:(?:please |just )?let me know(?: if| what| whether| how| which|[!.])|"
    r"(?:i )?hope (?:this|it) (?:helps|works|captures|meets|fits|is)\b|"
    r"feel free to (?:adjust|modify|ask|let|tweak|change|use|request|reach)\b|"
    r"(?:would you like|do you want|want) (?:me to|(?:any|more) (?:changes|adjustments)|another version|a \w+ version)|"
    r"if you(?:['’]d| would)? (?:like|want|prefer|need)\b[^\n]{0,80}?\b(?:i can|i['’]ll|let me know|tell me)\b|"
    rf"i can also (?:make|adjust|tailor|create|provide|change)\b|(?:notes?|explanation)[*_ ]*:[*_ ]*{_I_DID}|"
    rf"(?:(?:key|main|notable|quick) {_CHANGES}|{_CHANGES}(?: i(?:['’]ve)?)? made)[*_ ]*(?:{_COLON}|\Z)|"
    r"what i(?:['’]ve)? (?:changed|added)\b|why (?:this|it) (?:prompt )?works\b|"
    rf"(?:rationale|explanation of [\w ]{{1,30}})[*_ ]*{_COLON}|"
    rf"(?:this|(?:this|the) {_NEW}) (?:prompt|description) (?:keeps|captures|preserves|adds|aims)\b|"
    # The same in other languages: if you want, I can; let me know; shall I; I hope that this; changes.
    r"(?:(?:wenn|falls) (?:du|sie)|si (?:vous (?:souhaitez|voulez)|tu (?:souhaites|veux)|quieres|deseas)|"
    r"se (?:quiser|vuoi)|если (?:хотите|нужно))\b[^\n]{0,80}?\b(?:kann ich|sag|gib|lass|je peux|dis-moi|dites|"
    r"n['’]hésite|puedo|dime|avísame|posso|fammi|могу|скажите|напишите|дайте)|"
    r"(?:sag|sagen sie|gib|geben sie) mir (?:einfach )?bescheid|lass(?:en sie)? mich wissen|ich hoffe, (?:das|dies)|"
    r"änderungen[*_ ]*:|n['’]hésite[sz]? pas|(?:dis|dites)-moi si|(?:souhaite[sz]|veux|voulez)-(?:tu|vous) que|"
    r"j['’]espère que c|modifications ?:|avísame|(?:quieres|te gustaría) que|espero que (?:esto|te)|cambios[*_ ]*:|"
    r"me avise|fammi sapere|дайте знать|如果(?:您|你)?(?:需要|想|希望|有)[^\n]{0,60}?(?:告诉|随时|我可以|调整|修改)|"
    rf"希望(?:这|对)(?:您|你|对|能)|请告诉我|(?:修改|优化|改动)?说明{_COLON}|负面提示词|"
    r"ご希望|ご要望|必要であれば|원하시면|필요하시면)"
)
"""What can only be said to the user."""
_REMARK = re.compile(
    rf"(?i){_MARKS}(?:let me know|i hope|feel free|would you like|do you want|if you(?:['’]d| would) like|note that\b|"
    rf"(?:notes?|explanation|hinweis|anmerkung|remarque|nota|注|备注)[*_ ]*{_COLON}|{_I_DID}|"
    rf"(?:what(?:['’]s| was| has)? (?:changed|added)|{_CHANGES})[*_ ]*(?:{_COLON}|\Z)|hope you (?:like|enjoy)\b|"
    r"(?:shall|should) i (?:also|make|adjust|change|add|refine|generate|create)\b|"
    r"(?:möchtest du|möchten sie|soll ich)\b|如需|お気軽に)"
)
"""What may be a remark or an inscription."""
_WISH = re.compile(rf"(?i){_MARKS}(?:enjoy|happy (?:prompting|creating))\b[^\w\n]{{0,9}}\Z")
_NEGATIVE = re.compile(rf"(?im)\n{_MARKS}negative prompts?\b(?: ?\([^\n()]{{1,30}}\))?[*_ ]*(?:{_COLON}|$)")
_LIST = re.compile(r"[-*•]|\d+[.)]")
_RULE = re.compile(r"(?m)^(?:-{3,}|\*{3,}|_{3,})$")  # a line that only divides
_OPTION = r"(?:option|version|prompt|variant|variante|variation|opción|版本|方案)"
_ANOTHER = re.compile(
    rf"(?i){_MARKS}(?:alternatively\b|(?:(?:another|alternative) (?:option|version|prompt)|alternative|or|oder|ou)"
    rf"[*_ ]*{_COLON})"
)
"""What can only announce a second version."""
_SECOND = re.compile(
    rf"(?i){_MARKS}(?:(?:or|alternative(?: \w+)?|another (?:option|version))[*_ ]*(?:\Z|[:：(])|"
    rf"{_OPTION} ?(?:b|2|two|#2|二)[*_ ]*(?:\Z|[:：.)(–—-]))"
)
_KEYWORD = r"[^\s,.:;!?]+(?: [^\s,.:;!?]+){0,2}"
_KEYWORDS = re.compile(rf"{_KEYWORD}(?:, {_KEYWORD})+")
_ONE = rf"{_OPTION} ?(?:a|1|one|#1|一)\b"
_FIRST = re.compile(
    rf"(?i)\A(?:#{{1,6}} [*_]{{0,2}}{_ONE}[^\n.]{{0,80}}\n(?=\n?[^\n#*])|\*\*{_ONE}[^\n*.]{{0,80}}\*\*\n(?=\n?[^\n])|"
    rf"{_MARKS}{_ONE}[*_ ]*(?:[-–—(][^\n:：.]{{0,60}}(?:[:：]|\n(?=\n?[^\n]))|[-–—:：.)]|\n)[*_]*\s*)"
)
_NUMBERED = re.compile(rf"(?s)\A{_MARKS}1[.)]\s*(.+?)\n{_MARKS}2[.)]\s")
LONG = 25
"""Words of the first item of a numbered list from which on the items are taken for versions of the prompt. Shorter ones
are things in one picture, as the panels of a comic are."""
_PANEL = re.compile(r"(?i)\bpanels?\b")

# ---- the picture ----------------------------------------------------------------------------------------------------

_SAYS = re.compile(
    r"(?i)\b(?:show(?:s|ing)?|read(?:s|ing)?|display(?:s|ing)?|say(?:s|ing)?|print(?:s|ing|ed with)|written|labell?ed|"
    r"spell(?:s|ing)?(?: out)?|with the (?:text|words?|caption)|mit der aufschrift|mit dem text)"
    rf"(?: (?:the|this|following|text|words?|python|code|prompt|as follows)){{0,3}} ?{_COLON}?\Z"
)
"""The end of a line that leads on to an inscription."""
_CHAT = re.compile(
    rf"(?i){_MARKS}(?:{_I_DID}|(?:the|this|my) {_LABEL} (?:is|reads|says|shows)\b)|#|"
    rf".*\byour (?:{_NEW} )?(?:prompt|request)\b"
)
"""What is said about the prompt, besides preambles."""
_COMMAS = (",", "，", "、", "،")
_COLONS = (":", "：")
_ENDS = tuple(".!?…。！？)]\"'”’»」*_`")
"""What a sentence ends with."""
_QUOTES = [(pair[0], pair[1]) for pair in ('""', "''", "“”", "„“", "«»", "‘’", "``", "「」", "『』")]
_KEYS = ("prompt", "refined_prompt", "description", "caption", "output", "answer", "text")


def clean(answer: str) -> str:
    """The prompt in an answer, as one paragraph."""
    text = _without_thoughts(answer)
    for _ in range(6):  # a label in a fence in quotes: each layer hides the next
        before, text = text, _peeled(_tidy(text))
        if text == before:
            break
    return " ".join(text.replace("**", "").split())


def _without_thoughts(text: str) -> str:
    """What is not between tags of thought. A closing tag alone ends a thought that began with the answer."""
    first, *rest = _THOUGHT.split(text)
    kept, thinks = [first], False
    for slash, part in zip(rest[::2], rest[1::2], strict=True):
        if slash and not thinks:
            kept.clear()
        thinks = not slash
        if not thinks:
            kept.append(part)
    return "".join(kept)


def _tidy(text: str) -> str:
    """With single spaces, none at the ends of lines, and at most one empty line in a row."""
    text = re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _peeled(text: str) -> str:
    text = _of_fence(text)
    tags = _TAGS.match(text)
    text = (tags.group(2) if tags is not None else text).strip()
    if (value := _of_json(text)) != text:
        return value
    if text.startswith(">"):
        text = re.sub(r"(?m)^> ?", "", text)
    for preamble in _PREAMBLES:
        text = preamble.sub("", text, count=1)
    numbered = _NUMBERED.match(text)
    if numbered is not None and len(numbered.group(1).split()) >= LONG and not _PANEL.search(numbered.group(1)):
        text = numbered.group(1)
    one = _without_second(text)
    if one != text and "\n2" not in one:
        one = re.sub(r"\A1[.)]\s+", "", one)
    text = _FIRST.sub("", one, count=1)
    text = _RULE.sub("", _without_afterwords(text)).strip()
    return _unquoted(re.sub(r"\A\*([^*]+)\*\Z", r"\1", text))


def _of_fence(text: str) -> str:
    """What is in the first fence, unless the fence is the text on a screen or a sign that a sentence leads on to."""
    negative = _NEGATIVE.search(text)
    if negative is not None and text[: negative.start()].strip():
        text = text[: negative.start()]
    fence = next((fence for fence in _FENCE.finditer(text) if fence.group(1).strip()), None)
    if fence is None:
        return _OPEN_FENCE.sub("", text)
    before = text[: fence.start()].rstrip().rpartition("\n")[2]
    behind = text[fence.end() :].lstrip().partition("\n")[0]
    goes_on = behind[:1].islower() and not any(
        pattern.match(behind) for pattern in (_ADDRESS, _REMARK, _WISH, _ANOTHER, _SECOND)
    )
    is_json = text.startswith("```json", fence.start())
    if (goes_on or _SAYS.search(before[-80:])) and not is_json and not _is_chat(before):
        return _FENCE.sub(r"\1", text)
    return fence.group(1)


def _is_chat(line: str) -> bool:
    """Whether a line holds no more than a preamble, or speaks of the prompt."""
    line += "\n"
    for preamble in _PREAMBLES:
        line = preamble.sub("", line, count=1)
    return not line.strip() or _CHAT.match(line) is not None


def _below(lines: list[str]) -> Iterator[tuple[int, str, bool, bool]]:
    """Each line that has text above: its index, the text line above, whether an empty line or a rule is between, and
    whether the text above leads on to it: it does to all lines up to the next empty one."""
    above, gap, led = "", False, False
    for index, line in enumerate(lines):
        if not line or _RULE.match(line):
            gap = True
            continue
        if above:
            led = (led and not gap) or above.endswith(_COLONS) or _SAYS.search(above[-80:]) is not None
            yield index, above, gap, led
        above, gap = line, False


def _is_apart(above: str, gap: bool) -> bool:
    """Whether the text above is complete, so that no word of the picture is cut off: a sentence or, before an empty
    line, whatever does not lead on."""
    return not above.endswith(_COMMAS + _COLONS) if gap else above.endswith(_ENDS)


def _are_tags(above: str, below: list[str]) -> bool:
    """Whether the line above and the first one below are keywords between commas."""
    return all(_KEYWORDS.fullmatch(line) for line in (above, next(filter(None, below), "")))


def _without_second(text: str) -> str:
    """Without a second version and all below it. A line like its title within the prompt is an inscription."""
    lines, first = text.split("\n"), _FIRST.match(text)
    listed = not first and re.search(rf"(?im)^{_MARKS}{_ONE}", text)  # the options are in the picture
    for index, above, gap, led in _below(lines):
        line = lines[index]
        second = _SECOND.match(line)
        if led and not (first and second):
            continue
        is_title = second and second.group()[-1:] in _COLONS and not listed
        if _ANOTHER.match(line) or (
            second and (first or is_title or _is_apart(above, gap) or _are_tags(above, lines[index + 1 : index + 3]))
        ):
            return "\n".join(lines[:index])
    return text


def _without_afterwords(text: str) -> str:
    """Without what is said to the user below the prompt. Between lines of the picture it may be an inscription: so it
    is cut where only remarks and lists are below it, or where it can only be said to the user, in a paragraph of its
    own or as a heading below a sentence."""
    lines = text.split("\n")
    end, remarks_only = len(lines), True
    for index, above, gap, led in reversed(list(_below(lines))):
        line = lines[index]
        address = _ADDRESS.match(line)
        remark = address or _REMARK.match(line) or (gap and _WISH.match(line))
        apart = _is_apart(above, gap)
        heads = line.rstrip("*_ ").endswith(_COLONS)
        if not remark or led or above.endswith(_COMMAS):
            remarks_only = remarks_only and _LIST.match(line) is not None
        elif (remarks_only and (apart or address)) or (address and apart and (gap or heads)):
            end, remarks_only = index, True
    return "\n".join(lines[:end])


def _of_json(text: str) -> str:
    """The one text in a small JSON object, under a name that says that it is the prompt."""
    if not text.startswith("{") or len(text) > 100_000:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    texts = [value[key] for key in _KEYS if isinstance(value, dict) and isinstance(value.get(key), str)]
    return texts[0] if len(texts) == 1 else text


def _unquoted(text: str) -> str:
    """Without a pair of quotation marks around all of it; those of words inside stay."""
    for left, right in _QUOTES:
        if len(text) > 2 and text.startswith(left) and text.endswith(right):
            inner = text[1:-1]
            if left not in inner and right not in inner:
                return inner if " " in inner.strip() else text  # "CAT" alone is a word to be drawn
            before, _, _ = inner.partition(left)
            # The first mark inside opens another pair: `"a sign that says "OPEN""`, and not `"CAT" above "DOG"`.
            if right not in before.replace(left, "") and before[-1:] in ("", " ", "(", ":"):
                return inner
    return text
