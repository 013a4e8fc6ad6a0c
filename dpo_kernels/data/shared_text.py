r"""Where two plain texts that begin alike part: the prompt that they share, and a response each.

The prompt ends at the last good place at or before the first difference, and a place is good only where it is good in
both texts. Good places are, in every script,

- the start of a word: after white space, of which a single space goes with the response, as byte-level vocabularies
  have it, and other white space stays in the prompt;
- after a tag (`[/INST]`, `<answer>`, `<|assistant|>`, `</think>`, `【答案】`), before a tag, after a label (`Answer:`,
  `**A1:**`, `答：`, `"key":`), after `=`, `|`, a dash or an arrow, and after the end of a sentence, with the quotes and
  brackets that close it, where the next one follows without a space (`What colour?Blue`).

No word, number, URL, identifier or grapheme is cut, nor punctuation off the word that it closes.

Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and others put no spaces between words. There the prompt may end
before any character (a grapheme: with its marks, vowel signs and conjuncts), so that no part of a question is ever
trained on as a response; but it ends sooner, after the last label, tag, sentence, line or space, where what follows
looks like the beginning of an answer: see `_begins_an_answer`.
"""

from __future__ import annotations

from typing import NamedTuple

import regex

# Scripts without spaces between words: their letters are <U> in the patterns below, the letters of all others <W>.
_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}ーｰ"
)
# Words that announce an answer, or a question, as labels, in tags, or as the name of who speaks.
_ANSWER = (
    "a|ａ|ans|answers?|response|reply|output|solution|result|completion|assistant|assistente|asistente|bot|chatbot|ai|"
    "model|gpt|/inst|/think|antwort|antwoord|réponse|respuesta|resposta|risposta|svar|odpowiedź|odpověď|cevap|yanıt|"
    "jawaban|lời|đáp|án|απάντηση|ответ|відповідь|ассистент|جواب|الجواب|الإجابة|إجابة|پاسخ|תשובה|उत्तर|जवाब|উত্তর|பதில்|"
    "సమాధానం|답|정답|답변|答|答案|回答|解答|答え|答复|答覆|回复|回覆|回應|回应|解|输出|輸出|出力|助手|助理|アシスタント|"
    "คำตอบ|ตอบ|ຄຳຕອບ|ຕອບ|ចម្លើយ|អ្នកជំនួយ|အဖြေ|ལན"
)
_QUESTION = (
    "q|ｑ|question|query|user|human|input|prompt|instruction|inst|system|sys|问|問|问题|問題|質問|提问|提問|題目|题目|"
    "お題|设问|設問|用户|用戶|使用者|人类|ユーザー|人間|输入|輸入|入力|指示|指令|系统|系統|คำถาม|ถาม|ผู้ใช้|คำสั่ง|ຄຳຖາມ|ຖາມ|សំណួរ|"
    "អ្នកប្រើ|မေးခွန်း|དྲི་བ"
)


def _pattern(text: str) -> regex.Pattern[str]:
    text = text.replace("<W>", r"[[\p{L}\p{N}_]--<U>]")
    text = text.replace("<U>", rf"[[{_UNSPACED}]--[\p{{M}}\p{{P}}\p{{Nd}}]]")
    return regex.compile(text, regex.VERBOSE | regex.VERSION1)


