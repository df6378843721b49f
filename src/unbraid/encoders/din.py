"""DIN: a small network weighs every event of a history by what it and the predicted item have in common.

Paper: "Deep Interest Network for Click-Through Rate Prediction", Zhou, Zhu, Song, Fan, Zhu, Ma, Yan, Jin, Li, Gai, KDD
2018, https://doi.org/10.1145/3219819.3219823, arXiv 1706.06978.

Idea: what a user did matters as far as it resembles what is predicted now, and a network may learn what resembling means.
Its output is the event's weight as it is: no softmax, so that a user with many fitting events has a larger sum than a user
with one.  For event i of a row, e_i the event's vectors of the fields that the row itself has (q), r_i those of its others::

    score_i  = MLP([q, e_i, q - e_i, q * e_i, r_i])             one number
    weight_i = score_i                                          softmax over the row's events with ``softmax``
    output_f = sum_i weight_i v_f(i)                            for every event field f, the same weights
    Dice(s)  = p s + (1 - p) alpha s,   p = sigmoid((s - E[s]) / sqrt(Var[s] + 1e-8))

For long histories ``keep`` makes the sum that of the K events with the highest scores (the form of DARE's comparison, ICLR
2025: with ``relu``, ``scale`` and ``softmax``).  The score is a network's, not a sum of products: a search computes it event by
event, which costs far more than one by products (`unbraid.encoders.searched`).

Dice is the network's activation: a ReLU with a soft corner that sits at the data's mean, with a learned slope alpha (0 at
first) to its left.  E and Var are, per hidden unit, those of the batch's events in training, and running estimates
otherwise.

How this differs:

- The four parts that the network reads are those of the authors' code; the paper's figure has q, e and their product.
- That code has sigmoids in the network, and a softmax of score / sqrt(D), which the paper argues against; Dice stands in
  the layers above, with a second parameter that multiplies p's argument.  Here Dice is the network's activation, as the
  paper draws it, ``softmax`` has no scale, and towers keep their ReLU.
- Only real events are computed, and only they count in Dice's statistics; padded forms count padding, too.
- Event fields that the row has not (``gap``, what the user did) are further inputs of the network.
- The running estimates are the plain mean of the first ten batches' and move by a tenth of the distance from then on: a
  short training is evaluated with what it saw, not with an initial 0 and 1.  The variance is the biased one.  A training
  batch with fewer than two events reads the running estimates and leaves them.
- The paper's regularisation of tables is not here.
- With ``keep`` all events are scored without gradients, some rows at a time, and the K best again with gradients.  Both see the
  same statistics of Dice, those of *all* events of the batch; they are constants then: the backward pass does not go through
  them, or it would reach every event.  So with K above the longest history values are those of ``keep = 0``, and with Dice
  gradients are not.

How it is computed: q - e is linear in q and e, so the first layer reads [e, r, q * e, q] with weights added accordingly.
A Dice layer and the linear layer above it are one step without a product by unit (see `_Gated`), and the first layer's
statistics follow from the mean and covariance of its inputs.  All of it runs on a few rows at a time and is computed again
in the backward pass (`unbraid.encoders.packed.in_pieces`): the hidden layers of all events never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unbraid import parallel
from unbraid.encoders.packed import (
    OTHER_PIECE_VALUES,
    PIECE_VALUES,
    Listed,
    compare,
    gather,
    in_pieces,
    pieces,
    segment_softmax,
    weighted_sum,
)
from unbraid.encoders.search import top_k
from unbraid.layers import require_positive
from unbraid.types import FORBID, Ragged, Rows

BIBTEX = """
@inproceedings{zhou2018din,
  title     = {Deep Interest Network for Click-Through Rate Prediction},
  author    = {Zhou, Guorui and Zhu, Xiaoqiang and Song, Chenru and Fan, Ying and Zhu, Han and Ma, Xiao and
               Yan, Yanghui and Jin, Junqi and Li, Han and Gai, Kun},
  booktitle = {Proceedings of the 24th {ACM} {SIGKDD} International Conference on Knowledge Discovery and Data Mining},
  pages     = {1059--1068},
  year      = {2018},
  doi       = {10.1145/3219819.3219823},
}
"""

EPSILON = 1e-8  # the paper's; its authors' code has 1e-9
MOMENTUM = 0.1  # how far the running estimates move to a batch's

Step = Sequence[Tensor]  # weights of one step of the network: (weight, bias), or (a, b, c, bias) as in `_Gated`
Apply = Callable[
    [Callable[..., Tensor], Sequence[Tensor]], Tensor
]  # a function of `in_pieces`, applied to a batch's events
Statistics = Callable[[int, Sequence[Step], Step], tuple[Tensor, Tensor]]  # (depth, steps, linear) -> mean and variance


@dataclass(frozen=True)
class DIN:
    """Events weighed by a network on [q, e, q - e, q * e] of each event e and the row's own q.

    Args:
        hidden: widths of the network's hidden layers.
        activation: ``dice``, the paper's, or ``relu``.  With Dice the rows of a training batch see each other, through the
            mean and variance of their events; in evaluation they do not.
        softmax: make the weights of a row sum to 1; the paper takes them as they are.
        keep: K: only the events with the K highest scores of a row have weights and gradients; 0: all.
        scale: divide scores by the width of the compared fields.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["din"] = field(default="din", kw_only=True)
    hidden: tuple[int, ...] = (64,)
    activation: Literal["relu", "dice"] = "dice"
    softmax: bool = False
    keep: int = 0
    scale: bool = False

    needs_target: ClassVar[bool] = True  # of at least one history, or nothing is compared

    def __post_init__(self) -> None:
        require_positive(hidden=self.hidden)
        if not self.hidden:
            raise ValueError("Parameter `hidden` should have at least one layer. Found ().")
        if self.activation not in ("relu", "dice"):
            raise ValueError(f"Parameter `activation` should be `relu` or `dice`. Found `{self.activation}`.")
        if self.keep < 0:
            raise ValueError(f"Parameter `keep` should not be negative. Found {self.keep}.")

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int]) -> DINHistory:
        """widths: event field -> D; targets: the event fields that the row has, too.

        A history without such a field has nothing to compare: its network sees the events alone.
        """
        return DINHistory(self, widths, targets)


