"""Sharing a run on the Hugging Face Hub: `python -m hf_myllm.hub push RUN user/name [--private] [--revision BRANCH]`.

Before anything leaves, stock transformers loads the model in a process that knows nothing of this package, and must say
the same as our own class does. What leaves is the model, its tokenizer, its curves and its card, as one commit.

A run with `push_to_hub: user/name` does the same for each checkpoint, in a process of its own, so that neither a slow
network nor a failing one is felt by the training.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file, save_file

from .. import checkpoint
from ..distributed import exit_with_parent, silence_libraries
from ..errors import InputError, Parser, exit_on_input_error, first_line
from ..files import write_text_atomically
from ..models import FAMILIES, find_family, lora
from ..reporting.metrics_log import read_metrics, read_run

# What is shared of a folder: the files of a model and its tokenizer, and nothing else that may lie there.
SHARED = {
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "model_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "README.md", "loss.png"),
}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
WAITS = (1, 4, 15)  # seconds before another try
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may answer otherwise later
_OURS = "<!-- written by hf_myllm: without this line, what you write here stays -->"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_PATIENCE, _SLOWEST = 900, 5e5  # an upload is given up after so many seconds, and one for so many bytes
_PARENT = "HF_MYLLM_PARENT"  # in the environment of an upload: the process of the run
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")

# Run by itself, so that nothing of this package is there: the model as anybody loads it.
_STOCK = """
import os, sys, torch, transformers
from safetensors.torch import load_file, save_file
folder, architecture, base, config, inputs, outputs = sys.argv[1:]
transformers.utils.logging.set_verbosity_error()
model_class = getattr(transformers, architecture)
if base:
    from peft import PeftModel
    config = transformers.AutoConfig.from_pretrained(config, trust_remote_code=False)
    model = PeftModel.from_pretrained(model_class.from_pretrained(base, config=config, dtype=torch.float32), folder)
else:
    model, found = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if lacking := sorted(found["missing_keys"]) + sorted(found["mismatched_keys"]):
        sys.exit(f"the file has no {lacking[0]}" + f" and lacks {len(lacking) - 1} more" * (len(lacking) > 1))
with torch.no_grad():
    found = model.eval()(**load_file(inputs)).to_tuple()
