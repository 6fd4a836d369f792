"""Transcripts and chat templates: what Transformers offers templates, and what becomes a control token."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grok_local
from grok_local.errors import ModelError, OptionError, TemplateError
from grok_local.runtime.text.forms import DEFAULT_SYSTEM, Message, Template, Transcript
from samples.rewritten import CHATML, rewritten

NAMES = ["<|im_start|>", "<|im_end|>", "</s>"]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def text_of(form: Template | Transcript, *messages: Message) -> str:
    return "".join(text for text, _ in form.render(messages))


def test_a_transcript() -> None:
    messages = [{"role": "system", "content": "Be kind."}, user(" Hi "), assistant("Hello"), user("Who?")]
    assert text_of(Transcript(), *messages) == (
        "Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant:"
    )
    assert text_of(Transcript(), user("Hi")).startswith(DEFAULT_SYSTEM + "\n\nHuman: Hi")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "Hi"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
        ("{{ [1] | tojson(indent=2) }}", json.dumps([1], indent=2)),
        ("{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}none", "none"),
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>Hi</s>"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # blocks take their line with them
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% if strftime_now is defined %}yes{% endif %}", "yes"),
    ],
)
def test_what_transformers_offers(source: str, shown: str) -> None:
    form = Template(source, tokens={"bos_token": "<s>", "eos_token": "</s>"})
    assert text_of(form, user("Hi")) == shown


def test_the_date_is_that_of_the_first_message(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Template("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}")
    first = text_of(form, user("Hi"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", first)
    later = time.localtime(time.time() + 86400)
    monkeypatch.setattr(time, "localtime", lambda *_: later)
    assert text_of(form, user("Hi"), assistant("Hello"), user("Who?")) == first
    assert text_of(form, user("Hi")) == time.strftime("%Y-%m-%d %H:%M:%S", later)


def test_templates_that_refuse() -> None:
    with pytest.raises(TemplateError, match="must alternate"):
        Template("{{ raise_exception('roles must alternate') }}").render([user("x")])
    with pytest.raises(ModelError, match="cannot be read"):
        Template("{% if %}")
    with pytest.raises(TemplateError):
        Template("{{ ''.__class__.__mro__[1].__subclasses__() }}").render([user("x")])


def test_a_text_that_leaves_no_mark_to_use() -> None:
    everything = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(TemplateError, match="private use"):
        Template(CHATML, control=lambda: NAMES).render([user(everything + NAMES[0])])


@pytest.mark.parametrize(
    "begins", ["{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", ""]
)
def test_a_template_without_a_system_role_gets_its_text_before_the_question(begins: str) -> None:
    """Whether it refuses the role or leaves it out in silence."""
    loop = "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    form = Template(begins + loop)
    system = {"role": "system", "content": "Be brief."}
    assert text_of(form, system, user("Hi"), assistant("Yes"), user("Who?")) == (
        "user:Be brief.\n\nHi;assistant:Yes;user:Who?;"
    )
    assert [note for note in form.notes if "no system role" in note] == form.notes != []
    if begins:
        with pytest.raises(TemplateError, match="no system role"):
            form.render([system])


PIECES = st.sampled_from([*NAMES, "<|im_", "a", " ", "\n", "é", "\ue000", "|>"])


@given(contents=st.lists(st.lists(PIECES, max_size=8), min_size=3, max_size=3))
def test_nothing_that_was_typed_becomes_a_control_token(contents: list[list[str]]) -> None:
    texts = ["".join(content) for content in contents]
    messages = [user(texts[0]), assistant(texts[1]), user(texts[2])]
    segments = Template(CHATML, control=lambda: NAMES).render(messages)
    plain = Template(CHATML).render(messages)
    assert "".join(text for text, _ in segments) == "".join(text for text, _ in plain)
    special = "".join(text if may else "\0" for text, may in segments)
    assert re.findall("|".join(map(re.escape, NAMES)), special) == (
        ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>"]
    )


def test_a_template_that_looks_at_a_control_tokens_name_still_finds_it() -> None:
    source = (
        "{% for m in messages %}{{ m.content.split('</s>')[-1] if m.role == 'assistant' else m.content }};{% endfor %}"
    )
    form = Template(source, control=lambda: NAMES)
    messages = [user("a"), assistant("thought</s>said"), user("b</s>")]
    assert text_of(form, *messages) == "a;said;b</s>;"
    assert not any("</s>" in text for text, may in form.render(messages) if may)


def chatting(path: Path, **options: object) -> grok_local.Model:
    return grok_local.load(path, context=256, threads=2, **options)  # type: ignore[arg-type]


def prompt(model: grok_local.Model) -> str:
    return model.detokenize(model.chat([user("Hi")], max_tokens=1).prompt)


def test_which_template_is_taken(packed: Path, tmp_path: Path) -> None:
    named = {
        "tokenizer.chat_templates": ["rag", "default"],
        "tokenizer.chat_template.rag": "R{{ messages[0].content }}",
    }
    keys = {"tokenizer.chat_template": "D{{ messages[0].content }}", **named}
    path, file = rewritten(packed, tmp_path / "x.gguf", keys=keys), tmp_path / "t.jinja"
    file.write_text("\ufeffF{{ messages[0].content }}", encoding="utf-8")
    for template, shown in ((None, "DHi"), ("rag", "RHi"), (file, "FHi"), ("none", f"{DEFAULT_SYSTEM}\n\nHuman: Hi")):
        with chatting(path, template=template) as model:
            assert prompt(model).startswith(shown)
    with chatting(path, template="nowhere") as model, pytest.raises(OptionError, match="none, default, rag"):
        prompt(model)
    only = rewritten(packed, tmp_path / "y.gguf", keys={**named, "tokenizer.chat_templates": ["rag"]})
    with chatting(only) as model:
        assert prompt(model) == "RHi"
    empty = rewritten(packed, tmp_path / "z.gguf", keys={"tokenizer.chat_template": " "})
    with chatting(empty) as model:
        assert prompt(model).endswith("Assistant:")


def test_a_template_that_cannot_be_read_costs_a_note(packed: Path, tmp_path: Path) -> None:
    path = rewritten(packed, tmp_path / "x.gguf", keys={"tokenizer.chat_template": "{% if %}"})
    with chatting(path) as model:
        assert "".join(model.generate("Hi", max_tokens=2, temperature=0))
        reply = model.chat([user("Hi")], max_tokens=1)
        assert model.detokenize(reply.prompt).endswith("Human: Hi\n\nAssistant:")
        assert "cannot be read" in reply.notes[0]


PARTED = "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
FIRST_PART = "{% for m in messages %}[{{ m.content[0]['text'] }}]{% endfor %}"
CHECKED = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}({{ c.text }}){% endif %}{% endfor %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("source", [PARTED, FIRST_PART, CHECKED])
def test_templates_that_take_contents_in_parts(source: str) -> None:
    text = text_of(Template(source), user("What is it?"), assistant("A test."), user(" And this? "))
    assert all(words in text for words in ("What is it?", "A test.", "And this?"))


def test_control_tokens_in_parts_are_told_apart_too() -> None:
    form = Template(PARTED, control=lambda: NAMES)
    segments = form.render([user("a </s> b")])
    assert "".join(text for text, _ in segments) == "<user>a </s> b"
    assert not any("</s>" in text for text, special in segments if special)


@pytest.mark.parametrize("source", ["no messages", "{{ messages[0].content }}"])
def test_a_template_that_leaves_the_question_out_costs_a_note(source: str) -> None:
    form, messages = Template(source), [user("first"), assistant("x"), user("second")]
    form.render(messages)
    form.render(messages)
    assert form.notes == form.notes_on(messages)
    assert ["leaves out what is asked" in note for note in form.notes] == [True]


def test_a_template_may_change_the_question() -> None:
    shouting = Template("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert text_of(shouting, user("who?")) == "WHO?"
    assert text_of(Template("{% for m in messages %}{{ m.content }}{% endfor %}x"), user("  ")) == "  x"


@pytest.mark.parametrize("source", ["{{ 'a' * 10 ** 10 }}", "{{ [1] * 10 ** 9 }}", "{{ 9 ** 9 ** 9 }}"])
def test_no_template_gets_all_memory_by_multiplying(source: str) -> None:
    with pytest.raises(TemplateError, match="more than a template may make"):
        Template(source).render([user("x")])


def test_small_products_are_left_alone() -> None:
    assert text_of(Template("{{ '-' * 3 }}{{ 70000 * 70000 }}{{ 2 ** 10 }}{{ messages[0].content }}"), user("x")) == (
        "---49000000001024x"
    )


def test_what_a_generation_block_sets_ends_with_it() -> None:
    source = "{% generation %}{% set x = 'inside' %}{{ x }}{% endgeneration %}{{ x }}{{ messages[0].content }}"
    assert text_of(Template(source), user("!")) == "inside!"


def test_a_date_without_a_layout_is_named() -> None:
    with pytest.raises(TemplateError, match="strftime_now"):
        Template("{{ strftime_now() }}").render([user("x")])
