"""The model card: README.md of a run, rendered from model_card.md.jinja with what the run's folder holds."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import TemplateError

from ..checkpoint import find_run_dir
from ..errors import HubError, hide_secrets
from ..files import render_template, write_text_atomically
from ..models import find_family, lora
from ..reporting.metrics_log import last_evaluation, metric_label, metrics_of_weights, read_run, validation_metrics

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_MARKER = "<!-- written by hf_myllm; delete this line to keep your own edits -->"
_PIPELINES = {  # what follows "For" in the name of the class
    "CausalLM": "text-generation",
    "MaskedLM": "fill-mask",
    "PreTraining": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ConditionalGeneration": "text2text-generation",
}


def write_card(run_dir, name=None):
    """Write RUN/README.md, unless a user has edited it; `name` is that of the model, by default of the folder."""
    path = Path(run_dir) / "README.md"
    if not is_edited(path):
        write_text_atomically(path, make_card(run_dir, name, has_plot=(Path(run_dir) / "loss.png").is_file()))


def is_edited(path):
    """Return whether a card exists that this package has not written, or that a user has made their own."""
    return path.is_file() and _MARKER[:22] not in path.read_text(encoding="utf-8", errors="replace")


def step_of(folder):
    """Return the step of a checkpoint's folder, or None for a run's folder."""
    match = re.match(r"checkpoint-(\d+)", Path(folder).name)
    return int(match[1]) if match else None


def make_card(folder, repo=None, revision=None, has_plot=False):
    """Return the model card of a run's folder or of a checkpoint as Markdown.

    Args:
        repo, revision: the name and branch under which the usage example loads the model; default: the run's name.
        has_plot: whether loss.png is beside the card.
    Raises:
        HubError: run.json does not have the content that this package writes.
    """
    folder, run_dir = Path(folder), find_run_dir(Path(folder).resolve())
    config, run = lora.read_config(folder), read_run(run_dir)
    try:
        values = _card_values(folder, run_dir, config, run, repo or run_dir.name, revision)
        return hide_secrets(render_template(TEMPLATE, **values, has_plot=has_plot, marker=_MARKER))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, TemplateError) as error:
        raise HubError(f"{run_dir}/run.json: no model card can be made of it: {error!r:.200}") from None


def _card_values(folder, run_dir, config, run, name, revision):
    """Return the values of the template. Without run.json (`run` is {}) most of them are empty."""
    architecture, family = config["architectures"][0], find_family(config["model_type"])
    head = lora.head_of(architecture)
    pipeline, step = _PIPELINES.get(head), step_of(folder) or run.get("published_step")
    evaluation = last_evaluation(run_dir, step)
    metrics, metrics_step = validation_metrics(evaluation), evaluation.get("step")
    if averaged := run.get("averaged"):
        metrics, metrics_step = {name: value for name, value in averaged["average"].items() if value is not None}, step
    length = config.get("n_positions") or config.get("max_position_embeddings")
    is_average = step_of(folder) is None and bool(run.get("published_average"))
    own_metrics = metrics_of_weights(metrics, is_average) if metrics_step == step else {}
    metadata = _metadata(folder, config, run, name, pipeline, own_metrics)
    return {
        "metadata": metadata.to_yaml(),
        "title": name.rpartition("/")[2],
        "run": run,
        "family": family.display_name if family else config["model_type"],
        "architecture": architecture,
        "step": step,
        "is_average": is_average,
        "usage": _usage(folder, name, run),
        "repo": json.dumps(name),
        "revision": f", revision={json.dumps(revision)}" if revision else "",
        "new_tokens": min(50, length // 2) if length else 50,  # the stock GPT-2 fails beyond its positions
        "metrics": metrics,
        "metrics_step": metrics_step,
        "metric_label": metric_label,
        "recipe": yaml.safe_dump(run.get("recipe", {}), sort_keys=False, allow_unicode=True),
        "length": length,
        "pipeline": pipeline,
    }


def _metadata(folder, config, run, name, pipeline, metrics):
    """Return the front matter of the card; `metrics` are those of this very model."""
    sources = [source for part in run.get("data", {}).values() for source in part["sources"]]
    license = run.get("license")
    is_hub_license = license is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license)
    return ModelCardData(
        model_name=name.rpartition("/")[2],
        license=license if is_hub_license else "other",
        license_name=None if is_hub_license else re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-"),
        language=run.get("language"),
        base_model=run.get("base_model"),
        datasets=sorted({source["name"] for source in sources if source["is_hub"]}) or None,
        library_name="peft" if lora.base_of(folder) else "transformers",
        pipeline_tag=pipeline,
        tags=["hf_myllm" if run else "safetensors", config["model_type"]],
        eval_results=_eval_results(metrics, pipeline, run),
    )


def _eval_results(metrics, pipeline, run):
    """Return the metrics in the Hub's model-index format, or None without any."""
    parts = [part for name, part in run.get("data", {}).items() if name.startswith("validation")]
    sources = [source for part in parts for source in part.get("sources", [])]
    dataset = next((source["name"] for source in sources if source["is_hub"]), "own")
    return [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset,
            dataset_name=", ".join(source["name"] for source in sources) or "validation data",
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, value in metrics.items()
        if name != "tokens"
    ] or None


def _usage(folder, name, run):
    """Return the values of the usage example: how to load the model, and which calls it supports."""
    recipe = run.get("recipe", {})
    source = recipe.get("evaluation", {}).get("start_context") or "A text."
    template, config = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    has_tokenizer = any(Path(folder).glob("tokenizer*.json"))
    line = lora.how_to_load(folder, name)[:-1]  # without the last parenthesis
    return {
        "load": line,
        "classes": sorted(set(re.findall(r"(?:Auto)?[A-Z]\w+(?=\.from_pretrained)", line))),
        "source": json.dumps(recipe.get("data", {}).get("source_prefix", "") + source, ensure_ascii=False),
        "has_pipeline": has_tokenizer and not lora.base_of(folder),
        "has_chat": template.is_file() or (config.is_file() and "chat_template" in config.read_text(encoding="utf-8")),
    }