save_file({str(n): one.contiguous() for n, one in enumerate(found) if isinstance(one, torch.Tensor)}, outputs)
if any(os.path.exists(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer_config.json")):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids, room = tokenizer("Once upon a time, 1 + 1 = 2.")["input_ids"], model.config.vocab_size
    if not ids or len(tokenizer) > room:
        sys.exit(f"its tokenizer has {len(tokenizer)} tokens, and the model embeddings for {room}")
assert not any(name.split(".")[0] == "hf_myllm" for name in sys.modules)
"""


def check_target(repo):
    """Refuse what cannot be pushed to before anything is trained.

    Raises:
        InputError: `repo` is no name of a repository, or nobody has logged in.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no user")
    except HFValidationError:
        raise InputError(f"push_to_hub {_TOKEN.sub('hf_...', repo)!r}: give user/name") from None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError(f"push_to_hub {repo}: HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out")
    if huggingface_hub.get_token() is None:
        raise InputError(f"push_to_hub {repo}: nobody is logged in; call `hf auth login`, or set HF_TOKEN")


# ---- what leaves, and whether it may


def push(run, repo, private=False, revision=None):
    """Push the model of a run's folder, or of one of its checkpoints, with its card.

    Returns:
        the commit's address.
    Raises:
        InputError: there is no model, it is not what stock transformers makes of it, or the Hub does not take it.
    """
    check_target(repo)
    folder = checkpoint.find_model(run)
    if (folder / "trainer_state").is_dir() and (problem := checkpoint.find_corruption(folder)):
        raise InputError(f"{folder} is damaged, and was not pushed: {problem}")
    check(folder)
    api = HfApi()
    with tempfile.TemporaryDirectory() as aside:
        aside = Path(aside)
        _gather(folder, aside, repo, revision)

        def upload():
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise InputError(f"{repo} is there already, and public: make it private on the Hub, or push without")
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            there = [name for name in api.list_repo_files(repo, revision=revision) if _is_shared(name)]
            if "README.md" in there:  # somebody may have edited it there
                path = api.hf_hub_download(repo, "README.md", revision=revision, local_dir=aside / "theirs")
                if is_edited(Path(path)):
                    there.remove("README.md")
                    (aside / "README.md").unlink(missing_ok=True)
            return api.upload_folder(
                repo_id=repo,
                folder_path=aside,
                revision=revision,
                commit_message=f"Model of {_named(folder)}",
                allow_patterns=[path.name for path in aside.iterdir() if path.is_file()],
                delete_patterns=there,  # of another model that was there: more shards, or an adapter
            )

        return _with_retries(upload, repo).commit_url


def _is_shared(name):
    return name in SHARED or _SHARD.fullmatch(name) is not None


def _gather(folder, aside, repo, revision):
    """Put what is shared of a folder into another."""
    home = home_of(folder)
    for path in folder.iterdir():
        if _is_shared(path.name) and path.is_file() and not path.is_symlink():
            checkpoint.link_or_copy(path, aside / path.name)
    readme, curves = aside / "README.md", aside / "loss.png"
    for name in ("README.md", "loss.png"):  # the run's, of a checkpoint too
        if folder != home and (home / name).is_file():
            (aside / name).unlink(missing_ok=True)
            checkpoint.link_or_copy(home / name, aside / name)
    if not is_edited(readme):
        readme.unlink(missing_ok=True)
        readme.write_text(card(folder, repo, revision, has_curves=curves.is_file()), encoding="utf-8")
    for path in aside.iterdir():
        if path.suffix != ".safetensors" and _TOKEN.search(path.read_text(encoding="utf-8", errors="ignore")):
            raise InputError(f"{path.name} of {folder} holds what looks like a token of the Hub: nothing was pushed")


def home_of(folder):
    """The run's folder, of itself or of one of its checkpoints."""
    folder = Path(folder).resolve()
    return folder if (folder / "run.json").is_file() or not folder.name.startswith("checkpoint-") else folder.parent


def _named(folder):
    step = _step_of(folder)
    return home_of(folder).name + (f" after step {step}" if step else "")


def _step_of(folder):
    match = re.match(r"checkpoint-(\d+)", Path(folder).name)
    return int(match[1]) if match else None


def check(folder):
    """Hold what stock transformers makes of a folder, in a process of its own, to what our class makes of it.

    Raises:
        InputError: it cannot load it, or says something else.
    """
    base, where = lora.base_of(folder), lora.config_of(folder)
    if base and Path(base).exists():
        raise InputError(
            f"{folder} is an adapter to the model in {base}, which nobody else has: train with merge_lora, or from a "
            "model of the Hub"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        architecture = (config.architectures or ["none"])[0]
        family = find_family(config.model_type)
        if family is None:
            raise ValueError(f"it is a {config.model_type}, and not one of {', '.join(FAMILIES)}")
        ours = {family.config.stock_name(one.__name__): one for one in family.tasks.values()}[architecture]
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise InputError(f"{folder} holds no model that can be pushed: {first_line(error)[:200]}") from None
    draw = torch.Generator().manual_seed(0)
    shape = (2, min(64, config.max_position_embeddings))
    inputs = {"input_ids": torch.randint(config.vocab_size, shape, generator=draw)}
    inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    with tempfile.TemporaryDirectory() as aside:
        given, found = f"{aside}/inputs", f"{aside}/outputs"
        save_file(inputs, given)
        arguments = [str(Path(folder).resolve()), architecture, base or "", str(where), given, found]
        process = subprocess.run(
            [sys.executable, "-c", _STOCK, *arguments], cwd=aside, env=_environment(), capture_output=True, text=True
        )
        if process.returncode:
            said = (process.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise InputError(f"stock transformers cannot load {folder}, and nothing was pushed: {said[:300]}")
        theirs = load_file(found)
    model = ours.from_pretrained(base or folder, config=family.config.from_pretrained(where), dtype=torch.float32)
    model = (lora.load(model, folder) if base else model).eval()
    with torch.no_grad():
        own = [one for one in model(**inputs).to_tuple() if isinstance(one, torch.Tensor)]
    for number, one in enumerate(own):
        difference = (one - theirs[str(number)]).abs().max().item() if theirs[str(number)].shape == one.shape else None
        # fp32 on both sides; a GPT's GELU is one operation here and eight there, which differ in the last digits
        if difference is None or not difference <= 1e-4 * max(1.0, one.abs().max().item()):
            raise InputError(f"stock transformers makes another model of {folder} (logits differ by {difference})")


def _environment():
    """For a process of its own: not one of the launch, and not on the GPU that is being trained on."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


def _with_retries(work, repo):
    for wait in (*WAITS, None):
        try:
            return work()
        except InputError:
            raise
        except Exception as error:
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            answers = [one.response for one in causes if isinstance(one, HfHubHTTPError) and one.response is not None]
            is_final = any(one.status_code not in _PASSING for one in answers) or isinstance(error, ValueError)
            if wait is None or is_final:
                said = ": ".join(dict.fromkeys(first_line(one)[:200] for one in (error, causes[-1])))
                said = _TOKEN.sub("hf_...", re.sub(r"\?\S+", "", said))  # addresses may be signed
                tries = "" if is_final else f" ({len(WAITS) + 1} tries)"
                raise InputError(f"{repo} cannot be pushed to: {said}{tries}") from None
            time.sleep(wait)


# ---- the model card


def write_card(folder):
    """Write RUN/README.md, unless somebody has made it his own."""
    path = Path(folder) / "README.md"
    if not is_edited(path):
        write_text_atomically(path, card(folder, has_curves=(Path(folder) / "loss.png").is_file()))


def is_edited(path):
    return path.is_file() and _OURS not in path.read_text(encoding="utf-8", errors="replace")


_PIPELINES = {
    "CausalLM": "text-generation",
    "MaskedLM": "fill-mask",
    "PreTraining": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
}


def card(folder, repo=None, revision=None, has_curves=False):
    """The model card of a run's folder, or of a checkpoint: what it is, on which data, how, with which result.

    Args:
        repo, revision: what the card calls the model by; default: the run's name.
    Raises:
        InputError: run.json is not as this package writes it.
    """
    folder, home = Path(folder), home_of(folder)
    config, about = lora.read_config(folder), read_run(home)
    try:
        return _TOKEN.sub("hf_...", _card(folder, home, config, about, repo or home.name, revision, has_curves))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"no card can be made of {home}/run.json: {error!r:.200}") from None


def _card(folder, home, config, about, name, revision, has_curves):
    kind = config["architectures"][0].partition("For")[2] or "CausalLM"
    task, step = _PIPELINES.get(kind), _step_of(folder) or about.get("published_step")
    figures, judged = _figures(home, step)
    base, length = about.get("base_model"), config.get("n_positions") or config.get("max_position_embeddings")
    sources = [source for part in about.get("data", {}).values() for source in part["sources"]]
    licence = about.get("license")
    is_known = licence is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence)
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        license=licence if is_known else "other",
        license_name=None if is_known else re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-"),
        language=about.get("language"),
        base_model=base,
        datasets=sorted({source["name"] for source in sources if source["is_hub"]}) or None,
        library_name="peft" if lora.base_of(folder) else "transformers",
        pipeline_tag=task,
        tags=["hf_myllm" if about else "safetensors", config["model_type"]],
        eval_results=_results(figures, task, about) if judged == step else None,  # what is of this very model
    )
    parts = [f"---\n{data.to_yaml()}\n---\n", f"# {name.rpartition('/')[2]}\n", _opening(config, about, base, step)]
    parts.append(f"## Use\n\n```python\n{_usage(folder, kind, name, revision, length)}\n```\n")
    if figures:
        rows = [f"| {_plain(key)} | {_figure(value)} |" for key, value in figures.items()]
        if about.get("unigram_loss") is not None:
            rows.append(f"| loss of knowing only how often tokens occur | {about['unigram_loss']:.4f} |")
        loss = f"The loss is in {about['unit']}. " if "unit" in about else ""
        if "val_nsp_loss" in figures:
            loss += "It is that of both questions together; the perplexity is of the masked tokens alone. "
        other = "" if judged == step or step is None else f", which is not quite this model's step {step:,}"
        parts.append(f"## Results\n\n{loss}On the validation data below, after step {judged:,}{other}:\n")
        parts.append("| | |\n|---|---|\n" + "\n".join(rows) + "\n")
    if has_curves:
        parts.append("![training and validation loss over the steps](loss.png)\n")
    if about.get("data"):
        parts.append(f"## Data\n\n{_data_table(about)}\n")
    if about.get("launches"):
        recipe = yaml.safe_dump(about.get("recipe", {}), sort_keys=False, allow_unicode=True)
        parts.append(f"## Training\n\n{_training(about, step)}\n\n```yaml\n{recipe}```\n")
    parts.append(f"## Limits\n\n{_limits(about, task, step, length, bool(figures))}\n\n{_OURS}\n")
    return "\n".join(parts)


def _opening(config, about, base, step):
    """What it is, in a sentence or two."""
    family = find_family(config["model_type"])
    family = f"{family.display_name if family else config['model_type']} ({config['architectures'][0]})"
    if not about:
        return f"A {family}.\n"
    came = f"fine-tuned from [{base}](https://huggingface.co/{base})" if base else "trained from nothing"
    if not base and about["init_from"] != "scratch":
        came = "trained from another model"
    after = f"; this is the model after step {step:,}" if step else ""
    what = f"A {family} of {about['parameters']:,} parameters"
    if about.get("lora_r"):
        what = f"An adapter (LoRA of rank {about['lora_r']}, {about['trained_parameters']:,} parameters) to a {family}"
    said = f"{what}, {came} with hf_myllm{after}.\n"
    if labels := about.get("labels"):
        said += f"\nIt tells apart: {', '.join(f'`{label}`' for label in labels)}.\n"
    return said


def _figures(home, step):
    """What the last evaluation up to a step has found, and after which step; None: up to the last."""
    lines = [line for line in read_metrics(home) if "train_loss" in line and (step is None or line["step"] <= step)]
    if not lines:
        return {}, None
    last = lines[-1]
    found = {key: value for key, value in last.items() if key.startswith("val_") and isinstance(value, (int, float))}
    return found, last["step"]


def _plain(key):
    return "tokens judged" if key == "val_tokens" else key.removeprefix("val_").replace("_", " ")


def _figure(value):
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _results(figures, task, about):
    """The figures as the Hub reads them (model-index)."""
    sources = about.get("data", {}).get("validation", {}).get("sources", [])
    ids = [source["name"] for source in sources if source["is_hub"]]
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=ids[0] if ids else "own",
            dataset_name=", ".join(source["name"] for source in sources) or "validation data",
            metric_type=key.removeprefix("val_"),
            metric_value=round(value, 6),
        )
        for key, value in figures.items()
        if key != "val_tokens"
    ] or None


def _usage(folder, kind, name, revision, length):
    """Four lines of Python, or fewer."""
    task, more = _PIPELINES.get(kind), f', revision="{revision}"' if revision else ""
    has_tokenizer = any(Path(folder).glob("tokenizer*.json"))
    if lora.base_of(folder) or not has_tokenizer:
        line = lora.how_to_load(folder, name)
        line = line[:-1] + more + ")"
        classes = sorted(set(re.findall(r"(?:Auto)?[A-Z]\w+(?=\.from_pretrained)", line)))
        imports = [f"from {'peft' if 'Peft' in one else 'transformers'} import {one}" for one in classes]
        return "\n".join([*imports, f"model = {line}"])
    if task == "question-answering":  # transformers 5 has no pipeline for it
        return (
            "from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{more})\n'
            f'model = AutoModelForQuestionAnswering.from_pretrained("{name}"{more})\n'
            'output = model(**tokenizer("A question?", "The text that may answer it.", return_tensors="pt"))'
        )
    lines = ["from transformers import pipeline", f'model = pipeline("{task}", model="{name}"{more})']
    if task == "text-generation":  # stock GPT-2 fails beyond its positions
        some = min(50, length // 2) if length else 50
        has_chats = "chat_template" in (Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8")
        if has_chats or (Path(folder) / "chat_template.jinja").is_file():
            lines.append('chat = [{"role": "user", "content": "What is a cat?"}]')
            return "\n".join([*lines, f'print(model(chat, max_new_tokens={some})[0]["generated_text"][-1]["content"])'])
        return "\n".join([*lines, f'print(model("Once upon a time", max_new_tokens={some})[0]["generated_text"])'])
    if task == "fill-mask":
        return "\n".join([*lines, 'print(model("Once upon a [MASK].")[0]["token_str"])'])
    return "\n".join([*lines, 'print(model("A text to judge."))'])


def _data_table(about):
    rows = ["| | from | documents | tokens | rows |", "|---|---|---|---|---|"]
    for part, counts in about["data"].items():
        links = [
            f"[{one['name']}](https://huggingface.co/datasets/{one['name']})" if one["is_hub"] else one["name"]
            for one in counts["sources"]
        ]
        came = f"held out of it: {counts['held_out']}" if "held_out" in counts else ", ".join(links)
        documents = f"{counts['documents']:,}" if counts.get("documents") else ""
        rows.append(f"| {part} | {came} | {documents} | {counts['tokens']:,} | {counts['rows']:,} |")
    return "\n".join(rows)


def _training(about, step):
    last = about["launches"][-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    return (
        f"{step or about['total_steps']:,} steps of at most {about['tokens_per_step']:,} tokens on {last['processes']} "
        f"x {last['device']}, precision {last['precision']}, with {versions}."
    )


def _limits(about, task, step, length, is_judged):
    said = [f"- It reads at most {length:,} tokens."] if length else []
    if (tokens := about.get("data", {}).get("training", {}).get("tokens")) and step:
        read = step * about["tokens_per_step"]
        before = " beside what the model that it started from had learned" * (about["init_from"] != "scratch")
        said.append(
            f"- In {step:,} steps it has read at most {read:,} tokens of the training data above ({read / tokens:.2f} "
            f"times all of it){before}, and has their language, subjects, errors and prejudices."
        )
    if task in ("text-generation", "fill-mask"):
        said.append("- What it says may be false or offensive; nothing was done to make it otherwise.")
    if is_judged:
        said.append("- It was judged on the validation data above, and on nothing else.")
    if not about.get("license"):
        said.append("- No licence was given: ask whoever shares it before you use it.")
    return "\n".join(said)


# ---- while training goes on


class Uploads:
    """The pushes of a run, each a process of its own, one at a time.

    Args:
        folder: the run's.
        repo, private, revision: see [`push`].
    """

    def __init__(self, folder, repo, private=False, revision=None):
        self.folder, self.repo = Path(folder), repo
        self.options = ["--private"] * private + (["--revision", revision] if revision else [])
        self.process, self.aside, self.problem = None, None, None

    def begin(self, step):
        """Push the checkpoint of a step; not while the one before is still on its way: the network is slower than the
        training, and what counts is the last."""
        if self.process is not None and self.process.poll() is None:
            return
        self._end()
        try:
            self.aside = checkpoint.stage(self.folder / f"checkpoint-{step}")
            self._start(self.aside)
        except OSError as error:
            self.problem = f"the upload could not be started: {error}"

    def finish(self, must_stop=lambda: False):
        """Push the run's own model, whatever of before is still on its way.

        Returns:
            what has become of it, and whether it is there.
        """
        self.stop()
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        limit = time.monotonic() + _PATIENCE + size / _SLOWEST
        try:
            self._start(self.folder)
        except OSError as error:
            return f"not pushed  {error}; {self._later()}", False
        while self.process.poll() is None:
            if must_stop() or time.monotonic() > limit:
                return self.stop(), False
            time.sleep(0.1)
        self._end()
        if self.problem:
            return f"not pushed  {self.problem}; {self._later()}", False
        return f"pushed      {self.folder} to {self.repo}, as stock transformers loads it", True

    def stop(self):
        """End what is on its way, and say what is to be done about it; None where nothing was."""
        is_cut_short = self.process is not None and self.process.poll() is None
        if is_cut_short:
            self.process.send_signal(signal.SIGINT)  # lets it clean up
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._end()
        return f"not pushed  the upload was cut short; {self._later()}" if is_cut_short else None

    def _later(self):
        command = ["python", "-m", "hf_myllm.hub", "push", str(self.folder), self.repo, *self.options]
        return f"later: {shlex.join(command)}"

    def _start(self, folder):
        command = [sys.executable, "-m", "hf_myllm.hub", "push", str(folder), self.repo, *self.options]
        # of a session of its own: the terminal's Ctrl-C is for the run, which then ends it
        self.process = subprocess.Popen(
            command,
            env=_environment() | {_PARENT: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _end(self):
        """Learn how the process has ended, and remove what it was given."""
        if self.process is not None:
            said = self.process.communicate()[0].strip().splitlines()
            last = (said or ["it ended without a word"])[-1].removeprefix("error: ")
            self.problem = last if self.process.returncode else None
        self.process = None
        if self.aside is not None:
            checkpoint.unstage(self.aside)
        self.aside = None


@exit_on_input_error
def main(argv):
    parser = Parser(prog="python -m hf_myllm.hub", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="push")
    one = commands.add_parser("push", help="push a run's model with its card")
    one.add_argument("run", help="folder of a run, or of one of its checkpoints")
    one.add_argument("repo", metavar="user/name", help="repository of the Hub; it is made where it is new")
    one.add_argument("--private", action="store_true", help="make it a private one, where it is new")
    one.add_argument("--revision", help="branch to push to (default: main)")
    args = parser.parse_args(argv)
    silence_libraries()
    huggingface_hub.utils.disable_progress_bars()
    # of a run that is killed, nothing is pushed any more: one that goes on may have pushed what is newer
    if (parent := os.environ.get(_PARENT)) and not exit_with_parent(int(parent)):
        raise InputError("the run has ended")
    print(f"pushed: {push(args.run, args.repo, args.private, args.revision)}")


if __name__ == "__main__":
    sys.exit(main())
