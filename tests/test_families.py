"""Every family trains, resumes and starts from stock checkpoints; runs on every source and packing of rows."""

import json
import os
import pickle
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import transformers
from conftest import read_metrics, read_weights, run_command, train
from families import CASES, ENCODER_DECODERS
from launching import start, wait_for
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from hf_myllm.tasks import TASKS

PRETRAINING_TASKS = ["mlm", "mlm_nsp"]


@pytest.mark.parametrize("task", PRETRAINING_TASKS)
def test_bert_learns_and_stock_classes_load_it(tiny_bert, tmp_path, capsys, task):
    assert train(*tiny_bert(task=task, epochs=8)) == 0
    out, run = capsys.readouterr().out, tmp_path / "run"
    assert "Anna [MASK] the cat." in out  # the text, and below it the predictions
    assert out.count("| [MASK]  ") == len([line for line in read_metrics(run) if "val_loss" in line])
    assert "fill in     hf-myllm generate" in out
    evaluations = [line for line in read_metrics(run) if "val_loss" in line]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.5
    assert evaluations[-1]["val_bits_per_byte"] is None  # masked tokens are no complete text
    assert ("val_nsp_accuracy" in evaluations[-1]) == (task == "mlm_nsp")
    class_name = "BertForMaskedLM" if task == "mlm" else "BertForPreTraining"
    assert AutoConfig.from_pretrained(run).architectures == [class_name]
    stock, loading = getattr(transformers, class_name).from_pretrained(run, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert type(tokenizer).__name__ == "BertTokenizer"
    (guess,) = pipeline("fill-mask", model=str(run), top_k=1)("Anna [MASK] the cat.")
    shown = [line for line in out.splitlines() if "| [MASK]  " in line][-1]
    assert shown.split("[MASK]  ")[1].startswith(f"{guess['token_str']} {guess['score']:.1%}")
    assert AutoModelForMaskedLM.from_pretrained(run).config.hidden_size == 32
    filled = run_command(run, "--prompt", "Anna likes the [MASK].", module="hf_myllm.generate")
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout.splitlines()[0] == "Anna likes the [MASK]."
    assert "%" in filled.stdout
    refused = run_command(run, "--prompt", "Anna likes the cat.", module="hf_myllm.generate")
    assert refused.returncode == 2
    assert "put [MASK]" in refused.stderr


@pytest.mark.parametrize("task", PRETRAINING_TASKS)
def test_bert_killed_and_resumed_writes_the_same_bytes(tiny_bert, tmp_path, task):
    """With dropout, random masks and pairs, and epochs that end within a step."""
    flags = tiny_bert(task=task, save_freq=7)
    reference, run = tmp_path / "reference", tmp_path / "killed"
    assert train(*flags, "--save_model", reference) == 0
    process = start(*flags, "--save_model", run)
    wait_for([process], (run / "checkpoint-14").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train(*flags, "--save_model", run, "--init_from", "resume") == 0
    assert read_weights(run) == read_weights(reference)
    assert read_metrics(run, "loss") == read_metrics(reference, "loss")


@pytest.mark.parametrize("task", PRETRAINING_TASKS)
def test_the_loss_of_bert_does_not_depend_on_micro_batches(tiny_bert, tmp_path, task):
    fixed = {**CASES["bert"].no_dropout, "max_steps": 6, "task": task}
    for name, size in (("whole", 8), ("halves", 4), ("uneven", 3)):
        assert train(*tiny_bert(**fixed, batch_size=size, save_model=tmp_path / name)) == 0
    for name in ("halves", "uneven"):
        assert read_metrics(tmp_path / name, "loss") == pytest.approx(
            read_metrics(tmp_path / "whole", "loss"), abs=1e-5
        ), name
        last = [read_metrics(tmp_path / folder)[-1]["val_loss"] for folder in (name, "whole")]
        assert last[0] == pytest.approx(last[1], abs=1e-5)


@pytest.mark.chaos
def test_compiled_bert_has_the_same_losses(tiny_bert, tmp_path):
    fixed = {**CASES["bert"].no_dropout, "max_steps": 4, "start_context": None}
    fixed |= {"eval_freq": None, "task": "mlm_nsp", "num_hidden_layers": 1}
    assert train(*tiny_bert(**fixed, save_model=tmp_path / "eager")) == 0
    result = run_command(*tiny_bert(**fixed, save_model=tmp_path / "compiled"), "--compile")
    assert result.returncode == 0, result.stderr
    assert read_metrics(tmp_path / "compiled", "loss") == pytest.approx(
        read_metrics(tmp_path / "eager", "loss"), abs=1e-4
    )


@pytest.mark.parametrize("family", [family for family in CASES if family not in ENCODER_DECODERS])  # rows are streams
def test_isolated_documents_train_and_differ_from_a_stream(tiny_family, tmp_path, family):
    flags = tiny_family(family)()
    for isolation in ("documents", "stream"):
        run = tmp_path / isolation
        assert train(*flags, "--packing", isolation, "--epochs", 2, "--save_model", run) == 0
        assert read_metrics(run, "loss")[-1] < read_metrics(run, "loss")[0]
        tokenizer = AutoTokenizer.from_pretrained(run)
        CASES[family].assert_trained(run)
        # AutoTokenizer selects its own class for some model types; it must split text as in training.
        trained = json.loads((run / "tokenizer.json").read_text())
        assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] == trained["pre_tokenizer"]
    assert read_metrics(tmp_path / "documents", "loss") != read_metrics(tmp_path / "stream", "loss")


@pytest.mark.filterwarnings("error:TypedStorage")
def test_a_pickle_trains_the_same_model_as_a_bin(tmp_path):
    ids = np.random.default_rng(0).integers(0, 90, 3000)
    ids.astype(np.uint16).tofile(tmp_path / "ids.bin")
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps([ids[:1000].tolist(), ids[1000:]]))
    (tmp_path / "val.pkl").write_bytes(pickle.dumps(torch.from_numpy(ids[:500])))
    flags = "--model llama --hidden_size 16 --intermediate_size 32 --num_hidden_layers 1 --num_attention_heads 2"
    flags = [*flags.split(), "--max_len", 16, "--max_steps", 5, "--vocab_size", 90]
    for extension in ("bin", "pkl"):
        files = ["--train_file", tmp_path / f"ids.{extension}", "--val_file", tmp_path / "val.pkl"]
        assert train(*flags, *files, "--save_model", tmp_path / extension) == 0
    assert read_weights(tmp_path / "bin") == read_weights(tmp_path / "pkl")
    assert read_metrics(tmp_path / "pkl")[-1]["val_loss"] == read_metrics(tmp_path / "bin")[-1]["val_loss"]


