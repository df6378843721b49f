"""AME: asymmetric multi-embedding, a few shared tables of different widths for any number of tasks.

Paper: "Ads Recommendation in a Collapsed and Entangled World", Pan, Xue, Wang, Yu, Liu, Quan, Qiu, Liu, Xiao, Jiang,
KDD 2024, https://arxiv.org/abs/2403.00793.

Idea: STEM has T + 1 tables, too many for a hundred tasks.  Here a few tables, say of widths 16, 32 and 64, belong to no
task (`unbraid.encoders.table.Views`, kind ``several``).  Each has an expert, or several with other interactions
(`unbraid.model.Model`, ``experts``), all experts give one width D, and each task weighs them row by row::

    e_m      = expert_m(h_m)                               h_m: the hidden vector of expert m's interaction
    z^k      = sum_m softmax(G^k(h_1, .., h_M))_m e_m
    hidden^k = tower^k(z^k)

A small task may lean on a narrow table, which it can fill, and a large one on a wide table.  As the widths differ, the
tables do not become interchangeable.  Nothing is stopped: every task writes every table.

How this differs:

- The paper's body was not read.  The form above is from second-hand accounts.  Ours are: what the gate reads (the experts'
  inputs side by side), the experts (an MLP each, without normalisation unless ``norm`` says so) and all sizes.
- With tables of domains (``model.tables.by``, `unbraid.towers.domains`) the gates are those of domains: every row is mixed by
  its domain's, and tasks differ in their own layers alone.
- Equal widths are allowed: that is `unbraid.towers.multi_embedding` with a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from unbraid.towers.mlp import one_width
from unbraid.towers.multi_embedding import ManyTables, ManyTablesTower

BIBTEX = """
@inproceedings{pan2024ads,
  title     = {Ads Recommendation in a Collapsed and Entangled World},
  author    = {Pan, Junwei and Xue, Wei and Wang, Ximei and Yu, Haibin and Liu, Xun and Quan, Shijie and Qiu, Xueming and
               Liu, Dapeng and Xiao, Lei and Jiang, Jie},
  booktitle = {Proceedings of the 30th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year      = {2024},
  eprint    = {2403.00793},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class AME(ManyTables):
    """An expert per set of tables, and a gate per task over all of them.  Keys as in `ManyTables`."""

    kind: Literal["ame"] = field(default="ame", kw_only=True)
    expert: tuple[int, ...] = (128, 64)
    norm: Literal["batch", "layer", "none"] = "none"

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> ManyTablesTower:
        """The module for these tasks.  Raises ValueError if views belong to tasks."""
        one_width(self.kind, tasks, views, widths)
        return ManyTablesTower(self, tasks, widths, combine="gate")
