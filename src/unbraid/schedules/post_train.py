"""Post-train: one training for all, then everything is fine-tuned for each domain, or each task, from there.

Paper: "ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning", Jiang et al., NeurIPS 2023,
https://arxiv.org/abs/2301.12618, names it among its baselines: all tasks with equal weights, then the whole model on each task
apart, from that checkpoint.

Idea: what is common is learned from all rows, and then nobody disturbs anybody.  The price is one whole model per domain or
task.  D-Train (`unbraid.schedules.d_train`) fine-tunes heads alone instead, and has one trunk.

How this differs: step sizes, batch sizes and lengths of the two parts of the official settings are for images and are not
taken over; both parts have the run's update, each with a new state.  The first part has the run's weights, which are equal unless
tasks have others.  By domain, what happens to rows of domains without a model is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from unbraid.schedules.copies import ROOT, By, Copies, Fits, Unknown, report
from unbraid.slots import Session
from unbraid.types import FORBID, State

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
class PostTrain:
    """Joint training, then a copy of the model is fine-tuned per domain or task.

    Args:
        by: what a copy belongs to.
        share: of the run's steps, the joint part.
        length: steps of each copy: ``divided``: the steps that are left are divided, among domains by their rows, among tasks
            equally; ``each`` has all of them, so that the run has more steps than others of its length.
        unknown: who predicts rows of a domain without a copy: the ``root``, which is the joint model and is kept for it, the
            ``mean`` of all copies' logits, or nobody (``error``).

    Raises:
        ValueError: ``share`` is not within 0 and 1.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["post_train"] = field(default="post_train", kw_only=True)
    by: By = "domain"
    share: float = 0.8
    length: Literal["divided", "each"] = "divided"
    unknown: Unknown = "root"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"Parameter `share` should be within 0 and 1. Found {self.share}.")

    @property
    def budget(self) -> tuple[str, ...]:
        """What makes its number of steps differ from that of another run with the same ``training``."""
        return ("length",) if self.length == "each" and self.share < 1 else ()

    def module(self, model: nn.Module, weights: Collection[str]) -> nn.Module:
        """What this schedule returns, made of the run's model: as many copies as the weights of these names are of."""
        return Copies.of(model, self.by, weights, self._unknown)

    @property
    def _unknown(self) -> Unknown:
        return "mean" if self.by == "task" else self.unknown  # every task has its copy

    def __call__(self, session: Session, model: nn.Module, steps: int) -> nn.Module:
        """Train, fine-tune all copies and return them as one.

        Raises:
            ValueError: by domain with heads per domain, or no domain has a label; by task with losses by domain.
        """
        fits = Fits(session, self.by, model)
        joint = round(self.share * steps)
        state = session.restore("post_train")
        if state is not None:
            model.load_state_dict(state["model"])
            before = state["validation"]
        else:
            if joint:
                session.fit(model, joint)
            before = fits.values(model)
            kept: State = {"model": model.state_dict(), "validation": before}
            session.checkpoint("post_train", kept, done=True)
        each = fits.steps(steps - joint, self.length == "divided")
        models = fits.train(model, each, 5)
        whole = Copies(
            session.schema, self.by, models | ({ROOT: model} if self._unknown == ROOT else {}), self._unknown
        )
        session.keep({"kind": self.kind, "joint": joint, "before": before, **fits.record(each, whole)})
        return whole

    def report(self, record: Mapping[str, Any]) -> str:
        """The record as Markdown."""
        columns = {f"joint, {record['joint']:,} steps": record["before"], "fine-tuned": record["validation"]}
        return report("Post-train", record, columns)
