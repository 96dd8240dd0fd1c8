"""The shapes of rows for instruction tuning, columns by other names, and templates of several columns."""

import json

import pytest
from conftest import train
from launching import ROOT
from tokenizers.processors import TemplateProcessing

from hf_myllm.data import tokenizer
from hf_myllm.data.columns import BadRowError, check_template, fill_template, template_columns
from hf_myllm.data.sources import file_source, in_memory_source
from hf_myllm.errors import DataError
from hf_myllm.tasks.instruction import Instruction
from hf_myllm.tasks.labelled_rows import load_rows
from hf_myllm.tasks.row_shapes import read_shape
from hf_myllm.tasks.seq2seq import Seq2Seq


def form(turn, before="", prompt="", end=""):
    """Return a chat template of this form, as an expression for each turn `m`."""
    prompt = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}" if prompt else ""
    return f"{before}{{% for m in messages %}}{turn}{{% endfor %}}{prompt}{end}"


def by_role(user, assistant):
    return f"{{% if m.role == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"


BOS = "{{ bos_token }}"
CHATML = form("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", prompt="<|im_start|>assistant\n")
# The forms of the most used chat models: the template, the text that ends a turn of the assistant, and how often a chat
# of two questions and answers has the beginning of text.
FORMS = {
    "chatml": (CHATML, "<|im_end|>\n", 0),
    "llama2": (form(by_role(BOS + "[INST] {{ m.content }} [/INST]", " {{ m.content }} </s>"), ""), " </s>", 2),
    "llama3": (
        form(
            "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>",
            BOS,
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "<|eot_id|>",
        1,
    ),
    "mistral": (form(by_role("[INST] {{ m.content }}[/INST]", " {{ m.content }}</s>"), BOS), "</s>", 1),
    "gemma": (
        form(
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n",
            BOS,
            "<start_of_turn>model\n",
        ),
        "<end_of_turn>\n",
        1,
    ),
    "phi": (
        form(
            "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n",
            prompt="<|assistant|>\n",
            end="{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ),
        "<|end|>\n",
        0,
    ),
    "zephyr": (form("<|{{ m.role }}|>\n{{ m.content }}</s>\n", prompt="<|assistant|>\n"), "</s>\n", 0),
    "deepseek": (form(by_role("<|User|>{{ m.content }}<|Assistant|>", "{{ m.content }}</s>"), BOS), "</s>", 1),
    "vicuna": (form(by_role("USER: {{ m.content }} ASSISTANT:", " {{ m.content }}</s>"), BOS), "</s>", 1),
    "command": (
        form(
            "<|START|><|{{ m.role }}|>{{ m.content }}<|END|>",
            BOS,
            "<|START|><|assistant|>",
        ),
        "<|END|>",
        1,
    ),
}
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>", "<|user|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|assistant|>", "<|User|>", "<|Assistant|>", "<|START|>", "<|END|>"),
)
QUESTION, ANSWER = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
SHAPES = {  # the same chat in every shape
    "chats (turns of role and content)": [
        {"messages": [QUESTION, ANSWER]},
        {"conversations": [QUESTION, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"text": "2 + 2?"}]}, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER]), "prompt": "What is 2 + 2?"},
    ],
    "ShareGPT (turns of from and value)": [
        {"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversation": [{"from": "user", "value": "What is 2 + 2?"}, {"from": "Assistant", "value": "4"}]},
    ],
    "Alpaca (instruction, input, output)": [
        {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
        {"instruction": "What is 2 + 2?", "output": "4"},
    ],
}


@pytest.mark.parametrize(("shape", "record"), [(shape, record) for shape in SHAPES for record in SHAPES[shape]])
def test_every_shape_is_the_same_chat(shape, record):
    assert read_shape(record, "row 1", CHATML) == (shape, {"messages": [QUESTION, ANSWER]})


def test_what_stands_beside_the_turns():
    system = {"role": "system", "content": "Be brief."}
    _, row = read_shape({"conversations": [{"from": "human", "value": "a"}], "system": "Be brief."}, "", CHATML)
    assert row["messages"] == [system, {"role": "user", "content": "a"}]
    alpaca = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief.", "history": [["a", "b"]]}
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Add.\n\n2, 2"), ("assistant", "4")]
    _, row = read_shape(alpaca, "", CHATML)
    assert row["messages"] == [{"role": role, "content": content} for role, content in turns]
    _, row = read_shape({"instruction": "Add.", "input": "2, 2", "output": "4"}, "", "")  # no chat template
    assert row == {
        "prompt": "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n",
        "completion": "4",
    }


