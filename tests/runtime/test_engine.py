"""LLM: where completions stop, their statistics, and the errors for wrong arguments."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from cpu_machine import poison
from safetensors.torch import load_file, save_file

from mtpkern import device
from mtpkern.cache import KVCache
from mtpkern.config import SamplingParams
from mtpkern.device import resolve_device
from mtpkern.drafters.base import HEADS, DraftInput, Drafts
from mtpkern.drafters.ngram import NgramDrafter
from mtpkern.engine import LLM
from mtpkern.errors import UserError
from mtpkern.ops.definitions import DEFINITIONS
from mtpkern.prompts import Prompt
from mtpkern.request import Event

TEXT = "the quick brown fox jumps over the lazy dog "


@pytest.fixture(scope="module")
def llm(tmp_path_factory: Any) -> LLM:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("engine"), eos_token_id=None)
    return LLM(directory, num_speculative_tokens=4, max_batch=3, max_length=256)


def run(llm: LLM, speculate: bool = True, prompt: str = TEXT, **settings: Any) -> Any:
    return llm.generate(prompt, SamplingParams(**settings), speculate=speculate)[0]


def test_a_stop_string_cuts_where_plain_decoding_stops(llm: LLM) -> None:
    """Every substring of an answer as a stop string, also those inside an accepted run."""
    whole = run(llm, max_tokens=60)
    assert whole.stats.mean_acceptance_length > 1.2, "the case must have accepted runs to cut"
    for begin in range(0, len(whole.text) - 3, 5):
        stop = whole.text[begin : begin + 3]
        drafted, plain = (run(llm, s, max_tokens=60, stop=(stop,)) for s in (True, False))
        assert drafted.text == plain.text == whole.text[: whole.text.index(stop)]
        assert drafted.token_ids == plain.token_ids
        assert drafted.finish_reason == plain.finish_reason == "stop"
        shorter = llm.tokenizer.decode(drafted.token_ids[:-1])  # type: ignore[union-attr]
        assert stop in llm.tokenizer.decode(drafted.token_ids) and stop not in shorter  # type: ignore[union-attr]


@pytest.mark.slow
def test_an_end_of_text_token_cuts_where_plain_decoding_stops(llm: LLM) -> None:
    whole = run(llm, max_tokens=60).token_ids
    for at in range(0, 60, 3):
        llm.eos_token_ids = (whole[at],)
        try:
            drafted, plain = (run(llm, s, max_tokens=60, logprobs=True) for s in (True, False))
            ignoring = run(llm, max_tokens=60, ignore_eos=True)
        finally:
            llm.eos_token_ids = ()
        assert drafted.token_ids == plain.token_ids == whole[: whole.index(whole[at]) + 1]
        assert drafted.logprobs == plain.logprobs and len(plain.logprobs) == len(plain.token_ids)
        assert drafted.finish_reason == "stop"
        assert ignoring.token_ids == whole


def test_an_end_token_leaves_no_text_whatever_the_tokenizer_calls_it(llm: LLM) -> None:
    plain = run(llm, max_tokens=30, ignore_eos=True)
    end = plain.token_ids[9]  # a word to the tokenizer
    assert llm.tokenizer is not None and llm.tokenizer.decode([end])
    before, llm.eos_token_ids = llm.eos_token_ids, (end,)
    try:
        answer = run(llm, max_tokens=30)
    finally:
        llm.eos_token_ids = before
    assert answer.finish_reason == "stop" and answer.token_ids[-1] == end
    assert answer.text == llm.tokenizer.decode(answer.token_ids[:-1])


NOT_FINITE = "logits are not finite: another dtype may help"
FRAGILE = [5, 9, 33, 7, 40]


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_logits_that_are_not_finite_are_an_error_not_an_answer(
    tmp_path: Path, logprobs: bool, sampling: dict[str, Any]
) -> None:
    directory = tiny_checkpoint(tmp_path, dtype=torch.float32)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, directory / "model.safetensors")
    broken = LLM(directory, max_length=64)
    params = SamplingParams(max_tokens=4, logprobs=logprobs, **sampling)
    for prompts in (TEXT, [TEXT, "dog"]):
        for speculate in (True, False):
            with pytest.raises(UserError, match=NOT_FINITE):
                broken.generate(prompts, params, speculate=speculate)
    with pytest.raises(UserError, match=NOT_FINITE):
        list(broken.stream(TEXT, params))


class Foresight(NgramDrafter):
    """Drafts the continuation in `answer`, whose prompt is FRAGILE, or always the same token."""

    def __init__(self, answer: list[int], instead: int | None = None):
        super().__init__(DEFINITIONS)
        self.known, self.instead = torch.tensor(FRAGILE + answer + [0] * 32), instead

    def guess(self, step: DraftInput, count: int) -> Drafts:
        tokens = self.known[step.lengths[:, None] + 1 + torch.arange(count)]
        if self.instead is not None:
            tokens = torch.full_like(tokens, self.instead)
        return Drafts(tokens, HEADS, count)


@pytest.fixture
def fragile(tmp_path: Path) -> tuple[LLM, list[int]]:
    """A model whose embedding is not tied, and its answer to FRAGILE."""
    directory = tiny_checkpoint(tmp_path, tie_word_embeddings=False, eos_token_id=None)
    llm = LLM(directory, num_speculative_tokens=4, max_batch=2, max_length=128)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    return llm, llm.generate([FRAGILE], params)[0].token_ids


def break_at(llm: LLM, token: int) -> None:
    """Make the logits after `token` NaN."""
    poison(llm.trunk.embedding, token)


def until_the_error(llm: LLM, speculate: bool) -> list[int]:
    """The tokens that are streamed before the error."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    found = []
    with pytest.raises(UserError, match=NOT_FINITE):
        for event in llm.stream(FRAGILE, params, speculate=speculate):
            found.append(event.token_id)
    return found


