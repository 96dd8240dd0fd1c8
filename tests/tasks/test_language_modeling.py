"""What the tasks make of rows: labels, masks, pairs, documents kept apart."""

import numpy as np
import pytest
import torch
from conftest import make_task

from hf_myllm.data import tokenizer as tokenizers
from hf_myllm.data.corpus import TokenStream
from hf_myllm.errors import InputError
from hf_myllm.tasks import IGNORE_INDEX, build

TEXT = (
    "The old house stands on a hill. Nobody has lived there for years! Does anyone remember who built it? "
    "My grandmother said it was a carpenter. He was unbelievably careful, and never hurried. "
)


@pytest.fixture(scope="module")
def wordpiece():
    return tokenizers.train_wordpiece([TEXT], 120)


@pytest.fixture(scope="module")
def corpus(wordpiece):
    """30 documents of different lengths, each of tokens that say which document they are from."""
    end = tokenizers.end_of_document(wordpiece)
    assert end == [wordpiece.sep_token_id, wordpiece.cls_token_id]
    documents = [wordpiece(TEXT * (1 + number % 4), add_special_tokens=False)["input_ids"] for number in range(30)]
    return TokenStream([np.array([*ids, *end], dtype=np.uint16) for ids in documents], "objectives", len(wordpiece) - 1)


def stream(count, name, **marks):
    """A stream of the numbers 10, 11 ... with a mark at some places."""
    ids = np.arange(10, 10 + count, dtype=np.uint16)
    for place, mark in marks.get("at", {}).items():
        ids[place] = mark
    return TokenStream([ids], name, count + 9)


class Ends:
    """As much of a tokenizer as keeping documents apart needs."""

    eos_token_id, bos_token_id = 3, 4


def test_documents_kept_apart_restart_at_the_token_between_them():
    tokens = stream(33, "apart", at={5: 3, 6: 3, 20: 3})
    task = make_task("causal", Ends, 16, 100, packing="documents")
    rows = task.make_rows(tokens, "x")
    read = task.batch(rows, np.arange(2), size=3)
    assert read["position_ids"][0].tolist() == [*range(5), 0, *range(10)]
    assert read["position_ids"][1].tolist() == [*range(4), *range(12)]
    assert read["input_ids"][1, 4] == 3  # an end is the first that the next document reads
    assert read["shift_labels"][0, 4] == 3  # and the last that its own says; no target is lost
    assert task.count_targets(read) == {"num_items_in_batch": 32}
    assert read["position_ids"].shape == (3, 16)
    begun = task.make_rows(stream(33, "begun", at={7: 4}), "x")  # with a mark at the start instead
    assert task.batch(begun, np.arange(1))["position_ids"][0].tolist() == [*range(7), *range(9)]
    with pytest.raises(InputError, match="none of the tokens"):
        task.make_rows(stream(33, "unmarked"), "x.bin")


