"""Bodies and bytes that no client library would send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from chaos.serving.server import MODEL

START: dict[str, Any] = {"model": MODEL, "prompt": "ab", "max_tokens": 2}
FIELDS = (
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop",
    "stream", "logprobs", "echo", "logit_bias", "n_loops", "max_loops", "min_loops", "exit_rule",
    "exit_threshold", "cache_salt", "timeout", "best_of", "response_format", "metadata", "user",
    "repetition_penalty", "presence_penalty", "stream_options", "return_loops", "messages", "tools",
)  # fmt: skip
_NUMBERS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 5000, "-" + "9" * 400, "1.5",
    f"{2**63}", f"{2**64}", "-1", "0", "-0.0", "1E400", "01", "+1", "0x10", ".5", "1.", "1_000",
    "0." + "1" * 3000, "true",
)  # fmt: skip
_TEXTS = (
    '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"a\\u0000b"', '"\\ufeff"', '"\\uffff"',
    '"' + "x" * 3000 + '"', '"<|eos|>"', '"{{ 7*7 }}"', '"\\x"', '"\n"', "'a'", '""', '"8"',
)  # fmt: skip
_NESTED = (
    "[" * 250 + "]" * 250, "[" * 100_000, '{"a":' * 300 + "1" + "}" * 300, "[[[]]]", "{}", "[]",
    "[" + "1," * 20_000 + "1]", '["a", 1]', "[[1], [2, 3]]", "[null]", "null", "[-1]", "[1.0]",
)  # fmt: skip
VALUES = (*_NUMBERS, *_TEXTS, *_NESTED)


def fields(draw: Random) -> bytes:
    """A body with some fields of any value, one of them perhaps repeated."""
    pairs = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in START.items()]
    for _ in range(draw.randint(1, 3)):
        pairs.append(f'"{draw.choice(FIELDS)}":{draw.choice(VALUES)}')
    if draw.random() < 0.3:
        draw.shuffle(pairs)
    return ("{" + ",".join(pairs) + "}").encode()


def damaged(draw: Random) -> bytes:
    """A valid body with bytes changed, dropped or doubled."""
    data = bytearray(json.dumps(START | {"stop": ["x"], "n_loops": 3}).encode())
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data))
        match draw.randrange(3):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                del data[at : at + draw.randint(1, 9)]
            case _:
                data[at:at] = data[: draw.randint(1, 30)]
    return bytes(data)


def odd(draw: Random) -> bytes:
    """Something that is no JSON object, or one in another encoding."""
    text = json.dumps(START)
    return draw.choice(
        [
            b"", b"\0", b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), b"\xff\xfe\xfd",
            text.encode().replace(b"ab", b"\xc3\x28"),
            text.encode().replace(b"ab", b"\xed\xa0\x80"),
            b"[" + text.encode() + b"]", text.encode() * 2, b"null", b"3", b'"a"', b"{" * 10_000,
            text.encode() + b"\0", b" " * 1_999_000 + text.encode(), draw.randbytes(200),
        ]
    )  # fmt: skip


def bodies(draw: Random, times: int) -> Iterator[bytes]:
    """Yield ``times`` bodies of all kinds."""
    for i in range(times):
        yield (fields, fields, damaged, odd)[i % 4](draw)


def request(body: bytes, *headers: str, line: str = "POST /v1/completions HTTP/1.1") -> bytes:
    """Return a request whose head is not checked."""
    start = [line, "Host: localhost", *headers, "", ""]
    return "\r\n".join(start).encode("latin-1") + body


def streams(draw: Random) -> list[bytes]:
    """Return bytes of whole connections: chunked, pipelined, smuggled, unfinished, no HTTP."""
    data = json.dumps(START).encode()
    kind, length = "Content-Type: application/json", f"Content-Length: {len(data)}"
    chunked = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in data) + b"0\r\n\r\n"
    coded = "Transfer-Encoding: chunked"
    one = request(data, kind, length)
    return [
        one, one * 3, request(chunked, kind, coded), request(chunked, kind, coded, length),
        request(b"zz\r\n", kind, coded), request(b"fffffffffffffffff\r\n{", kind, coded),
        request(b"5\r\n{", kind, coded), request(data, kind, "Content-Length: 9" + "9" * 30),
        request(data, kind, "Content-Length: -5"), request(data, kind, length, "Content-Length: 3"),
        request(data, "Content-Type: text/plain", length), request(data, length),
        request(data, "Content-Type: multipart/form-data; boundary=x", length),
        request(data, kind + "; charset=utf-16", length),
        request(data, kind, length, "Content-Encoding: gzip"),
        request(data, kind, length, "Expect: 100-continue"), request(data, kind, length, "A: \0"),
        request(data, kind, length, "X: " + "y" * 70_000),
        request(data, kind, length, *["Q: 1"] * 900),
        request(b"", line="GET /%00/../v1/models HTTP/1.1"), request(b"", line="GET * HTTP/1.1"),
        request(b"", line="TRACE / HTTP/1.1"), request(b"", line="OPTIONS /v1/models HTTP/1.1"),
        request(b"", line="GET /v1/models HTTP/9.9"), request(b"", line="GET  HTTP/1.1"),
        request(b"", "Upgrade: websocket", "Connection: Upgrade", line="GET /metrics HTTP/1.1"),
        request(b"", line="PRI * HTTP/2.0"), b"\x16\x03\x01\x02\x00\x01\x00", b"\r\n\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n", draw.randbytes(300), b"POST " + b"/" * 70_000,
    ]  # fmt: skip
