"""What is asked of an endpoint, what a hostile one can do, and that killing and resuming lose and repeat nothing."""

import base64
import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cocoa_jax.cli import main
from cocoa_jax.config import load_mixture
from cocoa_jax.data.mixture import open_mixture
from cocoa_jax.data.naming import OpenedSource
from cocoa_jax.data.pipeline import STATS, BatchConfig, MaskingConfig, RowsConfig, stage_dataset
from cocoa_jax.data.sources import Content, Record
from cocoa_jax.data.synthesis.endpoint import Endpoint, EndpointConfig, EndpointError, parse
from cocoa_jax.data.synthesis.filters import FilterConfig
from cocoa_jax.data.synthesis.pictures import open_subjects, subject
from cocoa_jax.data.synthesis.plan import TextsConfig, tasks
from cocoa_jax.data.synthesis.prompts import PROMPTS
from cocoa_jax.data.synthesis.run import SynthesisError, synthesize
from cocoa_jax.data.synthesis.store import REJECTED, ROWS, Store, StoreError

TEXTS = TextsConfig(["caption"])


def at(server, **more) -> EndpointConfig:
    return EndpointConfig(**{"model": "tiny", "url": server.url, "concurrency": 4, "retries": 3, "timeout": 5} | more)


def run(server, source, output, texts=TEXTS, said=None, **more):
    sources = source if isinstance(source, list) else open_subjects([str(source)], {})
    return synthesize(sources, at(server, **more), texts, output, (said if said is not None else []).append)


def lines(output: Path, name: str = ROWS) -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def shown(request: dict) -> PIL.Image.Image | None:
    content = request["messages"][0]["content"]
    if isinstance(content, str):
        return None
    head, _, data = content[0]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64" and content[0]["type"] == "image_url"
    return PIL.Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def told(request: dict) -> str:
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else content[1]["text"]


def test_a_request_shows_the_picture_and_asks_in_the_language(server, photos, tmp_path, monkeypatch, fits):
    monkeypatch.setenv("MY_KEY", "secret-1")
    texts = TextsConfig(["caption", "description"], ["en", "de"], per_picture=4, filters=FilterConfig(language=False))
    server.answer = fits
    made = run(server, photos, tmp_path / "out", texts, key="MY_KEY", max_pixels=10_000, max_tokens=99)
    assert made.rows == len(server.requests) == 48 and set(server.paths) == {"/v1/chat/completions"}
    seen = Counter()
    originals = {(800, 600): 0, (40, 30): 0}
    for request, headers in zip(server.requests, server.headers, strict=True):
        picture = shown(request)
        assert picture.format == "JPEG" and picture.width * picture.height <= 10_000
        originals[(800, 600) if picture.width > 40 else (40, 30)] += 1
        seen[told(request)] += 1
        assert (request["model"], request["max_completion_tokens"], request["temperature"]) == ("tiny", 99, 0.7)
        assert len(request["messages"]) == 1 and request["stream"] is False
        assert headers["authorization"] == "Bearer secret-1"
    assert originals == {(800, 600): 4, (40, 30): 44}
    expected = [PROMPTS[name].asked(code, "") for name in ("caption", "description") for code in ("en", "de")]
    assert seen == dict.fromkeys(expected, 12) and "in German" in expected[1]
    assert "secret-1" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.*"))
    assert server.most <= 4


def test_a_row_says_where_it_is_from_and_the_picture_is_kept_as_it_was(server, photos, tmp_path):
    run(server, photos, tmp_path)
    rows = lines(tmp_path)
    assert len(rows) == 12 and len({row["picture"] for row in rows}) == 12
    for row in rows:
        original = photos / row["record"]
        assert (tmp_path / row["qry_image_path"]).read_bytes() == original.read_bytes()
        assert Path(row["qry_image_path"]).suffix == original.suffix
        assert row["pos_text"].startswith("There is a picture") and row["qry"] == PROMPTS["caption"].query
        known = {"model": "served-name", "source": "photos", "prompt": "caption", "language": "en", "finish": "stop"}
        assert known.items() <= row.items() and row["prompt_hash"] == PROMPTS["caption"].hash
        assert (row["tokens_in"], row["tokens_out"], row["tries"]) == (300, 20, 1)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["asked"])
    begun = json.loads((tmp_path / "run.json").read_text())
    assert begun["model"] == "tiny" and begun["prompts"] == {"caption": PROMPTS["caption"].hash}


