"""`hf-myllm prepare` trains the tokenizer and tokenizes the data ahead of a launch."""

import pytest
from conftest import run_cli, run_command, train

from hf_myllm.data import corpus, tokenizer


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_prepared_data_are_not_prepared_again(tiny, tiny_bert, capsys, monkeypatch, family):
    flags = tiny(max_steps=2) if family == "gpt" else tiny_bert(max_steps=2, task="mlm_nsp")
    flags += ["--text_column", family]  # no other test uses this cache entry
    result = run_command(*flags, module="hf_myllm.prepare")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tokens are prepared") == 2

    def forbid(*arguments):
        raise AssertionError("the data were prepared again")

    monkeypatch.setattr(corpus, "write_shards", forbid)
    monkeypatch.setitem(tokenizer.TRAINERS, "bpe", forbid)
    monkeypatch.setitem(tokenizer.TRAINERS, "wordpiece", forbid)
    assert train(*flags) == 0
    out = capsys.readouterr().out
    for line in [line for line in result.stdout.splitlines() if line.endswith("tokens are prepared")]:
        assert f"{line.split()[1]} tokens" in out


def test_a_mistake_is_one_line(tiny, tmp_path):
    (tmp_path / "ids.bin").write_bytes(b"\1\0" * 500)
    result = run_command("--model", "bert", "--train_file", tmp_path / "ids.bin", module="hf_myllm.prepare")
    assert result.returncode == 2
    assert "needs the data's tokenizer" in result.stderr
    result = run_command(*tiny(train_file=tmp_path / "nope.txt"), module="hf_myllm.prepare")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [line for line in result.stderr.splitlines() if "nope.txt" in line]


def test_shards_are_written_neither_among_other_files_nor_over_them(tiny, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Anna likes the cat. " * 400)
    (tmp_path / "notes").write_text("mine")
    flags = tiny(train_file=tmp_path / "texts")
    for arguments, problem in (
        ([*flags, "--to", tmp_path / "texts"], "is in the folder of the text"),
        ([*flags, "--to", tmp_path / "texts" / "sub"], "is in the folder of the text"),
        ([*flags, "--to", tmp_path], "holds files of another origin (notes) and no token shards; name another folder"),
        ([*flags, "--to", tmp_path / "notes"], "is a file; name a folder"),
        ([*flags, "--to", ""], "--to: it is empty; give a folder or a URL"),
        ([tmp_path / "index.json", "--to", tmp_path / "new", *flags], "checks an index and takes no options"),
    ):
        assert run_cli("prepare", *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert problem in error
        assert "\n" not in error
    assert {path.name for path in tmp_path.rglob("*")} == {"texts", "a.txt", "notes"}
