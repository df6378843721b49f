"""A run as a tree of frozen dataclasses, from Python or from one TOML file.

A slot is a union of the dataclasses that may stand in it, told apart by ``kind``.  A new method adds its name to one of the
unions below and nowhere else.  An unknown key, a value of the wrong type and an unknown ``kind`` are errors that name the
place and what is allowed.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import re
import tomllib
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from unbraid.augmentations.image import Image
from unbraid.augmentations.tabular import Tabular
from unbraid.backbones.efficientnet_lite0 import EfficientNetLite0
from unbraid.backbones.frozen import located
from unbraid.backbones.given import Given
from unbraid.backbones.minilm import MiniLM
from unbraid.backbones.open_clip_models import OpenClip, OpenClipText
from unbraid.backbones.small_conv import SmallConv
from unbraid.backbones.timm_models import Timm
from unbraid.backbones.torchvision_models import Torchvision
from unbraid.calibration.binning import Histogram, Isotonic
from unbraid.calibration.cpcs import CPCS
from unbraid.calibration.scaling import Matrix, Temperature, Vector
from unbraid.calibration.transcal import TransCal
from unbraid.class_head import ClassFile, require_tasks
from unbraid.data.declaration import Data
from unbraid.data.source import TABLES, bundled
from unbraid.data.text import suffixes
from unbraid.encoders.attention import TargetAttention
from unbraid.encoders.dare import DARE
from unbraid.encoders.din import DIN
from unbraid.encoders.eta import ETA
from unbraid.encoders.hash_id import Hashed
from unbraid.encoders.numbers import Standardise, require_features
from unbraid.encoders.numeral import Numeral
from unbraid.encoders.periodic import Periodic
from unbraid.encoders.piecewise import Piecewise
from unbraid.encoders.pooling import Mean
from unbraid.encoders.quantile import Quantile
from unbraid.encoders.sdim import SDIM
from unbraid.encoders.sim import SIM
from unbraid.encoders.similarity import Similarity
from unbraid.encoders.table import Views
from unbraid.encoders.tin import TIN
from unbraid.encoders.twin import TWIN
from unbraid.encoders.twin_v2 import TWINV2
from unbraid.encoders.vectors import Projected, Raw
from unbraid.explain import explain
from unbraid.heads import Heads
from unbraid.interactions.cross import Cross
from unbraid.interactions.flat import Flat
from unbraid.interactions.fm import FM, FwFM
from unbraid.interactions.gwpfm import GwPFM
from unbraid.interactions.inner_product import InnerProduct
from unbraid.losses.cdan import CDAN, Conditional
from unbraid.losses.domain_adversary import DomainAdversary, DomainClassifier
from unbraid.losses.dst import DST, DSTHeads
from unbraid.losses.entropy import Entropy
from unbraid.losses.esmm import ESMM
from unbraid.losses.fixmatch import FixMatch
from unbraid.losses.flexmatch import FlexMatch
from unbraid.losses.focal import Focal
from unbraid.losses.history import HistoryLoss
from unbraid.losses.margin import Margin
from unbraid.losses.mcc import MCC
from unbraid.losses.pseudo_label import PseudoLabel
from unbraid.losses.ranking import Ranking
from unbraid.losses.supervised import Supervised
from unbraid.model import require_encoders
from unbraid.optim.adatask import AdaTask
from unbraid.optim.aggregated import AggregatedUpdate
from unbraid.optim.arml import ARML
from unbraid.optim.auto_lambda import AutoLambda
from unbraid.optim.beta_average import BetaAverage
from unbraid.optim.cagrad import CAGrad
from unbraid.optim.dwa import DWA
from unbraid.optim.ema import EMA
from unbraid.optim.gcs import GCS
from unbraid.optim.gradnorm import GradNorm
from unbraid.optim.gradvac import GradVac
from unbraid.optim.imtl_l import IMTLL
from unbraid.optim.jacobian_descent import (
    IMTLG,
    AlignedMTL,
    ConFIG,
    DualProj,
    FairGrad,
    GradDrop,
    PCGrad,
    RandomWeights,
    UPGrad,
)  # fmt: skip
from unbraid.optim.joint import Joint
from unbraid.optim.mgda import MGDA
from unbraid.optim.nash_mtl import NashMTL
from unbraid.optim.ol_aux import OLAUX
from unbraid.optim.rlw import RLW
from unbraid.optim.uniform_average import UniformAverage
from unbraid.optim.uw import UW
from unbraid.optim.weighted import WeightedUpdate
from unbraid.optim.wise_ft import WiSEFT
from unbraid.schedules.d_train import DTrain
from unbraid.schedules.fork_merge import ForkMerge
from unbraid.schedules.individual import Individual
from unbraid.schedules.one_stage import OneStage
from unbraid.schedules.online import Online
from unbraid.schedules.post_train import PostTrain
from unbraid.selection.dev import DEV
from unbraid.selection.entropy import TargetEntropy
from unbraid.selection.iwv import IWV
from unbraid.selection.mcc import TargetConfusion
from unbraid.selection.oracle import Oracle
from unbraid.selection.snd import SND
from unbraid.slots import Course
from unbraid.towers.aitm import AITM
from unbraid.towers.ame import AME
from unbraid.towers.experts import MMoE, OMoE
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.multi_embedding import MultiEmbedding
from unbraid.towers.ple import PLE
from unbraid.towers.single_task import SingleTask
from unbraid.towers.star import STAR
from unbraid.towers.stem import STEM
from unbraid.towers.stem_al import STEMAL
from unbraid.train import Training
from unbraid.types import FORBID

kind = Field(discriminator="kind")
HistoryChoice = Annotated[Mean | TargetAttention | DIN | DARE | TWIN | TIN | SIM | ETA | SDIM | TWINV2, kind]
NumberChoice = Annotated[Standardise | Quantile | Piecewise | Periodic | Numeral, kind]
VectorChoice = Annotated[Raw | Projected | Hashed | Similarity, kind]
ImageChoice = Annotated[SmallConv | EfficientNetLite0 | Torchvision | Timm | OpenClip | Given, kind]
TextChoice = Annotated[MiniLM | OpenClipText, kind]
InteractionChoice = Annotated[Flat | Cross | FM | FwFM | GwPFM | InnerProduct, kind]
TowerChoice = Annotated[
    SharedBottom | MMoE | STEM | OMoE | PLE | AITM | SingleTask | MultiEmbedding | AME | STEMAL | STAR, kind
]
TermChoice = Annotated[
    Supervised | ESMM | HistoryLoss | Ranking | Focal | Margin | DomainAdversary
    | PseudoLabel | FixMatch | FlexMatch | DST | MCC | Entropy | CDAN,
    kind,
]  # fmt: skip
ExtraHeadChoice = Annotated[DomainClassifier | DSTHeads | Conditional, kind]
AugmentChoice = Annotated[Tabular | Image, kind]
SelectionChoice = Annotated[IWV | DEV | SND | TargetEntropy | TargetConfusion | Oracle, kind]
AverageChoice = Annotated[BetaAverage | EMA | UniformAverage | WiSEFT, kind]
WeightingChoice = Annotated[UW | DWA | RLW | IMTLL | AutoLambda, kind]
AggregatorChoice = Annotated[
    PCGrad | MGDA | IMTLG | UPGrad | DualProj | AlignedMTL | FairGrad | RandomWeights | ConFIG | GradDrop
    | CAGrad | NashMTL | GradVac | GradNorm | GCS | OLAUX | ARML,
    kind,
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weighted(Joint):
    """The joint update with weights of the losses that follow the losses: see the weighting's own page."""

    kind: Literal["weighted"] = dataclasses.field(default="weighted", kw_only=True)  # type: ignore[assignment]
    weighting: WeightingChoice = dataclasses.field(default_factory=UW)

    def build(
        self, model: nn.Module, *, steps: int, weights: Mapping[str, float], objectives: Collection[str] | None = None,
        course: Course | None = None,
    ) -> WeightedUpdate:  # fmt: skip
        """See `Joint.build`.  Raises ValueError where the weighting misses something, such as the length of an epoch."""
        return WeightedUpdate(self, model, steps, weights, objectives, course)


