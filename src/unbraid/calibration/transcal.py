"""TransCal: probabilities that hold on a target whose labels are not known yet.

Paper: Wang, Long, Wang and Jordan, "Transferable calibration with lower bias and variance in domain adaptation", NeurIPS 2020
(https://arxiv.org/abs/2007.08259).  Idea: importance weights w = q / p turn held-out source rows into an estimate of the
target's accuracy; the temperature is chosen so that the target's mean confidence equals it.  Powers of the weights
lower the bias of weights that are wrong, control variates the variance of weights that vary.

With e_i = [argmax z_i != y_i] on held-out source rows, v = w^lambda, c the mean confidence there after temperature scaling:

    u    = v e + eta1 (v - 1)          eta1 = -Cov(v e, v) / Var(v)          control 1: the weight, whose mean is 1
    risk = mean(u + eta2 (r - c))      eta2 = -Cov(u, r) / Var(r)            control 2: r = 1 - e, whose mean is c
    mean_j max softmax(z_j / T) = 1 - risk                                   over target rows j: solved for T

A *binary* task is our extension, for base rates: the label stands in the place of the error and the mean prediction in that of
the mean confidence, and an intercept b is solved for,

    mean_j sigmoid(a z_j + b) = mean(v y + eta1 (v - 1)),

with the slope a of the source's likelihood fit (``slope = false``: 1).  Control 2 would be the label, with the source's mean
calibrated prediction as its known mean; these are equal after a fit with an intercept, so it is left out.  lambda is then 1 by
default: a power below 1 shrinks the estimate towards the source's base rate, which is what has to change.

How this differs from the official code:

- T and lambda are two unknowns of one equation there, lambda acting on the right side alone: any lambda has a T that solves
  it, and where its optimiser stops depends on where it starts.  Here lambda is given (``solver = "nested"``), T is the root,
  and the range of T over other lambdas is reported.  ``bounded`` (T in [1, 50], lambda in [.01, 1]) and ``official``
  (T in [1, inf), lambda in [0, 1]) are its joint searches, for parity.
- T may be below 1, so that an under-confident model is mended, too; but not where the weights warn of a shift of the support
  (`unbraid.calibration.density.Support`): there the accuracy is overestimated, and T < 1 would make things worse.
- A control of no variance (lambda 0, no error among the rows) is left out instead of dividing by 0.
- The estimated accuracy is clipped to [1/K, 1], the base rate to [1/2n, 1 - 1/2n]; no root, and weights that carry no
  information, are warnings.
- ``bias_term`` without ``variance_term`` is refused: v has no mean of 1, and only control 1 accounts for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import scipy

from unbraid.calibration.density import Support
from unbraid.calibration.labelled import Labelled, importance, kind_of
from unbraid.calibration.maps import Affine, Calibration, confidence
from unbraid.calibration.scaling import fit_temperature, logistic_fit
from unbraid.types import FORBID, Scores, Task

BIBTEX = """@inproceedings{wang2020transferable,
  title = {Transferable Calibration with Lower Bias and Variance in Domain Adaptation},
  author = {Wang, Ximei and Long, Mingsheng and Wang, Jianmin and Jordan, Michael I.},
  booktitle = {Advances in Neural Information Processing Systems 33},
  year = {2020}
}
"""

Array = np.ndarray
Risk = Callable[[float], float]
TEMPERATURES = (0.05, 50.0)  # of the nested solver
POWERS = (0.1, 0.25, 0.5, 0.75, 1.0)  # over which the solution's range is reported
BOUNDS = {"bounded": ((1.0, 50.0), (0.01, 1.0)), "official": ((1.0, None), (0.0, 1.0))}
START = (2.0, 0.5)  # of the joint searches, as in the official code


class Estimate(NamedTuple):
    """A weighted mean and what each control variate made of it: ``plain``, ``first`` (after control 1), ``value``."""

    plain: float
    eta1: float
    first: float
    eta2: float
    value: float


def controlled_mean(
    values: Array, weights: Array, power: float = 1.0, right: Array | None = None, mean_right: float = 0.0
) -> Estimate:
    """The mean of ``values`` over the target, from source rows.

    Args:
        values: (n,) errors or labels; weights: (n,) w = q / p; power: lambda, in [0, 1].
        right: (n,) the second control, of known mean ``mean_right`` over the source; None: there is none.
    """
    v = weights**power
    z = v * values
    eta1 = _coefficient(z, v)
    u = z + eta1 * (v - 1)
    eta2 = 0.0 if right is None else _coefficient(u, right)
    shift = 0.0 if right is None else eta2 * (right.mean() - mean_right)
    return Estimate(float(z.mean()), eta1, float(u.mean()), eta2, float(u.mean() + shift))


def _coefficient(z: Array, control: Array) -> float:
    """``-Cov(z, control) / Var(control)``; 0 for a control that is constant up to rounding."""
    centred = control - control.mean()
    spread = float(centred @ centred)
    return (
        0.0 if spread <= 1e-24 * len(control) * max(1.0, float(control.mean()) ** 2) else -float(centred @ z) / spread
    )


@dataclass(frozen=True)
class TransCal:
    """A temperature (of a binary task: an intercept) for a target without labels.

    Args:
        solver: ``nested`` solves for T at a given lambda; ``bounded`` and ``official`` search for both (module docstring).
        power: lambda of ``nested``; None: 0.5, of a binary task 1.
        bias_term: without it lambda is 1; variance_term: without it there are no control variates.
        slope: of a binary task, take the slope of the source's fit; without it 1.
        balance, seed: of the density ratio, see `unbraid.calibration.density.density_ratio`.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["transcal"] = field(default="transcal", kw_only=True)
    keeps_argmax: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True
    solver: Literal["nested", "bounded", "official"] = "nested"
    power: float | None = None
    bias_term: bool = True
    variance_term: bool = True
    slope: bool = True
    balance: Literal["weight", "resample"] = "weight"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in ("nested", *BOUNDS):
            raise ValueError(f"Parameter `solver` should be nested, bounded or official. Found {self.solver}.")
        if self.power is not None and not 0 <= self.power <= 1:
            raise ValueError(f"Parameter `power` should lie in [0, 1]. Found {self.power}.")
        if self.power is not None and (self.solver != "nested" or not self.bias_term):
            raise ValueError("`power` is for solver `nested` with `bias_term`: otherwise it is searched for, or 1.")
        if self.bias_term and not self.variance_term and self.power != 1:
            raise ValueError(
                "`bias_term` needs `variance_term`: a power of the weights has no mean of 1, and only the control variate "
                "accounts for that. Set both, or neither."
            )

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        """See `unbraid.slots.Calibrator`."""
        kind_of(task, ("binary", "multiclass"))
        rows, w, support = importance(task, held_out, target, train, self.balance, self.seed)
        assert target is not None
        logits = np.asarray(target.logits[task.name], np.float64)
        if task.kind == "multiclass":
            return self._multiclass(rows, w, support, logits)
        if self.solver != "nested":
            raise ValueError(f"Solver `{self.solver}` searches a temperature; a binary task needs `nested`.")
        return self._binary(rows, w, support, logits)

    def lam(self, default: float) -> float:
        """lambda of the nested solver."""
        if not self.bias_term:
            return 1.0
        return default if self.power is None else self.power

    # ------------------------------------------------------------------------------------------------------ multiclass
    def _multiclass(self, rows: Labelled, w: Array, support: Support, target: Array) -> Calibration:
        risk = self.risk(rows, w)
        classes, least = target.shape[1], 1.0 if support.warnings else TEMPERATURES[0]
        if self.solver == "nested":
            power = self.lam(0.5)
            temperature, notes = match_confidence(target, 1 - risk(power), classes, least)
        else:
            temperature, power = _joint(target, risk, self.solver, self.bias_term)
            notes = ()
        powers = POWERS if self.bias_term else (1.0,)
        grid = [match_confidence(target, 1 - risk(each), classes, least)[0] for each in powers]
        numbers = {
            "temperature": temperature, "lambda": power, "estimated accuracy": float(np.clip(1 - risk(power), 1 / classes, 1)),
            "least temperature": min(grid), "largest temperature": max(grid),
        }  # fmt: skip
        return Calibration(Affine(1 / temperature), numbers | _about(support), (*notes, *support.warnings))

    def risk(self, rows: Labelled, w: Array) -> Risk:
        """lambda -> estimated error on the target."""
        right = (np.argmax(rows.logits, 1) == rows.labels) + 0.0
        if not self.variance_term:
            return lambda power: float((w**power * (1 - right)).mean())
        calibrated = float(confidence(rows.logits / fit_temperature(rows)[0]).mean())
        return lambda power: controlled_mean(1 - right, w, power, right, calibrated).value

    # ---------------------------------------------------------------------------------------------------------- binary
    def _binary(self, rows: Labelled, w: Array, support: Support, target: Array) -> Calibration:
        slope = logistic_fit(rows)[0] if self.slope else 1.0

        def rate(power: float) -> float:
            estimate = controlled_mean(rows.labels, w, power)
            return estimate.first if self.variance_term else estimate.plain

        power, n = self.lam(1.0), len(rows.labels)
        found = rate(power)
        wanted = float(np.clip(found, 0.5 / n, 1 - 0.5 / n))
        clipped = f"the estimated base rate is {found:.3g}, which is none: {wanted:.3g} is taken"
        notes = () if wanted == found else (clipped,)
        intercept = match_mean(slope * target, wanted)
        rates = [rate(each) for each in (POWERS if self.bias_term and self.variance_term else (1.0,))]
        numbers = {
            "slope": slope, "intercept": intercept, "lambda": power,
            "estimated rate": wanted, "source rate": float(rows.labels.mean()),
            "least rate": min(rates), "largest rate": max(rates),
        }  # fmt: skip
        return Calibration(Affine(slope, intercept), numbers | _about(support), (*notes, *support.warnings))