def test_its_folder_is_a_data_set_of_stage_2(server, photos, tmp_path, processors):
    run(server, photos, tmp_path)
    opened = open_mixture(load_mixture(tmp_path / "mixture.yaml"), "bridge")
    rows = RowsConfig(batch_size=6, shapes=((6, 96, 64),), examples_per_row=2, masked_per_row=48)
    config = BatchConfig("bridge", rows, masking=MaskingConfig(0.7, 0.0))
    batch = stage_dataset(config, opened.sources, opened.weights, processors["2"], seed=0, steps=2)[1]
    assert (batch["pool"] >= 0).sum() == 6 and batch["stats"][STATS.index("bad_records")] == 0
    record = opened.sources["synthetic"].record(3, np.random.default_rng(0))
    assert record.query.images and record.target.text.startswith("There is a picture of number")


def test_hostile_answers_are_asked_again(server, photos, tmp_path, reply, chatted, said):
    """The first time each request meets another evil, the second time a good answer."""
    evils = [
        reply(b"", wait=4),
        reply(b"{}", 429, {"Retry-After": "0.2"}),
        reply(b"<html>bad gateway</html>", 502, {"Content-Type": "text/html"}),
        reply(b"oops", 500),
        dataclasses.replace(chatted("A dog is on the"), cut=40),
        reply(b'{"choices": [{"mess'),
        reply(b"<html>welcome</html>", headers={"Content-Type": "text/html"}),
        reply(b'{"choices": []}'),
        reply(b'{"choices": [{"message": {"content": null}}]}'),
        reply(b"\xff\xfe nonsense", headers={"Content-Type": "application/json; charset=klingon"}),
        reply(b'{"choices": [{"message": {"content": "\\ud800 a lone half of a pair"}}]}'),
        chatted(""),
    ]
    met: dict[str, tuple[int, float]] = {}

    def answer(request):
        data = request["messages"][0]["content"][0]["image_url"]["url"]
        if data not in met:
            met[data] = len(met), time.monotonic()
            return evils[met[data][0]]
        if met[data][0] == 1:
            assert time.monotonic() - met[data][1] >= 0.2, "it waits as long as it is told"
        return said(request)

    server.answer = answer
    made = run(server, photos, tmp_path, timeout=3, concurrency=12)
    assert made.rows == 12 and not made.rejected and len(met) == 12
    assert len(server.requests) == 24, "each once more, and no more than once"
    assert {row["tries"] for row in lines(tmp_path)} == {1, 2}, "an empty answer is an answer"


def test_an_endpoint_that_never_answers_ends_the_run_and_the_next_run_asks_again(server, photos, tmp_path, reply, said):
    server.answer = lambda request: reply(b"", 503)
    with pytest.raises(EndpointError, match=r"5 requests in a row .*InternalServerError.*the same command goes on"):
        run(server, photos, tmp_path, retries=0, stop_after=5)
    server.answer = lambda request: said(request) if len(server.requests) % 3 else reply(b"", 503)
    with pytest.raises(SynthesisError, match="requests had no answer, the last: refused: InternalServerError"):
        run(server, photos, tmp_path, retries=0)
    assert 0 < len(lines(tmp_path)) < 12 and not lines(tmp_path, REJECTED)
    server.answer = said
    assert run(server, photos, tmp_path).rows == 12


def test_what_was_answered_is_kept_when_the_run_ends_early(server, photos, tmp_path, monkeypatch):
    """Twelve answers have come before the first is stored, which fails; the other eleven are stored nevertheless."""
    store, ask, calls, answered = Store.add, Endpoint.ask, [], []

    def asked(self, words, jpeg, seed):
        answer = ask(self, words, jpeg, seed)
        answered.append(answer)
        return answer

    def add(self, row):
        calls.append(row["task"])
        if len(calls) > 1:
            return store(self, row)
        while len(answered) < 12:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(Endpoint, "ask", asked)
    monkeypatch.setattr(Store, "add", add)
    with pytest.raises(KeyboardInterrupt):
        run(server, photos, tmp_path, concurrency=12)
    kept = {row["task"] for row in lines(tmp_path)}
    assert len(kept) == 11 and calls[0] not in kept
    monkeypatch.undo()
    assert run(server, photos, tmp_path).rows == 12 and len(server.requests) == 13


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run_at_once(server, photos, tmp_path, reply, status):
    server.answer = lambda request: reply(b'{"error": {"message": "go away"}}', status)
    with pytest.raises(EndpointError, match=r"refuses model 'tiny' .*go away.*correct endpoint\.url"):
        run(server, photos, tmp_path)
    assert len(server.requests) <= 12 and not lines(tmp_path) and not lines(tmp_path, REJECTED)


