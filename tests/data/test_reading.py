"""Files that are easily read wrong: the right rows are read, or the file is refused with what to do."""

import bz2
import csv
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from hf_myllm.data import conll, corpus, discovery, readers, sources
from hf_myllm.errors import DataError


def rows(spec, columns=None):
    return [row for _, row in readers.read_rows(sources.file_source(str(spec)), columns=columns)]


def texts(spec, **options):
    return [text for text, _ in readers.read_documents(sources.file_source(str(spec), **options))]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- finding files


def test_a_name_with_the_characters_of_a_pattern_is_a_name(tmp_path):
    for folder in ("plain", "a [b]*?"):
        write(tmp_path / folder / "x[1].txt", "one")
        write(tmp_path / folder / "x1.txt", "two")
        datasets.Dataset.from_dict({"text": ["three"]}).to_parquet(tmp_path / folder / "p[0-9]*.parquet")
        assert texts(tmp_path / folder / "x[1].txt") == ["one"]
        assert texts(tmp_path / folder / "p[0-9]*.parquet") == ["three"]
        assert texts(f"{tmp_path}/{folder}/*.txt") == ["two", "one"]
    with pytest.raises(DataError, match="does not exist"):
        sources.file_source(f"{tmp_path}/plain/x[2].txt")


def test_folders_are_followed_through_links_and_without_what_is_hidden(tmp_path):
    write(tmp_path / "elsewhere" / "b.txt", "linked")
    write(tmp_path / "data" / "here" / "a.txt", "here")
    write(tmp_path / "data" / ".ipynb_checkpoints" / "a-checkpoint.txt", "copy")
    write(tmp_path / "data" / ".git" / "c.txt", "hidden")
    write(tmp_path / "data" / "._a.txt", "hidden")
    (tmp_path / "data" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")  # a loop
    assert texts(tmp_path / "data") == ["here", "linked"]
    assert texts(f"{tmp_path}/data/h*/**/*.txt") == ["here"]
    assert texts(tmp_path / "data" / ".git") == ["hidden"]  # asked for by its name


@pytest.mark.parametrize("names", [("dataset_info.json", "state.json"), ("dataset_dict.json",)])
def test_a_folder_of_save_to_disk_is_named(tmp_path, names):
    for name in names:
        write(tmp_path / "saved" / "part" / name, "{}")
    with pytest.raises(DataError, match=r"saved/part is a folder of save_to_disk; .*load_from_disk\('.*saved/part'\)"):
        sources.file_source(str(tmp_path / "saved"))


def arrow_stream():
    table, sink = pa.table({"text": ["x"]}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def written(write_to):
    buffer = io.BytesIO()
    write_to(buffer)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PARQUET = written(lambda file: parquet.write_table(pa.table({"text": ["x"]}), file))
CONTENTS = {
    "an LFS pointer": (POINTER, "git lfs pull"),
    "gzip": (gzip.compress(b"x" * 99), "is gzip by its first bytes; call it .gz"),
    "bzip2": (bz2.compress(b"x" * 99), "call it .bz2"),
    "xz": (lzma.compress(b"x" * 99), "call it .xz"),
    "Parquet": (PARQUET, "is Parquet by its first bytes; call it .parquet"),
    "an Arrow stream": (arrow_stream(), "is Arrow by its first bytes; .*to_parquet"),
    "a NumPy array": (written(lambda file: np.save(file, np.arange(9))), r"tofile\('ids.bin'\)"),
    "a zip archive": (written(lambda file: torch.save(torch.arange(9), file)), "a zip archive .*unpack it"),
    "a spreadsheet": (
        written(lambda file: zipfile.ZipFile(file, "w").writestr("[Content_Types].xml", "")),
        "an office",
    ),
    "a pickle": (pickle.dumps([1, 2]), "call it .pkl"),
    "safetensors": ((99).to_bytes(8, "little") + b'{"a": 1}', "a model"),
    "a PDF": (b"%PDF-1.7\n", "save its text"),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_a_file_is_not_read_as_something_else(tmp_path, content, message):
    names = ["a.txt", "a.dat", "a.jsonl", "a.csv", "a.tsv", "a.json", "a", "folder/a.txt", "b.txt.gz", "a.md"]
    for name in names + ["a.bin"] * (content[:1] != b"\x80"):
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(DataError, match=f"{name}: it (is|holds) .*{message.removeprefix('is ')}"):
            sources.file_source(str((tmp_path / name).parent if "/" in name else tmp_path / name))


def test_what_is_no_file_or_no_text_is_said(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "folders" / "a").mkdir(parents=True)
    write(tmp_path / "binary.txt", bytes(range(128, 160)) + b"\3")
    for name, message in (
        ("link.txt", "link.txt is a link to .*gone, which does not exist"),
        ("folders/*", "matches folders only"),
        ("none*", "does not exist"),
        ("binary.txt", "is not UTF-8 text: byte 0x80 at offset 0"),
    ):
        with pytest.raises(DataError, match=message):
            texts(tmp_path / name)


def test_a_misnamed_file_is_not_left_out_of_a_folder(tmp_path):
    write(tmp_path / "a.txt", "x")
    for name, content in (("b.pq", PARQUET), ("b.txt.gzip", gzip.compress(b"x")), ("b.arrow", arrow_stream())):
        path = write(tmp_path / name, content)
        with pytest.raises(DataError, match=f"{name}: it is "):
            sources.file_source(str(tmp_path))
        path.unlink()


@pytest.mark.parametrize("suffix", ["ndjson", "jsonlines", "ndjson.gz"])
def test_json_lines_by_other_names(tmp_path, suffix):
    content = b'{"text": "one"}\n{"text": "two"}\n'
    write(tmp_path / f"a.{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    assert texts(tmp_path / f"a.{suffix}") == texts(tmp_path) == ["one", "two"]


def test_the_last_suffix_says_the_format(tmp_path):
    write(tmp_path / "x.tsv.csv", "text,b\na,1\n")
    write(tmp_path / "y.csv.tsv", "text\tb\na,c\t1\n")
    assert texts(tmp_path / "x.tsv.csv") == ["a"]
    assert texts(tmp_path / "y.csv.tsv") == ["a,c"]
    assert len(sources.file_source(str(tmp_path)).files) == 2


def test_validation_files_are_not_training_files(tmp_path):
    train, val = write(tmp_path / "data" / "train.txt", "one"), write(tmp_path / "data" / "val.txt", "two")
    (tmp_path / "link.txt").symlink_to(val)
    (tmp_path / "folder").symlink_to(tmp_path / "data")
    os.link(val, tmp_path / "hard.txt")
    write(tmp_path / "copy" / "copy.txt", "two")
    write(tmp_path / "other.txt", "six")
    write(tmp_path / "empty.txt", "")
    training = [sources.file_source(str(train)), sources.file_source(str(tmp_path / "data"))]
    names = ["data/val.txt", "link.txt", "hard.txt", "copy/copy.txt", "folder/val.txt", "copy", "data", "*.txt"]
    for name in names:
        with pytest.raises(
            DataError, match=r"val_file: .*(val|link|hard|copy|train).txt is also a training file.*; name "
        ):
            sources.check_disjoint(training, sources.file_source(f"{tmp_path}/{name}"))
    sources.check_disjoint(training, sources.file_source(str(tmp_path / "other.txt")))
    sources.check_disjoint(training[:1], sources.file_source([str(val), str(tmp_path / "empty.txt")]))
    memory = [
        sources.in_memory_source(texts, name) for texts, name in ((["a", "b"], "train_data"), (["a"], "eval_data"))
    ]
    sources.check_disjoint(memory[:1], memory[1])
    with pytest.raises(DataError, match="eval_data: it holds the same texts as train_data"):
        sources.check_disjoint(memory[:1], sources.in_memory_source(("a", "b"), "eval_data"))


def test_validation_files_are_compared_by_their_text(tmp_path):
    text = "é: a line\n" * 200_000
    write(tmp_path / "data" / "a.txt", text)
    write(tmp_path / "data" / "b.txt", text + "another end")
    training = [sources.file_source(str(tmp_path / "data"))]
    for name, content in (
        ("c.txt.gz", gzip.compress(text.encode())),
        ("d.txt.bz2", bz2.compress(text.encode())),
        ("bom.txt", b"\xef\xbb\xbf" + text.encode()),
        ("crlf.txt", text.replace("\n", "\r\n").encode()),
    ):
        with pytest.raises(DataError, match=rf"{name} is also a training file, as .*a.txt; name only"):
            sources.check_disjoint(training, sources.file_source(str(write(tmp_path / name, content))))
    sources.check_disjoint(training, sources.file_source(str(write(tmp_path / "e.txt", text + "an end"))))


# ---- rows


def csv_text(table, **options):
    buffer = io.StringIO()
    csv.writer(buffer, **options).writerows(table)
    return buffer.getvalue()


def test_a_quotation_mark_in_tab_separated_values_is_a_character(tmp_path):
    glue = 'text\tlabel\n"Hello" she said\t1\n"an open one\t1\nand a close"\t0\n"All of it."\t2\n'
    assert [row["text"] for row in rows(write(tmp_path / "a.tsv", glue))] == [
        '"Hello" she said',
        '"an open one',
        'and a close"',
        '"All of it."',
    ]
    table = [["text", "label"], ['she said "hi"\nand left', "1"], ["x", "2"]]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):  # only with quoting each row has two fields
        path = write(tmp_path / "b.tsv", csv_text(table, delimiter="\t", quoting=quoting))
        assert [[row["text"], row["label"]] for row in rows(path)] == table[1:]
    for text in ('she said "hi"', 'she said "hi"\tand\nleft'):
        path = write(tmp_path / "c.tsv", csv_text([["text", "label"], [text, "1"]], delimiter="\t"))
        with pytest.raises(DataError, match="line 2 has a field that is quoted as in CSV"):
            rows(path)
    with pytest.raises(DataError, match="line 3 has fewer fields"):
        rows(write(tmp_path / "d.tsv", 'text\tlabel\n"a" b\t1\nragged\nx\t2\n'))
    assert rows(write(tmp_path / "e.csv", 'text,label\n"a ""b""",1\n')) == [{"text": 'a "b"', "label": "1"}]


def test_unused_columns_of_parquet_files_may_differ(tmp_path):
    for name, extra in (("a", [None]), ("b", ["note"]), ("c", [3]), ("d", None)):
        table = {"text": [f"text {name}"]} | ({"extra": extra} if extra else {})
        parquet.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    assert texts(tmp_path) == ["text a", "text b", "text c", "text d"]
    assert rows(tmp_path / "b.parquet", ["text"]) == [{"text": "text b", "extra": None}]
    assert rows(tmp_path / "b.parquet") == [{"text": "text b", "extra": "note"}]


def picture_rows():
    features = {
        "text": datasets.Value("string"),
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["n", "y"]),
    }
    table = pa.table({"text": ["x"], "image": [{"bytes": None, "path": "http://127.0.0.1:9/a.png"}], "label": [1]})
    return table, datasets.Features(features)


@pytest.mark.parametrize("kind", ["parquet", "memory", "stream"])
@pytest.mark.parametrize("column", ["text", "image"])
def test_pictures_are_not_decoded(tmp_path, monkeypatch, kind, column):
    """An Image feature in the metadata may name a URL."""
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **options: pytest.fail("decoded"))
    table, features = picture_rows()
    schema = features.arrow_schema
    parquet.write_table(table.cast(schema), tmp_path / "a.parquet")
    if kind == "parquet":
        source = sources.file_source(str(tmp_path / "a.parquet"), column)
    elif kind == "memory":
        data = datasets.Dataset(table.cast(schema))
        assert data.features == features
        source = sources.in_memory_source(data, "train_data", column)
    else:
        source = sources.Source("hub", "someone/pictures", text_column=column, is_streamed=True)
        stream = datasets.Dataset(table.cast(schema)).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    if column == "text":
        assert list(readers.read_documents(source)) == [("x", True)]
        (_, row), *_ = readers.read_rows(source, columns=("text", "label"))
        assert (row["text"], row["label"]) == ("x", "y")
    else:
        with pytest.raises(DataError, match="column 'image' does not hold text"):
            list(readers.read_documents(source))


def test_json_in_a_column_is_read(tmp_path):
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no JSON columns")
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "n": datasets.Json()})
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "id": 3}], "n": {"a": [1]}}
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [row]


