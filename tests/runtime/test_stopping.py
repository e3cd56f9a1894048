"""What ends a completion: tokens, strings, special tokens in strings, and not before min_tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SPECIAL_TOKENS, tiny_checkpoint, write_tiny_tokenizer
from head_files import write_medusa, write_mtp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtpkern.config import SamplingParams
from mtpkern.engine import LLM
from mtpkern.errors import UserError
from mtpkern.ops.definitions import Definitions
from mtpkern.request import EncodedPrompt, Request
from mtpkern.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog "
PROMPTS = [TEXT, "so", "a b c d e f g a b c d e f g", "the dog sleeps", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("stopping"), eos_token_id=None)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model, num_speculative_tokens=4, max_batch=2, max_length=256)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return Tokenizer.from_directory(directory)


def both(llm: LLM, prompt: Any = TEXT, **given: Any) -> Any:
    """The answer, the same with drafts and without."""
    params = SamplingParams(logprobs=True, **given)
    drafted, plain = (llm.generate(prompt, params, speculate=s)[0] for s in (True, False))
    assert (drafted.text, drafted.token_ids) == (plain.text, plain.token_ids)
    assert (drafted.logprobs, drafted.finish_reason) == (plain.logprobs, plain.finish_reason)
    return drafted


@pytest.mark.slow
def test_a_stop_token_ends_the_answer_and_leaves_no_text(llm: LLM) -> None:
    whole = both(llm, max_tokens=50).token_ids
    assert llm.tokenizer is not None
    for at in range(0, 50, 7):
        end = whole.index(whole[at])
        for ignore_eos in (False, True):
            got = both(llm, max_tokens=50, stop_token_ids=[whole[at], 299], ignore_eos=ignore_eos)
            assert got.token_ids == whole[: end + 1] and got.finish_reason == "stop"
            assert got.text == llm.tokenizer.decode(whole[:end])
        kept = both(llm, max_tokens=50, stop_token_ids=[whole[at]], include_stop_str_in_output=True)
        assert kept.text == llm.tokenizer.decode(whole[: end + 1])


def test_more_stop_tokens_than_the_device_is_told_of(llm: LLM) -> None:
    whole = both(llm, max_tokens=50).token_ids
    strangers = [i for i in range(307) if i not in whole]
    got = both(llm, max_tokens=50, stop_token_ids=[*strangers, whole[20]])
    assert got.token_ids == whole[: whole.index(whole[20]) + 1]


@pytest.mark.slow
def test_what_ended_a_text_is_kept_where_that_is_wanted(llm: LLM) -> None:
    whole = both(llm, max_tokens=60).text
    for begin in range(0, len(whole) - 3, 9):
        stop = whole[begin : begin + 3]
        got = both(llm, max_tokens=60, stop=[stop], include_stop_str_in_output=True)
        assert got.text == whole[: whole.index(stop) + 3]
        streamed = llm.stream(
            TEXT, SamplingParams(60, stop=(stop,), include_stop_str_in_output=True)
        )
        assert "".join(event.text for event in streamed) == got.text


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, "A", "B", "C"]), min_size=1, max_size=24),
    st.lists(
        st.lists(st.sampled_from([*SPECIAL_TOKENS, "A", "B", "C"]), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 8),
    st.booleans(),
)
def test_stop_strings_are_found_in_the_text_with_its_special_tokens(
    tokenizer: Tokenizer, given: list[Any], parts: list[list[str]], least: int, kept: bool
) -> None:
    """Against a search of the whole text after each token."""
    stop = tuple("".join(part) for part in parts)
    params = SamplingParams(99, stop=stop, min_tokens=least, include_stop_str_in_output=kept)
    request = Request(0, EncodedPrompt([5]), params, k=0, room=99, ends=(), tokenizer=tokenizer)
    items: list[str] = []  # visible characters, and the special tokens that a stop string names
    released = ""
    for count, item in enumerate(given, 1):
        if isinstance(item, int):
            released += request.push(item)
            named = any(SPECIAL_TOKENS[item] in text for text in stop)
            items += [SPECIAL_TOKENS[item]] if named else []
        else:
            (token_id,) = tokenizer.encode(item)
            released += request.push(token_id)
            items.append(item)
        named = not isinstance(item, int) or named
        found = [begin for begin in range(len(items)) if "".join(items[begin:]) in stop]
        if named and found and count > least:
            want = items if kept else items[: min(found)]
            assert request.finish_reason == "stop"
            assert request.completion().text == released == "".join(set_apart(want))
            return
        assert request.finish_reason is None
        # Held back is only what may become a stop string.
        assert len(set_apart(items)) - len(released) < max(map(len, parts))


def set_apart(items: list[str]) -> list[str]:
    return [item for item in items if item not in SPECIAL_TOKENS]


def test_a_special_token_ends_the_text_as_in_transformers(tmp_path: Path) -> None:
    """A model that ends its turn with a token that config.json does not call so."""
    model = tiny_checkpoint(tmp_path, eos_token_id=None)
    ids = Tokenizer.from_directory(model).encode(TEXT)
    answer = LLM(model, max_length=96).generate(ids, SamplingParams(max_tokens=30))[0]
    new = next(token_id for token_id in answer.token_ids if token_id not in ids)
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[[2, new]] = embedding[[new, 2]]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    prompt = torch.tensor([ids])
    got = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=0,
        stop_strings=["<|im_end|>"],
        tokenizer=words,
    )
    want = got[0, len(ids) :].tolist()
    assert 2 in want
    llm = LLM(model, num_speculative_tokens=3, max_length=96)
    for params in ({"stop": "<|im_end|>"}, {"stop_token_ids": [2]}):
        answer = both(llm, ids, max_tokens=40, ignore_eos=True, **params)
        assert answer.token_ids == want and answer.finish_reason == "stop"
        assert llm.tokenizer is not None and answer.text == llm.tokenizer.decode(want[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["none", "mtp", "medusa"])
def test_before_min_tokens_no_end_is_chosen(heads: str, tmp_path: Path) -> None:
    """Against transformers, where the ends that are kept out come early and often."""
    model = tiny_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    where: Any = heads
    if heads != "none":
        where = (write_mtp if heads == "mtp" else write_medusa)(tmp_path / "heads")
    llm = LLM(model, heads=where, num_speculative_tokens=3, max_length=256)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = torch.tensor([llm.encode(TEXT)])
    whole = both(llm, max_tokens=30).token_ids
    ends = [i for i in range(3, 307) if i % 8 != (whole[0] + 1) % 8]
    lengths = []
    for least in (0, 1, 2, 7, 20, 29, 30):
        want = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=30,
            min_new_tokens=least,
            eos_token_id=[*ends, *llm.eos_token_ids],
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()
        got = both(llm, max_tokens=30, min_tokens=least, stop_token_ids=ends)
        assert got.token_ids == want
        assert len(want) > least or got.finish_reason == "length"
        lengths.append(len(want) - least)
    assert 1 in lengths[1:], "an end must come as soon as it may"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_holds_for_each_of_a_batch(llm: LLM, temperature: float) -> None:
    """More prompts than slots, so that slots are filled again."""
    given: dict[str, Any] = {"temperature": temperature, "seed": 3, "top_k": 20}
    whole = llm.generate(PROMPTS, SamplingParams(40, **given))
    ends = sorted({token for answer in whole for token in answer.token_ids[:3]})
    params = SamplingParams(40, min_tokens=9, stop_token_ids=tuple(ends), **given)
    drafted, plain = (llm.generate(PROMPTS, params, speculate=s) for s in (True, False))
    for one, other in zip(drafted, plain, strict=True):
        assert one.token_ids == other.token_ids and len(one.token_ids) > 9
        assert not set(ends) & set(one.token_ids[:9])
    # The next run has nothing of it.
    after = llm.generate(PROMPTS, SamplingParams(40, **given))
    assert [answer.token_ids for answer in after] == [answer.token_ids for answer in whole]


def test_end_of_text_is_kept_out_too_also_where_it_would_not_end(llm: LLM) -> None:
    whole = both(llm, max_tokens=20).token_ids
    llm.eos_token_ids = (whole[2],)
    try:
        assert len(both(llm, max_tokens=20).token_ids) == whole.index(whole[2]) + 1
        for ignore_eos in (False, True):
            least = both(llm, max_tokens=20, min_tokens=10, ignore_eos=ignore_eos)
            assert len(least.token_ids) > 10 and whole[2] not in least.token_ids[:10]
    finally:
        llm.eos_token_ids = ()


def test_a_stop_string_before_min_tokens_is_passed_over(llm: LLM) -> None:
    whole = both(llm, max_tokens=60)
    stop = whole.text[:2]
    again = [at for at in range(len(whole.text)) if whole.text.startswith(stop, at)]
    assert len(again) > 2, "the case needs a stop string that comes again"
    got = both(llm, max_tokens=60, stop=stop, min_tokens=5)
    assert len(got.token_ids) > 5 and got.token_ids == whole.token_ids[: len(got.token_ids)]
    assert len(got.text) in again


def test_what_cannot_be_done_is_refused(llm: LLM, model: Path) -> None:
    with pytest.raises(UserError, match=r"stop_token_ids must be in 0\.\.306"):
        llm.generate(TEXT, SamplingParams(stop_token_ids=(307,)))
    with pytest.raises(UserError, match="min_tokens needs device cpu"):
        ops = Definitions()
        ops.host_may_read = False
        kernels = LLM(model, max_length=64, ops=ops)
        kernels.generate(TEXT, SamplingParams(8, min_tokens=3, stop_token_ids=(5,)))
    # Where there is nothing to keep out, that is no matter; one token has no prefill.
    kernels.eos_token_ids = ()
    kernels.generate([5], SamplingParams(2, min_tokens=2, stop="x"))
    llm.tokenizer, before = None, llm.tokenizer
    try:
        with pytest.raises(UserError, match="stop needs a tokenizer"):
            llm.generate([5, 6], SamplingParams(stop="x"))
    finally:
        llm.tokenizer = before
    assert len(both(llm, max_tokens=3).token_ids) == 3
