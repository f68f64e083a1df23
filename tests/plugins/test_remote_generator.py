"""Remote generators: what they send, what they pay for, and what becomes of a run that is killed or stopped."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import lens_remote
import lens_shapes
import openai
import pytest
from image_apis import (
    ARK,
    BASES,
    CLASSES,
    DIALECTS,
    GEMINI,
    KEY,
    OPENAI,
    PICTURE,
    PRICE,
    REQUEST,
    Clock,
    Dialect,
    ImageAPI,
    generator,
    image_api,  # noqa: F401  # the fixture `api`
    picture,
    run,
    says,
    send,
)
from lens_remote import answers, ledger, pictures
from lens_remote.ledger import BudgetReached, Ledger, LedgerError, read_lines

from lens_core.catalog import Catalog
from lens_core.config import flaw_of, structure
from lens_core.evaluation.bench import BenchmarkRequest, run_benchmark
from lens_core.evaluation.manifest import Manifest
from lens_core.io.http import Answer
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, LensError, PictureRequest, StopGeneration


def requests(count: int) -> list[PictureRequest]:
    return [PictureRequest(f"picture {i}", seed=i, prompt_id=f"{i:03d}") for i in range(count)]


def counted(folder: Path) -> int:
    return sum(line.pictures for line in read_lines(folder))


# ---- what is sent -------------------------------------------------------------------------------------------------


def test_the_plugin_offers_three_generators_whose_configs_a_recipe_can_hold() -> None:
    catalog = Catalog.of(lens_remote)
    for dialect in DIALECTS:
        entry = catalog.find("generator", dialect.generator)
        assert entry.name == f"lens_remote:{dialect.generator}" and entry.cls is CLASSES[dialect.name]
        assert flaw_of(entry.cls.Config) is None


@pytest.mark.parametrize(
    ("dialect", "size", "body"),
    [
        (OPENAI, (1024, 1536), {
            "model": "gpt-image-2", "prompt": "a red circle", "n": 1, "size": "1536x1024", "quality": "high",
            "background": "opaque", "moderation": "auto", "output_format": "png"}),
        (GEMINI, None, {
            "contents": [{"role": "user", "parts": [{"text": "a red circle"}]}],
            "generationConfig": {"responseModalities": ["IMAGE"], "seed": 5,
                                 "imageConfig": {"aspectRatio": "1:1", "imageSize": "1K"}}}),
        (ARK, (1024, 1024), {
            "model": "doubao-seedream-4-0-250828", "prompt": "a red circle", "size": "1024x1024",
            "response_format": "b64_json", "watermark": False, "sequential_image_generation": "disabled",
            "stream": False}),
    ],
    ids=lambda v: getattr(v, "name", ""),
)  # fmt: skip
def test_a_request_is_what_the_protocol_says(
    dialect: Dialect, size: Any, body: Any, api: ImageAPI, tmp_path: Path
) -> None:
    api.otherwise = dialect.ok()
    request = PictureRequest("a red circle", 5 + 2**31, size, "000", 0)
    (outcome,), _ = run(generator(dialect, api, tmp_path), [request])
    assert outcome.status == "ok" and outcome.usd == PRICE and outcome.request is request
    ((path, headers, sent),) = api.posts
    assert path == dialect.path and sent == body and headers["content-type"] == "application/json"
    assert [n for n, v in headers.items() if KEY in v] == [dialect.key_header[0]]


def test_further_fields_of_a_request_are_set_or_left_out(api: ImageAPI, tmp_path: Path) -> None:
    api.otherwise = OPENAI.ok()
    run(generator(OPENAI, api, tmp_path, request={"user": "lens", "background": None}))
    assert api.posts[0][2]["user"] == "lens" and "background" not in api.posts[0][2]


def test_openais_own_client_sends_the_same_and_reads_the_same(api: ImageAPI, tmp_path: Path) -> None:
    api.otherwise = OPENAI.ok()
    (ours,), _ = run(generator(OPENAI, api, tmp_path))
    body = {k: v for k, v in api.posts[0][2].items() if k not in ("model", "prompt")}
    with openai.OpenAI(api_key=KEY, base_url=api.url + "/v1", http_client=httpx2.Client(trust_env=False)) as client:
        theirs = client.images.generate(model="gpt-image-2", prompt="a red circle", **body)
    assert theirs.data and theirs.usage
    assert api.posts[0][0] == api.posts[1][0] and api.posts[0][2] == api.posts[1][2]
    assert api.posts[0][1]["authorization"] == api.posts[1][1]["authorization"]
    assert base64.b64decode(theirs.data[0].b64_json or "") == ours.image
    assert ours.facts["usage"]["output_tokens"] == theirs.usage.output_tokens


def test_statuses_are_retried_as_openais_own_client_does() -> None:
    with openai.OpenAI(api_key="k", http_client=httpx2.Client()) as client:
        for status in range(400, 600):
            for header in ({}, {"x-should-retry": "true"}, {"x-should-retry": "false"}):
                response = httpx2.Response(status, headers=header, request=httpx2.Request("POST", "http://h/"))
                answer = Answer(status, "application/json", None, None, b"{}", header)
                ours = answers.failure_of_status(answer, {}, CLASSES["openai"].codes).kind
                if ours == "fatal":  # where a key, a model or an address is wrong, no header helps
                    assert status in answers.FATAL
                elif status != 425:  # too early: RFC 8470 says to retry it
                    assert (ours == "retry") == client._should_retry(response), (status, header)


def test_a_description_has_the_settings_and_no_prompt_no_seed_no_key(api: ImageAPI, tmp_path: Path) -> None:
    for dialect in DIALECTS:
        info = generator(dialect, api, tmp_path).describe()
        assert info.name == dialect.model and info.seeded == (dialect is GEMINI)
        assert info.settings["base_url"] == api.url + BASES[dialect.name]
        said = json.dumps(dict(info.settings))
        assert "prompt" not in said and '"seed"' not in said and KEY not in said
    assert api.posts == []


def test_an_estimate_needs_no_key_and_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, api: ImageAPI, tmp_path: Path
) -> None:
    monkeypatch.delenv("LENS_TEST_KEY")
    made = generator(OPENAI, api, tmp_path / "x", dollars_per_picture=0.167, pictures_per_minute=10.0)
    estimate = made.estimate(9332, (1024, 1024))
    assert estimate.calls == 9332 and estimate.usd == pytest.approx(1558.444) and estimate.seconds == 9332 * 6
    unknown = generator(ARK, api, tmp_path / "x", dollars_per_picture=0.0).estimate(10)
    assert unknown.usd is None and unknown.seconds is None
    assert api.posts == [] and not (tmp_path / "x").exists()


# ---- keys and configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "  ", "with space", "two\nlines", "ключ-ключ-ключ"])
def test_without_a_key_that_can_be_sent_nothing_is(
    value: Any, monkeypatch: pytest.MonkeyPatch, api: ImageAPI, tmp_path: Path
) -> None:
    if value is None:
        monkeypatch.delenv("LENS_TEST_KEY")
    else:
        monkeypatch.setenv("LENS_TEST_KEY", value)
    made = generator(ARK, api, tmp_path)
    for act in (made.describe, lambda: list(made.generate([REQUEST]))):
        with pytest.raises(LensError, match="environment variable LENS_TEST_KEY") as caught:
            act()
        assert "\n" not in str(caught.value) and (not (value or "").strip() or value not in str(caught.value))
    made.close()
    assert api.posts == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ""}, "model"),
        ({"model": "../x"}, "model"),
        ({"model": "a?key=b"}, "model"),
        ({"model": "a..b"}, r"model must not hold '\.\.'"),
        ({"key_env": KEY}, "key_env must be the name"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, "must not hold a user or a password"),
        ({"base_url": "ftp://host"}, "must begin with http"),
        ({"budget_dollars": 5.0}, "needs dollars_per_picture"),
        ({"dollars_per_picture": float("nan")}, "dollars_per_picture"),
        ({"dollars_per_picture": -0.1}, "dollars_per_picture"),
        ({"dollars_per_picture": 1e-9}, "dollars_per_picture"),
        ({"budget_dollars": float("inf"), "dollars_per_picture": 1.0}, "budget_dollars"),
        ({"budget_pictures": -1}, "budget_pictures"),
        ({"pictures_per_minute": 0.0}, "pictures_per_minute"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": float("inf")}, "timeout"),
        ({"request": {"n": 4}}, "request must not set n"),
        ({"request": {"stream": True}}, "request must not set stream"),
        ({"request": {"x": float("nan")}}, "request must hold what JSON can"),
        ({"size": "1024"}, "size"),
        ({"quality": "best"}, "quality"),
        ({"ledger": "a\0b"}, "ledger"),
        ({"sizes": "1024x1024"}, "Did you mean 'size'"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_work_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        structure(CLASSES["openai"].Config, {"model": "gpt-image-2", **options})
    assert KEY not in str(caught.value)


def test_the_key_stands_in_no_log_error_or_file(
    api: ImageAPI, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for dialect in DIALECTS:
        api.script = [
            dialect.ok(),
            dialect.fails(500, "", f"key {KEY} and {KEY[:12]}…"),
            says(
                {"model": KEY, "modelVersion": KEY, "data": [], KEY: KEY, "usage": {KEY: 1}, "usageMetadata": {KEY: 1}}
            ),
            dialect.fails(401, "", f"Bearer {KEY} is wrong"),
        ]
        outcomes, stopped = run(generator(dialect, api, tmp_path / dialect.name, retries=0, concurrency=1), requests(4))
        assert stopped and [o.status for o in outcomes] == ["ok", "failed", "failed"]
        said = [stopped, *[o.reason + json.dumps(dict(o.facts)) for o in outcomes]]
        assert all(KEY not in s and KEY[:12] not in s for s in said)
    files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 6 and not any(KEY.encode() in data for data in files)
    assert KEY not in caplog.text and KEY not in "".join(capfd.readouterr())
    assert all(KEY in " ".join(headers.values()) for _, headers, _ in api.posts)  # the search would have found it


# ---- the address of a picture -------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Any:
    """Another host, where pictures lie."""
    made = ImageAPI()
    yield made
    made.close()


def at(url: str) -> Any:
    return says({"data": [{"url": url, "size": "1024x1024"}], "usage": {"generated_images": 1}})


def test_a_picture_is_fetched_from_its_address_without_the_key(api: ImageAPI, store: ImageAPI, tmp_path: Path) -> None:
    store.stored["/p.jpeg?sign=1"] = lambda h: send(h, 302, "", Location=f"{api.url}/moved")  # to another host
    api.stored["/moved"] = lambda h: send(h, 301, "", Location="/there")
    jpeg = picture(form="JPEG")
    api.stored["/there"] = says(jpeg, kind="application/octet-stream")
    api.script = [at(f"{store.url}/p.jpeg?sign=1")]
    (outcome,), _ = run(generator(ARK, api, tmp_path))
    assert outcome.status == "ok" and outcome.image == jpeg
    assert [path for path, _ in store.gets + api.gets] == ["/p.jpeg?sign=1", "/moved", "/there"]
    for _, headers in store.gets + api.gets:
        assert "authorization" not in headers and "x-goog-api-key" not in headers
        assert KEY not in json.dumps(headers)
    assert [line.place.partition(".")[2] for line in read_lines(tmp_path)] == ["jpg"]


@pytest.mark.parametrize(
    ("url", "reason", "fetched"),
    [
        ("{store}/expired", "address_expired: .*403", 1),
        ("{store}/nowhere", "address_expired: .*404", 1),
        ("{store}/page", "bad_picture: .*HTML", 1),
        ("{store}/loop", "bad_address: .*redirects more than 5 times", 6),
        ("{store}/out", "bad_address: .*must begin with http", 1),
        ("{store}/large", "bad_picture: .*larger than 64 MiB", 1),
        ("{store}/p?key=" + KEY, "bad_address: .*holds the key", 0),
        ("{store}/p?key=" + "".join(f"%{b:02X}" for b in KEY.encode()), "bad_address: .*holds the key", 0),
        ("{store}/leak", "bad_address: .*holds the key", 1),
        ("{store}/\u00e9", "bad_address", 0),
        ("file:///etc/passwd", "bad_address", 0),
        ("//host/x", "bad_address", 0),
        ("http://user:pass@127.0.0.1/x", "bad_address", 0),
        ("http://host:99999999/", "bad_address", 0),
    ],
)  # fmt: skip
def test_an_address_that_gives_no_picture_is_a_loss(
    url: str, reason: str, fetched: int, api: ImageAPI, store: ImageAPI, tmp_path: Path
) -> None:
    store.stored = {
        "/expired": says("<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", 403),
        "/page": says("<!DOCTYPE html>sign in", kind="text/html"),
        "/loop": says("", 302, Location="/loop"),
        "/out": says("", 302, Location="file:///etc/passwd"),
        "/leak": says("", 302, Location=f"/p?key={KEY}"),
        "/large": lambda h: [
            h.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n"),
            *(h.wfile.write(bytes(1 << 20)) for _ in range(70)),
        ],
    }
    api.script = [at(url.format(store=store.url))]
    (outcome,), _ = run(generator(ARK, api, tmp_path))
    assert outcome.status == "failed" and re.match(reason, outcome.reason), outcome.reason
    assert len(store.gets) == fetched and len(api.posts) == 1 and counted(tmp_path) == 1
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    again, _ = run(generator(ARK, api, tmp_path))
    assert again[0].status == "failed" and "resend_lost" in again[0].reason and len(api.posts) == 1


def test_a_store_that_is_down_is_asked_again_by_the_next_run_and_the_picture_paid_once(
    api: ImageAPI, store: ImageAPI, tmp_path: Path
) -> None:
    store.stored["/p"] = says("busy", 503)
    api.script = [at(f"{store.url}/p")]
    (outcome,), _ = run(generator(ARK, api, tmp_path))
    assert outcome.status == "failed" and outcome.reason.startswith("no_download: ") and len(store.gets) == 3
    store.stored["/p"] = says(PICTURE)
    (outcome,), _ = run(generator(ARK, api, tmp_path))
    assert outcome.image == PICTURE and len(api.posts) == 1 and counted(tmp_path) == 1


def test_a_key_that_is_a_placeholder_may_stand_in_an_address(
    api: ImageAPI, store: ImageAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_TEST_KEY", "none")
    store.stored["/none"] = says(PICTURE)
    api.script = [at(f"{store.url}/none")]
    (outcome,), _ = run(generator(ARK, api, tmp_path))
    assert outcome.image == PICTURE


@pytest.mark.parametrize("prompt", ["", "\0", "half \ud800 a character", "\u202e猫\n\n", "x" * 40_000])
def test_any_prompt_is_sent_as_it_is(prompt: str, api: ImageAPI, tmp_path: Path) -> None:
    api.otherwise = GEMINI.ok()
    for _ in range(2):
        (outcome,), _ = run(generator(GEMINI, api, tmp_path), [PictureRequest(prompt, prompt_id="0")])
        assert outcome.status == "ok"
    assert [body["contents"][0]["parts"][0]["text"] for _, _, body in api.posts] == [prompt]


def test_an_api_by_https_is_not_answered_by_http() -> None:
    failure = pictures.fetch("http://127.0.0.1:9/p", 1.0, False, KEY)
    assert isinstance(failure, answers.Failure) and failure.code == "bad_address"


# ---- one run ------------------------------------------------------------------------------------------------------


def test_so_many_requests_run_at_a_time_and_outcomes_come_as_they_are_known(api: ImageAPI, tmp_path: Path) -> None:
    slow = threading.Event()

    def waits(handler: Any) -> None:
        slow.wait(10)
        OPENAI.ok()(handler)

    api.script = [waits]
    api.otherwise = OPENAI.ok()
    made = generator(OPENAI, api, tmp_path, concurrency=3)
    seen = []
    for outcome in made.generate(requests(9)):
        seen.append(outcome.request.prompt_id)
        if len(seen) == 8:
            slow.set()  # the others did not wait for it
    made.close()
    assert sorted(seen) == [f"{i:03d}" for i in range(9)] and api.most <= 3
    first = next(i for i, (_, _, body) in enumerate(api.posts) if body["prompt"] == f"picture {int(seen[-1])}")
    assert first == 0


def test_requests_begin_evenly_spaced_retries_included(api: ImageAPI, tmp_path: Path) -> None:
    clock = Clock()
    api.script = [OPENAI.ok(), OPENAI.fails(429, "rate_limit_exceeded", Retry_After="30")]
    api.otherwise = OPENAI.ok()
    made = generator(OPENAI, api, tmp_path, clock, concurrency=1, pictures_per_minute=10.0)
    outcomes, _ = run(made, requests(4))
    assert [o.status for o in outcomes] == ["ok"] * 4
    # 0; 6: told to wait; 6 + 30 + backoff, less than 6 + 30 + 6; then 6 and 12 later
    assert 6 + 30 + 0.5 + 12 <= clock.now() <= 6 + 30 + 1 + 12


def test_several_runs_at_once_share_a_rate(api: ImageAPI, tmp_path: Path) -> None:
    clock = Clock()
    api.otherwise = OPENAI.ok()
    shares = [requests(6)[:3], requests(6)[3:]]
    runs = [generator(OPENAI, api, tmp_path, clock, concurrency=2, pictures_per_minute=10.0) for _ in shares]
    threads = [threading.Thread(target=run, args=pair) for pair in zip(runs, shares, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = sorted(line.sent_at for line in read_lines(tmp_path))
    assert len(sent) == 6 and all(b - a > 5.999 for a, b in pairwise(sent))


def test_backoff_grows_and_stays_below_a_minute(api: ImageAPI, tmp_path: Path) -> None:
    clock = Clock()
    api.otherwise = OPENAI.fails(503)
    (outcome,), _ = run(generator(OPENAI, api, tmp_path, clock, retries=9))
    assert outcome.status == "failed" and len(api.posts) == 10 and len(clock.slept) == 9
    assert all(min(60, 2.0**i) / 2 <= s <= min(60, 2.0**i) for i, s in enumerate(clock.slept))


def test_what_is_finished_comes_before_the_run_stops_and_nothing_is_sent_after(api: ImageAPI, tmp_path: Path) -> None:
    api.script = [OPENAI.ok(), OPENAI.ok(), OPENAI.quota()]
    api.otherwise = OPENAI.ok()
    outcomes, stopped = run(generator(OPENAI, api, tmp_path, concurrency=1), requests(9))
    assert [o.status for o in outcomes] == ["ok", "ok"] and len(api.posts) == 3
    assert stopped is not None and stopped.startswith("gpt-image-2: insufficient_quota: HTTP 429: You exceeded")
    api.posts.clear()
    outcomes, stopped = run(generator(OPENAI, api, tmp_path), requests(9))
    assert len(outcomes) == 9 and stopped is None and len(api.posts) == 7


def test_requests_under_way_are_waited_for_when_the_run_stops(api: ImageAPI, tmp_path: Path) -> None:
    stopped_first = threading.Event()

    def late(handler: Any) -> None:
        stopped_first.wait(10)
        time.sleep(0.05)
        OPENAI.ok()(handler)

    def wrong(handler: Any) -> None:
        OPENAI.fails(401)(handler)
        stopped_first.set()

    api.script = [late, wrong]
    outcomes, stopped = run(generator(OPENAI, api, tmp_path, concurrency=2), requests(5))
    assert [o.status for o in outcomes] == ["ok"] and stopped and len(api.posts) == 2


def test_a_caller_that_stops_listening_loses_no_picture(api: ImageAPI, tmp_path: Path) -> None:
    api.otherwise = OPENAI.ok()
    made = generator(OPENAI, api, tmp_path, concurrency=4)
    outcomes = made.generate(requests(20))
    next(outcomes)
    outcomes.close()
    made.close()
    sent = len(api.posts)
    assert sent < 20 and [line.state for line in read_lines(tmp_path)] == ["drawn"] * sent
    again, _ = run(generator(OPENAI, api, tmp_path), requests(20))
    assert len(again) == 20 and len(api.posts) == 20


def test_failures_in_a_row_stop_the_run_and_refusals_do_not(api: ImageAPI, tmp_path: Path) -> None:
    api.otherwise = GEMINI.refused()
    outcomes, stopped = run(generator(GEMINI, api, tmp_path / "a", stop_after=3, concurrency=1), requests(6))
    assert [o.status for o in outcomes] == ["refused"] * 6 and stopped is None
    api.otherwise = says(GEMINI.drawn())
    outcomes, stopped = run(generator(GEMINI, api, tmp_path / "b", stop_after=3, concurrency=1), requests(6))
    assert [o.status for o in outcomes] == ["failed"] * 3 and "3 pictures in a row failed" in (stopped or "")


def test_a_model_that_was_shut_down_is_named_with_its_date(api: ImageAPI, tmp_path: Path) -> None:
    api.otherwise = OPENAI.fails(404, "model_not_found", "The model does not exist.")
    _, stopped = run(generator(OPENAI, api, tmp_path, model="gpt-image-1"))
    assert "23 October 2026 as the end of gpt-image-1: name a successor" in (stopped or "")


def test_a_host_that_is_not_there_costs_nothing(api: ImageAPI, tmp_path: Path) -> None:
    url = api.url
    api.close()
    (outcome,), _ = run(generator(OPENAI, api, tmp_path, base_url=url))
    assert outcome.status == "failed" and outcome.reason.startswith("no_connection: ") and counted(tmp_path) == 0


# ---- money --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"budget_pictures": 3}, {"budget_dollars": 0.12}, {"budget_dollars": 0.159}])
def test_a_budget_holds_for_a_ledger_with_all_its_runs(options: dict[str, Any], api: ImageAPI, tmp_path: Path) -> None:
    api.script = [OPENAI.ok(), says({"data": []})]  # the second may have been billed: it counts
    api.otherwise = OPENAI.ok()
    outcomes, stopped = run(generator(OPENAI, api, tmp_path, concurrency=1, **options), requests(2))
    assert [o.status for o in outcomes] == ["ok", "failed"] and stopped is None
    outcomes, stopped = run(generator(OPENAI, api, tmp_path, concurrency=4, **options), requests(9))
    assert sorted(o.status for o in outcomes) == ["failed", "ok", "ok"]
    assert stopped is not None and "is reached" in stopped and "raise it to go on" in stopped
    assert len(api.posts) == 3 == counted(tmp_path)


def test_a_budget_of_nothing_sends_nothing(api: ImageAPI, tmp_path: Path) -> None:
    outcomes, stopped = run(generator(OPENAI, api, tmp_path, budget_pictures=0), requests(3))
    assert outcomes == [] and "budget_pictures (0) is reached" in (stopped or "") and api.posts == []


def test_several_runs_at_once_share_a_budget_and_pay_for_no_picture_twice(api: ImageAPI, tmp_path: Path) -> None:
    api.otherwise = OPENAI.ok()
    results: list[Any] = []

    def one() -> None:
        results.append(run(generator(OPENAI, api, tmp_path, concurrency=3, budget_pictures=7), requests(10)))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(stopped for _, stopped in results)
    assert len(api.posts) == 7 == counted(tmp_path)
    assert len({body["prompt"] for _, _, body in api.posts}) == 7


def test_the_same_picture_is_asked_for_again_only_where_something_that_decides_it_changes(
    api: ImageAPI, tmp_path: Path
) -> None:
    api.otherwise = OPENAI.ok()
    variants = [
        (REQUEST, {}),
        (PictureRequest("a red circle", 8, None, "000", 0), {}),
        (PictureRequest("a red circle", 7, None, "000", 1), {}),
        (PictureRequest("a red circlE", 7, None, "000", 0), {}),
        (REQUEST, {"quality": "low"}),
        (REQUEST, {"model": "gpt-image-2.5-flare"}),
    ]
    for _ in range(2):
        for request, options in variants:
            (outcome,), _ = run(generator(OPENAI, api, tmp_path, **options), [request])
            assert outcome.status == "ok"
    run(generator(OPENAI, api, tmp_path, retries=0, concurrency=9, timeout=9.0, budget_pictures=99))  # decide nothing
    assert len(api.posts) == len(variants)


def test_what_was_lost_is_sent_again_only_when_told_so_and_counts_twice(api: ImageAPI, tmp_path: Path) -> None:
    api.script = [says({"data": []})]
    api.otherwise = OPENAI.ok()
    for resend, status, sent in [(False, "failed", 1), (False, "failed", 1), (True, "ok", 2), (True, "ok", 2)]:
        (outcome,), _ = run(generator(OPENAI, api, tmp_path, resend_lost=resend))
        assert (outcome.status, len(api.posts)) == (status, sent)
    assert counted(tmp_path) == 2


def test_a_picture_whose_file_is_gone_is_a_loss_and_not_paid_again(api: ImageAPI, tmp_path: Path) -> None:
    api.otherwise = OPENAI.ok()
    run(generator(OPENAI, api, tmp_path))
    (file,) = (tmp_path / "pictures").iterdir()
    file.write_bytes(b"changed")
    (outcome,), _ = run(generator(OPENAI, api, tmp_path))
    assert outcome.reason.startswith("picture_gone: ") and len(api.posts) == 1 and counted(tmp_path) == 1
    (outcome,), _ = run(generator(OPENAI, api, tmp_path, resend_lost=True))
    assert outcome.image == PICTURE and len(api.posts) == 2


def test_a_disk_that_is_full_stops_the_run_and_hands_on_what_was_paid_for(
    api: ImageAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise LedgerError("no space left")

    monkeypatch.setattr(Ledger, "keep", full)
    api.otherwise = OPENAI.ok()
    outcomes, stopped = run(generator(OPENAI, api, tmp_path, concurrency=1), requests(5))
    assert [o.image for o in outcomes] == [PICTURE] and "no space left" in (stopped or "") and len(api.posts) == 1


# ---- killed -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from image_apis import ARK, generator
from lens_core.io import atomic_files
from lens_core.types import PictureRequest
from lens_remote import drawing
from lens_remote.ledger import Ledger

point, url, folder = sys.argv[1:]

class API:
    pass

api = API()
api.url = url
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

def around(owner, name, before=lambda *a: False, after=lambda *a: False):
    real = getattr(owner, name)
    def wrapped(*a, **k):
        if before(*a):
            die()
        value = real(*a, **k)
        if after(*a):
            die()
        return value
    setattr(owner, name, wrapped)

state = lambda wanted: lambda *a: a[2] == wanted
{
    "before it is sent": lambda: around(drawing.http, "post", before=lambda *_: True),
    "when it is answered": lambda: around(drawing.http, "post", after=lambda *_: True),
    "when its address is known": lambda: around(Ledger, "settle", after=state("address")),
    "before its file is whole": lambda: around(os, "replace", before=lambda *_: True) or around(
        atomic_files.Path, "replace", before=lambda *_: True),
    "before it is settled": lambda: around(Ledger, "settle", before=state("drawn")),
    "when it is settled": lambda: around(Ledger, "settle", after=state("drawn")),
    "when it is handed over": lambda: None,
}[point]()
for outcome in generator(ARK, api, Path(folder), concurrency=1).generate([
    PictureRequest("a red circle", seed=7, prompt_id="000", index=0)
]):
    die()
"""