class Command:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_a_pickle_that_runs_code_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps([1, 2, Command()]))
    assert train(*tiny(train_file=tmp_path / "ids.pkl", tokenizer=None)) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "ids.pkl is a pickle that asks for posix.system, and is not loaded" in error


@pytest.fixture(scope="module")
def stock_models(tmp_path_factory, stories):
    """Return a folder with a stock model of each family in bf16, and its tokenizer. BERT has no head."""
    from hf_myllm.data import tokenizer as tokenizers

    folder = tmp_path_factory.mktemp("stock")
    texts = [path.read_text() for path in sorted(stories.iterdir())]
    torch.manual_seed(0)
    for name, case in CASES.items():
        new_tokens = TASKS[next(iter(case.family.tasks))].new_tokens
        tokenizer = tokenizers.train(case.family.tokenizer, texts, {"bert": 120, "t5": 400}.get(name, 300), new_tokens)
        config = AutoConfig.for_model(
            case.family.config.model_type, vocab_size=len(tokenizer), max_position_embeddings=64, **case.run_sizes
        )
        if name in ENCODER_DECODERS:
            config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id
        model = getattr(transformers, case.stock_generator or f"{case.stock}Model")(config)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


GONE = dict.fromkeys(("n_layer", "n_head", "n_embd", "tokenizer", "start_context"))


