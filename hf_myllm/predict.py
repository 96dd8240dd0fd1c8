"""What a trained model says of each row of a file: `python -m hf_myllm.predict RUN --input FILE` writes JSON Lines.

RUN is any folder whose model classifies texts or words, or finds answers; the file is of the kinds that training takes,
without labels, or with labels that are not looked at. Of a .txt, each line is a text.
"""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import yaml
from seqeval.metrics.sequence_labeling import get_entities
from transformers import AutoConfig, AutoModelForQuestionAnswering
from transformers import AutoModelForSequenceClassification as ForTexts
from transformers import AutoModelForTokenClassification as ForWords

from . import checkpoint
from .build import trained_labels
from .data import readers, sources
from .distributed import silence_libraries
from .errors import InputError, Parser, exit_on_input_error, first_line
from .files import atomic_path
from .generate import find_model
from .models import lora
from .tasks import examples, objectives
from .tasks import readers as tasks

_KINDS = {  # the end of the stock class's name -> the task, and the class
    "ForSequenceClassification": ("classification", ForTexts),
    "ForTokenClassification": ("token_classification", ForWords),
    "ForQuestionAnswering": ("question_answering", AutoModelForQuestionAnswering),
}
_AT_ONCE = 1000  # rows read before the first is written


def load(run, device="cpu"):
    """The model of a folder, its tokenizer, and the task that it was trained for.

    Raises:
        InputError: there is none, or it judges nothing.
    """
    folder, tokenizer = find_model(run)
    try:
        config = AutoConfig.from_pretrained(lora.config_of(folder))
        name = (config.architectures or [""])[0]
    except Exception as error:
        raise InputError(f"{folder}/config.json is not a model's configuration: {first_line(error)[:200]}") from None
    found = [kind for ending, kind in _KINDS.items() if name.endswith(ending)]
    if not found:
        raise InputError(
            f"{run} holds a {name or 'model of no class'}, which does not judge text: python -m hf_myllm.generate {run}"
        )
    task, kind = found[0]
    base = lora.base_of(folder)
    try:
        # of a model that LoRA adds to, the head may be another
        model = kind.from_pretrained(
            base or folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=base is not None
        )
        model = lora.load(model, folder) if base else model
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the model in {folder} cannot be loaded: {first_line(error)[:300]}") from None
    return model.to(device).eval(), tokenizer, task


@torch.no_grad()
def predict(model, objective, rows, batch_size):
    """What the model says of each row, one array each, as the objective's `predictions` gives it."""
    order = np.argsort(-rows.lengths(np.arange(len(rows))), kind="stable")  # rows of like length together
    found = [None] * len(rows)
    for start in range(0, len(rows), batch_size):
        numbers = order[start : start + batch_size]
        batch = objective.batch(rows, numbers)
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        for number, one in zip(numbers, objective.predictions(model(**inputs), rows, numbers), strict=True):
            found[number] = one
    return found


def describe(objective, rows, predictions):
    """A dict for each item: what it is, what is said of it, and how surely.

    Of classes the label and the chance of each; of words the same of each, and the entities that they make up; of
    questions the answer, its place, and the guesses, with their shares of all.
    """
    shown = [rows.record(item) for item in range(rows.num_items)]
    if isinstance(objective, objectives.QuestionAnswering):
        may_refuse = bool(objective.may_refuse)
        answers = objective.answers(rows, np.arange(len(rows)), predictions, may_refuse)
        for item, guesses in answers.items():
            scores = np.array([score for score, _, _ in guesses])
            chances = np.exp(scores - scores.max())
            chances = (chances / chances.sum()).tolist()
            said = [
                {"answer": text, "score": chance, "start": start}
                for (_, text, start), chance in zip(guesses, chances, strict=True)
            ]
            yield {key: shown[item][key] for key in ("id", "question")} | said[0] | {"guesses": said[:5]}
        return
    names, kind = objective.labels.names, objective.labels.kind
    if isinstance(objective, objectives.TokenClassification):
        for item, parts in rows.by_item(np.arange(len(rows)), predictions).items():
            chances = np.concatenate(parts)
            said = [names[number] for number in chances.argmax(-1)]
            (words,) = shown[item].values()
            entities = [
                {"type": kind, "text": " ".join(words[a : b + 1]), "first": a, "last": b}
                for kind, a, b in get_entities(said)
                if any(name[:2] in ("B-", "I-") for name in names)
            ]
            yield shown[item] | {"labels": said, "scores": chances.max(-1).tolist(), "entities": entities}
        return
    for own, chances in zip(shown, predictions, strict=True):
        if kind == tasks.REGRESSION:
            yield own | {"score": float(chances[0])}
            continue
        scores = dict(zip(names, chances.tolist(), strict=True))
        if kind == tasks.MULTI_LABEL:
            yield own | {"labels": [name for name, score in scores.items() if score > 0.5], "scores": scores}
        else:
            best = max(scores, key=scores.get)
            yield own | {"label": best, "score": scores[best], "scores": scores}