@pytest.mark.parametrize("whole_words", [False, True])
def test_masking(wordpiece, corpus, whole_words):
    size = len(wordpiece)
    task = make_task("mlm", wordpiece, 128, size + 8, whole_word_masking=whole_words)
    rows = task.make_rows(corpus, "x")
    everything = np.arange(len(rows))
    total, share, in_text, chosen_pieces = {"mask": 0, "random": 0, "same": 0}, [], 0.0, 0.0
    pieces = [number for token, number in wordpiece.get_vocab().items() if token.startswith("##")]
    for step in range(60):
        read = {key: value.numpy() for key, value in task.batch(rows, everything, step).items()}
        windows, first = rows.read(everything)
        original = np.pad(windows, ((0, 0), (1, 1)))
        original[:, 0], original[:, -1] = wordpiece.cls_token_id, wordpiece.sep_token_id
        used = read["labels"] != IGNORE_INDEX
        row, slot = np.nonzero(used)
        place = read["masked_positions"][row, slot]
        assert len({*zip(row, place, strict=True)}) == len(row)  # no position twice
        assert (place > first[row]).all()
        assert np.array_equal(original[row, place], read["labels"][row, slot])  # a label is what stood there
        assert not np.isin(read["labels"][used], wordpiece.all_special_ids).any()
        untouched = np.ones_like(original, dtype=bool)
        untouched[row, place] = False
        assert np.array_equal(read["input_ids"][untouched], original[untouched])
        may = ~np.isin(original, wordpiece.all_special_ids)
        may[:, 1:-1] &= np.arange(126) >= first[:, None]
        wanted = np.maximum(np.rint(may.sum(1) * 0.15), 1)
        assert (used.sum(1) <= wanted + 12).all() if whole_words else (used.sum(1) == wanted).all()
        share.append(used.sum() / wanted.sum())
        is_piece = np.isin(original, pieces)
        in_text, chosen_pieces = in_text + is_piece[may].mean(), chosen_pieces + is_piece[row, place].mean()
        now = read["input_ids"][row, place]
        total["mask"] += int((now == wordpiece.mask_token_id).sum())
        total["same"] += int((now == read["labels"][used]).sum())
        total["random"] += int(((now != wordpiece.mask_token_id) & (now != read["labels"][used])).sum())
        assert not np.isin(now[now != wordpiece.mask_token_id], wordpiece.all_special_ids).any()
        if whole_words:
            tokens = [wordpiece.convert_ids_to_tokens(line.tolist()) for line in original]
            chosen = {*zip(row.tolist(), place.tolist(), strict=True)}
            for line, at in chosen:
                if tokens[line][at].startswith("##") and may[line, at - 1]:
                    assert (line, at - 1) in chosen
                if at + 1 < 127 and tokens[line][at + 1].startswith("##") and may[line, at + 1]:
                    assert (line, at + 1) in chosen
    assert np.mean(share) == pytest.approx(1, abs=0.02)
    assert chosen_pieces == pytest.approx(in_text, rel=0.05)  # long words are chosen as often as short ones
    number = sum(total.values())
    assert total["mask"] / number == pytest.approx(0.8, abs=0.02)
    assert total["random"] / number == pytest.approx(0.1, abs=0.015)  # and a hundredth of those hit the token itself
    assert total["same"] / number == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("name", ["mlm", "mlm_nsp"])
def test_the_draw_depends_on_seed_step_and_row_alone(wordpiece, corpus, name):
    def read(indices, step, seed=0, size=None):
        task = make_task(name, wordpiece, 64, seed=seed)
        return task.batch(task.make_rows(corpus, "x"), np.array(indices), step, size)

    together, apart = read([4, 2, 7], 5), [read([number], 5) for number in (4, 2, 7)]
    for key, value in together.items():
        assert torch.equal(value, torch.cat([one[key] for one in apart])), key
        assert torch.equal(value, read([4, 2, 7], 5, size=6)[key][:3]), key
    others = (read([4, 2, 7], 6), read([4, 2, 7], 5, seed=1), read([4, 2, 7], None))
    assert not any(torch.equal(together["input_ids"], other["input_ids"]) for other in others)
    assert torch.equal(read([4], None)["input_ids"], read([4], None)["input_ids"])


def test_masked_documents_are_kept_apart(wordpiece, corpus):
    task = make_task("mlm", wordpiece, 128, packing="documents")
    rows = task.make_rows(corpus, "x")
    read = task.batch(rows, np.arange(len(rows)), 0)
    for ids, documents, positions in zip(
        *(read[k] for k in ("input_ids", "document_ids", "position_ids")), strict=True
    ):
        edges = [0, *(torch.nonzero(documents[1:] != documents[:-1])[:, 0] + 1).tolist(), 128]
        for start, stop in zip(edges, edges[1:], strict=False):
            assert positions[start:stop].tolist() == list(range(stop - start))
            assert ids[start] == wordpiece.cls_token_id  # each document begins as it will when the model is used
            assert stop == 128 or ids[stop - 1] == wordpiece.sep_token_id


def test_isolated_masked_rows_need_a_mark(wordpiece):
    task = make_task("mlm", wordpiece, 16, packing="documents")
    with pytest.raises(InputError, match="none of the tokens"):
        task.make_rows(stream(100, "unmarked"), "x.bin")