@pytest.mark.parametrize(
    ("point", "by_address", "sent", "restored"),
    [
        ("before it is sent", False, 0, False),
        ("when it is answered", False, 1, False),
        ("when its address is known", True, 1, True),
        ("before its file is whole", True, 1, True),
        ("before its file is whole", False, 1, False),
        ("before it is settled", False, 1, False),
        ("when it is settled", False, 1, True),
        ("when it is handed over", False, 1, True),
    ],
)  # fmt: skip
def test_a_run_that_is_killed_never_pays_for_a_picture_twice(
    point: str, by_address: bool, sent: int, restored: bool, api: ImageAPI, tmp_path: Path
) -> None:
    api.stored["/p"] = says(PICTURE)
    api.otherwise = at(f"{api.url}/p") if by_address else ARK.ok()
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    killed = subprocess.run([sys.executable, "-c", KILLED, point, api.url, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL and len(api.posts) == sent
    assert counted(tmp_path) == 1, "what may have been billed counts"
    (outcome,), _ = run(generator(ARK, api, tmp_path))
    assert len(api.posts) == sent, "nothing is sent again"
    if restored:
        assert outcome.image == PICTURE and counted(tmp_path) == 1
        return
    assert outcome.status == "failed" and outcome.reason.startswith("under_way: ")
    with sqlite3.connect(tmp_path / ledger.FILE) as connection:
        connection.execute("UPDATE requests SET deadline = -1")
    connection.close()
    (outcome,), _ = run(generator(ARK, api, tmp_path))
    assert outcome.reason.startswith("no_answer: ") and "may have been billed" in outcome.reason
    assert len(api.posts) == sent
    (outcome,), _ = run(generator(ARK, api, tmp_path, resend_lost=True))
    assert outcome.image == PICTURE and len(api.posts) == sent + 1 and counted(tmp_path) == 2


def test_a_benchmark_run_takes_up_what_was_paid_for(api: ImageAPI, tmp_path: Path) -> None:
    catalog = Catalog.of(lens_remote, lens_shapes)
    options = {
        "model": "gpt-image-2", "base_url": f"{api.url}/v1", "key_env": "LENS_TEST_KEY", "concurrency": 1,
        "dollars_per_picture": PRICE, "budget_pictures": 2,
    }  # fmt: skip
    data = picture(64, 64)
    api.script = [OPENAI.ok(data), OPENAI.refused()]
    api.otherwise = OPENAI.ok(data)

    def bench(**more: Any) -> Manifest:
        spec = ComponentSpec("openai_images", {**options, **more})
        request = BenchmarkRequest("shapes", spec, limit=4, size=(64, 64), stages=("generate",))
        try:
            run_benchmark(request, tmp_path, catalog=catalog)
        finally:
            manifest = Manifest(tmp_path, "gpt-image-2")
        return manifest

    with pytest.raises(StopGeneration, match=r"budget_pictures \(2\) is reached.*start again to go on"):
        bench()
    (tmp_path / "manifest.jsonl").unlink()  # as if it had been killed before it wrote a line
    manifest = bench(budget_pictures=None)
    assert [entry.status for entry in manifest.entries.values()].count("refused") == 1
    assert len(manifest.entries) == 4 and len(api.posts) == 4
    assert {entry.usd for entry in manifest.entries.values() if entry.status == "ok"} == {PRICE}
    manifest.check_pictures()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in written and (tmp_path / "ledger" / ledger.FILE).is_file()


# ---- the ledger ---------------------------------------------------------------------------------------------------


def test_a_ledger_is_exact_about_money(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    budget = ledger.Limits(dollars=0.3)
    for i in range(3):  # 0.1 + 0.1 + 0.1 is above 0.3 in floats
        book.begin(str(i), "m", "p", 0.1, 1.0, budget, False)
    with pytest.raises(BudgetReached, match=r"\$0\.30"):
        book.begin("3", "m", "p", 0.1, 1.0, budget, False)
    book.close()


def test_what_is_under_way_or_drawn_stands_against_a_second_request_even_of_what_was_lost(tmp_path: Path) -> None:
    clock = Clock()
    book = Ledger(tmp_path, clock.now)

    def begin() -> tuple[ledger.Line, bool]:
        return book.begin("k", "m", "p", 0.1, 60.0, ledger.Limits(), True)

    first, is_new = begin()
    assert is_new and begin() == (first, False), "it may be answered yet"
    clock.sleep(61)
    second, is_new = begin()
    assert is_new and [line.state for line in book.lines()] == ["lost", "sent"]
    book.settle(second, "drawn", pictures=1, seconds=1.0, place="pictures/x.png")
    clock.sleep(61)
    assert begin()[0].state == "drawn" and len(book.lines()) == 2
    book.close()


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)


def sql(text: str) -> Any:
    def change(path: Path) -> None:
        with sqlite3.connect(path) as connection:
            connection.executescript(text)
        connection.close()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.write_bytes(b"not a database, but long enough to be one" * 100), "cannot be used"),
        (lambda p: p.write_bytes(p.read_bytes()[:5000]), "cannot be used|is damaged"),
        (damaged, "cannot be used|is damaged|not a ledger"),
        (sql("PRAGMA user_version = 2"), r"later version of Lens \(2\)"),
        (sql("DROP TABLE requests; CREATE TABLE requests (id INTEGER)"), "is not a ledger"),
        (sql("CREATE TRIGGER t AFTER INSERT ON requests BEGIN DELETE FROM requests; END"), "is not a ledger"),
        (lambda p: (p.unlink(), p.mkdir()), "cannot be used"),
    ],
)  # fmt: skip
def test_a_ledger_that_cannot_be_trusted_is_refused_and_nothing_is_sent(
    change: Any, words: str, api: ImageAPI, tmp_path: Path
) -> None:
    Ledger(tmp_path).close()
    change(tmp_path / ledger.FILE)
    with pytest.raises(LedgerError, match=words) as caught:
        list(generator(OPENAI, api, tmp_path).generate([REQUEST]))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and api.posts == []


