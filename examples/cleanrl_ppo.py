"""PPO in one file, with environments that ask a frozen answerer. No part of the training loop knows of questions.

    python examples/cleanrl_ppo.py                       # SB3 teaches an answerer first, from examples/cartpole.toml
    python examples/cleanrl_ppo.py --qa driver.qa --async-envs

The environments are gymnasium's vector environments. Around them stand two wrappers of ``sb3_qa.wrappers.vector`` with the same
saved answerer: ``VetoAction`` replaces pushes after which the pole is likely to fall, ``ShapeReward`` adds the change of the
answer to "will the pole fall within 20 steps?" to the reward, in the one way that leaves the best policy as it is.

PPO gives the credit for what happened to the action it proposed: the veto is part of the environment it learns in.

What is printed, and written to results.json for every iteration:

    steps     environment steps so far
    return    mean of the environment's own undiscounted returns, over the episodes that ended in this iteration
    length    mean length of these episodes
    vetoed    share of steps in which another action was executed than the one proposed
    shaping   mean of what ShapeReward has added to the reward of a step
    risk      mean answer to the veto's question, about the proposed actions
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are small: more threads would wait for each other

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from torch import nn
from torch.distributions import Categorical

from sb3_qa import QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.wrappers.vector import ShapeReward, VetoAction


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """An environment with a vector of numbers to see, and a few actions to choose from."""
    qa: Path | None = None
    """A saved answerer. Without one, SB3's PPO teaches one first."""
    questions: Path = Path(__file__).parent / "cartpole.toml"
    """What it is taught then."""
    teach_timesteps: int = 20_000
    """How long it is taught: an agent that never falls has nothing to tell about falling."""
    veto: str = "fall[k=5]"
    """The question whose answer is the risk."""
    threshold: float = 0.2
    """An action is vetoed when its risk is at least this; 1 vetoes nothing but what is certain."""
    shape: str = "danger"
    """The question whose answer shapes the reward."""
    weight: float = -1.0
    """Of that answer."""
    async_envs: bool = False
    """Environments in processes of their own."""
    total_timesteps: int = 50_000
    """Environment steps to learn from."""
    num_envs: int = 8
    """Environments side by side."""
    num_steps: int = 128
    """Steps of each environment between two updates."""
    num_minibatches: int = 4
    """Pieces that a rollout is cut into."""
    update_epochs: int = 4
    """How often each piece is learnt from."""
    learning_rate: float = 1e-3
    """Of Adam."""
    gamma: float = 0.99
    """Discount, of the returns and of the shaping."""
    gae_lambda: float = 0.95
    """Between the critic's one-step error (0) and the return that was seen (1)."""
    clip_coef: float = 0.2
    """How far a probability may move in an update."""
    ent_coef: float = 0.01
    """Weight of the policy's entropy."""
    vf_coef: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 0.5
    """The gradient is clipped to this."""
    seed: int = 1
    """Of everything."""
    out: Path = Path("outputs/cleanrl_ppo")
    """Where results go."""


