"""The input file of a batch, line by line, and the form it comes in."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenworks.gateway.batch.lines import Input, check
from tokenworks.gateway.batch.multipart import Multipart, MultipartError, Part, boundary
from tokenworks.gateway.batch.settings import BatchSettings

ENDPOINT = "/v1/chat/completions"


def line(custom_id: str = "a", **changes: Any) -> bytes:
    whole = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": {"model": "m"}}
    return json.dumps({k: v for k, v in (whole | changes).items() if v is not None}).encode()


A, B, C = line("a"), line("b"), line("c")
BOM = b"\xef\xbb\xbf"


def faults(
    tmp_path: Path, content: bytes, **limits: int
) -> list[tuple[str, int | None, str | None]]:
    path = tmp_path / "in"
    path.write_bytes(content)
    found = check(path, ENDPOINT, BatchSettings(**limits))
    assert all(fault.message for fault in found.faults)
    return [(fault.code, fault.line, fault.param) for fault in found.faults]


@pytest.mark.parametrize(
    "content",
    [
        A,
        A + b"\n" + B + b"\n",
        A + b"\r\n" + B + b"\r\n" + C,
        BOM + A + b"\n" + B,
        A + b"\n" + B + b"\n\n \r\n\n",
        "\n".join([line("ü").decode(), line("日本").decode()]).encode(),
        line("a", body={"model": "m", "messages": [{"content": "ü\n"}], "stream": False}),
        b'{"custom_id":"\xc3\xbc","method":"POST","url":"/v1/chat/completions","body":{"model":"m"}}',
    ],
)
def test_good_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in"
    path.write_bytes(content)
    found = check(path, ENDPOINT, BatchSettings())
    assert found.faults == []
    text = content.removeprefix(BOM).decode().strip()
    told = [json.loads(entry) for entry in text.split("\n")]
    assert found.lines == len(told)
    read = Input(path, found.lines)
    for number, entry in enumerate(told, 1):
        assert read.line(number).custom_id == entry["custom_id"]
        assert json.loads(read.line(number).body) == entry["body"]
    read.close()


MISSING = "missing_required_parameter"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", [("empty_file", None, None)]),
        (BOM, [("empty_file", None, None)]),
        (b"\n\n", [("empty_file", None, None)]),
        (A + b"\n{\n" + B, [("invalid_json_line", 2, None)]),
        (b"[1]", [("invalid_json_line", 1, None)]),
        (b"[" * 100_000, [("invalid_json_line", 1, None)]),
        (A + b"\n\n" + B, [("invalid_json_line", 2, None)]),
        (A.decode().encode("utf-16"), [("invalid_json_line", 1, None)]),
        (A.replace(b'"m"', b'"\xff"'), [("invalid_json_line", 1, None)]),
        (A[:-2] + b', "text": "\xff"}}', [("invalid_json_line", 1, None)]),
        (line(custom_id=None), [(MISSING, 1, "custom_id")]),  # type: ignore[arg-type]
        (line(""), [("invalid_value", 1, "custom_id")]),
        (line(method=None), [(MISSING, 1, "method")]),
        (line(method="GET"), [("invalid_method", 1, "method")]),
        (line(url=None), [(MISSING, 1, "url")]),
        (line(url="/v1/embeddings"), [("url_mismatch", 1, "url")]),
        (line(body=None), [(MISSING, 1, "body")]),
        (line(body=[1]), [("invalid_value", 1, "body")]),
        (line(body={}), [(MISSING, 1, "body.model")]),
        (line(body={"model": 1}), [("invalid_value", 1, "body.model")]),
        (line(body={"model": "m", "stream": True}), [("invalid_value", 1, "body.stream")]),
        (b"\n".join([A, B, A, C, B]), [("duplicate_custom_id", n, "custom_id") for n in (3, 5)]),
        (b"{\n" * 300, [("invalid_json_line", n, None) for n in range(1, 101)]),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, told: list[Any]) -> None:
    assert faults(tmp_path, content) == told


def test_limits(tmp_path: Path) -> None:
    three = b"\n".join([A, B, C])
    assert faults(tmp_path, three + b"\n\n", lines=3) == []
    assert faults(tmp_path, three, lines=2) == [("too_many_tasks", None, None)]
    assert faults(tmp_path, three, line_bytes=len(A)) == []
    for more in (1, 2, 3, 100_000):
        long = line("b", body={"model": "m" * (1 + more)})
        content = b"\n".join([A, long, C])
        assert faults(tmp_path, content, line_bytes=len(A)) == [("line_too_long", 2, None)]


def form(parts: list[tuple[str, bytes]], mark: bytes = b"mark") -> bytes:
    content = b"preamble"
    for head, data in parts:
        content += b"\r\n--" + mark + b" \r\n" + head.encode() + b"\r\n\r\n" + data
    return content + b"\r\n--" + mark + b"--\r\nepilogue"


def read(pieces: list[bytes], mark: bytes = b"mark") -> list[tuple[Part, bytes]]:
    parser = Multipart(mark)
    found: list[tuple[Part, bytes]] = []
    for data in pieces:
        for piece in parser.feed(data):
            if isinstance(piece, Part):
                found.append((piece, b""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + piece)
    assert parser.is_complete
    return found


@given(
    contents=st.lists(
        st.lists(st.sampled_from([b"\r", b"\n", b"-", b"--", b"\r\n--mar", b"x", b"mark"])).map(
            b"".join
        ),
        max_size=3,
    ),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_a_form_is_the_same_however_it_is_cut(contents: list[bytes], cuts: list[int]) -> None:
    kept = [content for content in contents if b"\r\n--mark" not in b"\r\n" + content]
    parts = [(f'Content-Disposition: form-data; name="p{n}"', data) for n, data in enumerate(kept)]
    whole, pieces, at = form(parts), [], 0
    for cut in cuts * 40:
        pieces.append(whole[at : at + cut])
        at += cut
    pieces.append(whole[at:])
    assert read(pieces) == [(Part(f"p{n}", None), data) for n, data in enumerate(kept)]


@pytest.mark.parametrize(
    ("disposition", "part"),
    [
        ('form-data; name="file"; filename="a b.jsonl"', Part("file", "a b.jsonl")),
        ("form-data; name=file; filename=a.jsonl", Part("file", "a.jsonl")),
        ('form-data; name="file"; filename=""', Part("file", "")),
        ('form-data; name="file"; filename="日本.jsonl"', Part("file", "日本.jsonl")),
        ("form-data; name=\"file\"; filename*=UTF-8''%e6%97%a5.jsonl", Part("file", "日.jsonl")),
        ('form-data; name="expires_after[anchor]"', Part("expires_after[anchor]", None)),
    ],
)
def test_names_of_parts(disposition: str, part: Part) -> None:
    head = f"content-type: text/plain\r\ncontent-disposition: {disposition}"
    assert read([form([(head, b"data")])]) == [(part, b"data")]


@pytest.mark.parametrize(
    "content",
    [
        b"--mark\r\n\r\ndata\r\n--mark--",
        b"--mark\r\ncontent-disposition: form-data\r\n\r\n",
        b"--mark\r\ncontent-disposition: attachment; name=a\r\n\r\n",
        b"--mark\r\ncontent-disposition: form-data; name=\xff\r\n\r\n",
        b"--markother\r\n",
        b"--mark\r\n" + b"x" * 20_000,
        b"--mark" + b" " * 20_000,
        b"--mark\r\ncontent-disposition: form-data; name=a\r\n\r\n\r\n" * 40,
    ],
)
def test_malformed_forms(content: bytes) -> None:
    with pytest.raises(MultipartError):
        Multipart(b"mark").feed(content)


def test_the_boundary() -> None:
    assert boundary('multipart/form-data; boundary="a b"; charset=utf-8') == b"a b"
    for wrong in ("", "application/json", "multipart/form-data", "multipart/mixed; boundary=a"):
        with pytest.raises(MultipartError):
            boundary(wrong)


def test_lines_are_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "in"
    texts = ["x" * (n * 37 % 9000) for n in range(200)]
    path.write_bytes(b"\n".join(line(str(n), body={"model": text}) for n, text in enumerate(texts)))
    opened = Input(path, len(texts))
    for number in [*range(1, 201), *range(200, 0, -7), 3, 3, 200, 1]:
        found = opened.line(number)
        assert found.custom_id == str(number - 1)
        assert json.loads(found.body) == {"model": texts[number - 1]}
    opened.close()
