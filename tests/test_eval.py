"""Sampling and scoring of an evaluation, its tables, and what `python eval.py` prints, against hand-made rows."""
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import generations
import plan
import plots
import report
import toy
from data import load_model, load_problems, problem_ids, read_jsonl, stop_and_pad_ids, write_jsonl
from gsrm import GSRM, exact_judge, reading_rule, structure_rewards
from rollout import Sampler

ROOT = Path(evaluation.__file__).parent


def row(problem, correct, structure=None, true=None, stop="stop", length=10, temperature=1.0):
    return {"id": problem, "correct": correct, "structure": structure, "true_structure": true, "stop": stop, "length": length, "temperature": temperature}


def test_summary_treats_problems_as_clusters():
    rows = [row("a", True), row("a", True), row("a", False), row("a", True), row("b", False), row("b", False), row("b", False), row("b", False)]
    s = report.summary(rows)
    assert s["mean@4"][0] == pytest.approx((0.75 + 0) / 2)
    assert s["mean@4"][1:3] == (0.0, 1.0)                                   # two problems say next to nothing; cut at what a share can be
    lengths = report.summary([row(name, True, length=n) for name, n in (("a", 400), ("a", 420), ("b", 430), ("b", 440))])["length"]
    half = 12.706 * (25 / math.sqrt(2)) / math.sqrt(2)                     # t(0.975, 1) * sd / sqrt(N)
    assert lengths == pytest.approx((422.5, 422.5 - half, 422.5 + half, half / 12.706), rel=1e-3)
    assert s["pass@2"][0] == pytest.approx((1 - 0 / 6) / 2) and s["pass@4"][0] == 0.5
    assert s["truncated"][0] == 0 and s["length"][0] == 10 and s["ungraded"][0] == 0


def test_what_could_not_be_graded_or_scored_is_left_out_and_counted():
    s = report.summary([row("a", True, 0.5), row("a", None, None), row("b", False, 1.0), row("b", False, None)])
    assert s["mean@2"][0] == pytest.approx((1.0 + 0.0) / 2) and s["structure"][0] == pytest.approx(0.75) and s["ungraded"][0] == 1
    assert s["pass@2"][0] == 0.0                                           # only b has all its samples graded


def test_correlation_closed_form():
    assert report.correlation([row("a", 1, x, 2 * x + 1) for x in (0.0, 0.2, 0.9)]) == pytest.approx(1.0)
    assert report.correlation([row("a", 1, x, -x) for x in (0.0, 0.2, 0.9)] + [row("a", 1, None, 5.0)]) == pytest.approx(-1.0)
    assert math.isnan(report.correlation([row("a", 1, 0.5, x) for x in (0.0, 1.0)]))


def test_true_structure_is_the_structure_reward_of_the_true_steps():
    problems = load_problems("toy", "test")[:6]
    texts = [p.teachers[-1] + "</think>" for p in problems[:5]] + ["</think>"]
    assert evaluation.true_structure(toy.read, problems, texts) == [1.0] * 5 + [0.0] and evaluation.true_structure(None, problems, texts) == [None] * 6
    cut = [t.split("\n")[0] for t in texts[:5]]
    want = [s.value for s in structure_rewards([toy.read(t) for t in cut], [[toy.read(t) for t in p.teachers] for p in problems[:5]], exact_judge)]
    assert evaluation.true_structure(toy.read, problems[:5], [c + "</think>" for c in cut]) == want and all(0 < v < 0.2 for v in want)


def test_rows_say_what_was_sampled_and_can_be_drawn_again():
    model, tok = load_model("toy/student")
    problems = load_problems("toy", "test")[:3]
    gsrm = evaluation.load_gsrm("toy:read", "", None, "cpu")
    rows = evaluation.evaluate(model, tok, problems, 2, 1.0, 1.0, 60, 7, None, gsrm, toy.read)
    assert [(r["id"], r["sample"]) for r in rows] == [(p.id, k) for p in problems for k in (0, 1)] and all(r["length"] <= 60 for r in rows)
    assert rows == evaluation.evaluate(model, tok, problems, 2, 1.0, 1.0, 60, 7, None, gsrm, toy.read)
    assert all(r["structure"] == r["true_structure"] for r in rows)        # the rule is the truth
    greedy = evaluation.evaluate(model, tok, problems, 8, 0.0, 1.0, 60)
    assert len(greedy) == 3 and all(r["structure"] is None for r in greedy)


