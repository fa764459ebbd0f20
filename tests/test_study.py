"""The study: its command lines are ones that the other files take, its measures are those of a few rows done by hand, and its page is made from the results file alone."""
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eval as evaluation
import evidence
import measures
import sft
import study
import train

ROOT = Path(study.__file__).parent
PARSE = {"train.py": train.parse_config, "sft.py": sft.parse_config, "eval.py": evaluation.parse_config}


def row(regime, arm, seed, value, **more):
    plain = dict.fromkeys(study.NEEDED, value) | {f"found@{2**i}": value for i in range(7)} | {"larger structure": value, "other structure": value}
    return plain | {"regime": regime, "arm": arm, "seed": seed, "length": 100 * value, "paths": 10 * value, "left": [value, 0.1], "never left": 0.2, "stayed and found": 0.1,
                    "no steps": 0.0, "seconds": 36, "commands": [],
                    "curve": {"outcome": [value / 2, value], "structure": [value, value], "true_structure": [value / 3, value - 0.03 * seed]}, "r": 0.9} | more


def rows(regime="sparse"):
    """Three seeds each of GRPO and RLKD with known means."""
    figures = {"grpo": (0.10, 0.12, 0.11), "rlkd": (0.50, 0.62, 0.53)}
    return [row(regime, arm, seed, value) for arm, values in figures.items() for seed, value in enumerate(values)]


def half(values):
    """Half the 95 % t interval of three values."""
    mean = sum(values) / 3
    return 4.302653 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2) / math.sqrt(3)


def test_every_command_is_one_that_the_files_take(monkeypatch, tmp_path):
    for regime in study.REGIMES:
        assert shlex.split(regime) == [regime]                                     # it is a folder in command lines
        fill = dict(data="toy", root="out/study", seed=7, out="out/x", model="toy/student")
        for template in [*{t for templates in study.ARMS.values() for t in templates}, *study.EVALS.values()]:
            python, file, *flags = shlex.split(template.format(**fill))
            assert python == "python" and "{" not in template.format(**fill) and PARSE[file](flags).seed == 7
        made = {}
        for command in study.data_commands(regime, tmp_path):                       # what is appended stands behind what was written
            words = shlex.split(command)
            name, flags = Path(words[words.index("--out") + 1]).name, dict(zip(words, words[1:]))
            assert ("--append" in words) == (name in made)
            made.setdefault(name, []).append((flags["--seed"], int(flags["--count"])))
        assert made["all.jsonl"] == [("12", 64), ("13", 64), ("15", 64)] and made["transfer.jsonl"] == [("13", 64), ("15", 64)] and made["train.jsonl"] == [("11", 8192)]
    assert set(study.QUICK["arms"]) <= set(study.ARMS) and len(study.QUICK["seeds"]) == 3
    for claim in (*evidence.CLAIMS, *evidence.BEYOND):
        assert {claim[1], claim[2]} <= set(study.ARMS)
    assert set(evidence.REWARDS) <= set(study.ARMS) and set(evidence.LEVELS) == set(study.REGIMES)


