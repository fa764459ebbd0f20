"""GSRM, the Generative Structure Reward Model: reads a reasoning trace into steps and rewards following the teacher's steps (paper, section 4).

    trace --decompose (a language model writes)--> [(meta, query, answer), ...] --judge (a language model says yes or no)--> structure reward

Student steps s_1..s_n against one teacher trace t_1..t_m. For i = 1 .. min(n, m):
    meta of s_i differs from t_i   ->  stop: the student left this branch, nothing later counts
    else  credit_i = 1  * 1/2 if the query differs  * 1/2 if the answer differs
    R = sum credit_i / m                (normalize=False: the plain sum, as the authors' code has it)
With K teacher traces R = max over traces: any branch that the teacher has shown may be followed.

A reward is a number or None, "could not be scored" (judge or decomposer failed). None never becomes 0; it is left out of the group and the loss.
Student text is untrusted: step tags, chat-template tokens and our delimiters in it are defused and its length is limited before it enters a prompt.

The model behind `generate` and `judge` may be any pair of callables on prompts: an in-process checkpoint (rollout.TextModel), an endpoint, a rule.

    python gsrm.py eval --model toy/student --gsrm toy/gsrm --data toy --truth toy:read          # the reward model's own report card
    python gsrm.py annotate toy --url http://127.0.0.1:8000/v1 --model NAME --out out/pairs.jsonl           # its training pairs, written by a larger model
"""
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Pair = tuple[str, str, str]                              # (kind, teacher's text, student's text)
Judge = Callable[[list[Pair]], list[float | None]]       # p(the two mean the same), None = could not be judged

# ------------------------------------------------------------------------------------------------ the step format: the one place that defines it

KINDS = ("meta", "query", "answer")
TAGS = {"meta": "Meta-reasoning", "query": "Sub-problem", "answer": "Answer"}
NO_STEPS = "[No steps]"                                  # what a decomposer writes for a trace in which nothing was done
TAG = re.compile(r"\[\s*(?:(?P<meta>meta[- ]?reasoning)|(?P<query>sub[- ]?problem)|(?P<answer>answer))\s+(?P<number>[0-9]{1,4})\s*\]\s*:", re.IGNORECASE)
ANY_TAG = re.compile(r"\[(?=\s*(?:meta[- ]?reasoning|sub[- ]?problem|answer|no steps)\b)", re.IGNORECASE)


def clean(text: str) -> str:
    """Text without step tags and outer blanks: an opening bracket of a tag becomes a parenthesis."""
    return ANY_TAG.sub("(", text).strip()


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
    """Steps in the order of their numbers, strict about tags, lenient about blanks and case; never raises. A field belongs to the step of its
    own number wherever it stands; of a doubled field the first counts; a step that lacks a field is dropped."""
    found: dict[int, dict[str, str]] = {}
    dropped, tags = [], list(TAG.finditer(text))
    for tag, after in zip(tags, [*tags[1:], None]):
        number, kind, body = int(tag["number"]), next(kind for kind in KINDS if tag[kind]), text[tag.end():after.start() if after else None]
        if kind in found.setdefault(number, {}):
            dropped.append(f"second {TAGS[kind]} {number}")
        else:
            found[number][kind] = clean(body)
    for number in sorted(found):
        if missing := [TAGS[kind] for kind in KINDS if not found[number].get(kind)]:
            dropped.append(f"step {number}: no {', no '.join(missing)}")
    steps = [Step(**found[number]) for number in sorted(found) if all(found[number].get(kind) for kind in KINDS)]
    before = text[:tags[0].start() if tags else None].strip()
    if before and (tags or before.lower() != NO_STEPS.lower()):
        dropped.append("text before the first tag" if tags else "no step tags")
    return Parsed(steps, dropped)

# ------------------------------------------------------------------------------------------------ prompts, the same at training and at scoring time