# ---- token ids


def test_a_header_of_llmc_is_passed_over(tmp_path):
    def write_bin(name, ids, magic, version, count=None):
        header = np.zeros(256, dtype="<i4")
        header[:3] = magic, version, len(ids) if count is None else count
        return str(write(tmp_path / name, header.tobytes() + ids.tobytes()))

    for dtype, magic, version in (("<u2", 20240520, 1), ("<u4", 20240801, 7)):
        ids = (np.arange(1000) % 300).astype(dtype)
        tokens, _, _ = corpus.load_tokens(sources.file_source(write_bin("a.bin", ids, magic, version)), None)
        assert tokens.read(0, 2000).tolist() == ids.tolist()
    for options in ((20240520, 1, 999), (20240326, 1), (20240520, 2)):
        with pytest.raises(DataError, match=r"a.bin has a header of llm.c \(2024"):
            corpus.load_tokens(sources.file_source(write_bin("a.bin", ids, *options)), None)


def test_a_word_where_an_archive_has_its_mark_is_text(tmp_path):
    text = "a" * 257 + "ustar la mesa, y no gustar a nadie"
    path = write(tmp_path / "es.txt", text)
    assert texts(path) == [text]
    with tarfile.open(tmp_path / "tar.txt", "w") as archive:
        archive.add(path)
    with pytest.raises(DataError, match=r"tar.txt: it is an archive by its first bytes"):
        sources.file_source(str(tmp_path / "tar.txt"))