@dataclasses.dataclass(frozen=True)
class Aggregated(Joint):
    """The joint update with one gradient made of those of all objectives: see the aggregator's own page."""

    kind: Literal["aggregated"] = dataclasses.field(default="aggregated", kw_only=True)  # type: ignore[assignment]
    aggregator: AggregatorChoice = dataclasses.field(default_factory=CAGrad)

    def build(
        self, model: nn.Module, *, steps: int, weights: Mapping[str, float], objectives: Collection[str] | None = None,
        course: Course | None = None,
    ) -> AggregatedUpdate:  # fmt: skip
        """See `Joint.build`.  Raises ValueError where the aggregator misses something; ImportError without its library."""
        return AggregatedUpdate(self, model, steps, weights, objectives, course)


UpdateChoice = Annotated[Joint | AdaTask | Weighted | Aggregated, kind]
ScheduleChoice = Annotated[OneStage | Online | ForkMerge | DTrain | Individual | PostTrain, kind]
CalibratorChoice = Annotated[
    Temperature | Vector | Matrix | Histogram | Isotonic | CPCS | TransCal, kind
]  # `unbraid calibrate`


class RunError(ValueError):
    """A run file says something that is not allowed.  The message names the place and what is."""


@dataclasses.dataclass(frozen=True)
class Expert:
    """One of several interactions of a view.  ``view`` is the view's place, from 0."""

    __pydantic_config__: ClassVar[dict] = FORBID
    view: int = 0
    interaction: InteractionChoice = dataclasses.field(default_factory=Flat)


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """The members of the model's slots.  See each member's own page.  ``experts`` stand in the place of ``interaction``."""

    __pydantic_config__: ClassVar[dict] = FORBID
    tower: TowerChoice = dataclasses.field(default_factory=SharedBottom)
    tables: Views = dataclasses.field(default_factory=Views)
    history: HistoryChoice = dataclasses.field(default_factory=Mean)
    interaction: InteractionChoice = dataclasses.field(default_factory=Flat)
    heads: Heads = dataclasses.field(default_factory=Heads)
    experts: tuple[Expert, ...] = ()
    numbers: NumberChoice = dataclasses.field(default_factory=Standardise)
    numbers_of: dict[str, NumberChoice] = dataclasses.field(default_factory=dict)
    vectors: VectorChoice = dataclasses.field(default_factory=Raw)
    history_of: dict[str, HistoryChoice] = dataclasses.field(default_factory=dict)
    extra_heads: tuple[ExtraHeadChoice, ...] = ()
    classes: dict[str, ClassFile] = dataclasses.field(default_factory=dict)
    images: ImageChoice | None = None
    texts: TextChoice | None = None

    def __post_init__(self) -> None:
        if self.experts and self.interaction != Flat():
            raise ValueError("`experts` bring interactions of their own. Set `experts` or `interaction`, not both.")
        kinds = [head.kind for head in self.extra_heads]
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise ValueError(f"`extra_heads` should hold each kind once. Found twice: {', '.join(twice)}.")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a training run is: data, model, losses, update, schedule, views of rows, training, seed.

    ``baseline`` names the columns of the target-encoding baseline: id features, ``user``, ``domain``; empty means all.
    ``init`` is a bundle to start from: its vocabulary's values stay, its weights are copied; empty means none.
    ``selection`` judges the model at its looks at the validation split in the place of ``training.metric``.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    data: Data
    name: str = "run"
    seed: int = 0
    baseline: tuple[str, ...] = ()
    init: str = ""
    model: ModelChoice = dataclasses.field(default_factory=ModelChoice)
    losses: tuple[TermChoice, ...] = (Supervised(),)
    update: UpdateChoice = dataclasses.field(default_factory=Joint)
    schedule: ScheduleChoice = dataclasses.field(default_factory=OneStage)
    augment: AugmentChoice | None = None
    average: AverageChoice | None = None
    selection: SelectionChoice | None = None
    training: Training = dataclasses.field(default_factory=Training)

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or set(self.name) & set("/\\"):
            raise ValueError(f"`name` should name a folder: not empty, no slash, no dot in front. Found `{self.name}`.")
        if self.seed < 0:
            raise ValueError(f"Parameter `seed` should not be negative. Found {self.seed}.")
        require_features(self.data.features, "number", self.model.numbers_of, "model.numbers_of")
        require_encoders(self.data.histories, self.model.history, self.model.history_of)
        require_tasks(self.data.tasks, self.model.classes)
        for need, choice in (("image", self.model.images), ("text", self.model.texts)):
            if (choice is None) == any(f.kind == need for f in self.data.features):
                what = "has no backbone" if choice is None else "reads nothing"
                raise ValueError(f"`model.{need}s` {what}: features of kind `{need}` and `model.{need}s` go together.")
        paired = {name for pair in getattr(self.model.vectors, "pairs", ()) for name in pair}
        require_features(self.data.features, "vector", paired, "model.vectors.pairs")
        if self.model.heads.unknown == "root" and not getattr(self.schedule, "keeps_root", False):
            raise ValueError(
                f"`model.heads.unknown` is `root`, and schedule `{self.schedule.kind}` keeps no head from before there was one "
                "per domain. Set `mean` or `error`."
            )
        if self.average is not None and self.training.patience and not self.average.looks:
            raise ValueError(
                f"Average `{self.average.kind}` needs the whole training, which `training.patience` {self.training.patience} "
                "may stop early. Set `patience` to 0, or use an average that looks are taken by (docs/methods/averages.md)."
            )
        if self.selection is not None and not getattr(self.schedule, "selects", False):
            raise ValueError(
                f"`selection` chooses among the looks of one training, and schedule `{self.schedule.kind}` has several, which it "
                "judges by `training.metric`. Set `schedule.kind` to `one_stage`, or leave `selection` out."
            )
        require_views(self.losses, self.augment)
        parts = {name: getattr(self, name) for name in ("model", "losses", "update", "schedule")}
        if not self.data.domain and (keys := list(_by_domain(parts))):
            raise ValueError(f"`{'`, `'.join(keys)}` needs domains, and the data declare none: set `data.domain`.")
        ids = [f.name for f in self.data.features if f.kind == "id"]
        allowed = list(dict.fromkeys([*(role for role in ("user", "domain") if getattr(self.data, role)), *ids]))
        if not set(self.baseline) <= set(allowed):
            raise ValueError(f"`baseline` should name columns among {allowed}. Found {list(self.baseline)}.")