CONFIG = evaluation.Config(model="toy/student", data="toy", k=3, limit=5, temperature=1.0, top_p=0.9, max_new_tokens=40, seed=5, device="cpu")


@pytest.fixture
def small_waves(monkeypatch):
    """Waves of 6 rows: two problems with three samples each. -> the problems' numbers of each call of the sampler."""
    asked, generate = [], Sampler.generate
    monkeypatch.setattr(plan, "Sampler", partial(Sampler, max_rows=6))
    monkeypatch.setattr(Sampler, "generate", lambda self, prompts, *args: (asked.append(args[-1]), generate(self, prompts, *args))[1])
    return asked


def test_any_stored_generation_can_be_drawn_again_alone(tmp_path, small_waves):
    evaluation.main(replace(CONFIG, out=str(tmp_path / "rows.jsonl")))
    rows, problems, (model, tok) = [r for _, r in read_jsonl(tmp_path / "rows.jsonl")], load_problems("toy", "test"), load_model("toy/student")
    assert small_waves == [[0, 1], [2, 3], [4]] and [(r["id"], r["index"], r["sample"]) for r in rows] == [(problems[i].id, i, g) for i in range(5) for g in range(3)]
    assert all(r["gold"] == problems[r["index"]].answer and r["length"] == len(r["tokens"]) and r["text"].endswith(tok.decode(r["tokens"], skip_special_tokens=True)) for r in rows)
    settings, sampler = json.loads((tmp_path / "rows.settings.json").read_text())["config"], Sampler(model, *stop_and_pad_ids(model, tok))
    for r in (rows[7], rows[14]):
        again = sampler.generate([problem_ids(tok, problems[r["index"]])], r["sample"] + 1, settings["max_new_tokens"], r["temperature"],
                                 settings["top_p"], r["seed"], [r["index"]])
        assert again.completion(r["sample"]) == r["tokens"] and ("stop" if again.finished[r["sample"]] else "length") == r["stop"]
    assert len({tuple(r["tokens"]) for r in rows}) > 10


@pytest.mark.parametrize("left", ["half a line", "half a problem", "half a first line", "nothing", "everything"])
def test_an_interrupted_evaluation_goes_on(tmp_path, small_waves, left, capsys):
    out = tmp_path / "rows.jsonl"
    evaluation.main(replace(CONFIG, out=str(out)))
    table, whole = capsys.readouterr().out.split("right so far")[-1].partition("mean@3")[2], out.read_text()
    lines, todo = whole.splitlines(keepends=True), {"half a line": [[2, 3], [4]], "half a problem": [[1, 2], [3, 4]], "everything": []}.get(left, [[0, 1], [2, 3], [4]])
    out.write_text({"half a line": "".join(lines[:6]) + lines[6][:40], "half a problem": "".join(lines[:4]), "half a first line": lines[0][:40],
                    "nothing": "", "everything": whole}[left])
    small_waves.clear()
    evaluation.main(replace(CONFIG, out=str(out)))
    assert small_waves == todo and out.read_text() == whole and sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "rows.settings.json"]
    assert capsys.readouterr().out.partition("mean@3")[2] == table


