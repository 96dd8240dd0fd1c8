"""The public API: `train`, `evaluate` and `Recipe` in a process that does other things too."""

import json
import logging
import os
import random
import signal
import threading
import warnings

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import torch._inductor.config
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import TorchDynamoPlugin
from conftest import read_metrics, read_weights, write_story
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_myllm
from hf_myllm import distributed
from hf_myllm.errors import CheckpointError, DataError, InputError, ModelError, RecipeError
from hf_myllm.recipe import Recipe

TEXTS = [write_story(seed) for seed in range(12)]
EVAL_TEXTS = [write_story(seed) for seed in range(100, 104)]


def make_recipe(run_dir, **training):
    """Return a recipe without data: a GPT that trains for six steps, with dropout."""
    return Recipe(
        model="gpt",
        config={"n_layer": 1, "n_head": 2, "n_embd": 16},
        data={"tokenizer": {"train": "bpe", "vocab_size": 300}, "max_len": 16},
        training={"max_steps": 6, "batch_size": 4, "total_batch_size": 8, "learning_rate": 3e-3, **training},
        evaluation={"eval_freq": 3, "eval_iter": 2},
        run={"save_model": str(run_dir), "save_freq": 3},
    )


def make_labelled_recipe(run_dir):
    return Recipe(
        model="bert",
        task="classification",
        config={"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16},
        data={"tokenizer": {"train": "wordpiece", "vocab_size": 120}, "max_len": 8},
        training={"max_steps": 4, "batch_size": 8, "learning_rate": 1e-3},
        run={"save_model": str(run_dir)},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the result of a run on texts in memory, and what its callbacks got."""
    logged, evaluated = [], []
    recipe = make_recipe(tmp_path_factory.mktemp("api") / "run")
    result = hf_myllm.train(recipe, TEXTS, eval_data=EVAL_TEXTS, on_log=logged.append, on_evaluate=evaluated.append)
    return result, logged, evaluated


def test_data_in_memory_that_replaces_files_is_said(tmp_path, capsys):
    (tmp_path / "other.txt").write_text("another text " * 300)
    recipe = make_recipe(tmp_path / "run", max_steps=1)
    recipe.data.train_file = recipe.data.val_file = str(tmp_path / "other.txt")
    with pytest.raises(RecipeError, match="train_file: data in memory is given too"):
        hf_myllm.train(recipe, TEXTS)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    hf_myllm.train(Recipe.load(tmp_path / "r.yaml"), TEXTS, eval_data=EVAL_TEXTS)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    expected = "warning: {} of the recipe is not read; the data in memory replaces it"
    assert said == [expected.format(name) for name in ("train_file", "val_file")]
    # what was not read is not recorded, so no later command takes it for the data of the run
    data = Recipe.load(tmp_path / "run" / "recipe.yaml").data
    assert (data.train_file, data.val_file) == (None, None)


def test_a_text_column_that_is_the_label_column_is_refused(tmp_path):
    rows = datasets.Dataset.from_list([{"text": text, "label": label} for label in "ab" for text in TEXTS])
    recipe = make_labelled_recipe(tmp_path / "run")
    for column in ("text", ["label", "text"]):
        recipe.data.label_column = column
        with pytest.raises(InputError, match="label_column: 'text' is the column of the text too"):
            hf_myllm.train(recipe, rows)


def test_a_chat_without_turns_is_one_line(tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for turn in messages %}{{ turn.content }}{% endfor %}")
    recipe = make_recipe(tmp_path / "run")
    recipe.task, recipe.data.chat_template = "instruction", str(tmp_path / "chat.jinja")
    with pytest.raises(DataError, match="train_data row 1 .*turn"):
        hf_myllm.train(recipe, datasets.Dataset.from_list([{"messages": []}] * 4))


def test_validation_data_in_another_format_is_not_training_data(tmp_path):
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with pytest.raises(DataError, match="val.jsonl: it holds the same tokens as train_data; give others"):
        hf_myllm.train(make_recipe(tmp_path / "run"), TEXTS, eval_data=tmp_path / "val.jsonl")
    rows = [{"text": text, "label": label} for label in "ab" for text in TEXTS]
    train_data = datasets.Dataset.from_list(rows)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="val.jsonl: it holds the same tokens as train_data; give others"):
        hf_myllm.train(make_labelled_recipe(tmp_path / "run"), train_data, eval_data=tmp_path / "val.jsonl")
    assert not (tmp_path / "run").exists()


# ---- results and callbacks


def test_the_result_holds_the_published_model(finished):
    result, _, _ = finished
    assert isinstance(result, hf_myllm.RunResult)
    assert (hf_myllm.Recipe, hf_myllm.InputError) == (Recipe, InputError)
    assert (result.step, result.stop_signal) == (6, None)
    stored = AutoModelForCausalLM.from_pretrained(result.run_dir).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in result.model.state_dict().items())
    assert not result.model.training
    assert result.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(result.run_dir).get_vocab()
    ids = result.tokenizer("Anna likes the cat.", return_tensors="pt")["input_ids"]
    assert result.model(ids).logits.shape == (*ids.shape, len(result.tokenizer))


def test_the_callbacks_get_what_metrics_jsonl_gets(finished):
    result, logged, evaluated = finished
    lines = read_metrics(result.run_dir)
    assert logged == lines
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert evaluated == [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 3, 6]
    assert result.metrics == {key: value for key, value in evaluated[-1].items() if key.startswith("val_")}
    assert {"val_loss", "val_perplexity", "val_bits_per_byte"} <= result.metrics.keys()


def test_evaluate_returns_the_metrics_of_the_training(finished):
    result, _, _ = finished
    metrics = hf_myllm.evaluate(result.run_dir, eval_data=EVAL_TEXTS)
    assert {f"val_{name}": value for name, value in metrics.items()} == pytest.approx(result.metrics)
    other = hf_myllm.evaluate(result.run_dir, eval_data=TEXTS, batch_size=2)
    assert other["tokens"] != metrics["tokens"]


def test_a_list_a_dataset_and_a_file_of_the_same_texts_give_the_same_run(finished, tmp_path):
    result, _, _ = finished
    for name, texts in (("train", TEXTS), ("eval", EVAL_TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [datasets.Dataset.from_dict({"text": texts}) for texts in (TEXTS, EVAL_TEXTS)]
    hf_myllm.train(make_recipe(tmp_path / "dataset"), rows[0], rows[1])
    hf_myllm.train(make_recipe(tmp_path / "files"), str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl"))
    for name in ("dataset", "files"):
        assert read_weights(tmp_path / name) == read_weights(result.run_dir)
        assert read_metrics(tmp_path / name, "val_loss") == read_metrics(result.run_dir, "val_loss")


def test_a_part_of_data_in_memory_is_held_out_without_eval_data(tmp_path):
    assert hf_myllm.train(make_recipe(tmp_path / "run"), TEXTS).metrics["val_tokens"] > 0


def test_a_labelled_task_reads_the_columns_of_a_dataset(tmp_path):
    texts, labels = ["good", "very good", "bad", "very bad"] * 8, ["yes", "yes", "no", "no"] * 8
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
    result = hf_myllm.train(make_labelled_recipe(tmp_path / "run"), rows, rows.select(range(4)))
    assert set(result.model.config.id2label.values()) == {"yes", "no"}
    assert {"val_accuracy", "val_f1"} <= result.metrics.keys()
    metrics = hf_myllm.evaluate(result.run_dir, eval_data=rows.select(range(4)))
    assert {f"val_{name}": value for name, value in metrics.items()} == pytest.approx(result.metrics)


def test_the_recipe_of_the_caller_is_not_changed(tmp_path):
    recipe = make_recipe(tmp_path / "run")
    before = recipe.to_yaml()
    hf_myllm.train(recipe, TEXTS)
    assert recipe.to_yaml() == before


# ---- errors


@pytest.mark.parametrize(
    ("error", "changes", "train_data"),
    [
        (RecipeError, {"batch_size": 0}, TEXTS),
        (RecipeError, {"no_such_key": 1}, TEXTS),
        (RecipeError, {}, None),
        (RecipeError, {"task": "no_such_task"}, TEXTS),
        (DataError, {}, "no_such_file.txt"),
        (DataError, {}, []),
        (DataError, {}, ["a text", 3]),
        (DataError, {}, {"text": TEXTS}),
        (DataError, {}, datasets.Dataset.from_dict({"words": TEXTS})),
        (ModelError, {"init_from": "no_such_folder"}, TEXTS),
        (ModelError, {"config": {"n_head": 3}}, TEXTS),
    ],
)
def test_a_mistake_raises_an_error_of_its_class_and_writes_nothing(tmp_path, monkeypatch, error, changes, train_data):
    monkeypatch.chdir(tmp_path)
    before = global_state()
    with pytest.raises(error) as raised:
        hf_myllm.train(Recipe.load(make_recipe_file(tmp_path), **changes), train_data)
    assert issubclass(error, InputError)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert global_state() == before


def make_recipe_file(folder):
    (folder / "recipe.yaml").write_text(make_recipe(folder / "run").to_yaml())
    return folder / "recipe.yaml"


def test_a_folder_that_holds_a_run_is_a_checkpoint_error(finished):
    result, _, _ = finished
    before = read_weights(result.run_dir)
    with pytest.raises(CheckpointError, match="resume"):
        hf_myllm.train(make_recipe(result.run_dir), TEXTS)
    assert read_weights(result.run_dir) == before


def test_a_loss_that_is_not_finite_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="lower learning_rate"):
        hf_myllm.train(make_recipe(tmp_path / "run", learning_rate=1e9, grad_clip=0), TEXTS)


# ---- the process around a run


def global_state():
    """Return what a run must leave as it was in its process."""
    hub = huggingface_hub.utils
    return {
        "verbosity": (
            transformers.logging.get_verbosity(),
            datasets.logging.get_verbosity(),
            hub.logging.get_verbosity(),
            logging.getLogger().level,
            logging.getLogger("accelerate").level,
        ),
        "progress bars": (
            transformers.logging.is_progress_bar_enabled(),
            datasets.are_progress_bars_disabled(),
            hub.are_progress_bars_disabled(),
        ),
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "random states": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        ),
        "warning filters": list(warnings.filters),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()),
        "TF32": torch.backends.cuda.matmul.fp32_precision,
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch._inductor.config.deterministic,
        ),
        "accelerate": (dict(PartialState._shared_state), dict(AcceleratorState._shared_state)),
        "gradient state": dict(GradientState._shared_state),
    }


@pytest.fixture
def unusual_settings(monkeypatch):
    """Give global settings values that are not their defaults, and restore the defaults afterwards."""
    hub, signums = huggingface_hub.utils, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    libraries = (transformers.logging, datasets.logging, hub.logging)
    before = [library.get_verbosity() for library in libraries]
    handlers = [signal.signal(number, lambda *_: None) for number in signums]
    num_threads = torch.get_num_threads()
    for library in libraries:
        library.set_verbosity(logging.INFO)
    torch.set_num_threads(2)
    monkeypatch.setenv("HF_MYLLM_TEST", "kept")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    torch.set_num_threads(num_threads)
    for library, verbosity in zip(libraries, before, strict=True):
        library.set_verbosity(verbosity)
    for number, handler in zip(signums, handlers, strict=True):
        signal.signal(number, handler)


def test_a_run_changes_nothing_in_its_process(tmp_path, unusual_settings):
    before = global_state()
    hf_myllm.train(make_recipe(tmp_path / "run", deterministic=True), TEXTS)
    assert global_state() == before
    hf_myllm.evaluate(tmp_path / "run", eval_data=EVAL_TEXTS)
    assert global_state() == before


def test_runs_of_one_process_do_not_depend_on_each_other(finished, tmp_path, monkeypatch):
    """Between two runs of the same recipe: a compiled run, another task, and one in mixed precision."""
    result, _, _ = finished
    monkeypatch.setattr(distributed, "TorchDynamoPlugin", lambda backend: TorchDynamoPlugin(backend="eager"))
    compiled = hf_myllm.train(make_recipe(tmp_path / "compiled", compile=True), TEXTS, EVAL_TEXTS)
    assert not hasattr(compiled.model, "_orig_mod")
    texts = datasets.Dataset.from_dict({"text": ["good", "bad"] * 8, "label": [1, 0] * 8})
    hf_myllm.train(make_labelled_recipe(tmp_path / "labelled"), texts)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    hf_myllm.train(make_recipe(tmp_path / "bf16"), TEXTS, EVAL_TEXTS)
    assert read_weights(tmp_path / "bf16") != read_weights(result.run_dir)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    hf_myllm.train(make_recipe(tmp_path / "again"), TEXTS, EVAL_TEXTS)
    assert read_weights(tmp_path / "again") == read_weights(result.run_dir)


def test_a_run_works_in_a_thread(finished, tmp_path):
    reference, _, _ = finished
    results, before = [], global_state()
    thread = threading.Thread(
        target=lambda: results.append(hf_myllm.train(make_recipe(tmp_path / "run"), TEXTS, EVAL_TEXTS)), daemon=True
    )
    thread.start()
    thread.join(120)
    assert results[0].metrics == reference.metrics
    assert read_weights(tmp_path / "run") == read_weights(reference.run_dir)
    assert global_state() == before


def test_a_run_works_beside_an_accelerator_of_the_caller(finished, tmp_path):
    reference, _, _ = finished
    try:
        accelerator = Accelerator(gradient_accumulation_steps=4)
        model = accelerator.prepare(torch.nn.Linear(2, 2))
        before = global_state()
        hf_myllm.train(make_recipe(tmp_path / "run"), TEXTS, EVAL_TEXTS)
        assert global_state() == before
        assert read_weights(tmp_path / "run") == read_weights(reference.run_dir)
        assert accelerator.gradient_accumulation_steps == 4
        accelerator.backward(model(torch.ones(1, 2)).sum())
        assert model.weight.grad.tolist() == [[0.25, 0.25]] * 2
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# ---- stop and resume


def test_a_run_that_sigint_stops_resumes_to_the_same_bytes(finished, tmp_path):
    reference, _, _ = finished

    def interrupt(line):
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = global_state()
    result = hf_myllm.train(make_recipe(tmp_path / "run"), TEXTS, EVAL_TEXTS, on_log=interrupt)
    assert result.stop_signal == signal.SIGINT
    assert 4 <= result.step < 6
    assert result.model is None
    assert global_state() == before
    resumed = hf_myllm.train(Recipe.load(tmp_path / "run" / "recipe.yaml", init_from="resume"), TEXTS, EVAL_TEXTS)
    assert (resumed.step, resumed.stop_signal) == (6, None)
    assert read_weights(tmp_path / "run") == read_weights(reference.run_dir)
    assert resumed.metrics == reference.metrics


def test_an_exception_of_a_callback_ends_the_run_and_it_can_be_resumed(finished, tmp_path):
    reference, _, _ = finished

    def fail(line):
        if line["step"] == 5:
            raise KeyError("a bug of the caller")

    before = global_state()
    with pytest.raises(KeyError, match="a bug of the caller"):
        hf_myllm.train(make_recipe(tmp_path / "run"), TEXTS, EVAL_TEXTS, on_log=fail)
    assert global_state() == before
    hf_myllm.train(Recipe.load(tmp_path / "run" / "recipe.yaml", init_from="resume"), TEXTS, EVAL_TEXTS)
    assert read_weights(tmp_path / "run") == read_weights(reference.run_dir)


def test_a_finished_run_returns_its_result_again(finished):
    reference, logged, _ = finished
    lines = []
    resume = Recipe.load(reference.run_dir / "recipe.yaml", init_from="resume")
    result = hf_myllm.train(resume, TEXTS, EVAL_TEXTS, on_log=lines.append)
    assert (result.step, lines) == (6, [])
    assert result.metrics == reference.metrics
    assert torch.equal(next(result.model.parameters()), next(reference.model.parameters()))


# ---- mistakes that would give a wrong result


def test_a_second_run_in_another_thread_is_refused(finished, tmp_path):
    errors = []

    def interfere(entry):
        for call in (lambda: hf_myllm.train(make_recipe(tmp_path / "b"), TEXTS), lambda: hf_myllm.generate("a", "b")):
            thread = threading.Thread(target=lambda call=call: errors.append(catch(call)))
            thread.start()
            thread.join()

    hf_myllm.train(make_recipe(tmp_path / "a"), TEXTS, eval_data=EVAL_TEXTS, on_evaluate=interfere)
    assert errors
    assert all("another thread of this process has a run open" in str(error) for error in errors)
    assert not (tmp_path / "b").exists()
    assert read_weights(tmp_path / "a") == read_weights(finished[0].run_dir)


def catch(call):
    try:
        call()
    except InputError as error:
        return error


def test_names_of_files_are_not_taken_for_texts(tmp_path):
    paths = [tmp_path / f"{index}.txt" for index in range(12)]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    with pytest.raises(DataError, match="its strings are names of files"):
        hf_myllm.train(make_recipe(tmp_path / "run"), list(map(str, paths)))
    assert hf_myllm.train(make_recipe(tmp_path / "run", max_steps=1), paths).step == 1


def test_a_run_without_its_tokenizer_is_not_evaluated_with_another(tmp_path):
    hf_myllm.train(make_recipe(tmp_path / "run", max_steps=1), TEXTS)
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        hf_myllm.evaluate(tmp_path / "run", eval_data=EVAL_TEXTS)


def test_evaluations_of_other_validation_data_do_not_choose_the_best_checkpoint(tmp_path):
    values = make_recipe(tmp_path / "run", learning_rate=5e-2).to_dict()
    values["evaluation"] |= {"eval_freq": 1, "metric_for_best": "val_loss", "final_model": None}
    recipe = Recipe(**values)

    def stop(entry):
        if entry["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    hf_myllm.train(recipe, TEXTS, eval_data=TEXTS[1:], on_evaluate=stop)
    recipe.run.resume = recipe.run.allow_changed = True
    result = hf_myllm.train(recipe, TEXTS, eval_data=["unrelated 0123456789 " * 8] * 8)
    losses = {line["step"]: line["val_loss"] for line in read_metrics(tmp_path / "run") if "val_loss" in line}
    assert min(losses[step] for step in (1, 2, 3)) < min(losses[step] for step in (5, 6))
    assert result.metrics["val_loss"] == min(losses[step] for step in (5, 6))
    published = json.loads((tmp_path / "run" / "run.json").read_text())["published_step"]
    assert losses[published] == result.metrics["val_loss"]


@pytest.mark.parametrize("options", [{"on_log": "print"}, {"recipe": "quickstart"}])
def test_arguments_of_another_type_are_refused(tmp_path, options):
    options = {"recipe": make_recipe(tmp_path / "run")} | options
    with pytest.raises(RecipeError, match="expected a"):
        hf_myllm.train(train_data=TEXTS, **options)
    assert not (tmp_path / "run").exists()
