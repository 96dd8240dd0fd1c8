"""LoRA: adapters that stock peft loads, merges and resumes."""

import json
import shutil

import pytest
import torch
from conftest import train
from families import CASES
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_runs import (
    BERT,
    BPE,
    GPT,
    NAMES,
    PLACES,
    WORDPIECE,
    evaluations,
    flags,
    generate,
    predict,
    read_lines,
    write_instructions,
    write_lines,
    write_questions,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_myllm.errors import ModelError
from hf_myllm.models import loading


@pytest.mark.parametrize("module", ["lm_head", "wte", "c_attn"])
def test_an_adapter_of_a_tied_weight_is_not_merged(module, tmp_path):
    """Merging would add the change of one module to the other."""
    CASES["gpt"].make_model().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=[module])
    )
    for name, parameter in adapted.named_parameters():
        torch.nn.init.normal_(parameter) if ".lora_" in name else None
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        assert torch.equal(loading.load_stock_model(tmp_path / "adapter")(ids).logits, expected)
        config = loading.build_config("gpt", {}, tmp_path / "adapter")
        if module == "c_attn":
            model, _ = loading.build_model("gpt", "causal", config, tmp_path / "adapter")
            torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-3, atol=1e-3)
        else:
            with pytest.raises(ModelError, match=f"the adapter changes .*{module}, which shares its weight"):
                loading.build_model("gpt", "causal", config, tmp_path / "adapter")


def test_peft_loads_the_adapter_and_a_merged_model_agrees(tmp_path, gpt, capsys):
    rows = [{"text": f"{name} {word}", "label": word} for name in NAMES for word in ("good", "bad", "fair")]
    data = write_lines(tmp_path / "a.jsonl", rows * 5)
    settings = {
        "model": "gpt",
        "task": "classification",
        "init_from": gpt,
        "train_file": data,
        "val_file": write_lines(tmp_path / "b.jsonl", rows * 4),
        "max_len": 16,
    }
    settings |= {
        "batch_size": 6,
        "learning_rate": 5e-3,
        "save_freq": 20,
        "r": 8,
        "seed": 1,
        "eval_freq": 100,
        "target_modules": "all-linear",
    }
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert train(*flags(**settings, max_steps=100, save_model=run)) == 0
    assert evaluations(run)[-1]["val_accuracy"] == 1
    weights = load_file(run / "adapter_model.safetensors")
    assert sum(value.numel() for value in weights.values()) < 30000
    assert not (run / "model.safetensors").exists()
    assert train(*flags(**settings, max_steps=100, save_model=merged), "--merge_lora") == 0
    assert not (merged / "adapter_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(run)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    config = AutoConfig.from_pretrained(run / "model_config.json")
    with torch.no_grad():
        base = AutoModelForSequenceClassification.from_pretrained(gpt, config=config)
        by_peft = PeftModel.from_pretrained(base, run).eval()(**inputs).logits
        by_auto = (
            AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=3, pad_token_id=config.pad_token_id)
            .eval()(**inputs)
            .logits
        )
        whole = AutoModelForSequenceClassification.from_pretrained(merged).eval()(**inputs).logits
    torch.testing.assert_close(by_auto, by_peft)
    torch.testing.assert_close(whole, by_peft, atol=1e-4, rtol=1e-4)
    predicted = [config.id2label[int(index)] for index in by_peft.argmax(-1)]
    assert predicted == [row["label"] for row in rows]
    assert predict(run, "--input", data, "--output", tmp_path / "predictions.jsonl") == 0
    assert [row["label"] for row in read_lines(tmp_path / "predictions.jsonl")] == predicted * 5
    for folder in (run, merged):
        capsys.readouterr()
        assert train(run / "recipe.yaml", "--eval_only", "--load_model", folder) == 0
        assert "accuracy 1.0000" in capsys.readouterr().out


