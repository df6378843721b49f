"""Optional libraries, with a hint where one is missing; and torchvision beside a torch that it was not compiled for.

torchvision comes as a Python part and compiled operators.  Beside another build of torch (such as torchvision 0.28.0 from a
package registry beside torch 2.13.0+cpu) the operators do not load, and the Python part fails at import because it registers
how two of them behave on meta tensors.  `torchvision` declares these two names without an implementation, after which the
import works: transforms and models do not use them; ``nms``, ``roi_align`` and image reading stay absent.  Beside operators
that did load nothing is declared.

Everything that imports torchvision, or a library that does (timm, open_clip), goes through here first.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

NEEDED = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[Any] = []  # a library's declarations live as long as the object


def optional(name: str, extra: str, what: str) -> Any:
    """The module of that name.

    Raises:
        ImportError: it is not installed; the message says what for it is needed and how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != name.partition(".")[0]:
            raise  # it is there, and something that it needs is not
        raise ImportError(
            f'{what} needs {name}. Install it: pip install "unbraid[{extra}]".', name=name.partition(".")[0]
        ) from error


def torchvision(what: str = "This") -> Any:
    """torchvision, whether or not its compiled operators fit this torch.  Raises ImportError as `optional` does."""
    declare_operators()
    return optional("torchvision", "images", what)


def declare_operators() -> list[str]:
    """Declare the operators of torchvision that its Python part needs and that are not there; returns their names.

    The operators are looked for after loading torchvision's own library, so that they are never declared twice.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return []
    for library in sorted(Path(spec.origin).parent.glob("_C.*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:  # compiled for another torch
            continue
    missing = [name for name in NEEDED if not hasattr(torch.ops.torchvision, name)]
    if missing:
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            fragment.define(NEEDED[name])
        _declared.append(fragment)
    return missing
