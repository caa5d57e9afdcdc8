"""Admission by cost, without a server; keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from open_mythos.errors import ConfigError, DataError
from open_mythos.inference.server.auth import Keys, check_address
from open_mythos.inference.server.errors import MOST_BYTES, ApiError, from_mythos, to_json
from open_mythos.inference.server.limits import Admission, Limits


def admission(**limits: float) -> Admission:
    return Admission(Limits(**limits), speed=lambda: 100.0)  # type: ignore[arg-type]


def refusal(admission: Admission, key: str, cost: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        admission.enter(key, cost)
    assert caught.value.status == 429
    return caught.value


def test_the_number_of_waiting_requests() -> None:
    queue = admission(queued_requests=2)
    places = [queue.enter("", 1) for _ in range(2)]
    assert refusal(queue, "", 1).code == "queued_requests"
    places[0].leave()
    queue.enter("", 1)


def test_choices_are_counted_as_requests() -> None:
    queue = admission(queued_requests=8)
    first = queue.enter("", 1, choices=100)
    assert refusal(queue, "", 1).code == "queued_requests"
    first.leave()
    queue.enter("", 1, choices=5)
    with pytest.raises(ApiError):
        queue.enter("", 1, choices=4)
    queue.enter("", 1, choices=3).release()
    assert queue.waiting_choices == 5


def test_the_cost_that_waits() -> None:
    queue = admission(queued_seconds=10)
    first = queue.enter("", 400)
    queue.enter("", 600)
    error = refusal(queue, "", 1)
    assert error.code == "queued_seconds"
    assert error.headers["Retry-After"] == "10", "1,000 loop-tokens at 100 per second"
    first.leave()
    queue.enter("", 400)


def test_an_empty_queue_takes_any_request() -> None:
    queue = admission(queued_seconds=10)
    place = queue.enter("", 5000)
    assert refusal(queue, "", 1).headers["Retry-After"] == "50"
    place.correct(999)
    queue.enter("", 1)


def test_retry_after_has_bounds() -> None:
    queue = admission(queued_requests=1)
    place = queue.enter("", 1)
    assert refusal(queue, "", 1).headers["Retry-After"] == "1"
    place.correct(10**9)
    assert refusal(queue, "", 1).headers["Retry-After"] == "60"


def test_requests_of_a_key_wait_or_run() -> None:
    queue = admission(requests_per_key=2)
    places = [queue.enter("a", 1) for _ in range(2)]
    places[0].leave()
    assert refusal(queue, "a", 1).code == "requests_per_key"
    queue.enter("b", 1)
    places[0].release()
    queue.enter("a", 1)
    for _ in range(9):
        queue.enter("", 1)  # where there are no keys, nobody is told apart


def test_books_balance() -> None:
    queue = admission()
    for act in ("release", "leave"):
        place = queue.enter("a", 7)
        getattr(place, act)()
        place.correct(99)
        place.leave()
        if act == "leave":
            place.release()
    assert (queue.waiting, queue.open, queue.cost, dict(queue.by_key)) == (0, 0, 0, {})


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  first-key \nschlüssel\n", encoding="utf-8")
    keys = Keys.read(str(file))
    assert len(keys) == 2
    name = keys.name_of(b"Bearer first-key")
    assert name
    assert "first" not in name
    assert keys.name_of(b"bearer first-key") == name
    assert keys.name_of("Bearer schlüssel".encode()) not in (None, name)
    for bad in (b"", b"Bearer", b"Bearer ", b"Bearer first-kez", b"Basic first-key", b"first-key",
                b"Bearer first-key x", b"Bearer \xff"):  # fmt: skip
        assert keys.name_of(bad) is None
    assert "first-key" not in repr(vars(keys))
    assert Keys([]).name_of(b"") == ""
    for content in (b"", b"# none\n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(DataError):
            Keys.read(str(file))
    with pytest.raises(DataError):
        Keys.read(str(tmp_path / "nowhere"))


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hmac, and with all keys, whichever matches."""
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys(["a", "b", "c"])
    for key in (b"a", b"c", b"x"):
        compared.clear()
        keys.name_of(b"Bearer " + key)
        assert len(compared) == 3


def test_addresses() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.5.5.5"):
        check_address(host, Keys([]), insecure=False)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        with pytest.raises(ConfigError) as caught:
            check_address(host, Keys([]), insecure=False)
        assert caught.value.exit_code == 2
        check_address(host, Keys(["k"]), insecure=False)
        check_address(host, Keys([]), insecure=True)


def test_errors_are_short() -> None:
    long = ApiError(400, 'é"\n' * 5000, param="p" * 100)
    assert len(to_json(long.content())) <= MOST_BYTES
    assert len(to_json(long.content())) > MOST_BYTES - 20
    error = from_mythos(
        ConfigError("bad", where="w", value="x" * 300, allowed="good", fix="do"), "p"
    )
    assert error.message == f"p: bad; value: '{'x' * 96}...; allowed: good; to do: do"
    assert "x" * 101 not in error.message