def test_nobody_there_is_said(photos, tmp_path):
    endpoint = EndpointConfig("tiny", "http://127.0.0.1:9/v1", retries=0, stop_after=3)
    with pytest.raises(EndpointError, match=r"APIConnectionError: Connection error\. .*refused.*127\.0\.0\.1:9"):
        synthesize(open_subjects([str(photos)], {}), endpoint, TEXTS, tmp_path, lambda line: None)


def test_a_request_that_alone_is_refused_is_a_rejection(server, photos, tmp_path, reply, said):
    server.answer = lambda request: said(request) if len(server.requests) != 7 else reply(b'{"error": "violence"}', 400)
    made = run(server, photos, tmp_path, concurrency=1)
    assert made.rows == 11 and made.rejected == {"refused": 1} and "violence" in lines(tmp_path, REJECTED)[0]["reason"]
    assert run(server, photos, tmp_path).rows == 11 and len(server.requests) == 12, "nor is it asked again"


def test_what_no_filter_passes_is_kept_apart_with_its_reason(server, photos, tmp_path, chatted):
    server.answer = lambda request: chatted("Sorry, but I'm sorry, I cannot help with that.")
    made = run(server, photos, tmp_path)
    assert made.rows == 0 and made.rejected == {"refusal": 12} and len(server.requests) == 24
    assert {row["tries"] for row in lines(tmp_path, REJECTED)} == {2}
    assert len({request["seed"] for request in server.requests}) == 24, "another draw every time"
    assert not (tmp_path / "pictures").exists()


def test_every_try_is_paid_for(server, photos, tmp_path, chatted, said):
    """The first answer to each request is none; later such answers say nothing of their tokens."""
    texts = dataclasses.replace(TEXTS, probe=4)
    prices = {"price_in": 1000.0, "price_out": 5000.0, "concurrency": 1, "max_pixels": 28 * 28}
    sorry = chatted("I'm sorry, I cannot help with that.")
    server.answer = lambda request: said(request) if len(server.requests) % 2 == 0 else sorry
    told = []
    made = run(server, photos, tmp_path / "a", texts, told, **prices)
    assert made.rows == 12 and len(server.requests) == 24
    assert {(row["tokens_in"], row["tokens_out"], row["tries"]) for row in lines(tmp_path / "a")} == {(600, 40, 2)}
    assert "estimate from 4 answers: 8 requests, 0.005 M tokens there, 0.000 M back, 6.40 US dollars" in told[1]
    server.requests.clear()
    with pytest.raises(SynthesisError, match=r"6\.40 US dollars, .* above texts\.budget, 5\.00"):
        run(server, photos, tmp_path / "b", dataclasses.replace(texts, budget=5.0), **prices)
    free = dataclasses.replace(
        sorry, body=sorry.body.replace(b"prompt_tokens", b"x").replace(b"completion_tokens", b"y")
    )
    server.answer = lambda request: said(request) if len(server.requests) % 2 == 0 else free
    server.requests.clear()
    run(server, photos, tmp_path / "c", **prices)
    assert {(row["tokens_in"], row["tokens_out"]) for row in lines(tmp_path / "c")} == {(300, 20)}
    server.answer = lambda request: free
    run(server, photos, tmp_path / "d", **prices)
    assert {(row["tokens_in"], row["tokens_out"]) for row in lines(tmp_path / "d", REJECTED)} == {(-1, -1)}


def test_equal_texts_and_equal_pictures_are_there_once(server, photos, tmp_path, chatted, said):
    server.answer = lambda request: chatted("It is a picture of a dog on the sofa.")
    assert run(server, photos, tmp_path / "a").rejected == {"repeat": 11}
    filters = FilterConfig(repeats=3)
    assert run(server, photos, tmp_path / "b", dataclasses.replace(TEXTS, filters=filters)).rejected == {"repeat": 9}

    @dataclasses.dataclass(frozen=True)
    class Questions:
        """Twelve records about three pictures."""

        name: str

        def __len__(self):
            return 12

        def record(self, index, rng):
            image = subject(open_subjects([str(photos)], {})[0].source, index % 3).image
            return Record(f"{index}", "q", Content(f"what {index}?", (image,)), Content("that"), "")

    server.answer = said
    server.requests.clear()
    made = run(server, [OpenedSource("q", Questions("q"), "x")], tmp_path / "c", dataclasses.replace(TEXTS))
    assert made.rows == len(server.requests) == 3 and made.rejected == {"same": 9}


