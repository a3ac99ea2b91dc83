"""What a pipeline gets wrong is said when a wrapper is made, before any step: what was got, what was expected, and the mend."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from stable_baselines3 import PPO
from wrapping import QUESTIONS, Toy, make_qa, toys

from sb3_qa import Number, QAError, Question, QuestionAnswerer, wrappers
from sb3_qa.callbacks import QACallback
from sb3_qa.truth import now
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


@every_form
@every_wrapper
def test_a_step_before_any_reset(saved, name, form):
    env = form(name, saved, WRAPPERS[name])
    refused(
        lambda: env.step(0 if form is single else np.array([0])), f"{name} got a step before any reset; .*call reset"
    )


@every_form
def test_the_text_of_a_question_in_place_of_its_key(saved, form):
    text = QuestionAnswerer.load(saved).catalogue.find("crash[k=3]").text
    given = {"question": text, "threshold": 0.5}
    refused(lambda: form("VetoAction", saved, given), r"got the text .*write 'crash\[k=3\]'")


def test_what_reset_returns_in_place_of_observations(saved):
    refused(
        lambda: QuestionAnswerer.load(saved).ask("crash[k=3]", Toy().reset()), "got a tuple; .*obs, info = env.reset"
    )


def test_an_option_of_the_policy_that_there_is_not():
    wrong = dict(questions=QUESTIONS, qa_coeff=0.5)
    refused(
        lambda: PPO("QAMlpPolicy", toys(1), policy_kwargs=wrong), "got qa_coeff, which no policy takes; .*'qa_coef'"
    )


def test_an_answer_says_what_it_has(saved):
    answer = QuestionAnswerer.load(saved).ask("crash[k=3]", np.zeros((1, 4), np.float32))
    with pytest.raises(AttributeError, match="a YesNoAnswer has no 'best'; it has .*probability"):
        answer.best  # noqa: B018
    assert not hasattr(answer, "mean")


def test_an_answerer_says_whose_it_is_and_what_it_answers(saved):
    qa = QuestionAnswerer.load(saved)
    assert repr(qa) == f"<QuestionAnswerer of {type(qa.policy).__name__}: {', '.join(qa.questions)}>"
    normalized = QuestionAnswerer(qa.policy, normalized=True)
    assert "of observations normalised by VecNormalize" in repr(normalized)


def test_a_number_that_is_mostly_outside_of_its_range(caplog):
    height = Question("How high am I?", now(lambda step: float(step.obs[0])), Number(5.0, 6.0), name="height")
    wide = Question("How high am I, roughly?", now(lambda step: float(step.obs[0])), Number(-9.0, 9.0), name="wide")
    model = PPO("QAMlpPolicy", toys(2), n_steps=16, batch_size=32, policy_kwargs=dict(questions=[height, wide]))
    model.learn(96, callback=QACallback())
    told = [record.getMessage() for record in caplog.records if "outside" in record.getMessage()]
    assert len(told) == 1 and "'height': 32 of 32 true answers are outside of Number(low=5.0, high=6.0)" in told[0]
