"""Numbers for grade.py: enumeration, closed forms, hand cases, hostile text, and three real answer sets. `python -m pytest tests/test_grade.py`"""
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grade as ev
from grade import final_answer, grade_stats, majority_at_k, mean_interval, normalise, paired_bootstrap, pass_at_k, quick_word

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
grade, grade_all = partial(ev.grade, seconds=60.0), partial(ev.grade_all, seconds=60.0)      # a starved machine must not turn a verdict into None


@pytest.fixture(autouse=True)
def fresh_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ev, "START_SECONDS", 300.0)
    grade_stats.clear()
    yield
    grade_stats.clear()


def box(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."

# ------------------------------------------------------------------------------------------------ reading an answer

@pytest.mark.parametrize("text, answer", [
    (r"\boxed{5}", "5"),
    (r"first \boxed{1}, then \boxed{2}.", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\boxed{7}}", "7"),
    (r"\boxed {5}", "5"),
    (r"\fbox{6}", "6"),
    (r"\\boxed{8}", "8"),                                            # a JSON-escaped completion
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x : x > 1 \right.}", r"\left\{ x : x > 1 \right."),     # an escaped brace needs no partner
    (r"\boxed{3} and then \boxed{\frac{1}", "3"),                    # the last one was cut off
    ("} } \\boxed{4}", "4"),
    (r"{ \boxed{4}", "4"),
    (r"\boxed{}", ""),
    ("<answer> 12 </answer>", "12"),
    ("<answer>1</answer> no: <answer>2</answer>", "2"),
    (r"<answer>1</answer> \boxed{2}", "2"),                          # the box goes first
    ("a</answer> b", None),
    ("<answer> never closed", None),
    ("the answer is 5", None),
    ("boxed{5}", None),
    ("", None),
    (r"<think>\boxed{1}</think> It is \boxed{2}", "2"),
    (r"\boxed{1}</think>\boxed{2}", "2"),                            # <think> stood in the prompt
    (r"<think>\boxed{1}</think> I forgot the box", None),
    (r"<think>so it is \boxed{1}", None),                            # thinking never ended
    (r"<think>a</think> b <think>c</think> \boxed{3}", "3"),
    (r"<think>a</think> \boxed{2} <think> \boxed{9} </think>", None),
])
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("text, plain", [
    ("$5$", "5"), (r"\$18.90", "18.90"), (r"\text{Evelyn}", "Evelyn"), (r"\textbf{(\text{C})}", "(C)"), ("12.", "12"), ("1,234,567", "1234567"),
    ("-1,234.5", "-1234.5"), (r"11,\! 111,\! 100", "11111100"), (r"10{,}000", "10000"), (r"10\,000", "10000"), ("1, 2, 3", "1,2,3"), ("1 1/2", "1 1/2"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"), (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\leftarrow", r"\leftarrow"), (r"\(7\)", "7"),
    ("12,34", "12,34"), ("1,2345", "1,2345"), ("1 000", "1000"), ("12 345 678.5", "12345678.5"), ("12 34", "12 34"), ("1 000,000", "1 000,000"),
    ("100, 200", "100,200"), ("0,500", "0,500"), ("- 1,234", "-1234"), (r"\bigl(1,2\bigr)", "(1,2)"), (r"\bigcup", r"\bigcup"), (r"\textit{C}", "C"), (r"\emph{C}", "C"),
])
def test_normalise(text: str, plain: str) -> None:
    assert normalise(text) == plain


@pytest.mark.parametrize("gold, answer, word", [
    ("5", "5", "True"), ("5", "5.0", "True"), ("5", "6", "False"), ("-5", "5", "False"), ("+5", "5", "True"), ("007", "7", "True"), (".5", "0.50", "True"),
    ("1/2", "0.5", "True"), ("1/2", "2/4", "True"), (r"\frac{1}{2}", "0.5", "True"), (r"-\frac{3}{4}", "-0.75", "True"), ("1/3", "0.333", "False"),
    ("58,500", "58500", "True"), ("2000", r"\$2,000", "True"), ("7" * 30, "7" * 29 + "8", "False"), ("0.1", "0.1000000000000000000000001", "False"),
    ("C", "C", "True"), ("C", "(C)", "True"), ("C", r"\text{C}", "True"), ("C", "C.", "True"), ("C", "c", "True"), ("C", "D", "False"), ("J", "A", "False"),
    ("C", "C and D", "False"), ("C", "5", "False"), ("C", "[C]", "True"), ("C", "**C**", "True"), ("C", "C) a catalyst", "True"),
    ("C", r"\text{C. Because of A}", "True"),
    ("C", r"\textbf{(C)}\ 5", "True"), ("C", "Option C", "True"), ("C", r"\text{Answer: (c)}", "True"), ("C", "(D) C", "False"), ("C", "Cobalt", "False"),
    ("C", "(C), (D)", "False"), ("C", "C) and D)", "False"), ("C", "(C)(D)", "False"), ("C", "C/D", "False"), ("C", "C, " * 600, "False"),
    ("C", "C. D. A.", "False"), ("C", "(C) 1 (D) 2", "False"), ("C", "C. 1 D. 2", "False"), ("C", r"\textbf{(C)}\ 2 \qquad\textbf{(D)}\ 3", "False"), ("C", "C or D", "False"),
    ("C", "C... D", "False"), ("C", "C) wait, D", "False"), ("C", "C. or maybe D.", "False"), ("C", r"(C)\text{ and }(D)", "False"),
    ("C", "C. C.", "True"), ("C", "C) CO2 and D-glucose", "True"),
    ("C", "(C) vitamins A and B", "True"), ("C", "(C) hepatitis A, B and C", "True"), ("C", r"\textit{C}", "True"), ("C", r"\emph{C}", "True"), ("C", "The answer is C", "True"),
    ("C", "The correct answer is option C.", "True"), ("C", "The answer is D", "False"), ("C", "The cat", "False"),
    *[("C", answer, "True") for answer in ("C - cobalt", "C \u2013 cobalt", "C\u2014cobalt", "C, cobalt", "C (cobalt)", r"C \text{ cobalt}", "C, not D", r"\textbf{C} - tin")],
    *[("C", answer, "False") for answer in ("C-glucose", "C - D", "C - 2", "C - x", "C, D", "C, maybe D", "C, and D", "C (or D)", "C - wait, D", "D - cobalt", "D (cobalt), no C")],
    ("52_8", "52_9", "False"), ("52_8", "52_{8}", "True"), ("52_8", "53_8", "False"), ("52_8", "52", ""),
    ("100, 200", "100200", ""), ("5, 120", "5120", ""), ("45,135", "45, 135", "True"), ("1,234", "1234", "True"),
    (r"\text{(C)}", "C", "True"), (r"\text{(C)}", r"\textbf{(D)}", "False"),
    ("5", "", "False"), ("5", "x", ""), ("1/0", "5", ""), ("5", "1/0", ""), ("5", "1e3", ""), ("5", "٥", ""), ("5", "5_0", ""), ("11/2", "1 1/2", ""),
    ("FACE", "CAFE", "False"), ("ACEF", "F, A, C and E", "True"), ("ACEF", "ACE", "False"), ("AB", "()", ""),
    ("left", "felt", "False"), ("Alice", "Celia", "False"), (r"\text{three}", "there", "False"), ("xyz", "zyx", ""),
    ("2, 2, 3", "2, 3", "False"), ("2, 2, 3", "3, 2, 2", ""), ("2, 3", "2, 2, 3", ""), ("1, 0.5, 0.5", "0.5, 1", "False"),
    ("7" * 31, "7" * 30 + "8", ""), ("x", "x", "True"), ("", "5", "gold_unparsable"), (" $ $ ", "5", "gold_unparsable"),
    ("5", "5" * 2001, "False"), ("5" * 2001, "5" * 2001, "gold_unparsable"),
])
def test_strings_and_exact_numbers_decide_without_a_process(gold: str, answer: str, word: str) -> None:
    assert quick_word(gold, answer) == word


@pytest.mark.parametrize("text, latex", [
    ("x = 58,500", "x = 58500"), ("58{,}500", "58500"), (r"58,500\%", r"58500\%"), (r"58,500\pi", r"58500\pi"), (r"N=1\,234", "N=1234"), (r"\(x=1,234\)", r"\(x=1234\)"),
    ("x=1,234,567, 5", "x=1234567, 5"), (r"\text{58,500 dollars}", r"58500\text{ dollars}"), ("1,234.50x", "1234.50x"), (r"11,\! 111", "11111"),
    *[(same, same) for same in ("(1,234)", "[1,234]", r"\{1,234\}", r"\langle 1,234\rangle", "1,234", "1,2,345", "1,234,5", "x=0,100,200", "100, 200", "x^2,100", "x_1,100")],
    ("18 eggs.", r"18\text{ eggs}"), (r"0.\overline{3}", r"\frac{3}{9}"), (r"0.1\overline{6}", r"\frac{15}{90}"), (r"-2.\bar{3}", r"-\frac{21}{9}"), (r"0.\bar3", r"\frac{3}{9}"),
    (r"0.0\overline{12}", r"\frac{12}{990}"), (r"\overline{AB}", r"\overline{AB}"), (r"3\overline{5}", r"3\overline{5}"),
    *[(f"5 {unit}", rf"5\text{{ {unit}}}") for unit in ("m/s", "km/h", "cm^2", "cm^{2}", "m/s^2", "in", "L", "sec", "months", "square feet", "times", "units^2", "g/L")],
    ("5 cm\u00b2", r"5\text{ cm^2}"), ("5 dozen", "60"), ("5 Million", "5000000"), ("2.5 thousand eggs", r"2500.0\text{ eggs}"), ("5 millionths", "5 millionths"),
    *[(f"5 {word}", f"5 {word}") for word in ("sec x", "exp x", "sinh x", "arcsin x", "cosec x", "ln x", "lnx", "root three", "square root", "squared", "tenths", "alpha",
                                               "x", "s^2", "abc^2", "over x", "mod n")],
    ("3pi", r"3\pi"), ("pi/2", r"\pi /2"), ("2 pi r", r"2 \pi  r"), (r"3\pi", r"3\pi"), ("spin 2pies", "spin 2pies"),
    (r"\big(1,2\big)", "(1,2)"), (r"A \bigcup B", r"A \bigcup B"), ("1\u202f234", "1 234"),
])
def test_plain_text_is_written_as_latex(text: str, latex: str) -> None:
    assert ev.as_latex(text) == latex

# ------------------------------------------------------------------------------------------------ grading

CASES = [                                                            # gold, what is boxed, verdict: all of these need math-verify or nearly do
    (r"\frac{1}{2}", r"\frac12", True), (r"\frac{1}{2}", r"\dfrac{2}{4}", True), (r"\frac12", "0.5", True), (r"\frac{1}{2}", r"\frac{1}{3}", False),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True), (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\sqrt{8}", r"2\sqrt{3}", False), (r"11\sqrt2", r"11 \sqrt{2}", True), ("2^{10}", "1024", True), (r"10^{-3}", "0.001", True),
    (r"-\frac{35}{9}", r"\frac{-35}{9}", True), (r"-\frac{35}{9}", r"\frac{35}{9}", False), ("-50", "50", False), (r"1\frac{4}{5}", "1.8", True),
    (r"\{1,2,3\}", r"\{3,2,1\}", True), (r"\{1,2,3\}", r"\{1,2\}", False), (r"1,-2", "-2, 1", True), ("3, 5, 7", "3,5,8", False),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", True), ("(3,4]", r"\left(3, 4\right]", True), ("(3,4]", "[3,4]", False),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty) \cup (-\infty,2)", True), (r"(2,\infty)", "x > 2", False), (r"x \in [-2,7]", "[-2,7]", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True), ("(8,-2)", "(-2,8)", False), ("x=5", "5", True), ("5", "x = 5", True),
    (r"15\mbox{ cm}^2", "15", True), (r"5.4 \text{ cents}", "5.4", True), ("5", r"5\text{ apples}", True), ("90^\\circ", "90", True),
    ("90", r"90^{\circ}", True), ("90^\\circ", "91", False), ("50", r"50\%", True), ("50", "50%", True), (r"\$36", "36", True), (r"\$32,\!348", "32348", True),
    (r"\text{Evelyn}", "Evelyn", True), (r"\text{Evelyn}", r"\text{Navin}", False), (r"\text{even}", r"\textbf{even}", True), (r"\text{east}", "west", False),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False),
    ("6-5i", "-5i + 6", True), ("6-5i", "6+5i", False), ("(a+5)(b+2)", "ab+2a+5b+10", True), ("2k+2", "2(k+1)", True), ("2k+2", "2k+1", False),
    ("y = 2x + 3", "y = 3 + 2x", True), ("y = 2x + 3", "y = 2x - 3", False), ("52_8", "52_8", True), ("p - q", "q - p", False), (r"\cot x", r"\cot(x)", True),
    (r"12\pi", "12 \\pi", True), (r"12\pi", "37.7", False), ("0.333333", r"\frac{1}{3}", False), ("5", r"\frac{5}{", False), ("5", r"\frac{", False),
    (r"\frac34", r"\left( \frac{3}{4}", False), ("1+x", "( $x+1$", False),                          # nothing is fished out of broken LaTeX
    (r"\frac{\pi}{2}", r"\frac{\pi}{2}.", True), ("x+1", "$1+x$.", True), ("x+1.", r"\(1+x\)", True),
    (r"1 \text{ hour } 30 \text{ min}", r"1 \text{ hour } 20 \text{ min}", False), (r"5 \text{ boys}, 7 \text{ girls}", r"5 \text{ boys}, 8 \text{ girls}", False),
    ("12", r"12 \text{ hours and } 30 \text{ minutes}", False), ("5", r"5 \text{ feet } 6 \text{ inches}", False), ("12,13", r"12\text{ and }13", True),
    (r"5 \text{ and } 2.5", r"5, \frac{5}{2}", True), (r"\text{May } 5", r"\text{May }6", False),
    (r"75 \mathrm{~km} / \mathrm{h}", "75", True), ("75", r"75 \mathrm{~km} / \mathrm{h}", True), (r"75 \mathrm{~km} / \mathrm{h}", "7777", False), (r"5 \mathrm{~J}", "5", True),
    (r"5 \mathrm{~m} / \mathrm{s}", "5", True), (r"2 \mathrm{~mol} / \mathrm{L}", "2", True),
    ("12", r"12\,\mathrm{cm}", True), (r"12\,\mathrm{cm}", "12", True), ("12", r"12\mathrm{cm}", True), ("12", r"13\,\mathrm{cm}", False), ("5", r"5\,\mathrm{m}", True),
    ("5", r"5\,\mathrm{J}", True), (r"\frac{1}{2}", r"\frac{1}{2}\,\mathrm{kg}", True), (r"2\sqrt3", r"2\sqrt3\,\mathrm{cm}", True), (r"6\pi", r"6\pi\,\mathrm{cm}", True),
    ("3", r"3\,\mathrm{hours}", True), ("12", r"12\,\operatorname{cm}", True), ("2", r"2\,\mathrm{MB}", True), ("2", r"2\,\mathrm{AB}", False), ("5", r"5\,\mathrm{x}", False),
    ("2", r"2\mathrm{e}", False), ("2", r"2\mathrm{pi}", False), ("2", r"2\,\mathrm{dx}", False), ("5", r"5\,\mathrm{million}", False), ("5000000", r"5\,\mathrm{million}", True),
    (r"3\mathrm{ab}", r"3\mathrm{ab}", True), ("20", "20\u00b0C", True), ("20", r"20^\circ C", True), ("20", r"20^{\circ} F", True), ("20", r"20^{\circ}\mathrm{C}", True),
    ("20", r"20\,{}^\circ\mathrm{C}", True), ("20", r"21^\circ C", False),
    (r"33\frac{1}{3}\%", r"33\frac13\%", True), (r"\frac{100}{3}\%", r"\frac{100}{3}", True), (r"\frac{100}{3}", r"\frac{100}{3}\%", True),
    (r"\frac{1}{2}\%", r"\frac{1}{3}\%", False),
    (r"\sqrt{2}\%", r"\sqrt{2}", True), ("18", r"\text{18 dollars}", True), ("18", r"\textbf{18 dollars}", True),
    ("2", r"\text{2 hours}", True), ("18", r"\text{19 eggs}", False),
    ("12", r"12\text{ or 13}", False), ("12", r"12 \text{, 13}", False), ("12", r"12\text{ (or 13)}", False), ("12", r"12\text{ if x>0, 13 otherwise}", False),
    ("12", r"12\text{ million}", False), ("12000000", r"12\text{ million}", True), ("5 million", "5,000,000", True), ("2500000", "2.5 million dollars", True),
    ("2500000", r"\$2.5 \text{ million}", True), ("24", "2 dozen", True), ("24", "3 dozen", False), ("5 million", "5", False), ("500000", "5 hundred thousand", True),
    ("-3000", "-3 Thousand", True), ("7", "5 million plus 2", False), ("5 million", "5 billion", False), ("1234", "1.234 thousand", True),
    ("5", r"\approx 5", True), ("5", "approximately 5", True), ("5", "\u2248 6", False), ("5", r"5\text{i}", False), ("5i", r"5\mathrm{i}", True), ("5", "5 quarters", True),
    ("5", "5 thousandth", False), ("5", "5 pairs", True), ("5", "5 more than x", False), ("5", "5 more", True),
    ("5 thousandths", "5000", False), ("5", "5 thousandths", False),
    ("5", r"\textcolor{red}{5}", True), (r"\textcolor{red}{5}", "5", True), ("5", r"\color{blue}5", True), ("5", r"{\color[rgb]{1,0,0} 5}", True),
    ("5", r"\textcolor{red}{6}", False),
    ("-7", "\u20137", True), ("\u20137", "-7", True), ("2, 2, 3", "3, 2, 2", True), ("left", "felt", False),
    ("12:30", "12{:}30", True), ("12:30", "12{:}45", False),
    ("2", r"2\text{ and a half}", False), ("3", r"3\text{ (mod 7)}", True), ("12", r"12\text{ squared units}", True), ("6", r"6\text{ ways out of 10}", True),
    ("12,13", r"12\text{ and }13", True),
    ("12", r"12\text{ m/s}^2", True), ("12.5", r"12.5\%", True), (r"12.5\%", "12.5", True), ("-10", r"-10\%", True), ("-10", r"10\%", False), ("12.5", r"12.6\%", False),
    ("0.125", r"12.5\%", True),
    ("14/3", r"\mathbf{\frac{14}{3}}", True), ("12", r"\boldsymbol{12}", True), (r"3\sqrt{13}", r"\mathbf{3\sqrt{13}}", True), ("13", r"\mathbf{3\sqrt{13}}", False),
    ("12", r"\underline{12}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1 \\[4pt] 2\end{pmatrix}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2 \\[4pt] 1\end{pmatrix}", False),
    ("18", "18 dollars", True), ("18", "18 eggs per day", True), ("18", "17 eggs", False), ("18", "18 million", False), ("5", "5 or 6", False), ("2xy", "2yx", True),
    ("5", "5 sin x", False), ("90", "90\u00b0", True), ("-7x", "\u22127x", True), ("\u221e", r"\infty", True), ("12x", "3\u00b74x", True), ("x^2", "x\u00b2", True),
    (r"\sqrt{3}", "\u221a3", True), (r"2\sqrt{12}", "2\u221a12", True), (r"\sqrt{3}", "sqrt(3)", True), (r"\sqrt{3}", "\u221a4", False), ("5", "\u20ac5", True),
    (r"(-\infty, 3)", "(\u2212\u221e, 3)", True), ("5", "5\\ ", True), ("x+5", "x~+~5", True),
    (r"\frac{3}{2}", "1 1/2", True), (r"\frac{11}{2}", "1 1/2", False), ("-2.5", "-2 1/2", True),
    ("58500", "x = 58,500", True), ("58500", "x = 58{,}500", True), ("58500", r"58,500\%", True), (r"58500\pi", r"58,500\pi", True), ("58500", "x = 58,501", False),
    ("(1,234)", "1234", False), (r"\{1,234\}", "234, 1", True),
    ("58,500", "x=58500", True), ("100, 200", "200, 100", True), ("100, 200", "100200", False), ("5, 120", "5120", False),
    ("18", "18 eggs.", True), ("18", "17 eggs.", False), (r"\frac{1}{3}", r"0.\overline{3}", True), ("1/3", r"0.\bar{3}", True), (r"0.1\overline{6}", "1/6", True),
    (r"\frac{4}{33}", r"0.\overline{12}", True), (r"0.\overline{3}", "0.3", False), (r"0.\overline{3}", r"0.3\overline{3}", True), ("52_8", "52_9", False), ("52_8", "52", True),
    ("12", "12 m/s", True), ("12", "12 km/h", True), ("12", "12 cm^2", True), ("12", "12 cm\u00b2", True), ("12", "13 cm\u00b2", False), ("3", "3 in", True), ("8", "8 L", True),
    ("5", "5 sec x", False), ("5", "5 exp x", False), ("5", "5 sinh x", False), ("5", "5 arcsin x", False), ("5", "5 cosec x", False), ("5", "5 lnx", False),
    ("4", "4 root three", False), ("5", "5 squared", False), ("5", "5 dozen", False), ("5", "5 tenths", False), ("5", "5 alpha", False),
    ("(-1,6)", r"\big(-1,6\big)", True), ("(-1,6)", r"\bigl(-1,\, 6\bigr)", True), ("(-1,6)", r"\Big(6,-1\Big)", False),
    ("12", "\uff11\uff12", True), ("12", "\uff11\uff13", False), ("(1,2)", "\uff08\uff11\uff0c\uff12\uff09", True), ("4", "4\u3002", True), ("4", "\u200b4\ufeff", True),
    ("1/2", "\u00bd", True), ("1/2", "1\u20442", True), ("-1/2", "\u2212\u00bd", True), ("3/2", "1\u00bd", True), ("1/2", "1\u00bd", False), ("0.75", "\u00be", True),
    (r"\emptyset", r"\varnothing", True), (r"\emptyset", "\u2205", True), (r"\varnothing", r"\{1\}", False), ("True", "true", True), ("False", r"\text{true}", False),
    ("0.001", "1e-3", True), ("1500", "1.5e3", True), ("1500", "1.5e4", False), ("1e-3", "0.001", True),
    ("1", "10\u00b2\u2070", False), ("2^{64}", "2\u2076\u2074", True), ("x^{12}", "x\u00b9\u00b2", True), ("0.0001", "10\u207b\u2074", True), ("10\u207b\u2074", "0.001", False),
    ("4", "4\uff5d, 5, 6, 7", False), ("4", "4\uff5d or 5", False), (r"\{1,2\}", "\uff5b1\uff0c2\uff5d", True), ("1234", "1\uff0c234", False),
    ("x^4", "x\u2074", True), ("x4", "x\u2074", False), ("x^5", "x\u2074", False),
    # math-verify's numbers: 0 is what is below 1e-15, decimals end after six places; its signs outside groups only; its ratios nested quotients
    (r"1-\frac{1}{2^{2023}}", r"1-\frac{1}{2^{2022}}", False), (r"1-\frac{1}{2^{2023}}", r"\frac{2^{2023}-1}{2^{2023}}", True),
    (r"2-\frac{1}{2^{98}}", r"2-\frac{1}{2^{99}}", False), (r"1-\frac{1}{2025!}", r"1-\frac{1}{2024!}", False), (r"1-\frac{1}{2025!}", r"\frac{2025!-1}{2025!}", True),
    ("2^{-60}", "2^{-61}", False), ("2^{-60}", r"\frac{1}{2^{60}}", True), (r"6.63\times10^{-34}", r"9.11\times10^{-31}", False),
    (r"1.6\times 10^{-19}", r"16\times10^{-20}", True), (r"2-\frac{1}{2^{99}}, 3", r"2-\frac{1}{2^{98}}, 3", False), (r"2-\frac{1}{2^{99}}, 3", r"3, 2-\frac{1}{2^{99}}", True),
    (".0000672", r"6.7\times10^{-5}", False), (".0000672", r"6.72\times10^{-5}", True), (r"0.0000004\text{ m}", r"0.0000001\text{ m}", False),
    ("(0.0000004, 1)", "(0.0000001, 1)", False), ("(0.0000004, 1)", "(0.0000004, 1.0)", True), (r"\frac{1\pm\sqrt{5}}{2}", r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}", True),
    (r"\frac{1\pm\sqrt{5}}{2}", r"x=\frac{1\pm\sqrt5}{2}", True), (r"\frac{1\pm\sqrt{5}}{2}", r"\frac{1 \pm \sqrt{3}}{2}", False),
    (r"\frac{1\pm\sqrt{5}}{2}", r"\frac{1+\sqrt5}{2}", False), (r"1 \pm \sqrt{19}", r"\frac{2\pm\sqrt{76}}{2}", True),
    (r"\frac{5}{2} \pm \frac{\sqrt{3}}{2}", r"\frac{5\pm\sqrt3}{2}", True), (r"-6 \pm 2\sqrt{5}", r"2(-3\pm\sqrt5)", True),
    (r"1, \frac{1\pm\sqrt5}{2}", r"\frac{1\pm\sqrt5}{2}, 1", True), (r"1, \frac{1\pm\sqrt5}{2}", r"1, \frac{1-\sqrt5}{2}, \frac{1+\sqrt5}{2}", True), ("1:2:3", "1:3:2", False),
    ("3:4:5", "6:8:10", True), ("3:4:5", "a:b:c = 3:4:5", True), (r"1:\sqrt{3}:2", r"1:2:\sqrt{3}", False), (r"1:\sqrt{3}:2", r"1 : \sqrt3 : 2", True),
    (r"0.\dot{3}", r"\frac13", True), (r"\frac16", r"0.1\dot{6}", True), ("52_8", "(52)_8", True), ("(52)_8", "52_{8}", True), (r"90^\circ", r"90\degree", True),
    ("37.7", r"12\pi \approx 37.7", True), ("37.7", r"12\pi \approx 37.8", False), ("6366", r"\frac{20000}{\pi} \approx 6366", True), ("ABD", "A, B, D", True),
    ("A,C", "AC", True), ("ABD", "A, B", False), ("2000", "\xa52000", True), ("2000", "\u20b92000", True), ("2000", r"\pounds 2000", True), ("36", "USD 36", True),
    ("15", r"15\,\mathrm{m\,s^{-1}}", True), ("15", r"15\,\mathrm{m^2}", True), ("15", r"15\,\mathrm{kg\cdot m/s^2}", True), (r"\infty", r"+\infty", True),
    (r"-\infty", r"\infty", False), ("e^{10}", "e^{10} + 0", True), ("10^{100}", "10^{100}+1", False), (r"\pm 3", "3, -3", True), (r"(1, \pm 2)", "(1,2),(1,-2)", True),
    (r"\frac{\pi}{1000}", "0.003142", False), (r"\frac{\pi}{1000}", "0.0031415927", True), ("[0,1)", "[0,1)", True), ("[0,1)", r"\left[0,\frac{2}{2}\right)", True),
    (r"15\text{ m}^2", r"15\,\mathrm{m^2}", True), ("15", r"16\,\mathrm{m^2}", False), (r"\frac{1}{2}", r"\frac{1}{2}\,\mathrm{m^2}", True), ("15", r"15 \text{ m}^2", True),
    ("15", r"15 \text{ cm}^{2}", True), ("15", r"15 \mathrm{~cm}^{2}", True), ("2^{100000}", "2^{100001}", False), ("3^{5000}", "9^{2500}", True),
    ("2024^{2024}", r"2024^{2023}\cdot 2024", True),
    (r"\frac{", "5", None), ("\\sqrt{", "\\sqrt{}", None), ("北京", "上海", False), ("北京", "北京", True), ("", "5", None),
]


