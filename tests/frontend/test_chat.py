import httpx

ASK = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


async def test_whole(client: httpx.AsyncClient) -> None:
    """A chat completion without streaming is one OpenAI body."""
    response = await client.post("/v1/chat/completions", json=ASK)
    body = response.json()
    assert response.status_code == 200
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello, world!", "refusal": None}
