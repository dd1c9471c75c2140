"""The wire format: chat requests in OpenAI's format, read strictly, and answers and errors.

The rule for fields of OpenAI that we do not serve: a field that would change the answer is refused,
any other is ignored. An unknown field is refused, since a typo would otherwise go unnoticed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from minillava.files.byte_json import BytePieces

ERRORS = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
}
"""The type of an error, by its status. 422 is never sent: no client shows its text."""


class ApiError(Exception):
    """An answer that is an error: one sentence, what was found, what is expected, what to do."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    def body(self) -> bytes:
        return encode(error_body(self.status, self.code, str(self), self.param))


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict:
    return {"error": {"message": message, "type": ERRORS[status], "param": param, "code": code}}


def encode(value: Any) -> bytes:
    """One line of JSON, without spaces."""
    return msgspec.json.encode(value)


# --- the request ----------------------------------------------------------------------------------


class Picture(Struct, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None  # LLaVA-1.5 has one size


class TextPart(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str
    prompt_cache_breakpoint: Any = None


class PicturePart(Struct, tag_field="type", tag="image_url", forbid_unknown_fields=True):
    image_url: Picture | str
    prompt_cache_breakpoint: Any = None


class Message(Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[TextPart | PicturePart] | None = None
    name: Any = None
    refusal: Any = None
    audio: Any = None
    tool_calls: Any = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Any = None


class LookField(Struct, forbid_unknown_fields=True):
    """The layers and heads over which a map is averaged; None for the usual ones."""

    layers: list[Annotated[int, Meta(ge=0)]] | None = None
    heads: list[Annotated[int, Meta(ge=0)]] | None = None


class ContrastField(Struct, forbid_unknown_fields=True):
    """A method of generate/contrast.py, and its fields."""

    method: Literal["vcd", "ritual", "m3id"]
    beta: float | None = None
    alpha: float | None = None
    noise_step: int | None = None
    transform: str | None = None
    rate: float | None = None
    unsure: float | None = None


Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class ChatRequest(Struct, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=1000)]
    model: str | None = None
    max_completion_tokens: Positive | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    n: Positive | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    # beyond OpenAI's, by the names that others have
    top_k: Count | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    min_tokens: Count | None = None
    no_repeat_ngram_size: Count | None = None
    # what no other server has (extensions.py)
    look: bool | LookField | None = None
    contrast: ContrastField | None = None
    prefix_ids: list[Count] | None = None
    token_ids: bool | None = None
    continue_final_message: bool | None = None
    # refused, unless they ask for nothing
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    function_call: Any = None
    response_format: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    moderation: Any = None
    # ignored, whatever they say
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    verbosity: Any = None
    reasoning_effort: Any = None


NOTHING = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"}, {}),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"], []),
    "audio": ({},),
    "prediction": ({},),
    "web_search_options": (),  # {} asks for a search, in the usual way
    "moderation": ({},),
}
"""What is refused, and the values, besides null, that ask for nothing."""


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """POST /tokenize: one of the two."""

    text: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=1000)] | None = None
    model: Any = None


def read_request(body: bytes, kind: type) -> Any:
    """A body as one of the kinds of requests. Raises ApiError. Fields of a ResponsesRequest that
    are not served are refused where it becomes a ChatRequest (responses.py)."""
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if kind is ChatRequest:
        _check(request)
    return request


def _invalid(found: str) -> ApiError:
    """An error from the message of msgspec, which ends in the path: "... - at `$.temperature`"."""
    told, _, path = found.partition(" - at `")
    param = path.rstrip("`").removeprefix("$").removeprefix(".") or None
    code = "invalid_value"
    for beginning, kind in (
        ("Object contains unknown field `", "unknown_parameter"),
        ("Object missing required field `", "missing_required_parameter"),
    ):
        if told.startswith(beginning):
            name = told.removeprefix(beginning).rstrip("`")
            param, code = f"{param}.{name}" if param else name, kind
            known = kind == "unknown_parameter"
            told = f"{name} is not known here; leave it out" if known else f"{name} is missing"
    if told.startswith("Invalid value"):  # a tag that no kind of part has
        code = "unsupported_value"
    return ApiError(400, code, f"{param}: {told}" if param else told, param)


def refuse(request: Struct, nothing: Mapping[str, tuple]) -> None:
    """Raises ApiError for a field that is not served, by `nothing`, which has the values of each
    that ask for nothing."""
    for name, values in nothing.items():
        value = getattr(request, name)
        # in Python 0 == False
        same = any(v == value and isinstance(v, bool) == isinstance(value, bool) for v in values)
        if value is not None and not same:
            told = f"{name} is not served; leave it out"
            raise ApiError(400, "unsupported_parameter", told, name)


def _check(request: ChatRequest) -> None:
    """Check which fields go together, and which are not served. Raises ApiError."""
    refuse(request, NOTHING)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "invalid_value", "stream_options needs stream: true", "stream_options")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 16 or not all(1 <= len(text) <= 256 for text in stop):
        raise ApiError(
            400, "invalid_value", "stop takes up to 16 texts of 1 to 256 characters", "stop"
        )


# --- the answer -----------------------------------------------------------------------------------


class Entries:
    """Log-probabilities of one answer's tokens, as OpenAI writes them."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], started: bool, with_ids: bool):
        """started: whether a prefix stands before. with_ids: each with the token's id, and `end` if
        it ends an answer, which OpenAI does not have."""
        self.tokenizer, self.ends, self.started = tokenizer, ends, started
        self.with_ids = with_ids

    def entry(self, token_id: int, logprobs: Sequence[tuple[int, float]]) -> list[dict]:
        """One entry, or none for the end token. logprobs: of the token, then of the likeliest."""
        if token_id in self.ends:
            return []
        (_, own), *top = logprobs
        described = {
            **self._token(token_id, own),
            "top_logprobs": [self._token(i, value) for i, value in top],
        }
        self.started = True
        return [described]

    def _token(self, token_id: int, logprob: float) -> dict:
        raw = self._bytes(token_id)
        # JSON has no infinity; this is OpenAI's own number for it
        logprob = max(round(logprob, 6), -9999.0)
        text = raw.decode("utf-8", errors="replace")
        own: dict[str, Any] = {"id": token_id} if self.with_ids else {}
        if self.with_ids and token_id in self.ends:
            own["end"] = True
        return {"token": text, "logprob": logprob, "bytes": list(raw), **own}

    def _bytes(self, token_id: int) -> bytes:
        model = self.tokenizer.sentencepiece
        if isinstance(model, BytePieces) and 0 <= token_id < model.vocab_size():
            return model.bytes_of(token_id)
        if token_id < model.vocab_size() and model.is_byte(token_id):  # "<0x0A>"
            return bytes([int(model.id_to_piece(token_id)[3:-1], 16)])
        text = self.tokenizer.piece(token_id).replace("▁", " ")
        return (text if self.started else text.removeprefix(" ")).encode()


SAFE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What a client's own name of a request may be, for our log."""
