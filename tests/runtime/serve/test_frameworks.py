"""Frameworks that speak OpenAI's API work with the server: LangChain and LlamaIndex."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from served import Serving, scripted, serving

httpx = pytest.importorskip("httpx")

HELLO = "Grüße 🙂."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    script = {"It rains": "Take a coat.", "weather": CALL, "As JSON": '{"city": "Bonn"}', "Say hello": HELLO}
    with serving(scripted(script, n_ctx=1024)) as found:
        yield found


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It rains in {city}."


def test_langchain(server: Serving) -> None:
    """Chat, a stream with its counts, a round of tools, structured output, both APIs of OpenAI's."""
    langchain_openai = pytest.importorskip("langchain_openai")
    pydantic = pytest.importorskip("pydantic")
    place: Any = {"base_url": f"{server.url}/v1", "api_key": "any", "model": "m0", "max_retries": 0}

    class City(pydantic.BaseModel):  # type: ignore[name-defined, misc]
        """A city."""

        city: str

    for api in ({}, {"use_responses_api": True}):
        model = langchain_openai.ChatOpenAI(**place, stream_usage=True, **api)
        assert model.invoke("Say hello").text == HELLO
        chunks = [*model.stream("Say hello")]
        assert "".join(chunk.text for chunk in chunks) == HELLO
        counts = [(chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks]
        assert sum(counts) == len(HELLO.encode())
        with_tools = model.bind_tools([weather])
        messages: list[Any] = [("user", "How is the weather in Köln?")]
        answer = with_tools.invoke(messages)
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Köln"})
        result = {"role": "tool", "tool_call_id": call["id"], "content": weather(**call["args"])}
        assert with_tools.invoke([*messages, answer, result]).text == "Take a coat."
        assert model.with_structured_output(City, method="json_schema").invoke("As JSON") == City(city="Bonn")

    async def ask() -> list[str]:
        async with httpx.AsyncClient() as client:
            model = langchain_openai.ChatOpenAI(**place, http_async_client=client)
            return [answer.text for answer in await model.abatch(["Say hello"] * 4)]

    assert asyncio.run(ask()) == [HELLO] * 4
    assert langchain_openai.OpenAI(**place, max_tokens=6).invoke("ab") == "cabcab"


def test_llama_index(server: Serving) -> None:
    """Chat, a stream, a continued text, a call of a tool."""
    openai_like = pytest.importorskip("llama_index.llms.openai_like")
    core = pytest.importorskip("llama_index.core")
    place: Any = {"api_base": f"{server.url}/v1", "api_key": "any", "model": "m0", "context_window": 1024}
    model = openai_like.OpenAILike(**place, is_chat_model=True, is_function_calling_model=True, max_retries=0)
    messages = [core.llms.ChatMessage(role="user", content="Say hello")]
    assert model.chat(messages).message.content == HELLO
    *_, last = model.stream_chat(messages)
    assert last.message.content == HELLO
    tool = core.tools.FunctionTool.from_defaults(weather)
    answer = model.chat_with_tools([tool], user_msg="How is the weather in Köln?")
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Köln"})
    plain = openai_like.OpenAILike(**place, is_chat_model=False, max_tokens=6)
    assert plain.complete("ab").text == "cabcab"
    assert "".join(piece.delta for piece in plain.stream_complete("ab")) == "cabcab"
