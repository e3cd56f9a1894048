"""Both kinds of tokenizer file, chat templates, and streaming of complete characters."""

import io
import json
from unittest import mock

import pytest
import sentencepiece
import transformers
from conftest import tiny_checkpoint, write_tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers

from mtpkern.chat_template import MAX_RENDERED_CHARACTERS, MAX_TEMPLATE_CHARACTERS, ChatTemplates
from mtpkern.checkpoints.llama import load_config
from mtpkern.config import SamplingParams
from mtpkern.engine import LLM
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.ring import StepRecord
from mtpkern.tokenizer import Tokenizer

SENTENCES = ["the quick brown fox jumps over the lazy dog", "so it goes", "a b c d e f g h i j"]


def byte_level(directory):
    write_tiny_tokenizer(directory)
    return directory


def sentencepiece_model(directory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


def byte_fallback_json(directory):
    """A tokenizer.json in SentencePiece's scheme, as Llama 2 has."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581"]
    vocabulary = {piece: i for i, piece in enumerate(pieces + [chr(c) for c in range(97, 123)])}
    tokenizer = Library(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece_model,
    "byte-fallback": byte_fallback_json,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer.from_directory(KINDS[request.param](tmp_path_factory.mktemp("tokenizer")))


def pushed(tokenizer, ids):
    stream = tokenizer.stream()
    return [stream.push(token_id) for token_id in ids], stream.flush()


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_text_comes_back_from_its_ids_and_from_a_stream_of_them(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, rest = pushed(tokenizer, ids)
    if not any(special in text for special in ("<|", "<s>", "</s>", "<unk>", "\u2581")):
        assert "".join(pieces) == text and rest == ""
    assert "".join(pieces) + rest == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 340), max_size=40))
def test_a_stream_of_any_ids_equals_decoding_them_at_once(tokenizer, ids):
    pieces, rest = pushed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    assert "".join(pieces) == "".join(pushed(tokenizer, ids[:-1])[0]) + (pieces or [""])[-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 299), max_size=40))
def test_broken_utf8_decodes_as_the_tokenizers_library_has_it(tmp_path_factory, ids):
    directory = tmp_path_factory.getbasetemp() / "library"
    if not directory.exists():
        directory.mkdir()
        byte_level(directory)
    library = Library.from_file(str(directory / "tokenizer.json"))
    assert Tokenizer.from_directory(directory).decode(ids) == library.decode(ids)


def test_a_character_of_several_tokens_appears_whole(tokenizer):
    pieces, rest = pushed(tokenizer, tokenizer.encode("x\N{GRINNING FACE}y", False))
    assert [piece for piece in pieces if piece] == ["x", "\N{GRINNING FACE}", "y"]
    assert rest == ""


def test_half_a_character_at_the_end_is_one_replacement(tokenizer):
    ids = tokenizer.encode("x\N{GRINNING FACE}", False)[:-1]
    pieces, rest = pushed(tokenizer, ids)
    assert "".join(pieces) == "x" and rest == "\ufffd"


def test_sentencepiece_ids_are_the_librarys_with_the_beginning_token(tmp_path):
    tokenizer = Tokenizer.from_directory(sentencepiece_model(tmp_path))
    library = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    text = "the lazy fox  sleeps"
    assert tokenizer.encode(text) == [library.bos_id(), *library.Encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == library.Decode(library.Encode(text)) == text
    assert tokenizer.encode("<s>so</s>", False) == [1, *library.Encode("so"), 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.vocab_size == library.GetPieceSize()


def test_special_tokens_leave_no_text(tmp_path):
    tokenizer = Tokenizer.from_directory(byte_level(tmp_path))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi <|im_end|>"}])
    assert ids[0] == 1 and tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids) == "user\nhi \nassistant\n"
    shorter = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], False)
    assert tokenizer.decode(shorter) == "user\nx\n"


def test_a_prompt_is_never_cut_or_filled_up(tmp_path):
    """The file may contain the truncation and padding used in training."""
    file = byte_level(tmp_path) / "tokenizer.json"
    plain = Tokenizer.from_directory(tmp_path)
    left_over = Library.from_file(str(file))
    left_over.enable_truncation(5)
    left_over.enable_padding(length=40)
    left_over.save(str(file))
    for text in ("hi", "a text of more than five tokens"):
        assert Tokenizer.from_directory(tmp_path).encode(text) == plain.encode(text)


def test_a_template_file_wins_over_the_config(tmp_path):
    byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ho"}])
    assert tokenizer.decode(ids) == "ho!"


def test_a_model_without_a_template_is_reported(tmp_path):
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


MESSAGES = [{"role": "user", "content": "\u00e9"}]


def test_templates_have_the_usual_helpers():
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    text = ChatTemplates(source, {"bos_token": "<s>"}).render(
        MESSAGES * 2, add_generation_prompt=True
    )
    assert text == '<s>{"role": "user", "content": "\u00e9"}4'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.x }}", "refused"),
        ("{{ messages.append(1) }}", "refused"),
        ("{% for i in range(1000000) %}x{% endfor %}", "refused"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", str(MAX_RENDERED_CHARACTERS)),
        ("{{ 1 / 0 }}", "refused"),
    ],
)
def test_a_hostile_or_failing_template_is_one_clear_line(source, message):
    with pytest.raises(UserError, match=message) as refusal:
        ChatTemplates(source, {}).render(MESSAGES, add_generation_prompt=True)
    assert "\n" not in str(refusal.value)


def test_what_a_trainer_marks_in_a_template_is_nothing_to_a_prompt():
    source = (
        "{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}"
    )
    text = ChatTemplates(source, {}).render(MESSAGES, add_generation_prompt=True)
    assert text == "".join(f"<{message['content']}>" for message in MESSAGES)


def test_templates_that_cannot_be_read_are_refused_at_load():
    with pytest.raises(ModelLoadError, match="not valid"):
        ChatTemplates("{% if %}", {})
    with pytest.raises(ModelLoadError, match="at most"):
        ChatTemplates("x" * (MAX_TEMPLATE_CHARACTERS + 1), {})


@pytest.mark.parametrize("messages", [["hi"], [{"content": "x"}], [{"role": 1}]])
def test_messages_without_a_role_are_refused(messages):
    with pytest.raises(UserError, match="role"):
        ChatTemplates("x", {}).render(messages, add_generation_prompt=True)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tokenizer = Tokenizer.from_directory(tiny_checkpoint(tmp_path))
    tokenizer.check_against(load_config(tmp_path))
    config = load_config(tiny_checkpoint(tmp_path / "small", vocab_size=299))
    with pytest.raises(ModelLoadError, match="wrong tokenizer: it has 300 tokens.*V=299"):
        tokenizer.check_against(config)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_tokenizer_file_is_one_clear_line(tmp_path, file):
    with pytest.raises(
        ModelLoadError,
        match="neither tokenizer.json nor vocab.json with merges.txt nor tokenizer.model",
    ):
        Tokenizer.from_directory(tmp_path)
    for garbage in (b"", b"{}", b"\xff\x00garbage"):
        (tmp_path / file).write_bytes(garbage)
        with pytest.raises(ModelLoadError, match=file) as refusal:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(refusal.value)


def test_a_decoder_of_another_kind_is_refused_by_name(tmp_path):
    byte_level(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match="WordPiece is not supported"):
        Tokenizer.from_directory(tmp_path)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_spaces_are_written_as_the_class_and_its_legacy_flag_say(
    legacy, tokenizer_class, model_type, tmp_path
):
    byte_fallback_json(tmp_path)
    settings = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>"} | ({} if legacy is None else {"legacy": legacy})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    for text in ("so it goes", "<s>so</s>it", "<s> so </s> it", " so", "<s>[a] b</s>c", ""):
        assert ours.encode(text, False) == theirs(text, add_special_tokens=False)["input_ids"]


def test_a_sentencepiece_text_after_a_special_token_begins_as_legacy_has_it(tmp_path):
    sentencepiece_model(tmp_path)
    library = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    so, spaced = library.PieceToId("so"), library.Encode("so")
    for legacy, want in ((True, spaced), (None, spaced), (False, None)):
        settings = {} if legacy is None else {"legacy": legacy}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        ours = Tokenizer.from_directory(tmp_path)
        assert ours.encode("so", False) == spaced
        got = ours.encode("<s>so", False)[1:]
        if want is None:
            text = "".join(library.IdToPiece(i) for i in got)
            assert text == "so" and so not in spaced
        else:
            assert got == want


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_text_keeps_its_first_space(kind, tmp_path):
    ours = Tokenizer.from_directory(KINDS[kind](tmp_path))
    whole = ours.encode("so it goes the dog", False)
    for at in range(len(whole) + 1):
        stream = ours.stream(whole[:at])
        after = "".join(stream.push(i) for i in whole[at:]) + stream.flush()
        assert ours.decode(whole[:at]) + after == ours.decode(whole)


def test_a_continued_text_and_its_answer_are_one_and_a_turn_has_no_space_before(tmp_path):
    """Through generate, with a model that always answers with one word."""
    tiny_checkpoint(tmp_path, vocab_size=340, eos_token_id=None)
    (tmp_path / "tokenizer_config.json").unlink()
    byte_fallback_json(tmp_path)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    llm = LLM(tmp_path, max_length=96)
    word = llm.tokenizer.encode("x", False)[0]
    assert llm.tokenizer.token_bytes(word) == b" "
    request = SamplingParams(max_tokens=4)
    ids = llm.encode("so")
    text = [{"role": "user", "content": "so"}]
    with mock.patch.object(StepRecord, "target", property(lambda record: (word,) * 9)):
        (raw,) = llm.generate("so", request)
        (by_ids,) = llm.generate(ids, request)
        (turn,) = llm.generate(text, request)
        (half,) = llm.generate(text, request, continue_final_message=True)
    assert raw.text == by_ids.text == half.text == "    " and turn.text == "   "
    assert "so" + raw.text == llm.tokenizer.decode(ids + raw.token_ids)
