r"""Is the answer right, and how sure is the figure? Graded final answers, and statistics that know how few problems a benchmark has.

Grading is three-valued: right, wrong, or None = could not be graded (gold unparsable, deadline passed, worker died). None never becomes 0.
An answer is text from a model, so sympy meets it only in killable worker processes; what equal strings or exact fractions decide never gets there.

    pass@k   = 1 - C(n-c, k) / C(n, k)                        n samples of one problem, c of them right (Chen et al. 2021, arXiv 2107.03374, eq. 1)
    interval = mean +- t(0.975, N-1) * sd(p_1..p_N) / sqrt(N) p_i = mean@k of problem i: the N problems are the clusters, not the N*k samples
"""
import atexit
import contextlib
import json
import math
import os
import re
import select
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from itertools import combinations

import numpy as np

# ------------------------------------------------------------------------------------------------ reading an answer

MAX_ANSWER = 2000                      # characters: a longer final answer is wrong, a longer gold cannot be graded
BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)    # \{ and \} are text, not grouping
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,30}/0{0,9}[1-9][0-9]{0,20}|[0-9]{0,30}\.[0-9]{1,30}|[0-9]{1,30})")
LISTED = re.compile(rf"(?:{NUMBER.pattern},)+{NUMBER.pattern}")
OPTION = re.compile(r"\W*(?:(?:the)?(?:correct)?(?:option|choice|answer)(?:is)?\W*(?:option)?\W*)?([A-J])(?:[])}.:*].*)?", re.IGNORECASE | re.DOTALL)   # B, (B) and its text
NAMED = re.compile(r"\W*([A-J])\}?(?:\s+[-\u2013]\s+|\s*\u2014\s*|,\s+|\s*[({]\s*\(?)[A-Za-z]{3}")     # B - its text; not D-glucose, nor the difference B - x
LABELS = re.compile(r"\W*([A-J])([]).:]).*[\s(](?!\1)[A-J]\2(?!\w)", re.DOTALL)          # (C) 1 (D) 2: another letter, labelled like the first
THOUSANDS = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+"
GROUPED = re.compile(rf"[+-]?\s*(?:{THOUSANDS}|[1-9][0-9]{{0,2}}(?: [0-9]{{3}})+)(?:\.[0-9]+)?")
UNGLUED = re.compile(rf"{THOUSANDS}$|.*(?:(?<!\\)[(\[]|\\(?:\{{|langle))", re.DOTALL)     # normalise's own case, and tuples, intervals, sets
REPEATING = re.compile(r"(?<![0-9])([0-9]{0,15})\.([0-9]{0,15})\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,15})\}|([0-9]))")
BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?_\{?\(?([0-9]+)\)?\}?")            # 52_8, (52)_8: math-verify passes over the base
RATIO = re.compile(r"(?:[^:=]+=)?([^:=]+(?::[^:=]+){2,})")              # 1:2:3, which math-verify takes for (1/2)/3
# in front of what a unit's name is not: 5 million dollars, 5 mod 7, 2 sin x
NO_UNIT = r"""hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|(?:four|fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|million|billion)ths?|and|over|plus|minus
    |mod|modulo|choose|factorial|squared|cubed|(?:more|less)\ than|(?:(?:square|cube)\ )?root|(?:arc)?(?:sin|cos|tan|cot|csc|cosec)h?|sec\ [a-z]+$|sech|arcsec|log|ln[a-z]?
    |exp|max|sqrt|pi|d[txy]|alpha|beta|gamma|delta|theta|lambda|sigma|omega|phi"""
SHORT = "(?:[kcm]m|in|ft|yd|mi|units?)"                                  # may have a power; a letter alone may not: 5 s^2 can be a polynomial
UNIT = re.compile(rf"""(?<=[0-9])\ +(?!(?i:{NO_UNIT})\b)
    ([A-Za-z]{{3}}[A-Za-z/\ ]*|L|in|(?:(?:{SHORT}|[kcm]?g|m?L|m)/(?:{SHORT}|min|hr|[smhgL])|{SHORT}(?=\^))(?:\^(?:[23]|\{{[23]\}}))?)$""", re.VERBOSE)
