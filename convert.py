r"""Public data sets in, problems out: each converter is one function, row -> record (or the reason to skip the row).

    python data.py convert gsm8k --input gsm8k_train.jsonl --out train.jsonl                         # a local .json, .jsonl or .parquet file
    python data.py convert openr1 --limit 3200 --seed 1 --exclude math500.jsonl aime24.jsonl --out train.jsonl      # from the hub: pip install datasets
    python data.py convert gpqa --input Idavidrein/gpqa:gpqa_main:train --out gpqa.jsonl             # repository:config:split; this one wants hf auth login first

Nothing is dropped silently: rows read, written, skipped (by reason) and excluded are counted; problems that repeat an earlier one are reported, and kept.
A malformed row stops everything before --out exists; with --skip_bad it is listed instead. --exclude drops a problem that shares with an evaluation problem
a run of 13 words (letters or digits, in lower case), or all of it where it has fewer. Left out on purpose: grading the teachers again, merging, fuzzy matching.
"""
import heapq
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from command import Parser, at_least, ending, in_one_line, unique
from data import INSTRUCTION, check_record, load_problems, split_completion
from grade import final_answer

Row = dict[str, object]
ASKED = "Return your final response within \\boxed{}."                   # OpenThoughts' own words before every mathematical problem


def text(row: Row, *names: str) -> str:
    """The first of the named fields that is there, stripped (a whole number counts as text); ValueError names the field and what was expected."""
    value = next((str(row[n]) if type(row[n]) is int else row[n] for n in names if row.get(n) is not None), None)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {' or '.join(map(repr, names))} must be a non-empty string, got {repr(value)[:80]}")
    return value.strip()


def sequence(row: Row, name: str, *kinds: type) -> list:
    """A list field, [] where it is null; ValueError where it is missing, no list, or holds something else than these kinds."""
    value = row.get(name, "nothing")
    if value is not None and not (isinstance(value, list) and all(isinstance(entry, kinds) for entry in value)):
        raise ValueError(f"field {name!r} must be a list of {kinds[0].__name__}, got {repr(value)[:80]}")
    return value or []


def thought(completion: str) -> str | None:
    """The trace of a completion, None where its <think> block is empty, never closed, or not the only one."""
    trace, final = split_completion(completion)
    return trace if trace and final is not None and not re.search("</?think>", trace + final) else None

# ------------------------------------------------------------------------------------------------ converters

def openr1(row: Row) -> Row | str:
    """open-r1/OpenR1-Math-220k: problem, solution, answer, problem_type, question_type, source, uuid: str; generations: [str] by DeepSeek-R1, <think> first;
    is_reasoning_complete, correctness_math_verify, correctness_llama: [bool] beside generations, or null; finish_reasons: [str]; correctness_count: int; messages.
    Every generation that Math-Verify found right is a teacher; rows that only the Llama judge saw have no flags of it, and are skipped."""
    generations, flags = sequence(row, "generations", str), sequence(row, "correctness_math_verify", bool, type(None))
    if flags and len(flags) != len(generations):
        raise ValueError(f"field 'correctness_math_verify' must have an entry for each of the {len(generations)} generations, has {len(flags)}")
    verified = [generation for generation, right in zip(generations, flags) if right]
    teachers = [trace for trace in map(thought, verified) if trace]
    if not teachers:
        return "no verified generation with one closed <think> block" if verified else "no generation verified by Math-Verify"
    return {"id": row.get("uuid"), "problem": text(row, "problem"), "answer": text(row, "answer"), "teachers": teachers, "left_out": len(generations) - len(teachers)}


def openthoughts(row: Row) -> Row | str:
    r"""open-thoughts/OpenThoughts-114k, config metadata: problem, deepseek_reasoning, deepseek_solution, ground_truth_solution, domain, source, test_cases,
    starter_code: str; or config default: system: str, conversations: [{"from": "user", "value": str}, {"from": "assistant", "value":
    "<|begin_of_thought|> trace <|end_of_thought|> <|begin_of_solution|> solution <|end_of_solution|>"}]. The answer is the \boxed{} of the ground truth,
    else of the teacher's solution (its makers kept verified ones only); rows without one, such as code, are skipped."""
    if "conversations" in row:
        turns = sequence(row, "conversations", dict)
        if [turn.get("from") for turn in turns] not in (["user", "assistant"], ["human", "gpt"]):                # OpenThoughts3 calls them so
            raise ValueError(f"field 'conversations' must be a turn from user and one from assistant, got {[turn.get('from') for turn in turns]}")
        problem, reply = text(turns[0], "value"), text(turns[1], "value").replace("<|begin_of_thought|>", "<think>").replace("<|end_of_thought|>", "</think>")
        trace, answer, domain = thought(reply), final_answer(reply), "math" if problem.startswith(ASKED) else "other"
    else:
        problem, trace, domain = text(row, "problem"), thought(text(row, "deepseek_reasoning") + "</think>"), text(row, "domain")
        answer = final_answer(str(row.get("ground_truth_solution") or "")) or final_answer(str(row.get("deepseek_solution") or ""))
    whole = {"problem": problem, "answer": answer, "teachers": [trace], "domain": domain}
    return whole if trace and answer else "no \\boxed{} answer" if trace else "not one closed thought"


