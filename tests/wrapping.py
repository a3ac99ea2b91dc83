"""What the tests of the wrappers share: an environment that says what was done to it, an answerer that answers
differently in every state, and trajectories told apart by one environment.
"""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Choice, Number, Question, QuestionAnswerer
from sb3_qa.policies import qa_policy
from sb3_qa.truth import eventually, now

QUESTIONS = [
    Question(
        "Will it crash within {k} steps after {action}?", eventually("crashed", within="k"), k=[1, 3], name="crash"
    ),
    Question("Will it crash within 3 steps?", eventually("crashed", within=3), name="danger"),
    Question("How fast is it?", now("speed"), answer=Number(0, 10), name="speed"),
    Question("Which lane is it in?", now("lane"), answer=Choice("left", "right"), name="lane"),
]
KEYS = ["crash[k=1]", "crash[k=3]", "danger", "speed", "lane"]
VERDICT = {
    "qa/risk",
    "qa/catastrophe",
    "qa/vetoed",
    "qa/proposed_action",
    "qa/executed_action",
    "qa/no_safe_action",
}
REWARDS = {"qa/raw_reward", "qa/shaping_reward"}

VECTOR = spaces.Box(-10, 10, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (8, 7, 3), np.uint8)  # of two of them, the channels are still the smallest dimension
BOTH = spaces.Dict({"image": IMAGE, "vector": VECTOR})


class Toy(gym.Env):
    """Draws what it shows at random, and tells in ``info["did"]`` which action reached it.

    Episodes last ``length`` steps; every second one is truncated, the others terminate. With ``reuse`` one observation
    array and one info serve for every step.
    """

    def __init__(self, action_space=None, observation_space=VECTOR, length=5, reuse=False):
        self.action_space = action_space or spaces.Discrete(3)
        self.observation_space = observation_space
        self.length = length
        self.reuse = reuse
        self._episodes = 0
        self._info = {}
        self._seen = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        self._episodes = 1 if seed is not None else self._episodes + 1
        return self._arrive(crashed=False)

    def step(self, action):
        assert self.action_space.contains(action), action
        self._steps += 1
        over = self._steps >= self.length
        truncated = over and self._episodes % 2 == 0
        obs, info = self._arrive(crashed=over and not truncated)
        info["did"] = np.array(action)
        reward = float(self.np_random.normal() + np.sum(action))
        return obs, reward, over and not truncated, truncated, info

    def _arrive(self, crashed):
        if not self.reuse:
            self._seen, self._info = None, {}
        self._seen = self._fill(self.observation_space, self._seen)
        self._info.pop("did", None)
        self._info.update(crashed=bool(crashed), speed=float(self.np_random.uniform(0, 10)), lane=self._steps % 2)
        return self._seen, self._info

    def _fill(self, space, array):
        if isinstance(space, spaces.Dict):
            return {key: self._fill(part, (array or {}).get(key)) for key, part in space.items()}
        if array is None:
            array = np.zeros(space.shape, space.dtype)
        if space.dtype == np.uint8:  # bright ones and dark ones
            array[...] = self.np_random.integers(self.np_random.integers(2, 257), size=space.shape)
        else:
            array[...] = self.np_random.normal(size=space.shape)
        return array


def toys(n=1, wrap=lambda env: env, **arguments):
    """Environments whose episodes last 5, 6, ... steps, so that they do not end together."""
    return DummyVecEnv([lambda i=i: wrap(Toy(length=5 + i, **arguments)) for i in range(n)])