# What a text is made of, as far as good places depend on it. Alternatives are tried in this order.
_UNIT = _pattern(r"""
    (?P<space> [\s\u200b]++ )
  | (?P<tag>
        <[|｜] [^<>\n]{1,60}+ >
      | <{1,2}+ [/!?]?+ [\p{L}_] [^<>\s]{0,60}+ (?: \s [^<>]{0,200} = [^<>]{0,200} | \s?/ )?+ >{1,2}+
      | (?: (?<![\w\\]) \[ | \[ (?=/|\||\p{Lu}{2}) ) [|/\p{L}] [\p{L}\p{M}\p{N}_\ |/.\#-]{1,40}+ \] (?![(\[])
      | [【［] [^【】［］\n]{1,40}+ [】］] | （[答解][^（）]{0,4}） )
  | (?P<word> (?i: (?:https?|ftp|file|wss?|ssh|git|s3|gs|hf):// | www\. | (?:mailto|tel|sms|urn|doi|data|magnet): )
        (?: (?! <U> ) [^\s<>"“”«»「」『』（）。，、！？；：…] )++ )
  | (?P<mark> " | `++ | \*{1,3}+ | ~~ | ' | (?<![\p{L}\p{N}_]) _{1,3}+ )
  | (?P<unspaced> (?<=[가-힣]{8}) [가-힣] \p{M}*+ )
  | (?P<word> <W> (?:
        [A-Za-z0-9_]++ | [[<W>\p{M}\u200c\u200d]--[가-힣]]++ | [가-힣] (?<![가-힣]{9})
      | (?<=\p{Nd}) [.,٫٬/\u00a0\u2007\u2009\u202f] (?=\p{Nd})
      | (?<=\p{Nd}) (?<!\p{L}\p{Nd}{1,5}) : (?=\p{Nd})
      | ['’.·] (?=<W>) (?<! (?: [^\p{L}\p{M}] | ^ ) \p{Ll}{3,30} \. (?=\p{Lu}) | [\p{Lo}\p{M}]{2} \. (?=\p{Lo}) ) )*+ )
  | (?P<unspaced>
        (?: (?<![\p{Katakana}ーｰ]{8}) (?=[\p{Katakana}ーｰ]) \X )++
      | [\p{Tibetan}&&[\p{L}\p{M}]]++ [་༌]*+
      | (?: (?=\p{Logical_Order_Exception}) \X (?=<U>) ){0,2} (?=<U>) \X
        (?: (?= [[\p{LB=CJ}\p{LB=NS}]&&\p{L}] | [ะาๅๆฯະາໆຯ] | [\u1000-\u1021]\u103a ) \X )*+
      | (?= [\p{Extended_Pictographic}\p{Regional_Indicator}] ) \X )
  | (?P<label> [:：﹕︰፦៖᠄] (?![:/\\]) (?<!::) )
  | (?P<separator>
        =++ >? | \|++ | [→⇒➔➜⟶⟹፡—―]++ | (?<=\s) -++ > | \#{2,}+ | -{3,}+ >? | >{2,}+ | ~{3,}+
      | (?: \\[nrt] ){2,}+ | \\[nrt] (?!\p{Ll}) )
  | (?P<symbol> !(?=[=(\[{]) )
  | (?P<sentence>
        (?: [\p{Sentence_Terminal}--[.!．]] | [།༎༏༑] | !(?![=(\[{]) | ．(?!\p{Nd}) )++
      | \. (?=[\p{Lu}\p{Lo}]) (?<= \p{L}\p{M}* [)"”’]* \. )
      | (?<=\S) (?: \.{3,}+ | […⋯]++ )
      | (?<=\p{Greek}\p{M}*) ; (?=\s*\p{Greek}) )
  | (?P<closing> [\p{Pe}\p{Pf}\p{LB=CL}\p{LB=EX}\p{LB=IS}\p{LB=NS}\p{LB=PO}…～] \p{M}*+ | (?<=<U>) ~ )
  | (?P<opening> [\p{Ps}\p{Pi}¡¿] )
  | (?P<symbol> \X )
""")
_GRAPHEME = regex.compile(r"\X")
_BREAK = _pattern(  # the last place between two characters that no grapheme can hold both
    r"(?r) (?<! [\p{M}\p{Cf}\p{GCB=Prepend}\p{GCB=L}\r] )"
    r"(?= [^\p{M}\p{Cf}\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=V}\p{GCB=T}\p{Regional_Indicator}\n] )"
)
_LAST_SPACE = regex.compile(r"(?r)\s")
_JOINS = _pattern(r"[\p{M}\p{Cf}\p{GCB=Extend}\p{GCB=SpacingMark}]")
_FLAGS = "".join(map(chr, range(0x1F1E6, 0x1F200)))  # the letters of which two make a flag

_COLON_AFTER = regex.compile(
    rf"(?i:(?:{_ANSWER}|{_QUESTION})\d*|is|are|was|were|es|est|ist|è|é|following|below|list|this|these|here)"
)


