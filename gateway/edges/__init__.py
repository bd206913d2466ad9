"""How calls get in and replies get out: two thin edges over one exchange function.

`protocol` serves the inference routes from the HTTP parser's callbacks and writes straight to the socket; `asgi` is
the reference, an ASGI endpoint like any other. One test suite runs over both.
"""