def test_calls_of_tools():
    """Arguments that are JSON text become an object, which templates write as JSON once."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": [2, 2]}'}}
    turns = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    template = CHATML + "{{ tool_calls }}"
    messages = read_shape({"messages": turns}, "", template)[1]["messages"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"x": [2, 2]}}
    assert messages[1]["content"] == ""
    turns = [
        {"from": "human", "value": "What is 2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": [2, 2]}}'},
        {"from": "observation", "value": "4"},
    ]
    messages = read_shape({"conversations": turns}, "", template)[1]["messages"]
    assert messages[1]["tool_calls"] == [{"name": "add", "arguments": {"x": [2, 2]}}]
    assert messages[2] == {"role": "tool", "content": "4"}
    messages = read_shape({"conversations": turns}, "", CHATML)[1]["messages"]  # a template without calls
    assert messages[1] == {"role": "assistant", "content": turns[1]["value"]}
    messages = read_shape({"conversations": turns}, "", CHATML + "{{ 'observation' }}")[1]["messages"]
    assert messages[2]["role"] == "observation"  # the template has a form of its own for it


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": "b"}, "row 1 has neither messages, .*'question', 'answer'; name its columns"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "row 1, turn 1: the role 'narrator' is unknown; use"),
        ({"conversations": [{"from": "human"}]}, "row 1, turn 1 has no content of text"),
        ({"messages": [{"content": "a"}]}, "row 1, turn 1 has no role of text"),
        ({"messages": "a"}, "row 1: messages is not a list of turns"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "row 1, turn 1 has a part of type 'image_url'; only text",
        ),
        ({"messages": [QUESTION | {"tool_calls": [{"function": {"arguments": "{"}}]}]}, "arguments .* are not JSON"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "row 1: column 'input' does not hold text"),
        ({"instruction": "a", "output": ""}, "row 1 has no output"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "row 1: history is not a list of pairs"),
    ],
)
def test_rows_that_cannot_be_read(record, message):
    with pytest.raises(BadRowError, match=message):
        read_shape(record, "row 1", CHATML)


@pytest.fixture(scope="module")
def llama():
    """A tokenizer that begins texts with <s>, as Llama's does."""
    trained = tokenizer.train_bpe(["user assistant What is 2 + 2? USER: ASSISTANT: [INST]\n\n"] * 9, 300)
    trained.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": list(SPECIAL)})
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", trained.bos_token_id)])
    trained.backend_tokenizer.post_processor = template
    return trained


@pytest.mark.parametrize("name", FORMS)
def test_chats_are_as_the_template_means(llama, name):
    """As many beginnings of text as the template has, each turn of the assistant learned with the token that ends it,
    and nothing added to a chat that ends with one."""
    llama.chat_template, end, num_bos = FORMS[name]
    chat = [QUESTION, ANSWER, {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "6"}]
    task = Instruction(llama, max_len=200)
    example = task.parse({"messages": chat}, "row 1")
    ((row,), _) = task.example_rows(example, task.tokenize([example])[0])
    expected = llama.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert row["input_ids"] == expected
    assert row["input_ids"].count(llama.bos_token_id) == num_bos
    learned = [token for token, is_learned in zip(row["input_ids"], row["labels"], strict=True) if is_learned]
    space = " " if end.startswith(" ") or name in ("mistral", "vicuna") else ""
    assert llama.decode(learned) == f"{space}4{end}{space}6{end}" + ("</s>" if name == "phi" else "")