# Text that ends with one of these words as a label or in a tag, or with a line of its own for it.
_ANNOUNCES = r"""
    (?: (?<![\p{L}\p{M}/]) (?i: <WORDS> ) \p{Nd}*+
        (?: [^\p{L}\p{N}\s<.,!?;。，、！？]++ (?<= [:：﹕︰፦៖>)\]】］）|=→] ["'*_`\#]* ) | <[^<>\s]{1,40}> )
      | (?: (?m:^) [^\p{L}\p{N}\n]*+ | (?<=>) ) (?i: <WORDS> ) \p{Nd}*+ [^\p{L}\p{N}\n]*+ \n ) \s*+ \Z
"""
_ANSWER_COMES, _QUESTION_COMES = (_pattern(_ANNOUNCES.replace("<WORDS>", words)) for words in (_ANSWER, _QUESTION))
_QUESTION_ENDS = _pattern(r"""[?？؟⸮፧;] [\p{Pe}\p{Pf}"'*_]*+ \s*+ \Z""")
_ONLY_A_QUESTION = _pattern(
    rf"\s*+ (?! (?i: {_ANSWER} ) \d* [:：] )"
    r"""(?: [^\s:：?？]{1,20} [:：] )?+ [^\n.!?。！？؟:：<>\[\]]++ [?？؟]++ [\p{Pe}\p{Pf}"'*_]*+ \s*+"""
)
_HAS_UNSPACED = _pattern("<U>")
_BRACKET = regex.compile(r"\p{Pe}")
_WIDE = regex.compile(r"[\p{East_Asian_Width=W}\p{East_Asian_Width=F}]")

_NEAR = 80  # characters before the first difference in which the end of the prompt is looked for, at least,
_FAR = 2000  # and so many more, at most, to begin at the start of a word
_TRIES = 3  # so often, each time before the last white space
_FEW = 6  # characters that two answers may share at their beginning and still be taken for answers


class SharedText(NamedTuple):
    """Two texts, without what they share at their beginning: `prompt + chosen` and `prompt + rejected`."""

    prompt: str
    chosen: str
    rejected: str


def split_shared_text(chosen: str, rejected: str) -> SharedText:
    """Prompt and responses of two texts that begin alike; the rule is this module's docstring.

    `("A: grey", "A: green")` gives `("A:", " grey", " green")`, not a cut at "gre". Where one text goes on after the
    other's end, the cut is before the other's last word, so that both responses say something; but the response of a
    text that is a question and nothing else, or ends with the label or tag of an answer, is empty. Linear in what is
    shared.
    """
    parted = shared_length(chosen, rejected)
    ends = len(chosen.rstrip()), len(rejected.rstrip())
    cut = min(ends)
    whole = not any(_JOINS.match(text, cut) for text in (chosen, rejected))
    if not (cut <= parted and ends[0] != ends[1] and whole and _expects_an_answer(chosen[:parted])):
        cut = _end_of_prompt(chosen, rejected, parted)
    return SharedText(chosen[:cut], chosen[cut:], rejected[cut:])


def _expects_an_answer(text: str) -> bool:
    return bool(_ANSWER_COMES.search(text, max(0, len(text) - _NEAR)) or _ONLY_A_QUESTION.fullmatch(text))


