"""The tasks that a model can be trained for, each in a file of its own; see base.py for what a task provides."""

from contextlib import suppress
from dataclasses import fields

from ..data.columns import BadRowError
from .base import IGNORE_INDEX, Settings, Task
from .causal_lm import CausalLM
from .classification import Classification
from .denoising import Denoising
from .instruction import Instruction
from .labels import Labels
from .masked_lm import MaskedLM
from .question_answering import QuestionAnswering
from .sentence_pairs import SentencePairs
from .seq2seq import Seq2Seq
from .span_corruption import SpanCorruption
from .token_classification import TokenClassification

# A recipe's `task:` -> the class.
TASKS = {
    "causal": CausalLM,
    "mlm": MaskedLM,
    "mlm_nsp": SentencePairs,
    "span_corruption": SpanCorruption,
    "denoising": Denoising,
    "seq2seq": Seq2Seq,
    "instruction": Instruction,
    "classification": Classification,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
}


def build(name, tokenizer, settings, seed=0, source=None, stored_config=None, is_trained=False):
    """Return a task that is ready to read its data.

    Args:
        name: a key of TASKS.
        tokenizer: a fast tokenizer, or None for token ids without one. The task may add a padding token or a chat
            template to it.
        settings: mapping with any of the fields of [`Settings`]; other keys are ignored.
        seed: seed of everything that the task draws at random.
        source: the training source, from which classifiers learn their labels.
        stored_config: the configuration of the model that training starts from, or None.
        is_trained: whether that model was trained for this task, so that its labels are kept.
    Raises:
        InputError: the tokenizer lacks a token that the task needs, or the labels cannot be used.
    """
    known = {field.name for field in fields(Settings)}
    task = TASKS[name](tokenizer, seed, **{key: value for key, value in settings.items() if key in known})
    task.name = name
    task.prepare_tokenizer(is_trained)
    task.find_labels(source, stored_config, is_trained)
    return task


class LabelledTexts:
    """The texts of labelled sources without their labels, to train a tokenizer on; examples that cannot be used are
    left out. It can be iterated more than once.

    Args:
        sources: list of sources.
        name: a key of TASKS.
        columns: the settings that name columns.
    """

    def __init__(self, sources, name, **columns):
        self.sources, self.task = sources, TASKS[name](**columns)

    def __iter__(self):
        for source in self.sources:
            for where, record in self.task.read(source):
                with suppress(BadRowError):
                    yield from self.task.texts(record, where)


__all__ = ["IGNORE_INDEX", "TASKS", "CausalLM", "LabelledTexts", "Labels", "Settings", "Task", "build"]