def test_the_tables_are_those_of_the_results():
    runs = evidence.gathered(rows()[::-1] + [row("sparse", "rlkd", 7, 0.9)])
    rlkd, gains = (0.50, 0.62, 0.53, 0.9), (0.40, 0.50, 0.42)                        # paired by seed: seed 7 has no partner
    line = next(line for line in evidence.arms_table(runs, "sparse", ["grpo", "rlkd"], {"sampled": "sampled", "length": "length"}).splitlines() if line.startswith("| rlkd"))
    assert line.split(" | ")[1] == "4" and line.split(" | ")[2].startswith(f"{sum(rlkd) / 4:.2f} ± ")
    grpo = next(line for line in evidence.arms_table(runs, "sparse", ["grpo"], {"sampled": "sampled", "length": "length"}).splitlines() if line.startswith("| grpo"))
    assert grpo == f"| grpo | 3 | 0.11 ± {half((0.10, 0.12, 0.11)):.2f} | 11 ± {100 * half((0.10, 0.12, 0.11)):.0f} |"
    against = evidence.against_table(runs, "sparse", ["grpo", "rlkd"], "grpo", {"sampled": "sampled"}).splitlines()
    assert against[2:] == [f"| rlkd | 3 | +0.44 ± {half(gains):.2f} |"]
    claims = (("up", "rlkd", "grpo", "sampled"), ("down", "grpo", "rlkd", "sampled"),
              ("gap", "rlkd", "grpo", "never left"), ("one", "base", "rlkd", "sampled"), ("none", "rlkd", "sft 512", "sampled"))
    runs["sparse", "base"] = {0: row("sparse", "base", 0, 0.1)}
    words = [line.split(" | ")[2].removesuffix(" |") for line in evidence.verdicts(runs, claims, ("sparse",)).splitlines()[2:]]
    assert words == [f"**supported**: +0.440 ± {half(gains):.3f} (3 seeds)", f"**not supported, the opposite**: -0.440 ± {half(gains):.3f} (3 seeds)",
                     "**no difference**: both 0.20 in every seed (3 seeds)", "one seed", "not run"]
    steps = {"grpo": (0, 0, 0), "rlkd": (0.01, -0.01, 0.0), "sft 512": (0.03, -0.03, 0.0), "base": (0.02, 0.02, 0.02)}
    near = evidence.gathered([row("sparse", arm, seed, 0.5 + d) for arm, seeds in steps.items() for seed, d in enumerate(seeds)])
    words = [line.split(" | ")[2].removesuffix(" |") for line in evidence.verdicts(near, tuple(("", arm, "grpo", name) for arm, name in (
        ("rlkd", "sampled"), ("sft 512", "sampled"), ("base", "sampled"), ("rlkd", "paths"))), ("sparse",)).splitlines()[2:]]
    assert [word.split(":")[0] for word in words] == ["**no difference above 0.05**", "undecided", "**supported**", "undecided"] and words[2] == "**supported**: +0.020 (3 seeds)"
    mixed = evidence.gathered([row("sparse", "rlkd", 0, 0.5), row("sparse", "rlkd", 1, 0.7) | {"choice": None}])
    assert "| 0.50 (1 seed) |" in evidence.arms_table(mixed, "sparse", ["rlkd"], {"sampled": "sampled", "choice": "choice"})
    gaps = [0.5 * ((1 - 1 / 3) * value + 0.03 * seed) for seed, value in enumerate((0.50, 0.62, 0.53))]
    reader = evidence.reader_table(evidence.gathered(rows()), "sparse").splitlines()
    assert reader[2:] == [f"| rlkd | 3 | +{sum(gaps) / 3:.3f} ± {half(gaps):.3f} | 0.90 |"]
    levels = evidence.levels_table(evidence.gathered(rows("7-people") + [row("7-people", "base", 0, 0.3)]), evidence.LEVELS).splitlines()
    assert len(levels) == 3 and levels[2].startswith("| 3-4 of 7 | 3 | 0.30 | 0.11 ± ") and "+0.44" in levels[2]
    glance = evidence.glance_table(evidence.gathered(rows() + [row("dense", "rlkd", 0, 0.7)]), ("base", "grpo", "rlkd"), {"sampled": "sampled", "paths": "walks"}).splitlines()
    assert glance[0] == "| arm | sparse: sampled | walks | dense: sampled | walks |" and len(glance) == 4                   # none of the base, which was not run
    assert glance[2:] == [f"| grpo | 0.11 ± {half((0.10, 0.12, 0.11)):.2f} | 1.1 ± {10 * half((0.10, 0.12, 0.11)):.1f} |  |  |",
                          f"| rlkd | 0.55 ± {half((0.50, 0.62, 0.53)):.2f} | 5.5 ± {10 * half((0.50, 0.62, 0.53)):.1f} | 0.70 | 7.0 |"]
    moved = [r | {"larger": r["sampled"] / 2, "other": 0.3 - r["sampled"] / 10} for r in rows("7-people")] + [row("7-people", "base", 0, 0.3)]
    elsewhere = evidence.elsewhere_table(evidence.gathered(moved), evidence.LEVELS).splitlines()
    assert elsewhere[0] == ("| people needed | larger, sampled: base | grpo | rlkd | rlkd - grpo, paired | reworded, sampled: base | grpo | rlkd | rlkd - grpo, paired |")
    cells = elsewhere[2].split(" | ")
    assert len(elsewhere) == 3 and cells[:2] == ["| 3-4 of 7", "0.30"] and [c[:4] for c in cells[2:4]] == ["0.06", "0.28"] and cells[4] == f"+0.22 ± {half(gains) / 2:.2f}"
    assert [c[:4] for c in cells[6:8]] == ["0.29", "0.24"] and cells[8] == f"-0.04 ± {half(gains) / 10:.2f} |"


