"""GSRM, the Generative Structure Reward Model: reads a reasoning trace into steps and rewards following the teacher's steps (paper, section 4).

    trace --decompose (a language model writes)--> [(meta, query, answer), ...] --judge (a language model says yes or no)--> structure reward

Student steps s_1..s_n against one teacher trace t_1..t_m. For i = 1 .. min(n, m):
    meta of s_i differs from t_i   ->  stop: the student left this branch, nothing later counts
    else  credit_i = 1, times 1/2 if the query differs, times 1/2 if the answer differs
    R = sum credit_i / m                (normalize=False: the plain sum, as the authors' code has it)
With K teacher traces R = max over traces: any branch that the teacher has shown may be followed.

A reward is a number or None, "could not be scored": never 0, but left out of the group and the loss. Student text is untrusted: step tags, special tokens and our delimiters
in it are defused, and it is cut to a length. `generate` takes prompts, `judge` triples (`judge_by` makes it of any p_yes on prompts): of a checkpoint, an endpoint, a rule.

    python gsrm.py eval toy --gsrm toy/gsrm --truth toy:read                                      # its own report card (card.py)
    python gsrm.py annotate toy --url http://127.0.0.1:8000/v1 --model NAME --out out/pairs.jsonl    # its training pairs, written by a larger model (endpoint.py)
"""
import contextlib
import hashlib
import json
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

Pair = tuple[str, str, str]                              # (kind, teacher's text, student's text)
Judge = Callable[[list[Pair]], list[float | None]]       # p(the two mean the same), None = could not be judged
SameAnswer = Callable[[list[tuple[str, str]]], list[bool | None]]    # is the second one's value the first one's? None = the first could not be read

# ------------------------------------------------------------------------------------------------ the step format: the one place that defines it

KINDS, TAGS = ("meta", "query", "answer"), {"meta": "Meta-reasoning", "query": "Sub-problem", "answer": "Answer"}
NO_STEPS = "[No steps]"                                  # what a decomposer writes for a trace in which nothing was done
TAG = re.compile(r"(?:^[ \t]*(?:[-*>#]{1,6}|[0-9]{1,4}[.)])[ \t]+)?(?:\*\*)?\[\s*(?:(?P<meta>meta\W?reasoning)|(?P<query>sub\W?problem)|(?P<answer>answer))"
                 r"\s+(?P<number>[0-9]{1,4})\s*\](?:\*\*)?\s*[:\uff1a](?:\*\*)?", re.IGNORECASE | re.MULTILINE)          # Markdown about it is part of it
ANY_TAG = re.compile(r"\[(?=\s*(?:meta\W?reasoning|sub\W?problem|answer|no steps)\b)", re.IGNORECASE)
BETWEEN = re.compile(r"[-*>#_=\s]*(?:step\s+[0-9]{1,4}[-*>#_=:.\s]*)?", re.IGNORECASE)          # a line of Markdown between steps: ---, ### Step 2


def clean(text: str) -> str:
    """Text without step tags, outer blanks and Markdown behind it: an opening bracket of a tag becomes a parenthesis."""
    text = ANY_TAG.sub("(", text).strip()
    while (lines := text.rpartition("\n"))[1] and BETWEEN.fullmatch(lines[2]):
        text = lines[0].rstrip()
    return text


@dataclass(frozen=True)
class Step:
    """One step of a trace: why this sub-problem is next, the sub-problem, its short answer. Tags inside the texts are defused."""
    meta: str
    query: str
    answer: str

    def __post_init__(self):
        for kind in KINDS:
            object.__setattr__(self, kind, clean(getattr(self, kind)))


@dataclass(frozen=True)
class Parsed:
    """What parse_steps read, and for everything that it left out, why."""
    steps: list[Step]
    dropped: list[str] = field(default_factory=list)


def format_steps(steps: list[Step]) -> str:
    """The structure as text, numbered from 1; parse_steps(format_steps(s)).steps == s for steps without empty fields."""
    return "\n".join(f"[{TAGS[kind]} {i}]: {getattr(step, kind)}" for i, step in enumerate(steps, 1) for kind in KINDS) or NO_STEPS


