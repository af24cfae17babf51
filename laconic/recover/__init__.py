"""Recovery of accuracy by training: L-C, fine-tuning with side information kept, and direct compression to compare
with.
"""

from laconic.recover.adaround import AdaRound
from laconic.recover.base import Recovery
from laconic.recover.blockwise import Blockwise
from laconic.recover.call import Recovered, recover, recover_task, usual_recovery
from laconic.recover.checkpoint import StopRecovery
from laconic.recover.direct import Direct
from laconic.recover.finetune import FineTune
from laconic.recover.lc import LC
from laconic.recover.losses import KL, Features, TaskLoss
from laconic.recover.optimizers import Optimizer
from laconic.recover.parsing import known_recoveries, parse_recovery
from laconic.recover.prepare import advance, convert, prepare
from laconic.recover.schedules import Constant, Cosine, Geometric, Linear
from laconic.recover.steps import Steps
from laconic.recover.task import Task, load_task

__all__ = [
    "KL",
    "LC",
    "AdaRound",
    "Blockwise",
    "Constant",
    "Cosine",
    "Direct",
    "Features",
    "FineTune",
    "Geometric",
    "Linear",
    "Optimizer",
    "Recovered",
    "Recovery",
    "Steps",
    "StopRecovery",
    "Task",
    "TaskLoss",
    "advance",
    "convert",
    "known_recoveries",
    "load_task",
    "parse_recovery",
    "prepare",
    "recover",
    "recover_task",
    "usual_recovery",
]
