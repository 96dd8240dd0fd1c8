"""No token is lost with any max_len, stride and packing."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_task

from hf_myllm.data.corpus import TokenStream
from hf_myllm.data.packing import StridedRows, best_fit, split_spans
from hf_myllm.errors import InputError
from hf_myllm.tasks import CausalLM


def stream(count, pieces=1):
    return TokenStream(np.array_split(np.arange(count, dtype=np.uint16), pieces), "fingerprint", count - 1)


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("max_len", [1, 4, 16, 99])
@pytest.mark.parametrize("count", [100, 101, 113, 128])
def test_rows_without_overlap_predict_each_token_once(count, max_len, pieces):
    rows = StridedRows(stream(count, pieces), max_len, max_len, "x")
    batch = CausalLM().batch(rows, np.arange(len(rows)))
    inputs, labels = batch["input_ids"].numpy(), batch["shift_labels"].numpy()
    assert inputs.shape == labels.shape == (len(rows), max_len)
    assert np.array_equal(np.sort(labels[labels >= 0]), np.arange(1, count))
    assert np.array_equal(labels[labels >= 0], inputs[labels >= 0] + 1)  # each is the token after its input


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
def test_overlapping_rows_cover_everything(stride):
    rows = StridedRows(stream(75), 16, stride, "x")
    windows, first = rows.read(np.arange(len(rows)))
    assert set(windows[:, 1:].ravel()) == set(range(1, 75))
    assert windows[:-1, 0].tolist() == list(range(0, stride * (len(rows) - 1), stride))
    assert first[:-1].max(initial=0) == 0
    assert windows[-1, -1] == 74


def test_a_stride_above_the_length_skips_tokens():
    rows = StridedRows(stream(100), 4, 10, "x")
    windows, first = rows.read(np.arange(len(rows)))
    kept = [int(token) for window, skip in zip(windows, first, strict=True) for token in window[1 + skip :]]
    assert kept == [start + offset for start in range(0, 99, 10) for offset in range(1, 5) if start + offset < 100]


def test_exactly_one_row_and_one_token_too_few():
    assert len(StridedRows(stream(17), 16, 16, "x")) == 1
    with pytest.raises(InputError, match="corpus.txt has 16 tokens"):
        StridedRows(stream(16), 16, 16, "corpus.txt")


def test_padding_rows_have_no_targets():
    rows = StridedRows(stream(50), 8, 8, "x")
    batch = CausalLM().batch(rows, np.arange(2), size=5)
    assert batch["input_ids"].shape == (5, 8)
    assert (batch["shift_labels"][2:] == -100).all()
    assert CausalLM().batch(rows, np.arange(0), size=3)["input_ids"].shape == (3, 8)


def test_only_long_spans_are_split():
    spans = split_spans(np.array([[0, 3], [4, 4 + 25], [30, 40]]), 10)
    assert spans.tolist() == [[0, 3], [4, 14], [14, 24], [24, 29], [30, 40]]


def test_best_fit_fills_rows_with_whole_documents():
    lengths = np.random.default_rng(0).integers(1, 101, 3000)
    row_of = best_fit(lengths, 100)
    used = np.bincount(row_of, weights=lengths)
    assert used.max() <= 100
    assert used.min() > 0
    assert len(used) < 1.03 * lengths.sum() / 100  # hardly more rows than if documents could be split
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10).tolist() == [0, 1, 0, 1, 1]


END = SimpleNamespace(eos_token_id=9, bos_token_id=None, name_or_path="x")
BERT = SimpleNamespace(
    eos_token_id=None, sep_token_id=1, cls_token_id=2, mask_token_id=3, pad_token_id=4, name_or_path="x",
    cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", all_special_ids=[1, 2, 3, 4], __len__=lambda: 100,
    get_vocab=lambda *self: {str(token_id): token_id for token_id in range(100)},
)  # fmt: skip


def make_stream(documents, separators):
    """Return a stream of documents with separators between them, of two sources."""
    ids = np.concatenate([np.array([*document, *separators]) for document in documents])[: -len(separators)]
    tokens = TokenStream([ids.astype(np.uint16)], f"{ids.tolist()}", int(ids.max()))
    tokens.source_starts = [0, sum(len(document) + len(separators) for document in documents[:10])]
    return tokens


@pytest.mark.parametrize("packing", ["pad", "best_fit"])
def test_whole_documents_are_predicted_once_and_isolated(packing):
    draw = np.random.default_rng(1)
    documents = [draw.integers(10, 100, size) for size in [*draw.integers(1, 31, 30), 100]]
    tokens = make_stream(documents, [9])
    task = make_task("causal", END, 32, 100, packing=packing)
    rows = task.make_rows(tokens, "x")
    assert rows.num_used_tokens() == len(tokens) - 1
    seen = []
    for start in range(0, len(rows), 3):
        indices = np.arange(start, min(start + 3, len(rows)))
        batch = {name: values.numpy() for name, values in task.batch(rows, indices, size=3).items()}
        assert batch["input_ids"].shape[0] == 3
        width = batch["input_ids"].shape[1]
        assert width <= 32
        if packing == "pad":
            longest = max(int(rows.lengths([index])[0]) for index in indices)
            assert longest <= width < longest + 8 or width == 32
        positions = batch.get("position_ids", np.broadcast_to(np.arange(width), batch["input_ids"].shape))
        for inputs, labels, row_positions in zip(batch["input_ids"], batch["shift_labels"], positions, strict=True):
            kept = labels >= 0
            continues = kept[1:] & (row_positions[1:] > 0)
            assert np.array_equal(inputs[1:][continues], labels[:-1][continues])
            begins = inputs[kept & (row_positions == 0)]
            assert np.isin(begins, [9, documents[0][0], documents[-1][31], documents[-1][63], documents[-1][95]]).all()
            seen += labels[kept].tolist()
    whole = tokens.read(0, len(tokens))[1:].tolist()
    assert sorted(seen) == sorted(whole)
    assert len(rows.source_starts) == 2
    stops_of_first_source = [stop for row in range(rows.source_starts[1]) for _, stop in rows.read(row)]
    assert max(stops_of_first_source) <= tokens.source_starts[1]
    if packing == "best_fit":
        assert len(rows) < 31
    tokens = make_stream(documents, [9])
    tokens.source_starts = [0, len(tokens) - 1]  # a source without a document
    assert task.make_rows(tokens, "x").source_starts[1] >= 1


@pytest.mark.parametrize("packing", ["pad", "best_fit"])
def test_whole_documents_are_masked_between_special_tokens(packing):
    draw = np.random.default_rng(1)
    documents = [draw.integers(10, 100, size) for size in [*draw.integers(1, 28, 30), 100]]
    tokens = make_stream(documents, [1, 2])
    bert = type("Bert", (), {**vars(BERT), "__len__": lambda self: 100})()
    task = make_task("mlm", bert, 32, 100, packing=packing)
    rows = task.make_rows(tokens, "x")
    assert rows.num_used_tokens() == sum(map(len, documents))
    batch = {name: values.numpy() for name, values in task.batch(rows, np.arange(len(rows)), size=40).items()}
    ids, positions, labels = batch["input_ids"].copy(), batch["masked_positions"], batch["labels"]
    for row in range(len(rows)):
        ids[row, positions[row][labels[row] >= 0]] = labels[row][labels[row] >= 0]
        for number, (start, stop) in enumerate(rows.read(row), start=1):
            text = [2, *tokens.read(start, stop - start), 1]
            if packing == "pad":
                assert ids[row][batch["attention_mask"][row] == 1].tolist() == text
            else:
                mine = batch["document_ids"][row] == number
                assert ids[row][mine].tolist() == text
                assert batch["position_ids"][row][mine].tolist() == list(range(len(text)))
    assert ((labels >= 0).sum(axis=1)[: len(rows)] > 0).all()