def parse_steps(text: str) -> Parsed:
    """Steps in the order of their numbers, strict about tags, lenient about blanks, case and Markdown; never raises. A field belongs to the step of its
    own number wherever it stands; of a doubled field the first counts; a step that lacks a field is dropped."""
    found, dropped, tags = dict[int, dict[str, str]](), [], list(TAG.finditer(text))
    fence = text.rfind("```", tags[-1].end() + 1) if tags and "```" in text[:tags[0].start()] else -1          # Markdown, as chat models write it; ** about a tag, too
    for tag, after in zip(tags, [*tags[1:], None]):
        number, kind, body = int(tag["number"]), next(kind for kind in KINDS if tag[kind]), text[tag.end():after.start() if after else fence if fence >= 0 else None]
        dropped += [f"second {TAGS[kind]} {number}"] * (kind in found.setdefault(number, {}))
        found[number].setdefault(kind, clean(body))
    dropped += [f"step {n}: no {', no '.join(missing)}" for n in sorted(found) if (missing := [TAGS[kind] for kind in KINDS if not found[n].get(kind)])]
    before = text[:tags[0].start() if tags else None].strip()
    dropped += ["text before the first tag" if tags else "no step tags"] * bool(before and (tags or before.lower() != NO_STEPS.lower()))
    return Parsed([Step(**found[number]) for number in sorted(found) if all(found[number].get(kind) for kind in KINDS)], dropped)

# ------------------------------------------------------------------------------------------------ prompts, the same at training and at scoring time

DECOMPOSE = "Write the steps of this reasoning.\n<problem>\n{problem}\n</problem>\n<trace>\n{trace}\n</trace>"
JUDGE = "Do these two {kind} mean the same? Answer yes or no.\n1: {teacher}\n2: {student}"
KIND_WORDS = {"meta": "reasons", "query": "problems", "answer": "answers"}
# our delimiters; special tokens: <|im_end|>, DeepSeek's full-width bars, Llama's, Gemma's, Mistral's, EXAONE's, MiniMax's. "<" before n blanks must cost n, not n * n
DELIMITER = re.compile(r"<(?=\s*(?:/\s*)?(?:problem|trace|think|s|bos|eos|eo[adhmst]|pad|unk|mask|sys|(?:unused|reserved_|special_)[0-9]{1,4}|(?:start|end)_of_[a-z]{3,12}"
                       r"|seed:[a-z_]{1,20}|tool_(?:call|response)|[se]op|fim_[a-z]{3,9}|[a-z_]{1,20}_token|[a-z_]{1,20}\|)\s*>|[|\uff5c])|\[(?=/?(?:INST|CLS|SEP|PAD|BOS|EO[ST]"
                       r"|[a-z]?MASK|UNK|SYSTEM_PROMPT|(?:AVAILABLE_)?TOOLS?(?:_[A-Z]+)?|THINK|\|[a-z]{3,12}\|)\]|e~\[)|\](?=~!?b[\[\]])", re.IGNORECASE)
MAX_TRACE, MAX_FIELD = 60_000, 600                       # characters; a trace keeps its beginning, which is where following the teacher happens


def neutralise(text: str, limit: int) -> str:
    """Untrusted text made harmless for a prompt: no step tags, no delimiters, no special tokens, at most `limit` characters."""
    return DELIMITER.sub("(", clean(text.replace("\0", "")))[:limit]


def decompose_prompt(problem: str, trace: str) -> str:
    """What the decomposer reads."""
    return DECOMPOSE.format(problem=neutralise(problem, MAX_TRACE), trace=neutralise(trace, MAX_TRACE))


def judge_prompt(kind: str, teacher: str, student: str) -> str:
    """What the judge reads: two one-line texts of one kind."""
    line = lambda text: " ".join(neutralise(text, MAX_FIELD).split())
    return JUDGE.format(kind=KIND_WORDS[kind], teacher=line(teacher), student=line(student))

# ------------------------------------------------------------------------------------------------ structure reward

@dataclass(frozen=True)
class Score:
    """value: the reward, None = unscored. steps: what each student step earned on the trace followed. left_at: index of the first student step off
    every branch, None if it never left. trace: which teacher trace was followed. structure: the student's steps. reason: why there is no value.
    choices: for each step judged on that trace, was the sub-problem (meta and query) the teacher's; a last False may be where the trace was left (with stop=False: any)."""
    value: float | None
    steps: list[float] = field(default_factory=list)
    left_at: int | None = None
    trace: int | None = None
    structure: list[Step] = field(default_factory=list)
    reason: str = ""
    choices: list[bool] = field(default_factory=list, compare=False)