UNITS = re.compile(rf"""(?:(?<=[0-9}}])|(?<=\\pi)|(?<=\\circ))(?:\\[\ ,;:]|[\s~])*\\(?:text|textrm|mbox|(?P<up>mathrm|operatorname))\s*\{{(?:\\?[\ ,;:~])*(?!(?i:{NO_UNIT})\b|e\^)
    (?=[A-Za-z~\ ]*[\\^/*]|(?(up)(?:(?![A-Z]+\}})[A-Za-z]{{2}}|[ACFJKLNTVWghms]\}}|(?:[KMGT]?B|USD|EUR)\}})|(?!)))      # upright its letters are enough: cm, m, MB; not x, e, AB
    [A-Za-z](?:\\?[\ ,;:~]|\\cdot|[/*]|[A-Za-z]|\^-?[0-9]|\^\{{-?[0-9]\}})*\}}$""", re.VERBOSE)           # m\,s^{{-1}}, kg\cdot m/s^2
MORE = re.compile(rf"""(?<=[0-9])(?:\\[\ ,;:]|\s)*\\(?:text|textrm|mbox|mathrm)\s*\{{\s*               # 12\text{{ or 13}}, 18\text{{ million}}: no unit either
    (?=(?:[,;]|\(?(?:or|if|to)\b)[^{{}}]*[0-9]|(?!mod|(?:squared|cubed)\ +[a-z])(?i:{NO_UNIT})\b)([^{{}}]*)\}}""", re.VERBOSE)
STYLED = re.compile(r"\\(?:math(?:bf|rm|it|sf)|boldsymbol|bm|pmb|underline)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}$")      # around all that follows
PARTS = re.compile(r"""\\(?:text|textrm|mbox|mathrm)\s*\{(?!\s*(?:and|or|to)?\s*\})[^{}]*[A-Za-z][^{}]*\}\s*[,;]?\s*-?[0-9]""")            # 1 \text{ hour } 20 \text{ min}
COLOUR = re.compile(r"\\(?:text)?color\s*(?:\[[A-Za-z]+\]\s*)?\{[^{}]*\}")                                                                   # what it colours stays
LARGE = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALED = re.compile(rf"""((?:\\?\$)?[+-]?)([0-9]{{1,30}}(?:\.[0-9]{{1,30}})?)                                                                              # 2.5 million dollars
    ((?:\s+(?:{'|'.join(LARGE)})(?![A-Za-z])){{1,3}})((?:\s+[A-Za-z]+)*)""", re.IGNORECASE | re.VERBOSE)
