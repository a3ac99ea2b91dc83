"""A reward of answers as a function of transitions: imitation's protocol, held against the wrapper on the same trajectories."""

import inspect
from functools import partial

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
from wrapping import Toy, make_qa, run_vec, toys

from sb3_qa import QAError
from sb3_qa.wrappers import QAReward, VecShapeReward

try:  # pip install --no-deps imitation: it asks for older versions of Gymnasium and SB3 than it works with here
    from imitation.policies.replay_buffer_wrapper import ReplayBufferRewardWrapper
    from imitation.rewards.reward_wrapper import RewardVecEnvWrapper
except ImportError:
    RewardVecEnvWrapper = None
needs_imitation = pytest.mark.skipif(
    RewardVecEnvWrapper is None, reason="needs imitation: pip install --no-deps imitation"
)

WEIGHTS = {"danger": -2.0, "speed": 0.5, "crash[k=1]": -1.0}
POTENTIAL = dict(rewards={"danger": -2.0, "speed": 0.5}, mode="potential", gamma=0.9)
ACTIONS = np.random.default_rng(3).integers(3, size=(23, 3))
FORMS = {
    "replace": dict(rewards=WEIGHTS, mode="replace"),
    "callable": dict(rewards=lambda told: -told["danger"] * told["crash[k=3]"], mode="replace"),
    "about actions": dict(rewards={"crash[k=3]": -1.0}, mode="replace"),
    "potential": POTENTIAL,
    "potential callable": POTENTIAL | dict(rewards=lambda told: told["speed"]),
}


@pytest.fixture(scope="module")
def qa():
    return make_qa()


class RewardWrapper(VecEnvWrapper):
    """What imitation does with such a function: old observations, actions, the true next ones, dones, by position."""

    def __init__(self, venv, reward_fn):
        super().__init__(venv)
        self.reward_fn = reward_fn
        self.calls = []  # of a rollout

    def reset(self):
        self.old_obs = self.venv.reset()
        return self.old_obs

    def step_async(self, actions):
        self.actions = actions
        self.venv.step_async(actions)

    def step_wait(self):
        obs, _, dones, infos = self.venv.step_wait()
        fixed = np.stack(
            [info["terminal_observation"] if done else o for o, done, info in zip(obs, dones, infos, strict=True)]
        )
        self.calls.append((self.old_obs, self.actions, fixed, dones))
        rewards = self.reward_fn(self.old_obs, self.actions, fixed, np.array(dones))
        self.old_obs = obs
        return obs, rewards, dones, infos


@pytest.mark.parametrize(
    "wrapper", [RewardWrapper, pytest.param(RewardVecEnvWrapper, marks=needs_imitation)], ids=["ours", "imitation"]
)
@pytest.mark.parametrize("name", list(FORMS))
def test_it_gives_what_the_wrapper_gives(qa, name, wrapper):
    arguments = FORMS[name]
    expected = run_vec(VecShapeReward(toys(3), qa=qa, **arguments), ACTIONS)
    given = run_vec(wrapper(toys(3), QAReward(qa, **arguments)), ACTIONS)
    n_cut = n = 0
    for moments, others in zip(expected, given, strict=True):
        for moment, other in zip(moments, others, strict=True):
            if moment.before is None:
                continue
            if moment.truncated and name.startswith("potential"):
                n_cut += 1  # not told from a termination: looked at below
                continue
            n += 1
            assert other.reward == pytest.approx(moment.told["qa/shaping_reward"], rel=1e-4, abs=1e-5)
    assert n > 60
    assert n_cut == (0 if not name.startswith("potential") else 4)


def test_done_may_be_a_time_limit(qa):
    """Where it is, the potential of the last state counts, as the wrapper has it at a truncation."""
    expected = run_vec(VecShapeReward(toys(3), qa=qa, **POTENTIAL), ACTIONS)
    given = run_vec(RewardWrapper(toys(3), QAReward(qa, **POTENTIAL, done_terminates=False)), ACTIONS)
    n_cut = 0
    for moments, others in zip(expected, given, strict=True):
        for moment, other in zip(moments, others, strict=True):
            if moment.before is None or moment.terminated:
                continue
            n_cut += moment.truncated
            assert other.reward == pytest.approx(moment.told["qa/shaping_reward"], rel=1e-4, abs=1e-5)
    assert n_cut == 4


def test_the_protocol(qa):
    """Names, shapes and types: keywords as imitation's replay buffers pass them."""
    reward_fn = QAReward(qa, WEIGHTS)
    assert list(inspect.signature(reward_fn).parameters) == ["state", "action", "next_state", "done"]
    rng = np.random.default_rng(0)
    state, next_state = rng.normal(size=(2, 5, 4)).astype(np.float32)
    action, done = rng.integers(3, size=5), np.zeros(5, bool)
    rewards = reward_fn(state=state, action=action, next_state=next_state, done=done)
    assert (rewards.shape, rewards.dtype) == ((5,), np.float32)
    expected = sum(
        weight * (qa.ask(key, state, action) if "crash" in key else qa.ask(key, next_state)).value
        for key, weight in WEIGHTS.items()
    )
    np.testing.assert_allclose(rewards, expected, rtol=1e-5)
    again = reward_fn(state, action[:, None].astype(np.float32), next_state, done[:, None].astype(np.float32))
    np.testing.assert_array_equal(rewards, again)  # as replay buffers hold them
    assert reward_fn(state[:1], action[:1], next_state[:1], done[:1]) == pytest.approx(rewards[0], rel=1e-5)
    reward_fn(state, action, next_state, done)[:] = 0.0  # a caller may write into what it gets
    np.testing.assert_array_equal(reward_fn(state, action, next_state, done), rewards)


