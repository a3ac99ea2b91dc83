"""What a shared live answerer costs: who learns, for each update; who follows, for each look and each update. Processor time.

python tests/bench/sharing.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import Question, QuestionAnswerer
from sb3_qa.policies import qa_policy
from sb3_qa.sharing import FollowingAnswerer
from sb3_qa.truth import eventually


def microseconds(call: Callable[[], object], n: int) -> float:
    call()
    begin = time.process_time()
    for _ in range(n):
        call()
    return (time.process_time() - begin) / n * 1e6


def main() -> None:
    torch.set_num_threads(1)
    question = Question(
        "Over within {k} with {action}?", eventually(lambda step: step.terminated, within="k"), k=[5, 20], name="over"
    )
    for name, net_arch in (("64x64", [64, 64]), ("256x256", [256, 256])):
        env = make_vec_env("CartPole-v1", 1)
        model = PPO(qa_policy(PPO), env, policy_kwargs=dict(questions=[question], net_arch=net_arch), device="cpu")
        model.policy.qa_joint.learnt = lambda: True  # it is trained by hand here
        for parameter in [*model.policy.parameters(), model.policy.qa_head.flat]:
            parameter.grad = torch.zeros_like(parameter)
        before = [microseconds(model.policy.optimizer.step, 500) for _ in range(5)]
        shared = QuestionAnswerer.from_model(model).share()
        after = [microseconds(model.policy.optimizer.step, 500) for _ in range(5)]
        following = FollowingAnswerer(shared._folder, shared._places, ())

        def update(shared: object = shared, following: FollowingAnswerer = following) -> None:
            shared.begin()
            shared.end()
            following.refresh()

        counted = microseconds(lambda shared=shared: (shared.begin(), shared.end()), 5000)
        obs, action = env.reset(), [0]
        look, copy = microseconds(following.refresh, 20_000), microseconds(update, 2000) - counted
        answer = microseconds(lambda f=following, o=obs, a=action: f.ask("over[k=5]", o, a), 1000)
        print(
            f"{name}, {len(following._copy) // 1000} kB: a step of the optimiser {min(before):.0f} us, shared {min(after):.0f} us; "
            f"the counter {counted:.2f} us; a look {look:.2f} us, a copy {copy:.0f} us; an answer {answer:.0f} us"
        )


if __name__ == "__main__":
    main()