# ---- CoNLL


def read_conll(tmp_path, text, label="label", **options):
    source = sources.file_source(str(write(tmp_path / "a.conll", text)))
    return [(row["tokens"], row[label]) for _, row in conll.read_conll(source, labels=label, **options)]


CONLLU = """# sent_id = 1
# text = Vamonos ya
1-2\tVamonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\tVB\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tPP\t_\t1\tobj\t_\t_
2.1\tnada\t_\tX\t_\t_\t_\t_\t_\t_
3\tya\tya\tADV\tRB\t_\t1\tadvmod\t_\tSpaceAfter=No

1\t1\t1\tNUM\tCD\t_\t0\troot\t_\t_
"""


def test_the_words_and_tags_of_conllu(tmp_path):
    words = [["Vamos", "nos", "ya"], ["1"]]
    tags = {"label": ["VERB", "PRON", "ADV"], "xpos": ["VB", "PP", "RB"], "DEPREL": ["root", "obj", "advmod"]}
    for label, first in (tags | {"5": tags["xpos"]}).items():
        read = read_conll(tmp_path, CONLLU, label)
        assert [own for own, _ in read] == words
        assert read[0][1] == first
    for name in ("ner_tags", "head", "deprell"):  # not the part of speech instead
        with pytest.raises(DataError, match=f"label_column: .* no column '{name}' of labels.*by its name.*xpos"):
            read_conll(tmp_path, CONLLU, name)
    one_word_first = "1\tHi\thi\tINTJ\tUH\t_\t0\troot\t_\t_\n\n" + CONLLU
    assert read_conll(tmp_path, one_word_first)[0] == (["Hi"], ["INTJ"])


