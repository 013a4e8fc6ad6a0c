"""Where the prompt of two plain texts ends that begin alike."""

import json

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import SHARED

from dpo_kernels.data import shared_text
from dpo_kernels.data.layouts import convert
from dpo_kernels.data.shared_text import split_shared_text

# Pairs as "prompt ‖ chosen ¦ rejected", without these spaces: ‖ is where the prompt has to end.
CUTS = {
    "words": [
        "Q: colour? A:‖ blue¦ red",
        "A:‖ grey sky¦ green sky",
        "A:\n‖blue¦red",
        "A:\t‖blue¦red",
        "A:\r\n‖blue¦red",
        "A: ‖ blue¦ red",
        "A:\u00a0‖blue¦red",
        "A:\n\n‖blue¦\nred",
        "What colour?‖ Blue¦\nGreen",
        "Q: What colour is the sky?\nA: The sky is‖ blue.¦ green.",
        "It is‖ blue !¦ blue ?",
        "A:‖ yes.¦ yes!",
        "A:‖ yes, it is¦ yes; it is",
        "A:‖ (a)¦ (b)",
        'A:‖ "yes"¦ "no"',
    ],
    "numbers, names, addresses": [
        "A:‖ 12¦ 13",
        "A:‖ 3.14¦ 3.15",
        "It costs‖ $1,000¦ $1,100",
        "Il coûte‖ 1\u00a0000 €¦ 1\u00a0500 €",
        "At‖ 10:30¦ 10:45",
        "On‖ 2024-01-31¦ 2024-01-30",
        "John‖ 3:16¦ 3:17",
        "it is‖ -5¦ -7",
        "about‖ 12%¦ 13%",
        "use‖ foo_bar¦ foo_baz",
        "call‖ np.array()¦ np.arange()",
        "call‖ std::vector¦ std::valarray",
        "open‖ C:\\a\\b¦ C:\\a\\c",
        "see‖ https://a.org/x?q=1¦ https://a.org/x?q=2",
        "see‖ www.a.org/?q=1¦ www.a.org/?q=2",
        "write to‖ mailto:bob@x.org¦ mailto:bob@y.org",
        "run‖ nginx:1.25¦ nginx:1.26",
        "run‖ nginx:alpine¦ nginx:latest",
        "on‖ localhost:8080¦ localhost:8081",
        "‖foo_bar¦foo_baz",
    ],
    "sentences without a space": [
        "What colour is the sky?‖Blue.¦Green.",
        "What colour is the sky?‖42¦43",
        "Name the colour of the sky.‖Blue¦Green",
        "The sky is...‖blue¦green",
        "The sky!‖blue¦green",
        '"What colour?"‖blue¦green',
        "(What colour?)‖blue¦green",
        "**What colour?**‖blue¦green",
        "What is 2+2?‖4¦5",
        "cielo?‖¡Azul!¦¡Verde!",
    ],
    "labels": [
        "Q1:sky? A1:‖blue¦green",
        "Q1:sky? A1:‖42¦17",
        "sky Answer:‖42¦17",
        "sky Answer:‖-4¦-5",
        "sky Answer:‖.5¦.7",
        'sky Answer:‖"yes"¦"no"',
        'sky Answer:‖{"a":1}¦{"a":2}',
        "so [see\nsky Answer:‖blue¦green",
        'sky Answer:‖["x","y"]¦["x","z"]',
        "sky A:‖(a)¦(b)",
        "sky A:‖$5¦$6",
        "sky A:‖!¦?",
        "cielo? R:‖¡Sí!¦¡No!",
        "cielo? R:‖¿Qué?¦¿Quién?",
        "answer:‖42¦17",
        "the answer is:‖blue¦green",
        "colour:‖blue¦green",
        "GPT4 Correct Assistant:‖blue¦green",
        "Réponse :‖ bleu¦ vert",
        "Answer(final):‖blue¦green",
        "12+34=‖46¦45",
        "sky=>‖blue¦green",
        "sky ->‖blue¦green",
        "sky→‖blue¦green",
        "sky|‖blue¦green",
        "sky—‖blue¦green",
        "sky?###‖blue¦green",
        "sky?\\n\\nAssistant:‖blue¦green",
    ],
    "markdown": [
        "**Answer:**‖blue¦green",
        "**Final Answer:**‖blue¦green",
        "sky **Answer**:‖blue¦green",
        "sky *Answer:*‖blue¦green",
        "sky _A:_‖blue¦green",
        "sky *_A:_*‖blue¦green",
        "sky ***A:***‖blue¦green",
        "sky A:‖**blue**¦**green**",
        "sky A:‖_blue_¦_green_",
        "sky A:‖`blue`¦`green`",
        "sky A:‖“blue”¦“green”",
        "sky A:‖«bleu»¦«vert»",
        "### Response:‖blue¦green",
        "### Response:\n‖blue¦green",
        "# Answer\n\n‖blue¦green",
        "x?\n-‖ blue¦ green",
        "* sky A:‖*blue*¦*green*",
        "| sky |‖ blue |¦ green |",
        "|sky|‖blue|¦green|",
    ],
    "tags": [
        "sky<answer>‖blue</answer>¦green</answer>",
        'sky<answer lang="en">‖blue¦green',
        "<p>sky?</p><p>‖blue</p>¦green</p>",
        "<b>sky</b>‖blue¦green",
        "so <b>‖blue</b>.¦blue</b>!",
        "sky<br/>‖blue¦green",
        "sky‖<red>x¦<blue>x",
        "sky[ANSWER]‖blue¦green",
        "sky [answer]:‖blue¦green",
        "<think>hm</think>‖blue¦green",
        "<think>hm</think>\n\n‖blue¦green",
        "<answer>‖**blue**¦**green**",
        "<answer>‖12¦13",
        '<answer>‖{"a":1}¦{"a":2}',
    ],
    "chat markup": [
        "[INST]sky[/INST]‖blue¦green",
        "<s>[INST] sky [/INST]‖ blue¦ green",
        "[INST] <<SYS>>x<</SYS>>sky [/INST]‖ blue¦ green",
        "<|user|>sky<|assistant|>‖blue¦green",
        "<|user|>\nsky<|end|>\n<|assistant|>\n‖blue¦green",
        "<|im_start|>user\nsky<|im_end|>\n<|im_start|>assistant\n‖blue¦green",
        "<|im_start|>assistant<|im_sep|>‖blue¦green",
        "<|start_header_id|>assistant<|end_header_id|>\n\n‖blue¦green",
        "<start_of_turn>model\n‖blue¦green",
        "<｜User｜>sky<｜Assistant｜>‖blue¦green",
        "<|User|>sky<eoh>\n<|Bot|>:‖blue¦green",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>‖blue¦green",
        "<|channel|>final<|message|>‖blue¦green",
        "<用户>天<AI>‖蓝¦绿",
        "[|user|]sky\n[|assistant|]‖blue¦green",
        "<reserved_106>sky<reserved_107>‖blue¦green",
        "[Round 1]\n\n问：天空\n\n答：‖蓝¦绿",
        "USER: sky ASSISTANT:‖ blue¦ green",
        "sky</s>‖blue¦green",
    ],
    "code, JSON, LaTeX": [
        "```python\n‖print(1)```¦print(2)```",
        "def f():\n    return‖ a.b¦ a.c",
        "if a < b and c >‖ d:¦ e:",
        'call‖ println!("a")¦ println!("b")',
        "x‖ != 1¦ == 1",
        'JSON?\n‖{"a":"blue"}¦{"a":"green"}',
        '{"q":"sky?","a":‖"blue"}¦"green"}',
        "{'q': 'sky?', 'a':‖ 'blue'}¦ 'green'}",
        "so‖ \\boxed{42}¦ \\boxed{17}",
        "so‖ \\frac{1}{2}¦ \\frac{1}{3}",
        "so $x=‖42$¦17$",
    ],
    "Chinese": [
        "问：空の色は？答：‖青¦緑",
        "天空是什么颜色？‖蓝色。¦绿色。",
        "天空是什么颜色?‖蓝色¦绿色",
        "问题：天空是什么颜色 答案：‖蓝色¦绿色",
        "天空是什么颜色？答：‖天空是蓝色的¦天空是绿色的",
        "天空是什么颜色？答：‖我认为天空的颜色应该是蓝色¦我认为天空的颜色应该是绿色",
        "天空是什么颜色？‖天空是蓝色的。¦天空是绿色的。",
        "【问题】天空是什么颜色【答案】‖蓝¦绿",
        "（答）‖蓝色¦蓝天",
        "**答案**：‖蓝¦绿",
        "**答案：**‖蓝¦绿",
        "## 回答\n‖天空是蓝的¦天空是绿的",
        "<|im_start|>assistant\n‖天空是蓝的¦天空是绿的",
        "答：‖“蓝”¦“绿”",
        "答：‖「藍」¦「綠」",
        '答：‖{"a":"蓝"}¦{"a":"绿"}',
        "答：‖42¦17",
        "答案是：‖3.14¦3.15",
        "答：‖蓝。¦蓝！",
        "答：‖使用Python3¦使用Python2",
        "使用‖Python语言¦Java语言",
        "他说：“天空是什么颜色？”‖蓝¦绿",
        "问题：天是什么颜色？\u3000‖蓝¦绿",
        "请回答：天空是什么颜色‖蓝色¦绿色",
        "请用一个词回答。天空是什么颜色‖蓝色¦绿色",
        "问题：颜色‖蓝色的天空¦绿色的草地",
        "Translate: sky‖空¦天",
        "Which word（sky）‖blue¦green",
    ],
    "Japanese": [
        "空の色は何ですか？よく考えてください。答：‖青¦緑",
        "空の色は何ですか‖青¦緑",
        "空の色は何ですか‖しゃ¦しゅ",
        "時刻は‖3:15¦3:16",
        "空の色は？‖空は青¦空は緑",
        "答えてください。‖空の色は青色だと思います¦空の色は緑色だと思います",
        "そらのいろはなんですか‖あお¦みどり",
        "質問\n空の色は何ですか‖青¦緑",
        "空の色を答えてください。‖東京です¦東北です",
        "空の色は？‖空は青いです¦空は緑です",
        "回答：‖ブルー¦ブラック",
        "空の色は‖ブルー¦ブラック",
        "答えは「空」です。答え：‖「青」¦「緑」",
        "答え\n‖青い空¦青い海",
        "答え：‖しゃしん¦しゅしん",
        "空は何。‖きゃく¦きゅう",
        "ﾃﾝｷﾊ?‖ﾊﾚ¦ｱﾒ",
        "Tシャツの色は？‖青¦赤",
        "Ａ：‖青い空¦青い海",
        "答：‖が¦か",
        "答：‖か\u3099¦か",
        "ソラノイロハナンデスカ‖アオ¦ミドリ",
    ],
    "Korean": [
        "질문: 하늘은 무슨 색? 답:‖ 파랑¦ 초록",
        "하늘은 무슨 색인가요?‖파랑¦초록",
        "하늘은 무슨 색입니까.‖파랑¦초록",
        "답:‖파랑¦파란",
        "정답:‖42¦17",
        "하늘은‖ 파랗다¦ 파란색",
        "하늘은‖ \u1111\u1161\u1105\u1161\u11bc¦ \u1111\u1161\u1105\u1161\u11ab",  # decomposed
        "질문: 하늘은무슨색인가요‖파랑¦초록",  # written without spaces
    ],
    "Thai, Lao, Khmer, Burmese, Tibetan": [
        "ท้องฟ้าสีอะไร?‖สีฟ้า¦สีเขียว",
        "คำถาม: ท้องฟ้าสีอะไร คำตอบ:‖ สีฟ้า¦ สีเขียว",
        "คำตอบ:‖สีฟ้า¦สีเขียว",
        "ท้องฟ้าสีอะไร‖ สีฟ้า¦ สีเขียว",
        "ท้องฟ้าสีอะไรสี‖ฟ้า¦เขียว",
        "คำตอบ:‖เขียว¦เหลือง",
        "ท้องฟ้าสีอะไรครับ‖เขียว¦เหลือง",
        "ตอบ:‖น้ำ¦นำ",
        "ท้องฟ้าเป็นสีอะไรคะ‖ขาว¦ขะ",  # no cut before a vowel that follows its consonant
        "ท้องฟ้าเป็นสีอะไรค‖เขียว¦เหลือง",  # nor after one that precedes it
        "ທ້ອງຟ້າສີຫຍັງ? ຄຳຕອບ:‖ ສີຟ້າ¦ສີຂຽວ",
        "ທ້ອງຟ້າສີຫຍັງ‖ສີຟ້າ¦ຂຽວ",
        "មេឃពណ៌អ្វី? ចម្លើយ៖‖ខៀវ¦បៃតង",
        "មេឃពណ៌អ្វី។‖ខៀវ¦បៃតង",
        "ចម្លើយ៖‖ក្រហម¦ក្មេង",
        "មេឃ\u200bពណ៌\u200bអ្វី\u200b‖ខៀវ¦បៃតង",
        "ကောင်းကင်ဘာအရောင်လဲ။‖အပြာ¦အစိမ်း",
        "အဖြေ:‖အပြာ¦အစိမ်း",
        "ကောင်းကင်‖ပြာ¦စိမ်း",
        "ကောင်းကင်ဘာအရောင်‖ကန်¦ကင်",
        "གནམ་ཁ་དོག་ག་རེ་རེད།‖སྔོན་པོ།¦ལྗང་ཁུ།",
        "གནམ་‖སྔོན་པོ¦སྔོ་སངས",
    ],
    "Arabic, Hebrew, Persian, Urdu": [
        "ما لون السماء؟‖أزرق¦أخضر",
        "جواب:‖أزرق¦أخضر",
        "الجواب:‖ أزرق¦ أخضر",
        "תשובה:‖כחול¦ירוק",
        "מה צבע השמיים?‖כחול¦ירוק",
        "پاسخ:‖می\u200cخواهم¦می\u200cخورم",
        "آسمان نیلا ہے۔‖ہاں¦نہیں",
        "جواب:‖٤٢¦٤٣",
    ],
    "Indic": [
        "आकाश का रंग क्या है?‖नीला¦हरा",
        "उत्तर:‖नीला¦नील",
        "आकाश नीला है।‖सही¦गलत",
        "उत्तर:‖ क्षमा¦ क्या",
        "பதில்:‖நீலம்¦நீல",
        "வானம்‖ நீலம்¦ நீலா",
        "উত্তর:‖নীল¦নীলা",
    ],
    "Vietnamese, Greek, Cyrillic, Turkish, Armenian, Ethiopic": [
        "Trời màu gì? Trả lời:‖ xanh¦ xám",
        "Trời‖ là¦ lá",
        "Trời‖ la\u0300¦ la\u0301",  # decomposed
        "Τι χρώμα έχει ο ουρανός;‖μπλε¦πράσινο",
        "Απάντηση:‖μπλε¦πράσινο",
        "Какого цвета небо?‖Синее¦Зелёное",
        "Ответ:‖42¦43",
        "Небо синего цвета.‖Да¦Нет",
        "Gökyüzü ne renk? Cevap:‖mavi¦yeşil",
        "Ինչ գույն է։‖Կապույտ¦Կանաչ",
        "ሰማይ ምን ቀለም ነው፧‖ሰማያዊ¦አረንጓዴ",
    ],
    "emoji and marks": [
        "Pick one:‖👍🏽¦👍🏿",
        "Pick one:‖👨\u200d👩\u200d👧¦👨\u200d👩\u200d👦",
        "Flag?‖🇫🇷¦🇫🇮",
        "Flags 🇩🇪‖🇫🇷¦🇫🇮",
        "Heart:‖❤\ufe0f¦❤",
        "Key:‖ 1\ufe0f\u20e3¦ 1",
        "sky🌊‖🌋¦🌍",
        "你好！‖👍🏽好¦👍🏿好",
        "A:‖ é¦ e\u0301",
        "A:\n‖é¦e\u0301",
        "A:‖\u200fכחול¦\u200fירוק",
    ],
}