@pytest.mark.parametrize("gold, answer, verdict", CASES)
def test_hand_cases(gold: str, answer: str, verdict: bool | None) -> None:
    assert grade(box(answer), gold) is verdict
    assert sum(grade_stats.values()) == (verdict is None)


def test_no_answer_is_wrong_and_not_ungraded() -> None:
    assert grade_all(["it is 5", r"<think>\boxed{5}", r"<think>\boxed{5}</think> so", "", r"\boxed{}"], ["5"] * 5) == [False] * 5
    assert not grade_stats


def test_a_batch_keeps_its_order_and_counts_each_ungraded_row() -> None:
    golds = [r"\frac12", "5", r"\frac{", "x+1", r"\frac{"]
    assert grade_all([box(a) for a in ["0.5", "6", "1", "1+x", "1"]], golds) == [True, False, None, True, None]
    assert grade_stats == {"gold_unparsable": 2}
    assert grade_all([], []) == []
    with pytest.raises(ValueError):
        grade_all(["a", "b"], ["c"])


def test_equal_answers_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ev, "ask", lambda pair, seconds: asked.append(pair) or "True")
    assert grade_all([box("x+1")] * 8, ["1+x"] * 8) == [True] * 8
    assert asked == [("1+x", "x+1")]

# ------------------------------------------------------------------------------------------------ hostile text, dying workers