def require_views(losses: Sequence[Any], augment: Any) -> None:
    """Raises ValueError where a loss compares views of rows that the run does not make."""
    for loss in losses:
        wanted = getattr(loss, "views", "none")
        if wanted != "none" and augment is None:
            raise ValueError(f"Loss `{loss.kind}` compares two views of a row: set `augment`, such as kind `tabular`.")
        if wanted == "all" and augment.of != "all":
            raise ValueError(
                f'Loss `{loss.kind}` reads strong views of rows with a label: set `augment.of` to "all". Found "{augment.of}".'
            )


def _by_domain(value: Any, path: str = "") -> Iterator[str]:
    """Keys ``by`` and ``within`` that say domain, and members that have parts per domain, as a run file writes them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if getattr(value, "reads_domains", False):
            yield path[1:]
        value = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        yield from (f"{path}.{key}"[1:] for key in ("by", "within") if value.get(key) in ("domain", "task@domain"))
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple | list) else ()
    for key, inner in items:
        yield from _by_domain(inner, f"{path}.{key}")


ADAPTER = TypeAdapter(Run)
SLOTS = ("model.tower", "model.history", "model.interaction", "model.experts.*.interaction", "model.numbers", "model.vectors",
         "model.images", "model.texts", "model.extra_heads.*", "losses.*", "update", "update.weighting", "update.aggregator",
         "schedule", "augment", "average", "selection")  # fmt: skip


def from_dict(plain: dict[str, Any], where: str = "the run") -> Run:
    """A run from plain dicts.  A table ``tune`` is a search's (`unbraid.tune.space`) and no part of a run.  Raises RunError."""
    try:
        return ADAPTER.validate_python({key: value for key, value in plain.items() if key != "tune"})
    except ValidationError as error:
        raise RunError(explain(error, Run, where)) from None


