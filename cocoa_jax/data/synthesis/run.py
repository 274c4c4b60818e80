"""Asking for every text of a plan: many requests at a time, one writer, resumable."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cocoa_jax.data.naming import OpenedSource
from cocoa_jax.data.pixels import ImageError
from cocoa_jax.data.sources import RecordError
from cocoa_jax.data.synthesis.endpoint import Answer, Endpoint, EndpointConfig, EndpointError, Refused, Unanswered
from cocoa_jax.data.synthesis.filters import reason_against, tidy
from cocoa_jax.data.synthesis.pictures import Subject, sent_jpeg, subject
from cocoa_jax.data.synthesis.plan import Estimate, Task, TextsConfig, foreseen, measured, tasks
from cocoa_jax.data.synthesis.store import MIXTURE, RUN, Store, StoreError

FORMAT = 1
_MIXTURE = """# The texts of this folder as a data set of stage 2; paths are relative to this file.
datasets:
  synthetic: {format: cocoa-pairs, path: rows.jsonl, stages: [bridge]}
"""

Row = dict[str, Any]


class SynthesisError(ValueError):
    """A run that is not finished, or that may not begin."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Args:
        reason: why ``row`` is none, "" where it is one.
        asked_again: the reason may not hold for ever, so that another run asks again.
        seconds: of its answers, 0 where there was none.
    """

    row: Row
    reason: str = ""
    asked_again: bool = False
    refused: bool = False
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """What a folder holds after a run."""

    folder: str
    rows: int
    rejected: Mapping[str, int]

    def lines(self) -> list[str]:
        """In words, a line for each kind of rejection."""
        found = sorted(self.rejected.items(), key=lambda item: -item[1])
        return [f"{self.folder}: {self.rows} texts", *(f"  {count} rejected: {kind}" for kind, count in found)]


@dataclasses.dataclass(frozen=True)
class _Asker:
    """Does the requests; threads share it."""

    endpoint: Endpoint
    texts: TextsConfig
    store: Store
    claimed: set[tuple[str, str, str]]
    lock: threading.Lock

    def __call__(self, task: Task) -> Outcome:
        """Ask once, or until an answer passes the filters.

        Raises:
            EndpointError: the endpoint refuses all.
        """
        prompt, row = self.texts.chosen[task.prompt], _row(task, self.texts)
        try:
            shown = subject(task.source.source, task.index)
            row["record"] = shown.record
            missing = "picture" if prompt.picture and shown.image is None else ""
            missing = missing or ("words" if "{words}" in prompt.ask + prompt.query and not shown.words else "")
            if missing:
                return Outcome(row, f"record: it has no {missing}")
            jpeg = None
            if prompt.picture and shown.image is not None:
                row["picture"] = shown.digest
                jpeg = sent_jpeg(shown.image, self.endpoint.config.max_pixels)
        except (RecordError, ImageError) as error:
            return Outcome(row, f"record: {error}")
        key = (row["picture"], task.prompt, task.language)
        if jpeg is not None and not self._claim(key):
            return Outcome(row, "same: the same picture was asked about under another record")
        try:
            return self._answered(task, row, shown, jpeg)
        except (Unanswered, Refused) as error:
            with self.lock:
                self.claimed.discard(key)
            return Outcome(row, f"refused: {error}", asked_again=True, refused=isinstance(error, Refused))

    def _answered(self, task: Task, row: Row, shown: Subject, jpeg: bytes | None) -> Outcome:
        prompt, filters = self.texts.chosen[task.prompt], self.texts.filters
        asked, seconds, reason = prompt.asked(task.language, shown.words), 0.0, ""
        for attempt in range(self.texts.tries):
            answer = self.endpoint.ask(asked, jpeg, (task.seed + attempt) % 2**31)
            seconds += answer.seconds
            _note(row, answer, attempt + 1)
            text = tidy(answer.text)
            stored = prompt.stored(text, task.language, shown.words)
            row |= {"qry": stored[0] if stored else "", "pos_text": stored[1] if stored else text[:2000]}
            reason = (
                reason_against(row["pos_text"], row["qry"], asked, prompt, task.language, answer.finish, filters)
                if stored
                else f"form: no {prompt.form} in the answer"
            )
            if not reason:
                if jpeg is not None and shown.image is not None:
                    row["qry_image_path"] = self.store.picture(shown.file_name, shown.image.data)
                break
        return Outcome(row, reason, seconds=seconds)

    def _claim(self, key: tuple[str, str, str]) -> bool:
        with self.lock:
            if key in self.claimed:
                return False
            self.claimed.add(key)
            return True


class _Progress:
    """Outcomes on their way into the store; the thread that runs `synthesize` alone calls it."""

    def __init__(self, store: Store, endpoint: EndpointConfig, texts: TextsConfig):
        self.store, self.endpoint, self.texts = store, endpoint, texts
        self.answers = self.unanswered = 0
        self.seconds = 0.0
        self._in_a_row = 0
        self._last = ""
        self._tokens_before = store.tokens_in, store.tokens_out

    def take(self, outcome: Outcome) -> None:
        """Store what an outcome holds.

        Raises:
            EndpointError: too many in a row without an answer.
        """
        row, reason = outcome.row, outcome.reason
        if outcome.seconds:
            self.answers, self.seconds, self._in_a_row = self.answers + 1, self.seconds + outcome.seconds, 0
        if outcome.asked_again:
            self._in_a_row, self._last = self._in_a_row + 1, reason
            # An endpoint that has answered others means this request; one that has not may mean all of them.
            if not (outcome.refused and self.answers):
                self.unanswered += 1
            else:
                self.store.reject({**row, "reason": reason})
            if self._in_a_row >= self.endpoint.stop_after:
                raise EndpointError(
                    f"{self._in_a_row} requests in a row had no answer, the last: {reason}: see to "
                    f"{self.endpoint.url}; the same command goes on"
                )
            return
        most = self.texts.filters.repeats
        if not reason and most and self.store.repeats(row) >= most:
            reason = f"repeat: {most} other rows of this prompt have the same text"
        if reason:
            self.store.reject({**row, "reason": reason})
        else:
            self.store.add(row)

    def estimate(self, left: int) -> Estimate:
        """From the answers of this run."""
        before_in, before_out = self._tokens_before
        tokens = self.store.tokens_in - before_in, self.store.tokens_out - before_out
        return measured(left, tokens, self.answers, self.seconds, self.endpoint)

    @property
    def last(self) -> str:
        """Why the last request without an answer had none."""
        return self._last


def synthesize(
    sources: Sequence[OpenedSource],
    endpoint: EndpointConfig,
    texts: TextsConfig,
    output: Path,
    say: Callable[[str], object],
    estimate_only: bool = False,
) -> Synthesis:
    """Ask for every text that the folder lacks.

    Args:
        output: a folder; the same command continues a run that was ended in whatever way.
        say: gets the estimates as lines.
        estimate_only: end after the first estimate; nothing is asked.
    Raises:
        SynthesisError: requests stayed unanswered, or the estimate is above the budget.
        EndpointError: nobody answers, or not to us; StoreError: the folder holds another run, or another writes there.
    """
    store = Store(output)
    try:
        _check_same_run(output, sources, endpoint, texts)
        left = Counter(task.prompt for task in tasks(sources, texts) if task.name not in store.done)
        before = foreseen(left, sources, texts, endpoint)
        say(before.line())
        if not estimate_only and left:
            _check_budget(before, texts)
            _ask_all(sources, endpoint, texts, store, left.total(), say)
        return Synthesis(str(output), store.rows, dict(store.reasons))
    finally:
        store.close()


def _ask_all(
    sources: Sequence[OpenedSource],
    endpoint: EndpointConfig,
    texts: TextsConfig,
    store: Store,
    total: int,
    say: Callable[[str], object],
) -> None:
    client = Endpoint(endpoint)
    asker = _Asker(client, texts, store, set(store.shown), threading.Lock())
    progress = _Progress(store, endpoint, texts)
    finished = 0
    with tqdm(total=total, unit="text") as bar:

        def take(outcome: Outcome) -> None:
            nonlocal finished
            finished += 1
            answered = progress.answers
            progress.take(outcome)
            bar.update()
            bar.set_postfix(rows=store.rows, rejected=store.reasons.total(), unanswered=progress.unanswered)
            if answered < progress.answers == texts.probe and finished < total:
                now = progress.estimate(total - finished)
                say(now.line())
                _check_budget(now, texts)

        todo = (task for task in tasks(sources, texts) if task.name not in store.done)
        _in_threads(asker, todo, endpoint.concurrency, take, client.close)
    if progress.unanswered:
        raise SynthesisError(
            f"{progress.unanswered} requests had no answer, the last: {progress.last}: the same command asks them again"
        )


def _in_threads(
    work: Callable[[Task], Outcome],
    todo: Iterable[Task],
    threads: int,
    take: Callable[[Outcome], None],
    cut: Callable[[], None],
) -> None:
    """``take`` what ``work`` makes of every task, in this thread; no more than twice the threads' number wait."""
    pending: set[concurrent.futures.Future[Outcome]] = set()
    pool = concurrent.futures.ThreadPoolExecutor(threads)

    def take_some() -> None:
        for future in concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED).done:
            pending.discard(future)
            take(future.result())

    try:
        for task in todo:
            pending.add(pool.submit(work, task))
            if len(pending) >= 2 * threads:
                take_some()
        while pending:
            take_some()
    except BaseException:
        cut()
        pool.shutdown(cancel_futures=True)
        for future in pending:  # what was answered meanwhile is paid for
            if not future.cancelled() and future.exception() is None:
                with contextlib.suppress(ValueError):
                    take(future.result())
        raise
    finally:
        pool.shutdown()