@pytest.mark.parametrize("family", CASES)
def test_training_starts_from_stock_weights_and_adds_tokens(tiny, stock_models, tmp_path, family, capsys):
    base = stock_models / family
    size = AutoConfig.from_pretrained(base).vocab_size
    flags = tiny(**{**GONE, "model": family, "init_from": base, "max_steps": 2, "save_freq": 1})
    assert train(*flags, "--add_tokens", "<user>", "<bot>") == 0
    out, run = capsys.readouterr().out, tmp_path / "run"
    assert "2 rows of the vocabulary" in out
    config, tokenizer = AutoConfig.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert config.vocab_size == size + 2
    assert tokenizer.tokenize("a <user> b").count("<user>") == 1
    CASES[family].assert_trained(run)
    assert AutoConfig.from_pretrained(run).dtype == torch.float32  # not the dtype of the checkpoint
    if family == "bert":
        assert "newly initialized" in out
        assert "cls.predictions.transform.dense.weight" in out  # a new masked-LM head
        stock, loading = transformers.BertForMaskedLM.from_pretrained(run, output_loading_info=True)
    else:
        stock_class = getattr(transformers, CASES[family].stock_generator)
        stock, loading = stock_class.from_pretrained(run, output_loading_info=True)
    assert not any(loading.values())
    assert stock.get_input_embeddings().weight.shape[0] == stock.get_output_embeddings().weight.shape[0] == size + 2
    # The same recipe gives the same weights; a resume loads the extended vocabulary.
    assert train(*flags, "--add_tokens", "[<user>, <bot>]", "--save_model", tmp_path / "again") == 0
    assert read_weights(run) == read_weights(tmp_path / "again")
    flags = [*flags, "--add_tokens", "<user>", "<bot>", "--init_from", "resume", "--max_steps", 4, "--allow_changed"]
    assert train(*flags) == 0
    assert AutoConfig.from_pretrained(run).vocab_size == size + 2


def test_a_larger_tokenizer_needs_a_larger_vocab_size(tiny, stock_models, tmp_path, capsys):
    base = stock_models / "gpt"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<user>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = tiny(**{**GONE, "init_from": base, "tokenizer": tmp_path / "tokenizer", "max_steps": 2})
    assert train(*flags) == 2
    assert "raise it (--vocab_size 301)" in capsys.readouterr().err
    assert train(*flags, "--vocab_size", 304) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 304
    assert train(*flags, "--vocab_size", 200, "--save_model", tmp_path / "smaller") == 2
    assert "vocab_size" in capsys.readouterr().err


def test_a_step_without_targets_is_valid(tiny_bert, tmp_path):
    (tmp_path / "empty.txt").write_text("[MASK] [SEP] [UNK] " * 400 + "Anna sees. " * 200)
    flags = tiny_bert(
        train_file=tmp_path / "empty.txt", val_fraction=0.1, batch_size=1, total_batch_size=1, max_steps=20
    )
    assert train(*flags) == 0
    assert 0.0 in read_metrics(tmp_path / "run", "loss")


@pytest.mark.parametrize("family", CASES)
def test_bf16_weights_train_and_resume_exactly(tiny_family, tmp_path, family):
    flags = tiny_family(family)(dtype="bfloat16", max_steps=8, save_freq=4, eval_freq=None)
    for name in ("whole", "cut"):
        assert train(*flags, "--save_model", tmp_path / name) == 0
        CASES[family].assert_trained(tmp_path / name)
    assert AutoConfig.from_pretrained(tmp_path / "whole").dtype == torch.bfloat16
    for path in (tmp_path / "cut" / "model.safetensors", *(tmp_path / "cut" / "checkpoint-8").rglob("complete.json")):
        path.unlink()
    (tmp_path / "cut" / "checkpoint-8").rename(tmp_path / "gone")
    assert train(*flags, "--save_model", tmp_path / "cut", "--init_from", "resume") == 0  # from step 4
    assert read_weights(tmp_path / "cut") == read_weights(tmp_path / "whole")


def test_a_resumed_run_cannot_add_tokens(tiny, stock_models, tmp_path, capsys):
    base, run = stock_models / "gpt", tmp_path / "run"
    flags = tiny(**{**GONE, "init_from": base, "max_steps": 2, "save_freq": 1})
    assert train(*flags, "--add_tokens", "<a>") == 0
    more = ["--add_tokens", "<a>", "<b>"]
    assert train(*flags, *more, "--init_from", "resume", "--max_steps", 4, "--allow_changed") == 2
    assert "was trained without '<b>'; start a new run from it" in capsys.readouterr().err
    assert train(*flags, *more, "--eval_only", "--init_from", run) == 2
    assert "was trained without '<b>'" in capsys.readouterr().err
    assert train(*flags, *more, "--init_from", run, "--save_model", tmp_path / "next") == 0
    assert AutoConfig.from_pretrained(tmp_path / "next").vocab_size == 302


