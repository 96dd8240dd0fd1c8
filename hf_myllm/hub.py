"""Sharing a run on the Hugging Face Hub: `python -m hf_myllm.hub push RUN user/name [--private] [--revision BRANCH]`.

Before anything leaves, stock transformers loads the model in a process that knows nothing of this package, and must say
the same as our own class does. What leaves is the model, its tokenizer, its curves and its card, as one commit.

A run with `push_to_hub: user/name` does the same for each checkpoint, in a process of its own, so that neither a slow
network nor a failing one is felt by the training.
"""

import json
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

from . import checkpoint, lora
from .errors import InputError, Parser, exit_on_input_error, first_line
from .models import FAMILIES
from .report import best_evaluation, read_metrics, read_run

# What is shared of a folder: a model and its tokenizer, and nothing else that may lie there.
SHARED = [
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "adapter_config.json"),
    *("model_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template.jinja", "README.md", "loss.png"),
]
WAITS = (1, 4, 15)  # seconds before another try
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may answer otherwise later
_OURS = "<!-- written by hf_myllm: without this line, what you write here stays -->"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")

# Run by itself, so that nothing of this package is there: the model as anybody loads it.
_STOCK = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
folder, architecture, base, config, inputs, outputs = sys.argv[1:]
transformers.utils.logging.set_verbosity_error()
model_class = getattr(transformers, architecture)
if base:
    from peft import PeftModel
    config = transformers.AutoConfig.from_pretrained(config)
    model = PeftModel.from_pretrained(model_class.from_pretrained(base, config=config, dtype=torch.float32), folder)
else:
    model = model_class.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    found = model.eval()(**load_file(inputs)).to_tuple()
save_file({str(n): one.contiguous() for n, one in enumerate(found) if isinstance(one, torch.Tensor)}, outputs)
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
    check(folder)
    api = HfApi()
    with tempfile.TemporaryDirectory() as aside:
        aside = Path(aside)
        for path in folder.iterdir():
            if path.is_file() and any(path.match(pattern) for pattern in SHARED):
                checkpoint.link_or_copy(path, aside / path.name)
        if (curves := home_of(folder) / "loss.png").is_file():
            (aside / "loss.png").unlink(missing_ok=True)
            checkpoint.link_or_copy(curves, aside / "loss.png")
        if not is_edited(folder / "README.md"):
            (aside / "README.md").unlink(missing_ok=True)
            (aside / "README.md").write_text(card(folder, repo, has_curves=curves.is_file()), encoding="utf-8")
        for path in aside.iterdir():
            if path.suffix != ".safetensors" and _TOKEN.search(path.read_text(encoding="utf-8", errors="ignore")):
                raise InputError(f"{path.name} of {run} holds what looks like a token of the Hub: nothing was pushed")

        def upload():
            api.create_repo(repo, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo,
                folder_path=aside,
                revision=revision,
                commit_message=f"Model of {_named(folder)}",
                delete_patterns=SHARED,  # of another model that was there: more shards, or an adapter
            )

        return _with_retries(upload, repo).commit_url


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
        config = transformers.AutoConfig.from_pretrained(where)
        architecture = config.architectures[0]
        family = next(one for one in FAMILIES.values() if one.config.model_type == config.model_type)
        ours = {family.config._stock_architectures[one.__name__]: one for one in family.tasks.values()}[architecture]
    except (StopIteration, KeyError, TypeError, OSError, ValueError) as error:
        raise InputError(f"{folder} holds no model of ours: {first_line(error)[:200]}") from None
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
        aside = path.with_name(path.name + ".partial")
        aside.write_text(card(folder, has_curves=(Path(folder) / "loss.png").is_file()), encoding="utf-8")
        aside.replace(path)


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
_FAMILY_NAMES = {"gpt2": "GPT-2", "llama": "Llama", "bert": "BERT"}
_METRICS = {"val_loss": "loss", "val_perplexity": "perplexity", "val_bits_per_byte": "bits_per_byte"}


