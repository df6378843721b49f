"""Two processes, with tables divided over them, train as one does, or refuse and say why: every member of every slot.

docs/distributed.md has the table.  Where replicated rows take another way, two processes that hold all are compared, too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from every_member import every
from together_kit import Trained, apart, gap, together, trained, with_divided

from unbraid import parallel
from unbraid.train.session import require_one_process

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
WRITE = "UNBRAID_WRITE_TABLE"  # set it to write the page's table anew
EQUAL = 1e-9  # of losses, weights and looks, in double precision
# of weights that a solver runs to its own tolerance, and of those below a normalisation whose gradient is rounding
LOOSE = 1e-6
Key = tuple[str, str]


MOVE_ROWS = ("update", "weighting", "average")  # slots in which replicated rows take other ways than divided ones
HELD = ", tables replicated"


def all_trained(folder: Path, several: bool = False) -> dict[Key, Trained]:
    runs = every(folder)
    if several:
        held = {
            (slot, name + HELD): run for (slot, name), run in runs.items() if slot in MOVE_ROWS and "dense" not in name
        }
        runs = {key: with_divided(run) for key, run in runs.items()} | held
    return {key: trained(run) for key, run in runs.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, tuple[Trained, list[Trained]]]:
    """(slot, name) -> what one process made, and what each of two made."""
    folder = tmp_path_factory.mktemp("members")
    before = os.environ.get("UNBRAID_CACHE")
    os.environ["UNBRAID_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    try:
        alone = all_trained(folder)
        many = together(2, folder, all_trained, folder, True)
    finally:
        os.environ.pop("UNBRAID_CACHE")
        if before is not None:
            os.environ["UNBRAID_CACHE"] = before
    return {key: (alone[key[0], key[1].removesuffix(HELD)], [each[key] for each in many]) for key in many[0]}


def test_every_member_trains_as_in_one_process_or_says_why_not(found: dict[Key, tuple[Trained, list[Trained]]]) -> None:
    wrong, refused = [], []
    for key, (one, (first, second)) in found.items():
        assert not one.refused, (key, one.refused)
        if first.refused:
            assert first.refused == second.refused and "trains in one process only" in first.refused, (
                key,
                first.refused,
            )
            refused.append(key)
            continue
        assert len(one.losses) >= 4 and all(step for step in one.losses), key
        pairs = zip(one.looks, first.looks, strict=True)
        looks = max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)
        loose = ("d_train, lbfgs", "multi_embedding", "ame, norm batch", "small_conv", "image")
        bound = LOOSE if key[1] in loose else EQUAL
        if not (
            gap(one, first) <= EQUAL and apart(one, first) <= bound and looks <= EQUAL and apart(first, second) == 0
        ):
            wrong.append((key, gap(one, first), apart(one, first), looks, apart(first, second)))
    assert not wrong
    assert not refused, "all of today's members train"


def test_the_losses_under_test_were_there(found: dict[Key, tuple[Trained, list[Trained]]], tmp_path: Path) -> None:
    for (slot, name), (one, _) in found.items():
        if slot == "loss":
            kind = name.partition(",")[0]
            objectives = {objective for step in one.losses for objective in step}
            own = kind in ("mcc", "entropy", "cdan", "domain_adversary", "dst", "fixmatch", "flexmatch", "pseudo_label")
            assert kind in objectives if own else objectives, (name, objectives)


def test_the_page_has_this_table(found: dict[Key, tuple[Trained, list[Trained]]]) -> None:
    table = written({key: many[0].refused for key, (_, many) in found.items() if not key[1].endswith(HELD)})
    text = PAGE.read_text()
    start, end = (
        "<!-- table of members: tests/distributed/test_every_member.py writes it -->\n",
        "<!-- end of the table -->",
    )
    old = text[text.index(start) + len(start) : text.index(end)]
    if os.environ.get(WRITE):
        PAGE.write_text(text.replace(start + old + end, start + table + end))
        return
    assert old == table, f"the page's table is old: run this test with {WRITE}=1"


def written(refused: dict[Key, str]) -> str:
    """Markdown: the members that refuse, with the reason."""
    bad = [f"| {slot} | `{name}` | {_reason(why)} |" for (slot, name), why in refused.items() if why]
    return (
        "\n".join(["| slot | member | why in one process only |", "|---|---|---|", *(bad or ["| - | none | |"])]) + "\n"
    )


def _reason(why: str) -> str:
    match = re.search(r"in one process only: (.*), and each of \d+ processes", why)
    assert match, why
    return match[1]


def test_a_part_that_must_see_all_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(torch.nn.Linear):
        one_process = "it looks at all rows"

    require_one_process(torch.nn.Sequential(torch.nn.Linear(1, 1)))
    with pytest.raises(
        ValueError, match=r"`1` \(Picky\) trains in one process only: it looks at all rows, and each of 2"
    ):
        monkeypatch.setattr(parallel, "world", lambda: 2)
        require_one_process(torch.nn.Sequential(torch.nn.Linear(1, 1), Picky(1, 1)))
