"""A head whose classes are given vectors: of their names, of their pictures, of anything that places classes among each other.

With t_c the vector of class c scaled to length 1, f what the model makes of a row scaled to length 1, and s the logit scale::

    f = normalize(P h)        logits = s f T^T          h (B, H) below the head, P (d, H), T (K, d)

T and s are constants: no optimiser sees them, and what trains is below.  A class is a row of T, so a class that training
never saw is added by its vector (`unbraid.bundle.with_classes`), and nothing else changes.  This is the zero-shot classifier
of image and text models such as CLIP (Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", ICML 2021, https://arxiv.org/abs/2103.00020), with any vectors.

P is there where widths differ, and then drawn like other layers; where they are equal it can be asked for and starts as the
identity: a model without layers below then starts as the zero-shot classifier of its given vectors.  Mind that the last layer
of most towers is a ReLU: without P their f has no negative coordinate, and half of the space of classes is out of reach.

What stands in `unbraid.config.ModelChoice.classes` has ``of(names)``, which gives `Classes` for the classes of a
task in the order of their codes.  `ClassFile` reads them from a file; `name_vectors` makes them of names with a text
backbone, and `write_vectors` writes the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid.layers import mlp, mlp_width
from unbraid.types import FORBID, Task

BIBTEX = """@inproceedings{radford2021clip,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and Agarwal, Sandhini
               and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and Krueger, Gretchen
               and Sutskever, Ilya},
  booktitle = {Proceedings of the 38th International Conference on Machine Learning},
  year      = {2021},
}"""

Projection = Literal["auto", "always", "never"]


@dataclass(frozen=True, eq=False)
class Classes:
    """Vectors of a task's classes.

    Args:
        vectors: (K, d) in the order of the classes' codes; kept at length 1, float32.
        scale: s; 1 over the temperature, 100 in released CLIP models.
        projection: ``auto``: P where the widths differ; ``always``; ``never``: the widths must be equal.

    Raises:
        ValueError: the scale is not positive and finite; vectors are no matrix, not finite, or zeros.
    """

    vectors: Tensor
    scale: float = 100.0
    projection: Projection = "auto"

    def __post_init__(self) -> None:
        require_scale(self.scale)
        object.__setattr__(self, "vectors", unit(self.vectors).float())


@dataclass(frozen=True)
class ClassFile:
    """Vectors of classes from a file, which may hold more classes than the task has: NumPy's ``.npz`` with ``names`` (K,) and
    ``vectors`` (K, d), or Parquet with columns ``name`` and ``vector``.

    Args:
        file: its path, relative to the run file.
        scale, projection: as in `Classes`.

    Raises:
        ValueError: the scale is not positive and finite.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["file"] = field(default="file", kw_only=True)
    file: str
    scale: float = 100.0
    projection: Projection = "auto"

    def __post_init__(self) -> None:
        require_scale(self.scale)

    def of(self, names: Sequence[str]) -> Classes:
        """The vectors of these classes.

        Raises:
            ValueError: the file is not there or not as described, names a class twice, or lacks one.
        """
        found, vectors = read_vectors(self.file)
        place = {name: i for i, name in enumerate(found)}
        if missing := [name for name in names if name not in place]:
            raise ValueError(
                f"{self.file} has no vector of class {missing[:5]}{' and others' if len(missing) > 5 else ''}. It names "
                f"{len(place)} classes, such as {found[:5]}: class names are compared letter by letter."
            )
        return Classes(vectors[[place[name] for name in names]], self.scale, self.projection)


def read_vectors(path: str | Path) -> tuple[list[str], Tensor]:
    """Names (K,) and vectors (K, d), float32, of a file as `ClassFile` describes it.  Raises ValueError."""
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as found:
                names, vectors = [str(name) for name in found["names"]], np.asarray(found["vectors"], np.float32)
        else:
            frame = pl.read_parquet(path, columns=["name", "vector"])
            names = frame["name"].cast(pl.String).to_list()
            vectors = np.asarray(frame["vector"].to_list(), np.float32)
    except FileNotFoundError:
        raise ValueError(f"There is no file {path} with vectors of classes.") from None
    except (KeyError, ValueError, OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(
            f"{path} should hold vectors of classes, all of one width: .npz with `names` and `vectors`, or Parquet with columns "
            f"`name` and `vector`. It cannot be read so: {error}"
        ) from error
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} should name each class once. Found twice: {twice[:5]}.")
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise ValueError(f"{path} should hold one vector per name. Found {len(names)} names, vectors {vectors.shape}.")
    return names, torch.from_numpy(vectors)


def write_vectors(path: str | Path, names: Sequence[str], vectors: Tensor) -> None:
    """Write the ``.npz`` that `ClassFile` reads: names (K,), vectors (K, d)."""
    np.savez(Path(path), names=np.asarray(list(names), str), vectors=vectors.detach().float().cpu().numpy())