def test_pictures_that_are_none_are_named(server, tmp_path, picture):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(picture(0))
    (folder / "html.jpg").write_bytes(b"<html>404</html>")
    (folder / "half.jpg").write_bytes(picture(1)[:400])
    (folder / "out.jpg").symlink_to("/etc/hostname")
    made = run(server, folder, tmp_path / "out")
    assert made.rows == 1 and made.rejected == {"record": 3} and len(server.requests) == 1
    reasons = " ".join(row["reason"] for row in lines(tmp_path / "out", REJECTED))
    assert "html.jpg: cannot be decoded" in reasons and "half.jpg" in reasons and "a link out" in reasons


def test_texts_without_pictures_are_said_in_other_words(server, tmp_path, to_lines):
    to_lines(tmp_path / "pairs.jsonl", [{"q": "a kiwi", "a": "a fruit"}, {"q": "", "a": ""}])
    values = "datasets: {words: {format: table, path: pairs.jsonl, columns: {query_text: q, target_text: a}}}"
    (tmp_path / "m.yaml").write_text(values)
    sources = open_subjects(["m"], {"m": load_mixture(tmp_path / "m.yaml")})
    made = run(server, sources, tmp_path / "out", TextsConfig(["rephrase", "caption"], per_picture=2))
    assert made.rows == 1 and made.rejected == {"record": 3}
    (request,), (row,) = server.requests, lines(tmp_path / "out")
    assert shown(request) is None and told(request).endswith("\n\na kiwi a fruit")
    assert row["qry"] == "a kiwi a fruit" and row["qry_image_path"] == ""


def test_a_higher_limit_goes_on_and_another_plan_is_refused(server, photos, tmp_path):
    few = dataclasses.replace(TEXTS, limit=5)
    assert run(server, photos, tmp_path, few).rows == 5
    first = [row["task"] for row in lines(tmp_path)]
    assert run(server, photos, tmp_path, few).rows == 5 and len(server.requests) == 5
    assert run(server, photos, tmp_path).rows == 12 and len(server.requests) == 12
    assert not lines(tmp_path, REJECTED), "what is done is not even looked at"
    names = [task.name for task in tasks(open_subjects([str(photos)], {}), TEXTS)]
    assert sorted(first) == sorted(names[:5]) and len(set(names)) == 12 and names != sorted(names)
    for changed in ({"seed": 1}, {"languages": ["de"]}, {"prompts": ["keywords"]}):
        with pytest.raises(StoreError, match=f"begun with other data or settings .*{next(iter(changed))}"):
            run(server, photos, tmp_path, dataclasses.replace(TEXTS, **changed))
    with pytest.raises(StoreError, match=r"begun with other data or settings .*model: 'tiny', 'big'"):
        run(server, photos, tmp_path, model="big")


def test_cost_and_time_are_estimated_before_it_starts(server, photos, tmp_path):
    said = []
    texts = dataclasses.replace(TEXTS, probe=4, budget=1.0)
    prices = {"price_in": 1000.0, "price_out": 5000.0, "max_pixels": 28 * 28 * 100}
    made = synthesize(open_subjects([str(photos)], {}), at(server, **prices), texts, tmp_path, said.append, True)
    assert made.rows == 0 and not server.requests and len(said) == 1
    # Eleven pictures of 2x2 visual tokens, one of at most 100, and the words of the prompt; 25 tokens back.
    visual = 11 * 4 + 12 * 9
    expected = visual + 12 * len(PROMPTS["caption"].ask) / 4
    assert said[0] == (
        f"estimate from the sizes of some pictures: 12 requests, {expected / 1e6:.3f} M tokens there, 0.000 M back, "
        f"{expected * 1e-3 + 12 * 25 * 5e-3:.2f} US dollars, time not known before the first answers"
    )
    with pytest.raises(SynthesisError, match=r"from the sizes .* above texts\.budget, 1\.00 US dollars"):
        run(server, photos, tmp_path, texts, **prices)
    assert not server.requests
    texts = dataclasses.replace(texts, budget=3.0)
    with pytest.raises(SynthesisError, match=r"from 4 answers: 8 requests, .* 3\.20 US dollars, about .*: above"):
        run(server, photos, tmp_path, texts, concurrency=1, **prices)
    assert len(lines(tmp_path)) >= 4, "what was paid for is kept"
    said.clear()
    assert run(server, photos, tmp_path, dataclasses.replace(texts, budget=None), said, **prices).rows == 12
    assert "from the sizes" in said[0]