def load(path: str | Path) -> Run:
    """A run from a TOML file; its ``data.folder`` is made absolute.  Raises RunError."""
    path = Path(path)
    if suffixes(path)[0] in TABLES:
        raise RunError(
            f"{path} is data, not a run file. `unbraid init {path} --label COLUMN > run.toml` writes one for it."
        )
    try:
        plain = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"There is no run file {path}. `unbraid recipe NAME > {path.name}` writes one.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not TOML: {error}.") from None
    run = from_dict(plain, str(path))
    return with_base(run, path.parent)


def with_base(run: Run, base: Path) -> Run:
    """The run with its folders absolute, so that it means the same from anywhere."""
    if run.init:
        run = dataclasses.replace(run, init=str((base / run.init).resolve()))
    if run.model.classes:
        there = {
            task: dataclasses.replace(given, file=str((base / given.file).resolve()))
            for task, given in run.model.classes.items()
        }
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, classes=there))
    run = dataclasses.replace(run, model=located(run.model, base))
    if bundled(run.data.folder):
        return run
    folder = str((base / run.data.folder).resolve())
    return dataclasses.replace(run, data=dataclasses.replace(run.data, folder=folder))


def to_dict(run: Run, *, defaults: bool = True) -> dict[str, Any]:
    """Plain dicts without nulls, as TOML needs; without values that equal their defaults if asked (kinds stay)."""
    return _plain(run, defaults)