@pytest.mark.parametrize("kind", CUTS)
def test_the_prompt_ends_where_a_reader_would_end_it(kind):
    cuts = []
    for row in CUTS[kind]:
        prompt, responses = row.split("‖")
        chosen, rejected = responses.split("¦")
        prompt, chosen, rejected = split_shared_text(prompt + chosen, prompt + rejected)
        cuts.append(f"{prompt}‖{chosen}¦{rejected}")
    assert cuts == CUTS[kind]


QUESTIONS = {  # without anything after them, and an answer's first words of the same script
    "天空是什么颜色": ("蓝色", "绿色"),
    "请用一个词回答。天空是什么颜色": ("蓝色的，很蓝的，一直都是蓝的", "绿色的，很绿的，一直都是绿的"),
    "问题：天空的颜色": ("蓝色的，很蓝的，一直都是蓝的", "绿色的，很绿的，一直都是绿的"),
    "請回答以下問題：天空是什麼顏色": ("藍色", "綠色"),
    "空の色は何ですか": ("青", "緑"),
    "よく考えて、一語で答えてください。空の色は": ("青", "緑"),
    "質問\n空の色は何ですか": ("青です", "緑です"),
    "質問\n空の色": ("青い空が広がっています", "緑の空が広がっています"),
    "つぎのしつもんにこたえて そらのいろはなに": ("あおです", "みどりです"),
    "ท้องฟ้าเป็นสีอะไร": ("ฟ้า", "เขียว"),
    "จงตอบคำถาม ท้องฟ้าเป็นสีอะไร": ("ฟ้า", "เขียว"),
    "ທ້ອງຟ້າສີຫຍັງ": ("ຟ້າ", "ຂຽວ"),
    "មេឃពណ៌អ្វី": ("ខៀវ", "បៃតង"),
    "ကောင်းကင်ဘာအရောင်လဲ": ("ပြာ", "စိမ်း"),
    "གནམ་ཁ་དོག་ག་རེ་རེད་": ("སྔོན་པོ", "ལྗང་ཁུ"),
    "하늘은무슨색인가요": ("파랑", "초록"),
    "What colour is the sky?": ("Blue", "Green"),
    "Name the colour of the sky.": ("Blue", "Green"),
    "De quelle couleur est le ciel ?": ("Bleu", "Vert"),
    "आकाश का रंग क्या है?": ("नीला", "हरा"),
    "ما لون السماء؟": ("أزرق", "أخضر"),
}


