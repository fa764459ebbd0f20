"""The embedded world: small problems whose multi-branch structure is known, their teacher, and the tiny student, GSRM and judge that ship in toy/.

People hold numbers. Each person's number is given, or is the sum (mod 10) of two others'. Facts stand in shuffled order, one person is asked for:

    We know: Fay has 0. Dee has 6. Gus has Eli plus Fay. Ann has Gus plus Dee. Ivy has 4. Eli has 4. How many has Ann?

The teacher goes top-down: start at the question, look up what is needed, go into the first unknown part, come back and add. Taking the second part first is just as good: that is
its second trace, a real branch. A step is one hop: meta = whom it serves, query = whom we look up or add, answer = what was found. The student (the "novice") knows the same facts
in other words and wanders: with a probability drawn per trace it looks up anybody; its steps are few, and when they run out it guesses. *Choosing* is what RLKD has to teach it.

    python toy.py                          # problems, tokenizer, student, GSRM, judge -> toy/ (log in toy/make.log)
    python toy.py problems --people 9 --needed 4 6 --count 256 --seed 1 --out dense.jsonl

Sums are mod 10: a guess is right one time in ten. `read` parses a trace by the world's grammar: the true structure, which only measures GSRM.
"""
import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from command import Parser, at_least, ending, folder
from data import Problem, TiktokenTokenizer, append_jsonl, chat_ids, join_completion, load_model, problem_ids, read_jsonl, save_model, split_completion, write_jsonl
from gsrm import KINDS, Step, decompose_prompt, format_steps, judge_prompt, structure_rewards
from rollout import Sampler, TextModel
from sft import token_pair, train_pairs
from update import adamw

MOD, FOLDER = 10, Path(__file__).parent / "toy"
PEOPLE, NEEDED = 11, (7, 8)                             # the level of toy/train.jsonl: so long that sampling the base finds next to no whole walk
NAMES = "Ann Bob Cid Dee Eli Fay Gus Hal Ivy Jim Kay Lou Max Ned".split()

# ------------------------------------------------------------------------------------------------ the world

@dataclass(frozen=True)
class World:
    """parts[x] = the two people whose numbers add up to x's, or () if x's number is given; values[x] = the number; needed = whom the question needs."""
    parts: dict[str, tuple[str, ...]]
    values: dict[str, int]
    target: str
    needed: tuple[str, ...]


def make_world(rng: random.Random, people: int, needed: tuple[int, int]) -> World:
    """A random world of `people` persons in which answering takes between needed[0] and needed[1] of them; ValueError where there is none."""
    if not 3 <= people <= len(NAMES):
        raise ValueError(f"{people} people: a world has 3 to {len(NAMES)}")
    for _ in range(10_000):
        names = rng.sample(NAMES, people)
        parts = {x: tuple(rng.sample(names[:i], 2)) if i >= 3 and rng.random() > 0.35 else () for i, x in enumerate(names)}
        values: dict[str, int] = {}
        for x in names:
            values[x] = sum(values[o] for o in parts[x]) % MOD if parts[x] else rng.randrange(MOD)
        target = rng.choice(names)
        chain = [x for kind, _, x in plan(parts, target) if kind == "look"]
        if needed[0] <= len(chain) <= needed[1]:
            return World(parts, values, target, tuple(chain))
    raise ValueError(f"no world of {people} people in which {needed[0]} to {needed[1]} are needed: ask for fewer, or for more people")


Hop = tuple[str, str, str]                              # (kind, whom it serves, who): ("look", "Ann", "Gus") or ("add", "Gus", "Gus")


def plan(parts: dict[str, tuple[str, ...]], target: str, second_first: bool = False) -> list[Hop]:
    """The teacher's walk: look at whoever is needed, his parts depth first, then add them up."""
    hops: list[Hop] = []
    def visit(serves: str, x: str) -> None:
        hops.append(("look", serves, x))
        for o in parts[x][::-1] if second_first else parts[x]:
            if ("look", o) not in [(kind, who) for kind, _, who in hops]:
                visit(x, o)
        if parts[x]:
            hops.append(("add", x, x))
    visit(target, target)
    return hops


