"""Files of every known format are read; every broken one gets one clear line."""

import gzip
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenworks.errors import UserError
from tokenworks.workload import SERVICE_CLASSES, Request, Trace, generate, named, read, write

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:01.0000000,50,0
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 23:59:59.5+00:00,2162,5
2024-05-11 02:00:00.000250+02:00,2399,6
2024-05-11 00:00:01+00:00,76,15
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.25,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,0,0,0,API log
119,GPT-4,417.0,276,693,API log
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}
{"timestamp": 3000, "input_length": 1536, "output_length": 6, "hash_ids": [7, 8, 10]}

{"timestamp": 6000.5, "input_length": 100, "output_length": 1, "hash_ids": [11]}
"""
DYNAMO = "\n".join(
    [
        '{"schema":"dynamo.request.trace.v1","event_type":"tool_end","tool":{"tool_call_id":"a"}}',
        (
            '{"schema":"dynamo.request.trace.v1","event_type":"request_end","event_time_unix_ms":9,'
            '"request":{"request_id":"a","request_received_ms":1777312800000,"output_tokens":16,'
            '"replay":{"trace_block_size":64,"input_length":130,'
            '"input_sequence_hashes":[14879255164371896291,274632075616497421,5]}}}'
        ),
        (
            '{"schema":"dynamo.request.trace.v1","event_type":"request_end","event_time_unix_ms":9,'
            '"request":{"request_received_ms":1777312800500,"output_tokens":2,"input_tokens":9}}'
        ),
    ]
)


def rows(trace: Trace) -> list[tuple[int, int, int]]:
    return [(each.arrival_ns, each.prompt_tokens, each.output_tokens) for each in trace]


def test_azure() -> None:
    trace = read(AZURE.encode(), "a.csv")
    assert rows(trace) == [(0, 374, 44), (4_314_579_000, 396, 109)]
    assert (trace.format, trace.name, trace.skipped, trace.unsorted) == ("azure", "a.csv", 1, 0)


def test_azure_of_2024_with_zones_over_midnight() -> None:
    trace = read(AZURE_2024.encode(), "a.csv")
    assert [each.arrival_ns for each in trace] == [0, 500_250_000, 1_500_000_000]


@pytest.mark.parametrize(
    ("stamp", "seconds"),
    [
        ("1970-01-01 00:00:00", 0),
        ("2000-03-01T00:00:00Z", 951_868_800),
        ("2023-11-16 18:15:46", 1_700_158_546),
        ("2024-02-29 12:00:00-01:30", 1_709_213_400),
        ("2100-12-31 23:59:60", 4_133_980_800),
    ],
)
def test_stamps_are_what_other_clocks_say(stamp: str, seconds: int) -> None:
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n1970-01-01 00:00:00,1,1\n{stamp},1,1\n"
    assert read(text.encode(), "a.csv").span_ns == seconds * 10**9


def test_burstgpt_leaves_failures_out() -> None:
    trace = read(BURSTGPT.encode(), "b.csv")
    assert rows(trace) == [(0, 472, 18), (40_250_000_000, 1087, 230), (114_000_000_000, 417, 276)]
    assert (trace.format, trace.skipped) == ("burstgpt", 1)


def test_mooncake_keeps_full_blocks_only() -> None:
    trace = read(MOONCAKE.encode(), "m.jsonl")
    assert rows(trace) == [(0, 1100, 5), (0, 1536, 6), (3_000_500_000, 100, 1)]
    assert [each.prefix for each in trace] == [(7, 8), (7, 8, 10), ()]
    assert trace.prefix_block_tokens == 512


def test_dynamo_reads_requests_and_passes_over_tools() -> None:
    trace = read(DYNAMO.encode(), "d.jsonl")
    assert rows(trace) == [(0, 130, 16), (500_000_000, 9, 2)]
    assert [each.prefix for each in trace] == [(14879255164371896291, 274632075616497421), ()]
    assert (trace.format, trace.prefix_block_tokens) == ("dynamo", 64)


def test_byte_order_mark_line_ends_column_order_and_more_columns() -> None:
    text = (
        "\ufeffGeneratedTokens,extra,TIMESTAMP,ContextTokens\r\n7,x,2023-11-16 18:15:46,3\r\n\r\n"
    )
    assert rows(read(text.encode(), "a.csv")) == [(0, 3, 7)]


def test_unsorted_rows_are_sorted_stably_and_counted() -> None:
    text = "Timestamp,Request tokens,Response tokens\n5,1,1\n3,2,1\n9,3,1\n3,4,1\n"
    trace = read(text.encode(), "b.csv")
    assert [each.prompt_tokens for each in trace] == [2, 4, 1, 3]
    assert trace.unsorted == 2


def test_many_rows_are_read_as_one_by_one() -> None:
    body = [f"{at},{at % 97 + 1},{at % 89}" for at in range(10_000)]
    trace = read("\n".join(["Timestamp,Request tokens,Response tokens", *body]).encode(), "b.csv")
    kept = [at for at in range(10_000) if at % 89]
    assert list(trace.prompt_tokens) == [at % 97 + 1 for at in kept]
    assert trace.skipped == 10_000 - len(kept)


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:15:46,3,7\n"
BURST = "Timestamp,Request tokens,Response tokens\n"
LINE = '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": []}\n'
OWN = '{"tokenworks_trace": 1}\n'

BROKEN = {
    "nothing": (b"", "f is empty", "Give a file"),
    "blanks": (b" \n\n", "f is empty", "Give a file"),
    "gzip": (gzip.compress(AZURE.encode()), "f is compressed", "gunzip it first"),
    "zip": (b"PK\x03\x04rest", "f is compressed", "unzip"),
    "zstd": (b"\x28\xb5\x2f\xfdrest", "f is compressed", "zstd -d"),
    "parquet": (b"PAR1rest", "Parquet", "CSV"),
    "not UTF-8": (f"{HEAD}{GOOD}".encode() + b"\xff,1,1", "f:3: not UTF-8", "Save"),
    "UTF-16": (AZURE.encode("utf-16"), "f:1: not UTF-8", "Save"),
    "NULs": (b"\0" * 100, "f is no text file", "Azure"),
    "a tab in a name": (b'"a\tb",c,d\n', "f:1: no known trace has the columns a?b, c, d", "Azure"),
    "other columns": (b"a,b,c\n1,2,3\n", "f:1: no known trace has the columns a, b, c", "Azure"),
    "no columns": (b",,\n,,\n", "f:3: no known trace", "Azure"),
    "a column short": (
        b"TIMESTAMP,ContextTokens\n",
        "f:1: GeneratedTokens is missing among the columns TIMESTAMP, ContextTokens",
        "azure needs it",
    ),
    "header only": (HEAD.encode(), "f has no request", "with requests"),
    "failures only": (f"{BURST}5,0,0\n".encode(), "all 1 produced no token", "with requests"),
    "no number": (f"{HEAD}{GOOD[:-2]}x\n".encode(), "f:2: GeneratedTokens is 'x'", "whole number"),
    "underscore": (f"{BURST}5,1_0,3\n".encode(), "f:2: Request tokens is '1_0'", "whole number"),
    "half a token": (f"{BURST}5,1.5,3\n".encode(), "f:2: Request tokens is '1.5'", "whole number"),
    "NaN": (f"{BURST}5,nan,3\n".encode(), "f:2: Request tokens is 'nan'", "whole number"),
    "1e400": (f"{BURST}5,1e400,3\n".encode(), "f:2: Request tokens is '1e400'", "whole number"),
    "endless time": (f"{BURST}inf,1,3\n".encode(), "f:2: Timestamp is 'inf'", "seconds"),
    "far time": (f"{BURST}1e30,1,3\n".encode(), "f:2: Timestamp is too large", "146 years"),
    "early time": (f"{BURST}-1,1,3\n".encode(), "f:2: Timestamp is negative", "zero or above"),
    "bad stamp": (
        f"{HEAD}16.11.2023,1,3\n".encode(),
        "f:2: TIMESTAMP is '16.11.2023'",
        "like 2023",
    ),
    "no such day": (f"{HEAD}2023-02-29 00:00:00,1,3\n".encode(), "f:2: TIMESTAMP", "like 2023"),
    "negative": (f"{HEAD}{GOOD}{GOOD[:20]}-3,7\n".encode(), "f:3: ContextTokens is -3", "1 to"),
    "no prompt": (f"{HEAD}{GOOD[:20]}0,7\n".encode(), "f:2: ContextTokens is 0", "1 to"),
    "absurd": (
        f"{HEAD}{GOOD[:20]}3,100000001\n".encode(),
        "f:2: GeneratedTokens is",
        "100,000,000",
    ),
    "cut off": (f"{HEAD}{GOOD}2023-11-16".encode(), "f:3: 1 field where the header has 3", "cut"),
    "JSON in CSV": (f"{HEAD}{GOOD}{LINE}".encode(), "f:3: JSON among CSV rows", "Split"),
    "two files": (f"{HEAD}{GOOD}{HEAD}".encode(), "f:3: a second header", "one by one"),
    "open quote": (f'{HEAD}"{GOOD}'.encode(), "f:3: unexpected end of data", "Mend"),
    "JSON array": (f"[{LINE}]".encode(), "f is a JSON array", "jq"),
    "unknown JSON": (b'{"a": 1}', "f:1: no known trace has the fields a", "Mooncake"),
    "bad JSON": (b"{", "f:1: Input data was truncated", "one JSON object"),
    "bad JSON later": (f"{LINE}{{".encode(), "f:2: Input data was truncated", "cut off"),
    "no object": (f"{LINE}17\n".encode(), "f:2: '17' is no JSON object", "must be one"),
    "CSV in JSON": (f"{LINE}{HEAD}".encode(), "f:2: 'TIMESTAMP,", "must be one"),
    "JSON's text": (LINE.replace("5,", '"5",', 1).encode(), "f:1: Expected `int`", "Mend"),
    "JSON's NaN": (LINE.replace("0", "NaN", 1).encode(), "f:1: JSON is malformed", "one JSON"),
    "JSON's 1e400": (f"{LINE}{LINE.replace('0', '1e400', 1)}".encode(), "f:2: Number out", "Mend"),
    "JSON's far time": (LINE.replace("0", "1e300", 1).encode(), "f:1: timestamp is too", "146"),
    "JSON's early time": (LINE.replace("0", "-1", 1).encode(), "f:1: timestamp is neg", "zero"),
    "JSON, no prompt": (LINE.replace("5", "0", 1).encode(), "f:1: input_length is 0", "1 to"),
    "mixed": (f"{LINE}{OWN}".encode(), "f:2: a line of tokenworks in a trace of mooncake", "Split"),
    "our later version": (b'{"tokenworks_trace": 2}', "f:1: tokenworks_trace is 2", "version 1"),
    "our header only": (OWN.encode(), "f has no request", "with requests"),
    "our unknown field": (
        f'{OWN}{{"arrival_ns":0,"prompt_tokens":1,"output_tokens":1,"tennant":"a"}}'.encode(),
        "f:2: Object contains unknown field `tennant`",
        "Mend",
    ),
    "lines in a field": (
        f'{OWN}{{"ten\\nnant":0}}'.encode(),
        "f:2: Object contains unknown field `ten?nant`",
        "Mend",
    ),
    "our unknown class": (
        f'{OWN}{{"arrival_ns":0,"prompt_tokens":1,"output_tokens":1,"service_class":"x"}}'.encode(),
        "f:2: service_class is 'x'",
        "realtime, standard",
    ),
    "our blocks beyond the prompt": (
        f'{OWN}{{"arrival_ns":0,"prompt_tokens":9,"output_tokens":1,"prefix":[1],'
        '"prefix_block_tokens":10}'.encode(),
        "f:2: 1 blocks of 10 tokens",
        "9 tokens",
    ),
    "Dynamo's payload only": (
        DYNAMO.split("\n", maxsplit=1)[0].encode(),
        "f has no request",
        "with requests",
    ),
    "Dynamo without lengths": (
        (
            b'{"schema":"dynamo.request.trace.v1","event_type":"request_end","request":'
            b'{"request_received_ms":1,"output_tokens":2}}'
        ),
        "f:1: a request_end without replay or input_tokens",
        "DYN_REQUEST_TRACE",
    ),
    "another Dynamo": (b'{"schema":"v9","event_type":"x"}', "f:1: schema is 'v9'", "v1 is read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_gets_one_line(case: str) -> None:
    data, message, remedy = BROKEN[case]
    with pytest.raises(UserError) as caught:
        read(data, "f")
    assert message in caught.value.message
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def said(data: bytes) -> str:
    """The error that reading gives; "" if it gives a trace."""
    try:
        return "" if len(read(data, "f")) else "an empty trace"
    except UserError as error:
        return str(error)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_comes_is_a_trace_or_one_line(data: bytes) -> None:
    for start in (b"", HEAD.encode(), BURST.encode(), LINE.encode(), OWN.encode()):
        found = said(start + data)
        assert not found or (found.startswith("f") and found.isprintable())


requests = st.builds(
    Request,
    st.integers(0, 10**15),
    st.integers(100, 10**6),
    st.integers(1, 10**6),
    st.sampled_from(SERVICE_CLASSES),
    st.text(max_size=8),
    st.lists(st.integers(0, 2**64 - 1), max_size=6).map(tuple),
    st.just(16),
)


@given(st.lists(requests, min_size=1, max_size=20))
def test_our_own_format_gives_back_what_was_written(some: list[Request]) -> None:
    trace = Trace.of(some)
    again = read(write(trace), "x")
    assert list(again) == list(trace)
    assert len(again) == len(some)


def test_our_own_format_gives_back_the_others() -> None:
    for text in (AZURE, AZURE_2024, BURSTGPT, MOONCAKE, DYNAMO):
        trace = read(text.encode(), "x")
        assert list(read(write(trace), "y")) == list(trace)


def test_our_own_format_is_requests_field_by_field() -> None:
    some = list(generate(named("mooncake-conversation"), Random(1), 3))
    lines = write(Trace.of(some)).splitlines()
    assert msgspec.json.decode(lines[0]) == {"tokenworks_trace": 1}
    assert [msgspec.json.decode(line, type=Request) for line in lines[1:]] == some


def test_one_trace_has_one_block_size() -> None:
    some = [Request(0, 99, 1, prefix=(1,), prefix_block_tokens=size) for size in (16, 32)]
    with pytest.raises(UserError, match="blocks of 16, 32 tokens"):
        Trace.of(some)
    lines = b"\n".join(map(msgspec.json.encode, some))
    with pytest.raises(UserError, match="x:3: blocks of 32 tokens after some of 16"):
        read(OWN.encode() + lines, "x")