HOSTILE = ["9^9^9^9", "9^{9^{9^9}}", "10^{10^{10}}", "(10^9)!", r"\sum_{n=1}^{10^9} \frac{1}{n^{3.3}}", "{" * 900 + "1" + "}" * 900, "(" * 500 + "1" + ")" * 500,
           r"\frac{1}{" * 200 + "2" + "}" * 200, "x^{" * 300 + "2" + "}" * 300, r"\int " * 300, "\ud800\udfff", "\x00\x01\n\r\u2028", "😀" * 900, "$" * 1999,
           "\\" * 1999, "True", '"]\nTrue\n', r"\begin{pmatrix}" * 60, "__import__('os')"]


def test_hostile_answers_neither_hang_nor_pass() -> None:
    begin = time.monotonic()
    ev._idle.append(ev.start())
    start_seconds, begin = time.monotonic() - begin, time.monotonic()
    verdicts = grade_all([box(a) for a in HOSTILE], ["5"] * len(HOSTILE), seconds=0.4)
    assert time.monotonic() - begin < len(HOSTILE) * (0.4 + 3 * start_seconds)          # at worst a deadline and new workers for each
    assert True not in verdicts
    assert grade_stats["deadline"] >= 1                              # 10^{10^{10}} alone cannot be done in time
    assert verdicts[HOSTILE.index("10^{10^{10}}")] is None
    assert grade(box("1+x"), "x+1") is True                          # and the next question is answered