class Agent(nn.Module):
    def __init__(self, n_observed: int, n_actions: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(n_observed, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n_actions)
        )
        self.critic = nn.Sequential(
            nn.Linear(n_observed, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )
        for network, scale in ((self.actor, 0.01), (self.critic, 1.0)):
            layers = [layer for layer in network if isinstance(layer, nn.Linear)]
            for layer in layers:
                nn.init.orthogonal_(layer.weight, scale if layer is layers[-1] else 2**0.5)
                nn.init.zeros_(layer.bias)

    def policy(self, obs: torch.Tensor) -> Categorical:
        return Categorical(logits=self.actor(obs))

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return self.critic(obs).squeeze(-1)


def teach(args: Args) -> Path:
    """An answerer learns from a small agent, whose file is all that is used of it."""
    path = args.out / "driver.qa"
    env = make_vec_env(args.env_id, 8, seed=args.seed)
    policy_kwargs = dict(questions=str(args.questions))
    model = PPO(qa_policy(PPO), env, n_steps=64, policy_kwargs=policy_kwargs, seed=args.seed, device="cpu")
    model.learn(args.teach_timesteps, callback=QACallback())
    QuestionAnswerer.from_model(model).save(path)
    return path


def main(args: Args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    qa = args.qa or teach(args)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    # --- Environments: the only lines that are not any PPO's. The wrappers go around whatever changes what the agent sees.
    envs = gym.make_vec(
        args.env_id,
        args.num_envs,
        vectorization_mode="async" if args.async_envs else "sync",
        vector_kwargs=dict(autoreset_mode=AutoresetMode.SAME_STEP),
        wrappers=[gym.wrappers.RecordEpisodeStatistics],
    )
    envs = VetoAction(envs, question=args.veto, threshold=args.threshold, qa=qa)
    envs = ShapeReward(envs, rewards={args.shape: args.weight}, mode="potential", gamma=args.gamma, qa=qa)

    agent = Agent(envs.single_observation_space.shape[0], int(envs.single_action_space.n))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    T, N = args.num_steps, args.num_envs
    obs_dim = envs.single_observation_space.shape
    seen, arrived = torch.zeros(T, N, *obs_dim), torch.zeros(T, N, *obs_dim)
    actions = torch.zeros(T, N, dtype=torch.long)
    log_probs, rewards = torch.zeros(T, N), torch.zeros(T, N)
    terminated, done = torch.zeros(T, N), torch.zeros(T, N)
    history = []

    obs, _ = envs.reset(seed=args.seed)
    for iteration in range(max(1, args.total_timesteps // (T * N))):
        # --- Act. An episode's end has two observations: the last one, and the first of the next episode.
        returns, lengths, vetoed, shaping, risk = [], [], [], [], []
        for t in range(T):
            seen[t] = torch.as_tensor(obs)
            with torch.no_grad():
                policy = agent.policy(seen[t])
                actions[t] = policy.sample()
                log_probs[t] = policy.log_prob(actions[t])
            obs, reward, terminations, truncations, infos = envs.step(actions[t].numpy())
            over = terminations | truncations
            rewards[t], terminated[t], done[t] = map(torch.as_tensor, (reward, terminations, over))
            arrived[t] = torch.as_tensor(obs)
            for i in over.nonzero()[0]:
                arrived[t, i] = torch.as_tensor(infos["final_obs"][i])
                returns.append(float(infos["final_info"]["episode"]["r"][i]))
                lengths.append(int(infos["final_info"]["episode"]["l"][i]))
            for told, key in ((vetoed, "qa/vetoed"), (shaping, "qa/shaping_reward"), (risk, "qa/risk")):
                of_last = (
                    infos["final_info"][key] if over.any() else infos[key]
                )  # of the step, where an episode has ended
                told.append(np.where(over, of_last, infos[key]).mean())

        # --- How much better was each action than what the critic expected: generalised advantage estimation.
        with torch.no_grad():
            values, next_values = agent.value(seen), agent.value(arrived)
            errors = rewards + args.gamma * next_values * (1 - terminated) - values
            advantages = torch.zeros(T, N)
            ahead = torch.zeros(N)
            for t in reversed(range(T)):
                ahead = errors[t] + args.gamma * args.gae_lambda * (1 - done[t]) * ahead
                advantages[t] = ahead
            targets = advantages + values

        # --- Learn from it, in minibatches.
        batch = [x.reshape(T * N, *x.shape[2:]) for x in (seen, actions, log_probs, advantages, targets)]
        for _ in range(args.update_epochs):
            for index in np.array_split(rng.permutation(T * N), args.num_minibatches):
                o, a, old, advantage, target = (x[index] for x in batch)
                policy = agent.policy(o)
                ratio = (policy.log_prob(a) - old).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                value_loss = 0.5 * (agent.value(o) - target).square().mean()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        row = {
            "steps": (iteration + 1) * T * N,
            "return": float(np.mean(returns)) if returns else None,
            "length": float(np.mean(lengths)) if lengths else None,
            "vetoed": float(np.mean(vetoed)),
            "shaping": float(np.mean(shaping)),
            "risk": float(np.mean(risk)),
        }
        history.append(row)
        words = (f"{key} {'-' if value is None else f'{value:.4g}'}" for key, value in row.items())
        print("  ".join(words), flush=True)

    envs.close()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
    (args.out / "results.json").write_text(json.dumps({"args": settings, "history": history}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
