"""Is a number of one domain in other units than that of the others?

For a number and a domain, with q the range between its quartiles among training rows (with a spread of 0 the standard deviation,
of values within 10 of the median; after ``transform``)::

    value = |log10(q of the domain / median of q of the other domains)|             1: ten times as wide

One standardiser for all then makes the domain huge, or all others flat.  Prices in two currencies are the classic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Heat
from unbraid.encoders.quantile import Quantile
from unbraid.types import FIRST_VALUE

PAGE = "diagnosis.md#is-a-number-in-other-units"
LEAST, DRAWS = 50, 200  # rows of a domain; bootstrap draws


@dataclass(frozen=True)
class Units:
    """See the module's docstring.  ``usual``, ``severe``: decimal logarithms of a ratio."""

    name: ClassVar[str] = "units"
    title: ClassVar[str] = "Is a number of one domain in other units?"
    page: ClassVar[str] = PAGE
    usual: float = 0.5
    severe: float = 1.0

    def __call__(self, case: Case) -> list[Diagnosis]:
        """A diagnosis per number, of its oddest domain.  Raises NotApplicable without numbers or with one domain."""
        numbers = [f for f in case.schema.features if f.kind == "number"]
        domain = case.column("domain", "train")
        if not numbers or domain is None:
            raise NotApplicable("there is no number, or no domain")
        counts = np.bincount(domain, minlength=len(case.schema.domains))
        codes = [code for code in range(FIRST_VALUE, len(counts)) if counts[code] >= LEAST]
        if len(codes) < 2:
            raise NotApplicable(f"fewer than two domains have {LEAST} training rows in the sample")
        rng = np.random.default_rng([case.seed, 23])
        found = []
        for feature in numbers:
            column = np.asarray(case.encoded.columns[f"feature.{feature.name}"][case.sample("train")], float)
            column = column if column.ndim == 1 else column[:, 0]
            parts = [part[np.isfinite(part)] for part in (column[domain == code] for code in codes)]
            if min(map(len, parts)) < LEAST or min(map(spread, parts)) <= 0:
                continue
            spreads = np.array([spread(part) for part in parts])
            drawn = np.array([[spread(rng.choice(part, len(part))) for part in parts] for _ in range(DRAWS)])
            ratio, draws = against_others(spreads), against_others(drawn)
            at = int(np.argmax(np.abs(ratio)))
            odd = np.abs(draws[:, at][np.isfinite(draws[:, at])])
            low, high = np.quantile(odd, (0.025, 0.975)) if len(odd) > 1 else (0.0, np.inf)
            found.append((abs(ratio[at]), float(low), float(high), feature.name, codes[at], float(ratio[at]), ratio))
        if not found:
            raise NotApplicable("no number has a spread in every domain")
        found.sort(key=lambda each: -each[0])
        names = tuple(case.schema.domains[code] for code in codes)
        shown = Heat(
            "Width of a number against the other domains", "domain", "number", "log10 of the ratio of widths",
            tuple(each[3] for each in found[:20]), names, tuple(tuple(map(float, each[6])) for each in found[:20]),
            scale="diverging", centre=0.0,
        )  # fmt: skip
        return [self._of(case, *each[:6], shown) for each in found[:5]]

    def _of(
        self, case: Case, value: float, low: float, high: float, name: str, code: int, ratio: float, shown: Heat
    ) -> Diagnosis:  # fmt: skip
        run, domain = case.run, case.schema.domains[code]
        target = next(iter(case.targets))
        measure = Measure.of(case.schema, target.name)
        features = tuple(
            replace(f, column=rescaled(f.source, run.data.domain, domain, 10**ratio)) if f.name == name else f
            for f in run.data.features
        )
        how = f"{10 ** abs(ratio):,.3g} times as {'wide' if ratio > 0 else 'narrow'}"
        return Diagnosis(
            "units", f"{name} in {domain}", float(value), self.usual, self.severe,
            f"`{name}` is {how} in domain `{domain}` as in the others", "decimal logarithm of a ratio", low, high,
            remedies=(
                Remedy(
                    f"rescaled_{name}", f"Divide `{name}` by {10**ratio:,.3g} in domain `{domain}`: one unit for all.",
                    "data.features", replace(run, name=f"{run.name}_rescaled_{name}", data=replace(run.data, features=features)),
                    measure=measure,
                ),
                Remedy(
                    "quantile", "Ranks instead of values: bins of equal frequency keep all domains apart.", "model.numbers",
                    replace(run, name=f"{run.name}_quantile", model=replace(run.model, numbers=Quantile())), measure=measure,
                    page="methods/quantile.md",
                ),
            ),
            page=PAGE, subject=name, evidence={"plots": (shown,)},
        )  # fmt: skip


def spread(values: np.ndarray) -> float:
    """Range between the quartiles; where that is 0, the standard deviation."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low) or float(values.std())


def against_others(spreads: np.ndarray) -> np.ndarray:
    """(..., D) log10 of each spread by the median of the others."""
    out = np.empty_like(spreads)
    for at in range(spreads.shape[-1]):
        out[..., at] = np.log10(spreads[..., at]) - np.log10(np.median(np.delete(spreads, at, -1), -1))
    return out


def rescaled(source: str, column: str, domain: str, ratio: float) -> str:
    """SQL for a number that is divided by ``ratio`` where the domain column has this value."""
    quoted = domain.replace("'", "''")
    return f"CASE WHEN CAST({column} AS VARCHAR) = '{quoted}' THEN ({source}) / {ratio:.6g} ELSE {source} END"
