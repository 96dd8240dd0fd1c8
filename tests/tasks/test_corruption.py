"""Span corruption and denoising: rows and batches as pure functions, without a model."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_myllm import tasks
from hf_myllm.data import tokenizer as tokenizers
from hf_myllm.data.corpus import TokenStream
from hf_myllm.errors import InputError
from hf_myllm.tasks import IGNORE_INDEX, denoising, span_corruption

LENGTH = 40


@pytest.fixture(scope="module")
def text():
    return [f"The {word} sees a house. It {word}s! One, two\nlines" for word in ("cat", "dog", "king", "friend") * 40]


def make_tokenizer(name, text, algorithm="bpe"):
    return tokenizers.train(algorithm, text, 400, tasks.TASKS[name].new_tokens)


def make_task(name, tokenizer, max_len=LENGTH, **settings):
    settings = {"mlm_probability": 0.3 if name == "denoising" else 0.15} | settings
    task = tasks.build(name, tokenizer, settings, seed=3)
    start = tokenizer.pad_token_id
    task.configure(SimpleNamespace(vocab_size=len(tokenizer), decoder_start_token_id=start), max_len)
    return task


def make_rows(task, tokenizer, text):
    ids = [
        token
        for line in text
        for token in [*tokenizer(line, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    return task.make_rows(TokenStream([np.array(ids)], "", max(ids)), "the text"), np.array(ids)


@pytest.fixture(scope="module", params=["span_corruption", "denoising"])
def case(request, text):
    tokenizer = make_tokenizer(request.param, text)
    task = make_task(request.param, tokenizer)
    rows, ids = make_rows(task, tokenizer, text)
    return SimpleNamespace(name=request.param, task=task, tokenizer=tokenizer, rows=rows, ids=ids)


def test_the_hint_how_to_generate_has_a_gap_to_fill(case):
    gap = {"span_corruption": "<extra_id_0>", "denoising": "<mask>"}[case.name]
    assert case.task.usage("RUN")[1] == f"hf-myllm generate RUN --prompt 'Once upon a {gap}'"


def restore(task, inputs, targets):
    """Return the text of a row of span corruption."""
    spans, sentinels = {}, set(task.sentinels.tolist())
    for token in targets:
        if token in sentinels:
            spans[token] = span = []
        else:
            span.append(token)
    pieces = [spans.pop(token) if token in spans else [token] for token in inputs]
    assert not spans
    return [token for piece in pieces for token in piece]


def test_inputs_and_targets_of_span_corruption_hold_all_the_text(text):
    tokenizer = make_tokenizer("span_corruption", text)
    for max_len, share, mean in ((40, 0.15, 3.0), (33, 0.5, 1.0), (64, 0.9, 2.0), (3, 0.15, 3.0), (17, 0.01, 1.5)):
        task = make_task("span_corruption", tokenizer, max_len, mlm_probability=share, mean_span_length=mean)
        rows, ids = make_rows(task, tokenizer, text)
        batch = task.batch(rows, np.arange(len(rows)), step=4)
        assert batch["input_ids"].shape[1] in (max_len, max_len - 1)
        assert batch["input_ids"].shape[1] == max_len or share > 0.5  # each span adds a sentinel too
        restored, end = [], tokenizer.eos_token_id
        for row in range(len(rows)):
            inputs, targets = batch["input_ids"][row].tolist(), batch["decoder_input_ids"][row].tolist()
            assert targets[0] == tokenizer.pad_token_id
            assert inputs[-1] == batch["labels"][row, -1] == end
            restored.append(restore(task, inputs[:-1], [*targets[1:]]))
        *full, last = restored
        assert (
            np.concatenate([*full, last])[: len(full) * task.text_length].tolist()
            == ids[: len(full) * task.text_length].tolist()
        )
        assert last == ids[-task.text_length :].tolist()


def test_span_corruption_of_T5s_size_has_T5s_numbers():
    """Those of the T5 code for 512 inputs: 568 tokens, 114 targets."""
    assert span_corruption.text_length(511, 0.15, 3.0) == 568
    assert span_corruption.noise_counts(568, 0.15, 3.0) == (85, 28)


def test_all_divisions_are_equally_likely():
    draws = np.random.default_rng(0).integers(0, 1 << 63, (6000, 5))
    lengths, counts = np.unique(span_corruption.divide(5, 3, draws), axis=0, return_counts=True)
    assert sorted(map(tuple, lengths.tolist())) == [(1, 1, 3), (1, 2, 2), (1, 3, 1), (2, 1, 2), (2, 2, 1), (3, 1, 1)]
    assert counts.min() > 900


def test_each_text_token_is_a_target_once_or_never(case):
    batch = case.task.batch(case.rows, np.arange(len(case.rows)), step=0)
    labels, decoder = batch["labels"], batch["decoder_input_ids"]
    assert torch.equal(torch.where(labels == IGNORE_INDEX, decoder.roll(-1, 1), labels)[:, :-1], decoder[:, 1:])
    repeated = len(case.rows) * case.task.text_length - len(case.ids)
    ignored = int((labels == IGNORE_INDEX).sum())
    assert (labels[:-1] != IGNORE_INDEX).all()
    if case.name == "denoising":
        assert ignored == repeated
        kept = labels[:, : case.task.text_length]
        assert kept[kept != IGNORE_INDEX].tolist() == case.ids.tolist()
    else:
        assert 0 < ignored <= repeated


def test_batches_are_functions_of_seed_step_and_row(case):
    indices = np.array([2, 0, 5])
    batch = case.task.batch(case.rows, indices, step=7)
    again = make_task(case.name, case.tokenizer).batch(case.rows, indices[::-1].copy(), step=7, size=4)
    for name, values in batch.items():
        assert torch.equal(values, again[name][:3].flip(0))
        assert not torch.equal(values, case.task.batch(case.rows, indices, step=8)[name]) or name in (
            ("labels", "decoder_input_ids") if case.name == "denoising" else ()
        )
    assert (again["labels"][3] == IGNORE_INDEX).all()
    for name, values in case.task.batch(case.rows, indices).items():
        assert torch.equal(values, case.task.batch(case.rows, indices)[name])
    assert case.task.count_tokens(again) == 3 * case.task.text_length


def test_denoising_masks_its_share_and_keeps_the_rest(text):
    tokenizer = make_tokenizer("denoising", text)
    task = make_task("denoising", tokenizer)
    rows, _ = make_rows(task, tokenizer, text)
    batch = task.batch(rows, np.arange(len(rows)), step=1)
    masked = round(0.3 * task.text_length)
    for row, inputs in enumerate(batch["input_ids"].tolist()):
        length = int(batch["attention_mask"][row].sum())
        assert all(token == tokenizer.pad_token_id for token in inputs[length:])
        kept = [token for token in inputs[:length] if token != task.mask]
        original = [*batch["decoder_input_ids"][row, 1:].tolist(), tokenizer.eos_token_id]
        assert len(kept) == len(original) - masked
        for token in set(kept):
            assert kept.count(token) <= original.count(token)


def test_infilled_spans_have_the_mean_and_some_are_empty():
    draws = np.random.default_rng(0).integers(0, 1 << 64, (400, 2, 200), dtype=np.uint64)
    rows = [denoising.infill(np.arange(1, 201), 0, 0.3, 3.0, *pair) for pair in draws]
    assert {int((row != 0).sum()) for row in rows} == {140}
    for row in rows[:20]:
        assert (np.diff(row[row != 0]) > 0).all()  # the rest stays in order
    assert 60 / np.mean([(row == 0).sum() for row in rows]) == pytest.approx(3.0, rel=0.08)
    first = [row[:3] for row in rows]
    assert any(row[0] == 1 and row[1] == 0 and row[2] == 2 for row in first)  # a mask without a token behind it
    assert denoising.infill(np.array([5]), 0, 0.3, 3.0, *draws[0][:, :1]).tolist() == [0]


def test_sentences_change_places_within_their_document():
    ids = np.array([1, 9, 2, 3, 9, 9, 4, 0, 5, 9, 6, 9, 0, 7])  # 9 ends a sentence, 0 a document
    orders = set()
    for seed in range(200):
        draws = np.random.default_rng(seed).integers(0, 1 << 63, len(ids))
        permuted = denoising.permute_sentences(ids, ids == 9, ids == 0, draws).tolist()
        assert permuted[7] == permuted[12] == 0
        assert permuted[13] == 7
        orders.add((tuple(permuted[:7]), tuple(permuted[8:12])))
    first = [(1, 9), (2, 3, 9, 9), (4,)]
    assert {order for order, _ in orders} == {sum(order, ()) for order in permutations(first)}
    assert {order for _, order in orders} == {(5, 9, 6, 9), (6, 9, 5, 9)}


def test_real_tokenizers_give_stock_rows(assets, text):
    """T5's sentinels descend from 32099; a row of BART has its <s> and </s>."""
    t5 = tokenizers.load(str(assets / "tokenizers" / "t5"))
    task = make_task("span_corruption", t5)
    rows, _ = make_rows(task, t5, text)
    batch = task.batch(rows, np.arange(2), step=0)
    assert batch["labels"][0, 0] == 32099
    assert batch["input_ids"][0].tolist().count(1) >= 1
    assert batch["input_ids"][0, -1] == batch["labels"][0, -1] == 1
    bart = tokenizers.load(str(assets / "tokenizers" / "bart"))
    task = make_task("denoising", bart)
    rows, _ = make_rows(task, bart, text)
    batch = task.batch(rows, np.arange(2), step=0)
    assert batch["labels"][:, 0].tolist() == [0, 0]
    assert batch["labels"][:, -1].tolist() == [2, 2]
    assert task.mask in batch["input_ids"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("span_corruption", {"max_len": 2}, "max_len 2 is too small"),
        ("denoising", {"max_len": 1}, "max_len 1 is too small"),
        ("span_corruption", {"max_len": 2000, "mean_span_length": 2.0}, "and the tokenizer has 100 sentinels; lower"),
    ],
)
def test_a_row_that_is_too_small_or_too_large_is_refused(name, changes, message, text):
    with pytest.raises(InputError, match=message):
        make_task(name, make_tokenizer(name, text), **changes)


def test_tokenizers_that_lack_tokens_are_refused(text):
    plain = tokenizers.train("bpe", text, 300, {})
    with pytest.raises(InputError, match="needs a tokenizer with pad_token"):
        make_task("span_corruption", plain)
    plain.pad_token = "<|endoftext|>"
    with pytest.raises(InputError, match="a tokenizer with sentinels, <extra_id_0>"):
        make_task("span_corruption", plain)
    with pytest.raises(InputError, match="needs a tokenizer with mask_token"):
        make_task("denoising", plain)
    tokenizer = make_tokenizer("denoising", text)
    task = tasks.build("denoising", tokenizer, {})
    with pytest.raises(InputError, match="decoder_start_token_id: the model's configuration has none"):
        task.configure(SimpleNamespace(vocab_size=400, decoder_start_token_id=None), 20)
    with pytest.raises(InputError, match="vocab_size 300 leaves too few tokens beside 102 special"):
        tokenizers.train("bpe", text, 300, tasks.TASKS["span_corruption"].new_tokens)
