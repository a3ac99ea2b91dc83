"""A process that records until it is killed: it prints, after each step, how many events it has been told of."""

import sys

import numpy as np
from test_veto import make_risks
from wrapping import toys

from sb3_qa.recorder import FlightRecorder
from sb3_qa.wrappers import VecVetoAction


def main(path, delay, n_steps):
    qa = make_risks([0.9, 0.2, 0.1])
    env = VecVetoAction(toys(2), "ruin", 0.5, qa=qa, record=FlightRecorder(path, delay=delay, before=3, after=3))
    env.reset()
    rng = np.random.default_rng(0)
    evidence = env.rule.evidence
    print("ready", flush=True)
    n_events = n_waiting = 0
    for _ in range(n_steps):
        _, _, _, infos = env.step(rng.integers(3, size=2))
        n_events += sum(info["qa/catastrophe"] or info["crashed"] for info in infos)
        n_waiting = len(evidence._batch.events)
        print(n_events - n_waiting, flush=True)
    env.close()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
