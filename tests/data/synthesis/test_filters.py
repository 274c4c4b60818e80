"""What is made of answers, which are kept, and in which language they are."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.data.synthesis.filters import FilterConfig, columns, reason_against, same, tidy
from cocoa_jax.data.synthesis.languages import LANGUAGES, other_language
from cocoa_jax.data.synthesis.prompts import PROMPTS, Prompt, chosen_prompts

CAPTION = PROMPTS["caption"]
GOOD = "A small dog is lying on the sofa next to a red cushion."
TEXTS = {
    "en": GOOD,
    "de": "Ein kleiner Hund liegt auf dem Sofa, und neben ihm ist ein rotes Kissen.",
    "fr": "Un petit chien est couché sur le canapé avec un coussin rouge et une balle.",
    "es": "Un perro pequeño está tumbado en el sofá con una pelota y unos cojines rojos.",
    "it": "Un piccolo cane è sdraiato sul divano con una palla e il cuscino rosso della casa.",
    "pt": "Um cão pequeno está deitado no sofá com uma bola e os dois brinquedos vermelhos.",
    "nl": "Een kleine hond ligt op de bank met een rode bal en het kussen van zijn baas.",
    "pl": "Mały pies leży na kanapie, a obok niego jest czerwona poduszka i piłka z gumy.",
    "tr": "Küçük bir köpek kanepenin üzerinde yatıyor ve yanında kırmızı bir yastık var.",  # noqa: RUF001
    "vi": "Một con chó nhỏ đang nằm trên ghế và có một quả bóng màu đỏ của nó.",
    "id": "Seekor anjing kecil sedang berbaring di sofa dengan bola yang berwarna merah dan bantal.",
    "ru": "Маленькая собака лежит на диване, и рядом с ней красная подушка.",  # noqa: RUF001
    "uk": "Маленький собака лежить на дивані, і поруч із ним є червона подушка.",  # noqa: RUF001
    "ar": "كلب صغير مستلق على الأريكة بجانب وسادة حمراء.",
    "he": "כלב קטן שוכב על הספה ליד כרית אדומה.",
    "hi": "एक छोटा कुत्ता लाल तकिये के पास सोफे पर लेटा है।",
    "th": "สุนัขตัวเล็กนอนอยู่บนโซฟาข้างหมอนสีแดง",
    "el": "Ένας μικρός σκύλος είναι ξαπλωμένος στον καναπέ.",
    "ko": "작은 개가 빨간 쿠션 옆 소파에 누워 있습니다.",
    "ja": "小さな犬が赤いクッションの隣のソファに横たわっています。",
    "zh": "一只小狗躺在沙发上，旁边有一个红色的靠垫。",  # noqa: RUF001
}


def against(text: str, prompt: Prompt = CAPTION, language: str = "en", finish: str = "stop", **more) -> str:
    asked = prompt.asked(language, "")
    return reason_against(text, "", asked, prompt, language, finish, dataclasses.replace(FilterConfig(), **more))


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_language_is_known_from_every_other(code):
    assert TEXTS.keys() == LANGUAGES.keys()
    taken = [other for other in LANGUAGES if not other_language(TEXTS[code], other)]
    assert taken == [code], "its own language and no other takes a text"


def test_names_and_short_texts_prove_nothing():
    assert not other_language("Kiwi", "de") and not other_language("1984", "zh") and not other_language("", "en")
    assert not other_language("一辆写着 COCA COLA 的红色卡车停在路边的商店前面", "zh")
    assert other_language("The red truck says 可口可乐.", "zh") and other_language(TEXTS["ja"], "zh")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (f'"{GOOD}"', GOOD),
        (f"Caption: {GOOD}", GOOD),
        (f"Here is a one-sentence caption: «{GOOD}»", GOOD),
        (f"Here are the keywords in English: {GOOD}", GOOD),
        (f"**Here is what I see:**\n\n{GOOD}", GOOD),
        ("Here is a train station clock that reads 10:30 in the grey morning light.",) * 2,
        ("Here is a dog: it sleeps.",) * 2,
        ("Here is a caption beside a clock that reads 10:30 in the morning.",) * 2,
        (f"<think>The user wants a caption.</think>\n\n{GOOD}", GOOD),
        (f"the template ate the first tag</think>{GOOD}", GOOD),
        (f"```text\n{GOOD}\n```", GOOD),
        (f"**Description:** {GOOD}", GOOD),
        ('"One" and "two"', '"One" and "two"'),
        ("A sign: caption: no", "A sign: caption: no"),
    ],
)
def test_an_answer_is_freed_of_what_is_around_it(answer, text):
    assert tidy(answer) == text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "length"),
        ("A dog.", "length"),
        ("word " * 100, "length"),
        ("I'm sorry, but I can't help with that request.", "refusal"),
        ("I cannot see any picture in your message at all.", "refusal"),
        ("As an AI language model I have no eyes for that.", "refusal"),
        ("There is no image provided with this message of yours.", "refusal"),
        ("Es tut mir leid, aber das kann ich leider nicht sehen.", "refusal"),
        (TEXTS["de"], "language"),
        (TEXTS["zh"], "language"),
        ("It is one sentence in English that says what this picture shows.", "overlap"),
        ("a dog and a cat and " * 8, "repetition"),
    ],
)
def test_a_bad_answer_is_named_by_its_kind(text, kind):
    assert against(text).startswith(f"{kind}: ") and not against(GOOD)


def test_filters_can_be_turned_off():
    assert against(GOOD, finish="length").startswith("cut: ") and not against(GOOD, finish="length", cut=False)
    assert not against(TEXTS["de"], language="de")
    assert not against("I'm sorry, says the sign on the door of the shop.", refusals=False)
    assert not against("It is one sentence in English that says what this picture shows.", overlap=1.0)
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        FilterConfig(overlap=2.0)


def test_a_refusal_is_no_sorry_face():
    for text in ("A sorry looking man holds an umbrella in the rain.", "A sign that says I can see you from here."):
        assert not against(text)


def test_questions_and_keywords_have_a_form():
    question, keywords = PROMPTS["question"], PROMPTS["keywords"]
    stored = question.stored("**Question:** What is on the sofa?\n\n**Answer:** a dog", "en", "")
    assert stored == ("Represent the given image with the following question: What is on the sofa?", "a dog")
    assert question.stored("What is on the sofa? A dog.", "en", "") is None
    assert keywords.stored("dog, sofa,cushion, dog.", "en", "") == (keywords.query, "dog, sofa, cushion")
    assert keywords.stored("1. dog\n- sofa", "en", "")[1] == "dog, sofa"
    assert keywords.stored("狗、沙发、靠垫", "zh", "") == (f"{keywords.query} Answer in Chinese.", "狗, 沙发, 靠垫")
    assert keywords.stored("A dog on a sofa", "en", "") is None
    assert PROMPTS["rephrase"].stored("x", "en", "a dog") == ("a dog", "x")


def test_a_question_is_checked_for_its_language_and_not_for_our_words_before_it():
    prompt = PROMPTS["question"]
    query, text = prompt.stored("Question: Was liegt auf dem Sofa und ist rot?\nAnswer: ein Kissen", "de", "")
    asked = prompt.asked("de", "")
    assert not reason_against(text, query, asked, prompt, "de", "stop", FilterConfig())
    assert reason_against(text, query, asked, prompt, "en", "stop", FilterConfig()).startswith("language: German")


def test_a_refusal_in_the_question_is_one():
    prompt = PROMPTS["question"]
    query, text = prompt.stored("Question: I'm sorry, what do you mean by that?\nAnswer: a red dog", "en", "")
    assert reason_against(text, query, "", prompt, "en", "stop", FilterConfig()).startswith("refusal: ")


def test_prompts_are_data_with_a_hash_and_may_be_ones_own():
    own = Prompt("Name the {language} colour of: {words}", "Which colour?", picture=False)
    assert own.asked("de", "a {language} kiwi") == "Name the German colour of: a {language} kiwi"
    assert len({prompt.hash for prompt in (*PROMPTS.values(), own)}) == len(PROMPTS) + 1
    assert list(chosen_prompts(["mine", "caption"], {"mine": own})) == ["mine", "caption"]
    with pytest.raises(ValueError, match=r"\['yours'\] do not exist: choose of caption"):
        chosen_prompts(["yours"], {})
    with pytest.raises(ValueError, match="shows neither picture nor"):
        Prompt("Say something.", "", picture=False)


@given(st.text(), st.sampled_from(sorted(PROMPTS)), st.sampled_from(sorted(LANGUAGES)))
def test_no_answer_crashes_the_filters(answer, name, language):
    prompt = PROMPTS[name]
    stored = prompt.stored(tidy(answer), language, "words")
    if stored is not None:
        reason = reason_against(stored[1], stored[0], prompt.asked(language, ""), prompt, language, "", FilterConfig())
        assert reason or prompt.shortest <= columns(stored[1]) <= prompt.longest
        assert "\n" not in stored[1] and same(stored[1]) == same(f" {stored[1]}. ")
