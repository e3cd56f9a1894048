"""Whatever a caller passes works or raises UserError, and no other exception."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtpkern import LLM, SamplingParams, UserError, validation
from mtpkern.checkpoints import resolve
from mtpkern.errors import ModelLoadError

TEXT = "the quick brown fox jumps over the lazy dog "
BRIEF = SamplingParams(max_tokens=2)
CHAT = [{"role": "user", "content": "the fox"}]


class Hostile:
    """Neither a number nor a name, and without a repr."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([-(2**63), 2**31, 2**63, 2**64, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
LEAVES = st.one_of(
    st.none(),
    NUMBERS,
    NUMBERS.filter(lambda n: isinstance(n, bool | float) or abs(n) < 2**63).map(np.array),
    st.sampled_from([np.int32(3), np.float16("nan"), np.bool_(True), torch.tensor(4), 1j]),
    st.text(max_size=8),
    st.sampled_from(["auto", "none", "cpu", "cuda", "dummy", "\0", "../x", "a" * 5000, "\udcff"]),
    st.binary(max_size=4),
    st.builds(object),
    st.builds(Hostile),
    st.sampled_from([np.zeros((2, 3)), torch.zeros(2, 2), torch.empty(0), range(3), torch.device]),
)
MESSAGES = st.dictionaries(
    st.sampled_from(["role", "content", "type", "text"]),
    LEAVES | st.sampled_from(["user", "text", [{"type": "text"}]]),
    max_size=3,
)
ANYTHING = st.recursive(
    LEAVES | MESSAGES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
        | st.sets(st.integers(0, 5), max_size=3)
    ),
    max_leaves=6,
)
thorough = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# A model is loaded for every example that is right.
loading = settings(thorough, max_examples=40)


def assert_works_or_is_a_user_error(call: Callable[[], Any]) -> None:
    try:
        call()
    except UserError as error:
        assert str(error) and "\n" not in str(error), "one line, and not an empty one"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: Any) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("arguments"), max_position_embeddings=128)


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, max_batch=2, num_speculative_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SamplingParams.__dataclass_fields__))
@given(value=ANYTHING)
@thorough
def test_sampling_parameters(name: str, value: Any) -> None:
    assert_works_or_is_a_user_error(lambda: SamplingParams(**{name: value}))


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "heads",
        "ngram",
        "num_speculative_tokens",
        "device",
        "dtype",
        "threads",
        "max_batch",
        "max_length",
        "cache_tokens",
        "load_format",
        "synthetic_acceptance",
        "graph",
    ],
)
@given(value=ANYTHING)
@loading
def test_arguments_of_a_model(name: str, value: Any, directory: Path, hub_is_empty: None) -> None:
    if name == "model" and value is None:
        return  # the default model, which may have to be fetched
    threads = torch.get_num_threads()
    assert_works_or_is_a_user_error(lambda: LLM(**{"model": directory, name: value}))
    torch.set_num_threads(threads)


@pytest.fixture
def hub_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Path:
        raise ModelLoadError(f"cannot get {name!a} from the hub")

    monkeypatch.setattr(resolve, "_hub_snapshot", nothing)


@pytest.mark.parametrize("method", ["generate", "stream", "stream_batch", "encode", "chat"])
@given(prompt=ANYTHING)
@thorough
def test_prompts(method: str, prompt: Any, llm: LLM) -> None:
    def call() -> None:
        if method == "encode":
            llm.encode(prompt)
        else:
            result = getattr(llm, method)(prompt, BRIEF)
            list(result) if method.startswith("stream") else None

    assert_works_or_is_a_user_error(call)


@pytest.mark.parametrize("method", ["generate", "stream", "stream_batch", "chat"])
@given(params=ANYTHING, speculate=ANYTHING)
@settings(thorough, max_examples=60)
def test_settings_of_a_request(method: str, params: Any, speculate: Any, llm: LLM) -> None:
    prompt: Any = CHAT if method == "chat" else TEXT
    for given_params, flag in ((params, True), (BRIEF, speculate)):
        if given_params is None:
            continue  # 256 tokens
        assert_works_or_is_a_user_error(
            lambda p=given_params, f=flag: (
                list(getattr(llm, method)(prompt, p, speculate=f).text)  # type: ignore[misc]
                if method == "chat"
                else list(getattr(llm, method)(prompt, p, speculate=f))
            )
        )


def test_numbers_of_numpy_and_torch_are_numbers(directory: Path) -> None:
    params = SamplingParams(
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=torch.tensor(7),  # type: ignore[arg-type]
        seed=np.uint8(9),  # type: ignore[arg-type]
        top_p=np.array(0.5),  # type: ignore[arg-type]
        logprobs=np.bool_(True),  # type: ignore[arg-type]
    )
    assert params == SamplingParams(3, 0.5, 0.5, 7, seed=9, logprobs=True)
    assert json.dumps([params.max_tokens, params.temperature, params.logprobs]) == "[3, 0.5, true]"
    llm = LLM(
        directory,
        num_speculative_tokens=np.int32(2),  # type: ignore[arg-type]
        max_batch=np.int64(2),  # type: ignore[arg-type]
        max_length=np.int64(64),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        dtype=torch.float32,
        synthetic_acceptance=np.array([0.5, 1.0]),  # type: ignore[arg-type]
    )
    assert (llm.k, llm.max_batch, llm.max_length, llm.device.type) == (2, 2, 64, "cpu")
    assert llm.synthetic_acceptance == (0.5, 1.0)
    completion = llm.generate(np.array(llm.encode(TEXT)), params)[0]  # type: ignore[arg-type]
    assert len(completion.token_ids) == 3 and completion.logprobs is not None


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: validation.integer("n", 2.0, 0, 9), r"n must be an integer in 0\.\.9, got 2\.0"),
        (lambda: validation.integer("n", True, 0, 9), "got True"),
        (lambda: validation.integer("n", torch.tensor(True), 0, 9), "got tensor"),
        (lambda: validation.at_least("n", 0, 1), "n must be an integer of at least 1, got 0"),
        (
            lambda: validation.real("x", float("nan"), 0, 1),
            r"x must be a number in 0\.\.1, got nan",
        ),
        (lambda: validation.real("x", "0.5", 0, 1), "got '0.5'"),
        (lambda: validation.flag("f", 1), "f must be True or False, got 1"),
        (lambda: validation.choice("c", "d", ("a", "b", "c")), "c must be a, b or c, got 'd'"),
        (lambda: validation.location("m", ""), "m is empty: give a name or a path"),
        (lambda: validation.location("m", 5), "m must be a name or a path, got 5"),
        (lambda: validation.flag("f", "x" * 90), r"xx\.\.\. \(str\)"),
    ],
)
def test_a_refusal_names_the_argument_and_what_came(check: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check()