def test_numbered_words_with_other_columns(tmp_path):
    comment = "#\thttp://example.org [2020-01-01]\n"
    germeval = comment + "1\tAnna\tB-PER\tO\n2\tRoma\tB-LOC\tB-ORG\n\n" + comment + "1\tx\tO\tO\n"
    with pytest.raises(DataError, match=r"no column 'label' of labels, but 3 'B-PER', 4 'O'; choose one by its number"):
        read_conll(tmp_path, germeval)
    assert read_conll(tmp_path, germeval, "3") == [(["Anna", "Roma"], ["B-PER", "B-LOC"]), (["x"], ["O"])]
    assert read_conll(tmp_path, germeval, "4")[0][1] == ["O", "B-ORG"]
    assert [words for words, _ in read_conll(tmp_path, germeval, needs_labels=False)] == [["Anna", "Roma"], ["x"]]
    three = "0 1 O\n1 2 B-X\n\n"  # numbered from 0, and the words are numbers too
    assert read_conll(tmp_path, three) == [(["1", "2"], ["O", "B-X"])]
    for text, message in (
        ("1\ta\tO\n2\tb\tO\nx\tc\tO\n", "line 3 is not a number and 2 more columns"),
        ("1\ta\tO\n2\tb\tO\n3\tc\n", "line 3 is not a number and 2 more columns"),
        ("#begin document (x); part 000\nx 0 0 In IN\n", "line 1: CoNLL-2012 is not read"),
    ):
        with pytest.raises(DataError, match=message):
            read_conll(tmp_path, text)
    for label in ("5", "2", "0"):  # no column, or one of no labels
        with pytest.raises(DataError, match=f"label_column: .* no column '{label}' of labels, but 3 .*, 4 'O'"):
            read_conll(tmp_path, germeval, label)
    # words that are numbers, in a file whose words are not numbered
    assert read_conll(tmp_path, "1 CD I-NP O\n\n3 CD I-NP B-X\n2 CD I-NP O\n")[1] == (["3", "2"], ["B-X", "O"])


