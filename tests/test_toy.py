"""The embedded world: its arithmetic, its grammar read back, its tokenizer, and the shipped checkpoints against the known truth."""
import itertools
import random
from pathlib import Path

import pytest
import torch

import toy
from card import report_card
from data import load_model, load_problems, load_tokenizer, problem_ids, split_completion
from eval import load_gsrm, true_structure
from gsrm import Step, format_steps, parse_steps, reading_rule
from rollout import Sampler

SHIPPED = Path(toy.FOLDER)


def worlds(count: int, seed: int = 0, people: int = 9, needed: tuple[int, int] = (4, 6)):
    rng = random.Random(seed)
    return [(rng, toy.make_world(rng, people, needed)) for _ in range(count)]


def test_worlds_add_up_and_have_the_asked_size():
    for _, w in worlds(200):
        assert len(w.parts) == 9 and 4 <= len(w.needed) <= 6 and w.target in w.needed
        for x, parts in w.parts.items():
            assert w.values[x] in range(10) and (not parts or w.values[x] == sum(w.values[o] for o in parts) % 10)


@pytest.mark.parametrize("second_first", [False, True])
def test_the_teachers_walk_never_uses_what_it_has_not_found(second_first):
    for _, w in worlds(200):
        looked, known = set(), set()
        for kind, serves, x in toy.plan(w.parts, w.target, second_first):
            if kind == "look":
                assert serves == x == w.target or (x in w.parts[serves] and serves in looked)
                looked.add(x)
                known |= set() if w.parts[x] else {x}
            else:
                assert serves == x and set(w.parts[x]) <= known
                known.add(x)
        assert looked == known == set(w.needed)


@pytest.mark.parametrize("voice", ["student", "teacher"])
def test_what_is_said_is_read_back(voice):
    for rng, w in worlds(200):
        hops, _ = toy.novice(rng, w, 0.6, 12)
        true = [Step(f"for {p}", f"{x} has what", " plus ".join(w.parts[x]) or str(w.values[x])) if kind == "look" else
                Step(f"then {x}", f"{x} makes what", str(w.values[x])) for kind, p, x in hops]
        assert toy.read("\n".join(toy.say(rng, w, hops, voice))) == true


def test_reading_passes_over_what_is_no_sentence():
    assert toy.read("") == toy.read("for Ann, Gus has. Ann has Gus plus. plus plus.") == []
    assert toy.read("for Ann, Gus has Eli plus Fay. for Ann, Gus") == [Step("for Ann", "Gus has what", "Eli plus Fay")]
    assert toy.read("so Ann: Cid has 1, Dee makes 2, Bob makes 3.") == []                            # the two mentions must agree
    assert toy.read("so Ann from Cid has 1 and Dee makes 2, Ann makes 3.") == [Step("then Ann", "Ann makes what", "3")]      # a blend of two paraphrases
    assert toy.read("for Ann: Gus has 5.") == [Step("for Ann", "Gus has what", "5")] and toy.read("for Ann add Gus has 5.") == []


def test_a_novice_that_never_wanders_walks_as_the_teacher():
    for rng, w in worlds(100):
        hops, answer = toy.novice(rng, w, 0.0, 99)
        assert hops in (toy.plan(w.parts, w.target), toy.plan(w.parts, w.target, True)) and answer == w.values[w.target]


def test_a_wandering_novice_guesses_right_one_time_in_ten():
    guesses = [(a == w.values[w.target], w.target in {x for kind, _, x in hops if kind == "add"}) for rng, w in worlds(1500) for hops, a in [toy.novice(rng, w, 0.9, 6)]]
    lost = [right for right, walked in guesses if not walked]
    assert len(lost) > 1000 and 0.07 < sum(lost) / len(lost) < 0.13


def test_two_teacher_traces_are_two_branches_of_one_problem():
    for p in toy.make_problems(3, 50, 11, (7, 8)):
        branches = [toy.read(t) for t in p.teachers]
        assert 1 <= len(branches) <= 2 and all(b[-1].answer == p.answer for b in branches)
        assert len(branches) == 1 or (branches[0] != branches[1] and sorted(map(str, branches[0])) == sorted(map(str, branches[1])) or len(branches[0]) == len(branches[1]))


def test_words_of_the_world_are_single_tokens_and_any_text_survives():
    tok = toy.tokenizer(thinks=True)
    for rng, w in worlds(50, people=11, needed=(7, 8)):
        text = toy.question(w, rng) + "\n" + "\n".join(toy.say(rng, w, toy.plan(w.parts, w.target), rng.choice(["student", "teacher"])))
        ids = tok.encode(text)
        assert tok.decode(ids) == text and not [tok.decode([i]) for i in ids if i < 256 and chr(i).isalpha()]
    for text in ("naïve 日本語 \x00 <|im_end|>", "[Answer 3]: x", ""):
        assert tok.decode(tok.encode(text)) == text
    assert len(tok) < 700


def test_problems_are_a_function_of_the_seed():
    assert toy.make_problems(7, 5, 9, (4, 6)) == toy.make_problems(7, 5, 9, (4, 6)) != toy.make_problems(8, 5, 9, (4, 6))