WRAPPED = re.compile(r"^\s*\\(?:text(?:bf|it|rm)?|mbox)\s*\{\s*((?:\\?\$)?[0-9][^{}\\]*)\}\s*$")                                           # \text{18 dollars}
UNICODE = str.maketrans({**dict.fromkeys("\u2212\u2013", "-"), "\u00b7": "\\cdot ", "\u221e": "\\infty ", "\u00b0": "^\\circ ", **dict.fromkeys("\u20ac\u00a3\u00a5\u20b9", ""),
                         "~": " ", "\u2205": "\\emptyset ", "\u00a0": " ", "\u202f": " ", "\u2044": "/", "\u3002": ".", "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}",
                         "\u00be": "\\frac{3}{4}", **{chr(0xff01 + i): chr(0x21 + i) for i in range(94)}, "\uff0c": ", ", "\uff5b": "\\{", "\uff5d": "\\}",     # full width
                         **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff")})                                                                # no width at all
RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
LOWERED = str.maketrans(RAISED + "\u207b", "0123456789-")


def final_answer(text: str) -> str | None:
    """A completion's answer: the last closed `\\boxed{}` (or `\\fbox{}`) behind the last `</think>`, else the last `<answer>` tag there, else None.
    Thinking that was opened and never closed has given none; without any think tag the whole text counts. Linear in any text."""
    _, closed, final = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    open_at, best = [], (0, 0)                                           # content start of each open brace (0 if no box), of the last closed box
    for token in BRACES.finditer(final):
        if token[0].endswith("{") and token[0] != "\\{":
            open_at.append(token.end() if token[0] != "{" else 0)
        elif token[0] == "}" and open_at:
            best = max(best, (open_at.pop(), token.start()))
    if best[0]:
        return final[slice(*best)].strip()
    before, closed, _ = final.rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return answer.strip() if closed and opened else None


def as_latex(answer: str) -> str:
    """The answer with what is common in plain text written as LaTeX that math-verify reads: Unicode signs, sqrt(3), mixed numbers, thousands separators inside
    a longer answer, 1e-3, repeating decimals as fractions, units (it reads past \\text{ eggs}, not past eggs)."""
    if len(answer) > MAX_ANSWER:
        return answer
    answer = WRAPPED.sub(r"\1", answer)
    if re.search(r"[0-9})]\s*\\mathrm\s*\{\s*~", answer):             # 75 \mathrm{~km} / \mathrm{h}: units as texts are read past
        answer = re.sub(r"\\mathrm(?![a-zA-Z])", r"\\text", answer)
    answer = re.sub(r"\\degree(?![a-zA-Z])", r"^\\circ", COLOUR.sub("", answer).replace("{:}", ":").replace("{}^", "^"))
    text = re.sub(f"\u207b?[{RAISED}]+", lambda power: ("^{%s}" if power[0][1:] else "^%s") % power[0].translate(LOWERED), answer)
    text = re.sub(r"\\[bB]igg?[lrm]?(?![a-zA-Z])", "", re.sub(r"\\varnothing(?![a-zA-Z])", r"\\emptyset", text.translate(UNICODE)).rstrip(" \n."))
    text = UNITS.sub(r"\\text{ unit}", re.sub(r"(\^\s*(?:\\circ|\{\s*\\circ\s*\}))(?:\\?\s)*[CFK]$", r"\1", text.strip()))
    text = re.sub(r"\\\\\s*\[[0-9.]+ *(?:pt|mm|cm|ex|em)\]", r"\\\\", STYLED.sub(r"\1", MORE.sub(r" \1", text)))               # rows of a matrix, spaced
    text = re.sub(r"^(?:\\approx(?![a-zA-Z])|\u2248|\\pounds(?![a-zA-Z])|(?:approximately|about|around|USD|EUR|GBP|Rs\.?)\s)\s*", "", text)
    text = re.sub(r"(?<=[0-9])\s*\\(?:text|mathrm)\s*\{\s*i\s*\}", "i", text)          # upright, no unit
    text = re.sub(r"^([+-]?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})$", r"\1 \\cdot 10^{\2}", text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\,|,?\\!\s*)(?=[0-9]{3}(?![0-9]))", "", text)
    if not UNGLUED.match(text):                                          # x = 58,500, but not x^2,100 nor 1,234,5
        text = re.sub(rf"(?<![0-9,._^]){THOUSANDS}(?!,?[0-9])", lambda number: number[0].replace(",", ""), text)
    text = both_signs(REPEATING.sub(repeating, text))
    if scaled := SCALED.fullmatch(text.strip()):
        text = f"{scaled[1]}{Decimal(scaled[2]) * math.prod(LARGE[word] for word in scaled[3].lower().split()):f}{scaled[4]}"
    bare = re.sub(r"(?:\\[ ,;]|\s)*\\?%$", "", text)                    # of a plain number quick_word takes it away
    text = text if NUMBER.fullmatch(bare) else bare
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"\u221a *([0-9A-Za-z]+)|(?<!\\)(?:\u221a *|\bsqrt)\(([^()]*)\)", r"\\sqrt{\1\2}", text)
    return UNIT.sub(r"\\text{ \1}", re.sub(r"^([+-]?[0-9]+) ([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}", re.sub(r"(?<!\\)\\(?:[ ;:]|$)", " ", text).strip()))


def both_signs(text: str) -> str:
    """Each entry of a list with a \\pm inside a group as two entries, \\frac{1 \\pm x}{2} as \\frac{1 + x}{2}, \\frac{1 - x}{2}: math-verify reads the sign outside groups only."""
    if r"\pm" not in text or re.search(r"\\(?:text|mbox|begin|mp|cup|\{)", text):
        return text
    entries, entry, depth, grouped = [], "", 0, False
    for token in [*re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL), ","]:
        if token == "," and depth == 0:
            entries += [entry.replace(r"\pm", sign) for sign in "+-"] if grouped and entry.count(r"\pm") == 1 else [entry]
            entry, grouped = "", False
            continue
        depth += (token in ("{", "(", "[")) - (token in ("}", ")", "]"))
        grouped |= token == r"\pm" and depth > 0
        entry += token
    return text if depth else ",".join(entries)