def _plain(value: Any, defaults: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {}
        for part in dataclasses.fields(value):
            item = getattr(value, part.name)
            default = part.default_factory() if part.default_factory is not dataclasses.MISSING else part.default
            if (
                item is None
                or isinstance(item, nn.Module)
                or (not defaults and item == default and part.name != "kind")
            ):
                continue
            out[part.name] = _plain(item, defaults)
        return out
    if isinstance(value, dict | types.MappingProxyType):
        return {k: _plain(v, defaults) for k, v in value.items()}
    return [_plain(v, defaults) for v in value] if isinstance(value, tuple | list) else value


_PLAIN_LIST = (
    r"^([A-Za-z0-9_-]+ = \[)\n((?: {4}(?:\"[^\"\\\n]*\"|[\w.+:-]+),\n)+)\]"  # of text without quotes, and of numbers
)


def dumps(run: Run, *, defaults: bool = False) -> str:
    """The run as TOML."""
    return written(to_dict(run, defaults=defaults))


def written(plain: Mapping[str, Any]) -> str:
    """Values as TOML, each list of plain ones on one line if it fits."""

    def joined(found: re.Match[str]) -> str:
        line = found[1] + ", ".join(item.strip().rstrip(",") for item in found[2].splitlines()) + "]"
        return line if len(line) <= 100 else found[0]

    return re.sub(_PLAIN_LIST, joined, tomli_w.dumps(plain), flags=re.M)


def differences(one: Run, other: Run) -> list[str]:
    """``a.b: 1 / 2`` for every value in which two runs differ."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return {k: v for key, inner in items for k, v in flat(inner, f"{path}.{key}").items()}
        return {path[1:]: value}

    a, b = flat(to_dict(one)), flat(to_dict(other))
    return [f"{key}: {a.get(key)} / {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def override(run: Run, settings: Sequence[str]) -> Run:
    """The run with ``a.b=value`` settings (values in TOML; a bare word is text).  Raises RunError for unknown paths."""
    changes: list[tuple[str, Any, str]] = []
    for setting in settings:
        path, eq, text = setting.partition("=")
        if not eq:
            raise RunError(f"`--set {setting}` should look like `--set model.tower.kind=mmoe`.")
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = text
        if isinstance(value, dt.date | dt.time):  # a run has times as text
            value = text
        changes.append((path.strip(), value, f"--set {setting}"))
    return changed(run, changes)


def changed(run: Run, changes: Sequence[tuple[str, Any, str]]) -> Run:
    """The run with values or whole tables at dotted paths, each with how the user wrote it.  Raises RunError."""
    plain = to_dict(run)
    for path, value, said in changes:
        _assign(plain, path.split("."), copy.deepcopy(value), said)
    try:
        return ADAPTER.validate_python(plain)
    except ValidationError as error:
        asked = " ".join(said for _, _, said in changes)
        raise RunError(f"{explain(error, Run)} (with {asked if len(asked) < 100 else asked[:100] + ' ...'})") from None


def _assign(plain: Any, keys: list[str], value: Any, said: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if not isinstance(plain, dict | list):
            raise RunError(f"`{said}`: `{'.'.join(keys[:depth])}` is {plain!r}, which has no keys.")
        if isinstance(plain, list):
            if not (key.isdigit() and int(key) < len(plain)):
                named = {item.get("name"): i for i, item in enumerate(plain) if isinstance(item, dict)}
                if key not in named:
                    items = [n for n in named if n] or list(range(len(plain)))
                    raise RunError(f"`{said}`: `{key}` is not one of {items}.")
                key = str(named[key])
            if last:
                plain[int(key)] = value
            else:
                plain = plain[int(key)]
        elif last and key == "kind" and _is_slot(keys[:depth]) and plain.get("kind") != value:
            plain.clear()  # another member of the slot: its own defaults, not the old member's values
            plain["kind"] = value
        elif last:
            plain[key] = value
        else:
            plain = plain.setdefault(key, {})


def _is_slot(keys: list[str]) -> bool:
    of_one = keys[:2] in (["model", "numbers_of"], ["model", "history_of"]) and len(keys) == 3
    return of_one or ".".join("*" if key.isdigit() else key for key in keys) in SLOTS