def test_what_an_outage_left_unscored_is_scored_by_the_same_command(tmp_path, small_waves, capsys, monkeypatch):
    """Nothing is sampled again, only what has no reward is asked for, and the file is as if there had been no outage."""
    read, up, asked = reading_rule(toy.read), set(range(3)), []

    def generate(prompts: list[str]) -> list[str | None]:
        asked.append(len(prompts))
        return [text if n in up or "all" in up else None for n, text in enumerate(read(prompts))]
    monkeypatch.setattr(evaluation, "load_gsrm", lambda *args, **more: GSRM(generate, exact_judge, None, "stub", min_words=0))
    config = replace(CONFIG, k=1, gsrm="toy:read", max_new_tokens=60)
    up.add("all")
    evaluation.main(replace(config, out=str(tmp_path / "whole.jsonl")))
    up.clear()
    said = capsys.readouterr().out
    assert "could not be scored" not in said
    small_waves.clear()
    evaluation.main(replace(config, out=str(tmp_path / "rows.jsonl")))
    said, rows = capsys.readouterr().out, [r for _, r in read_jsonl(tmp_path / "rows.jsonl")]
    assert "structure: 5 samples could not be scored: not decomposed 5 (the same command tries them again)" in said and {r["reason"] for r in rows} == {"not decomposed"}
    assert small_waves and all(r["structure"] is None and r["correct"] is not None for r in rows)
    up.add("all")
    small_waves.clear()
    asked.clear()
    evaluation.main(replace(config, out=str(tmp_path / "rows.jsonl")))
    assert "5 completions in " in (said := capsys.readouterr().out) and "were scored again: now 0 have none" in said and not small_waves
    assert (tmp_path / "rows.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    asked.clear()
    evaluation.main(replace(config, out=str(tmp_path / "rows.jsonl")))
    assert not asked and "scored again" not in capsys.readouterr().out


def test_generations_cut_at_any_byte_are_gone_on_with(tmp_path):
    """The last line's text has characters of two and four bytes: wherever it is cut, the whole problems stay, byte for byte."""
    rows = [row(name, True) | {"sample": g, "text": "π 𝜋"} for name in "ab" for g in (0, 1)]
    out = tmp_path / "rows.jsonl"
    evaluation.start_file(out, {}, 2)
    evaluation.write_jsonl(out, rows)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    for end in range(sum(map(len, lines[:3])), len(whole) + 1):
        out.write_bytes(whole[:end])
        kept = 4 if end == len(whole) else 2
        assert evaluation.start_file(out, {}, 2) == rows[:kept] and out.read_bytes() == b"".join(lines[:kept])


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path):
    out, data, lines = tmp_path / "rows.jsonl", tmp_path / "data.jsonl", (ROOT / "toy/test.jsonl").read_text().splitlines()[:2]
    data.write_text("\n".join(lines))
    config = replace(CONFIG, out=str(out), data=str(data))
    evaluation.main(config)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != data}
    for change, words in ((dict(k=4), "config k was 3, is 4"), (dict(temperature=0.0), "temperature"), (dict(seed=6), "seed"),
                          (dict(model="toy/gsrm"), "model_files model.safetensors was"), (dict(instruction="How?"), "prompts_sha256")):
        with pytest.raises(ValueError, match=f"other settings.*{words}.*choose another --out"):
            evaluation.main(replace(config, **change))
    with pytest.raises(ValueError, match="reward_model was None, is .*toy:read"):
        evaluation.main(replace(config, gsrm="toy:read"))
    data.write_text("\n".join(reversed(lines)))
    with pytest.raises(ValueError, match="problems_sha256 was"):
        evaluation.main(config)
    (tmp_path / "mine.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="mine.jsonl exists already, without a record"):
        evaluation.main(replace(config, out=str(tmp_path / "mine.jsonl")))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != data} == kept | {"mine.jsonl": b"precious"}


@pytest.mark.parametrize("name, change", [("config.json", ("rope_theta", 100.0)), ("generation_config.json", ("eos_token_id", 65)), ("tiktoken.json", ("name", "other")),
                                          ("pytorch_model.bin", 1.3), ("pytorch_model.bin", None), ("more.safetensors", None)])
def test_an_evaluation_is_not_gone_on_with_under_another_model(tmp_path, name, change):
    """Every file of the model's folder that samples follow from: changed, gone or new, each is named; put back, the evaluation goes on."""
    folder, out = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(ROOT / "toy/student", folder)
    if name == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    config = replace(CONFIG, model=str(folder), k=1, limit=2, out=str(out))
    evaluation.main(config)
    whole, file = out.read_bytes(), folder / name
    out.write_bytes(whole.splitlines(keepends=True)[0])
    kept, before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}, file.read_bytes() if file.exists() else None
    if isinstance(change, float):
        torch.save({key: change * tensor for key, tensor in torch.load(file).items()}, file)
    elif change:
        file.write_text(json.dumps(replaced(json.loads(file.read_text()), *change)))
    elif before:                                                           # the same weights in another format: the file is another one
        save_file({key: tensor.clone() for key, tensor in torch.load(file).items()}, folder / "model.safetensors", {"format": "pt"})
        file.unlink()
    else:
        save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=rf"other settings.*model_files {name} was .*, is .*choose another --out"):
        evaluation.main(config)
    assert kept == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    file.write_bytes(before) if before else file.unlink()
    (folder / "model.safetensors").unlink() if name == "pytorch_model.bin" and change is None else None
    evaluation.main(config)
    assert out.read_bytes() == whole