def repeating(decimal: re.Match[str]) -> str:
    """0.1\\overline{6} = (16 - 1)/90, as LaTeX."""
    whole, head, tail = decimal[1], decimal[2], decimal[3] or decimal[4]
    return rf"\frac{{{int(whole + head + tail) - int('0' + whole + head)}}}{{{'9' * len(tail) + '0' * len(head)}}}"


def normalise(answer: str) -> str:
    """The answer without $, \\text{} and its like, \\left \\right \\big, blanks (kept between digits: `1 1/2`), thousands separators and final period."""
    text = re.sub(r"\\!\s*|\\?\$|\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])|\\[()\[\]]", "", answer)
    for _ in range(2):                                                   # \textbf{(\text{C})}
        text = re.sub(r"\\(?:text(?:bf|it|rm)?|emph|math(?:bf|it|rm)|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3}(?![0-9]))", ",", re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)).strip().rstrip(". \n")
    if GROUPED.fullmatch(text):                                          # before blanks go: 100, 200 is a list
        return re.sub(r"[\s,]", "", text)
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)


def quick_word(gold: str, answer: str) -> str:
    """"True" or "False" where equal strings or words, an option letter A-J (GPQA) or two exact rationals decide, "gold_unparsable", or "": math-verify has to."""
    if len(gold) > MAX_ANSWER or not normalise(gold):
        return "gold_unparsable"
    same = len({re.sub(r",\s+", ",", text) for text in (gold, answer)}) == 1               # 45, 135 and 45,135
    raw_gold, raw, gold, answer = gold, answer, normalise(gold), normalise(answer) if len(answer) <= MAX_ANSWER else ""
    same |= gold == answer or gold.isalpha() and len(gold) > 3 and gold.lower() == answer.lower()         # true, East; not the segment AB
    same |= answer.rpartition(r"\approx")[2] == gold                      # 12\pi \approx 37.7
    options = [re.sub(r"[\s,;()]|and", "", text) for text in (gold, answer)]
    same |= re.fullmatch("(?=..)A?B?C?D?E?F?G?H?I?J?", options[0]) is not None and "".join(sorted(options[1])) == options[0]           # several of them: ABD and A, B, D
    if same or not answer or len(gold) > 3 and gold.isalpha() and answer.isalpha():        # left and felt: to math-verify a word is the product of its letters
        return str(same)
    lists = [[Fraction(part) for part in text.split(",")] if LISTED.fullmatch(text) else [] for text in (gold, answer)]
    if all(lists) and len(set(lists[0])) < len(lists[0]) and sorted(lists[0]) != sorted(lists[1]):         # 2, 2, 3 is more than 2, 3: math-verify compares sets
        return "False"
    if option := re.fullmatch(r"\(?([A-J])\)?", gold):
        bare = re.sub(r"\\[A-Za-z]+", " ", raw)
        words = set(re.findall(r"[^\W_]+", bare)) - {"and", "or", "maybe", "wait", "no"}
        several = LABELS.match(bare) or len(words) > 1 and words <= set("ABCDEFGHIJ")      # C or D; not: (C) vitamins A and B
        chosen = None if several else OPTION.fullmatch(answer) or NAMED.match(bare)
        return str(chosen is not None and chosen[1].upper() == option[1])
    bare = [re.sub(r"\\?%$", "", text) for text in (gold, answer)]                          # 12.5 and 12.5 %, -10 and -10 %
    if gold.endswith("%") != answer.endswith("%") and all(map(NUMBER.fullmatch, bare)) and Fraction(bare[0]) == Fraction(bare[1]):
        return "True"
    if all(ratios := [RATIO.fullmatch(re.sub(r"[{}\s]", "", text)) for text in (gold, answer)]):
        sides = [ratio[1].split(":") for ratio in ratios]
        if all(NUMBER.fullmatch(part) and Fraction(side[0]) for side in sides for part in side):
            sides = [[Fraction(part) / Fraction(side[0]) for part in side] for side in sides]              # proportional: 3:4:5 and 6:8:10
        return str(sides[0] == sides[1])
    if all(based := [BASED.fullmatch(text) for text in (gold, answer)]):
        return str(based[0].groups() == based[1].groups())
    numbers = [sorted(re.findall(r"-?[0-9]+(?:\.[0-9]+)?", text)) for text in (raw_gold, raw)]
    if numbers[0] != numbers[1] and any(map(PARTS.search, (raw_gold, raw))):               # math-verify reads the first number only
        return "False"
    plain = [re.sub(r"^([+-]?)\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text) for text in (gold, answer)]
    return str(Fraction(plain[0]) == Fraction(plain[1])) if all(map(NUMBER.fullmatch, plain)) else ""     # exact: 0.333 is not 1/3

# ------------------------------------------------------------------------------------------------ math-verify at arm's length

START_SECONDS = 60.0
WORKER = r'''
import sys; sys.path[:] = filter(None, sys.path)      # not the folder we stand in
import contextlib, itertools, json, logging, os, resource, signal
for limit, value in ((resource.RLIMIT_AS, 2 << 30), (resource.RLIMIT_CORE, 0)):
    with contextlib.suppress(ValueError, OSError):    # a stricter limit holds already, or the platform has none
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
signal.signal(signal.SIGALRM, signal.SIG_DFL)
out = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)        # a library's print must not look like a verdict
def say(word): print(word, file=out, flush=True)
try: from math_verify import LatexExtractionConfig, parse, verify
except ImportError as error: sys.exit(say(f"missing: {error}"))
logging.disable()
# LaTeX only: math-verify's other reader fishes numbers out of broken LaTeX, and ends in sympy's parse_expr, which is an eval
READ = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]
def read(text): return parse("\\boxed{" + text + "}", READ, parsing_timeout=None)
def judge(gold, answer):
    gold = read(gold)                                 # [sympy object, its text]; only the text where it is not mathematics
    if all(isinstance(reading, str) for reading in gold): return "gold_unparsable"
    return verify(gold, (answer := read(answer)), timeout_seconds=None, raise_on_error=True) and not apart(gold[0], answer[0])
def apart(a, b):                                      # to verify what is below 1e-15 is 0, and decimals end after six places: 1 - 1/2^99 and 1 - 1/2^98, 1.6e-19 and 9.1e-31
    a, b = (x.rhs if getattr(x, "is_Equality", False) else x for x in (a, b))
    if all(type(x).__name__ in ("FiniteSet", "Tuple", "Interval") for x in (a, b)):       # of an interval the ends; the rest says whether they belong to it
        a, b = (x.args[:2] if type(x).__name__ == "Interval" else x.args for x in (a, b))
        return not all(any(not apart(x, y) for y in b) for x in a)
    if a == b or not all(getattr(x, "is_number", False) and x.is_finite for x in (a, b)): return False
    d, size = (a - b).doit(), max(abs(x.doit().evalf()) for x in (a, b))
    return bool(d != 0) if d.is_Rational else bool(abs(d.evalf(30)) > 1e-5 * size)
verify(read("x+1"), read(r"\frac{2+2x}{2}"), timeout_seconds=None)      # the first comparison loads most of sympy: not on a pair's time
say("ready")
for line in itertools.islice(sys.stdin, 1000):        # then a fresh process: the parser's caches only grow
    gold, answer, seconds = json.loads(line)
    signal.alarm(int(seconds) + 2)                    # its own end, should the parent be gone
    try: say(judge(gold, answer))
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError): sys.exit(say("worker_error"))
    signal.alarm(0)
'''
grade_stats: Counter[str] = Counter()  # why answers were left ungraded: gold_unparsable (or too long), deadline, worker_died, worker_error
_idle: list[subprocess.Popen] = []     # workers that wait for a pair: started when needed, kept between calls
_works: set[bool] = set()              # not empty once a worker has been ready: if a later one is not, the machine is busy, not the installation wrong
atexit.register(lambda: [worker.kill() for worker in _idle])


def hear(worker: subprocess.Popen, seconds: float) -> str:
    """The worker's next line; "" if it is dead, "deadline" if none came in time. It is ended and reaped on these, and after an error."""
    poller = select.poll()                                               # select() knows 1024 files, a trainer may have more
    poller.register(worker.stdout, select.POLLIN)
    word = os.read(worker.stdout.fileno(), 4096).decode().strip() if poller.poll(1000 * seconds) else "deadline"
    if word in ("", "deadline", "worker_error"):
        worker.kill()
        worker.communicate()
    return word


def start() -> subprocess.Popen:
    """A worker that has imported math-verify and compared once, in a process group of its own (Ctrl-C is the parent's); ImportError or ChildProcessError says why there is none."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0)
    if (word := hear(worker, START_SECONDS)) != "ready":
        kind = ImportError if word.startswith("missing") else ChildProcessError
        raise kind(f"no grading process ({word or 'it died'}): pip install math-verify, and see that python -c 'import math_verify' works")
    _works.add(True)
    return worker


def ask(pair: tuple[str, str], seconds: float) -> str:
    """math-verify's word on one (gold, answer): True, False, gold_unparsable, worker_error, worker_died or deadline."""
    bare = [text.rstrip(" \n.") for text in pair]                        # math-verify trips over a final period
    request = json.dumps([*bare, seconds]).encode() + b"\n"              # ASCII, so lone surrogates travel too
    for take in (_idle.pop, start, start):                               # a worker killed from outside is no verdict; but not for ever
        try:
            worker = take()
        except IndexError:                                               # nobody is idle
            continue
        except ChildProcessError:
            if not _works:
                raise
            break
        with contextlib.suppress(BrokenPipeError):                       # it died idle: hear() says so
            worker.stdin.write(request)
        if word := hear(worker, seconds):
            _idle.extend([worker] if worker.returncode is None else [])
            plain_words = word == "gold_unparsable" and normalise(pair[0]).isalnum()     # in any script: that the strings differ decides
            return "False" if plain_words else word
    return "worker_died"


def grade_all(texts: list[str], answers: list[str], seconds: float = 5.0) -> list[bool | None]:
    """Is each completion's final answer right? True, False (no answer is wrong), or None where it could not be graded, counted in `grade_stats`.
    One comparison may take `seconds`. ValueError on unequal lengths, ImportError without math-verify. POSIX; call it from one thread of one process."""
    pairs = [(as_latex(gold), as_latex(final_answer(text) or "")) for text, gold in zip(texts, answers, strict=True)]
    words = {pair: quick_word(*pair) for pair in pairs}                  # equal answers of a group are compared once
    hard = [pair for pair, word in words.items() if not word]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:        # one thread per worker process, asleep in poll()
        words.update(zip(hard, pool.map(lambda pair: ask(pair, seconds), hard)))
    verdicts = [{"True": True, "False": False}.get(words[pair]) for pair in pairs]
    grade_stats.update(words[pair] for pair, verdict in zip(pairs, verdicts) if verdict is None)
    return verdicts


def grade(text: str, answer: str, seconds: float = 5.0) -> bool | None:
    """`grade_all` of one completion and its gold answer."""
    return grade_all([text], [answer], seconds)[0]

# ------------------------------------------------------------------------------------------------ statistics

def pass_at_k(n: int, c: int, k: int) -> float:
    """P(at least one of k samples is right), unbiased, from n samples with c right; ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(answers: list[str | None], correct: list[bool | None], k: int, draws: int = 1000) -> float:
    """maj@k of one problem: how often the most frequent answer among k of its n samples is right, over all subsets or, if these are more, `draws` seeded ones
    (verl draws with replacement). Right answers vote as one, in whatever notation, the others by normalised string; None does not vote, a tie is shared; NaN where no winner was
    graded, or nobody voted and nothing was."""
    if len(correct) != len(answers) or not 1 <= k <= len(answers):
        raise ValueError(f"maj@k needs a verdict per answer and 1 <= k <= n, got {len(answers)} answers, {len(correct)} verdicts, k={k}")
    names = [None if a is None else normalise(a) for a in answers]
    right = {name for name, verdict in zip(names, correct) if verdict}   # all equal the gold, in whatever notation
    names = ["\0" if name in right else name for name in names]
    classes = sorted(set(names) - {None}) or [""]
    graded = {name: float(verdict) for name, verdict in zip(names, correct) if verdict is not None}
    score = np.array([graded.get(c, np.nan) for c in classes])           # (C,)
    vote = np.array([[name == c for c in classes] for name in names])    # (n, C)
    if math.comb(len(names), k) <= draws:
        subsets = np.array(list(combinations(range(len(names)), k)))     # (S, k)
    else:
        subsets = np.random.default_rng(0).random((draws, len(names))).argsort(1)[:, :k]
    counts = vote[subsets].sum(1)                                        # (S, C)
    wins = (counts == counts.max(1, keepdims=True)) & (counts > 0)
    share = np.where(wins, score, 0.0).sum(1) / np.maximum(wins.sum(1), 1)
    share[(counts == 0).all(1) & ~np.array([right is not None for right in correct])[subsets].any(1)] = np.nan
    return float(np.nanmean(share)) if not np.isnan(share).all() else math.nan


T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)     # 97.5 % quantile of Student's t, 1..10 degrees of freedom


def mean_interval(per_problem: np.ndarray) -> tuple[float, float, float, float]:
    """(mean, standard error, low, high): 95 % t interval over problems. NaN (no graded sample) is left out; infinite below two problems.
    Zero spread has zero width, which is no certainty when N is small."""
    kept = np.asarray(per_problem, dtype=float)
    kept = kept[~np.isnan(kept)]
    if len(kept) < 2:
        return (float(kept[0]) if len(kept) else math.nan), math.inf, -math.inf, math.inf
    mean, error, df, z = float(kept.mean()), float(kept.std(ddof=1)) / math.sqrt(len(kept)), len(kept) - 1, 1.959964
    t = T975[df - 1] if df <= len(T975) else z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)    # Fisher's expansion
    return mean, error, mean - t * error, mean + t * error


def paired_bootstrap(a: np.ndarray, b: np.ndarray, samples: int = 10000, seed: int = 0) -> dict[str, float]:
    """diff = mean(a - b) over the same problems in the same order; its 95 % percentile interval (low, high) and two-sided p, from resampled problems.
    Problems with NaN on either side are left out; ValueError on unequal shapes, or when fewer than two are left."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or (~np.isnan(a - b)).sum() < 2:
        raise ValueError(f"a paired comparison needs two or more problems, the same on both sides; got shapes {a.shape} and {b.shape}")
    gain = (a - b)[~np.isnan(a - b)]
    rng = np.random.default_rng(seed)
    means = np.array([gain[rng.integers(len(gain), size=len(gain))].mean() for _ in range(samples)])
    low, high = np.quantile(means, 0.025, method="lower"), np.quantile(means, 0.975, method="higher")
    tail = min((means <= 1e-12).sum(), (means >= -1e-12).sum())          # 0 but for rounding is on both sides; p < 0.05 where the interval leaves 0 out
    return {"diff": float(gain.mean()), "low": float(low), "high": float(high), "p": float(min(1.0, 2 * (tail + 1) / (samples + 1)))}
