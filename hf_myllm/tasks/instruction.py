"""Instruction tuning: predict completions, or the assistant's turns of a chat, and no other tokens.

row_shapes.py reads what rows of data sets look like.
"""

import json
import re
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import datasets
import numpy as np

from ..data.columns import BadRowError, check_text, read_text
from ..data.packing import DocumentRows, best_fit, group_offsets
from ..data.tokenizer import end_of_document, render_chat
from ..errors import InputError, library_errors
from ..terminal import plural
from . import row_shapes
from .base import IGNORE_INDEX
from .causal_lm import CausalLM
from .labelled import LabelledTask

_SHOWN_CHARS, _SHOWN_PARTS = 160, 6  # of a row in the dry run
_BESIDE = ("system", "tools", "documents")  # columns that complete a chat, whatever column the chat is in
_WEIGHTS = ("weight", "train", "training")  # of a turn: 0 or false if it is read and not learned


class Instruction(LabelledTask, CausalLM):
    """Predict the completion of a prompt, or the assistant's turns of a chat in the form of the tokenizer's template.

    Each text ends with the end-of-text token, unless the last turn closes itself. `packing` is "best_fit", several
    conversations per row, or "pad", one.
    """

    packings = ("best_fit", "pad")
    label_feature = datasets.List(datasets.Value("int8"))  # 1 for the tokens that are targets
    target_name = "learned tokens"
    own_columns = ("messages", "prompt", "completion")  # that `columns` and `template` may name
    target_note = "([] encloses what is learned)"

    @cached_property
    def marks(self):
        return [end_of_document(self.tokenizer)[0]]

    @cached_property
    def closing_ids(self):
        """The token ids that may close a turn: special tokens, except those that open a text or stand for others. The
        end of text closes turns even where it opens texts too, as in GPT-2."""
        special = {token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        opening = {getattr(self.tokenizer, f"{name}_token_id") for name in ("unk", "bos", "cls", "pad", "mask")}
        return (special | set(self.tokenizer.all_special_ids)) - opening | {self.tokenizer.eos_token_id}

    def prepare_tokenizer(self, is_trained):
        LabelledTask.prepare_tokenizer(self, is_trained)
        path = self.settings.chat_template
        if path and (not is_trained or self.tokenizer.chat_template is None):
            problem = f"chat_template {path[:100]!r} is not a file that can be read"
            with library_errors(problem, InputError, (OSError, ValueError)), open(path, encoding="utf-8") as file:
                self.tokenizer.chat_template = file.read()

    def cache_key(self):
        return [*super().cache_key(), self.tokenizer.chat_template, "row shapes"]

    # ---- examples

    def used_columns(self):
        return [*row_shapes.COLUMNS, *self.mapped_columns()]

    def _read_row(self, record, where):
        """Return (shape, row): the record in the shape that is trained on, see [`row_shapes.read_shape`]."""
        if mapped := self.map_columns(record, where):
            record = {name: record[name] for name in _BESIDE if name in record} | mapped
        template = self.tokenizer.chat_template if self.tokenizer is not None else ""
        return row_shapes.read_shape(record, where, str(template or "")), record

    def texts(self, record, where):
        (_, row), _ = self._read_row(record, where)
        if "messages" in row:
            return [turn["content"] for turn in row["messages"]]
        return [read_text(row, where, name) for name in ("prompt", "completion")]

    def parse(self, record, where):
        """Return an example with shape, text, spans (the characters that are targets), is_chat, num_unlearned (turns
        of the assistant that are no targets), and, set by `example_rows`, end_tokens (the token that closes the last
        turn) and the numbers of tokens and learned tokens."""
        (shape, row), record = self._read_row(record, where)
        options = self._template_options(record, where)
        if "messages" in row:
            example = self._parse_chat(row["messages"], row.get("num_prompt_turns", 0), where, options)
        else:
            example = self._parse_completion(row, where)
        return example | {"where": where, "shape": shape, "key": example["text"]}

    @staticmethod
    def _parse_completion(row, where):
        prompt = read_text(row, where, "prompt")
        if row["completion"] in (None, ""):
            raise BadRowError(f"{where} has no completion")
        completion = read_text(row, where, "completion")
        spans = [(len(prompt), len(prompt) + len(completion))]
        return {"text": prompt + completion, "spans": spans, "is_chat": False, "num_unlearned": 0}

    def _template_options(self, record, where):
        """Return what the chat template gets of a record beside the turns: its tools and documents, if it has any."""
        options = {}
        for name in ("tools", "documents"):
            value = record.get(name)
            # As text, because Arrow data cannot hold the different schemas of tools otherwise.
            if isinstance(value, str) and value.strip():
                try:
                    value = json.loads(value)
                except ValueError:
                    raise BadRowError(f"{where}: {name} is text that is not JSON: {value!r:.80}") from None
            if value:
                self._check_in_template(name, where)
                options[name] = value
        return options

    def _check_in_template(self, name, where):
        """Raise BadRowError if the chat template does not use something that a row has."""
        template = self.tokenizer.chat_template
        if template is not None and name not in str(template):
            raise BadRowError(f"{where} has {name}, which the chat template leaves out; give another --chat_template")

    def _parse_turns(self, messages, where):
        """Return the turns of a chat, checked, and whether each is learned."""
        turns, learned = [], []
        for index, message in enumerate(messages, start=1):
            message = dict(message)
            weights = [message.pop(name, 1) for name in _WEIGHTS]
            if any(weight not in (0, 1) for weight in weights):
                raise BadRowError(f"{where}, turn {index}: its {' or '.join(_WEIGHTS)} must be 0 or 1: {weights!r:.80}")
            if message.get("tool_calls"):
                self._check_in_template("tool_calls", where)
            for name in ("role", "content"):
                check_text(message[name], where)
            turns.append(message)
            learned.append(message["role"] == "assistant" and all(weights))
        return turns, learned

    def _parse_chat(self, messages, first, where, options):
        """See [`parse`]; turns before `first` are no targets."""
        messages, learned = self._parse_turns(messages, where)
        turns = [index for index, is_learned in enumerate(learned) if is_learned and index >= first]
        if not turns:
            raise BadRowError(f"{where} has no assistant's turn to learn")
        text, spans, end = self._render(messages, where, options), [], self.tokenizer.eos_token or ""
        for turn in turns:
            after = self._render(messages[: turn + 1], where, options)
            if end and not text.startswith(after):  # some templates end the whole chat with it
                after = after.removesuffix(end)
            start = self._start_of_turn(messages, turn, after, where, options)
            # a turn that the template renders differently once others follow (some drop old thoughts) is no target
            if text.startswith(after) and start is not None:
                spans.append((start, len(after)))
        if not spans:
            raise BadRowError(
                f"{where}: the chat template does not begin an assistant's turn with its generation prompt"
            )
        num_unlearned = len(turns) - len(spans)
        text = text[: spans[-1][1]]
        return {"text": text, "spans": spans, "is_chat": True, "num_unlearned": num_unlearned}

    def _start_of_turn(self, messages, turn, after, where, options):
        """Return where the assistant's turn begins in the chat up to it, `after`; None if that is not clear."""
        if turn > 0:
            before = self._render(messages[:turn], where, options, add_generation_prompt=True)
            return len(before) if after.startswith(before) else None
        # Templates refuse an empty chat, or leave out the system turn that they add to others.
        chat = self._render(messages, where, options)
        prompt = self._render(messages, where, options, add_generation_prompt=True)
        prompt = prompt.removeprefix(chat) if prompt.startswith(chat) else ""
        found = list(re.finditer(f"{re.escape(prompt)}(?=\\s*{re.escape(messages[0]['content'].strip())})", after))
        return found[-1].end() if found else None

    def _render(self, messages, where, options, **more):
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"{where} is a chat, and the tokenizer {self.tokenizer.name_or_path} has no chat template: give "
                "--chat_template FILE (Jinja, as the Hub's chat models have it)"
            )
        try:
            return render_chat(self.tokenizer, messages, **options, **more)
        except ValueError as error:
            raise BadRowError(f"{where}: {error}") from None

    def update_stats(self, stats, example):
        stats["unlearned"] = stats.get("unlearned", 0) + example["num_unlearned"]
        stats["ends"] = sorted({*stats.get("ends", ()), *example["end_tokens"]})
        shapes = stats.setdefault("shapes", {})
        shapes[example["shape"]] = shapes.get(example["shape"], 0) + 1
        for name in ("num_tokens", "num_learned"):
            stats[name] = stats.get(name, 0) + example[name]

    # ---- rows

    def tokenize(self, examples):
        backend = self.backend()
        chats = [example["text"] for example in examples if example["is_chat"]]
        texts = [example["text"] for example in examples if not example["is_chat"]]
        chats, texts = iter(backend.encode_batch(chats, add_special_tokens=False)), iter(backend.encode_batch(texts))
        return [next(chats if example["is_chat"] else texts) for example in examples]

    def example_rows(self, example, encoding):
        where, text = example["where"], example["text"]
        ids, offsets = list(encoding.ids), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        is_text = offsets[:, 1] > offsets[:, 0]
        inside = [is_text & (offsets[:, 1] > start) & (offsets[:, 0] < stop) for start, stop in example["spans"]]
        is_target, end = np.logical_or.reduce(inside), end_of_document(self.tokenizer)[0]
        last_turn = [token for token in np.flatnonzero(inside[-1]) if text[slice(*offsets[token])].strip()]
        closes_itself = bool(last_turn) and ids[last_turn[-1]] in self.closing_ids
        example["end_tokens"] = [ids[last_turn[-1]]] if closes_itself else []
        while ids and ids[-1] == end and not is_target[-1]:  # a tokenizer that adds its own end
            ids, is_target = ids[:-1], is_target[:-1]
        if not closes_itself:
            ids, is_target = [*ids, end], np.append(is_target, True)
        if len(ids) - 1 > self.max_len:
            raise BadRowError(f"{where} has {len(ids) - 1} tokens, and max_len is {self.max_len}; raise it")
        if not is_target[1:].any():
            raise BadRowError(f"{where} has no token to learn")
        example["num_tokens"], example["num_learned"] = len(ids), int(is_target.sum())
        return [{"input_ids": ids, "second_text": len(ids), "labels": is_target.astype(np.int8)}], False

    def make_rows(self, data, name, stride=None):
        # the first token of a conversation is only read, as the mark before a document of [`CausalLM`]
        spans = np.stack([data.starts[:-1] + 1, data.starts[1:]], axis=1)
        order, first = np.arange(len(spans)), np.arange(len(spans) + 1)
        if self.packing == "best_fit":
            row_of = best_fit(spans[:, 1] - spans[:, 0], self.max_len)
            order = np.argsort(row_of, kind="stable")
            first = group_offsets(row_of[order])
        return DocumentRows(data.tokens, spans[order], first, 0, name, loss_mask=data.labels)

    # ---- what a person sees

    def summary_lines(self, train_rows, val_rows, stats):
        lines = []
        if shapes := stats.get("shapes"):
            total = sum(shapes.values())
            shares = [name if count == total else f"{name} {count / total:.1%}" for name, count in shapes.items()]
            lines.append(f"rows look like {', '.join(shares)}")
            learned, tokens = stats["num_learned"], stats["num_tokens"]
            lines.append(f"{learned / tokens:.1%} of the tokens are learned, {learned:,} of {tokens:,}")
        if stats.get("unlearned"):
            lines.append(
                f"{plural(stats['unlearned'], 'turn')} of the assistant read and not learned: the chat template "
                "renders them differently when other turns follow"
            )
        if self.packing == "pad":
            lines.append("packing pad: a row for each conversation")
        return lines

    def describe_target(self, batch, index):
        """Return the text of a row with what is learned in brackets."""
        inputs, labels = batch["input_ids"][index].tolist(), self.targets(batch)[index].tolist()
        tokens = [inputs[0]] + [
            b if a == IGNORE_INDEX else a for a, b in zip(labels, inputs[1:] + inputs[-1:], strict=True)
        ]
        learned = [False] + [label != IGNORE_INDEX for label in labels]
        last = max(place for place, is_learned in enumerate(learned) if is_learned)
        shown = []
        for is_learned, group in groupby(zip(learned[: last + 1], tokens, strict=False), key=itemgetter(0)):
            text = self.tokenizer.decode([token for _, token in group])
            if len(text) > _SHOWN_CHARS:
                text = f"{text[: _SHOWN_CHARS // 2]} ... {text[-_SHOWN_CHARS // 2 :]}"
            text = repr(text)[1:-1]
            shown.append(f"[{text}]" if is_learned else text)
        return "".join(shown[:_SHOWN_PARTS]) + " ..." * (len(shown) > _SHOWN_PARTS)

    def usage(self, run_dir, prompt=None):
        label, command = super().usage(run_dir, prompt)
        return label, command.replace(" --prompt", " --chat --prompt") if self.tokenizer.chat_template else command

    def update_generation_config(self, model, stats):
        if stats.get("ends"):  # the end of a turn ends the generated text
            model.generation_config.eos_token_id = sorted({*stats["ends"], self.tokenizer.eos_token_id} - {None})
