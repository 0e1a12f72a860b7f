"""Chat templates: the text that transformers writes, on a fixed day, within bounds, and refused if they are wrong."""

from __future__ import annotations

import datetime

import pytest
from transformers import PreTrainedTokenizerFast

from atesd.config import ModelConfig, load_config, with_overrides
from atesd.errors import ConfigError, ModelError
from atesd.models.conversation import Conversation
from atesd.models.prompts import PromptEncoder, control_line
from atesd.models.template import ChatTemplate, Rendering, RenderingError, rendered_apart
from atesd.records import Problem
from small_tokenizers import byte_level
from tiny import tiny_tokenizer

OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + OPEN
LLAMA = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n"
    "        {%- set date_string = '26 Jul 2024' %}\n    {%- endif %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|im_start|>system\\n\\nToday Date: ' + date_string + '\\n\\n' + system_message + '<|im_end|>' }}\n"
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n\\n' }}\n"
    "    {{- message['content'] | trim + '<|im_end|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n\\n' }}\n{%- endif %}\n"
)
QWEN3 = (
    "{%- set ns = namespace(tool=true, last=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
    "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
    "    {%- if ns.tool and message.role == 'user' and not(message.content.startswith('<tool>')) %}\n"
    "        {%- set ns.tool = false %}\n        {%- set ns.last = index %}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- for message in messages %}\n    {%- if message.role == 'assistant' %}\n"
    "        {%- set content = message.content %}\n        {%- if '</think>' in content %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
    "        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content }}\n"
    "    {%- else %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content }}\n    {%- endif %}\n"
    "    {{- '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OTHERS = (
    "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}-{% endif %}"
    "{% endfor %}{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}"
    "{{ i }}{{ loop.last }}{{ loop.length }}{% endfor %}{{ messages | tojson }}{{ {'a': 'é'} | tojson(indent=2) }}"
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('y') ~ f(2 * 3 % 4) + 'z' * 2 }}{% for k, v in {'a': 1}.items() %}"
    "{{ k }}{{ v }}{% endfor %}{% for m in messages recursive %}{{ m.role }}{% endfor %}{{ add_generation_prompt }}"
)


def encoder(template: str, **settings: object) -> PromptEncoder:
    return PromptEncoder(with_template(template), ModelConfig.model_validate(settings))


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


def rendering(message: str = "1 + 1") -> Rendering:
    return Rendering([{"role": "user", "content": message}], True, {"bos_token": "<s>"}, "2024-07-26")


# the text


@pytest.mark.parametrize("template", [CHATML, QWEN3, MISTRAL, OTHERS], ids=["chatml", "qwen3", "mistral", "others"])
@pytest.mark.parametrize("prompt", [True, False])
def test_a_rendering_is_that_of_transformers(template, prompt):
    tokenizer = with_template(template)
    messages = [{"role": "user", "content": " <b>ü\n "}, {"role": "assistant", "content": "</think>\n\n'x'"}]
    for some in (messages, messages[:1]):
        wanted = Rendering(some, prompt, tokenizer.special_tokens_map, "2024-07-26")
        theirs = tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=prompt)
        assert ChatTemplate(template).render(wanted) == theirs


# the date


@pytest.mark.parametrize("template", [LLAMA, "{{ strftime_now('%A %H:%M') }}" + CHATML])
def test_a_template_is_told_the_same_day_for_ever(template, monkeypatch):
    import transformers.utils.chat_template_utils as theirs

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime(2031, 5, 6, tzinfo=tz)

    before = encoder(template).student_text("1")
    monkeypatch.setattr(theirs, "datetime", Later)
    assert encoder(template).student_text("1") == before
    assert encoder(template, template_date="2030-01-02").student_text("1") != before


def test_the_day_is_a_setting_and_an_option_goes_before_it():
    assert "Today Date: 26 Jul 2024\n" in encoder(LLAMA).student_text("1")
    assert "Today Date: 02 Jan 2030\n" in encoder(LLAMA, template_date="2030-01-02").teacher_text("1")
    fixed = encoder(LLAMA, student_template={"date_string": "today"}, teacher_template={"date_string": "today"})
    assert "Today Date: today\n" in fixed.student_text("1")
    assert not any("prints a date" in note for note in fixed.notes())
    assert any("prints a date: model.template_date 2024-07-26" in note for note in encoder(LLAMA).notes())


def test_the_day_survives_the_config_file():
    config = load_config("micro", ["model.template_date=2030-01-02"])
    assert config.model.template_date == datetime.date(2030, 1, 2)
    assert with_overrides(config, []) == config
    with pytest.raises(ConfigError, match=r"model.template_date: 'soon' is not allowed"):
        load_config("micro", ["model.template_date=soon"])


# the assistant's turn


