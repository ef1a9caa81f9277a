"""The application, built from its parts. Creates nothing at import and nothing global."""

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from moestro.engine import EngineError
from moestro.server.api import ApiKey, BodyLimit, Cors, HeadAsGet, Parts, RequestIds, ops_router
from moestro.server.api.dialects import (
    chat_router,
    completions_router,
    models_router,
    tokenizer_router,
)
from moestro.server.contract import GenerationFailed, UnknownModel, Worker, answer
from moestro.server.facts import Settings
from moestro.server.metrics import EngineCollector, ServerMetrics

from .document import complete


class Api(FastAPI):
    """FastAPI with our middleware around it, and with a document that tells the truth."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            complete(super().openapi(), has_keys=bool(self.state.parts.settings.keys))
        assert self.openapi_schema is not None
        return self.openapi_schema

    def build_middleware_stack(self) -> ASGIApp:
        """Around FastAPI's own, so that the answer to a bug has these headers too."""
        stack: ASGIApp = RequestIds(super().build_middleware_stack())
        origins = self.state.parts.settings.allow_origin
        return Cors(stack, origins) if origins else stack


def create_app(worker: Worker, settings: Settings) -> FastAPI:
    """The caller starts and stops the worker; the app only asks it."""
    metrics = ServerMetrics(EngineCollector(worker, settings.served_name))
    # No docs pages: theirs load scripts from elsewhere. No redirects: they trust the Host header.
    app = Api(
        title="moestro",
        version=version("moestro"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.parts = Parts(worker, settings, metrics)
    app.include_router(completions_router)
    app.include_router(chat_router)
    app.include_router(models_router)
    app.include_router(tokenizer_router)
    app.include_router(ops_router)
    for kind in (
        RequestValidationError,
        HTTPException,
        EngineError,
        UnknownModel,
        GenerationFailed,
        Exception,
    ):
        app.add_exception_handler(kind, answer)
    # The last added is the first passed.
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, limit_bytes=settings.max_body)
    if settings.keys:
        app.add_middleware(ApiKey, keys=settings.keys, metrics=metrics)
    return app