def test_a_finished_run_is_not_run_again_and_a_failed_command_says_why(tmp_path, monkeypatch, capsys):
    file, ran = tmp_path / "study.jsonl", []
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()[:5]))
    monkeypatch.setattr(study, "one", lambda regime, arm, seed, out, threads: ran.append((regime, arm, seed)) or rows()[5])
    monkeypatch.setattr(study, "run", lambda *a: None)
    monkeypatch.setattr("sys.argv", ["study.py", "--arms", "grpo", "rlkd", "--regimes", "sparse", "--seeds", "0", "1", "2",
                                     "--results", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"])
    study.main()
    assert ran == [("sparse", "rlkd", 2)] and len(file.read_text().splitlines()) == 6 and "| rlkd | 3 |" in capsys.readouterr().out
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="(?s)eval.py --model nowhere.*ended with status"):
        study.run("python eval.py --model nowhere --data nowhere", 1, Path(tmp_path) / "log.txt")
    file.write_text("".join(json.dumps(row) + "\n" for row in (*rows(), rows()[2])))
    with pytest.raises(ValueError, match=r"study.jsonl:7: the run of 'grpo' in 'sparse' with seed 2 stands at .*study.jsonl:3 already"):
        study.read_results(file)
    for line, says in (('{"regime": "sparse"}', "no 'arm'"), ("3", "no line of a study"), (json.dumps(rows()[0] | {"arm": "magic"}), "no arm 'magic'")):
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=rf"study.jsonl:1.*{says}"):
            study.read_results(file)


def generation(name, sample, right, steps, answer="4", structure=0.5, left=None, choices=(), stop="stop"):
    return {"id": name, "sample": sample, "correct": right, "answer": answer, "structure": structure, "true_structure": None,
            "length": 10, "stop": stop, "problem": PROBLEM,
            "steps": [[m, q, a, e] for m, q, a, e in steps], "choices": list(choices), "left_at": left, "temperature": 1.0}


PROBLEM = "We know: Dan has 9. Ann has Bob plus Cid. Cid has 8. Bob has Eve plus Dan. Eve has 7. How many has Ann?"            # Bob 6, Ann 4
WALK = [("for Ann", "Ann has what", "Bob plus Cid", 1.0), ("for Bob", "Bob has what", "Eve plus Dan", 1.0), ("then Bob", "Bob makes what", "6", 1.0),
        ("then Ann", "Ann makes what", "4", 1.0)]


def test_a_walk_is_every_sum_that_the_answer_needs_and_no_guess():
    assert measures.world(PROBLEM) == ("Ann", {"Dan": ((), 9), "Ann": (("Bob", "Cid"), 4), "Cid": ((), 8), "Bob": (("Eve", "Dan"), 6), "Eve": ((), 7)})
    other = PROBLEM.replace(".", ";").replace("How many has Ann?", "Ann has how many?")
    assert measures.world(other) == measures.world(PROBLEM)
    sample = lambda steps, **more: generation("x", 0, True, steps) | more
    order = ("Ann has what", "Bob has what", "Bob makes what", "Ann makes what")
    assert measures.walk(sample(WALK)) == measures.walk(sample(WALK) | {"problem": other}) == order
    detour = [*WALK[:2], ("for Ann", "Fay has what", "3", 0.0), ("for Ann", "Ann has what", "Bob plus Cid", 0.0), *WALK[2:]]
    assert measures.walk(sample(detour)) == order                                    # somebody the answer does not need, and a step said twice
    assert measures.walk(sample([WALK[1], WALK[0], *WALK[2:]])) == (order[1], order[0], *order[2:])
    wrong = [*WALK[:2], ("then Bob", "Bob makes what", "5", 0.5), WALK[3]]
    for steps in (WALK[:3], WALK[3:], wrong, [WALK[0], WALK[3], WALK[2]], []):      # no last sum; nothing but it; on a wrong part; before its part
        assert measures.walk(sample(steps)) is None, steps
    assert measures.walk(sample(WALK, correct=False)) is None and measures.walk(sample(WALK, correct=None)) is None