def test_an_answer_breaks_off_at_the_same_token_with_and_without_drafts(
    fragile: tuple[LLM, list[int]],
) -> None:
    llm, answer = fragile
    at = next(i for i in range(11, 40) if i % 5 == 2 and answer[i] not in answer[:i])
    break_at(llm, answer[at])
    for drafter in (llm.drafter, Foresight(answer), Foresight(answer, instead=answer[at])):
        llm.drafter = drafter
        for speculate in (True, False):
            assert until_the_error(llm, speculate) == answer[: at + 1]
            # An answer that is over by then is whole, and what broke before leaves no trace.
            short = SamplingParams(max_tokens=at + 1, logprobs=True, ignore_eos=True)
            whole = llm.generate([FRAGILE, FRAGILE], short, speculate=speculate)
            assert [c.token_ids for c in whole] == [answer[: at + 1]] * 2
            assert np.isfinite(whole[0].logprobs).all()


def test_a_rejected_draft_may_have_logits_that_are_not_finite(
    fragile: tuple[LLM, list[int]],
) -> None:
    llm, answer = fragile
    params = SamplingParams(max_tokens=40, logprobs=True, ignore_eos=True)
    expected = llm.generate([FRAGILE], params)[0]
    never = next(i for i in range(300) if i not in answer + FRAGILE)
    break_at(llm, never)
    llm.drafter = Foresight(answer, instead=never)
    found = llm.generate([FRAGILE], params)[0]
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
    assert sum(found.stats.drafted["heads"]) > 100 and not any(found.stats.accepted["heads"])


def test_a_prompt_whose_hidden_states_are_not_finite_is_an_error(
    fragile: tuple[LLM, list[int]],
) -> None:
    llm, answer = fragile
    break_at(llm, FRAGILE[1])
    for speculate in (True, False):
        assert until_the_error(llm, speculate) == []
    other = [token for token in FRAGILE if token != FRAGILE[1]]
    assert len(llm.generate([other], SamplingParams(max_tokens=5))[0].token_ids) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 7, 41])
