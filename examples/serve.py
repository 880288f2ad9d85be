"""A small service that goes on with texts: FastAPI over the folder of a model or of an adapter.

    pip install fastapi uvicorn
    python examples/serve.py --model runs/pretrain/model
    curl -s localhost:8000/generate -H "Content-Type: application/json" -d '{"prompt": "def main(", "tokens": 20}'

GET /health tells that it is ready and how many requests it has. Every request is bounded: in bytes, in tokens of its
prompt, in tokens and seconds of its answer; and so is how many it has at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from generate import DTYPES, complete, load
from pydantic import BaseModel, ConfigDict, Field


class Asked(BaseModel):
    """The body of a request. Any other is answered with 422 and what is wrong."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1)
    tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.7, ge=0.0, le=2.0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)


def make_app(args: argparse.Namespace) -> FastAPI:
    app = FastAPI()
    # One thread has the model, from loading it on: torch uses all cores for one text, and an engine's weights come and
    # go for one thread. The others are for answering meanwhile.
    thread = ThreadPoolExecutor(1)
    model, tokenizer = thread.submit(load, args.model, args.dtype, args.offload).result()
    requests = 0

    @app.middleware("http")
    async def bound_bodies(request: Request, answer) -> Response:
        # A body of unknown length could be of any.
        length = request.headers.get("content-length", "0" if request.method == "GET" else "")
        if not length.isdecimal():
            return Response("a Content-Length is needed", 411)
        if int(length) > args.max_bytes:
            return Response(f"the request has {length} bytes, and at most {args.max_bytes} are taken", 413)
        return await answer(request)

    @app.exception_handler(RequestValidationError)
    async def say_what_is_wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer repeats what was sent, which may be what JSON or UTF-8 cannot carry.
        return JSONResponse({"detail": [{key: each[key] for key in ("loc", "msg")} for each in error.errors()]}, 422)

    @app.get("/health")
    async def health() -> dict:
        return {"ready": True, "model": args.model, "requests": requests}

    @app.post("/generate")
    async def generate(asked: Asked) -> dict:
        nonlocal requests
        if asked.tokens > args.max_tokens:
            raise HTTPException(422, f"tokens: {asked.tokens}, and at most {args.max_tokens} are made")
        count = len(tokenizer(asked.prompt)["input_ids"])
        if count > args.max_prompt:
            raise HTTPException(422, f"prompt: it has {count} tokens, and at most {args.max_prompt} are taken")
        if requests >= args.max_requests:
            raise HTTPException(503, "too many requests at a time", {"Retry-After": "1"})
        # Only the event loop's thread counts, so that no two requests take the last place.
        requests += 1
        try:
            call = functools.partial(complete, model, tokenizer, **asked.model_dump(), seconds=args.max_seconds)
            return {"text": await asyncio.get_running_loop().run_in_executor(thread, call)}
        finally:
            requests -= 1

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/pretrain/model", help="a folder, or a name of the hub's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--offload", default="none", help='see generate.py; anything but "none" needs `zeroxide run`')
    parser.add_argument("--host", default="127.0.0.1", help="there is no password: whoever reaches it may ask")
    parser.add_argument("--port", type=int, default=8000, help="0 takes one that is free")
    parser.add_argument("--max-bytes", type=int, default=1 << 16, help="of a request")
    parser.add_argument("--max-prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="after which an answer ends as it is")
    parser.add_argument(
        "--max-requests", type=int, default=8, help="that it has at a time; others are told to come back"
    )
    args = parser.parse_args()
    uvicorn.run(make_app(args), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
