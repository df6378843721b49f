"""One function per method (and per baseline) that returns a whole run on the bundled log.

``unbraid recipe NAME`` prints one as TOML; from Python, change one with ``dataclasses.replace``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from unbraid.config import Expert, ModelChoice, Run, TowerChoice
from unbraid.data.declaration import Data, Events, Join, Split
from unbraid.encoders.dare import DARE
from unbraid.encoders.din import DIN
from unbraid.encoders.numeral import Numeral
from unbraid.encoders.pooling import Mean
from unbraid.encoders.table import Views
from unbraid.interactions.cross import Cross
from unbraid.interactions.flat import Flat
from unbraid.interactions.fm import FM
from unbraid.interactions.gwpfm import GwPFM
from unbraid.losses.esmm import ESMM
from unbraid.losses.history import HistoryLoss
from unbraid.losses.ranking import Ranking
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.towers.aitm import AITM
from unbraid.towers.ame import AME
from unbraid.towers.experts import MMoE, OMoE
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.ple import PLE
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.train import Training
from unbraid.types import POSITION, Feature, Field, History, Task

USER_CATEGORIES = ("user_active_degree", "is_live_streamer", "is_video_author", "follow_user_num_range",
                   "fans_user_num_range", "friend_user_num_range", "register_days_range",
                   *(f"onehot_feat{i}" for i in range(18)))  # fmt: skip
NUMBERS = ("video_duration", "follow_user_num", "fans_user_num", "friend_user_num", "register_days")


def kuairand() -> Data:
    """The bundled log: four tasks, six tabs as domains, histories before the window and in it."""
    ids = (
        Feature("video_id", min_count=2),
        Feature("author_id", min_count=2),
        Feature("tab"),
        Feature("hour", column="hourmin / 100"),
        Feature("video_type"),
        Feature("upload_type"),
        Feature("music_type"),
        *(Feature(name) for name in USER_CATEGORIES),
        Feature("tag", kind="bag", separator=","),
        *(Feature(name, kind="number", transform="log1p") for name in NUMBERS),
    )
    flags = {"click": "is_click", "long": "long_view", "liked": "is_like", "entered": "is_profile_enter"}
    before = {"watch_seq": {}, "like_seq": {"liked": "1"}, "long_watch_seq": {"long": "1"}}
    sources = tuple(
        Events(table="history.parquet", time="none", columns={"video_id": column, "kind": f"'{column}'", **known})
        for column, known in before.items()
    )
    return Data(
        folder="kuairand",
        rows="impressions.parquet",
        keep="tab in (0, 1, 2, 4, 6, 8)",
        drop_duplicates=True,
        user="user_id",
        time="time_ms",
        domain="tab",
        joins=(Join("users.parquet", on="user_id"), Join("videos.parquet", on="video_id")),
        features=ids,
        fields=tuple(Field(name) for name in ("video_id", "author_id", *flags)),
        events=(
            *sources,
            Events(columns={"video_id": "video_id", "author_id": "author_id", "kind": "'impression'", **flags}),
        ),
        histories=(
            History("seen", fields=("video_id", "author_id"), where="kind in ('watch_seq', 'impression')"),
            History("outcomes", fields=tuple(flags), where="kind = 'impression'"),  # the user's own rates, so far
            History("clicked", fields=("video_id",), where="click = 1"),
            History("watched_long", fields=("video_id",), where="long = 1"),
            History("liked", fields=("video_id",), where="liked = 1"),
        ),
        tasks=(
            Task("click", column="is_click"),
            Task("long_view"),
            Task("like", column="is_like"),
            Task("profile_enter", column="is_profile_enter"),
        ),
        split=Split(kind="time", valid_from="2022-05-05T00:00+08:00", test_from="2022-05-07T00:00+08:00"),
    )


def _base(name: str) -> Run:
    return Run(
        name=name,
        data=kuairand(),
        baseline=("user", "video_id", "author_id", "domain"),
        model=ModelChoice(history=Mean()),
        update=Joint(lr=1e-3),
        training=Training(batch_size=1024, epochs=4, evaluate_every=40, patience=2, threads=1),
    )


def _with_tower(name: str, tower: TowerChoice) -> Run:
    run = _base(name)
    return replace(run, model=replace(run.model, tower=tower))


def stem() -> Run:
    """STEM: shared and task-specific embeddings; every task reads all experts and writes only its own."""
    run = _base("stem")
    tower = STEM(shared_experts=1, task_experts=1, expert=(64, 32), gate=(32,), tower=(16,), dropout=0.1)
    return replace(run, model=replace(run.model, tower=tower, tables=Views(kind="per_task", width=16)))


def mmoe() -> Run:
    """MMoE: one embedding, shared experts, one gate per task."""
    return _with_tower("mmoe", MMoE(experts=5, expert=(64, 32), gate=(32,), tower=(16,), dropout=0.1))


def omoe() -> Run:
    """OMoE: one embedding, shared experts, one gate for all tasks."""
    return _with_tower("omoe", OMoE(experts=5, expert=(64, 32), gate=(32,), tower=(16,), dropout=0.1))


def ple() -> Run:
    """PLE (one layer: CGC): one embedding, experts of each task and shared ones."""
    tower = PLE(shared_experts=1, task_experts=1, expert=(64, 32), gate=(32,), tower=(16,), dropout=0.1)
    return _with_tower("ple", tower)


def aitm() -> Run:
    """AITM: one embedding, one network per task, each informed by the one before."""
    return _with_tower("aitm", AITM(bottom=(64, 32), tower=(16,), dropout=0.1))


def shared_bottom() -> Run:
    """Shared bottom: one embedding, one network, one head per task."""
    return _with_tower("shared_bottom", SharedBottom(bottom=(64, 32), tower=(16,), dropout=0.1))


def single_task() -> Run:
    """Single task: one embedding and one network per task, nothing shared; what sharing is measured against."""
    run = _with_tower("single_task", SingleTask(bottom=(64, 32), tower=(16,), dropout=0.1))
    return replace(run, model=replace(run.model, tables=Views(kind="separate", width=16)))


def esmm() -> Run:
    """ESMM: the other tasks given a click, each learned through the joint event with the click, over all rows."""
    run = _with_tower("esmm", SharedBottom(bottom=(), tower=(64, 32), dropout=0.1))
    tasks = tuple(task if task.name == "click" else replace(task, given="click") for task in run.data.tasks)
    # a few likes, long views and profile visits have no click: their joint event is 0
    return replace(run, data=replace(run.data, tasks=tasks), losses=(ESMM(orphans="negative"),))


def din() -> Run:
    """DIN: a shared bottom whose histories are weighted by a small network that sees the row's video and author."""
    run = _with_tower("din", SharedBottom(bottom=(64, 32), tower=(16,), dropout=0.1))
    return replace(run, model=replace(run.model, history=DIN(hidden=(32,))))


