"""On-policy distillation and rewards of one's own: the exact KL to a teacher model against autograd over full logits, and the structure reward without a GSRM."""
import json
from dataclasses import replace

import pytest
import torch
from test_checkpoint import one_thread  # noqa: F401
from test_parallel import furthest, torchrun
from test_train import SMALL, config, data, lines  # noqa: F401
from tiny import checkpoint, tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config

import reward
import train
from data import load_model, save_model
from rollout import Rollout
from scorer import OwnReward

ALONE = ["--w_structure", "0", "--w_outcome", "0", "--w_format", "0"]


def net(vocabulary, seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True,
                                                        bos_token_id=None, eos_token_id=None, pad_token_id=None))


@pytest.mark.parametrize("aggregation, spare, level", [("token", 0, "token"), ("sequence", 24, "token"), ("fixed", 0, "sequence")])
def test_the_update_adds_the_exact_reverse_kl(data, aggregation, spare, level):  # noqa: F811
    """Three rows of different lengths, one of them unscored; the teacher's head may have rows that the student's has not. Reference: the sum written out, by autograd."""
    V, T, temperature, weight = 96, 7, 0.7, 0.3
    cfg = replace(config(data, "unused"), temperature=temperature, teacher_kl=weight, aggregation=aggregation, level=level, max_grad_norm=1e9, max_tokens=30)
    student, teacher, prompts, lengths = net(V, 1), net(V + spare, 2).requires_grad_(False), [[5, 6, 7], [8], [9, 10]], torch.tensor([7, 3, 5])
    torch.manual_seed(3)
    tokens, scored, adv = torch.randint(V, (3, T)), torch.tensor([True, True, False]), torch.tensor([0.8, 0.0, 0.4])
    rows = [0, 1]
    logits = lambda model, n: model(torch.tensor([prompts[n] + tokens[n, :lengths[n]].tolist()])).logits[0, len(prompts[n]) - 1:-1, :V].double() / temperature
    logp = {n: torch.log_softmax(logits(student, n), -1) for n in rows}
    kls = {n: (logp[n].exp() * (logp[n] - torch.log_softmax(logits(teacher, n), -1))).sum(-1) for n in rows}                    # (T_n,)
    denominator = {"token": lambda n: 10.0, "sequence": lambda n: 2.0 * int(lengths[n]), "fixed": lambda n: 2.0 * cfg.max_new_tokens}[aggregation]
    chosen = {n: logp[n].gather(1, tokens[n, :lengths[n], None])[:, 0] for n in rows}
    old = torch.zeros(3, T)
    for n in rows:
        old[n, :lengths[n]] = chosen[n].detach()
    policy = sum((-adv[n] * (chosen[n] - chosen[n].detach()).exp()).sum() / denominator(n) for n in rows)                       # ratio 1: its gradient is that of -A logp
    loss = policy + weight * sum(kls[n].sum() / denominator(n) for n in rows)
    wanted = torch.autograd.grad(loss, list(student.parameters()))
    before = [p.detach().clone() for p in student.parameters()]
    rollout = Rollout(tokens, lengths, old, torch.ones(3, dtype=torch.bool), torch.zeros(3, T))
    metrics = train.update(student, None, torch.optim.SGD(student.parameters(), lr=1.0), prompts, rollout, adv, scored, cfg, teacher)
    for a, b, g in zip(before, student.parameters(), wanted):
        torch.testing.assert_close(a - b.detach(), g, atol=2e-6, rtol=1e-4)
    assert metrics["teacher_kl"] == pytest.approx(sum(k.sum().item() for k in kls.values()) / 10, rel=1e-5) and metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_distillation_alone_brings_the_student_to_the_teacher(data, tmp_path, one_thread):  # noqa: F811
    """The teacher is the student moved a little; the KL to it falls. With two processes the update is the same."""
    model, tok = load_model("toy/student")
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.3 * p.std(correction=0) * torch.randn_like(p)
    save_model(model, tok, tmp_path / "teacher")
    flags = [*SMALL, *ALONE, "--data", str(data), "--teacher", str(tmp_path / "teacher"), "--steps", "8", "--warmup_steps", "0", "--lr", "3e-3", "--max_tokens", "300"]
    train.main(train.parse_config([*flags, "--out", str(tmp_path / "one")]))
    kl = [row["teacher_kl"] for row in lines(tmp_path / "one")]
    assert kl[-1] < 0.8 * kl[0] and not any("spreadless" in row.get("warnings", {}) for row in lines(tmp_path / "one"))
    code, said, _ = torchrun(2, "train.py", *flags, "--out", str(tmp_path / "two"))
    assert code == 0, said[-2000:]
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-4
    assert [row["teacher_kl"] for row in lines(tmp_path / "two")] == pytest.approx(kl, rel=1e-3)