def _row(task: Task, texts: TextsConfig) -> Row:
    return {
        "qry": "",
        "pos_text": "",
        "qry_image_path": "",
        "task": task.name,
        "picture": "",
        "source": task.source.name,
        "record": "",
        "prompt": task.prompt,
        "prompt_hash": texts.chosen[task.prompt].hash,
        "language": task.language,
        "tokens_in": -1,
        "tokens_out": -1,
    }


def _note(row: Row, answer: Answer, tries: int) -> None:
    """Where a text is from, and what all its tries took: tokens of each that the endpoint counts, and seconds."""
    tokens = {
        name: max(row[name], 0) + count if count >= 0 else row[name]
        for name, count in (("tokens_in", answer.tokens_in), ("tokens_out", answer.tokens_out))
    }
    row |= {
        "model": answer.model,
        "asked": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "finish": answer.finish,
        "seconds": round(row.get("seconds", 0.0) + answer.seconds, 3),
        **tokens,
        "tries": tries,
    }


def _check_budget(estimate: Estimate, texts: TextsConfig) -> None:
    if texts.budget is not None and estimate.dollars is not None and estimate.dollars > texts.budget:
        raise SynthesisError(
            f"{estimate.line()}: above texts.budget, {texts.budget:.2f} US dollars: raise it or lower texts.limit"
        )


