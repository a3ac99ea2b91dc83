"""The callback for rl_zoo3."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback

from sb3_qa import callbacks
from sb3_qa.callbacks.joint import eval_callbacks
from sb3_qa.errors import QAError
from sb3_qa.zoo.overwritten import overwritten
from sb3_qa.zoo.seat import unseat
from sb3_qa.zoo.tuned import Kept

__all__ = ["QACallback"]


class QACallback(callbacks.QACallback):
    """:class:`sb3_qa.callbacks.QACallback`, which first puts the wrappers of :mod:`sb3_qa.zoo` outermost.

    In the environment that is trained in, and in those of sibling callbacks. Its arguments are the same.
    """

    def _init_callback(self) -> None:
        kind = type(self._policy)
        if not issubclass(kind, Kept):
            lost = [name for name, value in overwritten().items() if getattr(kind, name, None) != value]
            if lost:
                raise QAError(
                    f"rl_zoo3 has overwritten policy_kwargs, and so {kind.__qualname__} got no {', '.join(lost)} of the hyperparameters; "
                    "expected them; name a policy of sb3_qa.zoo, as sb3_qa.zoo.ppo.MlpPolicy, or give the class these as attributes"
                )
        super()._init_callback()

    def _on_training_start(self) -> None:
        model = self.model
        env = model.get_env()
        if env is not None:
            outermost = unseat(env, model._last_obs)
            if outermost is not env:
                model.set_env(outermost, force_reset=False)
        around: BaseCallback | None = self.locals.get("callback")
        for sibling in eval_callbacks(around):
            sibling.eval_env = unseat(sibling.eval_env)
        super()._on_training_start()