def test_sums_count_where_both_numbers_were_there():
    """Ann's sum on a wrong or a missing Bob is none of those that are asked for; one that is made again counts again."""
    sums = lambda steps: measures.sums(generation("x", 0, True, steps))
    wrong, again = ("then Bob", "Bob makes what", "5", 0.5), ("then Ann", "Ann makes what", "3", 0.0)
    assert sums(WALK) == ({"Dan", "Cid", "Eve", "Bob", "Ann"}, [True, True])
    assert sums([*WALK[:2], wrong, WALK[3]]) == ({"Dan", "Cid", "Eve"}, [False]) and sums([WALK[3]])[1] == []
    assert sums([wrong, WALK[2], again, WALK[3]])[1] == [False, True, False, True]
    assert sums([("then Dan", "Dan makes what", "9", 1.0), ("then Zed", "Zed makes what", "1", 0.0)])[1] == []          # no sums: a given number, a stranger
    rows = [generation("x", 0, True, WALK), generation("x", 1, False, [*WALK[:2], wrong])]
    assert measures.measures(rows, rows[:1])[0]["sums"] == pytest.approx(2 / 3)
    assert math.isnan(measures.measures([generation("x", 0, False, [])], rows[:1])[0]["sums"])


def test_figures_of_one_student():
    other = [("for Bob", "Bob has what", "Eve plus Dan", 0.0), WALK[0], *WALK[2:]]
    guess = [WALK[0], WALK[3]]
    test = [generation("5-23-12-0", 0, True, WALK, choices=(True, True)), generation("5-23-12-0", 1, True, other, left=0, choices=(False,), structure=0.1),
            generation("5-23-12-0", 2, True, WALK), generation("5-23-12-0", 3, True, guess, left=1),
            generation("5-23-12-1", 0, False, [], answer="5"), *(generation("5-23-12-1", k, False, WALK, answer="5", stop="length") for k in range(1, 4))]
    transfer = [generation("7-34-13-0", 0, True, WALK, choices=(True, True)), generation("7-34-13-0", 1, False, WALK),
                generation("5-23-15-0", 0, False, WALK, structure=0.25), generation("5-23-15-0", 1, False, WALK, structure=0.25)]
    greedy = [generation(f"5-23-{seed}-0", 0, right, WALK) | {"temperature": 0.0} for seed, right in ((12, True), (13, False), (15, True))]
    got = measures.figures(test, transfer, greedy)
    assert (got["greedy"], got["larger greedy"], got["other greedy"]) == (1, 0, 1) and (got["sampled"], got["larger"], got["other"]) == (0.5, 0.5, 0)
    assert got["pass@1"] == 0.5 and got["pass@4"] == 0.5 and got["found@1"] == pytest.approx(3 / 8) and got["found@2"] == pytest.approx(0.5) and got["found@4"] == 0.5
    assert got["paths"] == 1.0 and got["structure"] == pytest.approx((0.4 + 0.5) / 2) and got["other structure"] == 0.25 and got["length"] == 10 and got["truncated"] == 3 / 8
    assert (got["larger found@1"], got["larger found@2"], got["larger paths"], got["larger length"], got["other found@2"]) == (0.5, 1, 1, 10, 0)
    assert got["larger choice"] == 1 and math.isnan(got["other choice"])             # nobody was asked to choose there
    assert got["left"][:2] == [1 / 8, 1 / 8] and (got["never left"], got["stayed and found"], got["no steps"]) == (5 / 8, 2 / 8, 1 / 8)


