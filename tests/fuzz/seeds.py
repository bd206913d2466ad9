"""What the fuzzer starts from: one small example of each thing that a target can be shown.

Where a target cuts its input into reads, the first byte is the length of each (`\\x00`: all in one).
An input that has broken something is added here, beside its fix.
"""

from __future__ import annotations

import msgspec

BODIES = (
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"n":2,"max_tokens":10}',
    b'{ "model" : "m", "\\u0072id": "x", "a": [1, -2.5e3, null, "\\ud83d\\ude00"] }',
    b'{"model":"m","model":"n"}',
    b'{"a":{"a":1,"a":2},"b":"\\\\\\"","":0}',
    b' {"n":1.0,"n":1} ',
    b"{}",
    b"[]",
    b"\xef\xbb\xbf{}",
    b'{"a":1e999}',
    b'{"a":NaN}',
    b'{"a":"\\ud800"}',
    b'{"a":"\xff"}',
    b'{"prompt":["a","b"],"best_of":3,"input":[[1,2],[3]]}',
)
CHATS = (
    BODIES[0],
    b'{"model":"m","messages":[{"role":"system","content":[{"type":"text","text":"a"}]},{"role":"user","content":['
    b'{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}},'
    b'{"type":"file","file":{"file_data":"data:text/plain;base64,QQ=="}}]}]}',
    b'{"model":"m","messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"id":"1","type":'
    b'"function","function":{"name":"f","arguments":"{}"}}]},{"role":"tool","tool_call_id":"1","content":"b"}],'
    b'"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}],"tool_choice":"auto"}',
    b'{"model":"m","messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema","json_schema":'
    b'{"name":"x","schema":{"type":"object"}}},"temperature":1,"stop":["a"],"top_k":3,"reasoning_effort":"low"}',
    b'{"prompt":"a","suffix":"b","prompt_cache_key":"k"}',
    b'{"prompt":[[1,2,3],[4]],"input":["a",1,null]}',
)

_HEAD = b"Host: localhost\r\n"
_POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + _HEAD
REQUESTS = (
    b"\x00" + _POST + b"Content-Length: 2\r\n\r\n{}",
    b"\x05" + _POST + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n",
    b"\x00" + _POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"\x00" + _POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    b"\x20GET /v1/models HTTP/1.1\r\n" + _HEAD + b"\r\nGET /livez HTTP/1.0\r\n\r\n",
    b"\x00GET / HTTP/1.1\r\nHost: a/x?y=\r\nAuthorization: Bearer x\r\nAuthorization: Bearer y\r\n\r\n",
    b"\x00" + _POST + b"Expect: 100-continue\r\nContent-Length: 2\r\nX: a\r\n b\r\n\r\n{}",
    b"\x00GET / HTTP/1.1\n" + _HEAD + b"Connection: Upgrade\nUpgrade: h2c\n\n",
    b"\x00PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
AUTHORIZATIONS = (
    b"Bearer tg-live-0123456789abcdefABCDEF_x",
    b"bearer\t x ",
    b"Basic dXNlcjpwYXNz",
    b"x-api-key: a",
    b"api-key:Bearer a",
    b"Bearer " + b"\xe4\x00\x7f",
    b"",
)
RESPONSES = (
    # Its body was once delivered without a head.
    b"\x00HTTP/1.1 199 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    b"\x00HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"\x03HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"\x00HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 No\r\nRetry-After: 1\r\nConnection: close\r\n\r\nno",
    b"\x00HTTP/1.0 204 None\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    b"\x00HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc",
    b"\x00HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
)

_CHUNK = (
    b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"hi"},'
    b'"finish_reason":null}]}\n\n'
)
_LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
_USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
STREAMS = (
    b"\x00" + _CHUNK + _CHUNK + _LAST + _USAGE + b"data: [DONE]\n\n",
    b"\x07" + _CHUNK + _LAST + b"data: [DONE]\n\n",
    b"\x01: ping\r\n\r\nevent: x\rid: 1\r\rdata: a\ndata: b\n\n",
    b'\x00data: {"error":{"message":"no","code":500}}\n\n' + _CHUNK,
    b'\x00\xef\xbb\xbfdata:{"choices":[{"index":1,"text":"a","finish_reason":"abort"}]}\n\n',
)


def _event(kind: str, fields: str) -> bytes:
    return f'event: {kind}\ndata: {{"type":"{kind}"{fields}}}\n\n'.encode()


_START = _event("message_start", ',"message":{"id":"msg_1","model":"c","usage":{"input_tokens":3,"output_tokens":1}}')
_END = _event("message_delta", ',"delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":5}') + _event(
    "message_stop", ""
)
ANTHROPIC_STREAMS = (
    b"\x00"
    + _START
    + _event("content_block_start", ',"index":0,"content_block":{"type":"text","text":""}')
    + _event("content_block_delta", ',"index":0,"delta":{"type":"text_delta","text":"hi"}')
    + _event("content_block_stop", ',"index":0')
    + _END,
    b"\x0b"
    + _START
    + _event("content_block_start", ',"index":0,"content_block":{"type":"tool_use","id":"t","name":"f","input":{}}')
    + _event("content_block_delta", ',"index":0,"delta":{"type":"input_json_delta","partial_json":"{}"}')
    + _event("content_block_start", ',"index":1,"content_block":{"type":"thinking","thinking":"","signature":""}')
    + _event("content_block_delta", ',"index":1,"delta":{"type":"thinking_delta","thinking":"hm"}')
    + _END,
    b"\x00" + _event("error", ',"error":{"type":"overloaded_error","message":"no"}'),
    b'\x00{"id":"msg_1","type":"message","role":"assistant","model":"c","content":[{"type":"text","text":"hi"}],'
    b'"stop_reason":"end_turn","usage":{"input_tokens":1,"output_tokens":2}}',
)
ERRORS = (
    b'\x00{"error":{"message":"no","type":"x","param":null,"code":"c"}}',
    b'\x1d{"detail":[{"loc":["body","n"],"msg":"bad"}]}',
    b'\x64{"object":"error","message":"no\\r\\nX: y","code":503}',
    b"\x1d120                                   Wed, 21 Oct 2026 07:28:00 GMT",
    b"\x67Wed, 21 Oct 2026 07:28:00 GMT          1e400",
    b'\x00{"choices":[{"finish_reason":"abort"}]}',
)
_STORED = {
    "type": "BlockStored",
    "block_hashes": [1, b"abc"],
    "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_name": "a",
    "medium": "GPU",
}
BATCHES = tuple(
    msgspec.msgpack.encode(batch)
    for batch in (
        [1.5, [_STORED, {"type": "BlockRemoved", "block_hashes": [1]}, {"type": "AllBlocksCleared"}], 0],
        [1.5, [["BlockStored", [1, 2], None, [1, 2], 1, None], ["BlockRemoved", [1]], ["AllBlocksCleared"]], None],
        {"a": 1},
    )
)
PAGES = (
    b'# HELP a b\n# TYPE a gauge\na 1\nvllm:num_requests_running{model="m\\"x",e="0"} 2.0\na_total{} NaN\na +Inf 3\n',
    b'a{b="c",} 1e5\na{b="\\\\\\n"} -.5\na{',
)