def test_lora_resumes_bit_for_bit_and_generates(tmp_path, gpt, capsys):
    settings = flags(
        model="gpt", task="instruction", init_from=gpt, max_len=64, batch_size=8, learning_rate=1e-2, max_steps=20
    )
    settings += flags(
        train_file=write_instructions(tmp_path / "a.jsonl"),
        save_model=tmp_path / "run",
        r=4,
        save_freq=10,
        lora_dropout=0.1,
    )
    settings += ["--target_modules", "c_attn", "c_fc", "--gradient_checkpointing"]
    assert train(*settings) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, other)
    (other / "adapter_model.safetensors").unlink()
    shutil.rmtree(other / "checkpoint-20")
    assert train(run / "recipe.yaml", "--init_from", "resume", "--save_model", other) == 0
    for name in ("adapter_model.safetensors", "checkpoint-20/trainer_state/optimizer.safetensors"):
        assert (other / name).read_bytes() == (run / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(run)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    capsys.readouterr()
    prompt = "say anna, the oslo of"
    assert generate(run, "--prompt", prompt, "--temperature", 0, "--max_new_tokens", 5) == 0
    assert capsys.readouterr().out.startswith("say anna")
    # a new run that starts from an adapter trains the whole model
    settings = {"model": "gpt", "task": "instruction", "init_from": run, "max_len": 64, "max_steps": 2}
    assert train(*flags(**settings, train_file=tmp_path / "a.jsonl", save_model=tmp_path / "next")) == 0
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "next")).__name__ == "GPT2LMHeadModel"


def test_settings_that_lora_cannot_use_are_refused(tmp_path, gpt, capsys):
    settings = flags(
        train_file=write_instructions(tmp_path / "a.jsonl"),
        max_len=64,
        max_steps=2,
        task="instruction",
        save_model=tmp_path / "run",
    )
    for more, message in (
        (flags(tokenizer=BPE, r=4, **GPT), "lora needs a trained model to add to; give --init_from"),
        (flags(init_from=gpt, lora_alpha=4), "lora_alpha has no effect without r; set it too"),
        (flags(init_from=gpt, r=4, target_modules="q_proj"), "lora: Target modules"),
        (flags(init_from=gpt, r=4, add_tokens="<x>"), "add_tokens needs trained embeddings"),
        (
            flags(init_from=gpt, r=4, vocab_size=400),
            "lora leaves the embeddings as they are, and the model lacks 108 rows",
        ),
        (flags(init_from=gpt, r=4, target_modules="wte"), "lora: transformer.wte shares its weight with another"),
        (flags(init_from=gpt, lora_dropout=0.1), "lora_dropout has no effect without r"),
        ((*flags(init_from=gpt), "--merge_lora"), "merge_lora has no effect without r"),
    ):
        assert train(*settings, *more) == 2
        assert message in capsys.readouterr().err
    assert train(*settings, *flags(init_from=gpt, r=4)) == 0
    run = tmp_path / "run"
    assert train(*settings, *flags(init_from=run, r=4), "--save_model", tmp_path / "second") == 2
    assert "is an adapter itself: make a whole model of it first" in capsys.readouterr().err
    assert train(run / "recipe.yaml", "--init_from", "resume", "--max_steps", 4, "--r", 8, "--allow_changed") == 2
    assert "LoRA has other settings there: r was 4 and is 8" in capsys.readouterr().err
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert train(run / "recipe.yaml", "--eval_only", "--load_model", run) == 2
    assert "names it as base_model_name_or_path, and can be changed there" in capsys.readouterr().err


