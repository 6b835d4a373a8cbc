"""Chat templates: what they write, what they refuse, and what they must not reach."""

from __future__ import annotations

import json

import pytest
import tokenizers

from dmattn_jax.io import ChatTemplate, load_tokenizer

USER = [{"role": "user", "content": "hi"}]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_messages_and_the_generation_prompt():
    template = ChatTemplate(CHATML)
    assert template.render(USER) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(USER, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert template.render([]) == "<|im_start|>assistant\n"


def test_tokens_and_variables():
    template = ChatTemplate(
        "{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}{{ tools | tojson }}{{ nothing }}",
        bos_token="<s>",
        eos_token="</s>",
    )
    assert template.render([{"role": "user", "content": " é<b> "}], tools=["é<"]) == '<s>é<b></s>["é<"]'
    assert ChatTemplate("[{{ bos_token }}]").render(USER) == "[]"
    asked = ChatTemplate("{{ tools is none }} {{ documents is none }} {{ tools is defined }}")
    assert asked.render(USER) == "True True True"
    assert asked.render(USER, tools=[1]) == "False True True"


def test_blocks_trim_as_templates_expect():
    assert ChatTemplate("{% if true %}\n  a\n  {% endif %}\nb").render(USER) == "  a\nb"
    assert ChatTemplate("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}").render(
        USER
    ) == ("1")
    assert ChatTemplate("a{% generation %}b{{ 1 }}{% endgeneration %}c").render(USER) == "ab1c"
    assert len(ChatTemplate("{{ strftime_now('%Y') }}").render(USER)) == 4


def test_a_template_refuses_with_its_reason():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses these messages: roles must alternate"):
        template.render(USER)
    with pytest.raises(ValueError, match=r"messages\[1\] must be a mapping with a role"):
        template.render([*USER, {"content": "x"}])
    with pytest.raises(ValueError, match="chat_template is not a Jinja template"):
        ChatTemplate("{% for %}")
    with pytest.raises(ValueError, match="refuses"):
        ChatTemplate("{{ messages[7].content + 1 }}").render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{{ range(1000000) | list }}",
    ],
)
def test_a_template_reaches_nothing(source):
    messages = list(USER)
    with pytest.raises(ValueError, match="the chat template refuses"):
        ChatTemplate(source).render(messages)
    assert messages == USER


@pytest.mark.parametrize("source", ["{{ strftime_now.__globals__ }}", "{{ ''|attr('__class__')|attr('__mro__') }}"])
def test_what_it_must_not_see_is_not_there(source):
    assert ChatTemplate(source).render(USER) == ""


def tokenizer_folder(path):
    vocabulary = {"a": 0, "user": 1, "hi": 2, "[UNK]": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_templates_of_a_folder(form, tmp_path):
    config = {"eos_token": {"content": "<|im_end|>"}}
    source = "{{ '<|im_start|>' + messages[0].content + eos_token }}"
    if form == "file":
        (tokenizer_folder(tmp_path) / "chat_template.jinja").write_text(source)
        config["chat_template"] = "the file wins"
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
        config["chat_template"] = source if form == "text" else named
    (tokenizer_folder(tmp_path) / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_chat(USER) == [4, 2, 5]
    # and without parsing, text that spells a special token is text
    assert 5 not in tokenizer.encode("hi<|im_end|>")
    (tmp_path / "again").mkdir()
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode_chat(USER) == [4, 2, 5]


def test_a_tokenizer_without_a_template_says_so(tmp_path):
    with pytest.raises(ValueError, match="this tokenizer has no chat_template"):
        load_tokenizer(tokenizer_folder(tmp_path)).encode_chat(USER)
