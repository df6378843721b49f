"""Individual: one whole model per domain, or per task, and nothing shared.

The baseline that says what sharing brought and what it cost.  By task it is called single-task learning (STL) in

Paper: "ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning", Jiang et al., NeurIPS 2023,
https://arxiv.org/abs/2301.12618,

and by domain it is the separate training of studies of several domains.  All models begin with the same weights.

How this differs: nothing to differ from; what happens to domains without rows, and to rows of domains that training did not
know, is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from unbraid.schedules.copies import By, Copies, Fits, report
from unbraid.slots import Session
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{jiang2023forkmerge,
  title     = {ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning},
  author    = {Jiang, Junguang and Chen, Baixu and Pan, Junwei and Wang, Ximei and Liu, Dapeng and Jiang, Jie and
               Long, Mingsheng},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  volume    = {36},
  year      = {2023},
  eprint    = {2301.12618},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class Individual:
    """One model per domain or task.

    Args:
        by: what a model belongs to.
        length: steps of each model: ``each`` has the run's, so that K models cost K runs; ``divided``: the run's steps are
            divided, among domains by their rows (each row is then read as often as by one model for all), among tasks
            equally.
        unknown: who predicts rows of a domain without a model: the ``mean`` of all domains' logits, or nobody (``error``).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["individual"] = field(default="individual", kw_only=True)
    by: By = "domain"
    length: Literal["each", "divided"] = "each"
    unknown: Literal["mean", "error"] = "mean"

    @property
    def budget(self) -> tuple[str, ...]:
        """What makes its number of steps differ from that of another run with the same ``training``."""
        return ("length",) if self.length == "each" else ()

    def module(self, model: nn.Module, weights: Collection[str]) -> nn.Module:
        """What this schedule returns, made of the run's model: as many copies as the weights of these names are of."""
        return Copies.of(model, self.by, weights, self.unknown)

    def __call__(self, session: Session, model: nn.Module, steps: int) -> nn.Module:
        """Train all models and return them as one.

        Raises:
            ValueError: by domain with heads per domain, or no domain has a label; by task with losses by domain.
        """
        fits = Fits(session, self.by, model)
        each = fits.steps(steps, self.length == "divided")
        whole = Copies(session.schema, self.by, fits.train(model, each, 4), self.unknown)
        session.keep({"kind": self.kind, **fits.record(each, whole)})
        return whole

    def report(self, record: Mapping[str, Any]) -> str:
        """The record as Markdown."""
        return report("Individual", record, {"value": record["validation"]})