class DINHistory(nn.Module):
    """See the module's docstring.

    Attributes:
        widths: event field -> D of what it gives.
        fields: the event fields in the order of the network's input, those that the row has first.
    """

    def __init__(self, config: DIN, widths: Mapping[str, int], targets: Mapping[str, int]) -> None:
        super().__init__()
        self.widths, self.targets = dict(widths), tuple(targets)
        self.softmax, self.keep = config.softmax, config.keep
        self.fields = (*targets, *(name for name in widths if name not in targets))
        self.common, self.own = sum(targets.values()), sum(widths.values())
        self.divisor = (self.common or self.own) if config.scale else 1
        sizes = (3 * self.common + self.own, *config.hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.dice = nn.ModuleList(Dice(width) for width in config.hidden if config.activation == "dice")
        # a softmax does not see its scores' common part: Adam would follow the rounding errors of such a bias' gradient
        self.score = nn.Linear(sizes[-1], 1, bias=not config.softmax)

    def forward(
        self, events: Mapping[str, Mapping[str, Rows]], history: Ragged, target: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """As `unbraid.encoders.pooling.MeanHistory.forward`."""
        reads = [events["value"][name] for name in self.fields]
        asked = [target["value"][name] for name in self.targets]
        query = _side_by_side(asked) if asked else reads[0].vectors.new_zeros(history.lengths.shape[0], 0)
        if not isinstance(history, Listed) and not len(reads[0].index):
            nothing = self._statistics_of_others(query)
            return {name: query.new_zeros(len(history), width) + nothing for name, width in self.widths.items()}
        if self.keep:
            reads, history, statistics = self._search(reads, history, query)
        values = _side_by_side([gather(read) for read in reads])
        if not self.keep:
            apply = partial(_with_gradients, history, values, query)
            statistics = partial(self._statistics, apply, values.shape[0])
        steps = self._steps(statistics)
        found = in_pieces(partial(_attend, _sizes(steps), self.softmax), history, values, query, _flat(steps))
        parts = found.split([self.widths[name] for name in self.fields], 1)
        return dict(zip(self.fields, parts, strict=True))

    @torch.no_grad()
    def _search(
        self, reads: Sequence[Rows], history: Ragged, query: Tensor
    ) -> tuple[list[Rows], Ragged, Statistics]:  # fmt: skip
        """The kept events, whose they are, and the statistics of all events as constants."""
        apply = partial(_without_gradients, history, reads, query)
        noted: list[tuple[Tensor, Tensor]] = []

        def statistics(depth: int, steps: Sequence[Step], linear: Step) -> tuple[Tensor, Tensor]:
            noted.append(self._statistics(apply, reads[0].index.shape[0], depth, steps, linear))
            return noted[-1]

        steps = self._steps(statistics)
        if isinstance(history, Listed) or int(history.lengths.max()) > self.keep:
            kept = top_k(apply(partial(_scores, _sizes(steps)), _flat(steps)), history, self.keep)
            reads, history = [kept.of(read) for read in reads], kept.lists
        return list(reads), history, lambda depth, *_: noted[depth]

    def _steps(self, statistics: Statistics) -> list[Step]:
        """The network as steps for `_network`; with Dice, its statistics are in their weights."""
        steps: list[Step] = []
        linear: Step = (self._folded(), cast(Tensor, self.layers[0].bias))
        for depth, above in enumerate([*self.layers[1:], self.score]):
            weight, bias = cast(Tensor, above.weight), cast("Tensor | None", above.bias)
            bias = weight.new_zeros(1) if bias is None else bias
            if above is self.score and self.divisor != 1:
                weight, bias = weight / self.divisor, bias / self.divisor
            if len(self.dice):
                mean, variance = statistics(depth, steps, linear)
                own, linear = cast(Dice, self.dice[depth]).between(linear, mean, variance, weight, bias)
                steps.append(own)
            else:
                steps.append(linear)
                linear = (weight, bias)
        return [*steps, linear]

    def _statistics(
        self, apply: Apply, count: int, depth: int, steps: Sequence[Step], linear: Step
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(H,) mean and variance of a layer: the batch's, which are noted, or the running ones."""
        dice = cast(Dice, self.dice[depth])
        if not self.training:
            return dice.mean, dice.variance
        below = [*steps, linear] if steps else []
        if parallel.world() > 1:  # the events of all processes
            width = cast(nn.Linear, self.layers[depth]).out_features if steps else linear[0].shape[1]
            mine = apply(partial(_moments, _sizes(below)), _flat(below)) if count and parallel.counts() else None
            found = parallel.all_rows(linear[0].new_zeros(0, 1 + width + width**2) if mine is None else mine)
            count = int(found[:, 0].sum())
        if count < 2:  # one event has no variance
            return dice.mean, dice.variance
        if parallel.world() == 1:
            found = apply(partial(_moments, _sizes(below)), _flat(below))
        mean, variance = _statistics(found, count, None if steps else linear)
        dice.note(mean, variance)
        return mean, variance

    def _statistics_of_others(self, like: Tensor) -> Tensor:
        """0, of a batch whose events are all other processes': they wait for this one in both directions."""
        nothing = like.new_zeros(())
        if not (self.training and len(self.dice) and parallel.world() > 1):
            return nothing
        noted: list[tuple[Tensor, Tensor]] = []

        def statistics(depth: int, steps: Sequence[Step], linear: Step) -> tuple[Tensor, Tensor]:
            noted.append(self._statistics(_no_events, 0, depth, steps, linear))
            return noted[-1]

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.keep):
            self._steps(statistics)
        return nothing + sum((mean.sum() + variance.sum()) * 0 for mean, variance in noted)

    def _folded(self) -> Tensor:
        """The first weights for [e, r, q * e, q]: those of q - e go to q's and, negated, to e's."""
        weight = cast(Tensor, self.layers[0].weight)
        q, e, difference, product, rest = weight.split([self.common] * 4 + [self.own - self.common], 1)
        return torch.cat([e - difference, rest, product, q + difference], 1)


class Dice(nn.Module):
    """Slopes and running statistics of one layer's Dice.

    Attributes:
        alpha: (H,) learned slopes; mean, variance: (H,) running estimates; batches: how many they have seen.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def note(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running estimates to a batch's."""
        self.batches += 1
        rate = self.batches.to(mean.dtype).reciprocal().clamp(min=MOMENTUM)
        self.mean.lerp_(mean, rate)
        self.variance.lerp_(variance, rate)

    def between(
        self, below: Step, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The step below, made to give z = (s - mean) / deviation, and the linear layer above as a step on z.

        From s = z / rate + mean follows Dice(s) = (z / rate + mean) (alpha + (1 - alpha) p), and with V the weights above
        V Dice(s) = (V alpha / rate) z + (V (1 - alpha) / rate) (z p) + (V (1 - alpha) mean) p + V alpha mean.
        """
        rate = (variance + EPSILON).rsqrt()
        own = [*(w * rate.unsqueeze(1) for w in below[:-1]), (below[-1] - mean) * rate]
        straight, gated = weight * self.alpha, weight * (1 - self.alpha)
        return own, [straight / rate, gated / rate, gated * mean, bias + straight @ mean]


# ------------------------------------------------------------------------------------------------ on a piece of the events
class _Gated(torch.autograd.Function):
    """z a' + (z p) b' + p c' + bias, p = sigmoid(z): Dice and the linear layer above it.

    As the units' factors stand in a, b and c, no product by unit is left to do for every event.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
        p = z.sigmoid()
        product = z * p
        ctx.save_for_backward(z, p, product, a, b, c)
        return _gated(z, p, product, a, b, c, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        z, p, product, a, b, c = ctx.saved_tensors
        of_product, flow = grad @ b, grad.T
        of_z = torch.ops.aten.sigmoid_backward((grad @ c).addcmul_(of_product, z), p)
        of_z.addmm_(grad, a).addcmul_(of_product, p)
        return of_z, flow @ z, flow @ product, flow @ p, grad.sum(0)


def _gated(z: Tensor, p: Tensor, product: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, z, a.T).addmm_(product, b.T).addmm_(p, c.T)


class _Moments(torch.autograd.Function):
    """(n, F) -> (1, 1 + F + F * F): how many, their sum, and the products of their deviations from their mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.new_ones(len(x)) @ x
        mean = total / len(x)
        apart = x - mean
        ctx.save_for_backward(x, mean)
        return torch.cat([x.new_full((1,), len(x)), total, (apart.T @ apart).flatten()]).unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        width = len(mean)
        products = grad[0, 1 + width :].view(width, width)
        both = products + products.T  # deviations sum to 0, so that what they owe to the mean is 0
        return torch.addmm(grad[0, 1 : 1 + width] - mean @ both, x, both)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _sizes(steps: Sequence[Step]) -> list[int]:
    return [len(step) for step in steps]


def _flat(steps: Sequence[Step]) -> list[Tensor]:
    return [tensor for step in steps for tensor in step]


def _network(x: Tensor, sizes: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
    """(n, F) through steps that `_sizes` and `_flat` have taken apart; an activation stands between two steps."""
    rest = iter(tensors)
    for depth, size in enumerate(sizes):
        weights = list(islice(rest, size))
        if size == 2:
            x = nn.functional.linear(x.relu_() if depth else x, *weights)
        else:
            x = _Gated.apply(x, *weights) if torch.is_grad_enabled() else _gated(x, p := x.sigmoid(), x * p, *weights)
    return x


def _scores(sizes: Sequence[int], lists: Ragged, values: Tensor, query: Tensor, *tensors: Tensor) -> Tensor:
    """(n,) scores of some rows' events."""
    return _network(compare(values, query, lists), sizes, tensors).squeeze(1)


def _attend(
    sizes: Sequence[int], softmax: bool, lists: Ragged, values: Tensor, query: Tensor, *tensors: Tensor
) -> Tensor:
    """(b, E): the weighted sums of some rows' events."""
    scores = _scores(sizes, lists, values, query, *tensors)
    return weighted_sum(values, segment_softmax(scores, lists) if softmax else scores, lists)


def _moments(sizes: Sequence[int], lists: Ragged, values: Tensor, query: Tensor, *tensors: Tensor) -> Tensor:
    """`_Moments` of some rows' events after the given steps."""
    return _Moments.apply(_network(compare(values, query, lists), sizes, tensors))


def _with_gradients(
    history: Ragged, values: Tensor, query: Tensor, function: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    """An `Apply` on events that lie side by side."""
    return in_pieces(function, history, values, query, tensors)


def _without_gradients(
    history: Ragged, reads: Sequence[Rows], query: Tensor, function: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    """An `Apply` that gathers the events of a piece at a time: those of a search are too many to lie anywhere."""
    if isinstance(history, Listed):
        return function(history, _side_by_side([read.gather() for read in reads]), query, *tensors)
    size = PIECE_VALUES.get(query.device.type, OTHER_PIECE_VALUES)
    found = []
    for at, rows, own in pieces(history, size):
        values = _side_by_side([read.vectors.index_select(0, read.index[at]) for read in reads])
        found.append(function(own, values, query[rows], *tensors))
    return torch.cat(found)


def _no_events(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    raise AssertionError("There is no event to apply it to.")


def _statistics(found: Tensor, count: int, linear: Step | None) -> tuple[Tensor, Tensor]:
    """(H,) mean and variance, over all ``count`` events, from `_Moments` of their parts (p, 1 + F + F * F).

    Of the first layer these are of its inputs, which are narrower and need no (n, H) values, and ``linear`` is the layer.
    """
    width = math.isqrt(found.shape[1])  # of 1 + F + F * F
    counts, sums, products = found.split([1, width, width * width], 1)
    mean = sums.sum(0) / count
    apart = (sums / counts - mean) * counts.sqrt()
    covariance = (products.sum(0).view(width, width) + apart.T @ apart) / count
    if linear is None:
        return mean, covariance.diagonal()
    weight, bias = linear
    return weight @ mean + bias, ((weight @ covariance) * weight).sum(1).clamp(min=0)
