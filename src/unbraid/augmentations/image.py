"""Views of pictures: a random crop and flip as the weak one, RandAugment on top as the strong one.

The weak and the strong view of FixMatch ("FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence",
Sohn et al., NeurIPS 2020, https://arxiv.org/abs/2001.07685) and of what followed it.  A view reads the picture again and is a
function of (seed, row), so that no order of threads, and no interruption, changes it (`unbraid.data.images` says how pictures
are changed).

How this differs: RandAugment has a fixed magnitude (9 of 30, two changes) and no square is cut out; FixMatch draws the
magnitude and cuts one out.  Whether pictures may be mirrored is up to the backbone's transform.  Features that are no
pictures stay as they are. A frozen backbone then runs on every view of every batch: no vector is used twice, so none is
remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from unbraid.types import FORBID, Batch


@dataclass(frozen=True)
class Image:
    """Views of pictures (strong ones with the extra ``images``).

    Args:
        of: which rows get a strong view beside the weak one: those without a label in the batch, or all.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["image"] = field(default="image", kw_only=True)
    of: Literal["unlabelled", "all"] = "unlabelled"

    @property
    def reads_pictures(self) -> bool:
        """Vectors of pictures cannot be remembered."""
        return True

    def bind(self, data: Any) -> Callable[[Batch, bool, int], Batch]:
        """See `unbraid.slots.Augmentation`.  Raises ValueError when the data have no pictures."""
        if not data.transforms:
            raise ValueError(
                "`augment` of kind `image` changes pictures, and the data have none: features of kind `image`."
            )

        def view(batch: Batch, strong: bool, seed: int) -> Batch:
            features, rows = dict(batch.features), batch.row.numpy()
            for name, transform in data.transforms.items():
                seen = replace(transform, augment="strong" if strong else "weak")
                features[name] = data.pictures(rows, seen, seed, feature=name)
            return replace(batch, features=features)

        return view