def dare() -> Run:
    """DARE: a shared bottom whose histories are searched and weighed by tables of their own, by video, author and rank."""
    run = _with_tower("dare", SharedBottom(bottom=(64, 32), tower=(16,), dropout=0.1))
    seen, *others = run.data.histories
    histories = (replace(seen, fields=(*seen.fields, POSITION)), *others)
    return replace(
        run,
        data=replace(run.data, histories=histories),
        model=replace(run.model, history=DARE(keep=20, auxiliary=(64,))),
        losses=(Supervised(), HistoryLoss()),
    )


def dcn() -> Run:
    """DCN V2: a shared bottom on cross layers over all features."""
    run = _with_tower("dcn", SharedBottom(bottom=(64, 32), tower=(16,), dropout=0.1))
    return replace(run, model=replace(run.model, interaction=Cross(layers=2)))


def tencent() -> Run:
    """The assembled system: three sets of tables of different widths, each with its own kind of expert and a gate per task;
    numbers in numeral systems, a searched history with attention tables, cross-entropy with a ranking loss."""
    run = dare()
    groups = {"item": ("video_id", "author_id", "video_type", "upload_type", "music_type", "tag"),
              "user": USER_CATEGORIES, "context": ("tab", "hour")}  # fmt: skip
    model = ModelChoice(
        tower=AME(expert=(64, 32), gate=(32,), tower=(16,), dropout=0.1),
        tables=Views(kind="several", widths=(8, 16, 32)),
        experts=(
            Expert(view=0, interaction=Flat()),
            Expert(view=1, interaction=GwPFM(groups=groups)),
            Expert(view=2, interaction=Cross(layers=1, rank=16)),
        ),
        numbers=Numeral(),
        history=DARE(keep=20),
        history_of={history.name: Mean() for history in run.data.histories[1:]},
    )
    losses = (Supervised(weight=0.9), Ranking(weight=0.1))
    return replace(run, name="tencent", model=model, losses=losses)


def planted(data: Data, seed: int = 0) -> Run:
    """What logs of `unbraid.data.planted.sick_log` are trained with: products of fields, one narrow network for all tasks."""
    return Run(
        name="planted", data=data, seed=seed,
        model=ModelChoice(
            history=Mean(), interaction=FM(), tables=Views(width=8, std=0.1), tower=SharedBottom(bottom=(32, 16), tower=()),
        ),
        update=Joint(lr=1e-2),
        training=Training(batch_size=512, epochs=12, evaluate_every=60, patience=50, threads=1),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Run]] = {
    f.__name__: f for f in (stem, single_task, shared_bottom, omoe, mmoe, ple, aitm, esmm, din, dare, dcn, tencent)
}

DEFAULT = stem  # what `unbraid train` runs without a run file


def get(name: str) -> Run:
    """The recipe of that name.  Raises ValueError that lists the names."""
    if name not in RECIPES:
        raise ValueError(f"There is no recipe `{name}`. Recipes: {', '.join(RECIPES)}.")
    return RECIPES[name]()