def _check_same_run(
    folder: Path, sources: Sequence[OpenedSource], endpoint: EndpointConfig, texts: TextsConfig
) -> None:
    """Write what the rows of a folder depend on, or refuse a folder that was begun with something else.

    Raises:
        StoreError: naming the differences.
    """
    plan: Row = {
        "format": FORMAT,
        "sources": {opened.name: [opened.contents, len(opened.source)] for opened in sources},
        "model": endpoint.model,
        "prompts": {name: prompt.hash for name, prompt in texts.chosen.items()},
        "languages": texts.languages,
        "per_picture": texts.per_picture,
        "seed": texts.seed,
    }
    path = folder / RUN
    if path.exists():
        begun = json.loads(path.read_text())
        changed = [f"{key}: {begun.get(key)!r}, {plan[key]!r}" for key in plan if begun.get(key) != plan[key]]
        if changed:
            raise StoreError(
                f"{folder} was begun with other data or settings ({'; '.join(changed)}): give another output"
            )
        return
    settings = {"endpoint": dataclasses.asdict(endpoint), "texts": dataclasses.asdict(texts), "begun": time.time()}
    (folder / MIXTURE).write_text(_MIXTURE)
    aside = path.with_name(f"{RUN}.partial")
    aside.write_text(json.dumps(plan | settings, indent=1))
    aside.replace(path)