def test_training_curves_and_their_agreement_with_the_true_structure(tmp_path):
    steps = range(1, 41)
    log = [{"step": n, "rewards/outcome/mean": n / 40, "rewards/structure/mean": {2: math.nan}.get(n) if n in (2, *range(11, 21)) else 0.5, "true_structure": 0.5,
            "completions/mean_length": 7, "entropy": 1, "unscored": n == 2} for n in steps]
    rollouts = [{"step": n, "rewards": {"structure": None if k == 2 else 0.5 * k}, "true_structure": 0.4 * k if n > 16 else 1 - k} for n in steps for k in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rollouts))
    got = measures.rounded(measures.training(tmp_path))
    assert got["curve"]["outcome"] == pytest.approx([5.5 / 40, 15.5 / 40, 25.5 / 40, 35.5 / 40], abs=1e-4) and got["r"] == pytest.approx(1.0)
    assert got["curve"]["structure"] == [0.5, None, 0.5, 0.5] and got["curve"]["unscored"][0] == 0.1       # a step without a scored row has no mean; ten such none
    assert measures.training(tmp_path / "no run") == {}


def test_the_page_is_made_from_the_rows_alone(tmp_path):
    template = tmp_path / "template.md"
    template.write_text("Words.\n<!-- study-sparse -->\nold\n<!-- /study-sparse -->\nmore <!-- study-size -->x<!-- /study-size -->\n")
    both = rows() + rows("dense")
    pages = [evidence.report(both, evidence.blocks(both), tmp_path / name / "page.md", template) for name in ("a", "b") if (tmp_path / name).mkdir() is None]
    assert [p.read_bytes() for p in pages[0]] == [p.read_bytes() for p in pages[1]] and len(pages[0]) == 1 + len(evidence.PICTURES)
    text = pages[0][0].read_text()
    assert (text.startswith("Words.\n<!-- study-sparse -->\n| arm | seeds |") and "old" not in text and "12 runs, 0.1 hours" in text
            and evidence.fill(text, evidence.blocks(both)) == text)
    assert f"{evidence.blocks(both)['study-beyond'].count('±') + evidence.blocks(both)['study-claims'].count('±')} verdicts below" in evidence.blocks(both)["study-chance"]
    with pytest.raises(ValueError, match="study-magic"):
        evidence.fill("<!-- study-magic --><!-- /study-magic -->", {})
    page = evidence.report(both, evidence.blocks(both), tmp_path / "quick.md", ROOT / "docs/study.md")[0].read_text()
    linked = set(re.findall(r"\]\(([\w.]+(?:png|jsonl))\)", page))
    assert linked == {"quick.jsonl", *(f"quick_{name}.png" for name in evidence.PICTURES)} and "of the runs in quick.jsonl" in page


def test_a_page_elsewhere_links_to_what_is_there_and_draws_what_it_has(tmp_path):
    """Runs of unlike lengths, one without the shares of who left: nothing of that ends the report after it has begun to write."""
    some = rows() + rows("dense")[:1]
    some[3]["curve"] = {name: curve[:1] for name, curve in some[3]["curve"].items()}
    some[4]["never left"] = None
    page = evidence.report(some, evidence.blocks(some), tmp_path / "quick.md", ROOT / "docs/study.md")[0]
    same_name = evidence.report(some, evidence.blocks(some), tmp_path / "study.md", ROOT / "docs/study.md")[0].read_text()      # as of the README's own commands
    assert "of the runs in study.jsonl" in same_name and "](bench.md)" not in same_name and "](study_pass.png)" in same_name
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    assert len(links) > 8 and all((tmp_path / link).exists() for link in links if link != "quick.jsonl") and "(bench.md)" not in links


def test_a_step_without_a_scored_row_leaves_a_gap_and_no_more():
    """The curve of structure has no number in its last tens of one seed: that seed is left out, and counted."""
    lines = [row("sparse", "rlkd", seed, 0.5) for seed in range(3)]
    lines[1]["curve"]["structure"] = [None] * len(lines[1]["curve"]["structure"])
    runs = evidence.gathered(lines)
    assert list(evidence.reader_gap(runs, "sparse", "rlkd")) == pytest.approx([evidence.gap(lines[i]["curve"])[-2:].mean() for i in (0, 2)])
    assert "(2 seeds)" in evidence.reader_table(runs, "sparse")