def test_max_tokens_and_the_context_cut_exactly(llm: LLM, count: int) -> None:
    whole = run(llm, max_tokens=60).token_ids
    short = run(llm, max_tokens=count)
    assert (short.token_ids, short.finish_reason) == (whole[:count], "length")
    assert short.stats.new_tokens == count
    ids = llm.encode(TEXT)
    fill = [ids[i % len(ids)] for i in range(llm.max_length - count)]
    for speculate in (True, False):
        full = llm.generate(fill, SamplingParams(max_tokens=500), speculate=speculate)[0]
        assert (len(full.token_ids), full.finish_reason) == (count, "length")


def test_a_stream_is_the_completion_in_pieces(llm: LLM) -> None:
    for stop in ((), ("ox",), ("zzzz", "e l")):
        params = SamplingParams(max_tokens=50, stop=stop)
        events = list(llm.stream(TEXT, params))
        whole = llm.generate(TEXT, params)[0]
        assert "".join(event.text for event in events) == whole.text
        assert [event.token_id for event in events] == whole.token_ids
        assert [event.completion is None for event in events[:-1]] == [True] * (len(events) - 1)
        assert events[-1].completion is not None
        drafted = sum(event.drafted for event in events)
        emitted = whole.stats.new_tokens - whole.stats.steps
        # A step emits its accepted drafts and one token of the model's own; a cut may drop that.
        assert drafted in (emitted, emitted + 1)


def test_statistics_add_up(llm: LLM) -> None:
    stats = run(llm, max_tokens=60).stats
    assert sum(stats.source_steps.values()) == stats.steps
    assert sum(stats.source_tokens.values()) == stats.new_tokens == 60
    assert stats.mean_acceptance_length == 60 / stats.steps
    rates = stats.acceptance_by_position
    assert len(rates) == 4 and all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    plain = run(llm, False, max_tokens=60).stats
    assert (plain.steps, plain.acceptance_by_position) == (60, [])


def test_accepted_drafts_are_the_tokens_gained(llm: LLM) -> None:
    """Drafts after the last token, or in its place, do not count as drafted or accepted."""
    whole = run(llm, max_tokens=60)
    for count in range(1, 30):
        stats = run(llm, max_tokens=count).stats
        accepted = sum(sum(counts) for counts in stats.accepted.values())
        assert accepted == stats.new_tokens - stats.steps
        if stats.new_tokens == stats.steps:
            assert not any(stats.acceptance_by_position)
    llm.eos_token_ids = (whole.token_ids[20],)
    try:
        ended = run(llm, max_tokens=60).stats
    finally:
        llm.eos_token_ids = ()
    assert sum(map(sum, ended.accepted.values())) == ended.new_tokens - ended.steps
    assert whole.stats.as_json()["steps_by_num_speculative_tokens"] == {"4": whole.stats.steps}


def test_a_prompt_may_be_text_ids_or_messages(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8)
    messages = [{"role": "user", "content": "the fox"}]
    ids = llm.tokenizer.apply_chat_template(messages)  # type: ignore[union-attr]
    by_messages, by_ids = llm.generate([messages, ids], params)
    assert by_messages.token_ids == by_ids.token_ids
    assert llm.generate(messages, params)[0].token_ids == by_ids.token_ids
    assert len(llm.generate([TEXT, TEXT, TEXT, TEXT], params)) == 4
    assert llm.generate([], params) == []
    for same in (torch.tensor([ids]), np.array(ids), list(np.array(ids))):
        assert llm.generate(same, params)[0].token_ids == by_ids.token_ids  # type: ignore[arg-type]


