"""The rest of OpenAI's API, /v1/models and /v1/embeddings; and /v1/rerank, which is Jina's and Cohere's."""

import asyncio
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct
from starlette.requests import Request

from gguf_run.runtime.model import Model
from gguf_run.runtime.serve.ask import Texts, body_of, texts_of
from gguf_run.runtime.serve.errors import HttpError, too_long
from gguf_run.runtime.serve.http import get, in_thread, post

MOST_TEXTS = 2048  # of a request
Number = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Embeddings(Struct):
    """What a client asks for."""

    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Number | None = None


class _Document(Struct):
    text: str


class _Rerank(Struct):
    query: str
    documents: list[str | _Document]
    model: str | None = None
    top_n: Number | None = None
    return_documents: bool | None = None


async def models(request: Request) -> dict[str, Any]:
    """List the models, or tell of one."""
    found, id = request.app.state.server.registry.info(), request.path_params.get("id")
    if not id:
        return {"object": "list", "data": found}
    for entry in found:
        if entry["id"] == id:
            return entry
    raise HttpError(404, f"model {id!r:.80} is not here: GET /v1/models lists those that are", "model_not_found")


async def embeddings(request: Request, json: dict[str, Any]) -> dict[str, Any]:
    """Return the embedding of each text."""
    shared, rows = await embed_texts(request, body_of(json, Embeddings))
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    return {"object": "list", "data": data, **shared}


async def embed_texts(request: Request, body: Embeddings) -> tuple[dict[str, Any], list[Any]]:
    """Return the model and the usage, and the embedding of each text, of the length 1.

    dimensions: so many numbers of each are returned, the first ones, scaled to the length 1 again. It makes sense for
    models that were trained for it (Matryoshka embeddings); their files do not tell.
    """

    def embed(model: Model, text: Any) -> tuple[int, Any]:
        ids = model.tokenize(text) if isinstance(text, str) else model.prompt_ids(text)
        if len(ids) > model.n_ctx:
            raise too_long(len(ids), model.n_ctx)
        row = model.embed([ids])[0]
        if (body.dimensions or 0) > len(row):
            raise HttpError(400, f"dimensions is {body.dimensions}: 1 to {len(row)} are allowed")
        row = row[: body.dimensions].astype("<f4")
        row /= max(float(np.linalg.norm(row)), 1e-12)
        return len(ids), b64encode(row.tobytes()).decode() if body.encoding_format == "base64" else row.tolist()

    return await _each(request, body.model, texts_of(body.input), embed)


async def rerank(request: Request, json: dict[str, Any]) -> dict[str, Any]:
    """Return the documents' probabilities to answer a query, the best first. usage: the tokens of both."""
    body: _Rerank = body_of(json, _Rerank)
    texts = [one if isinstance(one, str) else one.text for one in body.documents]

    def rank(model: Model, text: str) -> tuple[int, float]:
        n = sum(len(model.tokenize(one, add_special=False)) for one in (body.query, text))
        return n, float(model.rank(body.query, [text])[0])

    shared, found = await _each(request, body.model, texts, rank)
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": score} for i, score in enumerate(found)]
    results = sorted(results, key=lambda result: -result["relevance_score"])[: body.top_n]
    for result in results if body.return_documents else ():
        result["document"] = {"text": texts[result["index"]]}
    return {**shared, "results": results}


async def _each(
    request: Request, name: str | None, texts: Sequence[Any], work: Callable[[Model, Any], tuple[int, Any]]
) -> tuple[dict[str, Any], list[Any]]:
    """Return what a model makes of each text, and what the answers to both requests share.

    work: returns the tokens of a text and what is made of it. It gets a thread for each text, so that prompts of others
    come in between. It ends with the client.
    """
    if not 0 < len(texts) <= MOST_TEXTS:
        raise HttpError(400, f"{len(texts)} texts: 1 to {MOST_TEXTS} are allowed")
    server, found = request.app.state.server, []
    try:
        async with server.registry.use(name) as served, asyncio.timeout(server.request_timeout or None):
            for text in texts:
                if await request.is_disconnected():
                    raise HttpError(499, "the client is gone")
                found.append(await in_thread(request, work, served.model, text))
    except TimeoutError:
        raise HttpError(408, "the request took longer than --request-timeout allows", "timeout") from None
    n = sum(n for n, _ in found)
    usage = {"prompt_tokens": n, "total_tokens": n}
    return {"model": name or served.name, "usage": usage}, [made for _, made in found]


routes = [
    get("/v1/models", models),
    get("/v1/models/{id:path}", models),
    post("/v1/embeddings", embeddings),
    post("/v1/rerank", rerank),
    post("/rerank", rerank),
]