def test_problems_are_appended_once(tmp_path, monkeypatch):
    """A second call of the same seed, in other words too, is refused and touches nothing; another seed or level goes behind what is there."""
    out = tmp_path / "problems.jsonl"
    def call(*flags):
        monkeypatch.setattr("sys.argv", ["toy.py", "problems", "--people", "5", "--needed", "2", "4", "--count", "3", "--out", str(out), "--append", *flags])
        toy.main()
    call("--seed", "1")
    call("--seed", "2")
    first = out.read_bytes()
    for more in ([], ["--wording", "other"], ["--count", "1"]):
        with pytest.raises(SystemExit, match=r"^error: .*problems.jsonl holds a problem 5-24-2-0 already.*choose another --seed than 2$"):
            call("--seed", "2", *more)
    assert out.read_bytes() == first
    call("--seed", "2", "--people", "6")
    want = [*toy.make_problems(1, 3, 5, (2, 4)), *toy.make_problems(2, 3, 5, (2, 4)), *toy.make_problems(2, 3, 6, (2, 4))]
    assert load_problems(out) == want


def test_training_texts_of_gsrm_are_in_the_step_format():
    rng = random.Random(0)
    for _ in range(200):
        prompt, target = toy.reading_text(rng, 1.0)
        assert format_steps(parse_steps(target).steps) == target and reading_rule(toy.read)([prompt]) == [target]
    verdicts = [toy.judging_text(rng) for _ in range(1000)]
    assert 0.4 < sum(target == "yes" for _, target in verdicts) / 1000 < 0.7
    for prompt, target in verdicts:
        first, second = (sorted(line[3:].split()) for line in prompt.splitlines()[1:])
        assert (first == second) == (target == "yes")


# ------------------------------------------------------------------------------------------------ what ships in toy/

def test_shipped_folder_is_small_and_its_problems_are_those_of_the_code():
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file()) < 6e6
    assert load_problems("toy") == toy.make_problems(1, 256, toy.PEOPLE, toy.NEEDED) and load_problems("toy", "test") == toy.make_problems(2, 256, toy.PEOPLE, toy.NEEDED)
    assert not {p.problem for p in load_problems("toy")} & {p.problem for p in load_problems("toy", "test")}
    assert (load_tokenizer("toy/student").spec == toy.tokenizer(thinks=True).spec
            and load_tokenizer("toy/gsrm").spec == load_tokenizer("toy/judge").spec == toy.tokenizer(thinks=False).spec)


@pytest.fixture(scope="module")
def samples():
    """(problems, texts): two sampled completions of 48 held-out problems by the shipped student."""
    model, tok = load_model("toy/student")
    problems = [p for p in load_problems("toy", "test")[:48] for _ in range(2)]
    rollout = Sampler(model, {tok.eos_token_id}, tok.pad_token_id).generate([problem_ids(tok, p) for p in problems], 1, 150, 1.0, seed=5)
    return problems, [tok.decode(rollout.completion(n), skip_special_tokens=True) for n in range(len(problems))]


def test_shipped_gsrm_reads_teacher_and_student_as_they_are(samples):
    gsrm = load_gsrm("toy/gsrm", "", None, "cpu", 200)
    problems, texts = samples
    for traces in ([p.teachers[n % len(p.teachers)] for n, p in enumerate(problems)], [split_completion(t)[0] for t in texts]):
        card = report_card(gsrm.decompose([p.problem for p in problems], traces), [toy.read(t) for t in traces])
        assert card["f1"] > 0.97 and card["exact"] > 0.7, card                  # what it misses is mostly a last step written twice


def test_shipped_reward_is_nearly_the_true_one(samples):
    problems, texts = samples
    learned = load_gsrm("toy/gsrm", "", None, "cpu", 200)([p.problem for p in problems], [split_completion(t)[0] for t in texts], [list(p.teachers) for p in problems])
    pairs = torch.tensor([(score.value, true) for score, true in zip(learned, true_structure(toy.read, problems, texts))])
    assert torch.corrcoef(pairs.T)[0, 1] > 0.95 and (pairs[:, 0] - pairs[:, 1]).abs().mean() < 0.02


def test_shipped_judge_knows_same_from_different():
    judge = load_gsrm("toy/gsrm", "", None, "cpu", 200).judge
    pairs = list(itertools.combinations(toy.NAMES, 2))
    same = judge([("answer", f"{a} plus {b}", f"{b} plus {a}") for a, b in pairs])
    other = judge([pair for a, b in pairs for pair in (("answer", f"{a} plus {b}", f"{next(c for c in toy.NAMES if c not in (a, b))} plus {a}"),
                                                       ("meta", f"for {a}", f"for {b}"), ("meta", f"for {a}", f"then {a}"), ("query", f"{a} has what", f"{b} has what"),
                                                       ("query", f"{a} has what", f"{a} makes what"))])
    assert sum(p > 0.5 for p in same) > 0.95 * len(same) and sum(p < 0.5 for p in other) > 0.97 * len(other)


def test_shipped_student_starts_at_the_guessing_floor(samples):
    problems, texts = samples
    assert sum(f"\\boxed{{{p.answer}}}" in t for t, p in zip(texts, problems)) / len(texts) < 0.2
    true = true_structure(toy.read, problems, texts)
    assert 0.02 < sum(true) / len(true) < 0.2 and torch.tensor(true).unique().numel() > 3       # a mild share of good beginnings: something for RL to find
