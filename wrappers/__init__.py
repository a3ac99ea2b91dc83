"""Wrappers that ask at every step: tell the answers, shape the reward, veto actions.

Each exists for one environment (``gymnasium.Wrapper``), for SB3's vectorised ones (``Vec...``), and for gymnasium's
(:mod:`sb3_qa.wrappers.vector`), with one behaviour. They go outermost: a wrapper must see the observations the policy sees.
:class:`QAReward` gives the same reward as a function of transitions, for imitation.
"""

from sb3_qa.wrappers.answer import AnswerQuestions, VecAnswerQuestions
from sb3_qa.wrappers.random_veto import VecRandomVeto
from sb3_qa.wrappers.reward_fn import QAReward
from sb3_qa.wrappers.shape import ShapeReward, VecShapeReward
from sb3_qa.wrappers.shell import QAWrapper, VecQAWrapper, qa_wrappers
from sb3_qa.wrappers.veto import VecVetoAction, VetoAction

__all__ = [
    "AnswerQuestions",
    "QAReward",
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
