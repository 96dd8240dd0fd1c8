"""Files by URL: found, read, downloaded once and told apart by content, without a trace of their credentials."""

import base64
import gzip
import json
from contextlib import contextmanager
from hashlib import md5
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from conftest import train
from hub_server import Handler, running

from hf_myllm.data import corpus, readers, remote, sources, tokenizer
from hf_myllm.errors import DataError, hide_secrets
from hf_myllm.recipe import Recipe

TEXTS = [f"the {name} is here, and the {name} was there before.\n" * 9 for name in ("cat", "dog", "king", "house")]


class _Handler(Handler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.server.requests.append((self.command, path))
        if self.server.user and self.headers.get("Authorization") != f"Basic {self.server.user}":
            self.answer(401, b"")
            return
        path = self.path if self.path in self.server.files else path
        if path not in self.server.files:
            names = [name for name in self.server.files if name.startswith(path)]
            page = "".join(f'<a href="{name}">{name}</a>' for name in names).encode()
            self.answer(200 if names else 404, page, Content_Type="text/html")
            return
        data = self.server.files[path]
        tag = {"ETag": f'"{md5(data).hexdigest()}"'} if self.server.has_tags else {}
        tag = tag or {"Last-Modified": "Sat, 28 Nov 2026 10:00:00 GMT"} if query else tag
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
            tag["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.answer(206, data[first : last + 1], Content_Type="application/octet-stream", **tag)
        else:
            self.answer(200, data, Content_Type="application/octet-stream", **tag)

    do_HEAD = do_GET


@contextmanager
def _serve(files, has_tags=True, user=None):
    with running(_Handler) as server:
        server.files, server.has_tags, server.requests = files, has_tags, []
        server.user = base64.b64encode(user.encode()).decode() if user else None
        yield server, f"127.0.0.1:{server.server_port}"


@pytest.fixture
def memory(monkeypatch):
    """The file system of fsspec in memory, with texts in several formats."""
    system = fsspec.filesystem("memory")
    for number, text in enumerate(TEXTS):
        system.pipe(f"/books/{number}.txt", text.encode())
    system.pipe("/books/.hidden.txt", b"hidden")
    system.pipe("/books/notes.md", b"notes")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    system.pipe("/rows/a.jsonl.gz", gzip.compress(lines.encode()))
    system.pipe("/ids/a.bin", np.arange(100, dtype="<u2").tobytes())
    yield system
    system.rm("/", recursive=True)


def forget():
    """Forget what another process would not know."""
    remote._infos.clear()
    remote._copies.clear()


def read(spec, **options):
    return [text for text, _ in readers.read_documents(sources.file_source(spec, **options))]


def test_a_url_is_a_file_a_folder_or_a_glob(memory):
    for spec in ("memory://books", "memory://books/*.txt", [f"memory://books/{number}.txt" for number in range(4)]):
        assert read(spec) == TEXTS, spec
    assert read("memory://books/notes.md") == ["notes"]
    assert read("memory://rows/*") == TEXTS
    tokens, _, _ = corpus.load_tokens(sources.file_source("memory://ids/a.bin"), None)
    assert tokens.read(0, 100).tolist() == list(range(100))


def test_a_source_counts_by_the_content_of_its_remote_files(memory):
    first = sources.source_key(sources.file_source("memory://books"))
    assert sources.source_key(sources.file_source("memory://books")) == first
    memory.pipe("/books/1.txt", b"something else")
    changed = sources.file_source("memory://books")
    assert sources.source_key(changed) != first
    assert read("memory://books")[1] == "something else"


def test_a_file_url_is_the_path(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    assert sources.file_source(f"file://{tmp_path}/a.txt").files == (str(tmp_path / "a.txt"),)
    assert read([f"file://{tmp_path}/*.txt"]) == ["a text"]


def test_an_error_while_a_file_is_read_names_its_url(memory, monkeypatch):
    def disconnected(*_):
        raise ConnectionError("Server Disconnected")

    forget()
    monkeypatch.setattr(remote, "xopen", lambda *_: SimpleNamespace(read=disconnected))
    with pytest.raises(DataError, match="memory://books/1.txt cannot be read: Server Disconnected; check the URL"):
        remote.open_file("memory://books/1.txt").read(3)


@pytest.mark.parametrize("has_tags", [True, False])
def test_a_file_is_downloaded_once_where_the_server_tells_its_content(has_tags):
    with _serve({f"/{has_tags}/a.txt": TEXTS[0].encode()}, has_tags) as (server, host):
        url, copies = f"http://{host}/{has_tags}/a.txt", []
        for _ in range(2):
            forget()
            assert read(url) == TEXTS[:1]
            copies.append(remote.local_path(url))
        downloads = [request for request in server.requests if request[0] == "GET"]
        assert len(downloads) == (3 if has_tags else 4)  # twice the beginning, to see what it is
        assert copies[0] == copies[1]
        server.files[f"/{has_tags}/a.txt"] = TEXTS[1].encode()
        assert read(url) == TEXTS[1:2]


def test_a_folder_of_a_web_server_is_read_by_its_links():
    with _serve({f"/data/{number}.txt": text.encode() for number, text in enumerate(TEXTS)}) as (_, host):
        assert read(f"http://{host}/data/") == read(f"http://{host}/data/*.txt") == TEXTS


def test_urls_that_differ_in_their_query_are_two_files():
    texts = {f"/rows?page={number}": text.encode()[:200] for number, text in enumerate(TEXTS)}
    with _serve(texts, has_tags=False) as (_, host):
        for url, text in texts.items():
            assert read(f"http://{host}{url}") == [text.decode()]
        with pytest.raises(DataError, match="it is a web page, not a data file; of a folder, add /: http.*/row/"):
            sources.file_source(f"http://{host}/row")


def test_a_streamed_source_is_not_downloaded(memory, monkeypatch, tmp_path):
    from dataclasses import replace

    source = replace(sources.file_source("memory://books"), is_streamed=True)
    monkeypatch.setattr(remote, "local_path", None)
    assert [text for text, _ in readers.read_documents(source)] == TEXTS


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("memory://nothing", "memory://nothing cannot be read: it does not exist; check the URL"),
        ("memory://books/*.csv", r"memory://books/\*.csv: no file matches; correct it"),
        ("s3://bucket/a.txt", "s3://bucket/a.txt: .*s3fs.*; install that package"),
        ("what://bucket/a.txt", "what://bucket/a.txt cannot be read: Protocol not known: what"),
        ("http://me:secret@127.0.0.1:9/a.txt?sig=secret", r"http://\*\*\*@127.0.0.1:9/a.txt\?\*\*\* cannot be read: "),
        ("https://***@host/a.txt", "were not stored; give the whole URL again"),
    ],
)
def test_what_cannot_be_read_is_one_line(memory, spec, message):
    with pytest.raises(DataError, match=message) as raised:
        sources.file_source(spec)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_credentials_of_a_url_are_neither_shown_nor_stored(tiny, capsys):
    files = {"/train.txt": "".join(TEXTS).encode(), "/val.txt": b"a king is here, and the cat was there too.\n" * 9}
    with _serve(files, user="me:secret1") as (_, host):
        train_file, val_file = (f"http://me:secret1@{host}/{name}.txt?token=secret2" for name in ("train", "val"))
        flags = tiny(train_file=train_file, val_file=val_file, max_steps=2, start_context=None, eval_freq=1)
        assert train(*flags, "--dry_run") == 0
        assert train(*flags) == 0
        run_dir = tiny["save_model"]
        assert train(run_dir / "recipe.yaml", "--resume", "--max_steps", "3", "--allow_changed") != 0
        shown = "".join(capsys.readouterr())
        assert "were not stored; give the whole URL again" in shown
        assert "://***@127.0.0.1" in shown
        assert train(run_dir / "recipe.yaml", "--resume", "--train_file", train_file, "--val_file", val_file) == 0
    stored = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    for secret in ("secret1", "secret2"):
        assert secret not in shown
        assert secret.encode() not in stored
    assert Recipe.load(run_dir / "recipe.yaml").data.train_file.endswith("/train.txt?***")


def test_secrets_are_hidden_in_a_sentence():
    text = "cannot read 'https://a:b@c.d/e?f=g;h=1,2', or s3://x/y?z=1; give another"
    assert hide_secrets(text) == "cannot read 'https://***@c.d/e?***', or s3://x/y?***; give another"


def test_a_tokenizer_may_be_trained_on_remote_text(memory):
    assert len(tokenizer.train_bpe(readers.SourceTexts([sources.file_source("memory://books")]), 300)) <= 300
