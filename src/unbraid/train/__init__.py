"""Training: the loop, the session that a schedule drives it through, and what a call of it keeps.

A batch goes through the model, terms make losses by objective, the update changes parameters, callbacks look on.  Methods
are terms, updates, towers and schedules; nothing here knows their names.
"""

from unbraid.train.loop import fit as fit
from unbraid.train.loop import losses_of as losses_of
from unbraid.train.options import Training as Training
from unbraid.train.scoring import predict as predict
from unbraid.train.session import Local as Local
from unbraid.train.watcher import Watcher as Watcher