@pytest.mark.parametrize(
    "between", ["", " ", "\n", "\n\n", "\u3000", "\t", "？", "?", "。", "：", "答：", " A:", "<answer>"]
)
def test_a_question_is_no_response(between):
    for question, answers in QUESTIONS.items():
        texts = [question + between + answer for answer in answers]
        prompt, *responses = split_shared_text(*texts)
        assert (prompt + responses[0][: len(responses[0]) - len(answers[0])]) == question + between
        assert [response.removeprefix(" ") for response in responses] == list(answers), question
        assert prompt.startswith(question)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # nothing is shared
        ("yes", "no", ("", "yes", "no")),
        ("はい", "いいえ", ("", "はい", "いいえ")),
        ("", "no", ("", "", "no")),
        (" ", " no", ("", " ", " no")),
        # equal texts stay a pair, for the report to count
        ("same text", "same text", ("same", " text", " text")),
        ("What colour?", "What colour?", ("What", " colour?", " colour?")),
        ("答：青", "答：青", ("答：", "青", "青")),
        ("yes", "yes", ("", "yes", "yes")),
        ("", "", ("", "", "")),
        ("Q? yes", "Q? yes \n", ("Q?", " yes", " yes \n")),
        ("Q? yes \n", "Q? yes\n ", ("Q?", " yes \n", " yes\n ")),
        # one goes on where the other ends
        ("The sky is blue", "The sky is blue today", ("The sky is", " blue", " blue today")),
        ("Q: x\nA: yes", "Q: x\nA: yes, it is", ("Q: x\nA:", " yes", " yes, it is")),
        ("Q: x\nA: blue", "Q: x\nA: bluer", ("Q: x\nA:", " blue", " bluer")),
        ("Q: x\nA: Why?", "Q: x\nA: Why? Because.", ("Q: x\nA:", " Why?", " Why? Because.")),
        ("A: blue?", "A: blue? No.", ("A:", " blue?", " blue? No.")),
        ("答：はい", "答：はい、そうです", ("答：", "はい", "はい、そうです")),
        ("空は？青い", "空は？青いです", ("空は？", "青い", "青いです")),
        ("[/INST]blue", "[/INST]blue sky", ("[/INST]", "blue", "blue sky")),
        ("x<answer>blue</answer>", "x<answer>blue</answer>.", ("x<answer>", "blue</answer>", "blue</answer>.")),
        ("Give the answer.", "Give the answer. Now.", ("Give the", " answer.", " answer. Now.")),
        ("Is it 5?\nIs it 6?", "Is it 5?\nIs it 6? Yes", ("Is it 5?\nIs it", " 6?", " 6? Yes")),
        # one is the prompt alone: an empty response, which is an error or dropped
        ("Q: x\nA:", "Q: x\nA: no", ("Q: x\nA:", "", " no")),
        ("Q: x\nA: ", "Q: x\nA: no", ("Q: x\nA:", " ", " no")),
        ("x [/INST]", "x [/INST] no", ("x [/INST]", "", " no")),
        ("x<|assistant|>", "x<|assistant|>no", ("x<|assistant|>", "", "no")),
        ("x<|im_start|>assistant\n", "x<|im_start|>assistant\nno", ("x<|im_start|>assistant", "\n", "\nno")),
        ("<think>x</think>", "<think>x</think>no", ("<think>x</think>", "", "no")),
        ("### Response:\n", "### Response:\nno", ("### Response:", "\n", "\nno")),
        ("問：空の色は？答：", "問：空の色は？答：青", ("問：空の色は？答：", "", "青")),
        ("空の色は何ですか？", "空の色は何ですか？青", ("空の色は何ですか？", "", "青")),
        ("Q: What colour?", "Q: What colour? Blue", ("Q: What colour?", "", " Blue")),
    ],
)
def test_texts_that_share_nothing_or_all(chosen, rejected, expected):
    assert split_shared_text(chosen, rejected) == expected
    prompt, *responses = expected
    assert split_shared_text(rejected, chosen) == (prompt, *responses[::-1])