@dataclass
class Walk:
    """One student beside one teacher trace, as far as it has been judged."""
    pairs: list[list[Pair]]                              # of each step that both have: meta, query, answer
    size: int                                            # teacher steps
    credits: list[float] = field(default_factory=list)   # of each step judged, 0 off the branch
    choices: list[bool] = field(default_factory=list)    # of each step judged: were meta and query the same
    at_best: float = 0.0                                 # what it would have earned had every judgement that failed said yes
    followed: int = 0                                    # steps before it left the branch
    left: bool = False


def structure_rewards(students: list[list[Step]], teachers: list[list[list[Step] | None]], judge: Judge, normalize: bool = True, stop: bool = True) -> list[Score]:
    """Score of each student structure against its own list of teacher structures (the equation above), judged in waves: all `meta` of step i first, then `query` and
    `answer` of those still on a branch; each distinct pair is asked once. A judgement that failed (None) makes the score None, unless an upper bound says that no verdict
    could have raised it; so does a teacher structure that could not be asked for, unless another trace earns a normalised 1. A student without steps earns 0; without
    teacher steps: None. stop=False, for studies: a step whose meta differs earns 0 and the walk goes on behind it."""
    walks = [[Walk([[(kind, getattr(t, kind), getattr(s, kind)) for kind in KINDS] for s, t in zip(student, trace or ())], len(trace or ())) for trace in traces]
             for student, traces in zip(students, teachers, strict=True)]
    every, known = [w for group in walks for w in group], {}

    def ask(pairs: list[Pair]) -> None:
        if new := [p for p in dict.fromkeys(pairs) if p not in known]:
            known.update((p, a if a == a else None) for p, a in zip(new, judge(new), strict=True))       # NaN is no judgement either
    for i in range(max((len(w.pairs) for w in every), default=0)):
        active = [w for w in every if i < len(w.pairs) and not (stop and w.left)]
        ask([w.pairs[i][0] for w in active])
        ask([pair for w in active if (known[w.pairs[i][0]] or 0) >= 0.5 for pair in w.pairs[i][1:]])
        for w in active:
            meta, *verdicts = map(known.get, w.pairs[i])
            same = meta is not None and meta >= 0.5
            w.left |= not same
            w.followed += not w.left
            w.credits.append(same * 0.5 ** sum(v is None or v < 0.5 for v in verdicts))
            w.choices.append(same and verdicts[0] is not None and verdicts[0] >= 0.5)
            if same:
                w.at_best += 0.5 ** sum(v is not None and v < 0.5 for v in verdicts)
            elif meta is None:                           # had it said yes, this step, and where one stops here every later one, could have earned 1
                w.at_best += len(w.pairs) - i if stop else 1
    return [pick(s, {k: w for k, w in enumerate(group) if w.size}, normalize, None in traces) for s, traces, group in zip(students, teachers, walks)]


def pick(student: list[Step], walks: dict[int, Walk], normalize: bool, outage: bool) -> Score:
    """The best of one student's walks, keyed by teacher trace, as a Score. outage: there is a trace beside them that could not be asked about."""
    scale = {k: w.size if normalize else 1 for k, w in walks.items()}
    values = {k: sum(w.credits) / scale[k] for k, w in walks.items()}
    top = max(walks, key=lambda k: (values[k], walks[k].followed), default=None)
    if not walks or outage and student and not (normalize and values[top] == 1):        # by the others alone, a student that follows the missing one would be punished
        return Score(None, structure=student, reason="a teacher trace could not be asked" if outage else "no teacher steps")
    if max(w.at_best / scale[k] for k, w in walks.items()) > values[top] + 1e-9:
        return Score(None, structure=student, reason="a judgement failed")
    earned, left_at = walks[top].credits, max(w.followed for w in walks.values()) if all(w.left for w in walks.values()) else None
    return Score(values[top], earned + [0.0] * (len(student) - len(earned)), left_at, top, student, choices=walks[top].choices)

# ------------------------------------------------------------------------------------------------ the judge and the model

