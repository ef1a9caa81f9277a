"""/v1/models."""

from fastapi import APIRouter

from moestro.server.api import ModelCard, ModelList, SettingsDep, WorkerDep, check_model
from moestro.server.contract import DOCUMENTED, Worker
from moestro.server.facts import Settings

router = APIRouter(prefix="/v1", responses=DOCUMENTED)


def _card(worker: Worker, settings: Settings) -> ModelCard:
    model = worker.model
    return ModelCard(
        id=settings.served_name,
        created=model.created_s,
        max_model_len=model.max_model_len_tokens,
    )


@router.get("/models")
async def list_models(worker: WorkerDep, settings: SettingsDep) -> ModelList:
    """What is served."""
    return ModelList(data=[_card(worker, settings)])


@router.get("/models/{name:path}")
async def show_model(name: str, worker: WorkerDep, settings: SettingsDep) -> ModelCard:
    """One served model; names may hold slashes."""
    check_model(name, settings)
    return _card(worker, settings)