PIECES = [
    *"ab 12\n\r\t:?.!\"'*_<>[]{}(),/=|-$~#",
    *("\r\n", "：", "？", "。", "「", "」", "…", "  ", "\u00a0", "\u200b", "\u3000", "**", "```"),
    *("A:", "Answer", "答", "<answer>", "</answer>", "[/INST]", "<|assistant|>", "http://", "Q?", "sky."),
    *("空", "の", "ー", "っ", "ア", "น้ำ", "เ", "า", "ກໍ", "က်", "က", "\u1039", "ក", "\u17d2", "ཀ", "་", "།"),
    *("é", "e\u0301", "\u0301", "\u200d", "\u200c", "👩", "👨", "🏽", "🇫", "🇷", "\ufe0f", "\u20e3"),
    *("क", "\u094d", "ष", "ക", "\u0d4d", "\u0d4e", "ᄀ", "\u1161", "\u11a8", "각", "א", "ا", "\u0600", "த", "\u0bcd"),
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
LONG = st.lists(st.sampled_from(PIECES), min_size=60, max_size=90).map("".join)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shared=TEXT | LONG, chosen=TEXT, rejected=TEXT)
@example("🇫" * 301, "🇷", "🇬")
@example("🇫" * 500, "🇷", "🇫🇷")
@example("क\u094d" * 300, "क", "ष")
@example("空" + "\u0301" * 3000, "x", "\u0301y")
@example("A:\r", "\nx", "y")
@example("<|assistant|>", "", "\ufe0fx")
@example("答：", "👩\u200d👩", "👩\u200d👨")
@example("A: \u0301", "a", "b")
def test_any_text(shared, chosen, rejected):
    chosen, rejected = shared + chosen, shared + rejected
    prompt, *responses = found = split_shared_text(chosen, rejected)
    assert [prompt + response for response in responses] == [chosen, rejected]
    assert split_shared_text(rejected, chosen) == (prompt, *responses[::-1])
    assert split_shared_text(chosen, rejected) == found
    for text in (chosen, rejected):
        assert len(prompt) in {0, len(text), *(match.start() for match in regex.finditer(r"\X", text))}
    shorter = min(chosen.rstrip(), rejected.rstrip(), key=len)
    if not (chosen.startswith(shorter) and rejected.startswith(shorter)):
        assert all(response.strip() for response in responses)