def test_the_rows_in_the_docs_are_trained_as_shown(tmp_path):
    """docs/row_shapes.md has a row of each shape, and below it what `--dry_run` shows."""
    page = (ROOT / "docs" / "row_shapes.md").read_text(encoding="utf-8")
    lines = page.split("as `--dry_run` shows it")[1].split("```")[1].strip().splitlines()
    call = "{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    template = form(
        f"<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}{call}<|im_end|>\n", "", "<|im_start|>assistant\n"
    )
    bpe = tokenizer.train_bpe([page], 300)
    bpe.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert len(lines) == 14
    for number, (row, shown) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        bpe.chat_template = template if number < 5 else None
        (tmp_path / f"{number}.jsonl").write_text(row)
        task = Instruction(bpe, max_len=200, packing="pad")
        rows, _ = load_rows(file_source(str(tmp_path / f"{number}.jsonl")), task)
        batch = task.batch(task.make_rows(rows, "a"), [0])
        assert task.describe_target(batch, 0) == shown.strip()


# ---- columns and templates


def test_a_template_makes_text_of_columns():
    row = {"q": "How?", "n": 3, "none": None, "translation": {"en": "house"}, "list": [1]}
    assert fill_template(row, "row 1", "Q: {q}\n{{{n}}} {none}{translation.en}") == "Q: How?\n{3} house"
    assert template_columns("{q} {translation.en} {{x}}") == ["q", "translation.en", "translation"]
    for template, message in (("{x}", "row 1 has no column 'x', but 'q'"), ("{list}", "holds neither text nor a num")):
        with pytest.raises(DataError, match=message):
            fill_template(row, "row 1", template)
    for template, message in (("{q", "'{' stands alone"), ("q}", "'}' stands alone"), ("plain", "names no column")):
        with pytest.raises(DataError, match=message):
            check_template(template)


@pytest.fixture
def questions(tmp_path):
    rows = [{"q": f"How many is {n}?", "a": f"It is {n}.", "n": n} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "a.jsonl"


def test_columns_and_templates_give_the_same_rows(questions):
    bpe = tokenizer.train_bpe([questions.read_text()], 300)

    def rows(**settings):
        data, _ = load_rows(in_memory_source(str(questions), "a"), Instruction(bpe, max_len=64, **settings))
        return [bpe.decode(data.read(index)[0]) for index in range(len(data))], data.stats["shapes"]

    by_columns, shapes = rows(columns={"prompt": "q", "completion": "a"})
    assert by_columns[3] == "How many is 3?It is 3.<|endoftext|>"
    assert shapes == {"prompts with completions": 40}
    assert rows(template={"prompt": "{q}", "completion": "It is {n}."})[0] == by_columns
    assert rows(columns={"completion": "a"}, template={"prompt": "{q}"})[0] == by_columns


def test_sources_and_targets_of_columns_and_templates(questions):
    task = Seq2Seq(None, columns={"target": "a"}, template={"source": "Question: {q}"})
    (_, record) = next(task.read(in_memory_source(str(questions), "a")))
    example = task.parse(record, "row 1")
    assert (example["source"], example["target"]) == ("Question: How many is 0?", "It is 0.")
    task.reads_labels = False  # predictions need no targets
    del record["a"]
    assert task.parse(record, "row 1")["source"] == "Question: How many is 0?"
    (questions.parent / "lines.txt").write_text("Question: How many is 5?\n")
    ((_, line),) = task.read(file_source(str(questions.parent / "lines.txt")))
    assert task.parse(line, "row 1")["source"] == "Question: How many is 5?"


def test_text_of_a_template_is_trained_on(tiny, tmp_path, questions, capsys):
    other = tmp_path / "b.jsonl"
    other.write_text(json.dumps({"q": "What is left? " * 20, "a": "The rest. " * 20}))
    flags = tiny(train_file=questions, template="Q: {q}\nA: {a}", text_column=None, max_steps=2, start_context=None)
    assert train(*flags, "--val_file", other) == 0
    expected = sum(len(f"Q: How many is {n}?\nA: It is {n}.") for n in range(40))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["training"]["bytes"] == expected
    for changed, message in (
        ({"template": "{q"}, "template: '{' stands alone; write {{"),
        ({"template": "{q} {x}"}, "line 1 has no column 'x', but 'q', 'a', 'n'"),
        ({"template": "{prompt: '{q}'}"}, "template: task causal cannot use"),
        ({"columns": "{prompt: q}"}, "columns: task causal has no column 'prompt'; use text_column"),
    ):
        capsys.readouterr()
        flags = tiny(train_file=questions, max_steps=2, save_model=tmp_path / "other", **changed)
        assert train(*flags) == 2
        assert message in capsys.readouterr().err
