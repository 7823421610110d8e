import time

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Completion, Message, Problem
from upweight.verify import symbolic
from upweight.verify.answers import AnswerVerifier, compare, equivalent, extract, tally

PROBLEM = Problem("p", (Message("user", "6 x 7?"),), answer="42")


def completion(text: str, stop: str = "end") -> Completion:
    return Completion(tokens=(1,), logprobs=(), text=text, stop=stop, policy="test")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}", "42"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),  # escaped braces do not count
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{3} and \\boxed{4", "3"),  # the last one is never closed
        ("} } \\boxed{8} }", "8"),
        ("<think>\n\\boxed{1}\n</think>\n\\boxed{2}", "2"),
        ("\\boxed{1}\n</think>\n\\boxed{2}", "2"),  # the prompt opened the thought
        ("<think>\n\\boxed{1}\n</think>\nwell", None),
        ("<think>\n\\boxed{1}", None),
        ("\\boxed{}", None),
        ("\\boxed{42", None),
        ("The answer is 42.", "42"),
        ("The answer is 3.5. Done.", "3.5"),
        ("Answer: 1\nFinal answer: **12**", "12"),
        ("**Final Answer**: 12", "12"),
        ("**Answer:**\n\n12", "12"),
        ("The answer isn't 5", None),
        ("The answer is:\n\n**12**\n\nas asked", "12"),
        ("This answer isn't 4.\nThe answer is 5.", "5"),
        ("#### 18", "18"),
        ("The answer is:\n\\[\n12\n\\]", "12"),
        ("**Answer**:\n\n$$\n\\frac12\n$$", "\\frac12"),
        ("", None),
        ("forty-two", None),
    ],
)
def test_extract(text: str, answer: str | None) -> None:
    assert extract(text) == answer


