"""`lens serve` as OpenAI's own client speaks to it: pictures, edits, streams, errors."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from lens_serve.jobs import Limits
from lens_serve.outputs import Outputs
from openai import OpenAI
from PIL import Image
from serving import WAIT, Gate, Running, running, until

from lens_core.inference import png_metadata
from lens_core.inference.pipeline import LensPipeline
from lens_core.types import Refinement, RefusedError


@pytest.fixture
def server(quick: LensPipeline) -> Iterator[Running]:
    with running(quick) as one:
        yield one


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with client_of(server) as one:
        yield one


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url, api_key=server.token or "none", max_retries=0, timeout=WAIT)


def picture(encoded: str | None) -> Image.Image:
    assert encoded is not None
    return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))


def png(image: Image.Image) -> tuple[str, bytes, str]:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "a.png", stream.getvalue(), "image/png"


# ---- generations --------------------------------------------------------------------------------------------------


def test_a_generation_is_the_pipelines_picture_with_the_facts_in_its_file(
    client: OpenAI, quick: LensPipeline, tmp_path: Path
) -> None:
    answer = client.images.generate(
        model="toy", prompt="red", n=2, size="48x32", response_format="b64_json",
        extra_body={"seed": 7, "steps": 4, "guidance_scale": 3.0, "negative_prompt": "blue", "sampler": "even"},
    )  # fmt: skip
    assert answer.data is not None and len(answer.data) == 2 and answer.created > 1_700_000_000
    assert (answer.size, answer.output_format, answer.background) == ("48x32", "png", "opaque")
    assert answer.usage is not None and answer.usage.output_tokens == 2 * 3 * 2
    for i, item in enumerate(answer.data):
        image = picture(item.b64_json)
        expected = quick(
            "red", "blue", seed=7 + i, height=32, width=48, num_inference_steps=4, guidance_scale=3.0
        ).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
        assert item.seed == 7 + i  # type: ignore[attr-defined]  # not OpenAI's
        (tmp_path / "a.png").write_bytes(base64.b64decode(item.b64_json or ""))
        facts = png_metadata.facts(tmp_path / "a.png")[1]
        assert (facts["prompt"], facts["negative_prompt"], facts["seed"], facts["steps"]) == ("red", "blue", 7 + i, 4)


def test_what_is_not_named_comes_from_the_checkpoint(client: OpenAI) -> None:
    answer = client.images.generate(prompt="red")
    assert answer.data is not None and picture(answer.data[0].b64_json).size == (32, 32)
    assert answer.size == "32x32" and answer.data[0].revised_prompt is None


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_formats(client: OpenAI, kind: Any) -> None:
    compression = openai.omit if kind == "png" else 50
    answer = client.images.generate(prompt="red", output_format=kind, output_compression=compression)
    assert answer.data is not None and picture(answer.data[0].b64_json).format == kind.upper()


def test_fields_of_the_api_without_meaning_here_are_accepted(client: OpenAI) -> None:
    client.images.generate(
        prompt="red", model="toy", quality="high", moderation="auto", background="opaque", user="me", size="auto",
        style="vivid",
    )  # fmt: skip


def test_our_own_client_of_the_api_gets_its_picture(
    server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lens_remote.openai_images import OpenAIImages

    from lens_core.types import PictureRequest

    monkeypatch.setenv("SERVED_KEY", "none")
    config = OpenAIImages.Config(
        model="toy", base_url=server.url, key_env="SERVED_KEY", size="32x32", ledger=str(tmp_path)
    )
    (outcome,) = OpenAIImages(config).generate([PictureRequest("red")])
    assert outcome.status == "ok" and Image.open(io.BytesIO(outcome.image)).size == (32, 32)


def test_the_prompt_that_a_reasoner_wrote_is_the_revised_prompt(quick: LensPipeline) -> None:
    class Longer:
        def refine(self, prompts: list[str]) -> list[Refinement]:
            return [Refinement(p, f"{p}, in detail") for p in prompts]

    quick.use_reasoner(Longer())
    with running(quick) as server, client_of(server) as client:
        answer = client.images.generate(prompt="red")
    assert answer.data is not None and answer.data[0].revised_prompt == "red, in detail"


def test_a_request_that_a_policy_refuses_is_the_clients_fault_and_is_not_sent_again(
    quick: LensPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lens_remote.openai_images import OpenAIImages

    from lens_core.types import PictureRequest

    class Strict:
        asked = 0

        def refine(self, _: list[str]) -> list[Refinement]:
            Strict.asked += 1
            raise RefusedError("the policy refuses to draw 'red': no colours")

    quick.use_reasoner(Strict())
    monkeypatch.setenv("SERVED_KEY", "none")
    with running(quick) as server, client_of(server).with_options(max_retries=2) as client:
        with pytest.raises(openai.BadRequestError, match="no colours") as fault:
            client.images.generate(prompt="red")
        with pytest.raises(openai.APIError, match="no colours"):
            list(client.images.generate(prompt="red", stream=True))
        config = OpenAIImages.Config(model="toy", base_url=server.url, key_env="SERVED_KEY", ledger=str(tmp_path))
        (outcome,) = OpenAIImages(config).generate([PictureRequest("red")])
    assert (fault.value.code, fault.value.param) == ("moderation_blocked", "prompt")
    assert Strict.asked == 3 and outcome.status == "refused"


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "lens"
    with pytest.raises(openai.NotFoundError) as fault:
        client.models.retrieve("gpt-image-2")
    assert fault.value.code == "model_not_found"


# ---- streams ------------------------------------------------------------------------------------------------------


def test_a_stream_has_its_partial_pictures_and_then_the_finished_one(client: OpenAI) -> None:
    plain = client.images.generate(prompt="red", extra_body={"steps": 8, "seed": 3})
    stream = client.images.generate(prompt="red", stream=True, partial_images=3, extra_body={"steps": 8, "seed": 3})
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [e.partial_image_index for e in events if e.type == "image_generation.partial_image"] == [0, 1, 2]
    assert plain.data is not None
    final = np.asarray(picture(plain.data[0].b64_json)).astype(int)
    away = [np.abs(np.asarray(picture(event.b64_json)).astype(int) - final).mean() for event in events]
    assert away[-1] == 0 and away[0] > 0 and away[2] <= away[0]
    last = events[-1]
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 4 and last.size == "32x32"


def test_a_stream_of_several_pictures_says_which_is_which(client: OpenAI) -> None:
    events = list(
        client.images.generate(prompt="red", n=2, stream=True, partial_images=1, extra_body={"seed": 3, "steps": 4})
    )
    places = [(e.type.rpartition(".")[2], e.image_index) for e in events]  # type: ignore[attr-defined]
    assert places == [("partial_image", 0), ("partial_image", 1), ("completed", 0), ("completed", 1)]
    assert [e.seed for e in events[2:]] == [3, 4]  # type: ignore[union-attr]


def test_an_error_within_a_stream_is_raised_by_the_client(
    client: OpenAI, quick: LensPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refine(_: Any) -> Any:
        raise RuntimeError("no words")

    monkeypatch.setattr(quick, "refine", refine)
    with pytest.raises(openai.APIError, match="RuntimeError: no words"):
        list(client.images.generate(prompt="red", stream=True))
    with pytest.raises(openai.InternalServerError) as fault:
        client.images.generate(prompt="red")
    assert fault.value.code == "generation_failed"


# ---- edits --------------------------------------------------------------------------------------------------------


def test_an_edit_repaints_where_the_mask_is_transparent_and_keeps_the_rest(client: OpenAI) -> None:
    image = Image.new("RGB", (32, 32), (10, 200, 30))
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 32))
    answer = client.images.edit(image=png(image), mask=png(mask), prompt="red", extra_body={"seed": 1, "steps": 4})
    assert answer.data is not None
    new = picture(answer.data[0].b64_json).convert("RGB")
    assert {new.getpixel((x, y)) for x in range(16, 32) for y in range(32)} == {(10, 200, 30)}
    assert new.getpixel((0, 0)) != (10, 200, 30)
    grey = Image.new("L", (32, 32))  # without transparency: white is repainted, as everywhere in Lens
    grey.paste(255, (0, 0, 16, 32))
    same = client.images.edit(image=png(image), mask=png(grey), prompt="red", extra_body={"seed": 1, "steps": 4})
    assert same.data is not None and picture(same.data[0].b64_json).tobytes() == new.tobytes()


def test_an_opaque_mask_with_an_alpha_channel_is_black_and_white(client: OpenAI) -> None:
    image = png(Image.new("RGB", (32, 32), (10, 200, 30)))
    mask = Image.new("RGB", (32, 32))
    mask.paste((255, 255, 255), (0, 0, 16, 32))
    drawn = []
    for mode in ("RGB", "RGBA", "LA"):
        answer = client.images.edit(
            image=image, mask=png(mask.convert(mode)), prompt="red", extra_body={"seed": 1, "steps": 4}
        )
        assert answer.data is not None
        drawn.append(picture(answer.data[0].b64_json).convert("RGB"))
    assert drawn[0].getpixel((0, 0)) != (10, 200, 30) == drawn[0].getpixel((16, 0))
    assert {one.tobytes() for one in drawn} == {drawn[0].tobytes()}


def test_an_edit_without_a_mask_changes_a_share_of_the_picture(client: OpenAI, quick: LensPipeline) -> None:
    image = Image.new("RGB", (32, 32), (10, 200, 30))
    answer = client.images.edit(image=[png(image)], prompt="red", n=2, extra_body={"seed": 1, "strength": 1})
    expected = quick("red", seed=2, image=image, strength=1.0).images[0]
    assert answer.data is not None
    new = np.asarray(picture(answer.data[1].b64_json)).astype(int)
    assert np.abs(new - np.asarray(expected)).max() <= 1
    with pytest.raises(openai.BadRequestError, match="can only begin at noise"):  # a fact about this sampler
        client.images.edit(image=png(image), prompt="red")


def test_an_edit_is_drawn_in_its_size_or_in_that_of_its_picture_on_the_grid(client: OpenAI) -> None:
    image = png(Image.new("RGB", (45, 70)))
    for size, expected in (("32x48", (32, 48)), ("auto", (48, 64)), (openai.omit, (48, 64))):
        answer = client.images.edit(image=image, prompt="red", size=size, extra_body={"strength": 1})
        assert answer.data is not None and picture(answer.data[0].b64_json).size == expected


def test_an_edit_streams_as_well(client: OpenAI) -> None:
    image = png(Image.new("RGB", (32, 32)))
    events = list(
        client.images.edit(
            image=image, prompt="red", stream=True, partial_images=1, extra_body={"strength": 1, "steps": 4}
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_faults_of_an_edit_are_named(client: OpenAI) -> None:
    image, small = png(Image.new("RGB", (32, 32))), png(Image.new("RGBA", (16, 16)))
    for fields, message in (
        ({"image": image, "mask": small}, "the mask is 16x16 px and the image 32x32"),
        ({"image": image, "mask": png(Image.new("RGBA", (32, 32), (0, 0, 0, 255)))}, "black all over"),
        ({"image": [image, image]}, "2 files are called image"),
        ({"image": ("a.png", b"not a picture", "image/png")}, "the image: cannot be read as a picture"),
        ({"image": ("a.png", b"", "image/png")}, "it is empty"),
        ({"image": image, "extra_body": {"strength": 2}}, "strength must be 0 to 1"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(**{"prompt": "red", **fields})  # type: ignore[arg-type]


# ---- the queue ----------------------------------------------------------------------------------------------------


def test_a_full_queue_is_429_with_a_time_and_the_client_tries_again(quick: LensPipeline) -> None:
    gate = Gate(quick)
    with (
        running(quick, Limits(max_queue=1)) as server,
        client_of(server) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        first = pool.submit(client.images.generate, prompt="red")
        gate.arrived()
        second = pool.submit(client.images.generate, prompt="red")
        until(lambda: server.engine.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests wait already") as busy:
            client.images.generate(prompt="red")
        assert int(busy.value.response.headers["retry-after"]) >= 1 and busy.value.code == "rate_limit_exceeded"
        patient = client.with_options(max_retries=5)
        third = pool.submit(patient.images.generate, prompt="red")
        until(lambda: server.engine.counters.refused >= 2)
        gate.open()
        assert all(one.result(WAIT).data for one in (first, second, third))


def test_a_client_that_leaves_cancels_its_request_within_a_step(quick: LensPipeline) -> None:
    gate = Gate(quick)
    with running(quick) as server:
        for stream in (False, True):
            before, passes = server.engine.counters.cancelled, len(quick.backbone.calls)
            impatient = OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=0.5)
            with impatient, pytest.raises((openai.APITimeoutError, openai.APIConnectionError)):
                list(impatient.images.generate(prompt="red", extra_body={"steps": 90}, stream=stream))
            gate.arrived()
            until(lambda: server.engine._jobs[0].cancelled)
            gate.passes.release()
            until(lambda before=before: server.engine.counters.cancelled > before)
            assert len(quick.backbone.calls) - passes <= 2 and server.engine.running == 0
        gate.open()
        assert server.ask("POST", "/v1/images/generations", {"prompt": "red"})[0] == 200


def test_a_client_that_leaves_the_queue_is_not_drawn(quick: LensPipeline) -> None:
    gate = Gate(quick)
    with running(quick) as server, client_of(server) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.images.generate, prompt="red")
        gate.arrived()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).images.generate(prompt="blue")
        until(lambda: server.engine.waiting == 0)
        gate.open()
        assert first.result(WAIT).data and server.engine.counters.done == 1


def test_the_event_loop_answers_while_the_model_draws(quick: LensPipeline) -> None:
    gate = Gate(quick)
    with running(quick) as server, client_of(server) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.images.generate, prompt="red")
        gate.arrived()  # the drawing thread stands still in a step
        assert server.ask("GET", "/health")[2] == b'{"status":"ok"}'
        assert b"\nlens_jobs_running 1\n" in server.ask("GET", "/metrics")[2]
        assert client.models.list().data[0].id == "toy"
        gate.open()
        assert first.result(WAIT).data


def test_requests_that_agree_share_a_batch_and_each_gets_its_own_picture(quick: LensPipeline) -> None:
    gate = Gate(quick)
    with running(quick) as server, client_of(server) as client, ThreadPoolExecutor(5) as pool:

        def draw(prompt: str, seed: int) -> bytes:
            answer = client.images.generate(prompt=prompt, extra_body={"seed": seed})
            assert answer.data is not None
            return picture(answer.data[0].b64_json).tobytes()

        first = pool.submit(draw, "wait", 0)
        gate.arrived()
        words = [("red", 1), ("blue", 2), ("red", 3), ("green", 4)]
        waiting = [pool.submit(draw, *one) for one in words]
        until(lambda: server.engine.waiting == 4)
        gate.open()
        together = [np.frombuffer(one.result(WAIT), np.uint8).astype(int) for one in waiting]
        assert first.result(WAIT) and server.engine.counters.batches == 2
        alone = [np.frombuffer(draw(*one), np.uint8).astype(int) for one in words]
        assert max(np.abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 1


def test_a_server_that_stops_finishes_what_it_accepted_and_refuses_the_rest(quick: LensPipeline) -> None:
    gate = Gate(quick)
    with running(quick) as server, client_of(server) as client, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(client.images.generate, prompt=prompt) for prompt in ("red", "blue")]
        gate.arrived()
        until(lambda: server.engine.running + server.engine.waiting == 2)
        server.engine.refuse()
        assert server.error("POST", "/v1/images/generations", {"prompt": "red"})[0] == 503
        assert server.ask("GET", "/health")[0] == 503
        threading.Timer(0.1, gate.open).start()
        assert all(job.result(WAIT).data for job in jobs)


# ---- the outputs folder -------------------------------------------------------------------------------------------


def test_an_outputs_folder_keeps_pictures_and_serves_them_and_nothing_else(quick: LensPipeline, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    folder = tmp_path / "outputs"
    with running(quick, outputs=Outputs(folder)) as server, client_of(server) as client:
        answer = client.images.generate(prompt="red", response_format="url", n=2, extra_body={"seed": 5})
        assert answer.data is not None and all(item.b64_json is None for item in answer.data)
        names = [str(item.url).rpartition("/")[2] for item in answer.data]
        assert str(answer.data[0].url) == f"http://127.0.0.1:{server.port}/outputs/{names[0]}"
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        status, headers, body = server.ask("GET", f"/outputs/{names[1]}")
        assert (status, headers["content-type"], headers["x-content-type-options"]) == (200, "image/png", "nosniff")
        assert body == (folder / names[1]).read_bytes() and png_metadata.facts(folder / names[1])[1]["seed"] == 6

        link, pipe = "20260101-000000-0123456789ab-0.png", "20260101-000000-0123456789ab-1.png"
        (folder / link).symlink_to(secret)
        (folder / pipe).mkdir()
        (folder / "other.png").write_bytes(b"secret")
        for path in (
            "../secret.png", "..%2Fsecret.png", "%2e%2e/secret.png", "..%5csecret.png", f"%2F{secret}", str(secret),
            f"/{secret}", link, pipe, "other.png", names[0] + "/../../secret.png", names[0] + "%00", "", ".", "..",
            names[0].upper(), f"./{names[0]}/", "..%252fsecret.png",
        ):  # fmt: skip
            status, _, body = server.ask("GET", f"/outputs/{path}")
            assert status == 404 and b"secret" not in body.replace(b"secret.png", b""), path
        assert Outputs(folder).names() == sorted([*names, link, pipe], reverse=True)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_an_address_serves_the_format_that_was_asked_for(quick: LensPipeline, tmp_path: Path, kind: Any) -> None:
    folder = tmp_path / "outputs"
    with running(quick, outputs=Outputs(folder)) as server, client_of(server) as client:
        sizes = []
        for compression in (10, 100):
            answer = client.images.generate(
                prompt="red", response_format="url", output_format=kind, output_compression=compression,
                extra_body={"seed": 5},
            )  # fmt: skip
            assert answer.data is not None and answer.output_format == kind and answer.data[0].b64_json is None
            name = str(answer.data[0].url).rpartition("/")[2]
            status, headers, body = server.ask("GET", f"/outputs/{name}")
            assert (status, headers["content-type"]) == (200, f"image/{kind}")
            assert Image.open(io.BytesIO(body)).format == kind.upper()
            sizes.append(len(body))
            kept = folder / f"{name.rpartition('.')[0]}.png"  # the PNG with its facts stays beside it
            assert png_metadata.facts(kept)[1]["seed"] == 5
        assert sizes[0] < sizes[1]


def test_the_name_of_an_upload_is_used_for_nothing(quick: LensPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    with running(quick, outputs=Outputs(folder)) as server, client_of(server) as client:
        _, data, kind = png(Image.new("RGB", (32, 32)))
        for name in ("../../evil.png", "/etc/passwd", "a\\..\\b.png", "x" * 200):
            client.images.edit(image=(name, data, kind), prompt="red", extra_body={"strength": 1})
        assert all(path.name.startswith("20") and path.parent == folder for path in tmp_path.rglob("*.png"))
        assert len(list(folder.iterdir())) == 4
        with pytest.raises(openai.BadRequestError, match="the form cannot be read"):
            client.images.edit(image=("x" * 5000, data, kind), prompt="red")


def test_without_an_outputs_folder_nothing_is_kept_and_url_is_refused(
    client: OpenAI, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.BadRequestError, match="needs an outputs folder") as fault:
        client.images.generate(prompt="red", response_format="url")
    assert fault.value.param == "response_format"
    assert server.ask("GET", "/outputs/20260101-000000-0123456789ab-0.png")[0] == 404


def test_an_output_that_cannot_be_written_is_one_clear_line(quick: LensPipeline, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "outputs")
    (tmp_path / "outputs").rmdir()
    (tmp_path / "outputs").write_text("a file now")
    with running(quick, outputs=outputs) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError, match="outputs"):
            client.images.generate(prompt="red")
        with pytest.raises(openai.APIError, match="outputs"):
            list(client.images.generate(prompt="red", stream=True))


# ---- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_count_what_happened(server: Running, client: OpenAI) -> None:
    client.images.generate(prompt="red", n=3, extra_body={"steps": 2})
    server.ask("POST", "/v1/images/generations", {"prompt": ""})
    server.ask("GET", "/wherever")
    status, headers, body = server.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = body.decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['lens_http_responses_total{path="/v1/images/generations",status="200"}'] == "1"
    assert values['lens_http_responses_total{path="/v1/images/generations",status="400"}'] == "1"
    assert values['lens_http_responses_total{path="other",status="404"}'] == "1"
    assert (values['lens_jobs_total{outcome="done"}'], values["lens_images_total"]) == ("1", "3")
    assert (values["lens_steps_total"], values["lens_jobs_waiting"], values["lens_job_seconds_count"]) == (
        "2",
        "0",
        "1",
    )
    assert values['lens_job_seconds_bucket{le="+Inf"}'] == "1" and float(values["process_resident_memory_bytes"]) > 1e7
    described = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {name.partition("{")[0] for name in values} <= described | {
        f"lens_job_seconds_{part}" for part in ("bucket", "sum", "count")
    }
    counts = [int(v) for k, v in values.items() if k.startswith("lens_job_seconds_bucket")]
    assert counts == sorted(counts)


def test_an_unknown_path_and_a_wrong_method_have_errors_of_the_same_form(server: Running) -> None:
    status, error = server.error("GET", "/v1/nothing")
    assert status == 404 and error["type"] == "invalid_request_error" and "/v1/nothing" in error["message"]
    assert "answers at /health, /metrics, /v1/images/edits, /v1/images/generations" in error["message"]
    assert server.error("GET", "/v1/images/generations")[0] == 405
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert server.error("GET", path)[0] == 404
    assert json.loads(server.ask("GET", "/health")[2]) == {"status": "ok"}