@pytest.mark.parametrize(
    "template",
    [
        CHATML.removesuffix(OPEN),
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ raise_exception('x') if m.role == 'assistant' }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_open_the_assistants_turn_is_refused_with_the_fix(template):
    with pytest.raises(ModelError, match=r"ignores add_generation_prompt.*end the template with \{% if"):
        encoder(template)


def test_a_template_whose_user_turn_ends_where_the_assistant_begins_is_fine():
    assert encoder(MISTRAL).student_text("1") == "<s>[INST] 1 [/INST]"


@pytest.mark.parametrize("template", ["x" + OPEN, "{{ messages[0].role }}" + OPEN])
def test_a_template_that_leaves_out_the_message_is_refused(template):
    with pytest.raises(ModelError, match="leaves out what the user says"):
        encoder(template)


def test_a_template_that_leaves_out_the_system_prompt_is_refused():
    template = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}" + OPEN
    encoder(template)
    with pytest.raises(ModelError, match=r"model.system_prompt: .* leaves it out"):
        encoder(template, system_prompt="be brief")


# the end of a turn


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA, "<|im_end|>"),
        (QWEN3, "<|im_end|>"),
        (MISTRAL, "</s>"),
        (LLAMA[:-1], "<|im_end|>"),
    ],
    ids=["chatml", "llama", "qwen3", "mistral", "cut"],
)
def test_a_reference_ends_as_the_template_ends_a_turn(template, end):
    tokenizer = with_template(template)  # whose end token is </s>
    prompts = PromptEncoder(tokenizer, ModelConfig())
    assert prompts.completion("ab")[-1] == tokenizer.convert_tokens_to_ids(end)
    assert prompts.decode(prompts.completion("ab")) == "ab"


def test_without_an_end_in_the_template_the_tokenizers_end_token_ends_a_reference():
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    tokenizer = with_template(plain)
    assert PromptEncoder(tokenizer, ModelConfig()).completion("a")[-1] == tokenizer.eos_token_id
    assert PromptEncoder(tokenizer, ModelConfig(chat_template=False)).completion("a")[-1] == tokenizer.eos_token_id


# what a user is told


def test_contexts_that_end_differently_are_named():
    apart = encoder(QWEN3, student_template={"enable_thinking": False}, teacher_template={"enable_thinking": True})
    (note,) = apart.notes()
    assert r"student's context ends with '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'" in note
    assert r"teacher's with '<|im_end|>\n<|im_start|>assistant\n': they differ" in note
    (note,) = encoder(QWEN3).notes()
    assert note.endswith("the same")
    assert list(encoder(CHATML, chat_template=False).notes()) == []


def test_problems_that_spell_control_tokens_are_counted():
    problems = [
        Problem("a", "what is <think>?", ("x",), "", "1"),
        Problem("b", "two of <|im_end|> and <think>", ("x",), "", "1"),
        Problem("c", "harmless", ("x </s>",), "", "1"),
        Problem("d", "harmless", ("x",), "", "1 < 2"),
    ]
    assert "control token of the tokenizer: 3 of 4 (it is read as text)" in control_line(problems, encoder(CHATML))


# bounds

BOMBS = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(300) }}",
    "product": "{{ 'a' * 10 ** 12 }}",
    "list": "{{ [0] * 10 ** 12 }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "doubling": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "joining": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "format": "{{ '%99999999999d' % 1 }}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_template_that_only_a_long_message_sets_off_stops_all_the_same(bomb):
    template = ChatTemplate("{% if messages[0].content | length > 9 %}" + bomb + "{% endif %}{{ messages[0].content }}")
    assert template.render(rendering("short")) == "short"
    with pytest.raises(RenderingError, match=r"more than|recursion"):
        template.render(rendering("a long one"))


@pytest.mark.parametrize("bomb", [*BOMBS.values(), "{{ 'a' | center(10 ** 11) }}"], ids=[*BOMBS, "filter"])
def test_a_bomb_is_refused_in_one_line_by_the_first_look(bomb):
    with pytest.raises(ModelError, match="the tokenizer's chat template fails: ") as caught:
        encoder(CHATML + bomb)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ x.y }}", "'x' is undefined"),
        ("{% if %}", "line 4: Expected an expression"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 2000, "RecursionError"),
        ("{{ messages.__class__ }}{{ ''.__class__.mro() }}", "is unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages | random }}", "draws random numbers"),
        ("{{ lipsum() }}", "draws random numbers"),
        ("{{ raise_exception('not\nfor you') }}", "not; mend it"),
    ],
)
def test_what_fails_in_a_template_is_one_line_with_the_fix(template, reason):
    with pytest.raises(ModelError, match=r"chat template fails: .*model.chat_template: false") as caught:
        encoder(CHATML + template)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_writes_an_address_is_refused():
    with pytest.raises(ModelError, match="another text each time"):
        encoder(CHATML + "{{ messages[0].items }}")


def test_a_template_out_of_time_is_named():
    # The kernel ends the process that renders it after a second of CPU.
    slow = "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}"
    with pytest.raises(RenderingError, match="more than 1 s or 1024 MB"):
        rendered_apart(slow, [rendering()], seconds=1)


def test_a_template_of_another_kind_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(ModelError, match="its chat template cannot be chosen"):
        Conversation(tokenizer, ModelConfig(), {}, "model.student_template")