def test_the_label_column_of_words_without_numbers(tmp_path):
    conll2003 = "EU NNP I-NP B-ORG\nrejects VBZ I-VP O\n"
    for label, tag in (("label", "B-ORG"), ("pos", "NNP"), ("Chunk", "I-NP"), ("ner", "B-ORG"), ("2", "NNP")):
        ((words, tags),) = read_conll(tmp_path, conll2003, label)
        assert (words, tags[0]) == (["EU", "rejects"], tag)
    for text, label, message in (
        (conll2003, "ner_tags", r"2 'NNP', 3 'I-NP', 4 'B-ORG'; choose one by its number, or by its name \(pos, chunk"),
        (conll2003, "1", "no column '1' of labels"),
        ("EU NNP I-NP\nrejects VBZ I-VP\n", "ner", "2 'NNP', 3 'I-NP'; choose one by its number$"),
        ("word pos ner\nEU NNP B-ORG\n", "chunk", r"or by its name \(word, pos, ner\)"),
    ):
        with pytest.raises(DataError, match=f"label_column: .*{message}"):
            read_conll(tmp_path, text, label)
    assert read_conll(tmp_path, "EU B-ORG\n", "ner_tags") == [(["EU"], ["B-ORG"])]  # it has one
    for header in ("Token\tPOS\tner_tags\n", "word\tpos\tner_tags\n\n"):
        for label, tag in (("label", "B-ORG"), ("ner_tags", "B-ORG"), ("pos", "NNP")):
            assert read_conll(tmp_path, header + "EU\tNNP\tB-ORG\n", label) == [(["EU"], [tag])]


# ---- files that expand


def test_decompression_and_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "FREE_BYTES", 1 << 20)
    line = b'{"text": "' + b"a" * 1000 + b'"}\n'
    for name, content in (("a.jsonl", line * 5000), ("b.txt", b"word " * 10**6), ("c.json", b"[" + b" " * 5 * 10**6)):
        for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
            path = write(tmp_path / f"{name}{suffix}", compress(content))
            with pytest.raises(DataError, match=f"{name}{suffix} expands to more than 200 times its size"):
                list(readers.read_documents(sources.file_source(str(path))))
    table = pa.table({"text": pa.array(["a" * 1000] * 5000)})
    parquet.write_table(table, tmp_path / "d.parquet", use_dictionary=False, compression="zstd")
    with pytest.raises(DataError, match=r"d.parquet expands to more than 200 times"):
        texts(tmp_path / "d.parquet")
    parquet.write_table(table, tmp_path / "e.parquet", compression="none")  # one value in a dictionary for all rows
    with pytest.raises(DataError, match=r"e.parquet expands to more than 200 times"):
        texts(tmp_path / "e.parquet")
    monkeypatch.setattr(discovery, "MAX_LINE_CHARS", 1000)
    for name in ("f.jsonl", "f.csv", "f.tsv", "f.txt"):
        write(tmp_path / name, "text\n" * ("json" not in name) + "x" * 2000)
        with pytest.raises(DataError, match=f"{name} line [12] has more than 1,000 characters; .*MAX_LINE_CHARS"):
            texts(tmp_path / name, document="line")
    write(tmp_path / "g.json", '[{"text": "' + "x" * 3 * (1 << 20) + '"}]')
    with pytest.raises(DataError, match="g.json object 1 has more than 1,000 characters"):
        texts(tmp_path / "g.json")


def test_numbers_of_too_many_digits_are_one_line(tmp_path):
    row = '{"text": "a", "n": ' + "9" * 5000 + "}"
    for name, content in (("a.json", f"[{row}]"), ("a.jsonl", row)):
        with pytest.raises(DataError, match=f"{name} (object|line) 1 is not JSON: Exceeds the limit"):
            texts(write(tmp_path / name, content))
