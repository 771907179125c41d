"""Keys and records of calls: everything that is sent is in the key, nothing else is, and no damage is served."""

import base64
import copy
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lvlmva_core.lvlm.calls import Call, CallStore, Message, Picture, answer_text, check_record, make_record
from lvlmva_core.lvlm.client import sampling_parameters, transport_parameters
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.store import Store, digest

ENDPOINT: dict[str, Any] = {
    "base_url": "https://models.example.org/v1",
    "model": "m",
    "revision": "2025",
    "api_key_variable": "EXAMPLE_API_KEY",
    "token_limit_name": "max_tokens",
    "token_limit": 100,
    "temperature": 0.5,
    "seed": 1,
    "image_detail": "low",
    "extra_body": {"top_p": 0.9},
    "concurrency": 4,
    "timeout_s": 10.0,
    "retries": 2,
    "max_wait_s": 60.0,
    "usd_per_million_input_tokens": 1.0,
    "usd_per_million_output_tokens": 2.0,
    "max_calls": 10,
    "max_cost_usd": 1.0,
    "allow_upload": True,
    "allow_unhydrated": False,
}
SENT = {
    "model": "other",
    "token_limit_name": "max_completion_tokens",
    "token_limit": 101,
    "temperature": None,
    "seed": 2,
    "image_detail": "high",
    "extra_body": {"top_p": 0.8},
}
NOT_SENT = {
    "base_url": "http://localhost:8000",
    "api_key_variable": None,
    "concurrency": 1,
    "timeout_s": 99.0,
    "retries": 0,
    "max_wait_s": 1.0,
    "usd_per_million_input_tokens": 9.0,
    "usd_per_million_output_tokens": 9.0,
    "max_calls": 99,
    "max_cost_usd": 9.0,
    "allow_upload": False,
    "allow_unhydrated": True,
    "service_tier": "flex",
    "without_capacity": "standard",
    "tier_usd_per_million_input_tokens": 0.5,
    "tier_usd_per_million_output_tokens": 1.0,
    "batch_usd_per_million_input_tokens": 0.5,
    "batch_usd_per_million_output_tokens": 1.0,
}
PIXELS = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)


def _call(
    changes: dict[str, Any] | None = None, pixels: np.ndarray = PIXELS, text: str = "look", index: int = 0
) -> Call:
    endpoint = Endpoint.model_validate({**ENDPOINT, **(changes or {})})
    messages = (Message("user", (text, Picture(pixels, endpoint.image_detail), "well?")),)
    transport = transport_parameters(endpoint)
    return Call(endpoint.model, endpoint.revision, messages, sampling_parameters(endpoint), index, transport)


def test_every_setting_of_an_endpoint_is_known_to_be_sent_or_not() -> None:
    assert SENT.keys() | NOT_SENT.keys() | {"revision"} == Endpoint.model_fields.keys()


@pytest.mark.parametrize("name", sorted(SENT))
def test_a_change_of_what_is_sent_changes_the_key_and_the_body(name: str) -> None:
    changed = _call({name: SENT[name]})
    assert changed.body() != _call().body()
    assert changed.key() != _call().key()


@pytest.mark.parametrize("name", sorted(NOT_SENT))
def test_a_change_of_what_is_not_sent_changes_neither(name: str) -> None:
    changed = _call({name: NOT_SENT[name]})
    sent = {"service_tier": "flex"} if name == "service_tier" else {}  # sent, but not asked
    assert changed.body() == {**_call().body(), **sent}
    assert changed.key() == _call().key()


TRANSPORT_BODY = {"service_tier": "flex", "user": "u", "metadata": {"a": "b"}, "prompt_cache_key": "k", "store": True}


def test_what_changes_the_price_or_transport_is_sent_and_not_part_of_the_key() -> None:
    call = _call({"extra_body": {"top_p": 0.9, **TRANSPORT_BODY}})
    assert call.body() == {**_call().body(), **TRANSPORT_BODY}
    assert call.key() == _call().key() == call.keys()[0]


