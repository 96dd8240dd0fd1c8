"""Push a run's model with its model card to the Hugging Face Hub, as one commit.

`hf-myllm push RUN user/name` pushes once. A run with `push_to_hub: user/name` pushes each checkpoint in a separate
process, so that a slow or failing network does not affect the training. Before anything is uploaded, [`check`] compares
the model in stock transformers with our class: once per run, and again if anything but the weights' values changes.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .. import checkpoint
from ..errors import HUB_TOKEN, HubError, first_line, hide_secrets
from ..files import link_or_copy, regular_files
from ..launcher import exit_with_parent
from ..models.export import SHARD
from ..terminal import join_command
from .card import is_edited, make_card, step_of
from .stock_check import check, layout, single_process_environment

# The files of a model and its tokenizer, which are uploaded. Nothing else in the folder is.
SHARED = {
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "model_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "README.md", "loss.png"),
}
RETRY_DELAYS = (1, 4, 15)  # seconds
_TEMPORARY_ERRORS = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes that are worth another try
_TIMEOUT, _BYTES_PER_SECOND = 900, 5e5  # an upload may take 15 minutes, and more for a large model
_PARENT = "HF_MYLLM_PARENT"  # environment variable of a background push: the process id of the run
_CHECKED = "HF_MYLLM_CHECKED"  # likewise: the [`layout`] that an earlier push of the run has checked


def check_target(repo):
    """Check before the training that a repository can be pushed to.

    Raises:
        HubError: `repo` is not a repository name, or no user is logged in.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no user")
    except HFValidationError:
        raise HubError(f"push_to_hub: {repo!r} is not a repository; give user/name") from None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise HubError(f"push_to_hub: {repo} cannot be reached: HF_HUB_OFFLINE is set; unset it or drop push_to_hub")
    if huggingface_hub.get_token() is None:
        raise HubError(f"push_to_hub: no user is logged in to push to {repo}; run `hf auth login` or set HF_TOKEN")


def push(run, repo, private=False, revision=None):
    """Push the model of a run's folder, or of one of its checkpoints, with its card; return the URL of the commit.

    Args:
        repo: user/name; created if it does not exist, as a private repository with `private`.
        revision: the branch; default: main.
    Raises:
        HubError: the folder holds no valid model, stock transformers does not reproduce it, or the Hub refuses it.
    """
    folder = checkpoint.find_model(run)
    check_target(repo)
    if (folder / "trainer_state").is_dir() and (problem := checkpoint.find_corruption(folder)):
        raise HubError(f"{folder}: it is damaged and was not pushed: {problem}")
    if os.environ.get(_CHECKED) != layout(folder):
        check(folder)
    step = step_of(folder)
    message = f"Model of {checkpoint.find_run_dir(folder.resolve()).name}" + (f" after step {step}" if step else "")
    api = HfApi()
    with tempfile.TemporaryDirectory() as staging:
        staging = Path(staging)
        _stage(folder, staging, repo, revision)

        def upload():
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise HubError(
                    f"{repo}: it exists and is public; make it private on the Hub, or push without --private"
                )
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            outdated = [name for name in api.list_repo_files(repo, revision=revision) if _is_shared(name)]
            if "README.md" in outdated:
                path = api.hf_hub_download(repo, "README.md", revision=revision, local_dir=staging / "remote")
                if is_edited(Path(path)):  # edited on the Hub
                    outdated.remove("README.md")
                    (staging / "README.md").unlink(missing_ok=True)
            return api.upload_folder(
                repo_id=repo,
                folder_path=staging,
                revision=revision,
                commit_message=message,
                allow_patterns=[path.name for path in staging.iterdir() if path.is_file()],
                delete_patterns=outdated,  # the shards or the adapter of an earlier model
            )

        return hide_secrets(_retry(upload, repo).commit_url)


def _is_shared(name):
    return name in SHARED or SHARD.fullmatch(name) is not None


def _stage(folder, staging, repo, revision):
    """Link or copy the files to upload into another folder, with the run's card and plot.

    Raises:
        HubError: a file contains what looks like an access token.
    """
    run_dir = checkpoint.find_run_dir(folder.resolve())
    for path in regular_files(folder):
        if _is_shared(path.name):
            link_or_copy(path, staging / path.name)
    for path in regular_files(run_dir) if folder != run_dir else ():
        if path.name in ("README.md", "loss.png"):
            (staging / path.name).unlink(missing_ok=True)
            link_or_copy(path, staging / path.name)
    card = staging / "README.md"
    if not is_edited(card):
        card.unlink(missing_ok=True)
        text = make_card(folder, repo, revision, has_plot=(staging / "loss.png").is_file())
        card.write_text(text, encoding="utf-8")
    for path in staging.iterdir():
        if path.suffix != ".safetensors" and HUB_TOKEN.search(path.read_text(encoding="utf-8", errors="ignore")):
            raise HubError(f"{folder}: {path.name} contains what looks like an access token; nothing was pushed")