@pytest.mark.parametrize(
    ("shared", "chosen", "rejected"),
    [
        ("Q? " + "🇫🇷" * 3000, "🇩🇪", "🇩🇰"),
        ("Q? " + "🇫🇷" * 3000, "🇫", "🇩🇰"),
        ("Q?\n" + "空の色は" * 1000, "青", "緑"),
        ("Q? " + "word " * 1000 + "A:", " a", " b"),
        ("Q? A:", " " + "QUJD" * 1000 + "a", " " + "QUJD" * 1000 + "b"),
        ("Q?\n", "\u0301" * 5000 + "a", "\u0301" * 5000 + "b"),
    ],
)
def test_far_from_any_space(shared, chosen, rejected):
    assert split_shared_text(shared + chosen, shared + rejected) == (shared, chosen, rejected)


@pytest.mark.parametrize(
    "piece", ["空", "a", "a b ", "QUJD", "กำ", "ア", "🇫", "#$", '"', "(", "<a", "[", "a\u0301", " \u0301"]
)
def test_cost_does_not_grow_with_what_is_shared(piece, monkeypatch):
    """Only a few thousand characters are looked at, beside finding the first difference and the last white space."""
    looked_at = []

    def places(window, last, *, at_start):
        looked_at.append(len(window))
        return real(window, last, at_start=at_start)

    real = shared_text._places
    monkeypatch.setattr(shared_text, "_places", places)
    shared = "Q?\n" + piece * (300_000 // len(piece))
    prompt, *responses = split_shared_text(shared + "x1", shared + "y2")
    assert [prompt + response for response in responses] == [shared + "x1", shared + "y2"]
    assert prompt.startswith("Q?\n")
    assert sum(looked_at) < 20_000


@pytest.mark.parametrize("name", ["implicit_prompt_cjk.jsonl", "implicit_prompt_no_space.jsonl"])
def test_files_that_were_cut_wrongly(name):
    path = SHARED / "cases" / name
    if not path.exists():
        pytest.skip(f"the file is not here: {path}")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row, line in zip(convert([("x, row 1", line) for line in lines], "implicit"), lines, strict=True):
        assert row["prompt"].endswith("答：")
        assert [row["prompt"] + row[side] for side in ("chosen", "rejected")] == [line["chosen"], line["rejected"]]
        assert len(row["chosen"]) == len(row["rejected"]) == 1
