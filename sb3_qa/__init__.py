"""Safety monitoring for Stable-Baselines3: an agent and a question-answerer, trained jointly.

>>> from sb3_qa import Question
>>> from sb3_qa.truth import eventually
>>> Question("Will I crash within {k} steps if I choose {action}?", eventually("crashed", within="k"), k=[1, 5], name="crash")
Question('Will I crash within {k} steps if I choose {action}?', name='crash')
"""

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.answers import Answer, ChoiceAnswer, NumberAnswer, YesNoAnswer
from sb3_qa.certificate import Certificate, certify
from sb3_qa.errors import QAError
from sb3_qa.policies import qa_policy as _  # noqa: F401 - algorithms then take "QAMlpPolicy" by name
from sb3_qa.questions import Choice, Number, Question, YesNo
from sb3_qa.truth import Step

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Certificate",
    "Choice",
    "ChoiceAnswer",
    "Number",
    "NumberAnswer",
    "QAError",
    "Question",
    "QuestionAnswerer",
    "Step",
    "YesNo",
    "YesNoAnswer",
    "__version__",
    "certify",
]
