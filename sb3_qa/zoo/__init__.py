"""For rl_zoo3: wrappers and a callback that find their place in environments which the zoo builds, and its hyperparameters.

The zoo puts ``vec_env_wrapper`` innermost, inside its normalisation and its frame stack, and ``enjoy`` runs no callback. So
name the classes of this package in its YAML files; :mod:`sb3_qa.zoo.ppo` and its like are for ``-conf``. Nothing here imports
rl_zoo3 until hyperparameters are asked for.
"""

from sb3_qa.zoo.callback import QACallback
from sb3_qa.zoo.seat import VecAnswerQuestions, VecShapeReward, VecVetoAction

__all__ = ["QACallback", "VecAnswerQuestions", "VecShapeReward", "VecVetoAction"]