@pytest.mark.parametrize("name, value", [
    ("seed", None), ("seed", 0.5), ("regime", ["sparse"]), ("arm", None), ("seconds", "9"), ("seconds", None), ("sampled", "x"), ("found@64", True), ("curve", None),
    ("curve", {"structure": 3}), ("curve", {"structure": [1.0], "outcome": [1.0, 2.0]}), ("machine", None), ("commands", "x"),
    ("curve", {"structure": [1.0], "outcome": [1.0]}), ("left", ["a"]), ("left", [None]), ("left", 3), ("greedy", math.inf), ("curve", {"outcome": [math.nan]})])
def test_a_field_of_another_kind_is_named_with_its_line(tmp_path, name, value):
    (file := tmp_path / "study.jsonl").write_text(json.dumps(rows()[0]) + "\n" + json.dumps(rows()[1] | {name: value}) + "\n")
    with pytest.raises(ValueError, match=rf"study.jsonl:2: field '{name}' is not what a study writes, got "):
        study.read_results(file)


@pytest.mark.parametrize("arm, held", [("grpo", "grpo/seed0"), ("sft 32", "sft_32/seed0/model"), ("grpo", "grpo/seed0/test.jsonl"), ("sft 32", "sft_32/seed0/test.jsonl")])
def test_a_command_that_outlives_a_killed_study_keeps_its_folder(tmp_path, monkeypatch, arm, held):
    """It holds the lock on what it writes, as train.py, sft.py and eval.py do: a new study takes nothing away from it, and goes on when it has gone."""
    hold = "import sys; from command import writing\nwith writing(sys.argv[1]): print(flush=True); sys.stdin.read()"
    mine = tmp_path / "sparse" / held
    (mine if not mine.suffix else mine.parent).mkdir(parents=True)
    (kept := mine if mine.suffix else mine / "log.jsonl").write_text("{}\n")
    monkeypatch.setattr(study, "run", lambda *a: None)
    monkeypatch.setattr(study, "measured", lambda out: {})
    orphan = subprocess.Popen([sys.executable, "-c", hold, str(mine)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    orphan.stdout.readline()
    with pytest.raises(ValueError, match=rf"another process is writing {mine}: wait for it"):
        study.one("sparse", arm, 0, tmp_path, 1)
    assert kept.read_text() == "{}\n"
    orphan.communicate()
    assert study.one("sparse", arm, 0, tmp_path, 1)["arm"] == arm and not kept.exists()


@pytest.mark.parametrize("words, says", [
    (["--results", "out/study.json"], "go to a file named .jsonl"), (["report", "--arms", "base"], "--arms: report takes all lines"),
    (["measure", "--quick"], "--quick: measure takes all"),
    (["report", "--seeds", "0"], "--seeds: report takes all"), (["--arms", "Dr.GRPO", "--regimes", "dense"], "--arms Dr.GRPO: not run in --regimes dense"),
    (["--arms", "grpo", "sft 512", "--regimes", "5-people"], "--arms 'sft 512': not run in --regimes 5-people")])
def test_flags_that_would_do_nothing_or_harm_are_refused(words, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study.py", *words])
    with pytest.raises(SystemExit):
        study.main()
    assert says in capsys.readouterr().err


def test_a_run_that_is_asked_for_twice_runs_once(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(study, "one", lambda regime, arm, seed, out, threads: ran.append((arm, seed)) or row(regime, arm, seed, 0.7))
    monkeypatch.setattr(study, "run", lambda *a: None)
    monkeypatch.setattr("sys.argv", ["study.py", "--arms", "grpo", "grpo", "--regimes", "sparse", "sparse", "--seeds", "0", "0", "1", "--results", str(tmp_path / "x.jsonl"),
                                     "--out", str(tmp_path / "out")])
    study.main()
    assert sorted(ran) == [("grpo", 0), ("grpo", 1)]


def test_a_folder_with_a_blank_is_one_word_of_the_commands(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(study, "run", lambda command, *rest: said.append(shlex.split(command)))
    monkeypatch.setattr(study, "measured", lambda out: {})
    root = tmp_path / "my study"
    study.one("sparse", "sft 512 -> grpo", 0, root, 1)
    for command in study.data_commands("sparse", root / "sparse/data"):
        study.run(command)
    for words in said:
        paths = [word for word in words if str(tmp_path) in word]
        assert paths and all(path.startswith(f"{root}/sparse/") for path in paths) and "study/sparse/data/train.jsonl" not in words


def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    """Every table of docs/study.md and of the README, byte for byte; the pictures too, where matplotlib is the one that drew them.
    Outside of the marked places there is no figure."""
    results = sorted(study.read_results(ROOT / "docs/study.jsonl"), key=study.order)
    template = Path(shutil.copy(ROOT / "docs/study.md", tmp_path))                # the page is its own template
    pages = evidence.report(results, made := evidence.blocks(results), template, template)
    assert pages[0].read_text() == (ROOT / "docs/study.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "<!-- study-short -->" in readme and evidence.fill(readme, made) == readme
    import matplotlib
    for picture in pages[1:]:
        committed = (ROOT / "docs" / picture.name).read_bytes()
        if f"Matplotlib version{matplotlib.__version__}".encode() in committed:
            assert picture.read_bytes() == committed, picture.name
    for command in re.findall(r"`python study.py (--arms .*?)`", readme):           # of the quoted figures
        words = shlex.split(command)
        assert set(words[1:words.index("--regimes")]) <= set(study.ARMS) and words[words.index("--regimes") + 1] in study.REGIMES and words[-2] == "--results"
    assert len(re.findall(r"`python study.py --arms", readme)) == len(evidence.QUOTES) == 6
    prose = re.sub(r"<!-- (study-[\w-]+) -->.*?<!-- /\1 -->|```.*?```|arXiv [\d.]+|arxiv.org/abs/[\d.]+", "", (ROOT / "docs/study.md").read_text(), flags=re.DOTALL)
    assert not re.findall(r"(?<![\w.])[+-]?0?\.\d+|\d+(?:\.\d+)? ?%(?! t interval| interval| of the data)", prose.replace("0.16M-parameter", ""))


def test_an_sft_model_serves_other_arms_until_its_command_changes(tmp_path, monkeypatch):
    ran = []

    def run(command, threads, log):
        ran.append(command)
        out = Path(command.split("--out ")[1].split()[0])
        out = out / "sft.json" if out.name == "model" else out / "log.jsonl" if out.suffix == "" else out
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
        with log.open("a") as file:
            file.write(f"$ {command}\n")
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "measured", lambda out: {"sampled": 0.5})
    monkeypatch.setattr(study, "training", lambda out: {})
    trained = lambda: [command.split()[1] for command in ran if "eval.py" not in command]
    row = study.one("sparse", "sft 512", 0, tmp_path, 1)
    assert trained() == ["sft.py"] and row["commands"] == ran and row["sampled"] == 0.5
    study.one("sparse", "sft 512 -> grpo", 0, tmp_path, 1)
    assert trained() == ["sft.py", "train.py"]                                        # from the model that is there
    monkeypatch.setitem(study.ARMS, "sft 512", [study.ARMS["sft 512"][0].replace("--epochs 30", "--epochs 3")])
    study.one("sparse", "sft 512", 0, tmp_path, 1)
    assert trained() == ["sft.py", "train.py", "sft.py"] and "--epochs 3 " in ran[-4]
    study.one("sparse", "sft 512 -> rlkd", 0, tmp_path, 1)                            # which wants the one of 30 epochs
    assert trained()[3:] == ["sft.py", "train.py"]
    model = tmp_path / "sparse/sft_512/seed0/model"
    (model / "sft.json").rename(model / "model.safetensors")                          # killed after its first good epoch: sft.json is written last
    study.one("sparse", "sft 512 -> rlkd", 0, tmp_path, 1)
    assert trained()[5:] == ["sft.py", "train.py"]


def test_flags_beside_quick_count(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(study, "go_on", seen.append)
    for more in ([], ["--seeds", "7", "--arms", "grpo"]):
        monkeypatch.setattr("sys.argv", ["study.py", "--quick", "--results", str(tmp_path / "none.jsonl"), *more])
        with pytest.raises(SystemExit):
            study.main()                                                              # there are no results to draw
    assert [(a.arms, a.regimes, a.seeds) for a in seen] == [(study.QUICK["arms"], ["sparse"], [0, 1, 2]), (["grpo"], ["sparse"], [7])]


def test_a_line_that_lacks_a_measure_is_run_again_and_replaced(tmp_path, monkeypatch):
    file, ran = tmp_path / "study.jsonl", []
    old = [row("sparse", "grpo", 0, 0.1), {k: v for k, v in row("sparse", "rlkd", 0, 0.5).items() if k != "found@64"}, row("sparse", "rlkd", 1, 0.6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in old))
    monkeypatch.setattr(study, "one", lambda regime, arm, seed, out, threads: ran.append((arm, seed)) or row(regime, arm, seed, 0.7))
    monkeypatch.setattr(study, "run", lambda *a: None)
    monkeypatch.setattr("sys.argv", ["study.py", "--arms", "grpo", "rlkd", "--regimes", "sparse", "--seeds", "0", "1", "2", "--results", str(file),
                                     "--out", str(tmp_path), "--jobs", "1"])
    study.main()
    assert sorted(ran) == [("grpo", 1), ("grpo", 2), ("rlkd", 0), ("rlkd", 2)]
    lines = study.read_results(file)
    assert lines[0] == old[0] and lines[2] == old[2] and (lines[1]["arm"], lines[1]["seed"], lines[1]["sampled"]) == ("rlkd", 0, 0.7) and len(lines) == 6


def test_measured_again_where_the_samples_are_still_there(tmp_path, monkeypatch, capsys):
    file = tmp_path / "study.jsonl"
    monkeypatch.setattr(study, "measured", lambda out: {**dict.fromkeys(("sampled", "greedy", "larger", "other", "length"), 0.5), "choice": 0.9})
    same = dict.fromkeys(("greedy", "larger", "other", "length"), 0.5) | {"seconds": 1, "commands": [], "r": 0.7, "choice": 0.1}
    lines = [{"regime": "sparse", "arm": arm, "seed": 0, "sampled": sampled} | same for arm, sampled in (("rlkd", 0.5), ("grpo", 0.4), ("base", 0.5))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for arm in ("rlkd", "grpo"):                                                     # of base nothing is left; grpo's samples are of another run than its line
        out = study.place(tmp_path, "sparse", arm, 0)
        out.mkdir(parents=True)
        for name in study.EVALS:
            (out / f"{name}.jsonl").touch()
    study.measure_again(file, tmp_path)
    assert study.read_results(file) == [lines[0] | {"choice": 0.9}, *lines[1:]] and "measured 1 of 3 lines again" in capsys.readouterr().out
    monkeypatch.undo()
    study.measure_again(file, tmp_path)                                              # evaluations that were cut off: empty, whole problems missing, half a line
    (study.place(tmp_path, "sparse", "rlkd", 0) / "test.jsonl").write_text('{"id": ')
    study.measure_again(file, tmp_path)
    assert capsys.readouterr().out.count("measured 0 of 3 lines again") == 2
    file.write_text(json.dumps({k: v for k, v in lines[0].items() if k != "other"}) + "\n")
    monkeypatch.setattr(study, "measured", lambda out: {**dict.fromkeys(("sampled", "greedy", "larger", "other", "length"), 0.5), "choice": 0.9})
    study.measure_again(file, tmp_path)                                              # a line of an older study.py gets what it lacks
    assert study.read_results(file)[0]["other"] == 0.5


def test_nothing_is_lost_where_a_run_fails(tmp_path, monkeypatch):
    """One run's failure ends the study; what ran beside it is written down, what had not begun does not begin."""
    begun = []

    def one(regime, arm, seed, out, threads):
        begun.append(seed)
        if seed == 1:
            raise RuntimeError("seed 1 failed")
        time.sleep(0.05)
        return row(regime, arm, seed, 0.5)
    monkeypatch.setattr(study, "one", one)
    monkeypatch.setattr(study, "run", lambda *a: None)
    file = tmp_path / "study.jsonl"
    monkeypatch.setattr("sys.argv", ["study.py", "--arms", "grpo", "--regimes", "sparse", "--seeds", *map(str, range(40)),
                                     "--results", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"])
    with pytest.raises(RuntimeError, match="seed 1 failed"):
        study.main()
    assert [r["seed"] for r in study.read_results(file)] == [seed for seed in begun if seed != 1] and 0 in begun and len(begun) < 40