def _about(support: Support) -> dict[str, float]:
    return {"mean weight": support.mean, "effective rows": support.effective, "largest weight": support.largest}


def match_confidence(
    logits: Array, accuracy: float, classes: int, least: float = TEMPERATURES[0]
) -> tuple[float, tuple[str, ...]]:
    """The temperature from ``least`` to 50 at which the mean confidence is ``accuracy`` (clipped to [1/K, 1]), and warnings.

    The mean confidence falls strictly with T, from near 1 to 1/K, unless logits tie.
    """
    wanted = float(np.clip(accuracy, 1 / classes, 1))
    notes: tuple[str, ...] = ()
    if wanted != accuracy:
        notes = (
            f"the estimated accuracy is {accuracy:.3g}, outside what {classes} classes allow: {wanted:.3g} is taken",
        )
    low, high = least, TEMPERATURES[1]
    if confidence(logits / high).mean() >= wanted:
        return high, (*notes, f"no temperature makes the mean confidence as low as {wanted:.3g}: {high:g} is taken")
    if confidence(logits / low).mean() <= wanted:
        return low, (
            *notes,
            f"no temperature that makes the mean confidence as high as {wanted:.3g} is allowed: {low:g} is taken",
        )
    inverse = scipy.optimize.brentq(
        lambda a: confidence(a * logits).mean() - wanted, 1 / high, 1 / low, xtol=1e-14, rtol=1e-13
    )
    return 1 / inverse, notes


def match_mean(logits: Array, rate: float) -> float:
    """The intercept b at which the mean of ``sigmoid(logits + b)`` is ``rate``, in (0, 1)."""
    span = float(np.abs(logits).max()) + 50

    def missed(b: float) -> float:
        return scipy.special.expit(logits + b).mean() - rate

    return float(scipy.optimize.brentq(missed, -span, span, xtol=1e-13, rtol=1e-13))


def _joint(target: Array, risk: Risk, solver: str, bias_term: bool) -> tuple[float, float]:
    """T and lambda as the official code finds them: SLSQP on ``|mean confidence - (1 - risk)|``."""

    def objective(x: Array) -> float:
        power = float(x[1]) if bias_term else 1.0
        return abs(float(confidence(target / x[0]).mean()) - (1 - risk(power)))

    found = scipy.optimize.minimize(objective, START, method="SLSQP", bounds=BOUNDS[solver])
    return float(found.x[0]), float(found.x[1]) if bias_term else 1.0