def test_prompts_that_cannot_be_run_are_refused(llm: LLM) -> None:
    for prompt, message in (
        ("", "the prompt is empty"),
        ([1] * 256, "the prompt has 256 tokens; the context holds 256"),
        ([5, 307], r"a token id must be an integer in 0\.\.306, got 307"),
        ([5, -1], r"a token id must be an integer in 0\.\.306, got -1"),
        ([5, 1.5], r"a token id must be an integer in 0\.\.306, got 1\.5"),
        ([[]], "the prompt is empty"),
    ):
        with pytest.raises(UserError, match=message):
            llm.generate(prompt)  # type: ignore[arg-type]


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    for arguments, message in (
        (dict(num_speculative_tokens=17), r"an integer in 0\.\.16, got 17"),
        (dict(num_speculative_tokens=-1), r"an integer in 0\.\.16, got -1"),
        (dict(num_speculative_tokens=2, heads="none", ngram=False), "nothing to draft with"),
        (dict(max_length=513), r"max_length must be an integer in 2\.\.512"),
        (dict(max_batch=0), r"max_batch must be an integer in 1\.\.4096"),
        (dict(dtype="int3"), "dtype must be auto, float32, bfloat16 or float16, got 'int3'"),
        (dict(device="tpu"), "device must be auto, cpu or cuda, got 'tpu'"),
        (
            dict(cache_tokens=256, max_length=256),
            "cache_tokens must be at least 384 to hold one sequence",
        ),
    ):
        with pytest.raises(UserError, match=message):
            LLM(directory, **arguments)  # type: ignore[arg-type]


def test_sampled_answers_depend_on_the_seed_alone(llm: LLM) -> None:
    def answer(seed: int, prompt: str = TEXT) -> list[int]:
        return run(llm, temperature=1.2, seed=seed, max_tokens=30, prompt=prompt).token_ids

    assert answer(1) == answer(1) != answer(2)
    batch = llm.generate(
        [TEXT, "dog", TEXT], SamplingParams(temperature=1.2, seed=1, max_tokens=30)
    )
    assert batch[0].token_ids == batch[2].token_ids == answer(1)


def share(a: list[int], b: list[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def test_prompts_of_one_seed_draw_unlike_noise(llm: LLM) -> None:
    """At this temperature the 307 tokens are nearly equally likely: equal noise would give equal
    tokens."""
    torch.manual_seed(0)
    prompts = torch.randint(3, 300, (6, 10)).tolist()
    for seed in (3, None):
        params = SamplingParams(max_tokens=60, temperature=100.0, seed=seed, ignore_eos=True)
        first, *others = [answer.token_ids for answer in llm.generate(prompts, params)]
        assert max(share(first, other) for other in others) < 0.1


def test_each_of_n_completions_has_noise_of_its_own_wherever_it_is_decoded(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=30.0, seed=5, n=4, logprobs=True)
    answers = llm.generate([TEXT, "dog"], params)
    assert [answer.index for answer in answers] == [0, 1, 2, 3] * 2
    assert {answer.seed for answer in answers} == {5}
    assert len({tuple(answer.token_ids) for answer in answers}) == 8
    # Other slots, neighbours and drafts, and more of them.
    plain = llm.generate(["fox", "dog", TEXT], replace(params, n=6), speculate=False)
    for mine, theirs in ((answers[:4], plain[12:16]), (answers[4:], plain[6:10])):
        assert [a.token_ids for a in mine] == [a.token_ids for a in theirs]
        assert [a.logprobs for a in mine] == [a.logprobs for a in theirs]
    alone = llm.generate("dog", replace(params, n=1))[0]
    assert (alone.index, alone.token_ids) == (0, answers[4].token_ids)


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    each = [
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=12, temperature=0.9, seed=1, logprobs=True, n=2),
        SamplingParams(max_tokens=7, temperature=1.1, seed=2, top_k=5),
        SamplingParams(max_tokens=12, temperature=0.9, seed=2),
    ]
    prompts = [TEXT, "dog", TEXT, "dog"]
    together = llm.generate(prompts, each)
    assert [answer.index for answer in together] == [0, 0, 1, 0, 0]
    apart = [a for p, params in zip(prompts, each, strict=True) for a in llm.generate(p, params)]
    assert [a.token_ids for a in together] == [a.token_ids for a in apart]
    assert [a.logprobs for a in together] == [a.logprobs for a in apart]
    assert [a.logprobs is None for a in together] == [True, False, False, True, True]
    assert llm.generate(TEXT, each[:1])[0].token_ids == together[0].token_ids
    for wrong in (each, []):
        with pytest.raises(UserError, match=f"got {len(wrong)} for 1 prompt"):
            llm.generate(TEXT, wrong)


def test_without_a_seed_each_prompt_gets_a_fresh_one_that_repeats_it(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=30.0, n=2)
    answers = llm.generate([TEXT, TEXT], params) + llm.generate(TEXT, params)
    assert len({tuple(answer.token_ids) for answer in answers}) == 6
    seeds = [answer.seed for answer in answers]
    assert seeds[::2] == seeds[1::2] and len({*seeds}) == 3
    for i in range(0, 6, 2):
        again = llm.generate(TEXT, replace(params, seed=seeds[i]))
        assert [a.token_ids for a in again] == [a.token_ids for a in answers[i : i + 2]]
    assert run(llm, max_tokens=2).seed is None and run(llm, max_tokens=2, seed=3).seed == 3


def test_a_stream_is_one_completion(llm: LLM) -> None:
    with pytest.raises(UserError, match="n must be 1 for a stream, got 2"):
        next(llm.stream(TEXT, SamplingParams(temperature=1.0, n=2)))


def test_a_streamed_batch_is_what_generate_returns_in_pieces(llm: LLM) -> None:
    prompts: list[Prompt] = [TEXT, [5, 6, 7], "the fox", [9, 8]]
    params = [SamplingParams(max_tokens=n, logprobs=True) for n in (12, 3, 20, 7)]
    params[2] = replace(params[2], temperature=1.0, n=2, seed=4)
    whole = llm.generate(prompts, params)
    assert len(whole) == 5
    pieces: list[list[Event]] = [[] for _ in whole]
    for i, event in llm.stream_batch(prompts, params):
        pieces[i].append(event)
    for events, completion in zip(pieces, whole, strict=True):
        assert [event.token_id for event in events] == completion.token_ids
        assert "".join(event.text for event in events) == completion.text
        *before, last = (event.completion for event in events)
        assert before == [None] * len(before) and last is not None
        assert (last.index, last.logprobs) == (completion.index, completion.logprobs)


def test_a_prompt_of_many_chunks_is_the_same_alone_and_among_others(llm: LLM) -> None:
    torch.manual_seed(0)
    prompts = [torch.randint(3, 300, (n,)).tolist() for n in (127, 128, 129, 130, 200)]
    params = SamplingParams(max_tokens=12, logprobs=True)
    together = llm.generate(prompts, params)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, params, speculate=False)[0]
        assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)