def shared_length(first: str, second: str) -> int:
    """Of what both begin with, by halves: os.path.commonprefix looks at every character in Python."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _end_of_prompt(chosen: str, rejected: str, last: int) -> int:
    """The last place up to `last` that is good in both texts, or an earlier one where an answer seems to begin."""
    for _ in range(_TRIES):
        start = _restart(chosen, last - _NEAR)
        if start is not None:
            windows = [text[start : last + _NEAR] for text in (chosen, rejected)]
            found = [_places(window, last - start, at_start=start == 0) for window in windows]
            if both := sorted(found[0].keys() & found[1].keys()):
                cut = both[-1]
                firm = [place for place in both if found[0][place] and found[1][place] and start + place > 0]
                if firm and firm[-1] < cut and all(_begins_an_answer(window, firm[-1], cut) for window in windows):
                    cut = firm[-1]
                return start + cut
        # A word longer than that: cut before it.
        space = _LAST_SPACE.search(chosen, 0, max(0, last - _NEAR) if start is None else start)
        if not space:
            break
        last = space.end()
    return 0


def _restart(text: str, place: int) -> int | None:
    """A place at or before this one from where a text may be read as if it began there; None where it is far away."""
    if place <= 0:
        return 0
    far = max(0, place - _FAR)
    if space := _LAST_SPACE.search(text, far, place):
        return int(space.end())
    if flags := place - len(text[:place].rstrip(_FLAGS)):
        return place - flags % 2
    found = _BREAK.search(text, far, place + 1)
    return found.start() if found else None


def _places(window: str, last: int, *, at_start: bool) -> dict[int, bool]:
    """Good places up to `last`, and of each whether it is firm: none in the middle of text without spaces.

    `left` is what the units so far leave for the place after them:
    "label" (also a tag, a separator, the start of the text): a good place, whatever comes but a bracket that closes;
    "sentence" (also a tag that closes): a good place, unless closing punctuation comes;
    "unspaced": one that is not firm, unless closing punctuation comes; "word": such a one before an unspaced script;
    "nothing": none.
    """
    places = {0: True} if at_start else {}
    left = "label" if at_start else "nothing"
    blank: tuple[int, int] | None = None  # the white space before a unit
    previous = None
    fresh = at_start  # nothing but marks and space since a line, a sentence or what follows a tag began
    fresh_word = False
    marks: set[str] = set()  # of quotation and emphasis, not closed yet
    depth = 0  # of brackets, within a JSON value that is begun where an answer may begin: its keys are no labels
    for unit in _UNIT.finditer(window):
        kind, text, place, end = unit.lastgroup, unit.group(), unit.start(), unit.end()
        if kind == "space":
            blank = unit.span()
            if "\n" in text:
                fresh, depth = True, 0
                marks.clear()
            continue
        closing_mark = kind == "mark" and text in marks and not blank
        closing_tag = kind == "tag" and text.startswith(("</", "[/"))
        closes = closing_mark or closing_tag or kind in ("closing", "label", "sentence")
        if blank:
            if not closes or left in ("label", "sentence"):
                places[blank[0]] = True
                for after in range(blank[0] + 1, blank[1] + 1):
                    places[after - 1 if window[after - 1] == " " else after] = True
        elif closes:
            if left == "label" and not closing_mark and not _BRACKET.match(text):
                places[place] = True
        elif left in ("label", "sentence") or (kind == "tag" and left != "nothing"):
            places[place] = True
        elif left == "unspaced" or (left == "word" and kind == "unspaced"):
            places[place] = False
        if place > last:
            break

        if text in ("{", "[") and (depth or blank or (left in ("label", "sentence") and place > 0)):
            depth += 1
        elif text in ("}", "]") and depth:
            depth -= 1
        if kind == "label" and not _is_label(text, previous if not blank else None, fresh_word, window[end : end + 1]):
            left = "nothing"
        elif kind in ("label", "separator"):
            left, fresh = "nothing" if depth else "label", True
        elif kind == "tag":
            left, fresh = "sentence" if text.startswith("</") else "label", True
        elif kind == "sentence":
            left, fresh = "sentence", True
        elif kind == "closing":
            if left == "label" and not _BRACKET.match(text):
                left = "nothing"
            elif left == "nothing" or (left == "word" and _WIDE.match(text)):
                left = "unspaced" if _WIDE.match(text) else "nothing"
        elif closing_mark:
            marks.remove(text)
        elif kind == "mark":
            left = "nothing"
            if not window[end : end + 1].isspace():
                marks.add(text)
        elif kind in ("word", "unspaced"):
            left, fresh_word, fresh = kind, fresh, False
        else:
            left = "nothing"
            fresh = fresh and kind == "opening"
        previous, blank = unit, None
    places = {place: firm for place, firm in places.items() if place <= last}
    if window.isascii() and "\r\n" not in window:
        return places
    whole = {match.start() for match in _GRAPHEME.finditer(window[: last + _NEAR])}
    return {place: firm for place, firm in places.items() if place in whole}


def _is_label(colon: str, before: regex.Match[str] | None, fresh: bool, following: str) -> bool:
    """Whether a colon, right after the unit `before`, ends a label: not in `10:30`, `nginx:latest`, `host:8080`."""
    if colon != ":":
        return True
    if before is None or before.lastgroup in ("symbol", "opening"):
        return False
    word = before.group()
    if before.lastgroup != "word" or _COLON_AFTER.fullmatch(word):
        return True
    if word[0].islower():
        return not following.isalnum() or (fresh and not following.isdigit())
    return not (word[0].isdigit() and following.isdigit())


def _begins_an_answer(window: str, start: int, end: int) -> bool:
    """Whether what two texts share behind a firm place, up to where they part in text without spaces, looks like the
    beginning of two answers rather than the rest of a question.

    It does after what announces an answer; after a question mark, where it is at most six characters or no longer than
    the rest of the text; and after another sentence or label, a line or a space, where it is both.
    """
    before = max(0, start - _NEAR), start
    if _ANSWER_COMES.search(window, *before):
        return True
    if _QUESTION_COMES.search(window, *before):
        return False
    begun = len(_GRAPHEME.findall(window[start:end].strip()))
    rest = len(_GRAPHEME.findall(window[end:]))
    if _QUESTION_ENDS.search(window, *before):
        return begun <= max(_FEW, rest)
    return begun <= min(_FEW, rest) and _HAS_UNSPACED.search(window, start, end) is not None