def novice(rng: random.Random, world: World, wander: float, budget: int) -> tuple[list[Hop], int]:
    """(hops, final answer) of a student that leaves the teacher's walk with probability `wander` at each step and guesses when its budget is out."""
    todo, hops, looked, known = plan(world.parts, world.target, rng.random() < 0.5), [], set(), set()
    while len(hops) < budget and world.target not in known:
        hop = next(h for h in todo if h[2] not in (looked if h[0] == "look" else known) and (h[0] == "look" or set(world.parts[h[2]]) <= known))
        if rng.random() < wander:
            ready = [x for x in looked - known if world.parts[x] and set(world.parts[x]) <= known]
            others = [x for x in world.values if x not in looked]
            if ready and rng.random() < 0.3:
                hop = ("add", x := rng.choice(sorted(ready)), x)
            elif others:
                x = rng.choice(others)
                hop = ("look", rng.choice([y for y in world.parts if x in world.parts[y]] or [world.target]), x)
        kind, _, x = hop
        hops.append(hop)
        if kind == "look":
            looked.add(x)
        if kind == "add" or not world.parts[x]:
            known.add(x)
    return hops, world.values[world.target] if world.target in known else rng.randrange(MOD)


def drill(rng: random.Random, world: World, budget: int) -> list[Hop]:
    """Look everybody up and add everything, in an order in which parts come first: practice in the two skills a walk is made of."""
    hops: list[Hop] = []
    for x in world.values:
        hops.append(("look", rng.choice([y for y in world.parts if x in world.parts[y]] or [x]), x))
        if world.parts[x]:
            hops.append(("add", x, x))
    return hops[:budget]

# ------------------------------------------------------------------------------------------------ words

FACTS = {"plain": ("{x} has {d}.", "How many has {x}?"), "other": ("{x} has {d};", "{x} has how many?")}
VOICES = {  # per voice and kind of hop, its paraphrases; {d} is what a look finds ("Eli plus Fay" or "4"), {fa} {va} {fb} {vb} {v} the parts and numbers of a sum
    "student": {"look": ("for {p}, {x} has {d}.", "{p} wants this: {x} has {d}.", "see {p}: {x} has {d}."),
                "add": ("so {x}: {fa}, {fb}, {x} makes {v}.", "for {x} add {fa} and {fb}, {x} makes {v}.", "then {x} from {fa} and {fb}: {x} makes {v}.")},
    "teacher": {"look": ("hmm, {p} depends on {x}, and {x} has {d}.", "because {p} rests upon {x}, recall: {x} has {d}.", "without {x} no {p}, yet {x} has {d}."),
                "add": ("now {x} must be {va} with {vb}, hence {x} makes {v}.", "joining {va} with {vb} here, {x} makes {v}.", "{x} is {va} with {vb}, thus {x} makes {v}.")}}
PAIR = {"student": "{a} plus {b}", "teacher": "{a} together with {b}"}
META = {"look": "for {p}", "add": "then {x}"}
QUERY = {"look": "{x} has what", "add": "{x} makes what"}


def question(world: World, rng: random.Random, wording: str = "plain") -> str:
    """The problem's text; the wording "other" is never seen in pretraining (the transfer test)."""
    fact, asked = FACTS[wording]
    found = lambda x: PAIR["student"].format(a=world.parts[x][0], b=world.parts[x][1]) if world.parts[x] else str(world.values[x])
    facts = [fact.format(x=x, d=found(x)) for x in rng.sample(list(world.parts), len(world.parts))]
    return f"We know: {' '.join(facts)} {asked.format(x=world.target)}"


def say(rng: random.Random, world: World, hops: list[Hop], voice: str, slip: float = 0.0) -> list[str]:
    """One sentence a hop, each a paraphrase drawn by rng; with probability `slip` what was found is wrong."""
    sentences = []
    for kind, p, x in hops:
        a, b = world.parts[x] or ("", "")
        v = rng.randrange(MOD) if rng.random() < slip else world.values[x]
        if rng.random() < slip and a:
            a = rng.choice(list(world.values))
        d = PAIR[voice].format(a=a, b=b) if a else str(v)
        part = lambda o: f"{o} {'makes' if world.parts[o] else 'has'} {world.values[o]}" if o else ""
        sentences.append(rng.choice(VOICES[voice][kind]).format(p=p, x=x, d=d, fa=part(a), fb=part(b), va=world.values.get(a), vb=world.values.get(b), v=v))
    return sentences