def make_model(env, base="MlpPolicy", questions=QUESTIONS, **arguments):
    """A small PPO, whose untrained answers and preferences differ from state to state and from action to action."""
    policy_kwargs = dict(questions=questions, net_arch=[8], qa_net_arch=[16], **arguments.pop("policy_kwargs", {}))
    arguments = dict(n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu") | arguments
    model = PPO(qa_policy(PPO, base), env, policy_kwargs=policy_kwargs, **arguments)
    generator = torch.Generator().manual_seed(1)
    head = model.policy.qa_head
    with torch.no_grad():
        bias = head.weights(head.flat).bias.clone()
        for parameter in (head.flat, model.policy.action_net.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        weights = head.weights(head.flat)
        weights.bias.copy_(bias)  # the answers lie on both sides of an even chance
        weights.action.mul_(3.0)
    return model


def make_qa(base="MlpPolicy", **arguments):
    return QuestionAnswerer.from_model(make_model(toys(**arguments), base))


def force(qa, question, logits):
    """Make the answer to ``question`` (of one logit) the same in every state: yes has this logit for each action.

    Of actions with several parts, or with bits, the logits of the parts (or of the bits set) add up.
    """
    head = qa.policy.qa_head
    target = qa.catalogue.target_of[question]
    assert target.width == 1
    assert head.action_features.n_features == len(logits) <= head.width
    with torch.no_grad():
        weights = head.weights(head.flat)
        for part in (weights.bias, weights.action, *weights.layers[0]):
            part.zero_()
        weights.action[:, : len(logits)] = 20.0 * torch.eye(len(logits))  # tanh(20) = 1
        weights.rows[target.start].zero_()
        weights.rows[target.start, : len(logits)] = torch.as_tensor(logits) / head.scale
    return qa


def prefer(qa, logits):
    """Make the policy's preferences over actions the same in every state."""
    with torch.no_grad():
        qa.policy.action_net.weight.zero_()
        qa.policy.action_net.bias.copy_(torch.as_tensor(logits))
    return qa


def logit(p):
    return float(np.log(p / (1 - p)))


class Moment(NamedTuple):
    """A step of one environment, or a reset, where ``before`` is None."""

    before: Any
    """What the agent saw when it chose."""
    action: Any
    """What it chose."""
    after: Any
    """The state arrived in: the true last one, at the end of an episode."""
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]

    @property
    def told(self):
        return {key: value for key, value in self.info.items() if key.startswith("qa/")}

    @property
    def executed(self):
        return self.info.get("qa/executed_action", self.action)


def copied(obs):
    return {key: np.array(value) for key, value in obs.items()} if isinstance(obs, dict) else np.array(obs)


def one(obs, i):
    return {key: value[i] for key, value in obs.items()} if isinstance(obs, dict) else obs[i]


def batch(obs):
    return {key: value[None] for key, value in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]


def run_single(env, actions, seed=7):
    """Moments of one environment."""
    obs, info = env.reset(seed=seed)
    moments = [Moment(None, None, copied(obs), 0.0, False, False, info)]
    for action in actions:
        before = copied(obs)
        obs, reward, terminated, truncated, info = env.step(action)
        moments.append(Moment(before, action, copied(obs), reward, terminated, truncated, dict(info)))
        if terminated or truncated:
            obs, info = env.reset()
            moments.append(Moment(None, None, copied(obs), 0.0, False, False, info))
    return moments


def run_vec(venv, actions, seed=7):
    """Moments of each environment of a vectorised one, for ``actions`` of shape (n_steps, n_envs, ...)."""
    venv.seed(seed)
    obs = venv.reset()
    each = [
        [Moment(None, None, one(copied(obs), i), 0.0, False, False, venv.reset_infos[i])] for i in range(venv.num_envs)
    ]
    for chosen in actions:
        before = copied(obs)
        obs, rewards, dones, infos = venv.step(np.array(chosen))
        for i, (moments, info) in enumerate(zip(each, infos, strict=True)):
            after = info["terminal_observation"] if dones[i] else one(obs, i)
            cut = bool(dones[i] and info["TimeLimit.truncated"])
            done = bool(dones[i])
            moments.append(
                Moment(one(before, i), chosen[i], copied(after), float(rewards[i]), done and not cut, cut, info)
            )
            if dones[i]:
                moments.append(Moment(None, None, copied(one(obs, i)), 0.0, False, False, venv.reset_infos[i]))
    return each


IGNORED = 99  # no action of anybody's: given where an environment is about to reset itself


def info_of(infos, i):
    """What vector infos tell of one environment."""
    told = {}
    for key, value in infos.items():
        if not key.startswith("_") and key not in ("final_obs", "final_info") and infos[f"_{key}"][i]:
            told[key] = value[i].item() if isinstance(value[i], np.generic) else value[i]
    return told


def run_gym_vec(envs, actions, seed=7, ignored=IGNORED):
    """Moments of each environment of a gymnasium vector environment, whichever way it resets itself.

    Each takes its column of ``actions`` (n_steps, n_envs, ...) as fast as it takes actions at all.
    """
    mode, n = envs.metadata["autoreset_mode"], envs.num_envs
    obs, infos = envs.reset(seed=seed)
    each = [[Moment(None, None, one(copied(obs), i), 0.0, False, False, info_of(infos, i))] for i in range(n)]
    taken, resetting = [0] * n, np.zeros(n, bool)
    while min(taken) < len(actions):
        chosen = [ignored if resetting[i] else actions[min(taken[i], len(actions) - 1)][i] for i in range(n)]
        before = copied(obs)
        obs, rewards, terminated, truncated, infos = envs.step(np.array(chosen))
        done = terminated | truncated
        for i, moments in enumerate(each):
            if resetting[i]:
                assert rewards[i] == 0.0 and not done[i]
                more = [Moment(None, None, one(copied(obs), i), 0.0, False, False, info_of(infos, i))]
            else:
                same = done[i] and mode is AutoresetMode.SAME_STEP
                after, info = (infos["final_obs"][i], infos["final_info"]) if same else (one(obs, i), infos)
                ends = bool(terminated[i]), bool(truncated[i])
                more = [Moment(one(before, i), chosen[i], copied(after), float(rewards[i]), *ends, info_of(info, i))]
                if same:
                    more.append(Moment(None, None, one(copied(obs), i), 0.0, False, False, info_of(infos, i)))
            if taken[i] < len(actions):
                moments.extend(more)
            taken[i] += not resetting[i]
        resetting = done & (mode is AutoresetMode.NEXT_STEP)
        if mode is AutoresetMode.DISABLED and done.any():
            obs, infos = envs.reset(options={"reset_mask": done})
            for i in done.nonzero()[0]:
                if taken[i] <= len(actions):
                    each[i].append(Moment(None, None, one(copied(obs), i), 0.0, False, False, info_of(infos, i)))
    return each


def answer(qa, key, moment):
    """What has to be told of a moment, asked for independently: at a reset, of the action the policy prefers."""
    if not qa.catalogue.instances[key].per_action:
        return qa.ask(key, batch(moment.after)).value[0]
    if moment.before is None:
        preferred, _ = qa.policy.predict(batch(moment.after), deterministic=True)
        return qa.ask(key, batch(moment.after), preferred).value[0]
    return qa.ask(key, batch(moment.before), np.asarray(moment.executed)[None]).value[0]


def assert_same(a, b):
    """Two trajectories of one environment are alike in all that is told and given."""
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_equal(left.after, right.after)
        assert (left.terminated, left.truncated) == (right.terminated, right.truncated)
        np.testing.assert_allclose(left.reward, right.reward, rtol=1e-5, atol=1e-5)
        assert left.told.keys() == right.told.keys()
        for key, value in left.told.items():
            np.testing.assert_allclose(value, right.told[key], rtol=1e-5, atol=1e-5, err_msg=key)
            assert type(value) is type(right.told[key])
        if left.before is not None:
            np.testing.assert_equal(left.info["did"], right.info["did"])


class Witness(BaseCallback):
    """Compares, at every step of training, what is told with what the answerer says of what the policy saw."""

    def __init__(self, qa=None, keys=KEYS):
        super().__init__()
        self.qa = qa
        self.keys = keys
        self.n_steps = self.n_ended = 0
        self.rewards = []
        self.infos = []

    def _on_training_start(self):
        self.qa = self.qa or QuestionAnswerer.from_model(self.model)

    def _on_step(self):
        seen, new_obs, dones = self.model._last_obs, self.locals["new_obs"], self.locals["dones"]
        for i, info in enumerate(self.locals["infos"]):
            after = info["terminal_observation"] if dones[i] else one(new_obs, i)
            moment = Moment(one(seen, i), self.locals["clipped_actions"][i], after, 0.0, False, False, info)
            for key in self.keys:
                np.testing.assert_allclose(info[f"qa/{key}"], answer(self.qa, key, moment), rtol=1e-4, atol=1e-5)
        self.n_steps += 1
        self.n_ended += int(dones.sum())
        self.rewards.append(self.locals["rewards"].copy())
        self.infos.append(self.locals["infos"])
        return True
