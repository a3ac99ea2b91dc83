"""Certify every so often while the agent learns, to see what could be promised of it."""

from __future__ import annotations

import copy
import inspect
import logging
from os import PathLike
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.bounds import check_whole
from sb3_qa.certificate import Certificate, NotCertified, certify
from sb3_qa.errors import QAError
from sb3_qa.questions import nearest

__all__ = ["CertifyCallback"]

log = logging.getLogger(__name__)

OPTIONS = sorted(set(inspect.signature(certify).parameters) - {"qa", "env", "question", "model", "path"})


class CertifyCallback(BaseCallback):
    """Every so many steps: hold the pair of agent and answerer as it is, :func:`~sb3_qa.certify` it, and log.

    Logged are ``certify/threshold`` (nan where none could be certified), ``miss_rate`` (share of catastrophic
    episodes missed at it), ``catastrophes_per_episode``, ``false_alarms`` (share of the episodes without one),
    ``flagged_share`` (of steps), and ``episodes``. A certificate is of the weights it was made with, and void after the next
    gradient update: with ``save_path`` the answerer is saved beside it. The seeds are the same every time, so that
    what changes is the agent's doing; to deploy the best of several, certify it once more with another seed.

    The random streams that training goes on with are left as they were, so the agent learns what it would have without.

    :param env: environments of its own, without an acting veto. Statistics of a ``VecNormalize`` are taken over from training
    :param question: key of the instance
    :param every: environment steps between certifications
    :param save_path: a folder for ``<steps>.json`` and ``<steps>.qa``
    :param options: those of :func:`~sb3_qa.certify`, e.g. ``miss_rate=0.1, episodes=500``
    """

    def __init__(
        self,
        env: VecEnv,
        question: str,
        every: int,
        save_path: str | PathLike[str] | None = None,
        verbose: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(verbose)
        self.env = env
        self.question = question
        self.every = check_whole("CertifyCallback", "every", every)
        self.save_path = None if save_path is None else Path(save_path)
        if "path" in options:
            raise QAError(
                "CertifyCallback got path=...; expected none, as every certification is of other weights; use save_path="
            )
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise QAError(
                f"CertifyCallback got {unknown[0]}=...; expected options of certify(), e.g. {nearest(unknown[0], OPTIONS)}; mend the name"
            )
        self.options = options
        self.certificates: list[tuple[int, Certificate | None]] = []
        """Of each certification the number of steps before it, and the certificate, None where there was none."""
        self._last = 0

    @property
    def certificate(self) -> Certificate | None:
        """The latest, if it could be made."""
        return self.certificates[-1][1] if self.certificates else None

    def _init_callback(self) -> None:
        if self.env.unwrapped is self.training_env.unwrapped:
            raise QAError(
                "CertifyCallback got the environment that is trained in; expected another, as episodes there are under way; make one"
            )
        if unwrap_vec_normalize(self.training_env) is not None and unwrap_vec_normalize(self.env) is None:
            raise QAError(
                "CertifyCallback got an environment without VecNormalize and the agent sees normalised observations; expected the same "
                "wrappers; write VecNormalize(env, training=False)"
            )

        QuestionAnswerer.from_model(self.model).catalogue.find(self.question)  # who says if there is none

    def _on_training_start(self) -> None:
        self._last = self.num_timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps - self._last >= self.every:
            self._last = self.num_timesteps
            self._certify()
        return True

    def _certify(self) -> None:
        learnt, own = unwrap_vec_normalize(self.training_env), unwrap_vec_normalize(self.env)
        if (
            learnt is not None and own is not None and learnt.norm_obs
        ):  # SB3's own way needs wrappers to be the same all along
            own.obs_rms = copy.deepcopy(learnt.obs_rms)
        answerer = QuestionAnswerer.from_model(self.model)
        certificate: Certificate | None = None
        try:
            certificate = certify(answerer, self.env, self.question, self.model, **self.options)
        except NotCertified as error:
            log.log(logging.WARNING if self.verbose else logging.INFO, "after %d steps: %s", self.num_timesteps, error)
            self._log(float("nan"), float("nan"), error.catastrophes, error.episodes)
        else:
            self._log(certificate.threshold, certificate.missed, certificate.catastrophes, certificate.episodes)
            self.logger.record("certify/false_alarms", certificate.false_alarms_per_episode)
            self.logger.record("certify/flagged_share", certificate.flagged_share)
            if self.save_path is not None:
                self.save_path.mkdir(parents=True, exist_ok=True)
                answerer.save(self.save_path / f"{self.num_timesteps}.qa")
                certificate.save(self.save_path / f"{self.num_timesteps}.json")
        self.certificates.append((self.num_timesteps, certificate))

    def _log(self, threshold: float, missed: float, catastrophes: int, episodes: int) -> None:
        self.logger.record("certify/threshold", threshold)
        self.logger.record("certify/miss_rate", missed)
        self.logger.record("certify/catastrophes_per_episode", catastrophes / episodes)
        self.logger.record("certify/episodes", episodes)