def card(folder, repo=None, has_curves=False):
    """The model card of a run's folder, or of a checkpoint: what it is, on which data, how, with which result.

    Args:
        repo: what the card calls the model by; default: the run's name.
    """
    folder, home = Path(folder), home_of(folder)
    about, recipe = read_run(home), _recipe(home)
    config = json.loads(Path(lora.config_of(folder) if lora.base_of(folder) else folder / "config.json").read_text())
    kind = config["architectures"][0].partition("For")[2] or "CausalLM"
    name, task = repo or home.name, _PIPELINES.get(kind)
    figures, step = _figures(home, recipe, _step_of(folder))
    hub_data = [s["name"] for part in about.get("data", {}).values() for s in part.get("sources", []) if s["is_hub"]]
    base, length = about.get("base_model"), config.get("n_positions") or config.get("max_position_embeddings")
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        license=about.get("license"),
        base_model=base,
        datasets=sorted({one.split(" ")[0] for one in hub_data}) or None,
        library_name="peft" if lora.base_of(folder) else "transformers",
        pipeline_tag=task,
        tags=["hf_myllm", config["model_type"]],
        eval_results=_results(figures, task, about),
    )
    family = _FAMILY_NAMES.get(config["model_type"], config["model_type"])
    size = f" of {about['parameters']:,} parameters" if "parameters" in about else ""
    came = f"fine-tuned from [{base}](https://huggingface.co/{base})" if base else "trained from nothing"
    if not base and about.get("init_from", "scratch") != "scratch":
        came = "trained from another model"
    parts = [f"---\n{data.to_yaml()}\n---\n", f"# {name.rpartition('/')[2]}\n"]
    parts.append(f"A {family} ({config['architectures'][0]}){size}, {came} with hf_myllm.\n")
    parts.append(f"## Use\n\n```python\n{_usage(folder, kind, name, length)}\n```\n")
    if figures:
        rows = [f"| {key.removeprefix('val_').replace('_', ' ')} | {value:.4f} |" for key, value in figures.items()]
        level = about.get("unigram_loss")
        if level is not None:
            rows.append(f"| loss of knowing only how often tokens occur | {level:.4f} |")
        loss = f"The loss is in {about['unit']}. " if "unit" in about else ""
        parts.append(f"## Results\n\n{loss}On the validation data below, after step {step:,}:\n")
        parts.append("| | |\n|---|---|\n" + "\n".join(rows) + "\n")
    if has_curves:
        parts.append("![training and validation loss over the steps](loss.png)\n")
    if about.get("data"):
        parts.append(f"## Data\n\n{_data_table(about)}\n")
    if recipe:
        parts.append(f"## Training\n\n{_training(about, step)}\n\n```yaml\n{_public(recipe, about)}```\n")
    parts.append(f"## Limits\n\n{_limits(about, task, length)}\n\n{_OURS}\n")
    return _TOKEN.sub("hf_...", "\n".join(parts))


def _recipe(home):
    try:
        found = yaml.safe_load((home / "recipe.yaml").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, yaml.YAMLError):
        return {}


def _figures(home, recipe, step):
    """What the validation found of this model, and after which step: of a checkpoint the last evaluation before it, of
    the run's own model the last, or the best where that is kept."""
    evaluation = recipe.get("evaluation") or {}
    if step is None and evaluation.get("final_model") == "best" and evaluation.get("metric_for_best"):
        step = best_evaluation(home, evaluation["metric_for_best"], 1 << 62, evaluation.get("greater_is_better"))[0]
    lines = [line for line in read_metrics(home) if "train_loss" in line and (step is None or line["step"] <= step)]
    if not lines:
        return {}, 0
    found = {
        key: value for key, value in lines[-1].items() if key.startswith("val_") and isinstance(value, (int, float))
    }
    return found, lines[-1]["step"]


def _results(figures, task, about):
    """The figures as the Hub reads them (model-index)."""
    data = about.get("data", {}).get("validation", {})
    names = ", ".join(_short(one["name"], about) for one in data.get("sources", [])) or "validation data"
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=names if any(one["is_hub"] for one in data.get("sources", [])) else "own",
            dataset_name=names,
            metric_type=_METRICS.get(key, key.removeprefix("val_")),
            metric_value=round(value, 6),
        )
        for key, value in figures.items()
    ] or None