@pytest.mark.parametrize("text", ["{" * 100_000, "\\boxed{" * 15_000, "\\boxed{" + "{" * 50_000 + "}" * 50_000 + "}", "\\" * 100_000, "<answer>" * 12_000,
                                  "</answer>" * 11_000, "<think>" * 15_000, "\\boxed" + " " * 100_000, "\\text{" * 17_000, "</think>" * 12_000,
                                  "\\boxed{1" + " " * 100_000 + "1}", "\\boxed{" + "9" * 100_000 + "}", "1," * 50_000, "\ud800" * 100_000])
def test_long_texts_take_linear_time_and_meet_no_process(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "ask", lambda pair, seconds: pytest.fail("a long text reached a worker"))
    begin = time.process_time()
    assert grade(text, "5") is False
    assert grade("\\boxed{5}", text) is None or len(text) <= ev.MAX_ANSWER
    normalise(text)
    assert time.process_time() - begin < 2


def test_a_killed_worker_is_replaced() -> None:
    assert grade_all([box(f"{n}+x") for n in range(9)], [f"x+{n}" for n in range(9)]) == [True] * 9
    killed = [worker.pid for worker in ev._idle]
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert grade(box("2+x"), "x+2") is True                          # at once: no wait between the kill and the question
    assert killed[-1] not in {worker.pid for worker in ev._idle}
    assert grade_all([box(f"{n}+y") for n in range(9)], [f"y+{n}" for n in range(9)]) == [True] * 9 and not grade_stats


