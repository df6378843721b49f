"""Aggregators that TorchJD computes, each a small dataclass: `PCGrad` and its kin.

Library: Valérian Rey, Pierre Quinton: *TorchJD*, https://torchjd.org, with *Jacobian Descent for Multi-Objective Optimization*,
2024, https://arxiv.org/abs/2406.16232.  Each class names the paper of its method.  The extra ``mtl`` installs it.

How this differs.  TorchJD's weightings see the Gramian over its mean diagonal (`unbraid.optim.aggregated.levelled`): they compare
it with absolute tolerances, and norms of gradients in recommenders are often below them.  UPGrad and DualProj project by
SciPy's non-negative least squares instead of the package quadprog.  What draws (PCGrad's order, GradDrop's signs, random weights)
draws from a generator that is a function of (seed, step).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from unbraid.optim import imtl_l, rlw
from unbraid.optim.aggregated import Rule, View, levelled
from unbraid.optim.weighted import Setting
from unbraid.types import FORBID

BIBTEX = """
@article{quinton2024jacobian,
  title   = {Jacobian Descent for Multi-Objective Optimization},
  author  = {Quinton, Pierre and Rey, Val{\\'e}rian},
  journal = {arXiv preprint arXiv:2406.16232},
  year    = {2024},
}
"""


def _cited(entry: str) -> str:
    """A method's entry after the library's."""
    return BIBTEX + textwrap.dedent(entry)


def library(kind: str) -> Any:
    """``torchjd.aggregation``.  Raises ImportError that says what to install."""
    try:
        import torchjd.aggregation as found
    except ImportError as error:
        raise ImportError(f'Aggregator `{kind}` needs TorchJD: pip install "unbraid[mtl]"') from error
    return found


@dataclass
class FromGramian(Rule):
    """A TorchJD weighting of the levelled Gramian.

    Args:
        weighting: the Gramian (K, K) becomes weights (K,).
        power: weights of a Gramian s times as large are s ** power times as large.
        live: leave gradients of 0 out, for a weighting that has no answer for them; their weight is 0.
    """

    weighting: Callable[[Tensor], Tensor]
    power: float = 0.0
    live: bool = False

    def weights(self, view: View) -> Tensor:
        """(K,) float64; 1 where there is one gradient."""
        if len(view.names) == 1:
            return torch.ones(1, dtype=torch.float64)
        gramian, scale = levelled(view.gramian)
        chosen = gramian.diagonal() > 0 if self.live else torch.ones(len(gramian), dtype=torch.bool)
        found = torch.zeros(len(gramian), dtype=torch.float64)
        if chosen.any():
            with seeded(view):
                found[chosen] = self.weighting(gramian[chosen][:, chosen]).double() * scale**self.power
        return found


@dataclass
class FromJacobian(Rule):
    """A TorchJD aggregator of the Jacobian itself."""

    aggregator: Callable[[Tensor], Tensor]

    def vector(self, view: View) -> Tensor:
        """(n,) the combined gradient."""
        jacobian = view.jacobian()
        with seeded(view, jacobian.device):
            return jacobian[0] if len(jacobian) == 1 else self.aggregator(jacobian)


class seeded:
    """Torch's random numbers are those of a step's seed inside, and as before afterwards."""

    def __init__(self, view: View, device: torch.device | None = None) -> None:
        cuda = [device] if device is not None and device.type == "cuda" else []
        self.fork = torch.random.fork_rng(devices=cuda)
        self.seed = int(np.random.SeedSequence(view.seed).generate_state(1)[0])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


# --------------------------------------------------------------------------------------------------------- the members
@dataclass(frozen=True)
class PCGrad:
    """Each gradient loses what conflicts with the others, one after the other in random order; the sum of what is left.

    Yu, Kumar, Gupta, Levine, Hausman, Finn: *Gradient Surgery for Multi-Task Learning*.  NeurIPS 2020,
    https://arxiv.org/abs/2001.06782.  For each i, h = g_i; for j != i: if <h, g_j> < 0 then h <- h - <h, g_j> / |g_j|^2 g_j.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["pcgrad"] = field(default="pcgrad", kw_only=True)
    BIBTEX: ClassVar[str] = _cited("""
        @inproceedings{yu2020pcgrad,
          title     = {Gradient Surgery for Multi-Task Learning},
          author    = {Yu, Tianhe and Kumar, Saurabh and Gupta, Abhishek and
                       Levine, Sergey and Hausman, Karol and Finn, Chelsea},
          booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
          year      = {2020},
          note      = {arXiv:2001.06782},
        }
    """)

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        return FromGramian(library(self.kind).PCGradWeighting())


@dataclass(frozen=True)
class IMTLG:
    """The combination whose projections on all gradients' directions are equal; weights sum to 1 and may be negative.

    Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: *Towards Impartial Multi-task Learning*.  ICLR 2021,
    https://openreview.net/forum?id=IMPnRXEWpvr.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["imtl_g"] = field(default="imtl_g", kw_only=True)
    BIBTEX: ClassVar[str] = BIBTEX + imtl_l.BIBTEX

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        return FromGramian(library(self.kind).IMTLGWeighting())


@dataclass(frozen=True)
class UPGrad:
    """Each gradient is projected to where it conflicts with no other; the mean of the projections.

    Quinton, Rey: *Jacobian Descent for Multi-Objective Optimization*.  2024, https://arxiv.org/abs/2406.16232.

    Args:
        ridge: added to the diagonal of the Gramian, in shares of its trace.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["upgrad"] = field(default="upgrad", kw_only=True)
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        _require_ridge(self.ridge)

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        return FromGramian(library(self.kind).UPGradWeighting(projector=projector(self.ridge)))


@dataclass(frozen=True)
class DualProj:
    """The mean gradient, projected to where it conflicts with none.

    Lopez-Paz, Ranzato: *Gradient Episodic Memory for Continual Learning*.  NeurIPS 2017, https://arxiv.org/abs/1706.08840.

    Args:
        ridge: as in `UPGrad`.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["dualproj"] = field(default="dualproj", kw_only=True)
    BIBTEX: ClassVar[str] = _cited("""
        @inproceedings{lopezpaz2017gem,
          title     = {Gradient Episodic Memory for Continual Learning},
          author    = {Lopez-Paz, David and Ranzato, Marc'Aurelio},
          booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
          year      = {2017},
          note      = {arXiv:1706.08840},
        }
    """)
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        _require_ridge(self.ridge)

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        return FromGramian(library(self.kind).DualProjWeighting(projector=projector(self.ridge)))


@dataclass(frozen=True)
class AlignedMTL:
    """The gradients' principal components, all as long as one of them, in the place of the gradients; their mean.

    Senushkin, Patakin, Kuznetsov, Konushin: *Independent Component Alignment for Multi-Task Learning*.  CVPR 2023,
    https://arxiv.org/abs/2305.19000.

    Args:
        scale: how long: as the shortest component (``min``), the ``median`` one, or their root mean square (``rmse``).
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["aligned_mtl"] = field(default="aligned_mtl", kw_only=True)
    BIBTEX: ClassVar[str] = _cited("""
        @inproceedings{senushkin2023aligned,
          title     = {Independent Component Alignment for Multi-Task Learning},
          author    = {Senushkin, Dmitry and Patakin, Nikolay and Kuznetsov, Arseny and Konushin, Anton},
          booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
          year      = {2023},
          note      = {arXiv:2305.19000},
        }
    """)
    scale: Literal["min", "median", "rmse"] = "min"

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        return FromGramian(library(self.kind).AlignedMTLWeighting(scale_mode=self.scale))


@dataclass(frozen=True)
class FairGrad:
    """Nash bargaining with a say in how fair: G a = a^(-1 / alpha).

    Ban, Ji: *Fair Resource Allocation in Multi-Task Learning*.  ICML 2024, https://arxiv.org/abs/2402.15638.

    Args:
        alpha: 1 is proportional fairness, that of Nash-MTL; large ones look at the worst off.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["fairgrad"] = field(default="fairgrad", kw_only=True)
    BIBTEX: ClassVar[str] = _cited("""
        @inproceedings{ban2024fairgrad,
          title     = {Fair Resource Allocation in Multi-Task Learning},
          author    = {Ban, Hao and Ji, Kaiyi},
          booktitle = {International Conference on Machine Learning (ICML)},
          year      = {2024},
          note      = {arXiv:2402.15638},
        }
    """)
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"Parameter `alpha` should be positive. Found {self.alpha}.")

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        power = -self.alpha / (1 + self.alpha)  # s G a = a^(-1 / alpha) has a = s^power times the solution for G
        return FromGramian(library(self.kind).FairGradWeighting(alpha=self.alpha), power, live=True)


@dataclass(frozen=True)
class RandomWeights:
    """A random combination of the gradients, a softmax of normal numbers: the control for all aggregators.

    Lin, Ye, Zhang, Tsang: *Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning*.  TMLR 2022,
    https://arxiv.org/abs/2111.10603.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["random"] = field(default="random", kw_only=True)
    BIBTEX: ClassVar[str] = BIBTEX + rlw.BIBTEX

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        return FromGramian(library(self.kind).RandomWeighting())


@dataclass(frozen=True)
class ConFIG:
    """The direction that has the same cosine with all gradients, as long as the sum of their projections on it.

    Liu, Chu, Thuerey: *ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks*.  ICLR 2025,
    https://arxiv.org/abs/2408.11104.  It needs the Jacobian.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["config"] = field(default="config", kw_only=True)
    BIBTEX: ClassVar[str] = _cited("""
        @inproceedings{liu2025config,
          title     = {ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks},
          author    = {Liu, Qiang and Chu, Mengyu and Thuerey, Nils},
          booktitle = {International Conference on Learning Representations (ICLR)},
          year      = {2025},
          note      = {arXiv:2408.11104},
        }
    """)

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        return FromJacobian(library(self.kind).ConFIG())


@dataclass(frozen=True)
class GradDrop:
    """Per parameter, one sign is drawn, by how much the gradients agree on it; those of the other sign are dropped.

    Chen, Ngiam, Huang, Luong, Kretzschmar, Chai, Anguelov: *Just Pick a Sign: Optimizing Deep Multitask Models with Gradient
    Sign Dropout*.  NeurIPS 2020, https://arxiv.org/abs/2010.06808.  It needs the Jacobian.

    Args:
        leak: share of every gradient that is never dropped.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["graddrop"] = field(default="graddrop", kw_only=True)
    BIBTEX: ClassVar[str] = _cited("""
        @inproceedings{chen2020graddrop,
          title     = {Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout},
          author    = {Chen, Zhao and Ngiam, Jiquan and Huang, Yanping and Luong, Thang and
                       Kretzschmar, Henrik and Chai, Yuning and Anguelov, Dragomir},
          booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
          year      = {2020},
          note      = {arXiv:2010.06808},
        }
    """)
    leak: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.leak <= 1:
            raise ValueError(f"Parameter `leak` should be in [0, 1]. Found {self.leak}.")

    def bind(self, setting: Setting) -> Rule:
        """The rule of one training.  Raises ImportError without TorchJD."""
        found = library(self.kind)
        return FromJacobian(
            lambda jacobian: found.GradDrop(leak=jacobian.new_full((len(jacobian),), self.leak))(jacobian)
        )


def _require_ridge(ridge: float) -> None:
    if not 0 < ridge < math.inf:
        raise ValueError(f"Parameter `ridge` should be positive. Found {ridge}.")


def projector(ridge: float) -> Any:
    """A projection onto the dual cone, as `torchjd.linalg.DualConeProjector` defines it, by non-negative least squares.

    For the rows u of U it finds v >= u where v^T G v is least.  With G = L L^T and v = u + s that is |L^T s + L^T u|^2 over
    s >= 0.
    """
    from torchjd.linalg import DualConeProjector

    class Projector(DualConeProjector):
        """See `projector`."""

        def __call__(self, U: Tensor, G: Tensor) -> Tensor:
            """(..., K) v of each row of U."""
            trace = float(G.diagonal().sum())
            matrix = G.double().cpu().numpy() / (trace or 1.0) + ridge * np.eye(len(G))
            root = np.linalg.cholesky(matrix).T
            rows = U.double().cpu().numpy().reshape(-1, len(G))
            found = np.stack([u + scipy.optimize.nnls(root, -root @ u)[0] for u in rows])
            return torch.from_numpy(found).reshape(U.shape).to(G)

    return Projector()