def test_a_teacher_of_another_tokenizer_is_refused(data, tmp_path, capsys):  # noqa: F811
    other = checkpoint(tmp_path / "other", "qwen2", tokenizer("chatml"))
    with pytest.raises(ValueError, match="tokenizer is not the student's"):
        train.main(config(data, tmp_path / "out", "--teacher", str(other), "--steps", "1"))
    with pytest.raises(SystemExit):
        train.parse_config([*SMALL, *ALONE, "--data", str(data)])
    assert "--teacher" in capsys.readouterr().err


def test_line_similarity_is_the_mean_ratio_of_the_best_teacher():
    teachers = ["a b c d\ne f", "x y\nz w\nu v"]
    similar = lambda trace: reward.line_similarity([""], [trace], [teachers])[0]
    assert similar("a b c d\ne f") == 1.0 and similar("x y\n\nz w\nu v\nmore") == 1.0 and similar("") == 0.0 and similar("q") == 0.0
    assert similar("a b\ne f") == pytest.approx((2 * 2 / 6 + 1) / 2)                   # 2 M / T of each line
    assert similar("x y") == pytest.approx(1 / 3)
    assert reward.line_similarity(["", ""], ["a b c d\ne f", "k"], [teachers, []]) == [1.0, None]


def test_a_structure_reward_of_ones_own(data, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "mine.py").write_text("def words(problems, traces, teachers):\n    assert isinstance(problems[0], str) and len(teachers[0]) >= 1\n"
                                      "    return [None if n == 3 else len(t.split()) / 100 for n, t in enumerate(traces)]\n"
                                      "def wrong(problems, traces, teachers):\n    return [1.0]\ndef number(*_):\n    return 1.0\ndef nothing_at_all(*_):\n    return None\n"
                                      "def arrays(problems, traces, teachers):\n    import numpy, torch\n    return [numpy.float32(0.5), torch.tensor(-2.0)]\n"
                                      "def nan(problems, traces, teachers):\n    return [float('nan')] * len(traces)\n")
    monkeypatch.syspath_prepend(tmp_path)
    train.main(config(data, tmp_path / "out", "--steps", "1", "--structure_reward", "mine:words"))
    rows = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").read_text().splitlines()]
    traces = [row["text"].split("</think>")[0].removeprefix("<think>") for row in rows]
    assert [row["rewards"]["structure"] for row in rows] == [None if n == 3 else pytest.approx(len(t.split()) / 100) for n, t in enumerate(traces)]
    assert rows[3]["advantage"] == 0 and lines(tmp_path / "out")[0]["unscored"] == 1
    assert [score.value for score in OwnReward("mine:arrays")(["p"] * 2, ["t"] * 2, [["x"]] * 2)] == [0.5, -2.0]
    for name in ("mine:wrong", "mine:nan", "mine:number", "mine:nothing_at_all"):
        with pytest.raises(ValueError, match="has to return a list with a finite number, or None"):
            OwnReward(name)(["p"] * 2, ["t"] * 2, [["x"]] * 2)
    with pytest.raises(ValueError, match="no such function; give module:function, for example reward:line_similarity"):
        OwnReward("mine:nothing")
    (tmp_path / "failing.py").write_text("def number(problems, traces, teachers):\n    return [float(t) for t in traces]\n")
    (tmp_path / "absent.py").write_text("import a_package_that_is_not_there\n")
    for call in (lambda: OwnReward("failing:number")(["p"], ["abc"], [["x"]]), lambda: OwnReward("absent:reward")):
        with pytest.raises(RuntimeError, match="has failed with") as failed:                # which `ending` lets through, so that the line in one's own file is seen
            call()
        assert isinstance(failed.value.__cause__, (ValueError, ImportError))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/yours_here.py").write_text("def one(problems, traces, teachers):\n    return [1.0] * len(traces)\n")
    monkeypatch.chdir(tmp_path / "elsewhere")                                         # the working folder, whichever folder train.py is in
    assert OwnReward("yours_here:one")(["p"], ["t"], [["x"]])[0].value == 1.0