def _usage(folder, kind, name, length):
    """Four lines of Python, or fewer."""
    task = _PIPELINES.get(kind)
    if lora.base_of(folder) or not any(Path(folder).glob("tokenizer*.json")):
        line = lora.how_to_load(folder, name)
        package = "peft" if lora.base_of(folder) else "transformers"
        classes = sorted(set(re.findall(r"(?:Auto)?[A-Z]\w+(?=\.from_pretrained)", line)))
        imports = [f"from {'peft' if 'Peft' in one else 'transformers'} import {one}" for one in classes]
        return "\n".join([*imports, f"model = {line}"]) if package == "peft" else f"{imports[0]}\nmodel = {line}"
    if task == "question-answering":  # transformers 5 has no pipeline for it
        return (
            "from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            f'model = AutoModelForQuestionAnswering.from_pretrained("{name}")\n'
            'output = model(**tokenizer("A question?", "The text that may answer it.", return_tensors="pt"))'
        )
    lines = ["from transformers import pipeline", f'model = pipeline("{task}", model="{name}")']
    if task == "text-generation":  # stock GPT-2 fails beyond its positions
        some = min(50, length // 2) if length else 50
        return "\n".join([*lines, f'print(model("Once upon a time", max_new_tokens={some})[0]["generated_text"])'])
    if task == "fill-mask":
        return "\n".join([*lines, 'print(model("Once upon a [MASK].")[0]["token_str"])'])
    return "\n".join([*lines, 'print(model("A text to judge."))'])


def _data_table(about):
    rows = ["| | from | documents | tokens | rows |", "|---|---|---|---|---|"]
    for part, counts in about["data"].items():
        names = ", ".join(_short(source["name"], about) for source in counts["sources"])
        held_out = f"held out of it: {counts['held_out']}" if "held_out" in counts else names
        documents = f"{counts['documents']:,}" if "documents" in counts else ""
        rows.append(f"| {part} | {held_out} | {documents} | {counts['tokens']:,} | {counts['rows']:,} |")
    return "\n".join(rows)


def _training(about, step):
    if not about.get("launches"):
        return f"{step:,} steps."
    last = about["launches"][-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    return (
        f"{about['total_steps']:,} steps of up to {about['tokens_per_step']:,} tokens on {last['processes']} x "
        f"{last['device']}, precision {last['precision']}, with {versions}."
    )


def _limits(about, task, length):
    counts = about.get("data", {}).get("training", {})
    said = [f"- It reads at most {length:,} tokens."] if length else []
    if counts.get("tokens"):
        said.append(
            f"- It has learned from the {counts['tokens']:,} tokens named above, and has their language, subjects, "
            "errors and prejudices."
        )
    if task in ("text-generation", "fill-mask"):
        said.append("- What it says may be false or offensive; nothing was done to make it otherwise.")
    said.append("- It was judged on the validation data above, and on nothing else.")
    if not about.get("license"):
        said.append("- No licence was given: ask whoever shares it before you use it.")
    return "\n".join(said)


def _public(recipe, about):
    """A recipe without what is unset or of this machine only: of files and folders, their names."""
    shown = {}
    for key, value in recipe.items():
        if key == "hub":
            continue
        if isinstance(value, dict):
            value = {name: _short(one, about, name) for name, one in value.items() if one not in (None, False)}
        if value not in (None, {}):
            shown[key] = value
    shown.get("run", {}).pop("save_model", None)
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _short(value, about, key=""):
    """A word of a recipe without the way to it on this machine."""
    if isinstance(value, list):
        return [_short(one, about, key) for one in value]
    if isinstance(value, dict):
        return {name: _short(one, about, name) for name, one in value.items()}
    if not isinstance(value, str) or value.startswith("{stdlib}"):
        return value
    is_path = key in ("train_file", "val_file", "chat_template") or value in about.get("local", [])
    if is_path or value.startswith(("/", "~", ".", "\\")) or ":\\" in value:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


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
        self.aside = checkpoint.stage(self.folder / f"checkpoint-{step}")
        self._start(self.aside)

    def finish(self, must_stop=lambda: False):
        """Wait for what is on its way, push the run's own model, and say what has become of it all."""
        for folder in (None, self.folder):
            if folder is not None:
                self._start(folder)
            while self.process is not None and self.process.poll() is None:
                if must_stop():
                    return self.stop()
                time.sleep(0.1)
            self._end()
        if self.problem:
            return f"not pushed  {self.problem}; {self._later()}"
        return f"pushed      {self.folder} to {self.repo}, as stock transformers loads it"

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
            env=_environment(),
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
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    print(f"pushed: {push(args.run, args.repo, args.private, args.revision)}")


if __name__ == "__main__":
    sys.exit(main())
