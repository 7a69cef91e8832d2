"""Reading requests. What a client sees of it is tested over HTTP, in `tests/commands/test_serve.py`."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.serving.requests import CSV, JSON, Refusal, read_texts, require_content_type

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["inputs", "instances", "dataframe_split", "dataframe_records", "columns", "data", "text", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def refusal(body: bytes, kind: str) -> Refusal | list[str]:
    try:
        return read_texts(body, kind)
    except Refusal as error:
        return error


@given(DOCUMENTS)
def test_any_json_is_texts_or_a_refusal(document: Any) -> None:
    found = refusal(json.dumps(document).encode(), JSON)
    if isinstance(found, Refusal):
        assert found.status in (400, 413) and found.reason
    else:
        assert found and all(isinstance(text, str) for text in found)


@given(st.binary(max_size=60), st.sampled_from([JSON, CSV]))
def test_any_bytes_are_texts_or_a_refusal(body: bytes, kind: str) -> None:
    found = refusal(body, kind)
    assert isinstance(found, list) or found.status == 400


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_texts_are_read_as_they_were_sent(texts: list[str]) -> None:
    assert read_texts(json.dumps({"inputs": texts}).encode(), JSON) == texts


@pytest.mark.parametrize(
    ("given_type", "read"),
    [("application/json", JSON), ("Application/JSON; charset=utf-8", JSON), ('text/csv;charset="UTF-8"', CSV)],
)
def test_content_types_are_read_as_http_has_them(given_type: str, read: str) -> None:
    assert require_content_type(given_type, None) == require_content_type(given_type, "identity") == read


def test_a_clients_words_are_quoted_short_and_on_one_line() -> None:
    with pytest.raises(Refusal) as error:
        require_content_type("a/b\x1b[31m\n" + "x" * 1_000, None)
    assert error.value.status == 415
    assert len(error.value.reason) < 200 and error.value.reason.isprintable()