def test_a_killed_run_loses_and_repeats_nothing(server, photos, tmp_path, fits):
    """Killed by a signal that cannot be caught while requests are under way, several times; then it finishes."""
    worker = Path(__file__).with_name("interrupted.py")
    command = [sys.executable, str(worker), str(photos), str(tmp_path / "out"), server.url]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    server.answer = lambda request: dataclasses.replace(fits(request), wait=0.15)
    asked = 0
    for round_ in range(2):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while time.monotonic() < until and len(server.requests) < asked + 6 and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it was killed too late"
        process.send_signal(signal.SIGKILL)
        process.wait()
        asked = len(server.requests)
        kept = len(lines(tmp_path / "out")) if round_ else 0
    assert 0 < kept < 24
    with (tmp_path / "out" / ROWS).open("ab") as file:
        file.write(b'{"task": "cut sho')  # what a kill in the middle of a write leaves
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    rows = lines(tmp_path / "out")
    assert len(rows) == len({row["task"] for row in rows}) == 24 and not lines(tmp_path / "out", REJECTED)
    assert Counter(row["prompt"] for row in rows) == {"caption": 12, "description": 12}
    assert 24 <= len(server.requests) <= 24 + 2 * 8, "only what was under way is asked again"
    files = [path for path in (tmp_path / "out" / "pictures").glob("*/*") if not path.name.startswith(".")]
    assert {str(path.relative_to(tmp_path / "out")) for path in files} == {row["qry_image_path"] for row in rows}


def test_two_runs_do_not_write_into_one_folder(server, photos, tmp_path):
    held = Store(tmp_path)
    with pytest.raises(StoreError, match="another run writes there"):
        run(server, photos, tmp_path)
    held.close()
    assert run(server, photos, tmp_path).rows == 12


def test_a_cut_file_is_mended_and_a_foreign_one_refused(tmp_path):
    row = {"task": "a", "picture": "p", "prompt": "caption", "language": "en", "tokens_in": 1, "tokens_out": 2}
    whole = "".join(json.dumps(row | {"task": f"{i}", "pos_text": f"words {i} é"}) + "\n" for i in range(3)).encode()
    for end in (*range(0, len(whole), 5), len(whole) - 1, len(whole)):
        (tmp_path / ROWS).write_bytes(whole[:end])
        store = Store(tmp_path)
        complete = whole[:end].count(b"\n")
        assert store.rows == complete and store.done == {f"{i}" for i in range(complete)}
        store.add(row | {"task": "new", "pos_text": "more"})
        store.close()
        assert len(lines(tmp_path)) == complete + 1
    (tmp_path / ROWS).write_text('{"caption": "mine"}\n')
    with pytest.raises(StoreError, match=r"rows\.jsonl line 1 is no row of a synthesis"):
        Store(tmp_path)


def test_the_body_of_an_answer_may_be_anything():
    for body in ("", "[]", "7", '{"choices": [7]}', '{"choices": [{"message": {"content": [1]}}]}', "[" * 100_000):
        with pytest.raises(ValueError, match="no "):
            parse(body, "tiny", 0.0)
    answer = parse('{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}}', "tiny", 1.0)
    assert (answer.text, answer.model, answer.tokens_in, answer.finish) == ("x", "tiny", -1, "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"languages": ["tlh"]}, "not known: choose of en"),
        ({"per_picture": 2}, "there are 1 pairs"),
        ({"prompts": ["poem"]}, "do not exist"),
        ({"tries": 0}, "starts at 1"),
    ],
)
def test_wrong_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        TextsConfig(**{"prompts": ["caption"]} | change)


def test_the_documented_command_works(server, tmp_path, monkeypatch, capsys, fits):
    """What docs/data.md says, with this server in place of the one that it starts."""
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^(cocoa data synthesize .*)$", text, re.M)
    command = re.sub(r"http://localhost:\d+/v1", server.url, command)
    server.answer = fits
    monkeypatch.chdir(tmp_path)
    main([*shlex.split(command)[1:], "--texts.limit=6", "--texts.filters.repeats=0"])
    assert re.match(r"synthetic: \d texts", capsys.readouterr().out)
    assert len(lines(tmp_path / "synthetic")) + len(lines(tmp_path / "synthetic", REJECTED)) == 6
    assert open_mixture(load_mixture("synthetic/mixture.yaml"), "bridge").sources["synthetic"]