def replaced(tree, key, value):
    return {k: value if k == key else replaced(v, key, value) if isinstance(v, dict) else v for k, v in tree.items()}


def test_settings_of_an_earlier_version_say_so(tmp_path):
    out, record = tmp_path / "rows.jsonl", tmp_path / "rows.settings.json"
    out.write_text("x")
    record.write_text(json.dumps({"config": {"k": 3}, "weights_sha256": "ab"}))
    with pytest.raises(ValueError, match=r"rows.settings.json is of an earlier version.*\*.safetensors only.*choose another --out"):
        evaluation.start_file(out, {"config": {"k": 3}, "model_files": {"config.json": "cd"}}, 3)
    assert out.read_text() == "x"


def test_the_budget_is_lowered_to_the_models_positions_and_said(tmp_path, monkeypatch, capsys):
    model, tok = load_model("toy/student")
    longest = max(len(problem_ids(tok, p)) for p in load_problems("toy", "test")[:5])
    model.config.max_position_embeddings = longest + 7
    monkeypatch.setattr(evaluation, "load_model", lambda *_: (model, tok))
    rows, _, _ = evaluation.sample_rows(replace(CONFIG, max_new_tokens=32768))
    assert max(r["length"] for r in rows) == 7 and f"lowered from 32768 to 7: the model has {longest + 7} positions, the longest prompt {longest} tokens" in capsys.readouterr().out
    model.config.max_position_embeddings = longest
    with pytest.raises(ValueError, match="nothing can be sampled"):
        evaluation.sample_rows(CONFIG)


NEEDED = ["--model", "toy/student", "--data", "toy"]


@pytest.mark.parametrize("flags, words", [("--k 0", "--k: '0' is not a whole number of 1 or more"), ("--temperature -1", "--temperature: '-1' is not a finite number of 0 or more"),
                                          ("--top_p 0", "'0' is not a finite number in (0, 1]"), ("--top_p 1.01", "'1.01' is not a finite number in (0, 1]"),
                                          ("--max_new_tokens 0", "'0' is not a whole number of 1 or more"), ("--limit -1", "--limit: '-1'"), ("--seed -1", "--seed: '-1'"),
                                          ("--k 1.5", "--k: '1.5' is not a whole number"), ("--engine sglang", "--engine: invalid choice: 'sglang'"),
                                          ("--dtype int4", "invalid choice: 'int4'")])
