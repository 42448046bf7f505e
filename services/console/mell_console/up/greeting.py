"""What a user can do with a running stack: text that works when it is copied. Pure."""

import json
import shlex

_QUESTION = "What is the Moon made of?"


def greeting(url: str, model: str, api_key: str) -> str:
    """Return a curl line and a Python snippet, flush left, against the frontend at `url`."""
    return f"{curl_line(url, model, api_key)}\n\n{python_snippet(url, model, api_key)}"


def curl_line(url: str, model: str, api_key: str) -> str:
    """Return one shell line that streams a chat completion."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": _QUESTION}]}
    words = ["curl", "-N", f"{url}/v1/chat/completions", "-H", "content-type: application/json"]
    if api_key:
        words += ["-H", f"authorization: Bearer {api_key}"]
    return shlex.join([*words, "-d", json.dumps(body)])


def python_snippet(url: str, model: str, api_key: str) -> str:
    """Return a Python program that streams a chat completion with the official client."""
    base, key, name = map(json.dumps, (f"{url}/v1", api_key or "none", model))
    return f"""from openai import OpenAI  # pip install openai
client = OpenAI(base_url={base}, api_key={key})
question = [{{"role": "user", "content": {json.dumps(_QUESTION)}}}]
for chunk in client.chat.completions.create(model={name}, messages=question, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""
