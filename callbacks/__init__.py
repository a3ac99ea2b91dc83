"""Callbacks for SB3's ``learn``."""

from sb3_qa.callbacks.certify import CertifyCallback
from sb3_qa.callbacks.joint import QACallback

__all__ = ["CertifyCallback", "QACallback"]