def test_bad_flags_say_so(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.parse_config(NEEDED + flags.split())
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_flags_at_the_ends_of_their_intervals():
    config = evaluation.parse_config(NEEDED + "--top_p 1 --temperature 0 --k 1 --limit 0 --seed 0 --engine own".split())
    assert (config.top_p, config.temperature, config.k, config.limit, config.seed) == (1.0, 0.0, 1, 0, 0)


def test_bad_data_names_its_line(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(ValueError, match="data.jsonl:1: field 'id'"):
        evaluation.main(replace(CONFIG, data=str(tmp_path / "data.jsonl"), out=str(tmp_path / "rows.jsonl")))
    assert not (tmp_path / "rows.jsonl").exists() and not (tmp_path / "rows.settings.json").exists()


def test_vllm_missing_is_an_error_that_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit):
        evaluation.parse_config([*NEEDED, "--engine", "vllm"])
    assert "pip install vllm" in capsys.readouterr().err


def test_vllm_gets_token_ids_every_stop_and_a_seed_for_each_sample(tmp_path, monkeypatch):
    """A stand-in with vLLM's interface, our own sampler inside: rows in the order that they are stored in, finish reasons as they are,
    the same file as from our engine otherwise."""
    model, tok = load_model("toy/student")
    asked, sampler = [], Sampler(model, *stop_and_pad_ids(model, tok))

    class Engine:
        def __init__(self, model, dtype, seed):
            assert (model, dtype, seed) == ("toy/student", "auto", 5)

        def generate(self, prompts, params):
            rollouts = [sampler.generate([prompt["prompt_token_ids"]], 1, p.max_tokens, p.temperature, p.top_p, p.seed) for prompt, p in zip(prompts, params, strict=True)]
            asked.extend(params)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(r.completion(0)), finish_reason="stop" if r.finished[0] else "length")]) for r in rollouts]
    stand_in = ModuleType("vllm")
    stand_in.__spec__, stand_in.LLM, stand_in.SamplingParams = ModuleSpec("vllm", None), Engine, lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(evaluation, "version", lambda name: "0")
    evaluation.main(replace(CONFIG, engine="vllm", max_new_tokens=70, out=str(tmp_path / "rows.jsonl")))
    rows, problems = [r for _, r in read_jsonl(tmp_path / "rows.jsonl")], load_problems("toy", "test")
    assert [(r["id"], r["index"], r["sample"]) for r in rows] == [(problems[i].id, i, g) for i in range(5) for g in range(3)] and {r["stop"] for r in rows} == {"stop", "length"}
    stops = sorted(stop_and_pad_ids(model, tok)[0])
    assert len({p.seed for p in asked}) == len(asked) == 15 and all((p.top_p, p.temperature, p.max_tokens, p.stop_token_ids) == (0.9, 1.0, 70, stops) for p in asked)
    for row, p in zip(rows, asked):
        again = sampler.generate([problem_ids(tok, problems[row["index"]])], 1, 70, 1.0, 0.9, p.seed)
        assert row["tokens"] == again.completion(0) and row["stop"] == ("stop" if again.finished[0] else "length") and row["length"] == len(row["tokens"])
    asked.clear()
    evaluation.main(replace(CONFIG, engine="vllm", max_new_tokens=70, out=str(tmp_path / "rows.jsonl")))
    assert not asked                                                        # all there