DECOMPOSE = "Write the steps of this reasoning.\n<problem>\n{problem}\n</problem>\n<trace>\n{trace}\n</trace>"
JUDGE = "Do these two {kind} mean the same? Answer yes or no.\n1: {teacher}\n2: {student}"
KIND_WORDS = {"meta": "reasons", "query": "problems", "answer": "answers"}
# our delimiters; special tokens: <|im_end|>, DeepSeek's full-width bars, Llama's, Gemma's and Mistral's. "<" before n blanks must cost n, not n * n
DELIMITER = re.compile(r"<(?=\s*(?:/\s*)?(?:problem|trace|think|s|bos|eos|(?:start|end)_of_turn|tool_call)\s*>|[|\uff5c])|\[(?=/?INST\])", re.IGNORECASE)
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
    choices: for each step judged on that trace, was the sub-problem (meta and query) the teacher's; a last False may be where the trace was left."""
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
    student: list[Step]
    teacher: list[Step]
    credits: list[float] = field(default_factory=list)
    queries: list[bool] = field(default_factory=list)    # of each step followed: was the query the same
    best: float = 0.0                                    # what it would have earned had every judgement that failed said yes
    left: bool = False

    def pair(self, kind: str) -> Pair:
        i = len(self.credits)
        return kind, getattr(self.teacher[i], kind), getattr(self.student[i], kind)

    @property
    def ended(self) -> bool:
        return self.left or len(self.credits) == min(len(self.student), len(self.teacher))


def structure_rewards(students: list[list[Step]], teachers: list[list[list[Step]]], judge: Judge, normalize: bool = True) -> list[Score]:
    """Score of each student structure against its own list of teacher structures (the equation above), judged in waves: all `meta` of step i
    first, then `query` and `answer` of those still on a branch. Each distinct pair is asked once. A failed judgement (None) makes the score None
    unless it could not have changed it. A student without steps earns 0; without teacher steps there is nothing to follow: None."""
    walks = [[Walk(s, t) for t in ts] for s, ts in zip(students, teachers, strict=True)]
    known: dict[Pair, float | None] = {}

    def ask(pairs: list[Pair]) -> None:
        new = [p for p in dict.fromkeys(pairs) if p not in known]
        if new:
            known.update((p, a if a == a else None) for p, a in zip(new, judge(new), strict=True))       # NaN is no judgement either

    while active := [w for group in walks for w in group if not w.ended]:
        ask([w.pair("meta") for w in active])
        ask([w.pair(kind) for w in active if (known[w.pair("meta")] or 0) >= 0.5 for kind in ("query", "answer")])
        for w in active:
            meta = known[w.pair("meta")]
            if meta is not None and meta >= 0.5:
                verdicts = [known[w.pair("query")], known[w.pair("answer")]]
                w.best += 0.5 ** sum(v is not None and v < 0.5 for v in verdicts)
                w.credits.append(0.5 ** sum(v is None or v < 0.5 for v in verdicts))
                w.queries.append(verdicts[0] is not None and verdicts[0] >= 0.5)
            else:
                w.left = True
                if meta is None:                         # had it said yes, every step from here on could have earned 1
                    w.best += min(len(w.student), len(w.teacher)) - len(w.credits)
    return [pick(s, {k: w for k, w in enumerate(group) if w.teacher}, normalize) for s, group in zip(students, walks)]


def pick(student: list[Step], walks: dict[int, Walk], normalize: bool) -> Score:
    """The best of one student's walks, keyed by teacher trace, as a Score."""
    if not walks:
        return Score(None, structure=student, reason="no teacher steps")
    scale = {k: len(w.teacher) if normalize else 1 for k, w in walks.items()}
    values = {k: sum(w.credits) / scale[k] for k, w in walks.items()}
    top = max(walks, key=lambda k: (values[k], len(walks[k].credits)))
    if max(w.best / scale[k] for k, w in walks.items()) > values[top] + 1e-9:
        return Score(None, structure=student, reason="a judgement failed")
    earned, left_at = walks[top].credits, max(len(w.credits) for w in walks.values()) if all(w.left for w in walks.values()) else None
    return Score(values[top], earned + [0.0] * (len(student) - len(earned)), left_at, top, student, choices=walks[top].queries + [False] * walks[top].left)

# ------------------------------------------------------------------------------------------------ the judge and the model