def test_a_call_is_found_under_the_keys_that_it_had_when_transport_was_part_of_them() -> None:
    request = _call().request()
    for extra in (TRANSPORT_BODY, {"service_tier": "flex"}, {"service_tier": "auto"}):
        earlier = digest({**request, "body": {**request["body"], **extra}})
        now = {} if len(extra) == 1 else {"extra_body": {"top_p": 0.9, **extra}}
        assert earlier in set(_call(now).keys())
    assert len(set(_call().keys()) & set(_call(text="look!").keys())) == 0


def test_revision_index_text_and_single_pixels_are_in_the_key() -> None:
    pixels = PIXELS.copy()
    pixels[2, 2, 2] ^= 1
    calls = [_call(), _call({"revision": "2026"}), _call(index=1), _call(text="look!"), _call(pixels=pixels)]
    calls.append(_call(pixels=PIXELS.transpose(1, 0, 2)))
    assert len({call.key() for call in calls}) == len(calls)


def test_the_key_is_of_pixels_and_not_of_how_they_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _call()
    key, url = before.key(), before.body()["messages"][0]["content"][1]["image_url"]["url"]

    def packed_otherwise(picture: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG", compress_level=0)
        return buffer.getvalue()

    monkeypatch.setattr("lvlmva_core.lvlm.calls.to_png", packed_otherwise)
    assert _call().body()["messages"][0]["content"][1]["image_url"]["url"] != url
    assert _call().key() == key


def test_what_is_sent_holds_the_picture_without_metadata() -> None:
    url = _call().body()["messages"][0]["content"][1]["image_url"]["url"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert not picture.info
        np.testing.assert_array_equal(np.asarray(picture), PIXELS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.fixed_dictionaries({"parameters": st.dictionaries(st.text(max_size=4), JSON, max_size=3), "texts": JSON})


@given(one=BODIES, two=BODIES)
@settings(max_examples=300, deadline=None)
def test_two_calls_have_one_key_exactly_if_they_send_the_same(one: dict, two: dict) -> None:
    calls = []
    for body in (one, two):
        parts = tuple(str(text) for text in (body["texts"] if isinstance(body["texts"], list) else [body["texts"]]))
        calls.append(Call("m", "r", (Message("user", parts or ("",)),), body["parameters"], 0))
    wire = [json.dumps(call.body(), sort_keys=True) for call in calls]
    assert (calls[0].key() == calls[1].key()) == (wire[0] == wire[1])


def _response(text: str = "fine", created: int = 5) -> dict[str, Any]:
    return {"created": created, "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def test_a_record_holds_no_pixels_and_verifies(tmp_path: Path) -> None:
    record = make_record(_call(), _response())
    assert "base64" not in json.dumps(record)
    store = CallStore(Store(tmp_path))
    assert store.put(record, {"sample": "s"})
    assert store.get(_call().key()) == record
    assert store.get_with_meta(_call().key()) == {**record, "meta": {"sample": "s"}}
    assert not store.put(make_record(_call(), _response("other")), {})
    assert store.get(_call().key()) == record


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in _paths(inner, (*path, key))]
    if isinstance(value, list):
        return [found for place, inner in enumerate(value) for found in _paths(inner, (*path, place))]
    return [path]


def test_any_change_in_a_record_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = make_record(_call(), _response())
    paths = _paths(record)
    assert len(paths) > 15
    for number, path in enumerate(paths):
        changed = copy.deepcopy(record)
        place: Any = changed
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = "tampered"
        with pytest.raises(ValueError, match=r"its (request|response|key|sha256|schema|content)"):
            check_record(changed)
        store = Store(tmp_path / str(number))
        file = store.path("calls", record["key"], "json")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(changed))
        assert CallStore(store).get(record["key"]) is None
        assert file.with_name(file.name + ".damaged").exists()
    assert caplog.text.count("damaged record") == len(paths)


def test_a_whole_record_of_another_call_is_not_served(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = store.path("calls", _call(index=1).key(), "json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(make_record(_call(), _response())))
    assert CallStore(store).get(_call(index=1).key()) is None


def test_stores_agree_on_calls_that_were_bought_twice_whatever_the_order(tmp_path: Path) -> None:
    bought = [make_record(_call(), _response(f"answer {n}", created)) for n, created in enumerate([7, 3, 3, 9])]
    answers = set()
    for number, order in enumerate(itertools.permutations(bought)):
        store = CallStore(Store(tmp_path / str(number)))
        new, refused = store.take_in(order, "test")
        assert (new, refused) == (1, [])
        found = store.get(_call().key())
        assert found is not None
        answers.add(digest(found))
    assert len(answers) == 1
    assert found["response"]["created"] == 3
    assert CallStore(store.store, {bought[3]["key"]: bought[3]}).get(_call().key()) == bought[3]


def test_records_that_do_not_verify_are_refused_by_name(tmp_path: Path) -> None:
    good = make_record(_call(), _response())
    bad = {**good, "response": _response("forged")}
    new, refused = CallStore(Store(tmp_path)).take_in([bad, None, good], "friend.jsonl")
    assert new == 1
    assert [reason.partition(":")[0] for reason in refused] == ["record 1 of friend.jsonl", "record 2 of friend.jsonl"]


ODD_RESPONSES: list[tuple[Any, str]] = [
    ({}, "its response.choices: field required"),
    ([], "its response: input should be"),
    ({"choices": []}, "its response.choices: list should have at least 1"),
    ({"choices": [{"message": {"content": None}}]}, r"holds no answer \(empty answer\)"),
    ({"choices": [{"message": {"content": "x", "refusal": "no"}}]}, r"holds no answer \(the model refused\)"),
    ({"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}, r"holds no answer \(cut off"),
]


@pytest.mark.parametrize(("response", "problem"), ODD_RESPONSES)
def test_records_without_an_answer_are_neither_taken_in_nor_served(
    tmp_path: Path, response: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    call = _call()
    content = {"schema": 1, "key": call.key(), "request": call.request(), "response": response}
    record = {**content, "sha256": digest(content)}
    with pytest.raises(ValueError, match=problem):
        check_record(record)
    store = CallStore(Store(tmp_path))
    new, refused = store.take_in([record], "friend.jsonl")
    assert (new, len(refused)) == (0, 1)
    file = store.store.path("calls", call.key(), "json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(record))
    assert store.get(call.key()) is None
    assert list(store.records()) == []
    assert "damaged record" in caplog.text


@pytest.mark.parametrize("request_", [{}, [], {"schema": 1, "revision": "r", "index": -1, "body": {}}, None])
def test_records_whose_request_is_none_are_refused(request_: Any) -> None:
    content = {"schema": 1, "key": digest(request_), "request": request_, "response": _response()}
    with pytest.raises(ValueError, match=r"its request"):
        check_record({**content, "sha256": digest(content)})


def test_deep_nesting_in_a_record_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CallStore(Store(tmp_path))
    file = store.store.path("calls", _call().key(), "json")
    file.parent.mkdir(parents=True)
    file.write_text("[" * 100_000)
    assert store.get(_call().key()) is None
    deep: Any = {}
    for _ in range(3000):
        deep = {"a": deep}
    record = make_record(_call(), _response())
    record["response"]["debug"] = deep
    assert store.take_in([record], "friend.jsonl")[0] == 0
    assert "damaged record" in caplog.text


@pytest.mark.parametrize("created", [-1, 10**400, 1.7e18, float("1e308"), True, "now", None])
def test_a_time_that_is_none_never_takes_the_place_of_a_record(tmp_path: Path, created: Any) -> None:
    store = CallStore(Store(tmp_path))
    first, odd = make_record(_call(), _response("first", 5)), make_record(_call(), _response("odd", created))
    store.take_in([first], "one")
    assert store.take_in([odd], "two") == (0, [])
    assert store.get(_call().key()) == first


def test_what_is_imported_never_takes_the_place_of_what_is_there(tmp_path: Path) -> None:
    store = CallStore(Store(tmp_path))
    later, earlier = make_record(_call(), _response("later", 9)), make_record(_call(), _response("earlier", 1))
    store.take_in([later], "one")
    assert store.take_in([earlier], "two", keep_present=True) == (0, [])
    assert store.get(_call().key()) == later


def test_text_in_parts_is_put_together() -> None:
    parts = [{"type": "text", "text": "red: "}, {"type": "other"}, {"type": "text", "text": "yes"}]
    assert answer_text(make_record(_call(), _response(parts))) == "red: yes"  # type: ignore[arg-type]
