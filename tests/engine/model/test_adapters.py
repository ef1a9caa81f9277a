"""Classes that are given the experts interface: each is still there, and still lacks it."""

import importlib
import inspect
from types import ModuleType

import pytest
import torch

from moestro.engine.formats import is_experts_module
from moestro.engine.model.adapters import ADAPTERS

MOST_LINES = 40


def modelling_file(name: str) -> ModuleType:
    folder = name.partition(".")[0].removeprefix("modeling_")
    return importlib.import_module(f"transformers.models.{folder}.{name.partition('.')[0]}")


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_class_exists_and_lacks_the_interface(name: str) -> None:
    found = getattr(modelling_file(name), name.partition(".")[2])
    assert issubclass(found, torch.nn.Module)
    assert not is_experts_module(found), f"{name} has the interface now: its adapter can go"


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_short(name: str) -> None:
    assert len(inspect.getsourcelines(ADAPTERS[name])[0]) < MOST_LINES
