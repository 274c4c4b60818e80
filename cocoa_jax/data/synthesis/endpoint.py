"""One request to an OpenAI-compatible endpoint, and what may come back."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any, Literal

_NONSENSE_TRIES = 3  # an answer that is none is rare; one that always comes back is the endpoint's fault
_PAUSE = 0.5  # seconds before the second try, twice as many before the third


class EndpointError(ValueError):
    """The endpoint refuses everybody who asks like this: nothing can be had before the cause is removed."""


class Unanswered(ValueError):
    """No answer after all retries; another time there may be one."""


class Refused(ValueError):
    """The endpoint will not answer this request, however often it is sent."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """Where texts are written and how it is asked.

    Args:
        model: its name there.
        url: such as ``http://localhost:8000/v1``.
        key: the environment variable that holds the key, if the endpoint wants one; keys are never stored.
        concurrency: requests under way at a time.
        timeout: seconds without a byte after which a request is sent again.
        retries: how often a request is sent again after a timeout, a lost connection, a 429 or a 5xx, with waits that
            double from half a second to eight, or are as long as the endpoint asks for.
        temperature: of sampling.
        max_tokens: of an answer.
        limit_name: how the endpoint calls that; older ones know ``max_tokens`` only.
        max_pixels: larger pictures are shrunk before they are sent.
        price_in, price_out: US dollars for a million tokens of requests and answers, for the estimate.
        stop_after: requests in a row without an answer that end the run.
    """

    model: str
    url: str = "http://localhost:8000/v1"
    key: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 8
    temperature: float = 0.7
    max_tokens: int = 512
    limit_name: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    max_pixels: int = 1280 * 28 * 28
    price_in: float | None = None
    price_out: float | None = None
    stop_after: int = 20

    def __post_init__(self) -> None:
        least = min(self.concurrency, self.max_tokens, self.max_pixels, self.stop_after)
        if least < 1 or not self.timeout > 0 or self.retries < 0 or self.temperature < 0:
            raise ValueError(
                f"{self}: concurrency, max_tokens, max_pixels and stop_after start at 1, timeout above 0, retries and "
                "temperature at 0: raise it"
            )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model wrote; ``tokens_in`` and ``tokens_out`` are -1 where the endpoint does not count them."""

    text: str
    finish: str
    model: str
    tokens_in: int
    tokens_out: int
    seconds: float


class Endpoint:
    """A client that several threads share.

    Raises:
        EndpointError: the client is not installed.
    """

    def __init__(self, config: EndpointConfig):
        try:
            import openai
        except ImportError as error:
            raise EndpointError(
                "the client `openai` is not installed: pip install '.[synthesize]' in the clone of cocoa_jax"
            ) from error
        self.config = config
        self._errors = openai
        self._client = openai.OpenAI(
            base_url=config.url,
            # The client insists on a key; an endpoint that wants none ignores it.
            api_key=os.environ.get(config.key) or "none",
            timeout=config.timeout,
            max_retries=config.retries,
        )

    def close(self) -> None:
        """Cut what is under way."""
        self._client.close()

    def ask(self, words: str, jpeg: bytes | None, seed: int) -> Answer:
        """What the model answers to words beside a picture.

        Raises:
            Unanswered, Refused: see there.
            EndpointError: a wrong key, model or address.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": words}]
        if jpeg is not None:
            data = base64.b64encode(jpeg).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
        message = {"role": "user", "content": content if jpeg is not None else words}
        for attempt in range(_NONSENSE_TRIES):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            began = time.monotonic()
            body = self._send(message, seed)
            try:
                return parse(body, self.config.model, time.monotonic() - began)
            except ValueError as error:
                last = error
        raise Unanswered(f"no answer of a chat in what came back {_NONSENSE_TRIES} times: {last}")

    def _send(self, message: dict[str, Any], seed: int) -> str:
        config, errors = self.config, self._errors
        create: Callable[..., Any] = self._client.chat.completions.with_raw_response.create
        limit = {config.limit_name: config.max_tokens}
        try:
            raw = create(
                model=config.model, messages=[message], temperature=config.temperature, seed=seed, stream=False, **limit
            )
            text: str = raw.text
            return text
        except (errors.AuthenticationError, errors.PermissionDeniedError, errors.NotFoundError) as error:
            raise EndpointError(
                f"{config.url} refuses model {config.model!r} ({_told(error)}): correct endpoint.url, endpoint.model "
                f"or the key in {config.key}"
            ) from error
        except (errors.APIConnectionError, errors.RateLimitError, errors.InternalServerError) as error:
            raise Unanswered(f"{type(error).__name__}: {_told(error)}") from error
        except errors.APIStatusError as error:
            # Servers put their reasons where they like, and the client's message leaves some out.
            raise Refused(f"status {error.status_code}: {_told(error)} {str(error.body)[:200]}") from error
        except (errors.OpenAIError, RuntimeError, UnicodeError) as error:  # a client closed meanwhile, a lying charset
            raise Unanswered(f"{type(error).__name__}: {_told(error)}") from error


def parse(body: str, asked: str, seconds: float) -> Answer:
    """The answer in the body of a response.

    Raises:
        ValueError: there is none.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {body[:60]!r}") from error
    choices = values.get("choices") if isinstance(values, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(choice, dict) or not isinstance(text, str):
        raise ValueError(f"no choices[0].message.content: {body[:60]!r}")
    text.encode()  # half of a surrogate pair, which JSON can spell, is a UnicodeEncodeError and so a ValueError
    usage = values.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    finish, model = choice.get("finish_reason"), values.get("model")
    return Answer(
        text,
        finish if isinstance(finish, str) else "",
        model if isinstance(model, str) else asked,
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        seconds,
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else -1


def _told(error: BaseException) -> str:
    """One line of what went wrong, with the cause that the client hides behind "Connection error."."""
    words = [str(error), str(error.__cause__ or "")]
    return " ".join(" ".join(dict.fromkeys(filter(None, words))).split())[:200]