def test_a_second_run_is_refused_until_the_first_is_over(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20)
    expected = run(llm, max_tokens=20).token_ids
    first = llm.stream(TEXT, params)
    begun = [next(first).token_id for _ in range(3)]
    with pytest.raises(UserError, match="answering already"):
        run(llm, max_tokens=5)
    with pytest.raises(UserError, match="answering already"):
        next(llm.stream(TEXT, params))
    assert begun + [event.token_id for event in first] == expected
    abandoned = llm.stream(TEXT, params)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert run(llm, max_tokens=20).token_ids == expected


def test_a_run_that_python_itself_closes_frees_its_slot(llm: LLM) -> None:
    """As at exit, where generators are finalised in any order, outside inference mode."""
    expected = run(llm, max_tokens=20).token_ids
    stream = llm.stream(TEXT, SamplingParams(max_tokens=20))
    next(stream)
    assert llm._events is not None
    llm._events.close()
    del stream
    assert run(llm, max_tokens=20).token_ids == expected


def test_a_device_that_cannot_run_the_kernels_is_refused_by_name(monkeypatch: Any) -> None:
    def pretend(found: bool, capability: tuple[int, int], triton: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(device, "HAS_TRITON", triton)

    for found, capability, triton, message in (
        (False, (9, 0), True, "needs an NVIDIA GPU of compute capability 8.0"),
        (True, (7, 5), True, "needs an NVIDIA GPU of compute capability 8.0"),
        (True, (9, 0), False, "needs Triton, which is not installed"),
    ):
        pretend(found, capability, triton)
        with pytest.raises(UserError, match=message):
            resolve_device("cuda")
        assert resolve_device("auto")[0].type == "cpu"
    pretend(True, (8, 0), True)
    assert resolve_device("auto")[0].type == "cuda"
    assert resolve_device("cpu")[1].layers is not None


def test_a_conversation_is_answered_and_goes_on(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8)
    turns = [{"role": "user", "content": "the fox"}]
    first = llm.chat(turns, params)
    assert first.token_ids == llm.generate([turns], params)[0].token_ids
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "the dog"}]
    second = llm.chat(turns, params)
    assert second.stats.prompt_tokens > first.stats.prompt_tokens
    for wrong in ("the fox", turns[0], [1, 2], [[turns[0]]]):
        with pytest.raises(UserError, match='messages must be a list of {"role"'):
            llm.chat(wrong, params)  # type: ignore[arg-type]