def test_lora_for_questions_reads_both_texts_and_resumes(tmp_path):
    """peft's own class for questions drops the token types, which separate question and text."""
    settings = {
        "model": "bert",
        "task": "question_answering",
        **BERT,
        "max_len": 48,
        "batch_size": 8,
        "tokenizer": WORDPIECE,
    }
    settings |= {
        "train_file": write_questions(tmp_path / "a.json", 60, 0),
        "val_file": write_questions(tmp_path / "b.json", 9, 1),
    }
    assert train(*flags(**settings, max_steps=6, save_model=tmp_path / "base")) == 0
    for name in (*BERT, "tokenizer"):
        del settings[name]
    settings |= {"init_from": tmp_path / "base", "r": 4, "learning_rate": 1e-2, "save_freq": 5}
    assert train(*flags(**settings, max_steps=10, save_model=tmp_path / "run")) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoint-10")
    (other / "adapter_model.safetensors").unlink()
    assert train(run / "recipe.yaml", "--init_from", "resume", "--save_model", other) == 0
    assert (other / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    assert train(*flags(**settings, max_steps=10, save_model=tmp_path / "merged"), "--merge_lora") == 0
    assert evaluations(tmp_path / "merged")[-1] == evaluations(run)[-1]
    tokenizer = AutoTokenizer.from_pretrained(run)
    inputs = tokenizer("how many sheep?", "anna has 12 sheep.", return_tensors="pt")
    base = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(base, run).eval()(**inputs)
        whole = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()(**inputs)
    torch.testing.assert_close(by_peft.start_logits, whole.start_logits, atol=1e-5, rtol=1e-4)


def test_lora_on_all_modules_trains_the_whole_head(tmp_path, entities_run):
    settings = {
        "model": "bert",
        "task": "token_classification",
        "init_from": entities_run / "run",
        "max_len": 16,
        "max_steps": 3,
    }
    settings |= {
        "train_file": entities_run / "train.conll",
        "val_file": entities_run / "val.conll",
        "save_model": tmp_path / "run",
    }
    assert train(*flags(**settings, r=2, target_modules="all-linear")) == 0
    names = set(load_file(tmp_path / "run" / "adapter_model.safetensors"))
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= names
    assert not any("classifier.lora" in name for name in names)
    assert predict(tmp_path / "run", "--input", entities_run / "val.conll", "--output", tmp_path / "out.jsonl") == 0
    # a head for other labels, which only the adapter has
    for count, name in ((9, "other"), (8, "val")):
        (tmp_path / f"{name}.conll").write_text("anna B-X\nrome B-Y\n\noslo O\nlima I-Y\n\n" * count)
    settings |= {
        "train_file": tmp_path / "other.conll",
        "val_file": tmp_path / "val.conll",
        "save_model": tmp_path / "other",
    }
    assert train(*flags(**settings, r=2)) == 0
    assert predict(tmp_path / "other", "--input", tmp_path / "other.conll", "--output", tmp_path / "out.jsonl") == 0
    assert set(read_lines(tmp_path / "out.jsonl")[0]["labels"]) <= {"B-X", "B-Y", "I-Y", "O"}


def test_a_sample_does_not_change_what_is_saved(tmp_path, gpt):
    settings = flags(model="gpt", task="instruction", init_from=gpt, max_len=64, r=4, max_steps=3)
    settings += flags(train_file=write_instructions(tmp_path / "a.jsonl"), eval_freq=2, save_freq=1)
    for name, more in (("sampled", flags(start_context="say", max_new_tokens=3)), ("silent", [])):
        assert train(*settings, *more, "--save_model", tmp_path / name) == 0
    configs = [(tmp_path / name / "generation_config.json").read_text() for name in ("sampled", "silent")]
    assert configs[0] == configs[1]
    assert json.loads(configs[0])["eos_token_id"] is not None


def test_resuming_merges_the_model_again(tmp_path, gpt):
    settings = flags(model="gpt", task="instruction", init_from=gpt, max_len=64, r=4, save_model=tmp_path / "run")
    settings += [
        *flags(train_file=write_instructions(tmp_path / "a.jsonl"), max_steps=3, learning_rate=1e-2),
        "--merge_lora",
    ]
    assert train(*settings) == 0
    weights, run = (tmp_path / "run" / "model.safetensors").read_bytes(), tmp_path / "run"
    shutil.copy(gpt / "model.safetensors", run / "model.safetensors")  # a model of another step
    assert train(run / "recipe.yaml", "--init_from", "resume") == 0
    assert (run / "model.safetensors").read_bytes() == weights


def test_lora_for_masked_lm_needs_its_head(tmp_path, capsys):
    text = write_lines(
        tmp_path / "text.jsonl", [{"text": f"{name} sees {place}"} for name in NAMES for place in PLACES]
    )
    settings = {"model": "bert", "train_file": text, "max_len": 16, "max_steps": 4, "val_fraction": 0.2}
    assert train(*flags(**settings, **BERT, tokenizer=WORDPIECE, save_model=tmp_path / "mlm")) == 0
    assert train(*flags(**settings, init_from=tmp_path / "mlm", r=2, save_model=tmp_path / "run")) == 0
    loss = evaluations(tmp_path / "run")[-1]["val_loss"]
    capsys.readouterr()
    assert train(tmp_path / "run" / "recipe.yaml", "--eval_only", "--load_model", tmp_path / "run") == 0
    assert f"validation loss {loss:.4f}" in capsys.readouterr().out
    pairs = {"model": "bert", "task": "mlm_nsp", "train_file": text, "max_len": 16, "max_steps": 4, "document": "line"}
    assert train(*flags(**pairs, init_from=tmp_path / "mlm", r=2, save_model=tmp_path / "pairs")) == 2
    assert "lora needs a model that has the head of task mlm_nsp" in capsys.readouterr().err
