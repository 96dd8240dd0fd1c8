"""The model families that can be trained: one file and one line in `FAMILIES` each; auto.py makes any other."""

import functools
from typing import NamedTuple

from ..errors import ModelError
from . import auto, bart, bert, gpt, llama, qwen3, t5
from .stock import StockConfigMixin, check_values


class Family(NamedTuple):
    """A model family. Everything that the package needs to know about a family is derived from this record."""

    display_name: str  # in the model card
    config: type  # configuration class
    tasks: dict  # recipe's `task` -> model class; the first is the default task of the family
    tokenizer: str = "bpe"  # the algorithm (a key of data.tokenizer.TRAINERS) that messages suggest

    @property
    def is_decoder(self):
        return "causal" in self.tasks

    def takes_positions(self, task):
        """Return whether the class of a task takes positions, without which documents of a row cannot be kept apart."""
        return self.is_ours or "position_ids" in self.tasks[task].input_names

    def stock_name(self, class_name):
        """Return the name of the stock class for one of the family's classes."""
        return self.config.stock_name(class_name) if self.is_ours else class_name

    @property
    def is_ours(self):
        return issubclass(self.config, StockConfigMixin)

    def check_architecture(self, config):
        """Raise ValueError if a value of a configuration is out of range."""
        if self.is_ours:
            config.check_architecture()
        else:
            check_values(config)


class Families(dict):
    """The families of this package by name, and any other model type of transformers, which is made when asked for.

    "stock:NAME" is the family with the stock classes in place of ours.

    Raises:
        KeyError: there is no such model type.
        ModelError: it cannot be trained.
    """

    def __missing__(self, name):
        name = name.removeprefix("stock:")
        if name not in self:
            return _stock_family(name)
        stock, own = _stock_family(self[name].config.model_type), self[name]
        tasks = {task: stock.tasks[task] for task in (*own.tasks, *stock.tasks)}  # with the same default task
        return stock._replace(display_name=own.display_name, tasks=tasks, tokenizer=own.tokenizer)

    def name_of(self, model_type):
        """Return the name of a model type in recipes: "gpt" for "gpt2"."""
        return next((name for name, family in self.items() if family.config.model_type == model_type), model_type)

    def name_of_model(self, pretrained):
        """Return the name of the family of a model or an adapter, a folder or Hub id.

        Raises:
            ModelError: there is no model, or it is of no type that can be trained.
        """
        from .loading import read_model_type  # which imports this module
        from .revisions import resolve

        name = self.name_of(read_model_type(resolve(pretrained, with_weights=False)))
        if not isinstance(name, str):
            raise ModelError(f"{pretrained}: its config.json names no model_type; give --model")
        try:
            return self[name] and name
        except KeyError:
            raise ModelError(
                f"{pretrained} is a model of type {name!r:.80}, which this version of transformers does not have; code "
                "of its own (auto_map) is not run"
            ) from None

    def known_names(self):
        """Return all names, ours first."""
        return [*self, *(name for name in auto.known_types() if self.name_of(name) not in self)]


@functools.cache
def _stock_family(model_type):
    config_class, tasks = auto.find_classes(model_type)
    return Family(
        config_class.__name__.removesuffix("Config"), config_class, tasks, "bpe" if "causal" in tasks else "wordpiece"
    )


def _decoder(display_name, config, causal_lm, sequence_classifier):
    tasks = {"causal": causal_lm, "instruction": causal_lm, "classification": sequence_classifier}
    return Family(display_name, config, tasks)


FAMILIES = Families(  # recipe's `model` -> family
    gpt=_decoder("GPT-2", gpt.GPTConfig, gpt.GPTForCausalLM, gpt.GPTForSequenceClassification),
    llama=_decoder("Llama", llama.MyLlamaConfig, llama.MyLlamaForCausalLM, llama.MyLlamaForSequenceClassification),
    qwen3=_decoder("Qwen3", qwen3.MyQwen3Config, qwen3.MyQwen3ForCausalLM, qwen3.MyQwen3ForSequenceClassification),
    bert=Family(
        "BERT",
        bert.MyBertConfig,
        {
            "mlm": bert.MyBertForMaskedLM,
            "mlm_nsp": bert.MyBertForPreTraining,
            "classification": bert.MyBertForSequenceClassification,
            "token_classification": bert.MyBertForTokenClassification,
            "question_answering": bert.MyBertForQuestionAnswering,
        },
        tokenizer="wordpiece",
    ),
    t5=Family(
        "T5",
        t5.MyT5Config,
        dict.fromkeys(("span_corruption", "seq2seq"), t5.MyT5ForConditionalGeneration),
        tokenizer="unigram",
    ),
    bart=Family(
        "BART", bart.MyBartConfig, dict.fromkeys(("denoising", "seq2seq"), bart.MyBartForConditionalGeneration)
    ),
)


def find_family(model_type):
    """Return the family whose checkpoints have this `model_type` ("gpt2" for GPT), or None."""
    try:
        return FAMILIES[FAMILIES.name_of(model_type)]
    except (KeyError, ModelError):
        return None


__all__ = ["FAMILIES", "Family", "find_family"]
