"""Models and tokenizers of the Hub at a revision: `id@revision`, where a revision is a branch, a tag or a commit."""

import functools
import os
import re

from huggingface_hub import snapshot_download

from ..errors import ModelError, first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")  # configuration and tokenizer
_WEIGHTS = ("*.safetensors", "*.bin")
_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]?$")


def resolve(name, with_weights=True):
    """Return the folder with the files of a Hub model at a revision, downloaded or from the cache.

    A name that is a path here or has no revision stays as it is.

    Raises:
        ModelError: the revision cannot be found, or is that of a local folder.
    """
    repo, at, revision = str(name).rpartition("@")
    if not at or os.path.exists(name):
        return name
    if os.path.exists(repo):
        raise ModelError(f"{name}: {repo} is a path here, which has no revisions; leave out @{revision}")
    return _download(repo, revision, with_weights) if _ID.fullmatch(repo) and revision else name


@functools.cache  # a run uses one commit, also if the branch moves on
def _download(repo, revision, with_weights):
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_SMALL)
        for pattern in _WEIGHTS if with_weights else ():
            folder = snapshot_download(repo, revision=os.path.basename(folder), allow_patterns=pattern)
            if any(name.endswith(pattern[1:]) for name in os.listdir(folder)):
                break
        return folder
    except Exception as error:  # errors of the network and of the library have many classes
        raise ModelError(
            f"{repo}@{revision}: the Hugging Face Hub did not give this revision, and the cache does not hold it "
            f"({first_line(error)[:200]}); correct the id or the revision"
        ) from None


def find_id(folder):
    """Return (Hub id, commit) of a folder that [`resolve`] returned; (None, None) of any other."""
    match = _SNAPSHOT.search(str(folder))
    return (match["id"].replace("--", "/"), match["commit"]) if match else (None, None)