def test_sentence_pairs(wordpiece, corpus):
    task = make_task("mlm_nsp", wordpiece, 64)
    rows = task.make_rows(corpus, "x")
    assert sum(len(rows.read(number)) for number in range(len(rows))) == len(corpus) - 2 * 30  # nothing is lost
    follows, ends_well, both, lengths, b_ends = [], [], [], {True: [], False: []}, {True: [], False: []}
    for step in range(20):
        for number in range(len(rows)):
            passage, (a, b, is_next) = rows.read(number), task.draw_pair(rows, number, step)
            assert 0 < len(a) <= 30
            assert 0 < len(b) <= 30
            follows.append(is_next)
            ends_well.append(wordpiece.decode([a[-1]]) in (".", "!", "?"))
            lengths[is_next].append(len(b))
            both.append((len(a), len(b), is_next))
            b_ends[is_next].append(wordpiece.decode([b[-1]]) in (".", "!", "?"))
            if is_next:
                text = " ".join(map(str, passage))
                assert " ".join(map(str, [*a, *b])) in text
    assert np.mean(follows) == pytest.approx(0.5, abs=0.03)
    assert np.mean(ends_well) > 0.95
    # neither how long B is nor how it ends says whether it follows
    assert np.mean(lengths[True]) == pytest.approx(np.mean(lengths[False]), rel=0.05)
    assert np.mean(b_ends[True]) == pytest.approx(np.mean(b_ends[False]), abs=0.05)
    # nor do both lengths together: the best guess by them, learned from half of the draws, is right as often as chance
    pairs, half = np.array(both), len(both) // 2
    known = {}
    for a_length, b_length, is_next in pairs[:half] // [4, 4, 1]:
        known.setdefault((a_length, b_length), []).append(is_next)
    guesses = [np.mean(known.get((a, b), [0.5])) > 0.5 for a, b, _ in pairs[half:] // [4, 4, 1]]
    assert np.mean(guesses == pairs[half:, 2].astype(bool)) == pytest.approx(0.5, abs=0.05)
    read = task.batch(rows, np.arange(4), 0, size=5)
    assert task.count_targets(read) == {
        "num_items_in_batch": int((read["labels"] != IGNORE_INDEX).sum()),
        "num_pairs_in_batch": 4,
    }
    for row in range(4):
        a, b, is_next = task.draw_pair(rows, row, 0)
        used = 3 + len(a) + len(b)
        assert read["attention_mask"][row].tolist() == [1] * used + [0] * (64 - used)
        assert read["token_type_ids"][row].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (64 - used)
        assert read["next_sentence_label"][row] == (0 if is_next else 1)
        assert read["input_ids"][row, used:].eq(wordpiece.pad_token_id).all()


def test_the_second_sentence_comes_from_another_document(wordpiece):
    """Each document has tokens of its own, so that where a sentence is from can be seen."""
    cls, sep = wordpiece.cls_token_id, wordpiece.sep_token_id
    ids = np.concatenate([[20 + number] * 9 + [sep, cls] for number in range(5)]).astype(np.uint16)
    task = make_task("mlm_nsp", wordpiece, 12)
    rows = task.make_rows(TokenStream([ids], "five documents", 30), "x")
    seen = set()
    for step in range(200):
        a, b, is_next = task.draw_pair(rows, 0, step)
        assert set(a) == {20}
        assert (set(b) == {20}) == is_next
        seen |= set(b.tolist())
    assert seen == {20, 21, 22, 23, 24}
    with pytest.raises(InputError, match="is one document"):
        task.make_rows(TokenStream([ids[:10]], "one document", 30), "x")


def test_what_a_task_needs_of_a_tokenizer():
    bpe = tokenizers.train_bpe([TEXT] * 20, 300)
    with pytest.raises(InputError, match="cls_token, sep_token, mask_token"):
        build("mlm", bpe, {})
    with pytest.raises(InputError, match="give --tokenizer"):
        build("mlm", None, {})
    with pytest.raises(InputError, match="packing documents"):
        build("causal", None, {"packing": "documents"})