@cache
def grammar() -> list[tuple[re.Pattern[str], str]]:
    """(pattern, kind) of every sentence of the world, both voices; a blend of paraphrases ("so Ann from ...") says the same and is taken too."""
    part, found = r"\w+ (?:has|makes) \d", r"(?:(?P<v>\d)|(?P<a>\w+) (?:plus|together with) (?P<b>\w+))"
    groups = dict(p=r"(?P<p>[A-Z]\w+)", x=r"(?P<x>[A-Z]\w+)", d=found, fa=part, fb=part, va=r"\d", vb=r"\d", v=r"(?P<v>\d)")
    alike: dict[tuple, list[list[str]]] = {}                                                     # paraphrases with the same fields in the same order
    for voice, kind, template in [(voice, kind, template) for voice, kinds in VOICES.items() for kind, templates in kinds.items() for template in templates]:
        pieces = re.split(r"\{(\w+)\}", template)                                              # text, field, text, field, ... ; a field's second mention refers back
        alike.setdefault((voice, kind, *pieces[1::2]), []).append(pieces[::2])
    return [(re.compile("".join(f"(?:{'|'.join(map(re.escape, texts))})" + ("" if i == len(fields) else f"(?P={fields[i]})" if fields[i] in fields[:i] else groups[fields[i]])
                                for i, texts in enumerate(zip(*paraphrases)))), kind) for (_, kind, *fields), paraphrases in alike.items()]


def read(trace: str) -> list[Step]:
    """The true structure of a trace in either voice: the steps of its well-formed sentences, in order; anything else is passed over."""
    steps = []
    for sentence in re.findall(r"[^.]*\.", trace):
        for g, kind in [(match.groupdict(), kind) for pattern, kind in grammar() if (match := pattern.fullmatch(sentence.strip()))][:1]:
            found = f"{g['a']} plus {g['b']}" if g.get("a") else g["v"]
            steps.append(Step(META[kind].format(p=g.get("p"), x=g["x"]), QUERY[kind].format(x=g["x"]), found))
    return steps


def make_problems(seed: int, count: int, people: int, needed: tuple[int, int], wording: str = "plain", voice: str = "teacher") -> list[Problem]:
    """`count` different problems of one level, each with the teacher's two traces (one where both orders give the same walk), told in a voice; the seed's are the same in both."""
    rng, problems = random.Random(seed), {}
    while len(problems) < count:
        world = make_world(rng, people, needed)
        walks, text = dict.fromkeys(tuple(plan(world.parts, world.target, swap)) for swap in (False, True)), question(world, rng, wording)
        traces = tuple("\n".join(say(rng, world, list(walk), voice)) for walk in walks)
        problems.setdefault(text, Problem(f"{people}-{needed[0]}{needed[1]}-{seed}-{len(problems)}", text, str(world.values[world.target]), traces, "toy"))
    return list(problems.values())

# ------------------------------------------------------------------------------------------------ tokenizer and training examples

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PATTERN = r" ?[A-Z][a-z]+ (?:has|makes)(?= )|\.\n|\n?\[(?:Meta-reasoning|Sub-problem|Answer) \d+\]:|\[No steps\]|</?[a-z]+>|\n?\\boxed\{| ?[A-Za-z]+| ?\d|\n| ?[^\sA-Za-z\d]|\s"