def s1k(row: Row) -> Row | str:
    r"""simplescaling/s1K-1.1: question, solution, cot_type (math, science, crossword), source_type, metadata, and, each with gemini_ and deepseek_ before it,
    thinking_trajectory, attempt, grade ("Yes", "No"), grade_reason: str; the first version, simplescaling/s1K, has thinking_trajectories: [str], attempt: str instead.
    The answer is the solution's \boxed{}, or all of it where it is one short line, or the \boxed{} of DeepSeek's attempt where that was graded right."""
    solution, attempt = text(row, "solution"), str(row.get("deepseek_attempt") or "") if row.get("deepseek_grade") == "Yes" else ""
    teachers = [text(row, "deepseek_thinking_trajectory")] if "deepseek_thinking_trajectory" in row else sequence(row, "thinking_trajectories", str)
    teachers = [trace for trace in teachers if not re.search("</?think>", trace)]
    answer = final_answer(solution) or (solution if "\n" not in solution and len(solution) <= 100 else final_answer(attempt))
    whole = {"problem": text(row, "question"), "answer": answer, "teachers": teachers, "domain": text(row, "cot_type")}
    return whole if teachers and answer else "no \\boxed{} or short answer" if teachers else "no thinking trajectory"


def gsm8k(row: Row) -> Row:
    """openai/gsm8k, config main: question: str; answer: str, a worked solution with calculator marks such as <<48/2=24>>, its last line "#### gold"."""
    worked, _, gold = text(row, "answer").partition("####")
    if "####" in gold or not gold.strip() or not worked.strip():
        raise ValueError(f"field 'answer' must be a worked solution and one last line '#### gold', got {repr(row['answer'])[-80:]}")
    return {"problem": text(row, "question"), "answer": gold.strip(), "teachers": [re.sub(r"<<[^<>]*>>", "", worked).strip()]}


def math500(row: Row) -> Row:
    """HuggingFaceH4/MATH-500: problem, solution, answer (LaTeX), subject: str; level: int; unique_id: str ("test/precalculus/807.json")."""
    return {"id": text(row, "unique_id"), "problem": text(row, "problem"), "answer": text(row, "answer"), "domain": text(row, "subject").lower()}


def aime(row: Row, name: str) -> Row:
    r"""HuggingFaceH4/aime_2024: id: int, problem, solution, answer, url, year: str. math-ai/aime25: problem, answer, id: str. math-ai/aime24: no answer but the
    \boxed{} of solution. Maxwell-Jia/AIME_2024: ID, Problem, Solution, Answer. QwQ's file: prompt, answer: int. All answers are integers from 0 to 999."""
    given, own = text(row, "answer", "Answer", "solution"), row.get("id", row.get("ID"))
    number = re.fullmatch(r"\$?([0-9]{1,3})(?:\^\{?\\circ\}?)?\$?", final_answer(given) or given)           # 336^\circ is one of 2025
    if not number:
        raise ValueError(f"field 'answer' must be an integer from 0 to 999, got {given[:80]!r}")
    return {"id": None if own is None else f"{name}-{own}", "problem": text(row, "problem", "Problem", "question", "prompt"), "answer": str(int(number[1]))}


