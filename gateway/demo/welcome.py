"""What the terminal says once a real answer has come."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from gateway.demo.fleet import ALIAS, MODEL, PROMPT, Answer, Ports, token_file


def curl_line(ports: Ports) -> str:
    """A command that can be pasted as it is; it gets the answer that the welcome shows."""
    body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": PROMPT}]}
    url = f"{ports.base_url}/chat/completions"
    return f"curl {url} -H 'content-type: application/json' -d '{json.dumps(body)}'"


def sdk_example(ports: Ports) -> str:
    """Four lines of Python that run as they are."""
    asked = json.dumps([{"role": "user", "content": PROMPT}])
    return "\n".join(
        [
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{ports.base_url}", api_key="unused")',
            f'reply = client.chat.completions.create(model="{MODEL}", messages={asked}, temperature=0)',
            "print(reply.choices[0].message.content)",
        ]
    )


def welcome(ports: Ports, replicas: int, answer: Answer, folder: Path) -> str:
    """The whole text."""
    said = textwrap.fill(answer.text, 100, initial_indent="    ", subsequent_indent="    ")
    fleet = "one replica" if replicas == 1 else f"{replicas} replicas"
    return f"""
Tidegate is up: {fleet} of SmolLM2-135M-Instruct on llama.cpp, behind one address.

    API      {ports.base_url}    model {MODEL} (also as {ALIAS}); no key needed on this machine
    Admin    {ports.admin_url}/admin/    the dashboard; sign in with the token in {token_file(folder)}

It was asked "{PROMPT}" and said ({answer.tokens} tokens in {answer.took_s:.1f} s, from {answer.replica}):

{said}

It is a very small model; what you put behind Tidegate yourself will know more. Ask it from another terminal:

{textwrap.indent(curl_line(ports), "    ")}

or from Python (pip install openai):

{textwrap.indent(sdk_example(ports), "    ")}

Where to look next:

    dashboard         {ports.admin_url}/admin/
    metrics           curl -H "authorization: Bearer $(cat {token_file(folder)})" {ports.admin_url}/metrics
    usage records     tail -f {folder / "usage.jsonl"}
    logs              {folder}
    your own servers  make run CONFIG=file.yaml; docs/configuration.md says what is in it

Ctrl-C stops all of it.
"""