def tokenizer(thinks: bool) -> TiktokenTokenizer:
    """Every word of the world is one token, with and without a blank before it; anything else falls back to bytes. The student's template opens <think>."""
    texts = [t for voice in VOICES.values() for ts in voice.values() for t in ts] + [t for ts in FACTS.values() for t in ts] + [*PAIR.values(), *META.values(), *QUERY.values()]
    texts += [decompose_prompt("", ""), *(judge_prompt(kind, "", "") for kind in KINDS), "We know makes yes no user assistant system"]
    names = {f"{blank}{x} {verb}" for x in NAMES for verb in ("has", "makes") for blank in ("", " ")}       # one token: looking a person up is then plain induction
    words = {w for text in texts for w in re.findall("[A-Za-z]{2,}", re.sub(r"\{\w+\}", " ", text))} | set(NAMES) | set("0123456789")
    tags = [piece for piece in re.findall(PATTERN, format_steps([Step("a", "b", "c")] * 24)) if piece.strip().startswith("[")]
    marks = re.findall(PATTERN, decompose_prompt("", "") + "<think></think>") + ["\n\\boxed{", "\\boxed{", "[No steps]", ".\n"]
    pieces = {m for m in marks if len(m) > 1 and not m.strip().isalpha()} | set(tags) | words | {" " + w for w in words}
    return TiktokenTokenizer(dict(name="nanorlkd-toy", pattern=PATTERN, words=sorted(p for p in pieces | names if len(p) > 1),
                                  special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", pad="<|endoftext|>", instruction="",
                                  chat_template=TEMPLATE.replace("assistant\n", "assistant\n<think>\n") if thinks else TEMPLATE))


def sized(rng: random.Random, progress: float) -> World:
    """A world for training: small ones first, because all sizes from the start learn several times slower."""
    people = rng.choice((3, 4, 5) if progress < 0.1 else (4, 5, 6, 7, 9, 9, 9) if progress < 0.7 else (5, 7, 9, 9, 11, 11, 11))
    return make_world(rng, people, (1, 6) if people < 9 else (4, 6) if people == 9 else (5, 8))


WANDER, BUDGET = (0.1, 0.2, 0.5, 0.7, 0.9, 0.9), (9, 12, 15)         # a novice in pretraining: how often it wanders, after how many steps it guesses; drawn per trace
HABITS = (0.6, 0.85), (7, 9)                                        # and in its bad habits: it wanders, and gives up before a long walk can end


def student_text(rng: random.Random, progress: float, habits: bool = False) -> tuple[str, str]:
    """(question, completion) of pretraining: drills in the two skills in most of the first half, small worlds in the first 70 %, then everything."""
    world = sized(rng, 1.0 if habits else progress)
    asked = question(world, rng)
    if rng.random() < (0.0 if habits else 0.6 if progress < 0.5 else 0.02):
        return asked, "\n".join(say(rng, world, drill(rng, world, 12), "student"))
    wander, budget = HABITS if habits else (WANDER, BUDGET if progress >= 0.7 else BUDGET[:1])
    hops, answer = novice(rng, world, rng.choice(wander), rng.choice(budget))
    return asked, join_completion("\n".join(say(rng, world, hops, "student")), str(answer))


def make_student(steps: int, seed: int, lr: float, habits: bool = False) -> None:
    """Pretrains the base student on the novice's texts into toy/student; then once more on its `habits`: good walks, of which pretraining needs some to
    teach how long ones end, become so rare that sampling does not find one. That is the sparse regime."""
    torch.manual_seed(seed)
    rng, tok = random.Random(seed), tokenizer(thinks=True)
    model = load_model(FOLDER / "student")[0] if habits else Qwen3ForCausalLM(tiny_config(tok))
    log(f"student{', bad habits' if habits else ''}: {sum(p.numel() for p in model.parameters())} parameters, vocabulary {len(tok)}, {steps} steps of 64 texts, rate {lr}")
    batches = ([token_pair(tok, *student_text(rng, step / steps, habits)) for _ in range(64)] for step in range(steps))
    held_out, started = make_problems(9999, 128, PEOPLE, NEEDED), time.time()
    for step, loss in enumerate(train_pairs(model, batches, steps, lr, schedule, 4096, adamw(model, (0.9, 0.98), 0.01))):
        if step % 500 == 499 or step == steps - 1:
            log(f"student step {step + 1} loss {loss:.3f} {time.time() - started:.0f} s  greedy {probe(model, tok, held_out, 0.0)}  sampled {probe(model, tok, held_out, 1.0)}")
    save_model(model, tok, FOLDER / "student")