def test_a_worker_killed_while_it_works_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    workers = []
    monkeypatch.setattr(ev, "start", lambda start=ev.start: workers.append(start()) or workers[-1])
    with ThreadPoolExecutor(1) as pool:
        question = pool.submit(ev.grade, box("10^{10^{10}}"), "5", 2.0)
        while not workers:
            time.sleep(0.01)
        time.sleep(0.3)                                              # it is at work now
        os.kill(workers[0].pid, signal.SIGKILL)
        assert question.result(timeout=60) is None
    assert len(workers) == 2 and grade_stats == {"deadline": 1}      # the second try ran into its own deadline
    assert grade(box("2+x"), "x+2") is True


def test_a_worker_that_dies_on_its_question_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    log = tmp_path / "tries"
    monkeypatch.setattr(ev, "WORKER", f'import os; os.write(1, b"ready\\n"); input(); open({str(log)!r}, "a").write("x")')
    assert grade(box("1+x"), "x+1") is None
    assert grade_stats == {"worker_died": 1} and log.read_text() == "xx"       # it had a second chance


@pytest.mark.parametrize("place, crash", [
    ("def judge(gold, answer):", "def judge(gold, answer):\n    raise RecursionError"),
    ('say("ready")', "import math_verify.grader\ndef crash(*_): raise MemoryError\nmath_verify.grader.sympy_expr_eq = crash\nsay('ready')"),
])
def test_a_crash_inside_the_comparison_is_none_and_counted(place: str, crash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    monkeypatch.setattr(ev, "WORKER", ev.WORKER.replace(place, crash))
    assert grade_all([box("1+x"), box("2+x")], ["x+1", "x+2"]) == [None, None]
    assert grade_stats == {"worker_error": 2} and ev._idle == []


def test_what_a_library_prints_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    monkeypatch.setattr(ev, "WORKER", ev.WORKER.replace("def judge(gold, answer):", "def judge(gold, answer):\n    print('True', flush=True)"))
    assert grade(box("1+x"), "x+2") is False


def test_workers_are_renewed_after_a_while_and_nobody_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    monkeypatch.setattr(ev, "WORKER", ev.WORKER.replace("sys.stdin, 1000", "sys.stdin, 4"))
    started = []
    monkeypatch.setattr(ev, "start", lambda start=ev.start: started.append(start()) or started[-1])
    assert grade_all([box(f"{n}+x") for n in range(12)], [f"x+{n}" for n in range(12)]) == [True] * 12
    assert 3 <= len(started) <= 6 and not grade_stats


@pytest.mark.slow
def test_an_idle_worker_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    grade(box("1+x"), "x+1")
    ev.grade(box("2+x"), "x+2", 0.9)
    time.sleep(3)                                                    # its alarm was set to 2 s
    assert ev._idle and all(worker.poll() is None for worker in ev._idle)


def test_math_verify_missing_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    monkeypatch.setattr(ev, "WORKER", ev.WORKER.replace("from math_verify", "from math_verify_is_not_here"))
    with pytest.raises(ImportError, match="pip install math-verify"):
        grade(box("1+x"), "x+1")
    assert grade(box("5"), "5") is True                              # what needs no process still works


def test_a_worker_that_never_gets_ready_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    monkeypatch.setattr(ev, "START_SECONDS", 0.3)
    monkeypatch.setattr(ev, "WORKER", "import time; time.sleep(60)")
    monkeypatch.setattr(ev, "_works", set())
    begin = time.monotonic()
    with pytest.raises(ChildProcessError, match="deadline"):
        grade(box("1+x"), "x+1")
    assert time.monotonic() - begin < 30
    ev._works.add(True)                                              # once one was ready a run does not end for a machine that is busy: the row is ungraded, and counted
    assert grade_all([box("1+x"), box("7")], ["x+1", "7"]) == [None, True] and grade_stats == {"worker_died": 1}


def test_a_worker_that_gets_ready_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    monkeypatch.setattr(ev, "_works", set())
    assert grade(box("1+x"), "x+1") is True and ev._works


def test_workers_are_few_and_kept_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    assert grade_all([box(f"{n}+x") for n in range(20)], [f"x+{n}" for n in range(20)]) == [True] * 20
    pids = {worker.pid for worker in ev._idle}
    assert 1 <= len(pids) <= min(4, os.cpu_count())
    assert grade(box("y+z"), "z+y") is True and {worker.pid for worker in ev._idle} == pids


def test_a_fresh_worker_has_compared_before_it_takes_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first comparison imports much of sympy: that is no part of a pair's deadline."""
    monkeypatch.setattr(ev, "WORKER", ev.WORKER.replace("for line in", "before = set(sys.modules)\nfor line in").replace(
        "    signal.alarm(0)", "    say(sum(name.startswith('sympy') for name in set(sys.modules) - before))"))
    worker = ev.start()
    worker.stdin.write(json.dumps(["x+1", r"\frac{2+2x}{2}", 60]).encode() + b"\n")
    said = worker.communicate()[0].decode().split()
    assert said[0] == "True" and int(said[1]) == 0


def test_ctrl_c_in_the_terminal_reaches_the_parent_alone() -> None:
    code = "import signal, grade\nsignal.signal(signal.SIGINT, lambda *_: print('asked', flush=True))\nprint('go', flush=True)\n" \
           "print(grade.start().pid)\nprint(grade.grade(r'\\boxed{1+x}', 'x+1', 60.0))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout.readline() == "go\n"
    time.sleep(0.3)                                                  # a worker is on its way
    os.killpg(parent.pid, signal.SIGINT)                             # what the terminal sends
    said = parent.communicate()[0].split()
    assert said[0] == "asked" and said[-1] == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_are_limited_and_kept_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "_idle", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sympy.py").write_text("raise SystemExit('imported from the current folder')")
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    assert grade(box("x+1"), "1+x") is True
    resource.setrlimit(resource.RLIMIT_CORE, before)
    limits = Path(f"/proc/{ev._idle[0].pid}/limits").read_text()
    assert re.search(r"Max address space\s+2147483648", limits) and re.search(r"Max core file size\s+0", limits)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_outlives_a_killed_parent_by_seconds_only() -> None:
    code = "import grade as ev; start = ev.start\ndef told(): w = start(); print(w.pid, flush=True); return w\n" \
           "ev.start = told; ev.grade(r'\\boxed{10^{10^{10}}}', '5', 3.0)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    state = Path(f"/proc/{int(parent.stdout.readline())}/stat")
    time.sleep(0.5)                                                  # the question is under way
    parent.kill()
    parent.communicate()

    def alive() -> bool:
        return state.exists() and state.read_text().split()[2] != "Z"

    assert alive()                                                   # nobody told it
    end = time.monotonic() + 15
    while alive() and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive()


PIECES = ["\\boxed{", "}", "{", "<think>", "</think>", "<answer>", "</answer>", "\\frac", "\\text{", "$", "1", "12", ",", ".", "/", "-", " ", "x", "C", "(", ")",
          "\\", "\\{", "\\sqrt", "^", "_", "%", "\n", "\ud800", "é", "٣", "\\pm", "=", "\\infty", "[", "]", "\x00"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=14), st.lists(st.sampled_from(PIECES), max_size=6))
