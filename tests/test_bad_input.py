"""What a pipeline gets wrong is said when a wrapper is made, before any step: what was got, what was expected, and the mend."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from stable_baselines3 import PPO
from wrapping import QUESTIONS, Toy, make_qa, toys

from sb3_qa import QAError, QuestionAnswerer, wrappers
from sb3_qa.callbacks import QACallback
from sb3_qa.wrappers import vector

OTHER = spaces.Box(-10, 10, (5,), np.float32)


class Unstepped(gym.Wrapper):
    """An environment in which no step is taken."""

    def step(self, action):
        raise AssertionError("it was stepped in")


def single(name, qa, given, **space):
    return getattr(wrappers, name)(Unstepped(Toy(**space)), **given, qa=qa)


def of_sb3(name, qa, given, **space):
    return getattr(wrappers, f"Vec{name}")(toys(1, Unstepped, **space), **given, qa=qa)


def of_gymnasium(name, qa, given, **space):
    return getattr(vector, name)(SyncVectorEnv([lambda: Unstepped(Toy(**space))]), **given, qa=qa)


WRAPPERS = {
    "AnswerQuestions": {},
    "ShapeReward": {"rewards": {"danger": -1.0}},
    "VetoAction": {"question": "crash[k=3]", "threshold": 0.5},
}
OF_OTHERS = {
    "AnswerQuestions": {"questions": ["height"]},
    "ShapeReward": {"rewards": {"height": 1.0}},
    "VetoAction": {"question": "height", "threshold": 0.5},
}
every_form = pytest.mark.parametrize("form", [single, of_sb3, of_gymnasium])
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


def refused(make, said):
    with pytest.raises(QAError, match=said) as error:
        make()
    got, *rest = str(error.value).replace(" but ", "; ").split("; ")
    assert got and any("expected" in part for part in rest), str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.qa"
    make_qa().save(path)
    return path


@every_form
@every_wrapper
def test_the_wrong_observation_space(saved, name, form):
    said = r"sees Box\(.*\(5,\), float32\) but its answerer's policy sees Box\(.*\(4,\)"
    refused(lambda: form(name, saved, WRAPPERS[name], observation_space=OTHER), said)


@every_form
@every_wrapper
def test_an_answerer_of_other_questions(saved, name, form):
    refused(lambda: form(name, saved, OF_OTHERS[name]), r"was not taught 'height'; .*expected one of .*'speed'")


@every_form
@every_wrapper
def test_a_missing_file(tmp_path, name, form):
    refused(lambda: form(name, tmp_path / "none.qa", WRAPPERS[name]), r"there is no file .*none\.qa; expected")


@every_form
@every_wrapper
def test_a_policy_without_questions(name, form):
    model = PPO("MlpPolicy", toys(1, Unstepped), device="cpu")
    refused(lambda: form(name, model, WRAPPERS[name]), r"got qa=PPO; expected a QuestionAnswerer")
    refused(lambda: QuestionAnswerer.from_model(model), r"without questions.*expected.*policy_kwargs=dict\(questions")
    refused(lambda: model.learn(1, callback=QACallback()), r"has no questions; expected one made by qa_policy\(\)")
    refused(lambda: PPO("QAMlpPolicy", toys(1), device="cpu"), r"got no questions; expected a list of Question")


@every_wrapper
def test_a_specification_that_cannot_be_serialised(saved, name):
    specify, given = getattr(wrappers, name).wrapper_spec, WRAPPERS[name]
    live = QuestionAnswerer.load(saved)
    refused(lambda: specify(**given, qa=live), r"wrapper_spec got qa=QuestionAnswerer; expected a path")
    refused(lambda: specify(**given, unbound=QUESTIONS[0]), r"which cannot be written as JSON .*; expected")