def test_continuous_actions_and_observations_in_a_dict():
    space = spaces.Box(-1, 1, (2,), np.float32)
    both = spaces.Dict({"near": spaces.Box(-9, 9, (4,), np.float32), "far": spaces.Box(-9, 9, (2,), np.float32)})
    qa = make_qa("MultiInputPolicy", action_space=space, observation_space=both)
    rng = np.random.default_rng(0)
    both.seed(0)
    state, next_state = ({key: part.sample()[None].repeat(3, 0) for key, part in both.items()} for _ in range(2))
    action = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
    rewards = QAReward(qa, {"crash[k=1]": -1.0, "speed": 0.1})(state, action, next_state, np.zeros(3, bool))
    expected = 0.1 * qa.ask("speed", next_state).value - qa.ask("crash[k=1]", state, action).value
    np.testing.assert_allclose(rewards, expected, rtol=1e-5)


def test_an_agent_learns_from_it(qa, tmp_path):
    qa.save(tmp_path / "toy.qa")
    env = RewardWrapper(DummyVecEnv([partial(Toy, length=5)] * 2), QAReward(tmp_path / "toy.qa", WEIGHTS))
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu")
    model.learn(32)
    given = np.concatenate([env.reward_fn(*call) for call in env.calls[:16]])
    going = ~np.concatenate([done for *_, done in env.calls[:16]])  # PPO adds a value where an episode is cut
    assert going.sum() > 20
    np.testing.assert_allclose(model.rollout_buffer.rewards.reshape(-1)[going], given[going], rtol=1e-5)


@needs_imitation
def test_imitation_takes_observations_in_a_dict():
    both = spaces.Dict({"near": spaces.Box(-9, 9, (4,), np.float32), "far": spaces.Box(-9, 9, (2,), np.float32)})
    qa = make_qa("MultiInputPolicy", observation_space=both)
    expected = run_vec(VecShapeReward(toys(3, observation_space=both), WEIGHTS, "replace", qa=qa), ACTIONS)
    given = run_vec(RewardVecEnvWrapper(toys(3, observation_space=both), QAReward(qa, WEIGHTS)), ACTIONS)
    for moments, others in zip(expected, given, strict=True):
        for moment, other in zip(moments, others, strict=True):
            if moment.before is not None:
                assert other.reward == pytest.approx(moment.told["qa/shaping_reward"], rel=1e-4, abs=1e-5)


@needs_imitation
def test_imitation_relabels_a_replay_buffer(qa):
    """Its other user of such functions: what is sampled has the reward of answers."""
    reward_fn = QAReward(qa, WEIGHTS)
    model = DQN(
        "MlpPolicy",
        toys(2),
        learning_starts=10,
        buffer_size=200,
        replay_buffer_class=ReplayBufferRewardWrapper,
        replay_buffer_kwargs=dict(replay_buffer_class=ReplayBuffer, reward_fn=reward_fn),
        seed=0,
        device="cpu",
    )
    model.learn(60)
    batch = model.replay_buffer.sample(16)
    obs, following = (part.numpy() for part in (batch.observations, batch.next_observations))
    expected = reward_fn(obs, batch.actions.numpy(), following, batch.dones.numpy())
    np.testing.assert_allclose(batch.rewards.numpy()[:, 0], expected, rtol=1e-5)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (
                dict(mode="add"),
                'QAReward got mode=\'add\'; expected "replace" or "potential", as .* own reward is not told',
            ),
            (dict(mode="potential"), 'mode="potential" without gamma'),
            (dict(rewards={"nothing": 1.0}), "QAReward got an answerer that was not taught 'nothing'"),
            (dict(rewards={}), "QAReward got rewards={}; expected weights"),
            (dict(qa=None), "QAReward got qa=None; expected a QuestionAnswerer"),
            (dict(qa=3), "QAReward got qa=int; expected a QuestionAnswerer"),
            (dict(qa="nothing.qa"), "there is no file nothing.qa"),
        ],
    )
    def test_arguments(self, qa, arguments, words):
        with pytest.raises(QAError, match=words):
            QAReward(**(dict(qa=qa, rewards={"danger": 1.0}) | arguments))

    def test_batches_that_do_not_fit(self, qa):
        reward_fn, obs = QAReward(qa, WEIGHTS), np.zeros((3, 4), np.float32)
        with pytest.raises(
            QAError, match=r"actions of the shape \(2,\) and done of \(3,\); expected \(3,\) and \(3,\)"
        ):
            reward_fn(obs, np.zeros(2, int), obs, np.zeros(3, bool))
        with pytest.raises(QAError, match=r"observations of shape \(3, 5\); expected Box"):
            reward_fn(np.zeros((3, 5), np.float32), np.zeros(3, int), obs, np.zeros(3, bool))