def test_a_folder_that_cannot_be_made_is_named(api: ImageAPI, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match="file"):
        list(generator(OPENAI, api, tmp_path / "file" / "ledger").generate([REQUEST]))
    made = CLASSES["openai"](CLASSES["openai"].Config(model="m", base_url=api.url, key_env="LENS_TEST_KEY"))
    with pytest.raises(LensError, match="m: set ledger"):
        list(made.generate([REQUEST]))
    made.open(tmp_path)
    api.otherwise = OPENAI.ok()
    assert [o.status for o in made.generate([REQUEST])] == ["ok"]
    made.close()
    assert (tmp_path / "ledger" / ledger.FILE).is_file()


def test_the_command_prints_what_was_spent(api: ImageAPI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lens_remote.commands import ledger as command

    api.script = [OPENAI.ok(), OPENAI.refused(), says({"data": []})]
    run(generator(OPENAI, api, tmp_path / "ledger", concurrency=1), requests(3))
    assert command(tmp_path) == 0
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["gpt-image-2", "drawn", "1", "1", "0.040"],
        ["gpt-image-2", "refused", "1", "0", "0.000"],
        ["gpt-image-2", "lost", "1", "1", "0.040"],
        ["all", "", "3", "2", "0.080"],
    ]
    assert command(tmp_path / "ledger", json_=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["picture 0", "picture 1", "picture 2"]
    with pytest.raises(LedgerError, match=r"holds no ledger\.sqlite"):
        command(tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()