def gpqa(row: Row, seed: int = 0) -> Row:
    """Idavidrein/gpqa: Question, Correct Answer, Incorrect Answer 1, .. 2, .. 3, Record ID, High-level domain, Subdomain: str, and some fifty columns about the
    writing and validation of the question. The order of the choices comes from (seed, Record ID), so it is the same whatever else is in the file."""
    choices = [text(row, name) for name in ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")]
    order = random.Random(f"{seed} {text(row, 'Record ID')}").sample(range(4), 4)                         # order[place] = choice; choice 0 is the right one
    listed = "\n".join(f"({letter}) {choices[choice]}" for letter, choice in zip("ABCD", order))
    return {"id": text(row, "Record ID"), "problem": f"{text(row, 'Question')}\n\n{listed}", "answer": "ABCD"[order.index(0)], "domain": text(row, "High-level domain").lower()}


CONVERTERS: dict[str, tuple[Callable[[Row], Row | str], str]] = {                       # function, and where the hub has the data: repository:config:split
    "openr1": (openr1, "open-r1/OpenR1-Math-220k:default:train"), "openthoughts": (openthoughts, "open-thoughts/OpenThoughts-114k:metadata:train"),
    "s1k": (s1k, "simplescaling/s1K-1.1"), "gsm8k": (gsm8k, "openai/gsm8k:main:train"), "math500": (math500, "HuggingFaceH4/MATH-500::test"),
    "aime24": (lambda row: aime(row, "aime24"), "HuggingFaceH4/aime_2024"), "aime25": (lambda row: aime(row, "aime25"), "math-ai/aime25::test"),
    "gpqa": (gpqa, "Idavidrein/gpqa:gpqa_diamond:train")}

# ------------------------------------------------------------------------------------------------ rows in, problems out

def file_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(place, row) of a .json (a list, or lines), .jsonl or .parquet file. Lines of JSONL come as bytes, so that `decoded` fails on a broken one alone."""
    try:
        rows: object = path.read_bytes().split(b"\n") if path.suffix in (".json", ".jsonl") else None
        if path.suffix == ".json":
            try:
                rows = json.loads(b"\n".join(rows), object_pairs_hook=unique)
                rows = rows.get("rows") if isinstance(rows, dict) else rows
            except json.JSONDecodeError as error:
                if error.msg != "Extra data":                            # JSONL, as many a .json is
                    raise
        elif path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile
            rows = (row for batch in ParquetFile(path).iter_batches(256) for row in batch.to_pylist())
        if not isinstance(rows, list | Iterator):
            raise ValueError('expected a .jsonl or .parquet file, or a .json list of rows, or the datasets server\'s {"rows": [{"row": {...}}]}')
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1) if not isinstance(row, bytes) or row.strip())
    except (ValueError, RecursionError) as error:                        # json and pyarrow do not name the file
        raise ValueError(f"{path}: {error}") from None


def source_rows(source: str) -> Iterator[tuple[str, object]]:
    """(place, row) of a file, or of "repository:config:split" on the hub (config and split may be left out: none, train). No data set's own code is run."""
    if Path(source).exists() or Path(source).suffix in (".json", ".jsonl", ".parquet"):
        return file_rows(Path(source))
    from datasets import load_dataset
    repository, config, split = f"{source}::".split(":")[:3]
    return ((f"{source}, row {number}", row) for number, row in enumerate(load_dataset(repository, config or None, split=split or "train"), 1))


def decoded(row: object) -> Row:
    """The row as a dict, taken out of the datasets server's {"row_idx", "row", "truncated_cells"}; ValueError where it is none, or was cut off there."""
    outer = json.loads(row, object_pairs_hook=unique) if isinstance(row, bytes) else row
    inner = outer["row"] if isinstance(outer, dict) and "row" in outer else outer
    if not isinstance(inner, dict):
        raise ValueError(f"expected a JSON object, got {type(inner).__name__}")
    if outer.get("truncated_cells"):
        raise ValueError(f"field {str(outer['truncated_cells']).strip('[]')[:80]} was cut off by the datasets server (truncated_cells): take the Parquet file instead")
    return inner


def normalised(problem: str) -> str:
    """Its runs of letters or digits, in lower case, one blank between them; a problem that has none stays as it is."""
    return " ".join(re.findall(r"[^\W_]+", problem.lower())) or problem


def grams(problem: str, n: int = 13) -> set[str]:
    """All runs of n words of the normalised problem; of a shorter one the whole."""
    words = normalised(problem).split(" ")
    return {" ".join(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}


def records(rows: Iterable[tuple[int, tuple[str, object]]], name: str, convert: Callable, banned: set[str], skip_bad: bool, counts: Counter, lists: defaultdict) -> Iterator[bytes]:
    """The lines to write, one at a time; counts and lists are filled on the way. ValueError at the first malformed row, unless they are to be skipped."""
    ids, first = set[str](), dict[str, str]()                            # ids given out; normalised problem -> id of the first that reads so
    for number, (where, row) in rows:
        counts["rows read"] += 1
        try:
            record = convert(decoded(row))
            if isinstance(record, str):
                counts[f"rows skipped: {record}"] += 1
                continue
            own, bare = str(record.get("id") or f"{name}-{number}"), record["problem"].removeprefix(ASKED).removesuffix(INSTRUCTION).strip()
            problem = check_record({"id": f"{own}-{name}-{number}" if own in ids else own, "problem": bare, "answer": record["answer"],
                                    "teachers": record.get("teachers", []), "domain": record.get("domain", "math")}, "as a problem")
            line = json.dumps(vars(problem), ensure_ascii=False).encode() + b"\n"
        except (ValueError, RecursionError) as error:
            fault = f"{where}: {'not valid JSON: ' if isinstance(error, json.JSONDecodeError) else ''}{error}"
            if not skip_bad:
                raise ValueError(f"{fault} (--skip_bad passes over such rows)") from None
            lists["bad rows passed over"].append(f"\n  {fault}")
            continue
        if not banned.isdisjoint(grams(problem.problem)):
            lists["dropped by --exclude"].append(problem.id)
            continue
        if (earlier := first.setdefault(normalised(problem.problem), problem.id)) != problem.id:
            lists["repeat an earlier problem, and were kept"].append(f"{problem.id} = {earlier}")
        ids.add(problem.id)
        counts.update({"written": 1, "generations left out: not verified, or not one closed <think> block": record.get("left_out", 0)})
        yield line


def check_out(out: Path, overwrite: bool) -> None:
    """ValueError where `out` is there and may not be replaced."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: choose another --out, or pass --overwrite")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python data.py convert", description="A public data set as the JSONL that data.py reads.", allow_abbrev=False)
    parser.add_argument("name", choices=CONVERTERS, help="whose rows they are")
    parser.add_argument("--out", required=True, type=Path, help="JSONL to write")
    parser.add_argument("--input", help="a .json, .jsonl or .parquet file, or repository:config:split on the hub (default: the original)")
    parser.add_argument("--limit", type=at_least(0), default=0, help="read so many rows, drawn at random, in their order, before any is skipped or excluded (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of --limit and of the order of GPQA's choices")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="evaluation problems (JSONL, converted already) to share no 13 words with")
    parser.add_argument("--skip_bad", action="store_true", help="list malformed rows (and lines of --exclude) instead of stopping at one")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    aside = args.out.parent / f".{args.out.name}.{os.getpid()}.partial"        # its own: two conversions at once to one --out do not mix
    draw, counts, lists = random.Random(args.seed), Counter({"rows read": 0, "written": 0}), defaultdict(list)
    lists.update({"dropped by --exclude": []} if args.exclude else {})          # then 0 is said too
    try:
        check_out(args.out, args.overwrite)
        if args.out.exists() and (read := [file for file in (args.input, *args.exclude) if file and Path(file).exists() and args.out.samefile(file)]):
            raise ValueError(f"--out {args.out}: is {read[0]}, which is read: choose another --out")
        banned = {gram for file in args.exclude for problem in load_problems(file, "test", args.skip_bad) for gram in grams(problem.problem)}
        convert = (lambda row: gpqa(row, args.seed)) if args.name == "gpqa" else CONVERTERS[args.name][0]
        rows = enumerate(source_rows(args.input or CONVERTERS[args.name][1]), 1)
        if args.limit:                                                   # each row draws a number, the smallest stay: a larger --limit holds a smaller one
            rows = sorted(heapq.nsmallest(args.limit, rows, key=lambda _: draw.random()))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.writelines(records(rows, args.name, convert, banned, args.skip_bad, counts, lists))
        print(*(f"{count} {what}" for what, count in counts.items() if count or what == "written"),
              *(f"{len(entries)} {what}{': ' * bool(entries)}{', '.join(entries[:20])}{', ...' if len(entries) > 20 else ''}" for what, entries in lists.items()), sep="\n")
        if not counts["written"]:
            raise ValueError(f"nothing to write to {args.out}: no row became a problem")
        check_out(args.out, args.overwrite)                              # another conversion may have been there first
        aside.replace(args.out)
    except (ValueError, OSError, ImportError) as error:
        wanted = f": pip install {error.name}, or --input a .json or .jsonl file that exists" if isinstance(error, ImportError) else ""
        raise SystemExit(f"error: {in_one_line(error)}{wanted}") from None
    finally:
        if aside.exists():
            aside.unlink()


if __name__ == "__main__":
    with ending():                                                       # Ctrl-C
        main()