class _Lines(tasks.Texts):
    """Texts, of which a plain file has one a line."""

    def read(self, source):
        return _lines(source, self.text_column) if source.format == "text" else super().read(source)


class _Sentences(tasks.Words):
    """Sentences, of which a .txt file has one a line, with spaces between the words."""

    def read(self, source):
        is_plain = source.format == "text" and all(file.endswith(".txt") for file in source.files)
        return _lines(source, self.text_column) if is_plain else super().read(source)


def _lines(source, column):
    for number, (text, _) in enumerate(readers.read_documents(replace(source, document="line")), start=1):
        yield f"{source.name} text {number}", {column: text.strip()}


@contextmanager
def _opened(path):
    """Where to write: the terminal, or a file that is there when all of it is."""
    if path is None:
        yield sys.stdout
        return
    try:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from None


def _words_of(run):
    """The words of the recipe that the folder was trained by, where it has one, or the run whose checkpoint it is."""
    folder = Path(run).resolve()
    try:
        if checkpoint.step_of(folder) >= 0:
            folder = folder.parent
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        return recipe["data"] if isinstance(recipe["data"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}


@exit_on_input_error
def main(argv):
    parser = Parser(prog="python -m hf_myllm.predict", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="the folder of a run, or of any model of these kinds")
    parser.add_argument("--input", required=True, help="the file to judge")
    parser.add_argument("--output", help="the file to write (default: the terminal)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows at once")
    parser.add_argument("--max_len", type=int, help="tokens of a row (default: the recipe's, or the model's positions)")
    parser.add_argument("--text_column", help="the column of the text, or of the words (default: the recipe's)")
    parser.add_argument("--text_pair_column", help="the column of the second text (default: the recipe's)")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave out rows that cannot be judged")
    args = parser.parse_args(argv)
    silence_libraries()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    source = sources.file_source(args.input)
    model, tokenizer, name = load(args.run, device)
    words, positions = _words_of(args.run), getattr(model.config, "max_position_embeddings", 512)
    max_len = args.max_len or words.get("max_len") or positions
    if args.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {args.batch_size}")
    if not 4 <= max_len <= positions:
        raise InputError(f"--max_len must be from 4 to {positions}, what the model has, and not {max_len}")
    if args.output and Path(args.output).exists() and any(os.path.samefile(one, args.output) for one in source.files):
        raise InputError(f"--output {args.output} is the input: name another file")
    columns = {key: getattr(args, key) or words.get(key) for key in ("text_column", "text_pair_column")}
    if name == "question_answering":
        columns["stride"] = words.get("stride")
    labels = None if name == "question_answering" else trained_labels(model.config)
    kind = {"classification": _Lines, "token_classification": _Sentences}.get(name, tasks.TASKS[name])
    task = kind(tokenizer, max_len, labels, is_labelled=False, **columns)
    if model.config.pad_token_id is None:
        raise InputError(f"{args.run}/config.json has no pad_token_id, which fills short rows: set it there")
    objective = objectives.build_labelled(task, model.config)
    if name == "question_answering":
        objective.may_refuse, objective.longest = words.get("unanswerable"), words.get("max_answer_len") or 30
    refused, count = [], 0
    items = examples.items_of(source, task, args.skip_bad_rows, refused)
    with _opened(args.output) as file:
        while chunk := list(islice(items, _AT_ONCE)):
            rows = examples.make_examples(chunk, task, source.name, args.skip_bad_rows, refused)
            if rows is None:
                continue
            for line in describe(objective, rows, predict(model, objective, rows, args.batch_size)):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
    for problem in refused[:3]:
        print(f"left out: {problem}", file=sys.stderr)
    if args.output or refused:
        more = f", {len(refused):,} left out" if refused else ""
        print(f"{count:,} rows judged{more}{f': {args.output}' if args.output else ''}", file=sys.stderr)


if __name__ == "__main__":
    main()