def test_a_content_may_be_a_list_of_texts_and_other_types_are_refused_by_name(llm: LLM) -> None:
    def chat(content: Any) -> list[int]:
        return llm.encode([{"role": "user", "content": content}])

    parts = [{"type": "text", "text": "the fox"}, {"type": "text", "text": "and the dog"}]
    assert chat(parts) == chat("the fox\nand the dog") and chat(parts[:1]) == chat("the fox")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    for content, message in (
        ([*parts, image], "content of type 'image_url' is not supported; supported:.*text"),
        (["the fox"], "content of type 'the fox' is not supported"),
        ([{"type": "text", "text": 5}], "content of type 'text' is not supported.*text"),
        (5, "a message's content must be text, got 5"),
    ):
        with pytest.raises(UserError, match=message):
            chat(content)


def test_an_error_inside_a_template_is_blamed_on_the_messages(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    template = "{{ messages[0].content.index('</think>') }}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    broken = LLM(directory, max_length=64)
    with pytest.raises(UserError, match="chat template refused the messages: substring not found"):
        broken.chat([{"role": "user", "content": "the fox"}])


def test_a_closed_model_frees_its_memory_and_refuses_every_call(tmp_path: Path) -> None:
    with LLM(tiny_checkpoint(tmp_path), max_length=64) as llm:
        assert llm.generate(TEXT, SamplingParams(max_tokens=3))
        kept = [
            weakref.ref(t)
            for t in (llm.trunk.embedding.data, llm.runner.cache.k, llm.runner.state.window)
        ]
        unfinished = llm.stream(TEXT, SamplingParams(max_tokens=20))
        next(unfinished)
    with pytest.raises(UserError, match="this LLM is closed: load it again"):
        next(unfinished)
    del unfinished
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3
    llm.close()
    assert "closed" in repr(llm)
    messages = [{"role": "user", "content": "the fox"}]
    for call in (
        lambda: llm.generate(TEXT),
        lambda: llm.generate([]),
        lambda: llm.stream(TEXT),
        lambda: llm.encode(TEXT),
        lambda: llm.chat(messages),
        lambda: llm.__enter__(),
    ):
        with pytest.raises(UserError, match="this LLM is closed"):
            call()


def test_a_model_shows_how_it_was_loaded(llm: LLM) -> None:
    assert repr(llm).startswith("<LLM 'engine")
    assert "num_speculative_tokens=4, device='cpu', dtype='float32', max_batch=3" in repr(llm)


def test_a_stream_refuses_its_arguments_at_once(llm: LLM) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        llm.stream("")


def test_another_gpu_than_the_current_one_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(device, "HAS_TRITON", True)
    assert resolve_device(torch.device("cuda:0"))[0].type == "cuda"
    with pytest.raises(UserError, match=r"call torch\.cuda\.set_device\(1\) first"):
        resolve_device(torch.device("cuda:1"))
    with pytest.raises(UserError, match="device must be auto, cpu or cuda, got 'mps'"):
        resolve_device(torch.device("mps"))


def test_a_cache_that_does_not_fit_says_what_to_lower(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not enough memory: you tried to allocate 99 bytes.\nMore")

    monkeypatch.setattr(KVCache, "empty", refuse)
    said = r"max_batch=8 .* max_length=512 .*99 bytes.*lower max_length, max_batch or cache_tokens"
    with pytest.raises(UserError, match=said):
        LLM(tiny_checkpoint(tmp_path))