def test_a_real_bert_continues_training(tiny, assets, tmp_path):
    """Its folder has no model_type in config.json, no tokenizer_config.json, and pytorch_model.bin as weights."""
    base = assets / "weights" / "rxnfp-bert_pretrained"
    ids = np.random.default_rng(0).integers(15, 40, 4000).astype(np.uint16)
    ids[::50] = 13
    ids.tofile(tmp_path / "reactions.bin")
    flags = {**GONE, "model": "bert", "init_from": base, "train_file": tmp_path / "reactions.bin", "max_steps": 2}
    for task in PRETRAINING_TASKS:
        run = tmp_path / task
        assert train(*tiny(**flags, val_fraction=0.2, task=task, eval_freq=None, save_model=run)) == 0
        assert len(AutoTokenizer.from_pretrained(run)) == 591


MISTAKES = {
    "a task of another family": ({"task": "causal"}, "task 'causal' is not a task of bert; choose mlm or mlm_nsp"),
    "a text with nothing to fill in": ({"start_context": "Anna likes the cat."}, r"put \[MASK\] in the text"),
    "a byte-level tokenizer": (
        {"tokenizer": "{train: bpe, vocab_size: 300}"},
        "task mlm needs a tokenizer with cls_token, sep_token, mask_token",
    ),
    "pairs without a second token type": (
        {"task": "mlm_nsp", "type_vocab_size": 1}, "type_vocab_size is 1, and task mlm_nsp",
    ),
    "rows too short for pairs": ({"task": "mlm_nsp", "max_len": 4}, "max_len 4 is too small"),
    "pairs from one document": (
        {"task": "mlm_nsp", "train_file": "PLACE/one.txt", "val_fraction": 0},
        "one.txt is one document, and pairs of sentences need a second",
    ),
    "pairs of isolated documents": ({"task": "mlm_nsp", "packing": "documents"}, "packing documents cannot be used"),
    "rows too short": ({"max_len": 2}, "max_len 2 is too small"),
    "heads that do not divide": ({"num_attention_heads": 5}, r"num_attention_heads \(5\) must divide"),
    "an encoder that lacks weights": (
        {"init_from": "PLACE/half", "tokenizer": None, **dict.fromkeys(
            ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))},
        "lacks weights that task mlm needs: bert.encoder.layer.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_bert_mistakes_are_reported_in_one_line(tiny_bert, stock_models, tmp_path, capsys, case):
    changed, message = MISTAKES[case]
    (tmp_path / "one.txt").write_text("Anna likes the cat. " * 50)
    half = transformers.BertModel.from_pretrained(stock_models / "bert")
    del half.encoder.layer[1]
    half.save_pretrained(tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    AutoTokenizer.from_pretrained(stock_models / "bert").save_pretrained(tmp_path / "half")
    capsys.readouterr()
    flags = {
        key: str(value).replace("PLACE", str(tmp_path)) if value is not None else None for key, value in changed.items()
    }
    assert train(*tiny_bert(**flags)) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["gpt", "bert"])
@pytest.mark.parametrize("packing", ["pad", "best_fit"])
def test_whole_documents_train_and_resume(tiny_family, tmp_path, family, packing):
    flags = tiny_family(family)(packing=packing, max_steps=24, save_freq=10, document="line")
    run = tmp_path / "run"
    assert train(*flags) == 0
    assert read_metrics(run, "loss")[-1] < read_metrics(run, "loss")[0]
    reference = (run / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-24")
    (run / "model.safetensors").unlink()
    assert train(*flags, "--init_from", "resume") == 0
    assert (run / "model.safetensors").read_bytes() == reference


def test_mixture_of_sources_by_weight(tiny, stories, tmp_path, capsys):
    """Of two sources, the smaller gets most rows. Each is split for validation; a resumed run reads the same rows."""
    (tmp_path / "numbers.txt").write_text("".join(f"{n} times two is {2 * n}.\n" for n in range(200)))
    numbers, run = f"{{train_file: {tmp_path / 'numbers.txt'}, document: line, weight: 3}}", tmp_path / "run"
    flags = tiny(train_file=None, max_steps=16, save_freq=8, datasets=f"[{{train_file: {stories}}}, {numbers}]")
    assert train(*flags) == 0
    out = capsys.readouterr().out
    assert re.search(rf"25.0% from {stories}: its \d+ rows 0\.\d+ times", out), out
    assert re.search(r"75.0% from .*numbers.txt: its \d+ rows \d+\.\d+ times", out)
    reference = (run / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-16")
    (run / "model.safetensors").unlink()
    changed = f"[{{train_file: {stories}, weight: 2}}, {numbers}]"
    assert train(str(run / "recipe.yaml"), "--datasets", changed, "--init_from", "resume") == 2
    assert "belongs to another recipe: weights was [1.0, 3.0] and is [2.0, 3.0]" in capsys.readouterr().err
    assert train(str(run / "recipe.yaml"), "--save_model", str(run), "--init_from", "resume") == 0
    assert (run / "model.safetensors").read_bytes() == reference


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_a_source_without_rows_is_reported(tiny, stories, tmp_path, capsys, packing):
    (tmp_path / "little.txt").write_text("Anna")
    sources = (
        f"[{{train_file: {stories}}}, {{train_file: {tmp_path / 'little.txt'}}}, {{train_file: {stories}/0*.txt}}]"
    )
    flags = tiny(train_file=None, datasets=sources, val_fraction=0, packing=packing, max_steps=3)
    code = train(*flags)
    if packing == "stream":
        assert code == 2
        assert "little.txt: too small for one row" in capsys.readouterr().err
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    else:
        assert code == 0


def test_a_streaming_run_resumes_exactly(tiny, tmp_path, capsys):
    """With windows of 25 rows, three steps each, and more than one epoch."""
    flags = tiny(max_steps=30, save_freq=10, streaming="true", streaming_window=800, eval_freq=10)
    flags += ["--val_file", str(tmp_path / "val.txt")]
    (tmp_path / "val.txt").write_text("Anna sees the cat. A king finds my friend. " * 9)
    run = tmp_path / "run"
    assert train(*flags) == 0
    assert "25 rows of 32 tokens per window of 800 tokens" in capsys.readouterr().out
    reference = (run / "model.safetensors").read_bytes()
    rows = [json.loads(line)["rows"] for line in (run / "metrics.jsonl").open() if '"rows"' in line]
    assert len(set(rows)) == 30
    shutil.rmtree(run / "checkpoint-30")
    (run / "model.safetensors").unlink()
    assert train(*flags, "--init_from", "resume") == 0
    assert (run / "model.safetensors").read_bytes() == reference
    assert train(str(run / "recipe.yaml"), "--save_model", str(tmp_path / "other"), "--dry_run") == 0
    assert "next        hf-myllm train" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()
    assert train(*flags, "--packing", "pad", "--save_model", str(tmp_path / "other")) == 2
    assert "streaming cannot be combined with packing" in capsys.readouterr().err
    (run / "model.safetensors").unlink()
    assert (
        train(*flags, "--streaming_window", "900", "--max_steps", 40, "--init_from", "resume", "--allow_changed") == 2
    )
    assert "streaming_window was 800 and is 900; give streaming_window 800" in capsys.readouterr().err


SETTINGS = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True},
    {"num_labels": 1},
]
HEADS = [(family, task) for family in CASES for task in CASES[family].family.tasks if task != "instruction"]


@pytest.mark.parametrize(("family", "task"), HEADS)
def test_each_trained_parameter_gets_a_gradient(family, task, tmp_path):
    """DDP waits in the second step for the gradient of a parameter that has none in the first."""
    case, ids = CASES[family], torch.arange(5, 37).view(2, 16)
    targets = {"labels": ids % 2 if task == "token_classification" else ids}
    if task == "classification":
        targets = {"labels": torch.zeros(2, dtype=torch.long)}
    elif task == "question_answering":
        targets = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])}
    elif task == "mlm_nsp":
        targets["next_sentence_label"] = torch.tensor([0, 1])
    known = type(case.make_config()).__dataclass_fields__
    for settings in [*SETTINGS, *case.variants]:
        settings = {key: value for key, value in settings.items() if key in known or "attn" in key}
        if family == "bart" and not settings.get("tie_word_embeddings", True):
            continue  # refused: BART shares one embedding
        if task == "classification" and settings.get("num_labels") == 1:
            targets = {"labels": torch.zeros(2)}
        model_class = case.family.tasks[task]
        model = model_class(case.make_config(**{"pad_token_id": 0, **settings}))
        model.save_pretrained(tmp_path)
        for trained in (model, model_class.from_pretrained(tmp_path)):
            trained.train()(input_ids=ids, **targets).loss.backward()
            missing = [name for name, value in trained.named_parameters() if value.requires_grad and value.grad is None]
            assert not missing, (settings, missing)