def test_grade_never_raises_and_has_three_values(text: list[str], gold: list[str]) -> None:
    before = grade_stats.total()
    verdicts = grade_all(["".join(text), box("".join(text))], ["".join(gold)] * 2, seconds=1.0)
    assert all(v is True or v is False or v is None for v in verdicts)
    assert grade_stats.total() - before == verdicts.count(None)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_reading_survives_any_text_and_a_box_can_be_read_back(text: str) -> None:
    final_answer(text)
    if text.count("{") == text.count("}") == 0 and not text.endswith("\\") and "think>" not in text:
        assert final_answer("\\boxed{" + text + "}") == text.strip()

# ------------------------------------------------------------------------------------------------ real answer sets

def golds(name: str) -> list[str]:
    file = DATA / {"math500": "math500.json", "aime24": "aime24.jsonl", "gsm8k": "gsm8k_test.jsonl"}[name]
    if not file.is_file():
        pytest.skip(f"no {file}")
    if name == "math500":
        return [row["answer"] for row in json.loads(file.read_text(encoding="utf-8"))]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [str(row["answer"]).split("####")[-1].strip() for row in rows]


def agreement(golds: list[str]) -> Counter[str]:
    """How many golds are graded right against themselves (alone, in prose behind thinking) and wrong against another problem's differing gold."""
    rng = random.Random(0)
    other = [rng.choice([h for h in sorted(set(golds)) if normalise(h) != normalise(g)]) for g in sorted(golds)]
    counts: Counter[str] = Counter(rows=len(golds))
    for kind, texts, wanted in (("itself", [box(g) for g in sorted(golds)], True),
                                ("prose", [f"<think>Is it \\boxed{{0}}? No.</think>\nHence {{so}} we get\n\\[\n\\boxed{{ {g} }}.\n\\] Done." for g in sorted(golds)], True),
                                ("other", [box(h) for h in other], False)):
        verdicts = grade_all(texts, sorted(golds))
        counts[kind] = verdicts.count(wanted)
        counts["ungraded"] += verdicts.count(None)
    return counts