@torch.no_grad()
def name_vectors(names: Sequence[str], texts: Any, templates: Sequence[str] = ("a photo of a {}.",)) -> Tensor:
    """(K, d) vectors of length 1 of class names, by a text backbone.

    Args:
        names: as they are written; underscores become spaces.
        texts: a member of ``model.texts``, whose weights are loaded, or a built `unbraid.slots.Backbone` of texts.
        templates: sentences with ``{}`` where the name goes; of several, the vectors of length 1 are averaged and scaled again.

    Raises:
        ValueError: there is no name or template, or a template has not one ``{}``; and what the backbone raises.
    """
    if not names or not templates or any(text.count("{}") != 1 for text in templates):
        raise ValueError(
            f"There should be names, and templates with {{}} once. Found {len(names)} names, {list(templates)}."
        )
    backbone: Any = texts if isinstance(texts, nn.Module) else texts.build().eval()
    total: Tensor | None = None
    for template in templates:
        sentences = [template.replace("{}", name.replace("_", " ")) for name in names]
        found = torch.cat([backbone(backbone.tokens(sentences[at : at + 64])) for at in range(0, len(sentences), 64)])
        total = unit(found) if total is None else total + unit(found)
    return unit(cast(Tensor, total))


def unit(vectors: Tensor) -> Tensor:
    """(K, d) at length 1.  Raises ValueError if they are no matrix, not finite, or zeros."""
    if vectors.ndim != 2 or not vectors.numel():
        raise ValueError(f"Vectors of classes should be (classes, width). Found shape {tuple(vectors.shape)}.")
    lengths = vectors.norm(dim=1, keepdim=True)
    if not bool((torch.isfinite(lengths) & (lengths > 0)).all()):
        raise ValueError("Vectors of classes should be finite and not zeros. Found others.")
    return vectors / lengths


def require_scale(scale: float) -> None:
    """Raise ValueError unless a logit scale is positive and finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"Parameter `scale` should be positive and finite. Found {scale}.")


def require_tasks(tasks: Sequence[Task], classes: Mapping[str, Any]) -> None:
    """Raise ValueError unless those that have vectors of classes are multiclass tasks."""
    able = [task.name for task in tasks if task.kind == "multiclass"]
    if wrong := sorted(set(classes) - set(able)):
        raise ValueError(f"`model.classes` should name multiclass tasks, among {able}. Found {wrong}.")


class ClassHead(nn.Module):
    """The head of one task with `Classes`.

    Args:
        task: its name; width: H of what the tower gives; hidden, dropout: of an MLP below P, as in `unbraid.heads.Heads`.

    Attributes:
        width: of what it reads with its last layer.
        gives: names of its extras, the vectors (K, d) and the scale (): what a loss with margins needs; constants: those of
            them that are not one per row, which are all.

    Raises:
        ValueError: there is to be no projection, and the widths differ.
    """

    def __init__(
        self, task: str, classes: Classes, width: int, hidden: Sequence[int] = (), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.gives = self.constants = (f"heads.vectors.{task}", f"heads.scale.{task}")
        self.tower, self.width = mlp(width, hidden, dropout), mlp_width(width, hidden)
        self.vectors: Tensor
        self.scale: Tensor
        self.register_buffer("vectors", classes.vectors.clone())
        self.register_buffer("scale", torch.tensor(float(classes.scale)), persistent=False)
        d = classes.vectors.shape[1]
        if classes.projection == "never" and self.width != d:
            raise ValueError(
                f"Task `{task}` has vectors of classes of width {d}, and what its head reads has width {self.width}. Let "
                f"`projection` of `model.classes.{task}` be `auto`, or give the tower that width."
            )
        start = nn.init.xavier_normal_(torch.empty(d, self.width)) if self.width != d else torch.eye(d)
        projects = classes.projection == "always" or self.width != d
        self.projection = nn.Parameter(start) if projects else None

    def forward(self, hidden: Tensor, domain: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H) -> (B, K) logits, and the (B, h) vectors before the projection.  Domains and labels are not read."""
        below = self.tower(hidden)
        found = below if self.projection is None else F.linear(below, self.projection)
        return self.scale * F.linear(F.normalize(found, dim=1), self.vectors), below

    def finish(self, found: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K), and the extras."""
        return found, dict(zip(self.gives, (self.vectors, self.scale), strict=True))

    def add(self, vectors: Tensor) -> None:
        """Further classes, by their vectors (n, d).  Raises ValueError as `unit`, or for another width."""
        if vectors.ndim != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"Vectors should be (n, {self.vectors.shape[1]}). Found shape {tuple(vectors.shape)}.")
        self.vectors = torch.cat([self.vectors, unit(vectors).to(self.vectors)])