def _retry(upload, repo):
    """Return what `upload()` returns; try again after errors that may be temporary."""
    for delay in (*RETRY_DELAYS, None):
        try:
            return upload()
        except HubError:
            raise
        except Exception as error:
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            responses = [cause.response for cause in causes if isinstance(cause, HfHubHTTPError)]
            is_permanent = isinstance(error, ValueError) or any(
                response is not None and response.status_code not in _TEMPORARY_ERRORS for response in responses
            )
            if delay is None or is_permanent:
                problem = ": ".join(dict.fromkeys(first_line(cause)[:200] for cause in (error, causes[-1])))
                problem = re.sub(r"\?\S+", "", problem)  # the query of a URL may be a signature
                attempts = "" if is_permanent else f" ({len(RETRY_DELAYS) + 1} attempts)"
                raise HubError(f"{repo}: the push failed: {problem}{attempts}") from None
            time.sleep(delay)


class BackgroundUploads:
    """Pushes the checkpoints of a run, each in a process of its own, one at a time; see [`push`] for the arguments."""

    def __init__(self, run_dir, repo, private=False, revision=None):
        self.run_dir, self.repo = Path(run_dir), repo
        self.options = ["--private"] * private + (["--revision", revision] if revision else [])
        self.process, self.staged, self.problem = None, None, None
        self.layout = self.checked = ""  # of the model that is pushed, and of the last one that was checked

    def begin(self, step):
        """Push the checkpoint of a step, unless the previous push still runs: a later checkpoint replaces it."""
        if self.process is not None and self.process.poll() is None:
            return
        self._collect()
        try:
            self.staged = checkpoint.stage(self.run_dir / f"checkpoint-{step}")
            self._start(self.staged)
        except OSError as error:
            self.problem = f"the upload could not be started: {error}"

    def finish(self, must_stop=lambda: False):
        """Push the model at the run's root and wait for it. Cancels an earlier push that still runs.

        Args:
            must_stop: called repeatedly; True cancels the push.
        Returns:
            (a line for the user, whether the model was pushed).
        """
        self.stop()
        size = sum(path.stat().st_size for path in self.run_dir.glob("*.safetensors"))
        deadline = time.monotonic() + _TIMEOUT + size / _BYTES_PER_SECOND
        try:
            self._start(self.run_dir)
        except OSError as error:
            return f"not pushed  {error}; {self._advice()}", False
        while self.process.poll() is None:
            if must_stop() or time.monotonic() > deadline:
                return self.stop(), False
            time.sleep(0.1)
        self._collect()
        if self.problem:
            return f"not pushed  {self.problem}; {self._advice()}", False
        return f"pushed      {self.run_dir} to {self.repo}", True

    def stop(self):
        """Cancel the push that runs. Returns a line for the user, or None if none was running."""
        is_running = self.process is not None and self.process.poll() is None
        if is_running:
            # lets it remove its temporary files; Windows has a signal for a group of processes only
            self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._collect()
        return f"not pushed  the upload was cancelled; {self._advice()}" if is_running else None

    def _advice(self):
        command = ["hf-myllm", "push", str(self.run_dir), self.repo, *self.options]
        return f"push later with {join_command(command)}"

    def _start(self, folder):
        self.layout = layout(folder)
        # In its own session, so that Ctrl-C in the terminal reaches only the run, which then cancels the push.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_myllm.cli", "push", str(folder), self.repo, *self.options],
            env=single_process_environment() | {_PARENT: str(os.getpid()), _CHECKED: self.checked},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def _collect(self):
        """Wait for the process, keep its error message, and remove the staged files."""
        if self.process is not None:
            output = self.process.communicate()[0].strip().splitlines()
            code = self.process.returncode
            self.problem = (output or [f"exit code {code}"])[-1].removeprefix("error: ") if code else None
            self.checked = self.checked if code else self.layout
        if self.staged is not None:
            shutil.rmtree(self.staged, ignore_errors=True)
        self.process = self.staged = None


def end_with_run():
    """End this process with its run if it is a background push: a resumed run may have pushed a newer model by then.

    Raises:
        HubError: the run has already ended.
    """
    if os.environ.get(_PARENT) and hasattr(signal, "SIGBREAK"):  # how a run on Windows cancels it
        signal.signal(signal.SIGBREAK, signal.default_int_handler)
    if (parent := os.environ.get(_PARENT)) and not exit_with_parent(int(parent)):
        raise HubError("the run has ended")