NOTATION = re.compile(r"(?:\\(?:[dt]?frac|sqrt|pi|cdot|times|div|pm|left|right|infty|sin|cos|tan|log|ln|[%{},!])|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[-0-9+*/^(){}\[\].,%$ ])+")
# what a reader of LaTeX takes otherwise than its writer may have meant: 2 1/2, 3(4), 3/4x, \sqrt 12, \log 2, 2^3^2, and 1,5
DOUBTFUL = re.compile(r"[0-9] +[0-9]|[0-9)] *\(|/ *[0-9]* *[A-Za-z(\\]|\\(?:[dt]?frac|sqrt|sin|cos|tan|log|ln) *[0-9]|\\log|\^ *\{?\w+\}? *\^|[0-9],[0-9]")
THOUSANDS = re.compile(r"([0-9])(?:,|,\\!|\{,\}|\\,)(?=[0-9]{3}(?![0-9]))")
WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u312f\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]+|[^\W\d_]")
RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u2080-\u2089]+")            # superscript and subscript digits
readings = lru_cache(maxsize=2)(lambda text: [words(t) for t in dict.fromkeys((text, THOUSANDS.sub(r"\1 ", text)))])       # 100,200 may be one number or two
digest = lambda *parts: hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()


def variables(text: str) -> set[str] | None:
    """The letters in a text that is mathematical notation and nothing else; None for words, units of several letters, and what could be read in two ways."""
    plain = THOUSANDS.sub(r"\1", text) if len(text) <= MAX_FIELD and all(head.count("}") <= head.count("{") for head in accumulate(text)) else ""       # 5}{7 reads as 5
    return set(re.findall(r"(?<![\\A-Za-z])[A-Za-z]", plain)) if NOTATION.fullmatch(plain) and not DOUBTFUL.search(plain) else None


def settled(pair: Pair) -> float | None:
    """What needs no model: texts that are equal but for case and blanks mean the same, two different whole numbers do not."""
    a, b = (" ".join(text.lower().split()) for text in pair[1:])
    number = re.compile(r"-?[0-9]{1,18}").fullmatch
    return 1.0 if a == b else 0.0 if number(a) and number(b) and int(a) != int(b) else None


def check_answers(pairs: list[Pair], same_answer: SameAnswer) -> dict[Pair, float]:
    """The symbolic verdict on those pairs of `answer` fields that have one: both are notation in the same letters ("5 m" is not "5 s"), and a no is one both ways
    round (so both were read) and has no decimals in it (3.33 beside 10/3 is a rounding, not another answer)."""
    hard = [p for p in pairs if p[0] == "answer" and (letters := variables(p[1])) is not None and letters == variables(p[2])]
    verdicts = dict(zip(hard, same_answer([p[1:] for p in hard]), strict=True))
    noes = [p for p in hard if verdicts[p] is False and not re.search(r"[.%]", p[1] + p[2])]
    back = dict(zip(noes, same_answer([p[:0:-1] for p in noes]), strict=True))
    return {p: float(verdicts[p]) for p in hard if verdicts[p] or back.get(p) is False}


def judge_by(p_yes: Callable[[list[str]], list[float | None]], same_answer: SameAnswer | None = None) -> Judge:
    """A judge from any model's p_yes(prompts): first what is `settled`, then the symbolic check, and only the rest is asked. `judge.stats` counts what the check decided."""
    def judge(pairs: list[Pair]) -> list[float | None]:
        sure = {pair: settled(pair) for pair in pairs}
        if same_answer:
            sure |= (checked := check_answers([pair for pair in sure if sure[pair] is None], same_answer))
            judge.stats["symbolic"] += len(checked)
        if asked := [pair for pair in sure if sure[pair] is None]:
            sure.update(zip(asked, p_yes([judge_prompt(*pair) for pair in asked]), strict=True))
        return [sure[pair] for pair in pairs]
    judge.stats, judge.p_yes = Counter(), p_yes
    return judge


def exact_judge(pairs: list[Pair]) -> list[float | None]:
    """Same words, same meaning: the judge for structures that come from a rule."""
    return [float(teacher.lower().split() == student.lower().split()) for _, teacher, student in pairs]


def reading_rule(read: Callable[[str], list[Step]]) -> Callable[[list[str]], list[str | None]]:
    """A rule that reads a trace, as a `generate`: for worlds whose true structure is known, and for tests."""
    return lambda prompts: [format_steps(read(p.split("<trace>\n", 1)[1].rsplit("\n</trace>", 1)[0])) for p in prompts]