EQUAL = [
    ("42", "42"),
    ("042", "42"),
    ("+42", "42"),
    ("42.", "42"),
    ("42.0", "42"),
    ("−3", "-3"),
    (".5", "0.5"),
    ("1,234,567", "1234567"),
    ("1{,}234", "1234"),
    ("$1,000", "1000"),
    ("\\$12.50", "12.5"),
    ("$7$", "7"),
    ("\\(7\\)", "7"),
    ("1/2", "0.5"),
    ("2/4", "1/2"),
    ("-1/2", "1/-2"),
    ("1 1/2", "3/2"),
    ("\\frac{1}{2}", "1/2"),
    ("\\dfrac{3}{6}", "0.5"),
    ("\\frac12", "0.5"),
    ("\\frac1{20}", "0.05"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("2\\frac{1}{3}", "7/3"),
    ("50%", "0.5"),
    ("50\\%", "50"),
    ("50 %", "1/2"),
    ("1e3", "1000"),
    ("3 \\times 10^{5}", "300000"),
    ("1.5*10^-3", "0.0015"),
    ("30^\\circ", "30"),
    ("90°", "90"),
    ("\\text{Tuesday}", "tuesday"),
    ("Yes", "yes"),
    ("Javascript", "JavaScript"),
    ("(C)", "C"),
    ("\\text{C}", "C"),
    ("C.", "(C)"),
    ("\\boxed{5}", "5"),
    ("5 cm", "5"),
    ("1000 \\text{ meters}", "1000"),
    ("x = 5", "5"),
    ("\\sqrt{2}/2", "\\frac{1}{\\sqrt{2}}"),
    ("sqrt(2)", "\\sqrt{2}"),
    ("2*pi", "2\\pi"),
    ("1, 2", "2, 1"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("2*x+1", "2x+1"),
    ("x**2", "x^2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2^10", "1024"),
    ("3!", "6"),
    ("\\log_2 8", "3"),
    ("a+b", "b+a"),
    ("ba", "ab"),
    # matrices: a blank after the two backslashes that end a row
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"),
    ("\\begin{pmatrix} 1/2 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}\\frac{1}{2}\\\\2\\end{pmatrix}"),
    # intervals and the inequalities that say the same, either way round
    ("x > 3", "(3,\\infty)"),
    ("(3,\\infty)", "x > 3"),
    ("-1 < x < 1", "(-1,1)"),
    ("(-\\infty, 2]", "x \\leq 2"),
    ("x \\le 2", "(-\\infty, 2]"),
    ("x \\in [2, 5)", "[2,5)"),
    ("\\emptyset", "\\varnothing"),
    ("\\langle 1,2 \\rangle", "(1,2)"),
    # units, currencies, words for large numbers
    ("5 km", "5000 m"),
    ("36 km/h", "10 m/s"),
    ("10 meters per second", "10"),
    ("5\\,\\text{cm}^2", "5"),
    ("9.8", "9.8 m/s^2"),
    ("2 square feet", "2 ft^2"),
    ("1 1/2 hours", "90 minutes"),
    ("3.0\\times10^8 \\text{ m/s}", "3e8"),
    ("7 apples", "7"),
    ("18 \\text{ eggs}", "18"),
    ("20\\text{cups}", "20"),
    ("20 years old", "20"),
    ("1,250~\\text{people}", "1250"),
    ("\\frac{3}{4} \\text{ cup}", "0.75"),
    ("1 egg", "1 eggs"),
    ("6wxyz", "6zyxw"),
    ("\\text{\\$18}", "18"),
    ("€5", "5"),
    ("5 dollars", "\\$5"),
    ("\\$5 million", "5,000,000"),
    ("5 million dollars", "\\$5000000"),
    # what Unicode has a sign for
    ("∞", "\\infty"),
    ("√2", "\\sqrt{2}"),
    ("√(x+1)", "\\sqrt{x+1}"),
    ("x²", "x^2"),
    ("1½", "3/2"),
    ("x ≤ 5", "x \\leq 5"),
    ("±3", "3, -3"),
    # numbers
    ("1 000 000", "1000000"),
    ("0.\\overline{3}", "1/3"),
    ("0.1\\overline{6}", "\\frac{1}{6}"),
    ("\\approx 3.14", "3.14"),
    ("1010_2", "1010_{2}"),
    ("A_{16}", "1010_2"),
    # complex numbers
    ("2i+3", "3+2i"),
    ("\\frac{1}{1+i}", "\\frac{1-i}{2}"),
    ("e^{i\\pi}", "-1"),
    # choices and words
    ("(B) 5 apples", "B"),
    ("\\textbf{(B)}", "B"),
    ("don't know", "Don't know"),
    ("North-West", "north-west"),
    ("Tuesday, March 5", "tuesday, march 5"),
]

DIFFERENT = [
    ("42", "43"),
    ("-42", "42"),
    ("0.333333", "1/3"),
    ("1,23", "123"),
    ("3.14", "22/7"),
    ("50%", "51"),
    ("50%", "5%"),
    ("5000", "50%"),
    ("1/0", "1"),
    ("1e3", "100"),
    ("\\frac{1}{3}", "\\frac{1}{2}"),
    ("2\\frac{1}{3}", "2/3"),
    ("Tuesday", "Monday"),
    ("ten", "10"),
    ("10", "ten"),
    ("A", "B"),
    ("AB", "A"),
    ("", "5"),
    ("5", ""),
    ("5, 6", "5"),
    ("5 or 6", "5"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "[1,2]"),
    ("x", "y"),
    ("x+1", "x+2"),
    ("\\sqrt{3}", "\\sqrt{2}"),
    ("__import__('os')", "5"),
    ("\\frac{", "5"),
    ("}{}{", "5"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("x \\le 2", "x < 2"),
    ("x > 2", "(-\\infty,2)"),
    ("x \\ge 2", "(2,\\infty)"),
    ("x \\ge 2", "2"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "\\{1,2\\}"),
    ("\\{1,2\\}", "[1,2]"),
    ("\\{1,2,3\\}", "\\{1,2\\}"),
    ("5 km", "5 m"),
    ("5 cm", "5 cm^2"),
    ("10 m/s", "10 km/h"),
    ("5 km", "6"),
    ("17 \\text{ eggs}", "18"),
    ("18 eggs", "18 \\text{ geese}"),
    ("18 or more", "18"),
    ("2 pi", "2"),
    ("3abc", "3"),
    ("5 km", "5000"),
    ("€5", "\\$5"),
    ("5 million", "5"),
    ("4 2", "42"),
    ("1 00", "100"),
    ("0.\\overline{3}", "0.3"),
    ("101_2", "101_3"),
    ("12_2", "12_3"),
    ("3", "\\pm 3"),
    ("3+2i", "3-2i"),
    ("i", "-i"),
    ("e^x", "e^{-x}"),
    ("(C) 5", "B"),
    ("A cat", "A"),
    ("aabb", "AaBb"),
    ("AABB", "aabb"),
    ("tt", "Tt"),
    ("no solution", "0"),
    ("about 5", "5"),
    ("\x00\ud800", "5"),
    ("?", "5"),
]


@pytest.mark.parametrize(("candidate", "reference"), EQUAL)
def test_equal_answers(candidate: str, reference: str) -> None:
    assert compare(candidate, reference, cpu_seconds=20) == "equal"


@pytest.mark.parametrize(("candidate", "reference"), DIFFERENT)
def test_different_answers(candidate: str, reference: str) -> None:
    assert compare(candidate, reference, cpu_seconds=20) == "different"


@pytest.mark.parametrize(
    "text",
    [
        "{" * 100_000,
        "\\boxed{" * 15_000,
        "}" * 100_000,
        "\\boxed{" + "{" * 50_000 + "}" * 50_001,
        "answer is " * 10_000,
        "<think>" * 15_000,
        "\\" * 100_000,
        " " * 100_000,
        "answer" + " " * 100_000,
    ],
)
def test_hostile_text_costs_no_time(text: str) -> None:
    before = time.process_time()
    answer = extract(text)
    if answer is not None:
        compare(answer, "5")
        assert compare(answer, "x^2") == "different"
    assert time.process_time() - before < 0.5


@pytest.mark.parametrize("answer", ["1" * 900, "1e999", "1e-999", "9" * 999, "0." + "0" * 900 + "1", "1," * 450])
def test_hostile_numbers_cost_no_time(answer: str) -> None:
    before = time.process_time()
    assert not equivalent(answer, "5")
    assert time.process_time() - before < 0.5


def test_an_answer_that_hangs_is_killed_and_counted_apart() -> None:
    group = [completion(f"\\boxed{{{text}}}") for text in ("9^{9^{9^{9}}}", "9**9**9**9", "42", "41")]
    verdicts = AnswerVerifier(cpu_seconds=1).score(PROBLEM, group)
    assert [verdict.score for verdict in verdicts] == [0.0, 0.0, 1.0, 0.0]
    assert verdicts[0].reason == "timed out: got 9^{9^{9^{9}}}"
    assert tally(verdicts)["different"] + tally(verdicts)["timed out"] == 3
    assert equivalent("\\sqrt{8}", "2\\sqrt{2}")  # the next question finds a new worker


def test_an_expression_that_sympy_refuses_is_different_and_ends_no_process() -> None:
    assert compare("\\sqrt{8}", "2\\sqrt{2}") == "equal"  # there is a worker
    (before,) = [worker.process.pid for worker in symbolic._WORKERS._idle]
    assert compare("\\max(i, 2)", "x^2") == "different"  # the imaginary unit is not comparable
    assert [worker.process.pid for worker in symbolic._WORKERS._idle] == [before]


def test_reasons() -> None:
    group = [
        completion("\\boxed{42}"),
        completion("\\boxed{41}"),
        completion("no idea"),
        completion("\\boxed{42} and so", stop="length"),
    ]
    verdicts = AnswerVerifier().score(PROBLEM, group)
    assert [verdict.reason for verdict in verdicts] == ["equal", "different: got 41", "no answer found", "truncated"]
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0]


def test_a_problem_without_an_answer_is_refused() -> None:
    with pytest.raises(UserError, match="no reference answer"):
        AnswerVerifier().score(Problem("p", PROBLEM.messages), [completion("\\boxed{1}")])


def test_numbers_are_compared_at_a_thousand_a_second_at_least_with_types_checked() -> None:
    pairs = [(f"{index}", f"{index * 2}/2") for index in range(2000)]
    before = time.process_time()
    assert all(equivalent(candidate, reference) for candidate, reference in pairs)
    assert (time.process_time() - before) / len(pairs) < 1 / 1000
