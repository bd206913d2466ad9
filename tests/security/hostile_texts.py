"""Texts that would do something wherever one is taken for markup, a link, a template or an order to a terminal (S14).

One that runs sets `window.__canary`; one that loads something asks a host that does not exist. Gathered from OWASP's
XSS filter evasion cheat sheet, from browsers' own test suites, and from what was found in other gateways' dashboards.
"""

from __future__ import annotations

RUN = "window.__canary=1"
HOST = "canary.invalid"
HOSTILE = {
    "script": f"<script>{RUN}</script>",
    "remote script": f"<script src=//{HOST}/s.js></script>",
    "handler": f"<img src=x onerror={RUN}>",
    "handler without spaces": f"<img/src=x/onerror={RUN}>",
    "svg": f"<svg/onload={RUN}>",
    "svg animation": f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    "details": f"<details open ontoggle={RUN}>",
    "autofocus": f"<input autofocus onfocus={RUN}>",
    "link": f"<a href=javascript:{RUN}>press</a>",
    "address": f"javascript:{RUN}",
    "address with a tab": f"java\tscript:{RUN}",
    "data address": f"data:text/html,<script>{RUN}</script>",
    "remote picture": f"<img src=http://{HOST}/p.png>",
    "remote style": f"<style>@import'http://{HOST}/s.css'</style>",
    "remote base": f"<base href=http://{HOST}/>",
    "refresh": f"<meta http-equiv=refresh content='0;url=http://{HOST}/'>",
    "frame": "<iframe srcdoc='<script>parent.__canary=1</script>'></iframe>",
    "object": f"<object data=http://{HOST}/o></object>",
    "form": f"<form action=http://{HOST}/><button autofocus>x</button></form>",
    "markdown picture": f"![x](http://{HOST}/markdown.png)",
    "markdown link": f"[x](javascript:{RUN})",
    "end of an attribute": f'"><script>{RUN}</script>',
    "end of an attribute in single quotes": f"'><script>{RUN}</script>",
    "end of a title": f"</title></textarea></style></script><script>{RUN}</script>",
    "end of a script": f"</script><script>{RUN}</script>",
    "end of a comment": f"--><script>{RUN}</script>",
    "mutation": f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    "math": f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}>",
    "template literal": f"${{{RUN}}}",
    "template of Vue and Angular": f"{{{{constructor.constructor('{RUN}')()}}}}",
    "template of Jinja": "{{7*7}}{%if 1%}49{%endif%}",
    "entity": f"&lt;img src=x onerror={RUN}&gt;",
    "prototype": "__proto__",
    "constructor": "constructor",
    "spreadsheet": f'=HYPERLINK("http://{HOST}")',
    "event of a stream": f"x\n\nevent: overview\ndata: <script>{RUN}</script>\n\n",
    "bidi": "abc\u202e\u2066gnp.exe\u2069",
    "zero width": "ad\u200bmin\ufeff",
    "look-alike": "\u0430dmin",
    "combining": "Z\u0351\u036b\u0343\u036a\u0302" * 40,
    "ansi": "\x1b[2J\x1b]0;owned\x07\x1b[31mred",
    "ansi link": f"\x1b]8;;http://{HOST}\x07x\x1b]8;;\x07",
    "null": "a\0b",
    "line separator": "a\u2028b\u2029c",
    "lone surrogate": "\ud83d",
    "very long": "A" * 20_000,
    "very long word of markup": "<b>" * 5_000,
}
"""By what each is."""


def sent_as_json(text: str) -> str:
    """Without what is no Unicode at all, and so in no JSON."""
    return text.encode("utf-8", "replace").decode()
