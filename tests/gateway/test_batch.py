"""Files and batches through OpenAI's own client, over real HTTP."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.gateway.batch_factory import Factory, Inside, factory
from tests.support import wait_for
from tokenworks.gateway.batch import BatchSettings

ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Factory]:
    with factory(tmp_path) as running:
        yield running


def client(live: Factory, tenant: str = "alice", base: str = "/v1") -> OpenAI:
    return OpenAI(base_url=live.url + base, api_key=tenant, max_retries=0)


def line(number: int, model: str = "echo", **changes: Any) -> bytes:
    whole = {
        "custom_id": f"line-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, "text": f"text {number}"},
    }
    return json.dumps(whole | changes).encode() + b"\n"


def begin(api: OpenAI, content: bytes, **changes: Any) -> Batch:
    file = api.files.create(file=("in.jsonl", content), purpose="batch")
    facts: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | changes
    return api.batches.create(input_file_id=file.id, **facts)


def finish(api: OpenAI, batch: Batch) -> Batch:
    wait_for(lambda: api.batches.retrieve(batch.id).status in ENDED)
    return api.batches.retrieve(batch.id)


def results(api: OpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    text = api.files.content(file_id).text
    assert text.endswith("\n")
    return [json.loads(entry) for entry in text.splitlines()]


def ledger(folder: Path) -> list[tuple[str, str, int]]:
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        return db.execute("SELECT id, outcome, output_tokens FROM requests").fetchall()


@pytest.mark.parametrize("base", ["/v1", "/openai/v1"])
def test_files(live: Factory, base: str) -> None:
    api = client(live, base=base)
    content = b"".join(line(n) for n in range(3))
    file = api.files.create(file=("my lines.jsonl", content), purpose="batch")
    assert (file.object, file.purpose, file.filename) == ("file", "batch", "my lines.jsonl")
    assert (file.bytes, file.status) == (len(content), "processed")
    assert api.files.retrieve(file.id) == file
    assert api.files.content(file.id).read() == content
    assert list(api.files.list()) == [file]
    assert list(api.files.list(purpose="batch_output")) == []
    deleted = api.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        api.files.retrieve(file.id)
    wait_for(lambda: not live.service.path_of(file.id).exists())


def test_files_are_listed_by_pages_in_both_orders(live: Factory) -> None:
    api = client(live)
    ids = [api.files.create(file=(f"{n}", b"x"), purpose="batch").id for n in range(5)]
    assert [file.id for file in api.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in api.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in api.files.list(limit=2).data] == ids[:2:-1]
    with pytest.raises(openai.BadRequestError, match="to list after"):
        api.files.list(after="file-nope")
    with pytest.raises(openai.BadRequestError, match="limit"):
        api.files.list(limit=0)


def test_a_file_expires_when_its_owner_says(live: Factory) -> None:
    api = client(live)
    expires: Any = {"anchor": "created_at", "seconds": 3600}
    file = api.files.create(file=("a", b"x"), purpose="batch", expires_after=expires)
    assert file.expires_at == file.created_at + 3600
    live.ahead_s = 3601
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(file.id)
    assert list(api.files.list()) == []
    short: Any = {"anchor": "created_at", "seconds": 1}
    with pytest.raises(openai.BadRequestError, match="3600"):
        api.files.create(file=("a", b"x"), purpose="batch", expires_after=short)


def test_uploads_that_are_refused_leave_nothing(tmp_path: Path) -> None:
    with factory(tmp_path, settings=BatchSettings(file_bytes=100_000)) as live:
        api = client(live)
        with pytest.raises(openai.BadRequestError, match="purpose"):
            api.files.create(file=("a", b"x"), purpose="fine-tune")
        for size in (100_001, 1_000_000):
            with pytest.raises(openai.APIStatusError, match="larger than 100000 bytes") as raised:
                api.files.create(file=("a", b"x" * size), purpose="batch")
            assert raised.value.status_code == 413
        assert api.files.create(file=("a", b"x" * 100_000), purpose="batch").bytes == 100_000
        raw = httpx2.post(f"{live.url}/v1/files", json={"purpose": "batch"})
        assert (raw.status_code, raw.json()["error"]["code"]) == (415, "unsupported_media_type")
        kind = {"content-type": "multipart/form-data; boundary=b"}
        cut = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
        raw = httpx2.post(f"{live.url}/v1/files", content=cut, headers=kind)
        assert (raw.status_code, raw.json()["error"]["code"]) == (400, "invalid_form")
        assert len(list((tmp_path / "files").iterdir())) == 1


def test_a_batch(live: Factory, tmp_path: Path) -> None:
    api = client(live)
    content = b"".join(line(n) for n in range(300))
    batch = begin(api, content, metadata={"night": "1"}, completion_window="7d")
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"night": "1"})
    assert batch.expires_at == batch.created_at + 7 * 86_400
    ended = finish(api, batch)
    assert ended.status == "completed"
    assert ended.model == "echo"
    assert ended.errors is None
    assert ended.error_file_id is None
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": 300, "completed": 300, "failed": 0}
    assert ended.usage is not None
    assert (ended.usage.input_tokens, ended.usage.output_tokens) == (1200, 600)
    times = (ended.created_at, ended.in_progress_at, ended.finalizing_at, ended.completed_at)
    assert None not in times
    assert list(times) == sorted(times)  # type: ignore[type-var]

    lines = results(api, ended.output_file_id)
    assert [entry["custom_id"] for entry in lines] == [f"line-{n}" for n in range(300)]
    for entry in lines:
        said = {"said": entry["custom_id"].replace("line-", "text "), "of": "echo"}
        response = {"status_code": 200, "request_id": entry["id"], "body": said}
        assert entry == {**entry, "response": response, "error": None}
    file = api.files.retrieve(ended.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert file.bytes == len(api.files.content(file.id).read())
    call = live.inside.calls[0]
    assert call == {
        "tenant": "alice",
        "key": "key-alice",
        "route": "chat/completions",
        "batch": batch.id,
        "id": lines[0]["id"],
        "deadline": float(batch.expires_at),
    }
    wait_for(lambda: len(ledger(tmp_path)) == 300)
    assert {row[0] for row in ledger(tmp_path)} == {entry["id"] for entry in lines}
    summary = live.summary()
    assert (summary.batches, summary.waiting) == ({"completed": 1}, 0)
    assert (summary.running, summary.done) == (0, 300)


def test_lines_that_fail(live: Factory) -> None:
    models = ["echo", "bad", "broken", "flaky", "busy", "nonsense", "crash"]
    content = b"".join(line(n, model) for n, model in enumerate(models))
    api = client(live)
    ended = finish(api, begin(api, content))
    assert ended.status == "completed"
    assert ended.model is None
    good = {entry["custom_id"]: entry for entry in results(api, ended.output_file_id)}
    failed = {entry["custom_id"]: entry for entry in results(api, ended.error_file_id)}
    assert sorted(good) == ["line-0", "line-3", "line-4", "line-5"]
    assert good["line-5"]["response"]["body"]["error"]["code"] == "engine_error"
    statuses = {name: entry["response"]["status_code"] for name, entry in failed.items()}
    assert statuses == {"line-1": 400, "line-2": 502, "line-6": 500}
    assert failed["line-1"]["response"]["body"]["error"]["code"] == "invalid_value"
    assert failed["line-1"]["error"] is None
    assert live.inside.tried[failed["line-2"]["id"]] == BatchSettings().tries
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": 7, "completed": 4, "failed": 3}


def test_a_file_that_is_no_batch(live: Factory) -> None:
    api = client(live)
    content = line(1) + b"{\n" + line(1) + line(4, url="/v1/embeddings")
    ended = finish(api, begin(api, content))
    assert ended.status == "failed"
    assert ended.failed_at is not None
    assert ended.errors is not None
    assert ended.errors.object == "list"
    assert [(error.code, error.line) for error in ended.errors.data or []] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
        ("url_mismatch", 4),
    ]
    assert live.inside.calls == []
    empty = finish(api, begin(api, b""))
    assert empty.errors is not None
    assert [error.code for error in empty.errors.data or []] == ["empty_file"]


def test_requests_that_are_wrong(live: Factory) -> None:
    api = client(live)
    file = api.files.create(file=("a", line(1)), purpose="batch")
    short = {"anchor": "created_at", "seconds": 1}
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("completion_window", {"completion_window": "8d"}),
        ("completion_window", {"completion_window": "30m"}),
        ("endpoint", {"endpoint": "/v1/moderations"}),
        ("input_file_id", {"input_file_id": "file-nope"}),
        ("metadata", {"metadata": {"a": "x" * 513}}),
        ("metadata", {"metadata": {str(n): "x" for n in range(17)}}),
        ("output_expires_after.seconds", {"output_expires_after": short}),
        ("colour", {"extra_body": {"colour": 1}}),
    ]
    for param, changes in wrong:
        facts: Any = {
            "input_file_id": file.id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        with pytest.raises(openai.BadRequestError) as raised:
            api.batches.create(**(facts | changes))
        assert raised.value.param is not None
        assert raised.value.param.startswith(param), raised.value
    with pytest.raises(openai.NotFoundError, match="No batch found"):
        api.batches.retrieve("batch_nope")
    assert list(api.batches.list()) == []


def test_batches_are_listed_by_pages(live: Factory) -> None:
    api = client(live)
    ids = [begin(api, line(n)).id for n in range(5)]
    assert [batch.id for batch in api.batches.list(limit=2)] == ids[::-1]
    page = api.batches.list(limit=2)
    assert page.has_more
    assert [batch.id for batch in api.batches.list(after=ids[1])] == ids[:1]


def test_tenants_see_their_own(live: Factory) -> None:
    alice, bob = client(live), client(live, "bob")
    batch = begin(alice, line(1))
    ended = finish(alice, batch)
    assert list(bob.files.list()) == []
    assert list(bob.batches.list()) == []
    for name in (batch.input_file_id, ended.output_file_id or ""):
        for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(name)
    for act in (bob.batches.retrieve, bob.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            act(batch.id)
    with pytest.raises(openai.BadRequestError, match="No such File"):
        bob.batches.create(
            input_file_id=batch.input_file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )
    with pytest.raises(openai.BadRequestError, match="to list after"):
        bob.batches.list(after=batch.id)


def test_cancel(live: Factory, tmp_path: Path) -> None:
    api = client(live)
    models = ["echo"] * 20 + ["stuck"] * 60
    batch = begin(api, b"".join(line(n, model) for n, model in enumerate(models)))
    wait_for(lambda: counts(api, batch) == (20, 0) and len(live.inside.running) == 8)
    with pytest.raises(openai.ConflictError, match="has not ended"):
        api.files.delete(batch.input_file_id)
    asked = api.batches.cancel(batch.id)
    assert asked.status in ("cancelling", "cancelled")
    assert asked.cancelling_at is not None
    ended = finish(api, batch)
    assert (ended.status, ended.error_file_id) == ("cancelled", None)
    assert ended.cancelled_at is not None
    assert len(results(api, ended.output_file_id)) == 20
    assert not live.inside.running
    assert not live.inside.waiting
    # What ran without an end is charged too, once.
    rows = ledger(tmp_path)
    assert [row[1] for row in rows].count("finished") == 20
    assert len(rows) == len({row[0] for row in rows})
    assert api.batches.cancel(batch.id).status == "cancelled"
    done = finish(api, begin(api, line(1)))
    with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"):
        api.batches.cancel(done.id)


def counts(api: OpenAI, batch: Batch) -> tuple[int, int]:
    found = api.batches.retrieve(batch.id).request_counts
    assert found is not None
    return found.completed, found.failed


def test_what_is_not_done_in_time_expires(live: Factory, tmp_path: Path) -> None:
    api = client(live)
    models = ["echo"] * 20 + ["stuck"] * 600
    content = b"\xef\xbb\xbf" + b"".join(line(n, model) for n, model in enumerate(models))
    batch = begin(api, content, completion_window="1h")
    wait_for(lambda: counts(api, batch) == (20, 0) and len(live.inside.running) == 8)
    live.ahead_s = 3601
    ended = finish(api, batch)
    assert ended.status == "expired"
    assert ended.expired_at is not None
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": 620, "completed": 20, "failed": 600}
    late = results(api, ended.error_file_id)
    assert [entry["custom_id"] for entry in late] == [f"line-{n}" for n in range(20, 620)]
    assert {entry["error"]["code"] for entry in late} == {"batch_expired"}
    assert all(entry["response"] is None for entry in late)
    assert len(results(api, ended.output_file_id)) == 20


def test_the_nearest_deadline_goes_first_and_the_window_bounds_what_is_held(tmp_path: Path) -> None:
    inside = Inside(slots=1)
    with factory(tmp_path, inside, BatchSettings(window=4)) as live:
        api = client(live)
        stuck = begin(api, line(0, "stuck") * 1, completion_window="1h")
        wait_for(lambda: len(inside.running) == 1)
        late = begin(api, b"".join(line(n) for n in range(100, 120)), completion_window="3h")
        wait_for(lambda: len(inside.waiting) == 3)
        soon = begin(api, b"".join(line(n) for n in range(200, 220)), completion_window="2h")
        wait_for(lambda: api.batches.retrieve(soon.id).status == "in_progress")
        api.batches.cancel(stuck.id)
        finish(api, late)
        assert api.batches.retrieve(soon.id).status == "completed"
        order = [text for text in inside.begun if text != "text 0"]
        first, rest = order[:3], order[3:]
        assert first == ["text 100", "text 101", "text 102"]
        assert rest[:20] == [f"text {n}" for n in range(200, 220)]
        assert inside.most == 4


def test_a_full_queue_is_not_final(tmp_path: Path) -> None:
    inside = Inside(slots=2, queue=3)
    with factory(tmp_path, inside) as live:
        api = client(live)
        ended = finish(api, begin(api, b"".join(line(n) for n in range(200))))
        assert ended.request_counts is not None
        assert ended.request_counts.model_dump() == {"total": 200, "completed": 200, "failed": 0}
        assert len(results(api, ended.output_file_id)) == 200
        assert max(inside.tried.values()) > 1


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    content = b"".join(line(n) for n in range(400))
    before = Inside(slots=4)
    with factory(tmp_path, before) as live:
        api = client(live)
        batch = begin(api, content)
        wait_for(lambda: counts(api, batch)[0] > 50)
    with factory(tmp_path) as live:
        api = client(live)
        ended = finish(api, batch)
        assert ended.status == "completed"
        assert len(results(api, ended.output_file_id)) == 400
        assert len(live.inside.begun) < 400
        assert {*before.begun, *live.inside.begun} == {f"text {n}" for n in range(400)}
        wait_for(lambda: len(ledger(tmp_path)) == 400)
        assert {row[1] for row in ledger(tmp_path)} == {"finished"}


def test_output_that_is_deleted_leaves_the_books(live: Factory, tmp_path: Path) -> None:
    api = client(live)
    ended = finish(api, begin(api, b"".join(line(n) for n in range(1200))))
    api.files.delete(ended.output_file_id or "")
    with pytest.raises(openai.NotFoundError):
        api.files.content(ended.output_file_id or "")

    def kept() -> int:
        with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
            return int(db.execute("SELECT COUNT(*) FROM batch_outputs").fetchone()[0])

    wait_for(lambda: kept() == 0)
    assert api.batches.retrieve(ended.id).status == "completed"


@pytest.mark.parametrize("damage", ["gone", "cut", "garbled"])
def test_an_input_file_that_is_gone_fails_its_batch(tmp_path: Path, damage: str) -> None:
    content = b"".join(line(n) for n in range(50)) + line(99, "stuck")
    with factory(tmp_path, Inside(slots=1)) as live:
        batch = begin(client(live), content)
        wait_for(lambda: counts(client(live), batch)[0] == 50)
        path = live.service.path_of(batch.input_file_id)
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:1000] if damage == "cut" else content[:-10] + b"#########\n")
    with factory(tmp_path) as live:
        ended = finish(client(live), batch)
        assert ended.status == "failed"
        assert ended.errors is not None
        assert [error.code for error in ended.errors.data or []] == ["file_not_found"]
        assert len(results(client(live), ended.output_file_id)) == 50


def test_ends_that_cannot_be_written_are_worked_for_again(
    live: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # What a full disk does, in SQLite's own words.
    refuse = (
        "CREATE TRIGGER full BEFORE INSERT ON batch_outputs WHEN NEW.line > 100"
        " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
    )
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute(refuse)
    api = client(live)
    batch = begin(api, b"".join(line(n) for n in range(300)))
    wait_for(lambda: f"{batch.id} is taken up again" in caplog.text)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM batch_outputs").fetchone()[0] <= 100
        db.execute("DROP TRIGGER full")
    ended = finish(api, batch)
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": 300, "completed": 300, "failed": 0}
    assert len(results(api, ended.output_file_id)) == 300
    wait_for(lambda: len(ledger(tmp_path)) == 300)
    assert max(live.inside.tried.values()) > 1