def words(text: str) -> list[str]:
    """Its numbers (2{,}000 as 2000, .5 as 0.5, 2.50 as 2.5), lower-case words, Greek letters by their names; of scripts without blanks, as Chinese or Thai, each letter."""
    text = unicodedata.normalize("NFKC", RAISED.sub(r" \g<0> ", text))                     # full width, \u00bd; x\u00b2 as x^2, and not as x2
    text = re.sub("(?<![\u0370-\u03ff])[\u03b1-\u03c9](?![\u0370-\u03ff])", lambda c: f" {unicodedata.name(c[0]).split()[-1].replace('LAMDA', 'LAMBDA')} ", text)
    return [w.rstrip("0").rstrip(".") if "." in w else w for w in WORD.findall(re.sub(r"\.(?<![\w.)\]}]\.)(?=\d)", "0.", THOUSANDS.sub(r"\1", text.lower())))]


def faithful(step: Step, trace: str) -> bool:
    """Does the step's answer occur in the trace: all of its numbers, and at least half of its words?"""
    answers, there = readings(step.answer), set().union(*readings(trace))              # of a trace with many steps made once
    return any(all(w in there for w in ws if w[0].isdigit()) and 2 * sum(w in there for w in ws) >= len(ws) for ws in answers) if answers[0] else step.answer in trace


def kept(path: Path) -> list[dict]:
    """The rows of an append-only JSONL file. Half a line at its end, left by a kill, is cut off; a broken line elsewhere is passed over."""
    data = path.read_bytes() if path.exists() else b""
    end, rows = data.rfind(b"\n") + 1, []
    if end < len(data) == path.stat().st_size:           # it has not grown since: nobody is just writing that line
        os.truncate(path, end)
    for line in data[:end].splitlines():                 # of bytes: only at line ends
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


