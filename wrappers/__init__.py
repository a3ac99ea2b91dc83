"""Wrappers that ask at every step: tell the answers, shape the reward, veto actions.

Each exists for one environment (``gymnasium.Wrapper``) and for SB3's vectorised ones (``Vec...``), with one behaviour.
They go outermost: a wrapper must see the observations the policy sees.
"""

from sb3_qa.wrappers.answer import AnswerQuestions, VecAnswerQuestions
from sb3_qa.wrappers.random_veto import VecRandomVeto
from sb3_qa.wrappers.shape import ShapeReward, VecShapeReward
from sb3_qa.wrappers.shell import QAWrapper, VecQAWrapper, qa_wrappers
from sb3_qa.wrappers.veto import VecVetoAction, VetoAction

__all__ = [
    "AnswerQuestions",
    "QAWrapper",
    "ShapeReward",
    "VecAnswerQuestions",
    "VecQAWrapper",
    "VecRandomVeto",
    "VecShapeReward",
    "VecVetoAction",
    "VetoAction",
    "qa_wrappers",
]