def schedule(progress: float) -> float:
    """Warm-up over 1 %, the peak for a third, then down to 5 %."""
    return min(1.0, (progress + 1e-4) / 0.01) * max(0.05, min(1.0, 1.5 * (1 - progress)))


def tiny_config(tok: TiktokenTokenizer) -> Qwen3Config:
    """3 layers, 64 wide, 4 heads: small with a large batch and rate learns look-ups in minutes where a wider one does not."""
    return Qwen3Config(vocab_size=len(tok), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, head_dim=16, intermediate_size=128,
                       max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.06, bos_token_id=None, eos_token_id=tok.eos_token_id,
                       pad_token_id=tok.pad_token_id)


def probe(model: Qwen3ForCausalLM, tok: TiktokenTokenizer, problems: list[Problem], temperature: float) -> str:
    """Accuracy, and mean credit of following the teacher by the true structure, on held-out problems."""
    rollout = Sampler(model, {tok.eos_token_id}, tok.pad_token_id).generate([problem_ids(tok, p) for p in problems], 1, 140, temperature)
    texts = [split_completion(tok.decode(rollout.completion(n), skip_special_tokens=True)) for n in range(len(problems))]
    scores = structure_rewards([read(trace) for trace, _ in texts], [[read(t) for t in p.teachers] for p in problems], lambda pairs: [float(t == s) for _, t, s in pairs])
    right = sum(final == f"\\boxed{{{p.answer}}}" for (_, final), p in zip(texts, problems))
    return f"accuracy {right / len(problems):.2f} structure {sum(s.value for s in scores) / len(problems):.2f}"


def spoil(rng: random.Random, sentences: list[str]) -> str:
    """A trace as students really write them: now and then a sentence repeated, a sentence garbled, the end cut off."""
    out = []
    for sentence in sentences:
        words = sentence.split()
        if rng.random() < 0.02:
            i = rng.randrange(len(words))
            words = rng.choice((words[:i] + words[i + 1:], words[:i] + [rng.choice(NAMES)] + words[i:], words[:i] + words[i + 1:i + 2] + words[i:i + 1] + words[i + 2:]))
        out += [" ".join(words)] * (2 if rng.random() < 0.03 else 1)
    words = re.findall(r"\s*\S+", "\n".join(out))
    return "".join(words[:rng.randrange(1, len(words) + 1)] if rng.random() < 0.15 else words)


def reading_text(rng: random.Random, progress: float) -> tuple[str, str]:
    """(prompt, target) for the decomposer: a trace in either voice, right or wrong or spoilt, and its true structure."""
    world = sized(rng, 3 * progress)
    hops, _ = novice(rng, world, rng.choice((0.0, 0.1, 0.3, 0.7)), rng.choice((9, 12, 15)))
    trace = spoil(rng, say(rng, world, hops, rng.choice(("teacher", "student")), rng.choice((0.0, 0.1))))
    return decompose_prompt(question(world, rng), trace), format_steps(read(trace))


def judging_text(rng: random.Random, progress: float = 1.0) -> tuple[str, str]:
    """(prompt, target) for the judge: two fields of one kind, which mean the same if they hold the same words ("Ann plus Bob", "Bob plus Ann")."""
    kind, hops, (x, y, z) = rng.choice((*KINDS, "answer")), rng.choices(("look", "add"), k=2), rng.sample(NAMES, 3)
    if kind == "answer":
        a = rng.choice((f"{x} plus {y}", f"{x} plus {y}", f"{x} plus {y}", str(rng.randrange(MOD))))
        b = rng.choice((f"{y} plus {x}", f"{x} plus {z}", f"{z} plus {y}", f"{z} plus {x}"))
        a, b = rng.choice(((a, b), (b, a), (f"{x} plus {y}", f"{y} plus {x}")))
    else:
        wordings, names = META if kind == "meta" else QUERY, rng.choice(((x, x), (x, z)))
        a, b = (wordings[hop].format(p=name, x=name) for hop, name in zip(rng.choice((hops, hops[:1] * 2)), names))
    return judge_prompt(kind, a, b), "yes" if sorted(a.split()) == sorted(b.split()) else "no"


