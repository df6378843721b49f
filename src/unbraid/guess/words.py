"""Words of column names and of cells that say what is meant.  English ones, as most logs have them."""

from __future__ import annotations

import re

USERS = set(
    """
    user users uid member customer visitor client reviewer consumer buyer person account subscriber guest borrower patient
    """.split()
)
ITEMS = set(
    """
    item items iid video product movie song track goods article news sku ad doc content book poi business
    post photo listing game app recipe show asin offer
    """.split()
)
TIMES = set("time timestamp ts datetime date day hour created at dt unix".split())
DAYS = set("date day dt datetime month week year".split())
OTHER_TIMES = set(
    """
    birth birthday dob born signup registered registration joined hired opened start started first expiry expires expiration
    end ended due updated modified deleted last release released shipped
    delivery delivered return returned closed departure dep arrival arr sched scheduled
    """.split()
)  # moments of something else than of the row
DOMAINS = set("domain scenario scene tab site country channel page surface market region source".split())
IDS = set("id ids type code category cat class brand city gender level zip key".split())
FLAGS = set("is has did".split())
FEEDBACK = set(
    """
    click clicked clicks like liked dislike disliked follow followed comment commented forward share shared
    hate buy bought purchase purchased order ordered cart favorite favourite fav collect collected convert
    converted conversion install installed view viewed watched finish finished complete completed subscribe
    subscribed enter entered skip skipped pay paid download downloaded reply replied label target
    """.split()
)  # binary ones are labels, and no features of each other
AGAINST = set("hate hated dislike disliked skip skipped".split())
OUTCOMES = set(
    """
    survived churn churned exited attrition default defaulted fraud fraudulent approved accepted rejected deny denied won win
    success failed failure cancelled canceled returned hired readmitted diagnosis disease died death dead response responded
    outcome result income spam deposit late passed retained renewed left
    """.split()
)
LABELS = set("label labels target y class outcome".split())  # whole names that say it
RATINGS = set("rating ratings stars star score overall".split())
AMOUNTS = set("delay price salary wage amount sales revenue demand spend spent quantity cost duration value".split())
PEOPLE = set(
    "sex gender race ethnicity black white married marital age".split()
)  # about a person, and rarely to be predicted
ACTIONS = set("event behavior behaviour action activity interaction".split())
EVENTS = set(
    """
    event action log history view visit session click play cart search impression purchase order transaction activity
    interaction behavior behaviour watch listen read browse
    """.split()
)  # of a table's name, without the s of a plural
WANTED = set(
    """
    buy purchase transaction order cart addtocart add_to_cart fav favorite like follow share click convert checkout
    """.split()
)
DURING = set(
    """
    play played stay stayed dwell watch watched listen listened revenue gmv spend spent progress rating stars
    """.split()
)  # measured while the event lasts, or after it
YES = set("yes y true t positive pos 1 good won win success accepted approved".split())
NO = set("no n false f negative neg 0 none bad lost loss failure rejected denied".split())
ABSENT = set("na n/a nan null none nil ? - -- . unknown missing #n/a".split())  # cells, in small letters


def words_of(name: str) -> list[str]:
    """``userId2`` is the words user, id, 2."""
    return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+", name)]


def safe(name: str) -> str:
    """A name that a run file allows."""
    return re.sub(r"[./]", "_", name) or "unnamed"


def sql_name(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def sql_text(value: str) -> str:
    """A text in SQL."""
    return "'" + value.replace("'", "''") + "'"