@pytest.mark.parametrize("name, every", [("math500", 4), ("aime24", 1), ("gsm8k", 4)])
def test_real_golds_agree(name: str, every: int) -> None:
    counts = agreement(golds(name)[::every])
    assert counts["itself"] == counts["prose"] == counts["other"] == counts["rows"] and counts["ungraded"] == 0, counts


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("math500", 500), ("aime24", 30), ("gsm8k", 1319)])
def test_all_real_golds_agree(name: str, rows: int) -> None:
    counts = agreement(golds(name))
    print(name, dict(counts))
    assert counts["rows"] == counts["itself"] == counts["prose"] == counts["other"] == rows and counts["ungraded"] == 0, counts


@pytest.mark.slow
def test_every_non_integer_math500_gold_is_read_by_math_verify_itself() -> None:
    """The string path would hide a gold that math-verify cannot read; `ask` goes to it straight."""
    hard = sorted({g for g in golds("math500") if not re.fullmatch(r"-?[0-9]+", g)})
    assert [g for g in hard if ev.ask((g, g), 60.0) != "True"] == []
    assert [(g, h) for g, h in zip(hard, hard[7:] + hard[:7]) if ev.ask((g, h), 60.0) != "False"] == []

# ------------------------------------------------------------------------------------------------ statistics

def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)
    assert pass_at_k(64, 20, 1) == pytest.approx(20 / 64) and pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (4, 5, 2), (4, -1, 2), (4, 2, 0), (4, 2, -1), (-1, 0, 1), (0, 0, 0)])
def test_pass_at_k_refuses(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(n, c, k)


def vote(answers: list[str | None], right: str, k: int) -> float:
    """maj@k by brute force: every subset, shared ties."""
    scores = []
    for subset in itertools.combinations(answers, k):
        count = Counter(a for a in subset if a is not None)
        top = [a for a in count if count[a] == max(count.values())]
        scores.append((right in top) / len(top) if top else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("answers", [["1", "1", "2", "3"], ["1", "2"], ["2", "2", "1"], ["1", None, None, "2"], [None, None, "1"], ["2", "3"], list("1112233")])
def test_majority_at_k_is_the_mean_over_subsets(answers: list[str | None]) -> None:
    for k in range(1, len(answers) + 1):
        assert majority_at_k(answers, [a == "1" for a in answers], k) == pytest.approx(vote(answers, "1", k))


def test_majority_at_k_edges() -> None:
    assert majority_at_k(["0.5", "$0.5$", r"\text{0.5}", "7", "7"], [True] * 3 + [False] * 2, 5) == 1.0        # votes go by normalised string
    assert majority_at_k([r"\frac{1}{2}", "0.5", r"\frac12", "7", "7"], [True] * 3 + [False] * 2, 5) == 1.0        # three right ones are one answer
    assert majority_at_k([r"\frac{1}{2}", "0.5", "7", "7", "7"], [True] * 2 + [False] * 3, 5) == 0.0
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    assert math.isnan(majority_at_k([None, None], [None, None], 2)) and math.isnan(majority_at_k(["5", None, None, None], [None] * 4, 2))      # nothing was graded
    assert majority_at_k([None, None], [False, None], 2) == 0.0 and majority_at_k([None, None, None], [False, None, None], 1) == 0.0
    assert math.isnan(majority_at_k(["a", "a", "b"], [None, None, True], 3))                                   # the winner was not graded
    assert majority_at_k(["a", "a", "b"], [None, None, True], 1) == 1.0                                        # only draws that were graded count
    assert majority_at_k(["a", "a", "b"], [None, True, False], 3) == 1.0                                       # one graded member speaks for its class
    for k in (0, 3):
        with pytest.raises(ValueError, match="maj@k"):
            majority_at_k(["a", "b"], [True, False], k)
    with pytest.raises(ValueError, match="maj@k"):
        majority_at_k(["a", "b"], [True], 1)


def test_majority_at_k_samples_where_subsets_are_many() -> None:
    answers = ["1"] * 9 + ["2"] * 7
    got, exact = majority_at_k(answers, [a == "1" for a in answers], 12), vote(answers, "1", 12)
    assert math.comb(16, 12) > 1000 and got != exact                 # it is a sample ...
    assert got == pytest.approx(exact, abs=4 * 0.5 / math.sqrt(1000))          # ... within four standard errors: drawing with replacement is 0.1 below
    assert got == majority_at_k(answers, [a == "1" for a in answers], 12)      # and always the same one


def test_interval_against_the_closed_form() -> None:
    mean, error, low, high = mean_interval(np.array([0.0, 1.0, 0.5, 0.25]))
    assert mean == 0.4375 and error == pytest.approx(0.213478, abs=1e-6)       # sd = 0.426956
    assert (low, high) == pytest.approx((0.4375 - 3.182446 * 0.213478, 0.4375 + 3.182446 * 0.213478), abs=1e-4)
    assert mean_interval(np.array([0.5, 0.5, 0.5])) == (0.5, 0.0, 0.5, 0.5)


# Student's t, 97.5 %, from tables
@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (10, 2.2281), (11, 2.2010), (15, 2.1314), (29, 2.0452), (60, 2.0003),
                                   (499, 1.9647), (10**6, 1.95997)])