def make_reader(name: str, start: str, example: Callable[[random.Random, float], tuple[str, str]], batch: int, steps: int, seed: int, lr: float) -> None:
    """Fine-tunes toy/<start> into toy/<name> on `example`s: the decomposer, and the judge. One model for both learns to judge far more slowly."""
    torch.manual_seed(seed)
    rng, tok = random.Random(seed), tokenizer(thinks=False)
    model, _ = load_model(FOLDER / start)
    log(f"{name}: from toy/{start}, {steps} steps of {batch} texts, rate {lr}")
    batches = ([token_pair(tok, *example(rng, step / steps)) for _ in range(batch)] for step in range(steps))
    held_out, started = [example(random.Random(9999 + i), 1.0) for i in range(200)], time.time()
    for step, loss in enumerate(train_pairs(model, batches, steps, lr, schedule, 4096, adamw(model, (0.9, 0.98), 0.01))):
        if step % 250 == 249 or step == steps - 1:
            reader = TextModel(Sampler(model, {tok.eos_token_id}, tok.pad_token_id), partial(chat_ids, tok), tok.encode, partial(tok.decode, skip_special_tokens=True), 200)
            right = [written == target for written, (_, target) in zip(reader.generate([prompt for prompt, _ in held_out]), held_out)]
            log(f"{name} step {step + 1} loss {loss:.3f} {time.time() - started:.0f} s  exactly right {sum(right) / len(right):.3f}")
    save_model(model, tok, FOLDER / name)


def log(line: str) -> None:
    """To the screen and to toy/make.log."""
    print(line, flush=True)
    with (FOLDER / "make.log").open("a") as file:
        file.write(line + "\n")


def main() -> None:
    parser = Parser(description="Without a command: problems, student, GSRM and judge into toy/.")
    more = parser.add_subparsers(dest="command").add_parser("problems", help="problems of another level, as JSONL")
    for name, default, least in (("people", PEOPLE, 3), ("count", 256, 1), ("seed", 1, 0)):
        more.add_argument(f"--{name}", type=at_least(least), default=default)
    more.add_argument("--needed", type=int, nargs=2, default=NEEDED, metavar=("FROM", "TO"), help="how many people the answer takes")
    more.add_argument("--wording", choices=tuple(FACTS), default="plain")
    more.add_argument("--voice", choices=tuple(VOICES), default="teacher", help="that the teacher's traces are told in")
    more.add_argument("--append", action="store_true", help="behind the problems that --out holds already")
    more.add_argument("--out", required=True, help="JSONL file to write, in another folder than toy/")
    if (args := parser.parse_args()).command == "problems":
        with ending():
            rows = [asdict(p) for p in make_problems(args.seed, args.count, args.people, tuple(args.needed), args.wording, args.voice)]
            if Path(args.out).resolve().parent == FOLDER.resolve():
                raise ValueError(f"--out {args.out}: in toy/ lies what ships: choose another folder")
            there = {row.get("id") for _, row in read_jsonl(args.out) if isinstance(row, dict)} if args.append and Path(args.out).exists() else set()
            if twice := next((row["id"] for row in rows if row["id"] in there), ""):
                raise ValueError(f"{args.out} holds a problem {twice} already, and ids must be unique: choose another --seed than {args.seed}")
            return (append_jsonl if args.append else write_jsonl)(args.out, rows)
    (folder(FOLDER) / "make.log").unlink(missing_ok=True)
    started = time.time()
    log(f"python toy.py with torch {torch.__version__}, {torch.get_num_threads()} threads")
    for seed, split in ((1, "train"), (2, "test")):
        write_jsonl(FOLDER / f"{split}.jsonl", [asdict(p) for p in make_problems(seed, 256, PEOPLE, NEEDED)])
    make_student(4000, 1, 4e-3)
    make_reader("gsrm", "student", reading_text, 40, 3000, 2, 4e-3)
    make_reader("judge", "gsrm", judging_text, 200, 1000, 3, 2e-3)
    (FOLDER / "gsrm" / "gsrm.json").write_text('{"judge": "../judge"}\n')
    make_student(300, 4, 1e-3, habits=True)
    log(f"all made in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