def test_rescore_grades_again_and_says_what_changed(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"id": str(n), "sample": 0, "temperature": float(n < 3), "correct": old, "answer": "?", "gold": "\\frac{1}{2}", "structure": None, "true_structure": None,
             "length": 3, "stop": "stop", "text": f"so</think>\\boxed{{{answer}}}"} for n, (answer, old) in enumerate((("1/2", False), ("2/4", None), ("3", True), ("0.5", True)))]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluation.commands(["rescore", str(file)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "3 of 4 verdicts changed: 1 wrong -> right, 1 not graded -> right, 1 right -> wrong"
    assert said[1].split()[-2:] == ["sampled", "greedy"]
    assert said[2].split() == "mean@1 0.667 +- 0.333 [0.000, 1.000] 1.000".split()  # right, right, wrong; one problem, right
    now = [r for _, r in read_jsonl(file)]
    assert [(r["correct"], r["answer"]) for r in now] == [(True, "1/2"), (True, "2/4"), (False, "3"), (True, "0.5")] and [r["text"] for r in now] == [r["text"] for r in rows]
    evaluation.commands(["rescore", str(file)])
    assert capsys.readouterr().out.splitlines()[0] == "0 of 4 verdicts changed" and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    write_jsonl(file, rows)
    (link := tmp_path / "link.jsonl").symlink_to(file)
    evaluation.commands(["rescore", str(link)])                             # what the link leads to is graded, and the link stays
    assert link.is_symlink() and [r for _, r in read_jsonl(file)] == now
    with pytest.raises((ValueError, OSError), match="give a file that eval.py wrote"):
        evaluation.commands(["rescore", str(tmp_path / "no/such.jsonl")])
    assert not (tmp_path / "no").exists()
    file.write_text(json.dumps({k: v for k, v in rows[0].items() if k != "gold"}) + "\n")
    with pytest.raises(ValueError, match="generation 1 has no gold answer"):
        evaluation.commands(["rescore", str(file)])


def test_show_marks_each_step_and_where_it_left():
    text = generations.show({"problem": "P?", "text": " trace</think>4", "answer": "4", "correct": True, "structure": 0.375, "true_structure": 0.375, "left_at": 2,
                        "steps": [["m1", "q1", "a1", 1.0], ["m2", "q2", "a2", 0.5], ["m3", "q3", "a3", 0.0]]})
    lines = [line.split() for line in text.splitlines() if line.startswith("  ") and "reward" not in line]
    assert [line[0] for line in lines] == ["+", "~", "x"] and "left the teacher's branch" in text.splitlines()[-2]


def test_a_wrong_function_name_says_so():
    for name in ("toy:nothing", "nowhere:read", "toy"):
        with pytest.raises(ValueError, match="module:function"):
            evaluation.load_function(name)


def test_a_reward_model_behind_an_endpoint():
    pytest.importorskip("openai", reason="openai is not installed")
    with pytest.raises(ValueError, match="which model.*#"):
        evaluation.load_gsrm("http://127.0.0.1:9/v1", "", None, "cpu")
    gsrm = evaluation.load_gsrm("http://127.0.0.1:9/v1#m", "http://127.0.0.1:9/v1#j", None, "cpu")
    gsrm.generate.__self__.retries = 0                                      # nobody listens on the discard port
    assert [s.value for s in gsrm(["p"], ["a b c d"], [["a b c d"]])] == [None] and gsrm.generate.__self__.model == "m"


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_commands_on_what_a_run_leaves(tmp_path, capsys):
    """A step's rollouts as train.py writes them, shown and drawn."""
    model, tok = load_model("toy/student")
    problems, gsrm = [p for p in load_problems("toy", "test")[:2] for _ in range(2)], evaluation.load_gsrm("toy:read", "", None, "cpu")
    rollout = Sampler(model, *stop_and_pad_ids(model, tok)).generate([problem_ids(tok, p) for p in problems[::2]], 2, 60, 1.0)
    texts = evaluation.whole_turns(tok, [rollout.completion(n) for n in range(4)])
    scores = gsrm([p.problem for p in problems], texts, [list(p.teachers) for p in problems])
    rows = report.rollout_rows(1, problems, texts, rollout, {"structure": [s.value for s in scores]}, scores, [0.5, -0.5, 1.0, -1.0], [None] * 4, 2)
    evaluation.write_jsonl(tmp_path / "rollouts.jsonl", rows)
    evaluation.write_jsonl(tmp_path / "log.jsonl", [report.log_row(1, rows, {"structure": 1.0}, 2)])
    evaluation.commands(["show", str(tmp_path), "--problem", problems[2].id, "--sample", "1", "--color", "always"])
    shown = capsys.readouterr().out
    assert problems[2].problem in shown and texts[3].strip() in shown and "advantage -1.00" in shown and problems[0].problem not in shown and "\x1b[3" in shown
    for flags in ([], ["--simple"]):
        evaluation.commands(["plot", str(tmp_path), "--out", str(tmp_path / "c.png"), *flags])
        assert (tmp_path / "c.png").stat().st_size > 5_000
        (tmp_path / "c.png").unlink()
    capsys.readouterr()
    (tmp_path / "c").mkdir()
    for name, file in (("d", "d.png"), ("e.svg", "e.svg")):          # what is told is what was written
        evaluation.commands(["plot", str(tmp_path), "--out", str(tmp_path / name)])
        assert capsys.readouterr().out == f"wrote {tmp_path / file}\n" and (tmp_path / file).stat().st_size > 5_000 and not (tmp_path / "d").exists()


def test_the_commands(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run("eval.py", "--model", "toy/student", "--data", "toy", "--k", "2", "--limit", "4", "--temperature", "1", "--max_new_tokens", "60", "--out", str(out))
    assert done.returncode == 0 and "mean@2" in done.stdout and len(out.read_text().splitlines()) == 8, done.stderr[-1000:]
    assert {"id", "seed", "text", "stop", "correct", "answer"} <= set(json.loads(out.read_text().splitlines()[0]))
    bad = run("eval.py", "compare", str(out), "nowhere.jsonl")
    assert bad.returncode == 1 and bad.stderr == "error: no generations at nowhere.jsonl: give a file that eval.py wrote (--out)\n"
    with pytest.raises(FileNotFoundError, match="no problems at nowhere.jsonl"):
        evaluation.main(replace(CONFIG, data="nowhere.jsonl"))


def test_plot_draws_the_curves_of_several_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps({"step": i, "rewards/outcome/mean": i / 30, "rewards/structure/mean": 0.5}) + "\n" for i in range(30)))
    plots.plot([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "c.png").stat().st_size > 10_000