class GSRM:
    """Scores student traces against teacher traces. `generate`: prompts -> texts in the step format (None = an outage, "" = it cannot be had); `judge`: pairs -> p(same).
    Teacher structures and judgements are kept in `cache_path` (JSONL, by hash of their content and of `name` or `judge_name`): what was read or judged once is
    not asked again in a lifetime; failures are not kept. `stats` counts decompositions, judgements (pairs given to the judge; of these "symbolic" were decided by
    the check of answers), cache hits of both, failures, cut_traces (longer than MAX_TRACE) and seconds since it was last cleared."""

    def __init__(self, generate: Callable[[list[str]], list[str | None]], judge: Judge, cache_path: str | Path | None = None, name: str = "gsrm",
                 normalize: bool = True, min_words: int = 3, judge_name: str = "", stop: bool = True):
        self.generate, self.ask, self.name, self.normalize, self.min_words, self.stop = generate, judge, name, normalize, min_words, stop
        self.cache_path, self.judge_name = Path(cache_path) if cache_path else None, judge_name or name
        rows, self.stats = kept(self.cache_path) if self.cache_path else [], getattr(judge, "stats", Counter())
        self.cache, self.memo = ({row["key"]: row[name] for row in rows if isinstance(row.get("key"), str) and isinstance(row.get(name), kind)}
                                 for name, kind in (("text", str), ("p", int | float)))

    def __call__(self, problems: list[str], traces: list[str], teacher_traces: list[list[str]]) -> list[Score]:
        """One Score per (problem, student trace, its teacher's traces). A near-empty trace scores 0 without asking anybody. ValueError where the lists differ in length."""
        if not len(problems) == len(traces) == len(teacher_traces):
            raise ValueError(f"{len(problems)} problems, {len(traces)} traces, {len(teacher_traces)} lists of teacher traces: one of each is needed per completion")
        started, teachers = time.time(), self.teachers(problems := [getattr(p, "problem", p) for p in problems], teacher_traces)
        asked = [n for n, trace in enumerate(traces) if len(words(trace)) >= self.min_words]
        read = dict(zip(asked, self.decompose([problems[n] for n in asked], [traces[n] for n in asked])))
        todo = [n for n in asked if read[n] is not None]
        found = dict(zip(todo, structure_rewards([read[n] for n in todo], [teachers[n] for n in todo], self.judge, self.normalize, self.stop)))
        scores = [Score(0.0, reason="empty trace") if n not in read else found.get(n) or Score(None, reason="not decomposed") for n in range(len(traces))]
        self.stats.update(unscored=sum(s.value is None for s in scores), seconds=time.time() - started)          # a Counter's update adds
        return scores

    def teachers(self, problems: list[str], traces: list[list[str]]) -> list[list[list[Step] | None]]:
        """Each problem's teacher structures, from the cache where they were read before; one that cannot be read is empty, and the others decide; None: an outage (all counted)."""
        flat = list(dict.fromkeys((p, t) for p, ts in zip(problems, traces, strict=True) for t in ts))
        keys = {pt: digest(self.name, decompose_prompt(*pt)) for pt in flat}
        found, lost = self.read(new := [pt for pt in flat if keys[pt] not in self.cache])
        self.stats["cache_hits"] += len(flat) - len(new)
        self.remember(self.cache, "text", {keys[pt]: format_steps(steps) for pt, steps in found.items() if steps is not None})
        return [[None if (p, t) in lost else parse_steps(self.cache.get(keys[p, t], "")).steps for t in ts] for p, ts in zip(problems, traces)]

    def remember(self, known: dict, name: str, fresh: dict) -> None:
        """Adds to what is known, and to the cache file in one write, so that several processes' lines do not mix."""
        known |= fresh
        if self.cache_path and fresh:
            self.cache_path.parent.mkdir(parents=True, exist_ok=True)
            with self.cache_path.open("ab", buffering=0) as file:
                file.write("".join(json.dumps({"key": key, name: value}, default=float) + "\n" for key, value in fresh.items()).encode())

    def decompose(self, problems: list[str], traces: list[str]) -> list[list[Step] | None]:
        """The structure of each trace, its unfaithful steps left out; None where two attempts gave nothing that can be read."""
        return list(map(self.read(pairs := list(zip(problems, traces)))[0].get, pairs))

    def read(self, pairs: list[tuple[str, str]]) -> tuple[dict[tuple[str, str], list[Step] | None], set[tuple[str, str]]]:
        """({(problem, trace): its structure, None where it could not be read}, those of them whose last attempt was not even answered)."""
        found = dict.fromkeys(pairs)
        for _attempt in range(2):                        # for servers; a model in this process says the same again, unless its batch rounds otherwise
            todo, lost = [pt for pt, steps in found.items() if steps is None], set()
            self.stats["decompositions"] += len(todo)
            for pt, text in zip(todo, self.generate([decompose_prompt(*pt) for pt in todo]) if todo else (), strict=True):
                parsed = parse_steps(said := (text or "").rpartition("</think>")[2])                     # what a model thinks first is not its answer
                if text is None:
                    lost.add(pt)
                elif said.strip() and (parsed.steps or not parsed.dropped):
                    found[pt] = [s for s in parsed.steps if faithful(s, pt[1])]
                    self.stats["unfaithful_steps"] += len(parsed.steps) - len(found[pt])
        self.stats.update(not_decomposed=sum(steps is None for steps in found.values()), outages=len(lost), cut_traces=sum(len(trace) > MAX_TRACE for _, trace in pairs))
        return found, lost

    def judge(self, pairs: list[Pair]) -> list[float | None]:
        """p(same) of each pair; what was once judged is remembered, a failure is not."""
        keys = {pair: digest(self.judge_name, JUDGE, *pair) for pair in pairs}
        new = [pair for pair in keys if keys[pair] not in self.memo]
        self.stats.update(judgements=len(new), judge_cache_hits=len(keys) - len(new))
        answers = {keys[p]: a for p, a in zip(new, self.ask(new), strict=True)} if new else {}
        self.stats["judge_failures"] += sum(a is None or a != a for a in answers.values())
        self.remember(self.memo, "p", {key: a for key, a in answers.items() if a is not None and a == a})          # NaN is a failure too
        return [self.memo.get(keys[p]) for p in pairs]


if __name__ == "__main__":                               # as a command it needs a model and a sampler; as a module it needs neither: the arrow stays one-way
    import importlib
    import sys
    importlib.import_module("endpoint").annotate_main(sys.argv[2:]) if sys.argv[1:2] == ["annotate"] else importlib.import_module("card").main(sys.argv[1:])