def judge_by(p_yes: Callable[[list[str]], list[float | None]]) -> Judge:
    """A judge from any model's p_yes(prompts): texts that are equal but for case and blanks mean the same, two different plain numbers do not,
    and only the rest is asked."""
    def judge(pairs: list[Pair]) -> list[float | None]:
        plain = [tuple(" ".join(text.lower().split()) for text in pair[1:]) for pair in pairs]
        number = re.compile(r"-?[0-9]{1,18}").fullmatch
        sure = [1.0 if a == b else 0.0 if number(a) and number(b) and int(a) != int(b) else None for a, b in plain]
        asked = iter(p_yes([judge_prompt(*pair) for pair, p in zip(pairs, sure) if p is None]) if None in sure else ())
        return [next(asked) if p is None else p for p in sure]
    return judge


def exact_judge(pairs: list[Pair]) -> list[float | None]:
    """Same words, same meaning: the judge for structures that come from a rule."""
    return [float(teacher.lower().split() == student.lower().split()) for _, teacher, student in pairs]


def reading_rule(read: Callable[[str], list[Step]]) -> Callable[[list[str]], list[str | None]]:
    """A rule that reads a trace, as a `generate`: for worlds whose true structure is known, and for tests."""
    return lambda prompts: [format_steps(read(p.split("<trace>\n", 1)[1].rsplit("\n</trace>", 1)[0])) for p in prompts]


def words(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text.lower())


def faithful(step: Step, trace: str) -> bool:
    """Does the step's answer occur in the trace: all of its numbers, and at least half of its words?"""
    answer, there = words(step.answer), set(words(trace))
    if not answer:
        return step.answer in trace
    return all(w in there for w in answer if w[0].isdigit()) and 2 * sum(w in there for w in answer) >= len(answer)


