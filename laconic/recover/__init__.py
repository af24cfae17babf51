"""Recovery of accuracy by training: L-C, fine-tuning with side information kept, and direct compression to compare with."""

from laconic.recover.call import Recovery, recover, recover_task, usual_recovery
from laconic.recover.checkpoint import StopRecovery
from laconic.recover.finetune import Direct, FineTune
from laconic.recover.lc import LC
from laconic.recover.parsing import parse_recovery
from laconic.recover.prepare import advance, convert, prepare
from laconic.recover.task import Task, load_task
from laconic.recover.train import Steps

__all__ = [
    "LC", "Direct", "FineTune", "Recovery", "Steps", "StopRecovery", "Task", "advance", "convert", "load_task", "parse_recovery",
    "prepare", "recover", "recover_task", "usual_recovery",
]  # fmt: skip
