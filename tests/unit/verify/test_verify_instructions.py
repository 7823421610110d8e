"""Each rule of IFEval on an answer that keeps it and one that does not."""

import json

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Completion, Message, Problem
from upweight.verify.instructions import RULES, InstructionVerifier

CASES = [
    ("keywords:existence", {"keywords": ["one", "two"]}, "One and two", "one"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a b A", "a b"),
    ("keywords:frequency", {"keyword": "b", "frequency": 2, "relation": "less than"}, "b", "b b"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "category", "a Cat sat"),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Zz", "z"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One 3.5.", "A. B! C?"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b c", "a b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "First.\n\nSo, second.",
        "So first.\n\nThen.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", "PS"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\nP.P.S more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "yes"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "PART", "num_sections": 2},
        "PART 1 a\nPART 2",
        "PART 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say X."}, "say x. X", "X. Say X."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'It is over. The end."', "The end. No."),
    ("startend:quotation", {}, '"quoted"', '"half'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "AB CD e", "AB c"),
    ("change_case:english_capital", {}, "LOUD!", "Loud"),
    ("change_case:english_lowercase", {}, "quiet.", "Quiet"),
    ("punctuation:no_comma", {}, "none", "one, two"),
]


@pytest.mark.parametrize(("name", "arguments", "kept", "broken"), CASES, ids=[case[0] for case in CASES])
def test_rule(name: str, arguments: dict[str, object], kept: str, broken: str) -> None:
    assert RULES[name](kept, **arguments)
    assert not RULES[name](broken, **arguments)


HOSTILE = [
    # what the published checker makes of answers at the edge of a rule
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n**P.S.** more", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "And p.p.s inside a line", True),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "don"},
     "Don't go.", True),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "go"},
     "go.on now", True),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "b"},
     "a\n\n\n\nb", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n** b\n- c", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "*\n- c", True),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "I CAN'T", True),
    ("change_case:capital_word_frequency", {"capital_frequency": 4, "capital_relation": "less than"}, "IT'S ME", True),
    ("change_case:english_capital", {}, "ICH WOHNE SEIT VIELEN JAHREN IN EINER KLEINEN STADT AM WALDRAND.", False),
    ("change_case:english_capital", {}, "I HAVE LIVED FOR MANY YEARS IN A SMALL TOWN AT THE EDGE OF THE HILLS.", True),
    ("change_case:english_lowercase", {}, "ich wohne seit vielen jahren in einer kleinen stadt am waldrand.", False),
    ("change_case:english_lowercase", {}, "123", False),
    ("combination:two_responses", {}, "******one******two******", True),
    ("combination:two_responses", {}, "one************two", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***a***b***", True),
    ("keywords:existence", {"keywords": ["a.b"]}, "axb", False),
    ("keywords:forbidden_words", {"forbidden_words": ["c++"]}, "I like C", True),
    ("startend:quotation", {}, '"', False),
    ("startend:end_checker", {"end_phrase": "Any more?"}, 'ANY MORE?"  ', True),
    ("detectable_format:json_format", {}, "```JSON\n[1]\n```", True),
    ("detectable_format:json_format", {}, 'Here: {"a": 1}', False),
    ("detectable_format:title", {}, "<<\n>>", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "**one** and **two**", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a\nb] [c]", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "text", "kept"), HOSTILE)
def test_answers_at_the_edge(name: str, arguments: dict[str, object], text: str, kept: bool) -> None:
    assert RULES[name](text, **arguments) == kept


def test_every_rule_has_a_case() -> None:
    assert RULES.keys() - {case[0] for case in CASES} == {"language:response_language"}  # needs an extra


def problem(rules: list[tuple[str, dict[str, object]]]) -> Problem:
    return Problem("p", (Message("user", "x"),), json.dumps(rules))


def test_the_reason_names_what_was_broken() -> None:
    asked = problem([("punctuation:no_comma", {}), ("change_case:english_lowercase", {})])
    texts = [("fine", "end"), ("Not, fine", "end"), ("fine", "length"), ("<think>fine", "end")]
    verdicts = InstructionVerifier().score(asked, [Completion((), (), text, stop, "") for text, stop in texts])
    assert [verdict.reason for verdict in verdicts] == [
        "followed 2 of 2",
        "followed 0 of 2: not punctuation:no_comma, change_case:english_lowercase",
        "truncated",
        "no answer",
    ]
    with pytest.raises(UserError, match="unknown instruction 'a:b'"):
        InstructionVerifier().score(problem([("a:b", {})]), [])
    with pytest.raises(UserError, match="no instruction"):
        InstructionVerifier().score(problem([]), [])


def test_a_language_needs_its_package() -> None:
    try:
        import langdetect  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'upweight\[evals\]'"):
            RULES["language:response_language"]("bonjour", language="fr")
    else:
        assert RULES["language:response_language"]("Ceci est une phrase en français.", language="fr")
        assert not RULES["language:response_language"]("This is an English sentence.", language="fr")