class GSRM:
    """Scores student traces against teacher traces. `generate`: prompts -> texts in the step format (None = failed); `judge`: pairs -> p(same).
    Teacher structures are kept in `cache_path` (JSONL, by content hash, never asked for twice in a lifetime), judgements in memory.
    `stats` counts decompositions, judgements, cache hits, failures and seconds since it was last cleared."""

    def __init__(self, generate: Callable[[list[str]], list[str | None]], judge: Judge, cache_path: str | Path | None = None, name: str = "gsrm",
                 normalize: bool = True, min_words: int = 3):
        self.generate, self.ask, self.name, self.normalize, self.min_words = generate, judge, name, normalize, min_words
        self.cache_path = Path(cache_path) if cache_path else None
        self.cache: dict[str, str] = {}
        self.memo: dict[Pair, float] = {}
        self.stats: Counter[str] = Counter()
        if self.cache_path and self.cache_path.exists():
            text = self.cache_path.read_text(encoding="utf-8", errors="replace")
            for line in text.split("\n"):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:             # cut off in writing: a miss
                    continue
                self.cache[row["key"]] = row["text"]
            if text and not text.endswith("\n"):
                with self.cache_path.open("a") as file:
                    file.write("\n")                     # or the next line would grow onto the half one

    def __call__(self, problems: list[str], traces: list[str], teacher_traces: list[list[str]]) -> list[Score]:
        """One Score per (problem, student trace, its teacher's traces). A near-empty trace scores 0 without asking anybody."""
        started = time.time()
        problems = [getattr(p, "problem", p) for p in problems]
        teachers = self.teachers(problems, teacher_traces)
        asked = [n for n, trace in enumerate(traces) if len(words(trace)) >= self.min_words]
        read = dict(zip(asked, self.decompose([problems[n] for n in asked], [traces[n] for n in asked])))
        scores = [Score(0.0, reason="empty trace") for _ in traces]
        for n in asked:
            if read[n] is None or not any(teachers[n]):
                scores[n] = Score(None, structure=read[n] or [], reason="not decomposed" if read[n] is None else "no teacher structure")
        todo = [n for n in asked if scores[n].value is not None]
        for n, score in zip(todo, structure_rewards([read[n] for n in todo], [teachers[n] for n in todo], self.judge, self.normalize)):
            scores[n] = score
        self.stats["unscored"] += sum(s.value is None for s in scores)
        self.stats["seconds"] += time.time() - started
        return scores

    def teachers(self, problems: list[str], traces: list[list[str]]) -> list[list[list[Step]]]:
        """Each problem's teacher structures, from the cache where they were read before; one that cannot be read is empty (and counted)."""
        flat = list(dict.fromkeys((p, t) for p, ts in zip(problems, traces, strict=True) for t in ts))
        keys = {pt: hashlib.sha256("\0".join((self.name, decompose_prompt(*pt))).encode("utf-8", "replace")).hexdigest() for pt in flat}
        new = [pt for pt in flat if keys[pt] not in self.cache]
        self.stats["cache_hits"] += len(flat) - len(new)
        for pt, steps in zip(new, self.decompose([p for p, _ in new], [t for _, t in new])):
            if steps:
                self.remember(keys[pt], format_steps(steps))
        return [[parse_steps(self.cache.get(keys[p, t], "")).steps for t in ts] for p, ts in zip(problems, traces)]

    def remember(self, key: str, text: str) -> None:
        self.cache[key] = text
        if self.cache_path:
            self.cache_path.parent.mkdir(parents=True, exist_ok=True)
            with self.cache_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "text": text}) + "\n")

    def decompose(self, problems: list[str], traces: list[str]) -> list[list[Step] | None]:
        """The structure of each trace, its unfaithful steps left out; None where two attempts gave nothing that can be read."""
        pending = dict.fromkeys(zip(problems, traces))
        for _attempt in range(2):
            todo = [pt for pt, steps in pending.items() if steps is None]
            self.stats["decompositions"] += len(todo)
            for (problem, trace), text in zip(todo, self.generate([decompose_prompt(p, t) for p, t in todo]) if todo else ()):
                parsed = parse_steps(text or "")
                if text and text.strip() and (parsed.steps or not parsed.dropped):
                    pending[problem, trace] = [s for s in parsed.steps if faithful(s, trace)]
                    self.stats["unfaithful_steps"] += len(parsed.steps) - len(pending[problem, trace])
        self.stats["not_decomposed"] += sum(steps is None for steps in pending.values())
        return [pending[pt] for pt in zip(problems, traces)]

    def judge(self, pairs: list[Pair]) -> list[float | None]:
        """p(same) of each pair; what was once judged is remembered, a failure is not."""
        new = [p for p in dict.fromkeys(pairs) if p not in self.memo]
        self.stats["judgements"] += len(new)
        answers = {p: a if a == a else None for p, a in zip(new, self.ask(new), strict=True)} if new else {}
        self.memo.update((p, a) for p, a in answers.items() if a is not None)
        self.stats["judge_failures"] += sum(a is None for a in answers.values())
        return [self.memo.get(p) for p in pairs]

# ------------------------------------------------------------------------------------------------ how good is GSRM itself

def report_card(read: list[list[Step] | None], gold: list[list[Step]]) -> dict[str, float]:
    """Agreement of read structures with the true ones: share of exactly equal structures; precision, recall and F1 over steps (as multisets, case
    and blanks aside); share not read at all."""
    key = lambda step: tuple(" ".join(getattr(step, kind).lower().split()) for kind in KINDS)
    a, b = [Counter(map(key, steps or [])) for steps in read], [Counter(map(key, steps)) for steps in gold]
    hits, said, true = (sum(c.total() for c in cs) for cs in ([x & y for x, y in zip(a, b)], a, b))
    exact = [steps is not None and [*map(key, steps)] == [*map(key, truth)] for steps, truth in zip(read, gold)]
    return {"exact": sum(exact) / max(len(gold), 1), "precision": hits / max(said, 1), "recall": hits / max(true, 1), "f1": 2 * hits / max(said + true, 1),
            "unread": sum(steps is None for steps in read) / max(len(gold), 1)}


if __name__ == "__main__":                               # as a command it needs a model and a sampler; as a module it needs neither: the arrow stays one-way
    import importlib
    import sys
    importlib.import_module("endpoint").annotate_main(sys.argv[2:]) if sys.argv[1:2] == ["annotate"] else importlib.import_module("eval").gsrm_main()
