"""Instructions that a rule can check: the 25 kinds of IFEval (Zhou et al. 2023), by their published names.

A rule is one function of the answer and its arguments, and decides as the published checker does, oddities included.
Two use tokenizers there that are not here: sentences are split at full stops, question and exclamation marks that
blanks follow, and words in capitals are counted with contractions taken apart, which is close to them, not the same.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.verify.answers import visible_part

Rule = Callable[..., bool]
PARAGRAPHS = re.compile(r"\s?\*\*\*\s?")
_BULLETS = (re.compile(r"^\s*\*[^*].*$", re.MULTILINE), re.compile(r"^\s*-.*$", re.MULTILINE))
_CONTRACTION = re.compile(r"(?i:(?=n't$)|(?='(?:s|m|d|ll|re|ve)$))")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]*]*(?:\s+|$)")
LEAST_TOLD = 60
"""Characters from which the language of a text can be told."""
_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compared(count: int, relation: str | None, wanted: int) -> bool:
    if relation == "less than":
        return count < wanted
    if relation == "at least":
        return count >= wanted
    raise ValueError(f"the relation {relation!r} is neither 'at least' nor 'less than'")


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _sentences(text: str) -> int:
    return len([part for part in _SENTENCE_END.split(text) if re.search(r"\w", part)])


def existence(text: str, keywords: Sequence[str]) -> bool:
    return all(_occurrences(text, word) for word in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(_occurrences(text, keyword), relation, frequency)


def forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(text.lower().count(letter.lower()), let_relation, let_frequency)


def language(text: str, language: str) -> bool:
    try:
        # imported here: an optional extra
        import langdetect
    except ImportError:
        raise UserError(
            "telling the language of an answer, which rules on languages and letter case do, needs the package "
            "langdetect: pip install 'upweight[evals]'"
        ) from None
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text)) == language
    except langdetect.LangDetectException:  # no letters to tell it by: the published checker lets these pass
        return True


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compared(_sentences(text), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are set apart by ***; only the first and the last may be empty."""
    parts = PARAGRAPHS.split(text)
    inner = [part for place, part in enumerate(parts) if part.strip() or 0 < place < len(parts) - 1]
    return all(part.strip() for part in inner) and len(inner) == num_paragraphs


def number_words(text: str, num_words: int, relation: str) -> bool:
    return _compared(len(re.findall(r"\w+", text)), relation, num_words)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are set apart by two line breaks."""
    parts = [part.strip() for part in text.split("\n\n")]
    count = len([part for part in parts if part])
    if count != num_paragraphs or nth_paragraph > count or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"]", word, maxsplit=1)[0].lower() == first_word.lower()


def placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """It may stand anywhere in a line: **P.S.** is one."""
    marker = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(postscript_marker, re.escape(postscript_marker))
    return re.search(marker, text, re.IGNORECASE) is not None


def bullets(text: str, num_bullets: int) -> bool:
    return sum(len(kind.findall(text)) for kind in _BULLETS) == num_bullets


def constrained(text: str) -> bool:
    return any(response in text for response in _RESPONSES)


def highlights(text: str, num_highlights: int) -> bool:
    single = [found for found in re.findall(r"\*[^\n*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n*]*\*\*", text) if found.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def json_format(text: str) -> bool:
    bare = re.sub(r"^```(?:json)?\s*|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    return any(found.strip("<> \t") for found in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str) -> bool:
    parts = text.split("******")
    whole = [part.strip() for place, part in enumerate(parts) if part.strip() or 0 < place < len(parts) - 1]
    return len(whole) == 2 and whole[0] != whole[1] and all(whole)


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = [part for word in re.findall(r"[\w'-]+", text) for part in _CONTRACTION.split(word) if part.isupper()]
    return _compared(len(words), capital_relation, capital_frequency)


def uppercase(text: str) -> bool:
    return text.isupper() and _english(text)


def lowercase(text: str) -> bool:
    return text.islower() and _english(text)


def _english(text: str) -> bool:
    """Whether a text is English, as these rules ask besides; of a short one langdetect cannot tell ("hello" is Finnish
    to it), so that is not held against it."""
    return len(text) < LEAST_TOLD or language(text, "en")


def no_comma(text: str) -> bool:
    return "," not in text


def quotation(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


RULES: Mapping[str, Rule] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:constrained_response": constrained,
    "detectable_format:number_highlighted_sections": highlights,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": ends_with,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": uppercase,
    "change_case:english_lowercase": lowercase,
    "punctuation:no_comma": no_comma,
}


@dataclass(frozen=True, slots=True)
class InstructionVerifier(Verifier):
    """1 where all instructions are followed ("strict" at the level of the prompt), else 0; the reason names the broken.

    The problem's answer is a JSON list of [name of the rule, arguments]. Truncated completions follow none; what is
    judged is the text after the thought.
    """

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        rules = parsed(problem)
        return [_judge(rules, completion) for completion in group]


def parsed(problem: Problem) -> list[tuple[str, Mapping[str, Any]]]:
    """The rules of a problem. Raises UserError for one that is not known."""
    rules = [(name, arguments) for name, arguments in json.loads(problem.answer or "[]")]
    unknown = [name for name, _ in rules if name not in RULES]
    if unknown or not rules:
        told = f"the unknown instruction {unknown[0]!r}" if unknown else "no instruction"
        raise UserError(f"problem {problem.id} has {told}; known are {', '.join(RULES)}")
    return rules


def _judge(rules: Sequence[tuple[str, Mapping[str, Any]]], completion: Completion) -> Verdict:
    text = visible_part(completion.text)
    if completion.truncated or text is None or not text.strip():
        return Verdict(0.0, "truncated" if completion.truncated else "no answer")
    broken = [name for name, arguments in rules if not RULES[name](text.strip(), **arguments)]
    if not broken:
        return Verdict(1.0, f"followed {len(rules)} of {len(rules)}")
    return Verdict(0.0, f"followed {len(rules) - len(broken)} of {len(rules)}: not {', '.join(broken)}")