def test_interval_uses_students_t(df: int, t: float) -> None:
    values = np.arange(df + 1.0)
    mean, error, low, high = mean_interval(values)
    assert (high - mean) / error == pytest.approx(t, rel=1e-3) and mean - low == pytest.approx(high - mean)


def test_interval_leaves_nan_out_and_knows_when_it_knows_nothing() -> None:
    assert mean_interval(np.array([1.0, math.nan, 0.0, math.nan])) == mean_interval(np.array([1.0, 0.0]))
    assert mean_interval(np.array([0.3, math.nan])) == (0.3, math.inf, -math.inf, math.inf)
    mean, *rest = mean_interval(np.array([math.nan]))
    assert math.isnan(mean) and rest == [math.inf, -math.inf, math.inf]


def test_interval_covers_at_the_stated_rate_and_counts_problems_not_samples() -> None:
    """30 problems of unlike difficulty, 8 samples each: 95 % of intervals hold the true mean; counting the 240 samples as independent would not."""
    rng, runs, held, naive = np.random.default_rng(0), 3000, 0, 0
    for _ in range(runs):
        difficulty = rng.beta(0.5, 0.5, size=30)                     # true mean 1/2
        right = rng.random((30, 8)) < difficulty[:, None]
        _, _, low, high = mean_interval(right.mean(1))
        held += low <= 0.5 <= high
        _, _, low, high = mean_interval(right.ravel().astype(float))
        naive += low <= 0.5 <= high
    assert held / runs == pytest.approx(0.95, abs=0.015)
    assert naive / runs < 0.75


def test_bootstrap_against_the_analytic_standard_error() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(200), rng.random(200)
    out = paired_bootstrap(a, b)
    error = (a - b).std() / math.sqrt(200)                           # the bootstrap's own standard error has ddof 0
    assert out["diff"] == pytest.approx((a - b).mean(), abs=1e-15)
    assert (out["high"] - out["low"]) / (2 * 1.96) == pytest.approx(error, rel=0.03)
    z = abs(out["diff"]) / error
    assert out["p"] == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)


def test_bootstrap_pairs_sides_and_repeats() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(30)
    better = hard + 0.05 + 0.01 * rng.standard_normal(30)            # a small gain on every problem: lost without pairing
    out, back = paired_bootstrap(better, hard), paired_bootstrap(hard, better)
    assert out["low"] > 0.04 and out["p"] < 0.001
    assert (back["diff"], back["low"], back["high"]) == pytest.approx((-out["diff"], -out["high"], -out["low"]))
    assert out == paired_bootstrap(better, hard) and out != paired_bootstrap(better, hard, seed=1)
    wide = paired_bootstrap(better, rng.permutation(hard))
    assert wide["low"] < 0 < wide["high"]
    assert paired_bootstrap(hard, hard) == {"diff": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    tenths = np.array([1, 2, -3, 3])                                 # many resampled sums are 0, in tenths 0 but for rounding: a tie, which counts on both sides
    assert paired_bootstrap(tenths / 10, 0 * tenths)["p"] == paired_bootstrap(tenths, 0 * tenths)["p"] > paired_bootstrap(tenths + 0.01, 0 * tenths)["p"]


def test_an_interval_that_leaves_0_out_has_p_below_5_percent() -> None:
    """Also where 0 lies between the two resampled means at the interval's end."""
    gain, zero = np.random.default_rng(3).normal(size=30), np.zeros(30)
    rng = np.random.default_rng(0)
    means = np.sort([gain[rng.integers(30, size=30)].mean() for _ in range(10000)])
    for at in (248, 249, 250, 251):
        out = paired_bootstrap(gain - (means[at - 1] + means[at]) / 2, zero)          # so that just `at` of the means are below 0
        assert out["p"] == pytest.approx(2 * (at + 1) / 10001) and (out["low"] > 0) == (at < 250) and (out["low"] <= 0 or out["p"] < 0.05)


def test_bootstrap_false_alarm_rate() -> None:
    rng, runs = np.random.default_rng(3), 250
    alarms = sum(paired_bootstrap(rng.random(60), rng.random(60), samples=200, seed=i)["p"] < 0.05 for i in range(runs))
    assert 0.02 < alarms / runs < 0.09                               # 5 % nominal; a percentile bootstrap over 60 runs slightly above it


def test_bootstrap_leaves_nan_out_and_refuses_unequal_problems() -> None:
    a, b = np.array([1.0, 0.5, math.nan, 0.2]), np.array([0.5, 0.5, 0.1, 0.1])
    assert paired_bootstrap(a, b) == paired_bootstrap(a[[0, 1, 3]], b[[0, 1, 3]])
    for left, right in (([1.0, 0.0], [1.0]), ([math.nan, 1.0], [1.0, math.nan]), ([], []), ([[1.0, 0.0]], [[1.0, 0.0]]), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="paired"):
            paired_bootstrap(np.array(left), np.array(right))
